"""Write a Llama with its SEAL scales as a GGUF file, which llama.cpp and its kin run.

    python export_gguf.py --ckpt llama-7b --scales scales.safetensors --outtype q8_0
    python export_gguf.py --ckpt llama-7b.Q4_K_M.gguf --scales scales.safetensors

From a Hugging Face folder three things are no copy:

  o_proj     column c is multiplied by its channel's scale, in float32, and cast once
  q, k       rows change places: Hugging Face turns the channels (i, i + d/2) as a pair,
             llama.cpp's llama (2i, 2i + 1)
  positions  the extension the scales were trained with becomes metadata, or a table

From a GGUF file all is copied byte for byte but attn_output.weight, which is o_proj.
extras/gguf_file.py reads such files.
"""

import json
import math
import os
import re
import shutil
import struct
import sys
from collections import Counter
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Callable, NamedTuple

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFValueType, TokenType
from torch import Tensor
from tqdm import tqdm

import seal
from seal import UserError, note

# ---- 1. The format: a header, keys with values, the tensors' places, their bytes -----

BLOCK = 8 << 20  # elements in memory at a time


class Stored(NamedTuple):
    """A tensor of the file to be written."""

    name: str
    shape: tuple[int, ...]  # as in PyTorch: rows first
    kind: GGMLQuantizationType
    rows: Callable[[slice], np.ndarray]  # makes the bytes of some rows


def pack(value: str | bool | int | float) -> bytes:
    if isinstance(value, str):
        raw = value.encode("utf-8", "replace")
        return struct.pack("<Q", len(raw)) + raw
    return struct.pack({bool: "<?", int: "<I", float: "<f"}[type(value)], value)


def entry(key: str, value) -> bytes:
    """A key of the metadata and its value: text, truth, number, or a list of these."""
    kinds = {
        str: GGUFValueType.STRING,
        bool: GGUFValueType.BOOL,
        int: GGUFValueType.UINT32,
        float: GGUFValueType.FLOAT32,
    }
    if not isinstance(value, list):
        return pack(key) + struct.pack("<I", kinds[type(value)]) + pack(value)
    kinds[int] = GGUFValueType.INT32  # token_type's, in llama.cpp
    kind = kinds[type(value[0]) if value else str]
    head = struct.pack("<IIQ", GGUFValueType.ARRAY, kind, len(value))
    return pack(key) + head + b"".join(map(pack, value))


