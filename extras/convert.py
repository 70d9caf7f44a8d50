"""Make an ordinary Hugging Face folder of a GGUF file, or of Meta's own release.

    python -m extras.convert SmolLM2-135M-Instruct.Q4_1.gguf --out smollm2
    python -m extras.convert Llama-2-7b --out llama-2-7b-hf     (see extras/meta.py)
    python seal.py train --ckpt smollm2

A quantised GGUF file is how most people of llama.cpp hold a model. It has what a folder
has: its metadata are the config and the tokenizer (see extras/gguf_folder.py), and the gguf
package dequantises weights of nearly every type. llama.cpp's "llama" rotates the channel
pairs (2i, 2i + 1) of a head, Hugging Face's (i, i + d/2): the rows of q and k change
places. Qwen's stay as they are.

Tensors pass through memory in blocks of rows, so the size of the model does not matter,
only the disk's. Measured: logits equal to those of transformers' own reading of the file
to the bit in 16 kinds of files (F32 to Q2_K, IQ3_S); 0.7 GB of memory at most with Llama
3's vocabulary, whose embedding alone is 2.1 GB in float32. Letters in shapes: seal.py's.
"""

import argparse
import json
import math
import re
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import seal
from extras import meta
from extras.folder import new_folder
from extras.gguf_file import File, Matrix
from extras.gguf_folder import read_config, read_tokenizer
from seal import UserError

# A tensor of the folder to be: its name, its shape, and what yields its rows in blocks.
Stored = tuple[str, tuple[int, ...], Callable[[], Iterator[Tensor]]]

BLOCK = 4 << 20  # elements in memory at a time
SHARD = 1e9      # bytes in a file of weights, unless one tensor is larger

# What safetensors calls them.
CODES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

# --------------------------------------------------------------------------------------
# 1. The tensors of a GGUF file
# --------------------------------------------------------------------------------------

NAMES = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def plan(file: File) -> list[Stored]:
    """All tensors of the folder. That they fit its config is checked later, with it."""
    tensors = []
    for name, t in file.tensors.items():
        if name == "rope_freqs.weight":
            continue  # is in the config
        found = re.fullmatch(r"(blk\.\d+\.)?(\w+)\.(weight|bias)", name)
        layer, part, suffix = found.groups("") if found else ("", "", "")
        if part not in NAMES:
            raise ValueError(f"{name!r} is no tensor of a plain {file.arch}")
        size = gguf.GGML_QUANT_SIZES[t.kind][1]
        gguf.dequantize(np.zeros((1, size), np.uint8), t.kind)  # an error if it cannot
        prefix = "" if part == "output" else "model."
        full = f"{prefix}{layer.replace('blk', 'layers')}{NAMES[part]}.{suffix}"
        head_dim = 1
        if file.arch == "llama" and part in ("attn_q", "attn_k"):
            head_dim = file.config.head_dim
        tensors.append((full, t.shape, partial(blocks, t, head_dim)))

        # transformers' Llama has biases on q, k, v and o, or on none of them.
        biased = file.arch == "llama" and (part, suffix) == ("attn_q", "bias")
        if biased and f"{layer}attn_output.bias" not in file.tensors:
            width = file.config.hidden_size
            zeros = partial(torch.zeros, 1, width)  # one block
            tensors.append((full.replace("q_proj", "o_proj"), (width,), zeros))
    return tensors


