"""--ckpt FILE.gguf: a GGUF file is trained and asked as it is, its matrices kept packed.

    python seal.py train --ckpt model.Q4_K_M.gguf --mode channel
    python export_gguf.py --ckpt model.Q4_K_M.gguf --scales scales.safetensors

A matrix stays the file's bytes, memory-mapped. It is dequantised where it is used, on the
device where it is used, and once more on the way back; nothing dequantised outlives its
block. Of the embedding only the prompt's rows are dequantised, and the output matrix
works for the answer's tokens alone, in pieces unless the model is small. So training
needs the memory of the file and of one block, not of the model. Only a small model is
dequantised whole: while it answers, as there it is used for every token, and where a
step's layers are not computed twice (--recompute), as each of them keeps its matrices.

Config, tokenizer and templates are what extras.convert makes of the metadata, in a folder
that is gone when the program ends. A table of rotary frequencies (rope_freqs.weight) is
used as it is. Opened by seal.py where --ckpt is a file.

Letters in shapes: seal.py's; R rows of a matrix, C columns.
"""

import atexit
import ctypes
import math
import re
import shutil
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import torch
import torch.nn.functional as F
from gguf import GGMLQuantizationType
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute
from tqdm import tqdm

import seal
from extras.convert import NAMES, Planned, plan, write_texts
from extras.gguf_file import File, Matrix
from extras.gguf_folder import read_config, read_tokenizer

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
PIECE = 2**20  # weights that are dequantised at a time
SMALL = 2**29  # weights of a model that may be dequantised whole


def dequantize(data: Tensor, kind: GGMLQuantizationType, dtype: torch.dtype) -> Tensor:
    """Rows of a matrix, uint8 (R, bytes of a row) -> (R, C) of this dtype.

    transformers has the types that matter in torch, for any device, under a name that is
    not public; what it does not know, and all if it is gone, the gguf package knows.
    """
    if kind.name in FLOATS:
        return data.view(FLOATS[kind.name]).to(dtype)
    try:
        from transformers.integrations.gguf.dequant import GGML_BLOCK
        from transformers.integrations.gguf.dequant import dequantize as in_torch
    except ImportError:
        GGML_BLOCK = {}
    if int(kind) in GGML_BLOCK:
        return in_torch(data.flatten(), int(kind), dtype).view(len(data), -1)
    values = gguf.dequantize(data.cpu().numpy(), kind)
    return torch.from_numpy(values).to(data.device, dtype)


class Packed(nn.Module):
    """A linear layer whose matrix (R, C) is dequantised each time that it is used."""

    def __init__(self, matrix: Matrix, device, dtype: torch.dtype, order, small: bool):
        """order: which row of the file is which row of the layer, if not the same."""
        super().__init__()
        self.kind, self.dtype, self.order, self.bias = matrix.kind, dtype, order, None
        shape = matrix.shape[0], matrix.row_bytes
        # "c": torch wants memory that it could write to; nothing is ever written.
        data = np.memmap(matrix.path, np.uint8, "c", matrix.offset, shape)
        self.data = torch.from_numpy(data).to(device)
        self.small, self.whole = small, None
        self.columns = matrix.shape[1]
        self.piece = max(1, PIECE // self.columns)  # rows

    def values(self, rows: slice = slice(None)) -> Tensor:
        """Some rows, or all: (R, C).

        What comes between bytes and values is larger than both. A piece of it stays in
        the processor's caches: for a 7B's matrices of the K types that is twice as fast.
        """
        data = self.data[rows]
        if self.order is not None:
            data = data[self.order]  # bytes are fewer than values
        if len(data) <= self.piece:
            return dequantize(data, self.kind, self.dtype)
        shape = len(data), self.columns
        values = torch.empty(shape, device=data.device, dtype=self.dtype)
        for start in range(0, len(data), self.piece):
            piece = slice(start, start + self.piece)
            values[piece] = dequantize(data[piece], self.kind, self.dtype)
        return values

    def weight(self) -> Tensor:
        """All rows; kept as they are while nothing is trained, if the model is small."""
        if torch.is_grad_enabled() or not self.small:
            self.whole = None
            return self.values()
        if self.whole is None:
            self.whole = self.values()
        return self.whole

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C) -> (..., R)"""
        return F.linear(x, self.weight(), self.bias)


class Output(Packed):
    """The output matrix: many rows, of which a piece at a time is dequantised.

    Not in a small model: whole, it sums the gradient in the folder's order, and the
    scales that are learned are the folder's to the bit.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.small:
            return super().forward(x)
        parts = []
        for start in range(0, len(self.data), self.piece):
            rows = slice(start, start + self.piece)
            parts.append(recompute(self.part, x, rows, use_reentrant=False))
        return torch.cat(parts, dim=-1)

    def part(self, x: Tensor, rows: slice) -> Tensor:
        return F.linear(x, self.values(rows))