def write(path: Path, entries: list[bytes], tensors: list[Stored], alignment=32):
    """Write a file: a header that says where each tensor begins, then the tensors."""
    header = [struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(entries)), *entries]
    end = 0  # of the tensors so far, from where the header ends
    for name, shape, kind, _ in tensors:
        n = len(shape)
        about = struct.pack(f"<I{n}QIQ", n, *reversed(shape), kind, end)
        header.append(pack(name) + about)
        end += math.prod(gguf.quant_shape_to_byte_shape(shape, kind))
        end += -end % alignment
    header = b"".join(header)
    header += bytes(-len(header) % alignment)
    free = shutil.disk_usage(path.parent).free
    if len(header) + end > free:
        raise UserError(f"{path}: needs {end / 1e9:.1f} GB; {free / 1e9:.1f} GB are free")
    bar = tqdm(total=end, desc="writing", unit="B", unit_scale=True, leave=False)
    with seal.whole_file(path) as unfinished, bar, open(unfinished, "wb") as file:
        file.write(header)
        for _, shape, _, rows in tensors:
            step = max(1, BLOCK // max(1, math.prod(shape[1:])))
            for i in range(0, shape[0], step):
                rows(slice(i, i + step)).tofile(file)
                bar.update(file.tell() - len(header) - bar.n)
            file.write(bytes(-file.tell() % alignment))
        if file.tell() != len(header) + end:
            raise ValueError("the tensors are not as long as the header says")


# ---- 2. Tensors and positions --------------------------------------------------------

TYPES = {n: GGMLQuantizationType[n.upper()] for n in ("f32", "f16", "bf16", "q8_0")}
F32, F16, BF16, Q8_0 = TYPES.values()
DTYPES = {F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16}
FILE_TYPES = {F32: 0, F16: 1, BF16: 32, Q8_0: 7}  # llama.cpp's numbers for a whole file


def encode(tensor: Tensor, kind: GGMLQuantizationType, name: str) -> np.ndarray:
    """The bytes of some rows in a GGUF type: the one and only cast."""
    limit = torch.finfo(DTYPES.get(kind, torch.float16)).max  # blocks have f16 scales
    low, high = tensor.aminmax()
    if not max(-low, high) <= limit:  # so spelled, NaN fails too
        raise UserError(f"{name}: holds NaN or a number too large for {kind.name}")
    if kind in DTYPES:
        return tensor.to(DTYPES[kind]).contiguous().view(torch.uint8).numpy()
    return gguf.quantize(tensor.float().contiguous().numpy(), kind)


def folder_rows(weights, name: str, order, scales, kind, rows: slice) -> np.ndarray:
    """Opens the tensor for every block anew: so its memory is given back."""
    tensor = weights[name][rows if order is None else order[rows]]
    return encode(seal.fold(name, tensor, scales), kind, name)


def plan(weights: seal.Weights, config: seal.Config, arch: str, scales, kind):
    """Every tensor of the model; UserError unless the checkpoint has just these."""
    weights.check(config)
    layers = config.num_hidden_layers
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, (_, _, shape) in weights.places.items():
        kept, order = kind, None
        if len(shape) == 1:
            kept = F32  # norms and biases, as llama.cpp has it
        elif kind == Q8_0 and shape[1] % 32:
            kept = F16  # rows that cannot be cut into blocks
        part = name.split(".")[-2]
        if arch == "llama" and part in heads:  # others keep Hugging Face's
            order = torch.arange(shape[0]).view(heads[part], 2, -1)  # (H or G, 2, d/2)
            order = order.transpose(1, 2).flatten()  # where llama.cpp's rows come from
        rows = partial(folder_rows, weights, name, order, scales, kept)
        full = name if part == "lm_head" else f"model.{name}"
        yield Stored(names.get_name(full, (".weight", ".bias")), shape, kept, rows)


def rope(config: seal.Config, arch: str) -> tuple[dict, list[Stored]]:
    """The metadata of the rotary frequencies, and the tensor that completes it, if any.

    llama.cpp computes b^(-2i/d) itself: NTK is only another base. It knows linear and the
    usual YaRN, too. All else (Llama 3's, other YaRN) is a table of divisors and a factor.
    """
    scaling, tensors = config.rope_scaling, []
    kind, keys = scaling["rope_type"], {"freq_base": float(config.rope_theta)}
    usual = {"beta_fast": 32, "beta_slow": 1, "attention_factor": None}
    if kind == "yarn" and any(scaling.get(k) not in (None, usual[k]) for k in usual):
        kind = "other"
    if kind in ("linear", "yarn"):
        keys |= {"scaling.type": kind, "scaling.factor": float(scaling["factor"])}
    if kind == "yarn":
        original = scaling["original_max_position_embeddings"]
        keys["scaling.original_context_length"] = int(original)
    if kind not in ("default", "linear", "yarn"):
        if arch != "llama":
            raise UserError(f"llama.cpp's {arch} has no table for {scaling}")
        wanted, magnitude = seal.rope_frequencies(config)
        keys["scaling.attn_factor"] = float(magnitude)
        plain, _ = seal.rope_frequencies(replace(config, rope_scaling={"rope_type": "default"}))
        divisors = (plain / wanted).float().numpy()  # (d/2,)
        tensors.append(Stored("rope_freqs.weight", divisors.shape, F32, divisors.__getitem__))
    return {f"{arch}.rope.{key}": value for key, value in keys.items()}, tensors


# ---- 3. Vocabulary -------------------------------------------------------------------

# How byte-level tokenizers cut text, by llama.cpp's names, in tokenizer.json's words.
PRE_TOKENIZERS: dict[str, dict] = seal.read_json(seal.ASSETS / "pre_tokenizers.json")
MERGES_IGNORED = ("llama-bpe", "tekken")  # a word that is a token is taken as it is
SAMPLE = "Ａ  é ﬁ\n "  # what NFKC, lower case, stripping and the like would change


def sentencepiece_keys(backend, text: str, model: dict) -> dict:
    """SentencePiece's kind: all is merged, with ▁ for spaces. text: SAMPLE, normalised."""
    for byte in range(256):
        if f"<0x{byte:02X}>" not in model["vocab"]:
            raise ValueError(f"the tokenizer has no token for the byte {byte}, as llama.cpp's have")
    if backend.pre_tokenizer:
        pieces = backend.pre_tokenizer.pre_tokenize_str(text)
        text = "|".join(piece for piece, _ in pieces)
    if text.removeprefix("▁") != SAMPLE.replace(" ", "▁"):
        raise ValueError("the tokenizer changes text first, which llama.cpp does not")
    return {"model": "llama", "pre": "default", "add_space_prefix": text[0] == "▁"}


def byte_level_keys(backend, text: str, model: dict, cutter: dict | None) -> dict:
    """Words are cut first, and what is merged are bytes, spelled as letters."""
    # Qwen's NFC passes: llama.cpp leaves it out, and nearly all text is in that form.
    name = next((n for n, known in PRE_TOKENIZERS.items() if known == cutter), None)
    if text != SAMPLE or name is None:
        known = ", ".join(PRE_TOKENIZERS)
        raise ValueError("the tokenizer cuts words in an unknown way, "
                         f"{json.dumps(cutter):.300}; known are {known}")
    if model["ignore_merges"] != (name in MERGES_IGNORED):
        backend.model.ignore_merges = False
        for piece in model["vocab"]:
            if len(backend.model.tokenize(piece)) > 1:
                raise ValueError(f"{piece!r} is a token that no merges make, unlike {name}'s")
    merges = [" ".join(pair) for pair in model["merges"]]
    return {"model": "gpt2", "pre": name, "merges": merges}


def vocabulary(tokenizer: seal.Tokenizer) -> dict:
    """The tokenizer as metadata, from the one form that transformers gives to all."""
    hf, rows = tokenizer.hf, tokenizer.vocab_size
    backend = hf.backend_tokenizer
    # That setting only concerns where in the text a token stands.
    form = backend.to_str().replace('"trim_offsets":false', '"trim_offsets":true')
    form = json.loads(form)
    model, added = form["model"], {t["content"]: t for t in form["added_tokens"]}
    if model["type"] != "BPE":
        raise ValueError(f"the tokenizer is a {model['type']}; llama.cpp runs BPE")
    text = SAMPLE
    if backend.normalizer:
        text = backend.normalizer.normalize_str(text)
    if model["byte_fallback"]:
        keys = sentencepiece_keys(backend, text, model)
    else:
        keys = byte_level_keys(backend, text, model, form["pre_tokenizer"])
    # A token for each row of the embedding
    texts, kinds = [f"[PAD{i}]" for i in range(rows)], [TokenType.UNUSED] * rows
    for text, i in backend.get_vocab(with_added_tokens=True).items():
        if i < rows:
            texts[i], kinds[i] = text, kind_of_token(text, added.get(text), model)
        elif text in added:
            note(f"token {text!r} left out: {i} is beyond the embedding's {rows} rows")
        else:
            raise ValueError(f"token {i} is beyond the embedding's {rows} rows")
    special = {"bos": hf.bos_token_id, "unknown": hf.unk_token_id,
               "padding": hf.pad_token_id, "eos": hf.eos_token_id}
    if keys["model"] == "llama":
        ranks = {}  # llama.cpp joins the neighbours that make the piece of the best score
        for rank, pair in enumerate(model["merges"]):
            ranks.setdefault("".join(pair), -float(rank))
        keys["scores"] = [ranks.get(text, -1e6) for text in texts]
        if special["unknown"] is not None:
            kinds[special["unknown"]] = TokenType.UNKNOWN
        # llama.cpp puts its space after special tokens, too, where transformers may not.
        special_tokens = "|".join(map(re.escape, added))
        start = re.match(f"(?:{special_tokens})*", tokenizer.render("Hi"))[0]
        first = next(token for token in hf.tokenize(start + "a") if token not in added)
        keys["add_space_prefix"] &= first[0] == "▁"
    keys |= {"tokens": texts, "token_type": [int(kind) for kind in kinds]}
    special["eot"] = tokenizer.end_token
    if special["eos"] is None:  # were none named, llama.cpp would end at token 11
        special["eos"] = min(tokenizer.stop)
    for name, i in special.items():
        if i is not None and i < rows:
            keys[f"{name}_token_id"] = i
    keys["add_bos_token"] = bool(tokenizer.bos)
    keys["add_eos_token"] = False  # a prompt is there to be answered
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items()}