def blocks(matrix: Matrix, d: int) -> Iterator[Tensor]:
    """The rows in float32, some heads of d at a time. d > 1: their pairs are put apart."""
    columns = math.prod(matrix.shape[1:])
    step = max(1, BLOCK // (columns * d)) * d
    for start in range(0, matrix.shape[0], step):
        block = matrix.values(slice(start, start + step))  # (rows, columns)
        if d > 1:
            pairs = block.reshape(-1, d // 2, 2, columns)  # (heads, d/2, 2, columns)
            block = pairs.swapaxes(1, 2).reshape(block.shape)  # (heads * d, columns)
        yield torch.from_numpy(block)


# --------------------------------------------------------------------------------------
# 2. The folder
# --------------------------------------------------------------------------------------


class Planned(seal.Weights):
    """Tensors before they are written: seal.py checks their names and shapes."""

    def __init__(self, source: Path, tensors: list[Stored]):
        self.folder, self.places = source, {}
        for name, shape, _ in tensors:
            self.places[name.removeprefix("model.")] = source, name, shape


def storage_type(shape: tuple[int, ...], dtype: torch.dtype) -> torch.dtype:
    """Norms and biases stay in float32, as in a GGUF file of any type."""
    return dtype if len(shape) > 1 else torch.float32


def write_shard(path: Path, shard: list[Stored], dtype: torch.dtype, bar: tqdm) -> None:
    """A safetensors file: the length of its header, the header, all rows."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape, _ in shard:
        kind = storage_type(shape, dtype)
        place = [end, end + math.prod(shape) * kind.itemsize]
        header[name] = {"dtype": CODES[kind], "shape": shape, "data_offsets": place}
        end = place[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, shape, rows in shard:
            for block in rows():
                block = block.to(storage_type(shape, dtype)).contiguous()
                block.view(torch.uint8).numpy().tofile(file)
                bar.update(block.nbytes)


def write_weights(folder: Path, tensors: list[Stored], dtype: torch.dtype) -> int:
    """All weights in one file, or in shards with an index. Returns their bytes."""
    shards, total, room = [], 0, 0
    for tensor in tensors:
        size = math.prod(tensor[1]) * storage_type(tensor[1], dtype).itemsize
        if size > room:
            shards.append([])
            room = SHARD
        shards[-1].append(tensor)
        room -= size
        total += size
    free = shutil.disk_usage(folder).free
    if total > free:
        need = f"needs {total / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        raise UserError(f"{folder.parent}: {need}")

    weight_map = {}
    bar = tqdm(total=total, desc="writing", unit="B", unit_scale=True, leave=False)
    with bar:
        for number, shard in enumerate(shards, 1):
            file_name = "model.safetensors"
            if len(shards) > 1:
                file_name = f"model-{number:05}-of-{len(shards):05}.safetensors"
            weight_map |= {name: file_name for name, _, _ in shard}
            write_shard(folder / file_name, shard, dtype, bar)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        seal.write_json(folder / "model.safetensors.index.json", index)
    return total


def write_texts(folder: Path, files: dict) -> None:
    """The tokenizer's files: {name: JSON, text, or the file to copy}."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        if isinstance(content, dict):
            seal.write_json(path, content)
        elif isinstance(content, Path):
            shutil.copyfile(content, path)
        else:
            path.write_text(content, encoding="utf-8")


# --------------------------------------------------------------------------------------
# 3. Command line
# --------------------------------------------------------------------------------------


def read(source: Path) -> tuple[dict, list[Stored], dict]:
    """config.json, the tensors, and the tokenizer's files: {name: content}."""
    if (source / "config.json").is_file():
        raise UserError(f"{source}: is a Hugging Face folder already; use it as it is")
    with seal.blame(source):
        if source.is_dir():
            return meta.read_release(source)
        file = File(source)
        return read_config(file), plan(file), read_tokenizer(file)


def main(arguments: list[str] | None = None) -> None:
    p = seal.Parser(
        "extras.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("source", type=Path, help="a .gguf file, or a folder with params.json")
    p.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder to make")
    p.add_argument("--dtype", choices=["auto", "float32", "float16", "bfloat16"],
                   default="auto", help="of matrices; auto rounds nothing: the 16 bits that "
                   "all of them have, or float32")
    args = p.parse_args(arguments)
    config, tensors, files = read(args.source)
    if args.dtype != "auto":
        config["dtype"] = args.dtype
    layers = config["num_hidden_layers"]
    if layers > len(tensors):
        raise UserError(f"{args.source}: {layers} layers cannot be in {len(tensors)} tensors")
    with new_folder(args.out) as folder:
        seal.write_json(folder / "config.json", config)
        try:
            Planned(args.source, tensors).check(seal.read_config(folder))
        except UserError as error:  # it names a folder that nobody will see
            what = str(error).replace(str(folder / "config.json"), str(args.source))
            raise UserError(what) from error
        write_texts(folder, files)
        size = write_weights(folder, tensors, getattr(torch, config["dtype"]))
    print(f"{args.out}: {config['model_type']}, {layers} layers, "
          f"{len(tensors)} tensors, {size / 1e6:,.1f} MB of {config['dtype']}")


if __name__ == "__main__":
    sys.exit(seal.exit_status("extras.convert", main))
