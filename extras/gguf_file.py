"""What the metadata of a GGUF file says, as config.json and as transformers' tokenizer.

Part of extras/convert.py, which says the file's name in front of any error from here.
Kinds of tokenizers, tokenizer.ggml.model:

  gpt2     a byte-level BPE: pieces and merges. How text is cut into words before merging,
           the file only names (smollm, llama-bpe); export_gguf.py knows the rest
  llama    SentencePiece's BPE with byte fallback: no merges, but a score for each piece.
           Two neighbours that make a piece are merged, the best score first

The ids are llama.cpp's. Measured with SmolLM2's file on 6,000 random strings of digits,
spaces, line ends, accents, emoji, code, CJK and added tokens: the same but for one, with a
letter that is newer than llama.cpp's tables. For tekken, llama.cpp itself strays from the
rule at capitals and marks beyond ASCII, for deepseek-llm at spaces beyond it; the folder
follows the rule, as the models were trained. Qwen's tokenizer in transformers composes
accents first (NFC), which llama.cpp does not.
"""

import json
import math
from pathlib import Path

import numpy as np
from gguf import TokenType
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from export_gguf import MERGES_IGNORED, PRE_TOKENIZERS, open_gguf

MODELS = {
    "llama": "LlamaForCausalLM",  # and Mistral's, SmolLM's, ...
    "qwen2": "Qwen2ForCausalLM",
}

# llama.cpp's other names for how text is cut.
SAME = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2"}


class File:
    """A GGUF file: its keys, checked for their type when asked for, and its tensors."""

    def __init__(self, path: Path):
        self.path = path
        self.reader = open_gguf(path)
        self.tensors = {t.name: t for t in self.reader.tensors}
        self.arch = self.get("general.architecture", str)
        if self.arch not in MODELS:
            known = ", ".join(MODELS)
            raise ValueError(f"architecture {self.arch!r} is not one of {known}")
        if self.get("split.count", int, 1) > 1:
            raise ValueError("is one part of several; llama-gguf-split --merge joins them")
        if "token_embd.weight" not in self.tensors:
            raise ValueError("has no token_embd.weight; is it a language model?")
        self.tokens = self.get("tokenizer.ggml.tokens", list)

    def get(self, key: str, kind: type, default=None):
        """The value of a key. One that begins with a dot is the architecture's."""
        key = self.arch + key if key.startswith(".") else key
        field = self.reader.get_field(key)
        if field is None and default is not None:
            return default
        value = None if field is None else field.contents()
        if type(value) is not kind:
            found = "missing" if value is None else f"a {type(value).__name__}"
            raise ValueError(f"{key} must be a {kind.__name__}, is {found}")
        if kind is float and not math.isfinite(value):
            raise ValueError(f"{key} is {value}")
        # float32's 1e-05 is 9.999999747378752e-06; the shortest such number was meant.
        return float(str(np.float32(value))) if kind is float else value

    def token(self, name: str, default: int = -1) -> int:
        """The id of a special token; -1: there is none."""
        i = self.get(f"tokenizer.ggml.{name}_token_id", int, default)
        return i if i < len(self.tokens) else -1


# --------------------------------------------------------------------------------------
# 1. config.json
# --------------------------------------------------------------------------------------


