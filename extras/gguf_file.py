"""GGUF files as people have them: what one says of its model, and its tensors' bytes.

Used by export_gguf.py, where --ckpt is a file, and by the extras that read such files. A
GGUF file is known by its first four bytes, whatever its name is. A model in several parts
(NAME-00001-of-00003.gguf, as llama-gguf-split makes them) is read as one, whichever of
them is named. Tensors stay in the file until some of their rows are asked for.

Whatever is wrong in a file is a UserError that begins with its name.
"""

import math
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from torch import Tensor

import seal

MOST_READS = 4_000_000  # numbers and strings of a header; no model has half
ARCHITECTURES = ("llama", "qwen2", "qwen3")  # llama is Mistral's and SmolLM's, too


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


def open_gguf(path: Path) -> Reader:
    """One file's header; UserError unless it is a GGUF file, and whole."""
    with seal.blame(path):
        with open(path, "rb") as file:
            if file.read(4) != b"GGUF":
                raise ValueError("is no GGUF file, and no folder either")
        return Reader(path)


@dataclass(frozen=True)
class Matrix:
    """A tensor of a GGUF file: where its rows stand. A norm or a bias has a number a row."""

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]  # as in PyTorch: rows first
    path: Path
    offset: int  # of its first byte in the file
    row_bytes: int

    def read(self, rows: slice) -> np.ndarray:
        """The bytes of some rows, uint8 (rows, row_bytes).

        Read anew each time: what is touched of a memory map counts as memory.
        """
        start, stop, _ = rows.indices(self.shape[0])
        count, offset = stop - start, self.offset + start * self.row_bytes
        data = np.fromfile(self.path, np.uint8, count * self.row_bytes, offset=offset)
        return data.reshape(count, self.row_bytes)

    @np.errstate(all="ignore")  # a damaged file's numbers may be of any size
    def values(self, rows: slice) -> np.ndarray:
        """Some rows as float32 (rows, columns)."""
        return gguf.dequantize(self.read(rows), self.kind)


