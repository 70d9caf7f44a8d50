"""Write a Llama with its SEAL scales as a GGUF file, which llama.cpp and its kin run.

    python export_gguf.py --ckpt llama-7b --scales scales.safetensors --outtype q8_0
    python export_gguf.py --ckpt llama-7b.Q4_K_M.gguf --scales scales.safetensors

From a Hugging Face folder three things are no copy:

  o_proj     column c is multiplied by its channel's scale, in float32, and cast once
  q, k       rows change places: Hugging Face turns the channels (i, i + d/2) as a pair,
             llama.cpp's llama (2i, 2i + 1)
  positions  the extension the scales were trained with becomes metadata, or a table

From a GGUF file all is copied byte for byte but attn_output.weight, which is o_proj.
"""

import json
import math
import re
import shutil
import struct
import sys
from collections import Counter
from dataclasses import replace
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
MOST_READS = 4_000_000  # numbers and strings of a header; no model has half


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
    kinds = {str: GGUFValueType.STRING, bool: GGUFValueType.BOOL,
             int: GGUFValueType.UINT32, float: GGUFValueType.FLOAT32}
    if not isinstance(value, list):
        return pack(key) + struct.pack("<I", kinds[type(value)]) + pack(value)
    kinds[int] = GGUFValueType.INT32  # token_type's, in llama.cpp
    kind = kinds[type(value[0]) if value else str]
    head = struct.pack("<IIQ", GGUFValueType.ARRAY, kind, len(value))
    return pack(key) + head + b"".join(map(pack, value))