def read_config(file: File) -> dict:
    """The metadata as config.json says it."""
    heads = file.get(".attention.head_count", int)
    width = file.get(".embedding_length", int)
    d = file.get(".attention.key_length", int, width // max(heads, 1))
    if file.get(".rope.dimension_count", int, d) != d:
        raise ValueError("only a part of each head is rotated, which is not supported")
    config = {
        "architectures": [MODELS[file.arch]],
        "model_type": file.arch,
        "hidden_act": "silu",
        "vocab_size": int(file.tensors["token_embd.weight"].shape[-1]),
        "hidden_size": width,
        "intermediate_size": file.get(".feed_forward_length", int),
        "num_hidden_layers": file.get(".block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": file.get(".attention.head_count_kv", int, heads),
        "head_dim": d,
        "max_position_embeddings": file.get(".context_length", int),
        "rms_norm_eps": file.get(".attention.layer_norm_rms_epsilon", float),
        "rope_theta": file.get(".rope.freq_base", float, 10000.0),
        "rope_scaling": read_rope(file, d),
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }
    for key, value in config.items():
        if type(value) in (int, float) and value <= 0:
            raise ValueError(f"the metadata make {key} {value}; it must be above 0")
    if file.arch == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    for name in ("bos", "eos", "padding"):
        if file.token(name) >= 0:
            config[f"{name[:3]}_token_id"] = file.token(name)

    # The type that rounds nothing: 16 bits if all matrices are in the same ones.
    kinds = {t.tensor_type.name for t in file.tensors.values() if len(t.shape) > 1}
    config["dtype"] = "float32"
    if kinds in ({"F16"}, {"BF16"}):
        config["dtype"] = "float16" if kinds == {"F16"} else "bfloat16"
    return config


def read_rope(file: File, d: int) -> dict | None:
    """What stretches the rotary frequencies, as config.json's rope_scaling says it."""
    kind = file.get(".rope.scaling.type", str, "linear")
    factor = file.get(".rope.scaling.factor", float, 0.0)
    factor = factor or file.get(".rope.scale_linear", float, 1.0)  # the older name
    magnitude = file.get(".rope.scaling.attn_factor", float, 1.0)
    table = "rope_freqs.weight" in file.tensors
    if (kind == "none" or factor == 1) and magnitude == 1:
        return llama3_scaling(file, d) if table else None
    if kind == "linear" and factor > 0 and magnitude == 1 and not table:
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn" and factor > 1 and not table:
        original = "original_max_position_embeddings"
        context = file.get(".context_length", int)
        context = file.get(".rope.scaling.original_context_length", int, context)
        yarn = {"rope_type": "yarn", "factor": factor, original: context}
        if magnitude != 1:
            yarn["attention_factor"] = magnitude * (0.1 * math.log(factor) + 1)
        return yarn
    raise ValueError(f"positions scaled by {kind} and more are not supported")


def llama3_scaling(file: File, d: int) -> dict | None:
    """The parameters of Llama 3's scaling, if rope_freqs.weight is what they make."""
    divisors = file.tensors["rope_freqs.weight"].data                 # (d/2,)
    if np.all(divisors == 1):
        return None
    factor, low, high, context = float(divisors.max()), 1.0, 4.0, 8192  # all releases'
    base = file.get(".rope.freq_base", float, 10000.0)
    turns = context * base ** (-np.arange(0, d, 2) / d) / (2 * math.pi)
    kept = np.clip((turns - low) / (high - low), 0, 1)                # (d/2,)
    table = 1 / ((1 - kept) / factor + kept)
    if divisors.shape != table.shape or not np.allclose(divisors, table, rtol=1e-4):
        raise ValueError("rope_freqs.weight is not Llama 3's, the only one known")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": context,
    }


# --------------------------------------------------------------------------------------
# 2. The tokenizer
# --------------------------------------------------------------------------------------


def read_tokenizer(file: File) -> dict[str, dict | str]:
    """{file name: content} of all that AutoTokenizer reads from a folder."""
    tokens, rows = file.tokens, int(file.tensors["token_embd.weight"].shape[-1])
    if len(tokens) > rows:
        raise ValueError(f"{len(tokens)} tokens, but token_embd has {rows} rows")
    types = file.get("tokenizer.ggml.token_type", list, [1] * len(tokens))
    vocab = {}
    for i, (text, type_) in enumerate(zip(tokens, types, strict=True)):
        if type_ == TokenType.UNUSED and text == f"[PAD{i}]":
            continue  # fills a row of the embedding that has no token
        if vocab.setdefault(text, i) != i:
            raise ValueError(f"tokens {vocab[text]} and {i} are both {text!r}")

    kind = file.get("tokenizer.ggml.model", str)
    ids = dict.fromkeys(("bos", "eos", "unknown", "padding"), -1)
    if kind == "gpt2":
        pre = file.get("tokenizer.ggml.pre", str, "default")
        pre = SAME.get(pre, pre)
        if pre not in PRE_TOKENIZERS:
            known = ", ".join(PRE_TOKENIZERS)
            raise ValueError(f"tokenizer.ggml.pre {pre!r} is not one of {known}")
        data = byte_level(file, pre, vocab)
        begin = pre in ("llama-bpe", "tekken")
    elif kind == "llama":
        data = sentencepiece(file, types, vocab)
        begin = True
        ids |= {"bos": 1, "eos": 2, "unknown": 0}
    else:
        raise ValueError(f"tokenizer.ggml.model {kind!r} is not gpt2 or llama")

    special = (TokenType.CONTROL, TokenType.UNKNOWN)
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    data["added_tokens"] = [
        {"id": i, "content": text, "special": types[i] in special, **plain}
        for text, i in vocab.items()
        if types[i] in (*special, TokenType.USER_DEFINED)
    ]
    backend = Tokenizer.from_str(json.dumps(data))  # an error unless all fits

    hints = {"tokenizer_class": "PreTrainedTokenizerFast"}  # tokenizer.json as it is
    hints["clean_up_tokenization_spaces"] = False
    for name, default in ids.items():
        ids[name] = file.token(name, default)
        if ids[name] >= 0:
            hints[f"{name[:3]}_token"] = tokens[ids[name]]
    begin = file.get("tokenizer.ggml.add_bos_token", bool, begin) and ids["bos"] >= 0
    end = file.get("tokenizer.ggml.add_eos_token", bool, False) and ids["eos"] >= 0
    front = [tokens[ids["bos"]]] * begin
    back = [tokens[ids["eos"]]] * end
    added = [(text, vocab[text]) for text in front + back]
    single = [*front, "$A", *back]
    pair = [*single, *front, "$B", *back]
    backend.post_processor = TemplateProcessing(single, pair, added)
    hints |= {"add_bos_token": begin, "add_eos_token": end}
    hints["model_max_length"] = file.get(".context_length", int)
    files = {"tokenizer.json": backend.to_str(), "tokenizer_config.json": hints}
    if file.reader.get_field("tokenizer.chat_template"):
        files["chat_template.jinja"] = file.get("tokenizer.chat_template", str)
    return files


def byte_level(file: File, pre: str, vocab: dict[str, int]) -> dict:
    """tokenizer.json of a BPE over bytes, each of which is spelled as a letter."""
    merges = []
    for merge in file.get("tokenizer.ggml.merges", list):
        cut = merge.index(" ", 1)
        merges.append((merge[:cut], merge[cut + 1 :]))
    decoder = {"type": "ByteLevel", "add_prefix_space": True}
    decoder |= {"trim_offsets": True, "use_regex": True}
    model = {"type": "BPE", "vocab": vocab, "merges": merges}
    model["ignore_merges"] = pre in MERGES_IGNORED
    return {"pre_tokenizer": PRE_TOKENIZERS[pre], "decoder": decoder, "model": model}


def sentencepiece(file: File, types: list[int], vocab: dict[str, int]) -> dict:
    """tokenizer.json of a BPE over text with ▁ for spaces, bytes for unknown letters."""
    scores = file.get("tokenizer.ggml.scores", list)
    merges = []
    for piece, i in vocab.items():
        if types[i] in (TokenType.NORMAL, TokenType.UNUSED):
            for cut in range(1, len(piece)):
                if piece[:cut] in vocab and piece[cut:] in vocab:
                    merges.append((-scores[i], piece[:cut], piece[cut:]))
    merges.sort(key=lambda merge: merge[0])
    before = [{"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    after = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}]
    after += [{"type": "ByteFallback"}, {"type": "Fuse"}]
    if file.get("tokenizer.ggml.add_space_prefix", bool, True):
        # llama.cpp puts a space in front of the text and behind each added token.
        before.insert(0, {"type": "Prepend", "prepend": "▁"})
        after.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    model = {"type": "BPE", "byte_fallback": True, "fuse_unk": True, "vocab": vocab}
    model["merges"] = [merge[1:] for merge in merges]
    return {
        "normalizer": {"type": "Sequence", "normalizers": before},
        "decoder": {"type": "Sequence", "decoders": after},
        "model": model,
    }