def kind_of_token(text: str, added: dict | None, model: dict) -> TokenType:
    if added:
        for name in ("lstrip", "rstrip", "single_word"):
            if added[name]:
                note(f"token {text!r} has {name}, which llama.cpp does not know: beside "
                     "spaces or letters it may be cut otherwise")
        return TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    if model["byte_fallback"] and re.fullmatch("<0x[0-9A-F]{2}>", text):
        return TokenType.BYTE
    return TokenType.NORMAL


def templates(tokenizer: seal.Tokenizer) -> dict:
    """The chat template, and those beside it that have names: for tools, say."""
    key, own, names = "tokenizer.chat_template", tokenizer.hf.chat_template, []
    keys = {key: tokenizer.template}
    if isinstance(own, dict):
        for name, template in own.items():
            if name != "default":
                names.append(re.sub("[^A-Za-z0-9]", "_", name))  # as llama.cpp's converter
                keys[f"{key}.{names[-1]}"] = template
        keys["tokenizer.chat_templates"] = names
    return keys


# ---- 4. From a folder ----------------------------------------------------------------

SIZES = {  # in the metadata, and in Config
    "context_length": "context",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.dimension_count": "head_dim",
    "vocab_size": "vocab_size",
}
FACTS = (
    "checkpoint", "mode", "task", "length", "samples", "epochs", "lr", "seed", "steps",
    "extend", "template",
)


