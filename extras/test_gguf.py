"""GGUF in, GGUF out: what export_gguf.py leaves alone, what it scales, and what it refuses."""

import random
import struct
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFValueType

import export_gguf
import seal
from extras.check import LlamaCpp
from extras.test_export import export, value
from test_seal import make, make_scales, plain, sp_model  # noqa: F401

# ---------------------------------------------------------------------------------------
# From a GGUF file
# ---------------------------------------------------------------------------------------

EXACT = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL")


def source(folder: Path, out: Path, kind: str, alignment=32, **keys) -> Path:
    """The folder as a GGUF file with matrices of this type, and metadata that others have broken."""
    made = export(folder, out, "--outtype", "f32")
    entries = {}
    for key, field in made.fields.items():
        if not key.startswith("GGUF."):
            entries[key] = b"".join(part.tobytes() for part in field.parts)
    for key, new in {"general.alignment": alignment, "x.floats": [0.1], "x.empty": [], **keys}.items():
        entries[key] = export_gguf.entry(key, new)
    longs = struct.pack("<IIQ3q", GGUFValueType.ARRAY, GGUFValueType.INT64, 3, -1, 0, 1 << 40)
    entries["x.longs"] = export_gguf.pack("x.longs") + longs
    tensors = []
    for t in made.tensors:
        shape, wanted, data = tuple(t.shape.tolist()[::-1]), t.tensor_type, np.array(t.data)
        block, size = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
        if len(shape) == 2 and shape[1] % block == 0:
            wanted = GGMLQuantizationType[kind]
            if kind in ("IQ4_NL", "Q6_K"):  # the gguf package cannot write them: any bytes, small scales
                data = np.random.default_rng(0).integers(0, 256, (shape[0], shape[1] // block, size), np.uint8)
                at = 0 if kind == "IQ4_NL" else size - 2
                data[:, :, at : at + 2] = np.float16([0.003]).view(np.uint8)
                data = data.reshape(shape[0], -1)
            else:
                data = gguf.quantize(data, wanted)
        tensors.append(export_gguf.Stored(t.name, shape, wanted, data.__getitem__))
    export_gguf.write(out, list(entries.values()), tensors, alignment)
    return out


def compare(source: Path, result: Path, changed=()) -> list[tuple]:
    """Keys, with types, and tensors are the source's to the bit, but for these keys, SEAL's, and o_proj's."""
    a, b = gguf.GGUFReader(source), gguf.GGUFReader(result)
    for key in a.fields.keys() - {"GGUF.kv_count", *changed}:
        x, y = a.fields[key], b.fields[key]
        assert x.types == y.types and list(map(bytes, x.parts)) == list(map(bytes, y.parts)), key
    for key in b.fields.keys() - a.fields.keys() - set(changed):
        assert key.startswith("seal.") or key == "general.description"
    assert a.alignment == b.alignment and not any(t.data_offset % b.alignment for t in b.tensors)
    pairs = list(zip(a.tensors, b.tensors, strict=True))
    for x, y in pairs:
        assert (x.name, x.shape.tolist()) == (y.name, y.shape.tolist())
        if not x.name.endswith("attn_output.weight"):
            assert x.tensor_type == y.tensor_type and x.data.tobytes() == y.data.tobytes(), x.name
    return [pair for pair in pairs if pair[0].name.endswith("attn_output.weight")]


@pytest.fixture(scope="module")
def wide(tmp_path_factory, sp_model) -> Path:
    """Heads of 64, so that every type's blocks fit the rows."""
    return make(tmp_path_factory.mktemp("wide") / "llama", sp_model, hidden_size=256)


@pytest.mark.parametrize("mode", ["head", "channel", "ones"])
@pytest.mark.parametrize("kind", [*EXACT, "F32", "F16", "BF16", "Q6_K"])
def test_a_gguf_file_keeps_all_but_o_proj_which_is_scaled(kind, mode, wide, tmp_path, capsys):
    file, scales = source(wide, tmp_path / "base.gguf", kind, 64), [torch.ones(256)] * 2
    config, s = seal.read_config(wide), tmp_path / "s"
    if mode == "ones":
        make_scales(s, config, "channel", values=scales)
    else:
        scales = make_scales(s, config, mode)
    export(file, tmp_path / "out.gguf", "--scales", s)
    said = capsys.readouterr().out
    exact = mode == "head" and kind in EXACT
    now = "Q8_0" if kind == "Q6_K" or (kind == "IQ4_NL" and not exact) else kind
    assert ("exactly" in said) == exact
    for (x, y), scale in zip(compare(file, tmp_path / "out.gguf"), scales, strict=True):
        if mode == "ones":
            assert x.tensor_type == y.tensor_type and x.data.tobytes() == y.data.tobytes()
            continue
        assert y.tensor_type.name == now and ("now Q8_0" in said) == (now != kind)
        columns = scale.repeat_interleave(256 // len(scale)).numpy()
        wanted = gguf.dequantize(x.data, x.tensor_type) * columns
        if exact:  # to the last bit of the blocks' own scales
            found = gguf.dequantize(y.data, y.tensor_type)
            assert np.abs(found - wanted).max() <= 2**-10 * np.abs(wanted).max()
        else:
            assert y.data.tobytes() == gguf.quantize(wanted, y.tensor_type).tobytes()


@pytest.mark.parametrize("kind", [*EXACT, "F32", "BF16"])
def test_scales_can_be_divided_out_again(kind, wide, tmp_path):
    file, config, s = source(wide, tmp_path / "base.gguf", kind), seal.read_config(wide), tmp_path / "s"
    scales = [torch.tensor([2.0, 0.5, -1.0, 4.0]), torch.tensor([1.0, -0.25, 8.0, 1.0])]
    make_scales(s, config, "head", values=scales)
    export(file, tmp_path / "scaled.gguf", "--scales", s)
    make_scales(s, config, "head", values=[1 / scale for scale in scales])
    export(tmp_path / "scaled.gguf", tmp_path / "out.gguf", "--scales", s)
    for x, y in compare(file, tmp_path / "out.gguf"):
        assert x.data.tobytes() == y.data.tobytes()


@pytest.mark.parametrize("extension", ["ntk:2", "linear:2", "yarn:4"])
def test_a_gguf_file_and_its_folder_answer_alike_with_scales_and_extension(extension, plain, tmp_path):
    file = source(plain, tmp_path / "base.gguf", "F32")
    make_scales(tmp_path / "s", seal.read_config(plain), "channel", extension)
    export(file, tmp_path / "a.gguf", "--scales", tmp_path / "s")
    export(plain, tmp_path / "b.gguf", "--scales", tmp_path / "s", "--outtype", "f32")
    changed = [f"llama.{key}" for key in ("context_length", "rope.freq_base", "rope.scaling.type",
               "rope.scaling.factor", "rope.scaling.original_context_length")]
    compare(file, tmp_path / "a.gguf", changed)
    tokens = list(range(3, 100))
    found, expected = (LlamaCpp(tmp_path / name).logits(tokens) for name in ("a.gguf", "b.gguf"))
    assert (found - expected).abs().max() < 1e-5
    assert value(gguf.GGUFReader(tmp_path / "a.gguf"), "seal.extend") == extension

# ---------------------------------------------------------------------------------------
# Mistakes and damage
# ---------------------------------------------------------------------------------------


def refused(capsys, *flags) -> str:
    """The one line with which the command ends, status 2."""
    assert seal.run("export_gguf.py", export_gguf.main, [str(flag) for flag in flags]) == 2
    said = capsys.readouterr().err.strip()
    assert "\n" not in said
    return said


def test_what_an_export_can_get_wrong_is_one_line_and_leaves_nothing(plain, tmp_path, capsys, monkeypatch):
    config, out, s = seal.read_config(plain), tmp_path / "out.gguf", tmp_path / "s"
    file = source(plain, tmp_path / "base.gguf", "Q8_0")
    make_scales(s, config, "head", "ntk:4")
    make_scales(tmp_path / "other", replace(config, num_attention_heads=8, head_dim=8), "head")
    make_scales(tmp_path / "huge", config, "head", values=[torch.full((4,), 1e9)] * 2)
    before = sorted(tmp_path.iterdir())
    for ckpt in (plain, file):
        base = ("--ckpt", ckpt, "--outfile", out, "--scales")
        assert "trained with ntk:4" in refused(capsys, *base, s, "--extend", "yarn:4")
        refused(capsys, *base, tmp_path / "other")
        refused(capsys, *base, "none", "--extend", "ntk:0")
        flags = () if ckpt == file else ("--outtype", "f16")
        assert "too large" in refused(capsys, *base, tmp_path / "huge", *flags)
    assert "is read" in refused(capsys, "--ckpt", file, "--outfile", file, "--scales", s)
    assert "for folders" in refused(capsys, *base, s, "--outtype", "f16")
    assert "for folders" in refused(capsys, *base, s, "--check")
    with monkeypatch.context() as here:
        here.setattr(export_gguf.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
        assert "GB" in refused(capsys, *base, s)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("key, new, message", [
    ("split.count", 3, "one of 3 parts"), ("general.architecture", "mamba", "'mamba'"),
    ("llama.attention.head_count", 8, ""), ("llama.attention.head_count", "four", ""),
    ("llama.block_count", 3, ""),
])
def test_files_of_other_kinds_are_refused(key, new, message, plain, tmp_path, capsys):
    file = source(plain, tmp_path / "base.gguf", "F32", **{key: new})
    make_scales(tmp_path / "s", seal.read_config(plain), "channel")
    assert message in refused(capsys, "--ckpt", file, "--scales", tmp_path / "s", "--outfile", tmp_path / "o")


def test_damaged_and_hostile_files_are_one_line(plain, tmp_path, capsys):
    whole = source(plain, tmp_path / "base.gguf", "Q8_0").read_bytes()
    make_scales(tmp_path / "s", seal.read_config(plain), "channel")
    bad, rng = [b"", b"GGUF", b"not a model", whole[:1000], whole[: len(whole) // 2], whole[:-40]], random.Random(0)
    bad += [whole[:8] + struct.pack("<Q", count) + whole[16:] for count in (1 << 20, 1 << 63)]   # tensors
    bad += [whole[:16] + struct.pack("<Q", count) + whole[24:] for count in (1 << 20, 1 << 63)]  # keys
    endless = export_gguf.pack("x") + struct.pack("<IIQ", 9, 0, 1 << 40)
    bad.append(struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + endless + bytes(1 << 16))
    nested = export_gguf.pack("x") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 5000
    bad.append(struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + nested + bytes(1 << 16))
    file, flags = tmp_path / "bad.gguf", ("--scales", tmp_path / "s", "--outfile", tmp_path / "out")
    for data in bad:
        file.write_bytes(data)
        assert str(file) in refused(capsys, "--ckpt", file, *flags)
    for _ in range(150):  # any other damage may go unseen, but never ends in a traceback
        data = bytearray(whole)
        for _ in range(rng.choice([1, 4])):
            data[rng.randrange(rng.choice([400, 24000]))] = rng.randrange(256)
        file.write_bytes(data)
        status = seal.run("export_gguf.py", export_gguf.main, [str(a) for a in ("--ckpt", file, *flags)])
        assert status in (0, 2) and "Traceback" not in capsys.readouterr().err