class File:
    """A GGUF file, or all parts of one: its keys, its config, and its tensors by name."""

    def __init__(self, path):
        self.path, self.tensors = Path(path), {}
        with seal.blame(path):
            self.paths = self._parts()
            for number, part in enumerate(self.paths):
                self._add(part, number)
            if len(self.tensors) != self.get("split.tensors.count", int, len(self.tensors)):
                raise ValueError("its parts do not hold the tensors that it says")
            self.arch = self.get("general.architecture", str)
            if self.arch not in ARCHITECTURES:
                raise ValueError(f"is a {self.arch!r}, not a {' or '.join(ARCHITECTURES)}")
            if "token_embd.weight" not in self.tensors:
                raise ValueError("has no token_embd.weight; is it a language model?")
            self.config = self._config()

    def _parts(self) -> list[Path]:
        self.fields = open_gguf(self.path).fields
        count = self.get("split.count", int, 1)
        if count < 2:
            return [self.path]
        name = re.fullmatch(r"(.+)-\d{5}-of-(\d{5})\.gguf", self.path.name)
        if not name or int(name[2]) != count:
            raise ValueError(
                f"is one of {count} parts, and they are not named NAME-00001-of-{count:05}.gguf; "
                "llama-gguf-split --merge joins them")
        numbers = range(1, count + 1)
        return [self.path.with_name(f"{name[1]}-{i:05}-of-{count:05}.gguf") for i in numbers]

    def _add(self, path: Path, number: int) -> None:
        """The tensors of a part; the keys are those of the first."""
        reader = open_gguf(path)
        if number == 0:
            self.fields, self.alignment = reader.fields, int(reader.alignment)
        elif int(reader.fields["split.no"].contents()) != number:
            raise ValueError(f"{path} is not part {number + 1}, as its name says")
        for t in reader.tensors:
            shape = tuple(t.shape.tolist()[::-1])
            row_bytes, left = divmod(t.n_bytes, shape[0])
            if left or t.name in self.tensors:
                raise ValueError(f"{t.name} stands there twice, or cannot be cut into rows")
            self.tensors[t.name] = Matrix(
                t.name, t.tensor_type, shape, path, t.data_offset, row_bytes)

    def get(self, key: str, kind: type, default=None):
        """The value of a key. One that begins with a dot is the architecture's."""
        key = self.arch + key if key.startswith(".") else key
        field = self.fields.get(key)
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

    def stretch(self) -> tuple[str, float, float]:
        """How positions are stretched: the kind, the factor, and one on cos and sin."""
        kind = self.get(".rope.scaling.type", str, "linear")
        factor = self.get(".rope.scaling.factor", float, 0.0)
        factor = factor or self.get(".rope.scale_linear", float, 1.0)  # until late 2023
        if kind == "none" or factor == 0:
            factor = 1.0
        return kind, factor, self.get(".rope.scaling.attn_factor", float, 1.0)

    def _config(self) -> seal.Config:
        heads = self.get(".attention.head_count", int)
        width = self.get(".embedding_length", int)
        context = self.get(".context_length", int)
        head_dim = self.get(".attention.key_length", int, width // max(heads, 1))
        sizes = {
            "vocab_size": self.tensors["token_embd.weight"].shape[0],
            "hidden_size": width,
            "intermediate_size": self.get(".feed_forward_length", int),
            "num_hidden_layers": self.get(".block_count", int),
            "num_attention_heads": heads,
            "num_key_value_heads": self.get(".attention.head_count_kv", int, heads),
            "head_dim": head_dim,
            "rms_norm_eps": self.get(".attention.layer_norm_rms_epsilon", float),
            "rope_theta": self.get(".rope.freq_base", float, 10000.0),
            "context": context,
        }
        kind, factor, _ = self.stretch()
        for name, value in [*sizes.items(), ("the factor of positions", factor)]:
            if value <= 0:
                raise ValueError(f"the metadata make {name} {value}; it must be above 0")
        if not self.get(".attention.causal", bool, True):
            raise ValueError("looks ahead in the text, as embedding models do")
        if self.get(".rope.dimension_count", int, head_dim) != head_dim:
            raise ValueError("only a part of each head is rotated, which is not supported")
        rope = {"rope_type": "default"}
        if factor != 1:
            rope = {"rope_type": kind, "factor": factor}
            if kind != "linear":
                original = self.get(".rope.scaling.original_context_length", int, context)
                rope["original_max_position_embeddings"] = original
        folded = self.get("seal.fingerprint", str, "").split(",")
        return seal.Config(
            **sizes,
            rope_scaling=rope,
            tie_word_embeddings="output.weight" not in self.tensors,
            attention_bias="blk.0.attn_q.bias" in self.tensors,
            qk_norm="blk.0.attn_q_norm.weight" in self.tensors,
            folded=tuple(filter(None, folded)),
        )

    def entries(self, without) -> list[bytes]:
        """All keys with their values, as they stand in the file, but for some."""
        entries = []
        for key, field in self.fields.items():
            # GGUF.* are the reader's own; what is read as one is not split any more.
            if key not in without and not key.startswith(("GGUF.", "split.")):
                entries.append(b"".join(part.tobytes() for part in field.parts))
        return entries


# --------------------------------------------------------------------------------------
# A matrix with its columns scaled, in a type of the file
# --------------------------------------------------------------------------------------

# Types whose blocks of 32 columns begin with an f16 scale, or a scale and a minimum.
SCALED = {GGMLQuantizationType[name]: 1 for name in ("Q4_0", "Q5_0", "Q8_0", "IQ4_NL")}
SCALED |= {GGMLQuantizationType[name]: 2 for name in ("Q4_1", "Q5_1")}
FLOATS = [GGMLQuantizationType[name] for name in ("F32", "F16", "BF16")]
Q8_0 = GGMLQuantizationType.Q8_0


def scaled(matrix: Matrix, columns: Tensor, encode):
    """Column c of the matrix times columns[c]: (type, function of a slice, how it is done).

    The function makes the bytes of some rows. encode(values, type, name) does the same of
    float32 values, or raises UserError where the type cannot hold them.
    """
    if matrix.shape[1:] != columns.shape:
        raise ValueError(f"{matrix.name} is {matrix.shape}, not {len(columns)} columns wide")
    kind = matrix.kind
    alike = all(len(block.unique()) == 1 for block in columns.split(32))
    if kind in SCALED and alike:  # a block's columns have one scale: its own is multiplied
        rows = partial(scaled_blocks, matrix, columns)
        return kind, rows, "scaled in their blocks' f16 scales, each rounded once"
    how = f"scaled and cast to {kind.name}"
    if not holds(matrix, columns):
        kind, how = Q8_0, f"scaled and now Q8_0, for {kind.name} would round the scales away"
    return kind, partial(scaled_values, matrix, columns, kind, encode), how


def scaled_blocks(matrix: Matrix, columns: Tensor, rows: slice) -> np.ndarray:
    data = matrix.read(rows)
    size = gguf.GGML_QUANT_SIZES[matrix.kind][1]
    blocks = data.reshape(len(data), -1, size)  # (rows, blocks of 32 columns, bytes)
    own = blocks[:, :, : 2 * SCALED[matrix.kind]].view(np.float16)  # (rows, blocks, 1 or 2)
    product = own * columns[::32, None].numpy()
    # Exact where the scale is 0, 1, -1 or a power of two; otherwise rounded to 11 bits.
    if not np.abs(product).max() <= np.finfo(np.float16).max:
        raise seal.UserError(f"{matrix.name}: a scale gets too large for {matrix.kind.name}")
    own[:] = product
    return blocks


def scaled_values(matrix: Matrix, columns: Tensor, kind, encode, rows: slice) -> np.ndarray:
    values = torch.from_numpy(matrix.values(rows).copy())
    return encode(values * columns, kind, matrix.name)


@np.errstate(all="ignore")  # numbers that are too large are told of later
def holds(matrix: Matrix, columns: Tensor) -> bool:
    """Whether the matrix, scaled and cast to its own type, is nearer to the exactly scaled
    one than the matrix without scales is: otherwise the scales would be lost in the type.

    TQ2_0 has only -1, 0 and 1 times a number of its block, so that all heads of a block
    get the same. In Q4_0 a cast moves values by up to half of its steps, which is more
    than scales near 1 move them.
    """
    if matrix.kind in FLOATS:
        return True
    step, wrong, unscaled = max(1, 2**22 // matrix.shape[1]), 0.0, 0.0
    for start in range(0, matrix.shape[0], step):
        values = matrix.values(slice(start, start + step))
        wanted = values * columns.numpy()
        try:
            found = gguf.dequantize(gguf.quantize(wanted, matrix.kind), matrix.kind)
        except NotImplementedError:
            return False
        wrong += float(np.square(found - wanted).sum())
        unscaled += float(np.square(values - wanted).sum())
    return wrong < unscaled