def story(folded: list[dict]) -> dict:
    """What the file says of the scales in it. folded: facts of each, the newest last.

    With a fingerprint of each: who folds one of them in again is refused.
    """
    newest = folded[-1]
    about = f"task {newest['task']}"
    if "length" in newest:
        about += f", {newest['length']} tokens"
    method = seal.METHOD[newest["mode"]]
    keys = {"general.description": f"{method} folded in ({about}); arXiv 2501.15225"}
    for name in FACTS:
        if name in newest:
            keys[f"seal.{name}"] = newest[name]
    keys["seal.fingerprint"] = ",".join(facts["fingerprint"] for facts in folded)
    return keys


def from_folder(folder: Path, config: seal.Config, scales, facts, outfile, kind) -> str:
    """Write a folder's GGUF file; returns what to say of its tensors."""
    raw = seal.read_json(folder / "config.json")
    arch = raw["model_type"] if raw.get("model_type") in ("qwen2", "qwen3") else "llama"
    name = folder.resolve().name
    keys = {
        "general.architecture": arch,
        "general.type": "model",
        "general.name": name,
        "general.base_model.count": 1,
        "general.base_model.0.name": name,
        "general.file_type": FILE_TYPES[kind],
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
    }
    # The scales in the weights: what seal.py's fold has put there, and what is now.
    folded, template = raw.get("seal", []), "auto"
    if facts:
        folded, template = [*folded, asdict(facts)], facts.template
    tokenizer = seal.Tokenizer(folder, config, template)
    positions, table = rope(config, arch)
    with seal.blame(folder):
        if folded:
            keys["general.finetune"] = f"seal-{folded[-1]['mode'][0]}"
            keys |= story(folded)
        for key, size in SIZES.items():
            keys[f"{arch}.{key}"] = getattr(config, size)
        keys |= positions | vocabulary(tokenizer)
        if facts or tokenizer.name != "none":
            keys |= templates(tokenizer)
        entries = [entry(key, value) for key, value in keys.items()]
    tensors = [*table, *plan(seal.Weights(folder), config, arch, scales, kind)]
    write(outfile, entries, tensors)
    return f"{len(tensors)} tensors"


# ---- 5. From a GGUF file -------------------------------------------------------------


def longer(source, config: seal.Config) -> dict:
    """The keys that give a GGUF file's model the longer context of the config."""
    arch, old = source.arch, source.config.rope_scaling
    if "rope_freqs.weight" in source.tensors:
        raise UserError(f"{source.path}: to extend it, make a folder of it (extras.convert)")
    keys = {f"{arch}.context_length": config.context}
    keys[f"{arch}.rope.freq_base"] = float(config.rope_theta)
    if config.rope_scaling != old:
        keys |= rope(config, arch)[0]
    elif "original_max_position_embeddings" in old:
        # Left out, it would be the new context.
        original = old["original_max_position_embeddings"]
        keys[f"{arch}.rope.scaling.original_context_length"] = int(original)
    return keys


