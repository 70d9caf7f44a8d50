"""GGUF in, GGUF out: what export_gguf.py leaves alone, what it scales, what it stretches."""

import shutil
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFValueType

import export_gguf
import seal
from extras.check import LlamaCpp
from extras.test_export import export, refused, value
from test_seal import change_json, gap, make, make_scales, plain, some_tokens
from test_seal import sp_model  # noqa: F401

IN_BLOCKS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL")
OTHERS = ("F32", "F16", "BF16", "Q6_K")


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def as_type(values: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """A matrix in this type; any bytes with small scales, where gguf cannot write it."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    if kind.name not in ("IQ4_NL", "Q6_K"):
        return gguf.quantize(values, kind)
    shape = len(values), values.shape[1] // block, size
    rng = np.random.default_rng(0)
    data = rng.integers(0, 256, shape, np.uint8)
    scale = np.float16([0.003]).view(np.uint8)
    at = 0 if kind.name == "IQ4_NL" else size - 2
    data[:, :, at : at + 2] = scale
    return data.reshape(len(values), -1)


def rewritten(file, out, kind="F32", alignment=32, **keys) -> Path:
    """A file in float32 with matrices of this type, and with these keys; None: without."""
    made, kind = gguf.GGUFReader(file), GGMLQuantizationType[kind]
    keys |= {"general.alignment": alignment, "x.floats": [0.1], "x.empty": []}
    entries = []
    for key, field in made.fields.items():
        if not key.startswith("GGUF.") and key not in keys:
            entries.append(b"".join(part.tobytes() for part in field.parts))
    for key, new in keys.items():
        if new is not None:
            entries.append(export_gguf.entry(key, new))
    head = struct.pack("<IIQ", GGUFValueType.ARRAY, GGUFValueType.INT64, 3)
    longs = struct.pack("<3q", -1, 0, 1 << 40)
    entries.append(export_gguf.pack("x.longs") + head + longs)
    tensors = []
    for t in made.tensors:
        shape = tuple(t.shape.tolist()[::-1])
        wanted, data = t.tensor_type, np.array(t.data)
        block, _ = gguf.GGML_QUANT_SIZES[kind]
        if len(shape) == 2 and shape[1] % block == 0:
            wanted, data = kind, as_type(data, kind)
        tensors.append(export_gguf.Stored(t.name, shape, wanted, data.__getitem__))
    export_gguf.write(Path(out), entries, tensors, alignment)
    return Path(out)


def source(folder: Path, out, kind: str, **more) -> Path:
    """The folder as a GGUF file, rewritten."""
    export(folder, out, "--outtype", "f32")
    return rewritten(out, out, kind, **more)


def same(x, y) -> bool:
    """Whether two tensors of files are the same to the bit."""
    if x.tensor_type != y.tensor_type:
        return False
    return x.data.tobytes() == y.data.tobytes()


def compare(source, result, changed=()) -> list[tuple]:
    """All but o_proj is the source's to the bit; returns the o_proj of both files.

    Keys have their types, too, but for those named as changed, and SEAL's are added.
    """
    a, b = gguf.GGUFReader(source), gguf.GGUFReader(result)
    for key in a.fields.keys() - {"GGUF.kv_count", *changed}:
        x, y = a.fields[key], b.fields[key]
        assert x.types == y.types, key
        for part, other in zip(x.parts, y.parts, strict=True):
            assert bytes(part) == bytes(other), key
    for key in b.fields.keys() - a.fields.keys() - set(changed):
        assert key.startswith("seal.") or key == "general.description"
    assert a.alignment == b.alignment
    outputs = []
    for x, y in zip(a.tensors, b.tensors, strict=True):
        assert x.name == y.name
        assert x.shape.tolist() == y.shape.tolist()
        assert y.data_offset % b.alignment == 0
        if x.name.endswith("attn_output.weight"):
            outputs.append((x, y))
        else:
            assert same(x, y), x.name
    return outputs


# --------------------------------------------------------------------------------------
# What is copied, and what is scaled
# --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory, sp_model):
    """files(type): a GGUF file of it, with heads of 64, so that all types' blocks fit."""
    folder = tmp_path_factory.mktemp("wide") / "llama"
    make(folder, sp_model, hidden_size=256)

    def file(kind: str) -> Path:
        path = folder.with_name(f"{kind}.gguf")
        if not path.exists():
            source(folder, path, kind, alignment=64)
        return path

    return file


def scaled(file: Path, out: str, mode: str, values=None) -> list[torch.Tensor]:
    """Write the file with random scales, or with these, in it. They are also in "s"."""
    config = seal.Config(0, 256, 0, 2, 4, 2, 64)
    scales = make_scales(Path("s"), config, mode, values=values)
    export(file, out, "--scales", "s")
    return scales


def decoded(tensor) -> np.ndarray:
    return gguf.dequantize(tensor.data, tensor.tensor_type)


def columns(scale: torch.Tensor) -> np.ndarray:
    return scale.repeat_interleave(256 // len(scale)).numpy()


@pytest.mark.parametrize("mode", seal.METHOD)
@pytest.mark.parametrize("kind", [*IN_BLOCKS, *OTHERS])
def test_a_gguf_file_keeps_all_but_o_proj_which_is_scaled(kind, mode, files, capsys):
    scales = scaled(files(kind), "out.gguf", mode)
    said = capsys.readouterr().out
    in_blocks = mode == "head" and kind in IN_BLOCKS
    now = kind
    if not in_blocks and kind in ("Q6_K", "IQ4_NL"):
        now = "Q8_0"
    assert ("rounded once" in said) == in_blocks
    assert ("now Q8_0" in said) == (now != kind)
    outputs = compare(files(kind), "out.gguf")
    for (x, y), scale in zip(outputs, scales, strict=True):
        assert y.tensor_type.name == now
        wanted = decoded(x) * columns(scale)
        if in_blocks:  # to the last bit of the blocks' own scales
            wrong = np.abs(decoded(y) - wanted)
            assert wrong.max() <= 2**-10 * np.abs(wanted).max()
        else:
            expected = gguf.quantize(wanted, y.tensor_type)
            assert y.data.tobytes() == expected.tobytes()


@pytest.mark.parametrize("kind", [*IN_BLOCKS, *OTHERS])
def test_scales_of_one_give_the_file_back(kind, files):
    scaled(files(kind), "out.gguf", "channel", [torch.ones(256)] * 2)
    for x, y in compare(files(kind), "out.gguf"):
        assert same(x, y)


@pytest.mark.parametrize("kind", [*IN_BLOCKS, "F32", "BF16"])
def test_scales_can_be_divided_out_again(kind, files):
    first = torch.tensor([2.0, 0.5, -1.0, 4.0])
    second = torch.tensor([1.0, -0.25, 8.0, 1.0])
    scaled(files(kind), "scaled.gguf", "head", [first, second])
    scaled(Path("scaled.gguf"), "out.gguf", "head", [1 / first, 1 / second])
    for x, y in compare(files(kind), "out.gguf"):
        assert same(x, y)


@pytest.mark.parametrize("kind, mode, spread, now", [
    ("TQ1_0", "head", 0.1, "Q8_0"),
    ("TQ2_0", "head", 0.1, "Q8_0"),
    ("MXFP4", "head", 0.1, "Q8_0"),
    ("Q4_0", "channel", 0.02, "Q8_0"),
    ("Q5_1", "channel", 0.02, "Q8_0"),
    ("Q4_0", "channel", 1.0, "Q4_0"),
])
def test_a_type_that_cannot_hold_the_scales_gives_way_to_one_that_can(
    kind, mode, spread, now, files, capsys
):
    size = {"head": 4, "channel": 256}[mode]
    torch.manual_seed(0)
    values = list(1 + spread * (2 * torch.rand(2, size) - 1))
    scaled(files(kind), "out.gguf", mode, values)
    assert ("2 scaled and now Q8_0" in capsys.readouterr().out) == (now != kind)
    outputs = compare(files(kind), "out.gguf")
    for (x, y), scale in zip(outputs, values, strict=True):
        wanted = decoded(x) * columns(scale)
        wrong = np.square(decoded(y) - wanted)
        unscaled = np.square(decoded(x) - wanted)
        assert wrong.sum() < unscaled.sum()
        assert y.tensor_type.name == now


def test_scales_that_are_in_a_file_are_named_there_and_refused_a_second_time(files, capsys):
    scaled(files("Q8_0"), "once.gguf", "head")
    again = ["--scales", "s", "--outfile", "again.gguf", "--ckpt"]
    assert "already" in refused(capsys, *again, "once.gguf")
    first = value(gguf.GGUFReader("once.gguf"), "seal.fingerprint")
    scaled(Path("once.gguf"), "twice.gguf", "channel")
    twice = gguf.GGUFReader("twice.gguf")
    before, _ = value(twice, "seal.fingerprint").split(",")
    assert before == first
    assert value(twice, "seal.mode") == "channel"
    assert "already" in refused(capsys, *again, "twice.gguf")
    assert not Path("again.gguf").exists()
    export(Path("twice.gguf"), "out.gguf")
    compare("twice.gguf", "out.gguf")


# --------------------------------------------------------------------------------------
# A longer context
# --------------------------------------------------------------------------------------

LONGER = ["llama.context_length", "llama.rope.freq_base"]
SCALING = "llama.rope.scaling"
ORIGINAL = f"{SCALING}.original_context_length"


def answers(file) -> torch.Tensor:
    return LlamaCpp(file).logits(some_tokens(100))


@pytest.mark.parametrize("extension", ["ntk:2", "linear:2", "yarn:4"])
def test_a_file_and_its_folder_answer_alike_with_scales_and_extension(extension, plain):
    source(plain, "base.gguf", "F32")
    make_scales(Path("s"), seal.read_config(plain), "channel", extension)
    export(Path("base.gguf"), "a.gguf", "--scales", "s")
    export(plain, "b.gguf", "--scales", "s", "--outtype", "f32")
    changed = [*LONGER, ORIGINAL, f"{SCALING}.type", f"{SCALING}.factor"]
    compare("base.gguf", "a.gguf", changed)
    assert gap(answers("a.gguf"), answers("b.gguf")) < 1e-5
    assert value(gguf.GGUFReader("a.gguf"), "seal.extend") == extension


YARN = {f"{SCALING}.type": "yarn", f"{SCALING}.factor": 4.0}
STRETCHED = {  # keys as people's files have them, and what they mean
    "as in 2023": ({"llama.rope.scale_linear": 4.0}, {f"{SCALING}.factor": 4.0}),
    "yarn of a context that is not named": (YARN, YARN | {ORIGINAL: 256}),
}


@pytest.mark.parametrize("kind", STRETCHED)
def test_ntk_keeps_how_a_file_is_stretched_and_nothing_else_can_follow(kind, plain, capsys):
    for name, keys in zip("ab", STRETCHED[kind]):
        source(plain, f"{name}.gguf", "F32", **keys)
        export(Path(f"{name}.gguf"), f"{name}-ntk.gguf", "--extend", "ntk:2")
        compare(f"{name}.gguf", f"{name}-ntk.gguf", [*LONGER, ORIGINAL])
    assert gap(answers("a-ntk.gguf"), answers("b-ntk.gguf")) < 1e-5
    assert gap(answers("a-ntk.gguf"), answers("a.gguf")) > 1e-3
    assert "stretched" in refused(capsys, "--ckpt", "a.gguf", "--extend", "linear:2")


@pytest.mark.parametrize("extension", ["ntk:2", "linear:2", "yarn:4"])
def test_a_factor_on_cos_and_sin_is_kept(extension, plain):
    factor = {f"{SCALING}.attn_factor": 1.5}
    source(plain, "base.gguf", "F32", **factor)
    export(Path("base.gguf"), "out.gguf", "--extend", extension)
    changed = [*LONGER, ORIGINAL, f"{SCALING}.type", f"{SCALING}.factor"]
    compare("base.gguf", "out.gguf", changed)


def test_a_file_with_a_table_of_frequencies_is_not_extended(plain, capsys):
    folder = shutil.copytree(plain, "llama")
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}
    rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 64}
    change_json(Path(folder) / "config.json", rope_parameters=rope)
    source(Path(folder), "base.gguf", "F32")
    flags = "--ckpt base.gguf --outfile out.gguf --extend ntk:2"
    assert "extras.convert" in refused(capsys, *flags.split())
