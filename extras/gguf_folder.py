"""What the metadata of a GGUF file says, as config.json and as transformers' tokenizer.

Part of extras/convert.py, which says the file's name in front of any error from here;
extras/gguf_file.py reads the keys.
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
import re

import numpy as np
from gguf import TokenType
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from export_gguf import MERGES_IGNORED, PRE_TOKENIZERS
from extras.gguf_file import File

MODELS = {
    "llama": "LlamaForCausalLM",  # and Mistral's, SmolLM's, ...
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}

# llama.cpp's other names for how text is cut.
SAME = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2"}


def token(file: File, name: str, default: int = -1) -> int:
    """The id of a special token; -1: there is none."""
    i = file.get(f"tokenizer.ggml.{name}_token_id", int, default)
    # A list's data are the places of its values.
    return i if i < len(file.fields["tokenizer.ggml.tokens"].data) else -1


# --------------------------------------------------------------------------------------
# 1. config.json
# --------------------------------------------------------------------------------------


def read_config(file: File, any_table=False) -> dict:
    """The metadata as config.json says it.

    any_table: a rope_freqs.weight for which config.json has no words is passed over, as
    the caller uses the table itself.
    """
    c = file.config
    config = {
        "architectures": [MODELS[file.arch]],
        "model_type": file.arch,
        "hidden_act": "silu",
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_hidden_layers,
        "num_attention_heads": c.num_attention_heads,
        "num_key_value_heads": c.num_key_value_heads,
        "head_dim": c.head_dim,
        "max_position_embeddings": c.context,
        "rms_norm_eps": c.rms_norm_eps,
        "rope_theta": c.rope_theta,
        "rope_scaling": read_rope(file, any_table),
        "tie_word_embeddings": c.tie_word_embeddings,
    }
    if file.arch == "llama":
        config["attention_bias"] = c.attention_bias
    for name in ("bos", "eos", "padding"):
        if token(file, name) >= 0:
            config[f"{name[:3]}_token_id"] = token(file, name)
    if c.folded:
        config["seal"] = read_folded(file)

    # The type that rounds nothing: 16 bits if all matrices are in the same ones.
    kinds = set()
    for t in file.tensors.values():
        if len(t.shape) > 1:
            kinds.add(t.kind.name)
    exact = {"F16": "float16", "BF16": "bfloat16"}
    config["dtype"] = "float32"
    if len(kinds) == 1:
        config["dtype"] = exact.get(kinds.pop(), "float32")
    return config


def read_folded(file: File) -> list[dict]:
    """The scales that are in the weights, as seal.py's fold tells of them, the newest last."""
    folded = []
    for fingerprint in file.config.folded:
        facts = {"fingerprint": fingerprint}
        for name in ("mode", "task", "extend"):  # the file has only the newest's
            facts[name] = file.get(f"seal.{name}", str)
        folded.append(facts)
    return folded


def read_rope(file: File, any_table: bool) -> dict | None:
    """What stretches the rotary frequencies, as config.json's rope_scaling says it."""
    kind, factor, magnitude = file.stretch()
    table = "rope_freqs.weight" in file.tensors
    if factor == 1 and magnitude == 1:
        return llama3_scaling(file, any_table) if table else None
    if kind == "linear" and magnitude == 1 and not table:
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn" and factor > 1 and not table:
        yarn = dict(file.config.rope_scaling)
        if magnitude != 1:
            yarn["attention_factor"] = magnitude * (0.1 * math.log(factor) + 1)
        return yarn
    raise ValueError(f"positions scaled by {kind} and more are not supported")


def llama3_scaling(file: File, any_table: bool) -> dict | None:
    """The parameters of Llama 3's scaling, if rope_freqs.weight is what they make."""
    c = file.config
    divisors = file.tensors["rope_freqs.weight"].values(slice(None)).flatten()  # (d/2,)
    if np.all(divisors == 1):
        return None
    factor, low, high, context = float(divisors.max()), 1.0, 4.0, 8192  # all releases'
    pairs = np.arange(0, c.head_dim, 2) / c.head_dim
    turns = context * c.rope_theta**-pairs / (2 * math.pi)
    kept = np.clip((turns - low) / (high - low), 0, 1)  # (d/2,)
    table = 1 / ((1 - kept) / factor + kept)
    if divisors.shape != table.shape or not np.allclose(divisors, table, rtol=1e-4):
        if any_table:
            return None
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
    tokens, rows = file.get("tokenizer.ggml.tokens", list), file.config.vocab_size
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
    data["added_tokens"] = []
    for text, i in vocab.items():
        if types[i] in (*special, TokenType.USER_DEFINED):
            about = {"id": i, "content": text, "special": types[i] in special}
            data["added_tokens"].append(about | plain)
    backend = Tokenizer.from_str(json.dumps(data))  # an error unless all fits

    hints = {"tokenizer_class": "PreTrainedTokenizerFast"}  # tokenizer.json as it is
    hints["clean_up_tokenization_spaces"] = False
    for name, default in ids.items():
        ids[name] = token(file, name, default)
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
    hints["model_max_length"] = file.config.context
    files = {"tokenizer.json": backend.to_str(), "tokenizer_config.json": hints}
    return files | read_templates(file)


def read_templates(file: File) -> dict[str, str]:
    """The chat template, and those beside it that have names: for tools, say."""
    files, main = {}, "tokenizer.chat_template"
    for key in file.fields:
        name = key.removeprefix(f"{main}.")
        if key == main:
            files["chat_template.jinja"] = file.get(key, str)
        elif name != key:
            if not re.fullmatch(r"\w[\w.-]*", name):
                raise ValueError(f"{key!r} does not name a template by letters and digits")
            files[f"additional_chat_templates/{name}.jinja"] = file.get(key, str)
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
