"""Read Meta's own release of a Llama as the Hugging Face folder that it corresponds to.

Part of extras/convert.py, which says the folder's name in front of any error from here.
A release is params.json, consolidated.00.pth and tokenizer.model. From 13B on there are
several .pth files, each with a slice of every matrix. What is written nowhere is known
here: each generation's context, and how Llama 3.1 scales its rotary frequencies. Meta
rotates the channel pairs (2i, 2i + 1) of a head, as llama.cpp does.
"""

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import sentencepiece
import torch
from torch import Tensor

import seal

BLOCK = 4 << 20  # elements in memory at a time

# Meta's name: Hugging Face's, and the dimension along which the files hold slices.
NAMES = {
    "tok_embeddings": ("embed_tokens", 1),
    "norm": ("norm", None),
    "output": ("lm_head", 0),
    "attention_norm": ("input_layernorm", None),
    "attention.wq": ("self_attn.q_proj", 0),
    "attention.wk": ("self_attn.k_proj", 0),
    "attention.wv": ("self_attn.v_proj", 0),
    "attention.wo": ("self_attn.o_proj", 1),
    "ffn_norm": ("post_attention_layernorm", None),
    "feed_forward.w1": ("mlp.gate_proj", 0),
    "feed_forward.w2": ("mlp.down_proj", 1),
    "feed_forward.w3": ("mlp.up_proj", 0),
}


def read_release(folder: Path) -> tuple[dict, list[tuple], dict]:
    """config.json, the tensors and the tokenizer's files, as extras/convert.py wants them."""
    if not (folder / "params.json").is_file():
        raise ValueError("has neither params.json nor config.json; is it the right folder?")
    params = seal.read_json(folder / "params.json")
    for key in ("dim", "n_layers", "n_heads"):
        if type(params.get(key)) is not int or params[key] < 1:
            raise ValueError(f"{key} in params.json must be a whole number above 0")
    slices = open_slices(folder)
    d = params["dim"] // params["n_heads"]
    tensors = []
    for source, tensor in slices[0].items():
        if source == "rope.freqs":
            continue  # follows from the config
        found = re.fullmatch(r"(layers\.\d+\.)?(.+)\.weight", source)
        layer, part = found.groups("") if found else ("", "")
        if part not in NAMES:
            raise ValueError(f"{source!r} is no tensor of Meta's releases")
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"{source} is {tensor.dtype}; quantised ones are not supported")
        name, dim = NAMES[part]
        shape = list(tensor.shape)
        if part == "tok_embeddings" and shape[1] == params["dim"]:
            dim = 0  # Llama 3's slices are rows, and the only file of a model is all rows
        for other in slices[1:]:
            more = list(other[source].shape)
            if dim is not None:
                shape[dim] += more[dim]
                more[dim] = shape[dim]
            if more != shape:
                raise ValueError(f"the slices of {source} do not fit each other")
        full = f"{name}.weight" if name == "lm_head" else f"model.{layer}{name}.weight"
        head_dim = 1
        if part in ("attention.wq", "attention.wk"):
            head_dim = d
        rows = partial(blocks, folder, source, dim, head_dim)
        tensors.append((full, tuple(shape), rows))
    config = read_config(params, {name: shape for name, shape, _ in tensors})
    config["dtype"] = str(tensor.dtype).removeprefix("torch.")
    return config, tensors, read_tokenizer(folder)


def open_slices(folder: Path) -> list[dict[str, Tensor]]:
    """The tensors of each consolidated.NN.pth, memory-mapped. No code in them is run."""
    paths = sorted(folder.glob("consolidated.*.pth"))
    if not paths:
        raise ValueError("has no consolidated.00.pth beside params.json")
    slices = []
    for path in paths:
        with seal.blame(path):
            slices.append(torch.load(path, "cpu", mmap=True, weights_only=True))
            if slices[-1].keys() != slices[0].keys():
                raise ValueError(f"does not hold the same tensors as {paths[0].name}")
    return slices


def blocks(folder: Path, source: str, dim: int | None, d: int) -> Iterator[Tensor]:
    """A tensor's rows, some heads of d at a time. d > 1: their pairs are put apart."""
    # Opened anew for each tensor: a map that is dropped gives its memory back.
    parts = [tensors[source] for tensors in open_slices(folder)]
    if dim is None:
        parts = parts[:1]  # all have the same
    rows = sum(len(part) for part in parts) if dim == 0 else len(parts[0])
    columns = parts[0][0].numel()
    step = max(1, BLOCK // (columns * d)) * d
    for start in range(0, rows, step):
        taken, first = [], start
        for part in parts:
            taken.append(part[max(first, 0) : max(first + step, 0)])
            if dim == 0:
                first -= len(part)  # the next part's rows come after these
        block = torch.cat(taken, dim or 0)                        # (step, columns)
        if d > 1:
            pairs = block.view(-1, d // 2, 2, columns)            # (heads, d/2, 2, D)
            block = pairs.transpose(1, 2).reshape(block.shape)    # (heads * d, D)
        yield block


def read_config(params: dict, shapes: dict[str, tuple]) -> dict:
    """params.json as config.json says it."""
    theta, eps = params.get("rope_theta", 10000.0), params.get("norm_eps", 1e-5)
    context = {1e6: 16384, 5e5: 8192}.get(theta)  # CodeLlama, Llama 3
    if context is None:
        context = 4096 if eps == 1e-5 else 2048  # Llama 2, Llama 1
    scaling = None
    if params.get("use_scaled_rope"):  # Llama 3.1, or 3.2, whose models are smaller
        context = 131072
        scaling = {
            "rope_type": "llama3",
            "factor": 32.0 if params["dim"] in (2048, 3072) else 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    embedding, gate = "model.embed_tokens.weight", "model.layers.0.mlp.gate_proj.weight"
    if not {embedding, gate} <= shapes.keys():
        raise ValueError("consolidated.00.pth lacks tok_embeddings or a feed_forward.w1")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": shapes[embedding][0],
        "hidden_size": params["dim"],
        "intermediate_size": shapes[gate][0],
        "num_hidden_layers": params["n_layers"],
        "num_attention_heads": params["n_heads"],
        "num_key_value_heads": params.get("n_kv_heads") or params["n_heads"],
        "head_dim": params["dim"] // params["n_heads"],
        "max_position_embeddings": context,
        "rms_norm_eps": eps,
        "rope_theta": theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": "lm_head.weight" not in shapes,
    }


def read_tokenizer(folder: Path) -> dict[str, dict | Path]:
    """{file name: content, or the file to copy}. Llama 1 has it one folder up."""
    if (folder / "tokenizer.json").is_file():
        names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
        return {name: folder / name for name in names if (folder / name).is_file()}
    path = folder / "tokenizer.model"
    if not path.is_file():
        path = folder.parent / "tokenizer.model"
    if not path.is_file():
        raise ValueError("has no tokenizer.model; copy it from where the model is from")
    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as e:
        raise ValueError(
            "tokenizer.model is Llama 3's kind, not SentencePiece's; add tokenizer.json "
            "and tokenizer_config.json of the same model's Hugging Face release"
        ) from e
    ids = {"bos": model.bos_id(), "eos": model.eos_id(), "unk": model.unk_id()}
    hints = {f"{name}_token": model.id_to_piece(i) for name, i in ids.items() if i >= 0}
    hints |= {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}
    return {"tokenizer.model": path, "tokenizer_config.json": hints}