def write(path: Path, entries: list[bytes], tensors: list[Stored], alignment=32):
    """Write the file, read it back, and only then give it its name."""
    header = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(entries)) + b"".join(entries)
    end = 0
    for name, shape, kind, _ in tensors:
        n = len(shape)
        header += pack(name) + struct.pack(f"<I{n}QIQ", n, *reversed(shape), kind, end)
        size = math.prod(gguf.quant_shape_to_byte_shape(shape, kind))
        end += size + -size % alignment
    free = shutil.disk_usage(path.parent).free
    if len(header) + end > free:
        raise UserError(f"{path}: needs {end / 1e9:.1f} GB; {free / 1e9:.1f} GB are free")
    bar = tqdm(total=end, desc="writing", unit="B", unit_scale=True, leave=False)
    with seal.whole_file(path) as unfinished:
        with bar, open(unfinished, "wb") as file:
            file.write(header + bytes(-len(header) % alignment))
            start = file.tell()
            for _, shape, _, rows in tensors:
                step = max(1, BLOCK // max(1, math.prod(shape[1:])))
                for i in range(0, shape[0], step):
                    rows(slice(i, i + step)).tofile(file)
                    bar.update(file.tell() - start - bar.n)
                file.write(bytes(-file.tell() % alignment))
        last = slice(-1, None)
        for found, t in zip(open_gguf(unfinished).tensors, tensors, strict=True):
            there = (found.name, found.tensor_type, found.data[last].tobytes())
            if there != (t.name, t.kind, t.rows(last).tobytes()):
                raise UserError(f"{path}: {t.name!r} does not read back as written")


class Reader(gguf.GGUFReader):
    """gguf's reader believes whatever length a header claims; this one looks first."""

    reads = 0

    def _get(self, offset, dtype, count=1, override_order=None):
        self.reads += 1
        offset, count = int(offset), int(count)
        if offset + count * np.dtype(dtype).itemsize > self.data.nbytes:
            raise ValueError("the file is cut off, or its header is damaged")
        dimensions = count if dtype is np.uint64 else 1
        if self.reads > MOST_READS or not 1 <= dimensions <= 4:
            raise ValueError("the header claims what no model has")
        return np.frombuffer(self.data, dtype, count, offset)


def open_gguf(path: Path) -> gguf.GGUFReader:
    """The one door for .gguf files: UserError unless it is one, and whole."""
    with seal.reading(path):
        return Reader(path)


# ---- 2. Tensors and positions --------------------------------------------------------

TYPES = {n: GGMLQuantizationType[n.upper()] for n in ("f32", "f16", "bf16", "q8_0")}
F32, F16, BF16, Q8_0 = TYPES.values()
DTYPES = {F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16}


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
    rows = rows if order is None else order[rows]
    return encode(seal.fold(name, weights[name], scales, rows), kind, name)


def plan(weights: seal.Checkpoint, config: seal.Config, arch: str, scales, kind):
    """Every tensor of the model; UserError unless the checkpoint has just these."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, source, tensor in weights.fitting(config):
        shape, kept, order = tuple(tensor.shape), kind, None
        if len(shape) == 1:
            kept = F32  # norms and biases, as llama.cpp has it
        elif kind == Q8_0 and shape[1] % 32:
            kept = F16  # rows that cannot be cut into blocks
        part = name.split(".")[-2]
        if arch == "llama" and part in heads:  # others keep Hugging Face's
            order = torch.arange(shape[0]).view(heads[part], 2, -1)  # (H or G, 2, d/2)
            order = order.transpose(1, 2).flatten()  # where llama.cpp's rows come from
        rows = partial(folder_rows, weights, source, order, scales, kept)
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
        plain = replace(config, rope_scaling={"rope_type": "default"})
        wanted, magnitude = seal.rope_frequencies(config)
        keys["scaling.attn_factor"] = float(magnitude)
        divisors = (seal.rope_frequencies(plain)[0] / wanted).float().numpy()  # (d/2,)
        tensors = [Stored("rope_freqs.weight", divisors.shape, F32, divisors.__getitem__)]
    return {f"{arch}.rope.{key}": value for key, value in keys.items()}, tensors


# ---- 3. Vocabulary -------------------------------------------------------------------

# How byte-level tokenizers cut text, by llama.cpp's names, in tokenizer.json's words.
FILE = Path(__file__).parent / "assets/pre_tokenizers.json"
PRE_TOKENIZERS: dict[str, dict] = seal.read_json(FILE)
MERGES_IGNORED = ("llama-bpe", "tekken")  # a word that is a token is taken as it is
SAMPLE = "Ａ  é ﬁ\n "  # what NFKC, lower case, stripping and the like would change


def kind_of_vocabulary(backend, model: dict, section: dict | None) -> dict:
    """The keys that tell llama.cpp how to cut text and to merge what is cut."""
    text, cutter = SAMPLE, backend.pre_tokenizer
    if backend.normalizer:
        text = backend.normalizer.normalize_str(text)
    if model["byte_fallback"]:  # SentencePiece's: all is merged, with ▁ for spaces
        if cutter:
            text = "|".join(piece for piece, _ in cutter.pre_tokenize_str(text))
        if text.removeprefix("▁") != SAMPLE.replace(" ", "▁"):
            raise ValueError("the tokenizer changes text first, which llama.cpp does not")
        return {"model": "llama", "pre": "default", "add_space_prefix": text[0] == "▁"}
    # Qwen's NFC passes: llama.cpp leaves it out, and nearly all text is in that form.
    name = next((n for n, known in PRE_TOKENIZERS.items() if known == section), None)
    if text != SAMPLE or name is None:
        raise ValueError(f"the tokenizer cuts words in an unknown way, {json.dumps(section):.300}"
                         f"; known are {', '.join(PRE_TOKENIZERS)}")
    if model["ignore_merges"] != (name in MERGES_IGNORED):
        backend.model.ignore_merges = False
        if any(len(backend.model.tokenize(piece)) > 1 for piece in model["vocab"]):
            raise ValueError(f"the tokenizer has tokens that no merges make, unlike {name}")
    return {"model": "gpt2", "pre": name}


def vocabulary(tokenizer: seal.Tokenizer, rows: int) -> dict:
    """The tokenizer as metadata, from the one form that transformers gives to all."""
    hf, backend = tokenizer.hf, tokenizer.hf.backend_tokenizer
    # That setting only concerns where in the text a token stands.
    form = json.loads(backend.to_str().replace('"trim_offsets":false', '"trim_offsets":true'))
    model, added = form["model"], {t["content"]: t["special"] for t in form["added_tokens"]}
    if model["type"] != "BPE":
        raise ValueError(f"the tokenizer is a {model['type']}; llama.cpp runs BPE")
    keys = kind_of_vocabulary(backend, model, form["pre_tokenizer"])
    # A token for each row of the embedding
    texts, kinds = [f"[PAD{i}]" for i in range(rows)], [TokenType.UNUSED] * rows
    for text, i in backend.get_vocab(with_added_tokens=True).items():
        if i >= rows and text not in added:
            raise ValueError(f"token {i} is beyond the embedding's {rows} rows")
        if i >= rows:
            note(f"token {text!r} left out: {i} is beyond the embedding's {rows} rows")
            continue
        texts[i], kinds[i] = text, TokenType.NORMAL
        if text in added:
            kinds[i] = TokenType.CONTROL if added[text] else TokenType.USER_DEFINED
        elif model["byte_fallback"] and re.fullmatch("<0x[0-9A-F]{2}>", text):
            kinds[i] = TokenType.BYTE
    special = {"bos": hf.bos_token_id, "unknown": hf.unk_token_id,
               "padding": hf.pad_token_id, "eos": hf.eos_token_id}
    if keys["model"] == "llama":
        ranks = {}  # llama.cpp joins the neighbours that make the piece of the best score
        for rank, pair in enumerate(model["merges"]):
            ranks.setdefault("".join(pair), -float(rank))
        keys["scores"] = [ranks.get(text, -1e6) for text in texts]
        if special["unknown"] is not None:
            kinds[special["unknown"]] = TokenType.UNKNOWN
        # llama.cpp puts its space after a BOS, too, where transformers may not.
        tokens = hf.convert_ids_to_tokens(tokenizer.prompt("Hi"))
        first = next(token for token in tokens if token not in added)
        keys["add_space_prefix"] &= first[0] == "▁"
    else:
        keys["merges"] = [" ".join(pair) for pair in model["merges"]]
    keys |= {"tokens": texts, "token_type": [int(kind) for kind in kinds]}
    special["eot"] = tokenizer.end
    if special["eos"] is None:  # were none named, llama.cpp would end at token 11
        special["eos"] = min(tokenizer.stop)
    for name, i in special.items():
        if i is not None and i < rows:
            keys[f"{name}_token_id"] = i
    keys["add_bos_token"] = bool(tokenizer.bos)
    keys["add_eos_token"] = False  # a prompt is there to be answered
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items()}


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


def story(run) -> dict:
    """What the file says of the scales in it."""
    about = f"{seal.METHOD[run.mode]} folded in (task {run.task}, {run.length} tokens)"
    keys = {"general.description": f"{about}; arXiv 2501.15225"}
    for name in ("checkpoint", "mode", "task", "length", "samples", "epochs", "lr", "seed",
                 "steps", "extend", "template"):
        if getattr(run, name) is not None:
            keys[f"seal.{name}"] = getattr(run, name)
    return keys


def from_folder(folder: Path, config: seal.Config, scales, run, outfile, kind) -> str:
    """Write a folder's GGUF file; returns what to say of its tensors."""
    arch = seal.read_json(folder / "config.json").get("model_type")
    arch = "qwen2" if arch == "qwen2" else "llama"
    name = folder.resolve().name
    keys = {
        "general.architecture": arch,
        "general.type": "model",
        "general.name": name,
        "general.base_model.count": 1,
        "general.base_model.0.name": name,
        "general.file_type": {F32: 0, F16: 1, BF16: 32, Q8_0: 7}[kind],
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
    }
    if run:
        keys |= {"general.finetune": f"seal-{run.mode[0]}"} | story(run)
    for key, size in SIZES.items():
        keys[f"{arch}.{key}"] = getattr(config, size)
    positions, table = rope(config, arch)
    tokenizer = seal.Tokenizer(folder, config, run.template if run else "auto")
    with seal.reading(folder):
        keys |= positions | vocabulary(tokenizer, config.vocab_size)
    if run or tokenizer.name != "none":
        keys["tokenizer.chat_template"] = tokenizer.template
    tensors = [*table, *plan(seal.Checkpoint(folder), config, arch, scales, kind)]
    write(outfile, [entry(key, value) for key, value in keys.items()], tensors)
    return f"{len(tensors)} tensors"


# ---- 5. From a GGUF file -------------------------------------------------------------

# Types whose blocks of 32 columns begin with an f16 scale, or a scale and a minimum.
SCALED = {GGMLQuantizationType[name]: 1 for name in ("Q4_0", "Q5_0", "Q8_0", "IQ4_NL")}
SCALED |= {GGMLQuantizationType[name]: 2 for name in ("Q4_1", "Q5_1")}


def read_source(path: Path, reader: gguf.GGUFReader) -> tuple[str, seal.Config]:
    """The architecture of a GGUF file, and what it says of sizes and positions."""
    keys = {}
    with seal.reading(path):
        for key, field in reader.fields.items():
            if not key.startswith("tokenizer."):
                keys[re.sub("^(llama|qwen2)[.]", "", key)] = field.contents()
        arch, parts = keys.get("general.architecture"), keys.get("split.count", 1)
        if arch not in ("llama", "qwen2"):
            raise ValueError(f"is a {arch!r}, not a llama or qwen2")
        if parts > 1:
            raise ValueError(f"is one of {parts} parts; join them: llama-gguf-split --merge")
        heads = keys["attention.head_count"]
        sizes = {"vocab_size": 1, "num_key_value_heads": heads,
                 "head_dim": keys["embedding_length"] // heads}
        sizes |= {size: keys[key] for key, size in SIZES.items() if key in keys}
        sizes["rope_theta"] = keys.get("rope.freq_base", 10000.0)
        factor = keys.get("rope.scaling.factor", 1)
        original = keys.get("rope.scaling.original_context_length", keys["context_length"])
        for value in (*sizes.values(), factor, original):
            if not 0 < value < 1e15:
                raise ValueError(f"its metadata has the size {value}")
        if factor != 1:
            sizes["rope_scaling"] = {"rope_type": keys.get("rope.scaling.type", "linear"),
                                     "factor": factor, "original_max_position_embeddings": original}
        return arch, seal.Config(**sizes)


def source_rows(tensor, columns: Tensor, kind, exact: bool, rows: slice) -> np.ndarray:
    """Rows of a GGUF file's tensor, column c times columns[c]; columns is (H * d,)."""
    data = tensor.data[rows]
    if not exact:
        values = torch.from_numpy(gguf.dequantize(data, tensor.tensor_type).copy())
        return encode(values * columns, kind, tensor.name)
    blocks = data.reshape(len(data), -1, gguf.GGML_QUANT_SIZES[kind][1]).copy()
    own = blocks[:, :, : 2 * SCALED[kind]].view(np.float16)  # (rows, blocks, 1 or 2)
    product = own * columns[::32, None].numpy()
    if not np.abs(product).max() <= np.finfo(np.float16).max:
        raise UserError(f"{tensor.name}: a scale gets too large for {kind.name}")
    own[:] = product
    return blocks


def scaled(tensor: gguf.ReaderTensor, scale: Tensor, width: int) -> tuple[Stored, str]:
    """A layer's o_proj with its scale in, and how that is done."""
    shape, kind = tuple(tensor.shape.tolist()[::-1]), tensor.tensor_type
    if shape[1:] != (width,):
        raise ValueError(f"{tensor.name} is {shape}, the heads make {width} columns")
    columns = scale.repeat_interleave(width // len(scale))  # (H * d,)
    # Where a block's columns have one scale, its own is multiplied.
    alike = all(len(block.unique()) == 1 for block in columns.split(32))
    exact, how = kind in SCALED and alike, "scaled exactly"
    if not exact:
        row, how = gguf.dequantize(tensor.data[:1], kind), f"scaled and cast to {kind.name}"
        try:
            gguf.quantize(row, kind)
        except NotImplementedError:
            kind, how = Q8_0, f"scaled and now Q8_0, no more {kind.name}"
    rows = partial(source_rows, tensor, columns, kind, exact)
    return Stored(tensor.name, shape, kind, rows), how


def from_gguf(path: Path, reader, config, extended, arch, scales, run, outfile) -> str:
    """Write a GGUF file anew, with scales and extension; returns what to say of it."""
    new, gone = story(run) if run else {}, ("GGUF.",)  # these are the reader's own
    if extended != config:
        if any(t.name == "rope_freqs.weight" for t in reader.tensors):
            raise UserError(f"{path}: to extend it, make a folder of it (extras.convert)")
        new |= rope(extended, arch)[0]
        new[f"{arch}.context_length"] = extended.context
        gone += (f"{arch}.rope.scal",)
    entries = []
    for key, field in reader.fields.items():
        if key not in new and not key.startswith(gone):
            entries.append(b"".join(part.tobytes() for part in field.parts))
    entries += [entry(key, value) for key, value in new.items()]
    tensors, ways, width = [], Counter(), config.num_attention_heads * config.head_dim
    waiting = {f"blk.{i}.attn_output.weight": s for i, s in enumerate(scales or [])}
    with seal.reading(path):
        for t in reader.tensors:
            scale, shape = waiting.pop(t.name, None), tuple(t.shape.tolist()[::-1])
            stored = Stored(t.name, shape, t.tensor_type, t.data.__getitem__)
            if scale is not None and (scale != 1).any():
                stored, how = scaled(t, scale, width)
                ways[how] += 1
            tensors.append(stored)
        if waiting:
            raise ValueError(f"lacks the tensor {min(waiting)}")
    write(outfile, entries, tensors, int(reader.alignment))
    return ", ".join([f"{len(tensors)} tensors", *(f"{ways[how]} {how}" for how in ways)])


# ---- 6. Command line -----------------------------------------------------------------


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
    is_file, kind = args.ckpt.suffix == ".gguf", TYPES.get(args.outtype)
    if is_file and (args.outtype != "auto" or args.check):
        raise UserError("--outtype and --check are for folders")
    if args.check:
        from extras import check

        check.find_llama_cpp()
    if is_file:
        reader = open_gguf(args.ckpt)
        arch, config = read_source(args.ckpt, reader)
    else:
        config = seal.read_config(args.ckpt)
        if kind is None:
            weights = seal.Checkpoint(args.ckpt)
            dtypes = [weights[name].dtype for name in weights.files]
            kind = BF16 if torch.bfloat16 in dtypes else F16
    if args.scales is None and Path("scales.safetensors").is_file():
        note("folding in scales.safetensors, which is here; without: --scales none")
        args.scales = "scales.safetensors"
    scales, run, spec = None, None, args.extend or "none"
    if args.scales not in (None, "none"):
        scales, run = seal.read_scales(args.scales, config)
        spec = run.extend or "none"
        if args.extend not in (None, spec):
            raise UserError(f"--extend {args.extend}: the scales were trained with {spec}")
    extended = seal.extend(config, spec)

    # Named as llama.cpp names files: BASE-seal-h-Q4_1.gguf
    name = args.ckpt.resolve().name.removesuffix(".gguf")
    name, old = re.fullmatch("(.+?)(?:[-.]((?:I?Q|TQ|B?F)[0-9]\\w*))?", name).groups()
    parts = [name, f"seal-{run.mode[0]}" if run else "", old if is_file else kind.name]
    outfile = args.outfile or Path("-".join(filter(None, parts)) + ".gguf")
    if outfile.resolve() == args.ckpt.resolve():
        raise UserError(f"{outfile}: is read; give another --outfile")
    if is_file:
        done = from_gguf(args.ckpt, reader, config, extended, arch, scales, run, outfile)
    else:
        done = from_folder(args.ckpt, extended, scales, run, outfile, kind)
    folded = f"{seal.METHOD[run.mode]} folded in" if run else "no scales"
    size = f"{outfile.stat().st_size / 1e6:,.1f} MB"
    print(f"{outfile}: {size}, {done}; {folded}; extension {spec}")
    if args.check:
        print(f"check: {check.check(outfile, args.ckpt, extended, scales, run)}")
    print(f"try: llama-server -m {outfile} -c {extended.context}")


if __name__ == "__main__":
    sys.exit(seal.run("export_gguf.py", main))