def from_gguf(source, config: seal.Config, scales, facts, outfile) -> str:
    """Write a GGUF file anew, with scales and extension; returns what to say of it."""
    from extras import gguf_file

    new, tensors, ways = {}, [], Counter()
    if facts:
        past = [{"fingerprint": f} for f in config.folded]
        new |= story([*past, asdict(facts)])
    if config != source.config:
        new |= longer(source, config)
    waiting = {f"blk.{i}.attn_output.weight": s for i, s in enumerate(scales or [])}
    width = config.num_attention_heads * config.head_dim
    with seal.blame(source.path):
        for name, t in source.tensors.items():
            stored = Stored(name, t.shape, t.kind, t.read)
            scale = waiting.pop(name, None)
            if scale is not None and (scale != 1).any():
                columns = scale.repeat_interleave(width // len(scale))  # (H * d,)
                kind, rows, how = gguf_file.scaled(t, columns, encode)
                stored = Stored(name, t.shape, kind, rows)
                ways[how] += 1
            tensors.append(stored)
        if waiting:
            raise ValueError(f"lacks the tensor {min(waiting)}")
        entries = source.entries(without=new.keys())
        entries += [entry(key, value) for key, value in new.items()]
    write(outfile, entries, tensors, source.alignment)
    done = f"{len(tensors)} tensors"
    for how, count in ways.items():
        done += f", {count} {how}"
    return done


# ---- 6. Command line -----------------------------------------------------------------


def usual_name(ckpt: Path, facts, kind) -> str:
    """BASE-seal-h-Q4_1.gguf, as llama.cpp names files. kind None: what the name says."""
    name = re.sub(r"(-\d{5}-of-\d{5})?\.gguf$", "", Path(os.path.abspath(ckpt)).name)
    base, old = re.fullmatch(r"(.+?)(?:[-.]((?:I?Q|TQ|B?F)[0-9]\w*))?", name).groups()
    parts = [base]
    if facts:
        parts.append(f"seal-{facts.mode[0]}")
    if kind or old:
        parts.append(kind.name if kind else old)
    return "-".join(parts) + ".gguf"


def main(arguments: list[str] | None = None) -> None:
    p = seal.Parser("export_gguf.py", description=__doc__.splitlines()[0])
    p.add_argument("--ckpt", type=Path, default=seal.TOY, help="folder or .gguf (the toy)")
    p.add_argument("--scales", help="or none (scales.safetensors, if it is here)")
    p.add_argument("--extend", help="none, ntk:4, linear:4, yarn:4 (the scales' own)")
    p.add_argument("--outfile", type=Path, help="(NAME-seal-h-TYPE.gguf, here)")
    p.add_argument("--outtype", choices=[*TYPES, "auto"], default="auto",
                   help="auto: bf16 if the folder has it, else f16; a .gguf's types stay")
    p.add_argument("--check", action="store_true", help="compare with seal.py in llama.cpp")
    args = p.parse_args(arguments)
    is_file, kind = args.ckpt.is_file(), TYPES.get(args.outtype)
    if is_file and (args.outtype != "auto" or args.check):
        raise UserError("--outtype and --check are for folders")
    if args.check:
        from extras import check

        check.find_llama_cpp()
    if is_file:
        from extras import gguf_file

        source = gguf_file.File(args.ckpt)
        config = source.config
    else:
        config = seal.read_config(args.ckpt)
        if kind is None:
            weights = seal.Weights(args.ckpt)
            dtypes = {weights[name].dtype for name in weights.places}
            kind = BF16 if torch.bfloat16 in dtypes else F16
    unasked = args.scales is None and Path("scales.safetensors").is_file()
    if unasked:
        args.scales = "scales.safetensors"
    scales, facts, spec = None, None, args.extend or "none"
    if args.scales not in (None, "none"):
        scales, facts = seal.read_scales(args.scales, config)
        spec = facts.extend
        if args.extend not in (None, spec):
            raise UserError(f"--extend {args.extend}: the scales were trained with {spec}")
        if unasked:
            note("folding in scales.safetensors, which is here; without: --scales none")
        if Path(f"{args.scales}.state").exists():
            note(f"{args.scales}: of an unfinished run, {facts.steps} steps; train --resume")
    extended = seal.extend(config, spec)

    outfile = seal.check_place(args.outfile or usual_name(args.ckpt, facts, kind))
    if is_file and outfile.resolve() in map(Path.resolve, source.paths):
        raise UserError(f"{outfile}: is read; give another --outfile")
    if is_file:
        done = from_gguf(source, extended, scales, facts, outfile)
    else:
        done = from_folder(args.ckpt, extended, scales, facts, outfile, kind)
    folded = "no scales"
    if facts:
        folded = f"{seal.METHOD[facts.mode]} folded in"
    size = f"{outfile.stat().st_size / 1e6:,.1f} MB"
    print(f"{outfile}: {size}, {done}; {folded}; extension {spec}")
    if args.outtype == "auto" and kind == BF16:
        print("bf16 holds the folder's weights exactly. But llama.cpp's CPU then rounds what "
              "they are multiplied with to bf16, too: there --outtype f16 is nearer")
    if args.check:
        print(f"check: {check.check(outfile, args.ckpt, extended, scales, facts)}")
    print(f"try: llama-server -m {outfile} -c {extended.context}")


if __name__ == "__main__":
    sys.exit(seal.exit_status("export_gguf.py", main))