class Embedding(Packed):
    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, T) -> (B, T, D)"""
        rows = dequantize(self.data[tokens.flatten()], self.kind, self.dtype)
        return rows.view(*tokens.shape, -1)


def halves(count: int, d: int) -> Tensor:
    """Where the rows of q and k stand in a llama's file, which has a pair's rows (2i,
    2i + 1) beside each other, and not half a head apart: (count,)."""
    return torch.arange(count).view(-1, d // 2, 2).transpose(1, 2).flatten()


def is_small(file: File) -> bool:
    return sum(math.prod(t.shape) for t in file.tensors.values()) < SMALL


def load_packed(file: File, folder, config: seal.Config, device="cpu", dtype=None):
    """seal.load_model for a GGUF file. dtype None: float32 on a CPU, else bfloat16."""
    if dtype is None:
        dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    with seal.blame(file.path):
        model = Planned(file.path, plan(file)).check(config)
    small = is_small(file)
    if not small:
        give_memory_back()
    # Matrices first: then a bias has its layer.
    tensors = sorted(file.tensors.items(), key=lambda item: -len(item[1].shape))
    for name, matrix in tqdm(tensors, "loading", leave=False):
        if name == "rope_freqs.weight":
            continue
        layer, part, suffix = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(\w+)", name).groups()
        path = NAMES[part] if layer is None else f"layers.{layer}.{NAMES[part]}"
        order = None
        if file.arch == "llama" and part in ("attn_q", "attn_k"):
            order = halves(matrix.shape[0], config.head_dim).to(device)
        if len(matrix.shape) == 2:
            kind = {"token_embd": Embedding, "output": Output}.get(part, Packed)
            put(model, path, kind(matrix, device, dtype, order, small))
            continue
        values = torch.from_numpy(matrix.values(slice(None)).flatten()).to(device, dtype)
        values = values if order is None else values[order]
        put(model, f"{path}.{suffix}", nn.Parameter(values, requires_grad=False))
    if config.tie_word_embeddings:
        matrix = file.tensors["token_embd.weight"]
        model.lm_head = Output(matrix, device, dtype, None, small)
        model.lm_head.data = model.embed_tokens.data  # a GPU need not hold it twice
    if "rope_freqs.weight" in file.tensors:
        model.frequencies = table_of(file, config)
    model.reset_scales("head")
    return model


def give_memory_back() -> None:
    """Let malloc return large blocks to the system as soon as they are freed.

    glibc's keeps them to cut them up for later, and after some layers of a 7B has a
    gigabyte that fits nothing. Other C libraries have no such setting, nor the need.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, 2**22)  # M_MMAP_THRESHOLD: bytes of a large block


def table_of(file: File, config: seal.Config) -> Tensor:
    """Frequencies (d/2,) by the file's table of divisors, whatever else may say it."""
    if config.rope_scaling["rope_type"] in ("linear", "yarn"):
        raise seal.UserError(f"{file.path}: has rope_freqs.weight; only ntk can stretch it")
    plain = replace(config, rope_scaling={"rope_type": "default"})
    divisors = file.tensors["rope_freqs.weight"].values(slice(None)).flatten()
    return seal.rope_frequencies(plain)[0] / torch.from_numpy(divisors.copy())


def put(model: seal.Llama, path: str, value) -> None:
    """Set what the model has at this path."""
    parent, _, name = path.rpartition(".")
    module = model.get_submodule(parent)
    if isinstance(module, Packed):
        module.bias = value
    else:
        setattr(module, name, value)


def as_folder(file: File) -> Path:
    """A folder with the file's config and tokenizer, gone when the program ends."""
    top = Path(tempfile.mkdtemp(prefix="seal-"))
    atexit.register(shutil.rmtree, top, ignore_errors=True)
    folder = top / file.path.resolve().stem
    folder.mkdir()
    seal.write_json(folder / "config.json", read_config(file, any_table=True))
    write_texts(folder, read_tokenizer(file))
    return folder


def folder_of(ckpt) -> Path:
    """A folder with the config and tokenizer of --ckpt: itself, or one made of a file."""
    if not Path(ckpt).is_file():
        return Path(ckpt)
    with seal.blame(ckpt):
        return as_folder(File(ckpt))


def open_gguf(flags: seal.Flags):
    """seal.open_checkpoint for a GGUF file: (model, tokenizer, facts)."""
    with seal.blame(flags.ckpt):
        file = File(flags.ckpt)
        folder = as_folder(file)
    plain, seal.load_model = seal.load_model, partial(load_packed, file)
    try:
        model, tokenizer, facts = seal.open_checkpoint(replace(flags, ckpt=str(folder)))
    except seal.UserError as error:  # it names a folder that nobody will see
        what = str(error).replace(str(folder), str(file.path))
        raise seal.UserError(what) from error
    finally:
        seal.load_model = plain
    if flags.recompute == "auto" and not is_small(file):
        # Layers that keep what they need on the way back keep all matrices dequantised,
        # which is more than the activations that "auto" counts.
        flags.recompute = "always"
    facts.checkpoint = file.path.name
    return model, tokenizer, facts
