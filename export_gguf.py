"""Export a Llama to GGUF with its SEAL scales folded in: one file that llama.cpp, and all that is built on it, runs.

    python export_gguf.py --ckpt llama-7b --scales scales.safetensors --outfile llama-7b-seal.gguf --outtype q8_0
    llama-server -m llama-7b-seal.gguf -c 4096

What goes in: a Hugging Face folder (config.json, weights, tokenizer) and the scales that `seal.py train` wrote. No
scales: a plain converter. What comes out: a GGUF file of architecture "llama" without a trace of SEAL but better
answers. Three things differ from a copy of the weights:

  o_proj     column c is multiplied by its channel's scale, in float32, and cast once to the type of the file
             (of SEAL-L instead: q, k, v and o get LoRA's product added, likewise)
  q, k       Hugging Face turns the channel pairs (i, i + d/2), llama.cpp (2i, 2i + 1): rows are reordered to match
  positions  the context extension the scales were trained with becomes metadata, or a small table of divisors

Matrices pass through memory in blocks of rows, so the size of the model does not matter, only the disk's. The file
appears under its name when it is complete and has been read back. Letters in shapes are seal.py's.

The map of this file: 1. Tensors  2. Rotary positions  3. Vocabulary  4. Writing  5. Check  6. Command line
"""

import argparse
import importlib.util
import math
import shutil
import sys
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Callable

import gguf
import numpy as np
import sentencepiece
import torch
from gguf import GGMLQuantizationType, LlamaFileType, TokenType
from torch import Tensor
from tqdm import tqdm

import seal
from seal import UserError, note

# ---------------------------------------------------------------------------------------------------------------------
# 1. Tensors
# ---------------------------------------------------------------------------------------------------------------------

TYPES = {name: GGMLQuantizationType[name.upper()] for name in ("f32", "f16", "bf16", "q8_0")}
F32, F16, BF16, Q8_0 = TYPES.values()
FILE_TYPES = {
    F32: LlamaFileType.ALL_F32,
    F16: LlamaFileType.MOSTLY_F16,
    BF16: LlamaFileType.MOSTLY_BF16,
    Q8_0: LlamaFileType.MOSTLY_Q8_0,
}
DTYPES = {F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16, Q8_0: torch.float32}  # Q8_0 is made of float32
BLOCK = 8 << 20  # elements in memory at a time


def encode(tensor: Tensor, kind: GGMLQuantizationType, name: str) -> np.ndarray:
    """The bytes of a block of rows in a GGUF type: the one and only cast."""
    low, high = tensor.aminmax()
    if not max(-low, high) <= torch.finfo(DTYPES[kind]).max:  # so spelled, NaN fails too
        raise UserError(f"{name}: holds NaN, infinity or a number too large for {kind.name.lower()}; use bf16 or f32")
    tensor = tensor.to(DTYPES[kind]).contiguous()
    return gguf.quantize(tensor.numpy(), kind) if kind == Q8_0 else tensor.view(torch.uint8).numpy()


@dataclass(frozen=True)
class Stored:
    """One tensor of the GGUF file, and how its rows are made from the checkpoint's.

    GGUFWriter asks an array for two things, nbytes and tofile(). This has both, and holds one block at a time.
    """

    name: str                       # in the GGUF file
    source: str                     # in the checkpoint
    shape: tuple[int, ...]          # the same in both
    kind: GGMLQuantizationType
    read: Callable[[], Tensor]      # opens the checkpoint's tensor; its memory is given back with every block
    order: Tensor | None = None     # the rows' order, if another
    scales: list[Tensor] | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(gguf.quant_shape_to_byte_shape(self.shape, self.kind))

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows start..stop (of a vector: elements) as they stand in the file."""
        rows = slice(start, stop) if self.order is None else self.order[start:stop]
        return encode(seal.fold(self.source, self.read(), self.scales, rows), self.kind, self.source)

    def tofile(self, file) -> None:
        step = max(1, BLOCK // math.prod(self.shape[1:]))
        for start in range(0, self.shape[0], step):
            self.rows(start, start + step).tofile(file)


def interleaved(heads: int, d: int) -> Tensor:
    """For each row of q or k as llama.cpp wants it, its row in Hugging Face's order."""
    return torch.arange(heads * d).view(heads, 2, d // 2).transpose(1, 2).flatten()  # (heads, d/2, 2) -> (heads * d,)


def storage_type(shape: tuple[int, ...], kind: GGMLQuantizationType) -> GGMLQuantizationType:
    """llama.cpp's own rules: norms and biases stay float32, and rows that q8_0 cannot cut into 32s are f16."""
    if len(shape) == 1:
        return F32
    return F16 if kind == Q8_0 and shape[-1] % 32 else kind


def automatic_type(weights: seal.Checkpoint) -> GGMLQuantizationType:
    """llama.cpp's "auto": the first matrix in 16 bits decides; a float32 checkpoint becomes f16."""
    for tensor in map(weights.__getitem__, weights):
        if tensor.dim() > 1 and tensor.dtype in (torch.float16, torch.bfloat16):
            return BF16 if tensor.dtype == torch.bfloat16 else F16
    return F16


def plan(weights: seal.Checkpoint, config: seal.Config, scales: list[Tensor] | None, kind) -> list[Stored]:
    """Every tensor of the model; UserError unless the checkpoint holds these and no others, in these shapes."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    orders = {
        "q_proj": interleaved(config.num_attention_heads, config.head_dim),
        "k_proj": interleaved(config.num_key_value_heads, config.head_dim),
    }
    tensors = []
    for name, source, tensor in weights.fitting(config):
        full = name if name == "lm_head.weight" else f"model.{name}"
        tensors.append(Stored(
            name=names.get_name(full, try_suffixes=(".weight", ".bias")),
            source=source,
            shape=tuple(tensor.shape),
            kind=storage_type(tuple(tensor.shape), kind),
            read=partial(weights.__getitem__, source),
            order=orders.get(name.split(".")[-2]),
            scales=scales,
        ))
    return tensors


# ---------------------------------------------------------------------------------------------------------------------
# 2. Rotary positions
# ---------------------------------------------------------------------------------------------------------------------


def add_rope(writer: gguf.GGUFWriter, config: seal.Config) -> list[Stored]:
    """Write the metadata of the rotary frequencies, and return the tensor that completes it, if one is needed.

    llama.cpp computes b^(-2i/d) itself, so NTK is only another base. It also knows linear and YaRN as transformers
    defines them by default. Anything else (Llama-3's scaling, YaRN with other parameters) is a table of divisors,
    rope_freqs.weight, and a factor on cos and sin: exact for whatever frequencies there may be.
    """
    scaling = config.rope_scaling
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    if scaling["rope_type"] == "default":
        return []
    if scaling["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(scaling["factor"])
        return []
    usual = scaling | {key: value for key, value in seal.ROPE_KINDS["yarn"].items() if value is not None}
    if scaling["rope_type"] == "yarn" and scaling == usual:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(scaling["factor"])
        writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
        return []
    plain, _ = seal.rope_frequencies(replace(config, rope_scaling={"rope_type": "default"}))
    wanted, magnitude = seal.rope_frequencies(config)
    if magnitude != 1:
        writer.add_rope_scaling_attn_factors(magnitude)
    divisors = plain / wanted  # (d/2,)
    return [Stored("rope_freqs.weight", "rope_freqs", tuple(divisors.shape), F32, read=lambda: divisors)]


# ---------------------------------------------------------------------------------------------------------------------
# 3. Vocabulary
# ---------------------------------------------------------------------------------------------------------------------

# How Llama 3 cuts text into words before it merges bytes. llama.cpp knows it by the name "llama-bpe".
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)


def add_sentencepiece(writer: gguf.GGUFWriter, folder: Path, hints: dict):
    """Llama 1 and 2, Mistral: tokenizer.model, of the kind that llama.cpp runs: BPE with byte fallback, text as it is.

    Returns {id: (text, score, type)}, the tokens added to them {id: (text, special)}, and {bos, eos, unk, pad: id}.
    """
    path = folder / "tokenizer.model"
    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as e:
        raise UserError(f"{path}: is not a sentencepiece model; download it again") from e
    kinds = {
        TokenType.UNKNOWN: model.is_unknown, TokenType.CONTROL: model.is_control,
        TokenType.UNUSED: model.is_unused, TokenType.BYTE: model.is_byte, TokenType.NORMAL: lambda _: True,
    }
    pieces = {}
    for i in range(model.vocab_size()):
        pieces[i] = (model.id_to_piece(i), model.get_score(i), next(kind for kind, holds in kinds.items() if holds(i)))

    # llama.cpp merges the pair with the best score until nothing merges. That is BPE, whose scores count merges: -1,
    # -2, ...; a unigram model has log probabilities, which llama.cpp would take for an order and cut words elsewhere.
    if any(score % 1 for _, score, kind in pieces.values() if kind == TokenType.NORMAL):
        raise UserError(f"{path}: is a unigram model; llama.cpp runs sentencepiece's BPE only")
    if not any(kind == TokenType.BYTE for _, _, kind in pieces.values()):
        raise UserError(f"{path}: has no byte pieces (byte_fallback); llama.cpp would stop at the first unknown letter")
    if model.normalize(" Ａ  b ").removeprefix("▁▁").removeprefix("▁") != "Ａ▁▁b▁":
        raise UserError(f"{path}: changes its text (NFKC or spaces) before cutting it, which llama.cpp does not")

    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    prefix = hints.get("add_prefix_space")
    writer.add_add_space_prefix(model.normalize("a") == "▁a" if prefix is None else prefix)
    decoder = hints.get("added_tokens_decoder", {})
    added = {i: (text, decoder.get(str(i), {}).get("special", False)) for text, i in seal.added_tokens(folder).items()}
    special = {"bos": model.bos_id(), "eos": model.eos_id(), "unk": model.unk_id(), "pad": model.pad_id()}
    return pieces, added, {name: i for name, i in special.items() if i >= 0}


def add_byte_level(writer: gguf.GGUFWriter, folder: Path, hints: dict):
    """Llama 3: tokenizer.json, a byte-level BPE, where the order of the merges is the score. Returns the same three."""
    path = folder / "tokenizer.json"
    raw = seal.read_json(path)
    try:
        model, steps = raw["model"], (raw["pre_tokenizer"] or {}).get("pretokenizers", [])
        split = steps[0]["pattern"]["Regex"] if [step["type"] for step in steps] == ["Split", "ByteLevel"] else None
        if model["type"] != "BPE" or split != LLAMA3_SPLIT or raw["normalizer"] or not model["ignore_merges"]:
            raise UserError(f"{path}: is not a byte-level BPE that splits as Llama 3 does; no other is supported")
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("llama-bpe")
        writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]])
        pieces = {i: (text, 0.0, TokenType.NORMAL) for text, i in model["vocab"].items()}
        return pieces, {token["id"]: (token["content"], token["special"]) for token in raw["added_tokens"]}, {}
    except (KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{path}: is not a tokenizer that transformers wrote ({e!r})") from e


def add_vocabulary(writer: gguf.GGUFWriter, folder: Path, rows: int) -> None:
    """Write the checkpoint's tokenizer: a token for each row of the embedding, the special ones, the chat template."""
    hints = folder / "tokenizer_config.json"
    hints = seal.read_json(hints) if hints.is_file() else {}
    hints = {key: value for key, value in hints.items() if value is not None}
    if (folder / "tokenizer.model").is_file():
        pieces, added, special = add_sentencepiece(writer, folder, hints)
    elif (folder / "tokenizer.json").is_file():
        pieces, added, special = add_byte_level(writer, folder, hints)
    else:
        raise UserError(f"{folder}: no tokenizer.model and no tokenizer.json; copy them from the original checkpoint")

    if max(pieces) >= rows:
        raise UserError(f"{folder}: the tokenizer has {max(pieces) + 1} pieces, the model only {rows}; a mix of two?")
    for i, (text, is_special) in added.items():
        if i >= rows:
            note(f"{folder}: token {text!r} left out: its id {i} is beyond the embedding's {rows} rows")
            continue
        _, score, kind = pieces.get(i, (None, -1000.0, None))
        kind = kind if kind == TokenType.UNKNOWN else TokenType.CONTROL if is_special else TokenType.USER_DEFINED
        pieces[i] = (text if is_special else text.replace("▁", " "), score, kind)
    texts, scores, kinds = zip(*(pieces.get(i, (f"[PAD{i}]", -1000.0, TokenType.UNUSED)) for i in range(rows)))
    writer.add_token_list(texts)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)

    ids = {text: i for i, text in enumerate(texts)}
    for name in ("bos", "eos", "unk", "pad"):
        text = hints.get(f"{name}_token")  # a string, or an object that holds it
        text = text.get("content") if isinstance(text, dict) else text
        if text in ids:
            special[name] = ids[text]
        if name in special:
            getattr(writer, f"add_{name}_token_id")(special[name])
    # Written even where it is the default: without a BOS of the model's own, llama.cpp would put in another token.
    writer.add_add_bos_token("bos" in special and hints.get("add_bos_token", True))
    writer.add_add_eos_token("eos" in special and hints.get("add_eos_token", False))
    template = folder / "chat_template.jinja"  # where newer releases keep it
    template = template.read_text(encoding="utf-8") if template.is_file() else hints.get("chat_template")
    if template:
        writer.add_chat_template(template)  # a string, or a list of named ones


# ---------------------------------------------------------------------------------------------------------------------
# 4. Writing
# ---------------------------------------------------------------------------------------------------------------------


def export(folder: Path, config: seal.Config, scales, about: dict, outfile: Path, kind: GGMLQuantizationType) -> int:
    """Write the GGUF file and return the number of its tensors. `about` is the scales' metadata."""
    tensors = plan(seal.open_weights(folder), config, scales, kind)
    with seal.whole_file(outfile) as unfinished, closing(gguf.GGUFWriter(unfinished, "llama")) as writer:
        writer.add_type("model")
        writer.add_name(folder.resolve().name + ("-seal" if scales else ""))
        if scales:
            facts = ", ".join(f"{key} {about[key]}" for key in ("task", "length", "extend") if key in about)
            method = seal.METHOD[about["mode"]]
            writer.add_description(f"{method} folded into the weights ({facts}); arXiv 2501.15225")
        writer.add_file_type(FILE_TYPES[kind])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_vocab_size(config.vocab_size)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        if config.channels() != config.hidden_size:  # otherwise llama.cpp divides
            writer.add_key_length(config.head_dim)
            writer.add_value_length(config.head_dim)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        tensors = add_rope(writer, config) + tensors
        add_vocabulary(writer, folder, config.vocab_size)

        size, free = sum(t.nbytes for t in tensors), shutil.disk_usage(outfile.parent).free
        if size > free:
            raise UserError(f"{outfile}: needs {size / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB free")
        for t in tensors:
            writer.add_tensor_info(t.name, t.shape, np.dtype(np.float32), t.nbytes, raw_dtype=t.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with tqdm(total=size, desc="writing", unit="B", unit_scale=True, leave=False) as bar:
            for t in tensors:
                writer.write_tensor_data(t)
                bar.update(t.nbytes)
        writer.close()
        verify(unfinished, tensors)
    return len(tensors)


def verify(path: Path, tensors: list[Stored]) -> None:
    """Read the file back: every name, shape and type, and three rows of every tensor, to the bit."""
    found = gguf.GGUFReader(path).tensors
    for t, there in zip(tensors, found, strict=True):
        ok = (there.name, tuple(there.shape[::-1]), there.tensor_type) == (t.name, t.shape, t.kind)
        rows = there.data.reshape(t.shape[0], -1).view(np.uint8)
        for i in {0, t.shape[0] // 2, t.shape[0] - 1}:
            ok = ok and np.array_equal(rows[i], t.rows(i, i + 1).reshape(-1))
        if not ok:
            raise UserError(f"{path}: {t.name} does not read back as written; check the disk and try again")


# ---------------------------------------------------------------------------------------------------------------------
# 5. Check
# ---------------------------------------------------------------------------------------------------------------------


class LlamaCpp:
    """A GGUF file run by llama.cpp itself, on the CPU, as exactly as it can: any difference is then the file's."""

    def __init__(self, path, context: int = 512, threads: int = 4):
        from cyllama.llama import llama_cpp as cpp

        class Model(cpp.LlamaModel):  # some releases of cyllama ask a model for this without giving it
            @property
            def n_vocab(self):
                return self.get_vocab().n_vocab

        cpp.disable_logging()
        self.model = Model(str(path), cpp.LlamaModelParams())
        self.vocab = self.model.get_vocab()
        self.batch = cpp.LlamaBatch(n_tokens=context, embd=0, n_seq_max=1)
        settings = cpp.LlamaContextParams()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = context
        settings.n_threads = settings.n_threads_batch = threads
        # By default llama.cpp keeps keys and values in 16 bits and rounds inside its flash attention: the logits of an
        # f32 file differ by 1e-2 from float32's, which would hide small mistakes. With these, by 1e-5.
        settings.type_k = settings.type_v = int(F32)
        settings.flash_attn_type = 0
        self.context = cpp.LlamaContext(self.model, settings)

    def tokenize(self, text: str, add_special: bool = False, parse_special: bool = True) -> list[int]:
        return list(self.vocab.tokenize(text, add_special, parse_special))

    def logits(self, tokens: list[int]) -> Tensor:
        """tokens -> (T, V): the logits after each."""
        self.batch.reset()
        for position, token in enumerate(tokens):
            self.batch.add(token, position, [0], True)
        self.context.kv_cache_clear()
        self.context.decode(self.batch)
        return torch.tensor([self.context.get_logits_ith(i) for i in range(len(tokens))])


def check(path: Path, folder: Path, config: seal.Config, scales, kind: GGMLQuantizationType) -> str:
    """How llama.cpp's answer from the file compares with seal.py's from the checkpoint and the scales, in words."""
    model = seal.load_model(folder, config, torch.device("cpu"), torch.float32)
    if scales:
        model.set_scales(scales)
    text = "Below is a record of lines:\nline torpid-kid: REGISTER_CONTENT is <24169>\nThe <REGISTER_CONTENT> in line"
    prompt = seal.Tokenizer(folder, config, "none").prompt(text)
    answer = seal.generate(model, [prompt], 64)[0]
    tokens = prompt + answer
    with torch.no_grad():
        expected = model.logits(model(torch.tensor([tokens])))[0]       # (T, V)
    llama = LlamaCpp(path, context=len(tokens))
    if llama.tokenize(text, add_special=True) != prompt:
        raise UserError(f"{path}: llama.cpp cuts text into other tokens than seal.py; please report this checkpoint")
    # Where every argmax along seal.py's answer is the next token of it, llama.cpp's own greedy answer is the same.
    found = llama.logits(tokens)                                        # (T, V)
    same = int((found.argmax(-1)[len(prompt) - 1 : -1] == torch.tensor(answer)).sum())
    worst = (found - expected).abs().max()
    result = f"{same} of {len(answer)} greedy tokens agree with seal.py's, logits within {worst:.1e}"
    if kind == F32 and same < len(answer):
        raise UserError(f"{path}: in llama.cpp only {result}; please report this checkpoint")
    return result


# ---------------------------------------------------------------------------------------------------------------------
# 6. Command line
# ---------------------------------------------------------------------------------------------------------------------


def parse(arguments: list[str] | None) -> argparse.Namespace:
    p = seal.Parser("export_gguf.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ckpt", metavar="DIR", type=Path, default=seal.TOY, help="checkpoint (default: the bundled toy)")
    p.add_argument("--scales", metavar="PATH", help="or none (default: scales.safetensors, if there is one here)")
    p.add_argument("--extend", metavar="KIND:S", help="none, ntk:4, linear:4, yarn:4 (default: the scales' own)")
    p.add_argument("--outfile", metavar="PATH", type=Path, help="(default: DIR[-seal]-OUTTYPE.gguf, here)")
    p.add_argument("--outtype", choices=[*TYPES, "auto"], default="auto",
                   help="auto: the checkpoint's own 16-bit type, f16 if it has none (default)")
    p.add_argument("--check", action="store_true",
                   help="run the file in llama.cpp (pip install cyllama) beside seal.py in float32, and compare")
    p.set_defaults(run=run)
    return p.parse_args(arguments)


def run(args) -> None:
    if args.check and importlib.util.find_spec("cyllama") is None:
        raise UserError("--check needs llama.cpp; pip install cyllama")
    config = seal.read_config(args.ckpt)
    if args.scales is None and Path("scales.safetensors").is_file():
        note("folding in scales.safetensors, which is here; --scales none for the bare model")
        args.scales = "scales.safetensors"
    scales, about = (None, {}) if args.scales in (None, "none") else seal.read_scales(args.scales, config)
    spec = seal.resolve_extension(args.extend, about, in_file=True)
    config = seal.extend(config, spec)
    if config.sliding_window and config.sliding_window < config.max_position_embeddings:
        # llama.cpp's "llama" attends to everything; up to the window that is the same.
        note(f"context cut to the model's sliding window, {config.sliding_window}, which llama.cpp's llama lacks")
        config = replace(config, max_position_embeddings=config.sliding_window)
    kind = automatic_type(seal.open_weights(args.ckpt)) if args.outtype == "auto" else TYPES[args.outtype]
    type_name, context = kind.name.lower(), config.max_position_embeddings
    outfile = args.outfile or Path(f"{args.ckpt.resolve().name}{'-seal' if scales else ''}-{type_name}.gguf")
    seal.check_output(outfile, [args.scales, *(p for p in args.ckpt.iterdir() if p.suffix != ".gguf")])

    count = export(args.ckpt, config, scales, about, outfile, kind)
    folded = f"{seal.METHOD[about['mode']]} folded into {config.num_hidden_layers} layers" if scales else "no scales"
    size = f"{outfile.stat().st_size / 1e6:,.1f} MB"
    print(f"{outfile}: {size}, {type_name}, {count} tensors; {folded}; extension {spec}")
    if args.check:
        print(f"check: {check(outfile, args.ckpt, config, scales, kind)}")
    print(f"try: llama-cli -m {outfile} -c {context}")
    print(f"or:  llama-server -m {outfile} -c {context}")


if __name__ == "__main__":
    sys.exit(seal.run("export_gguf.py", parse))
