"""GGUF files as people have them: in parts, under other names, of other kinds, damaged."""

import random
import struct
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

import export_gguf
import seal
from extras.test_export import export, refused, value
from extras.test_gguf import compare, in_a_folder_of_its_own, same, source  # noqa: F401
from test_seal import make_scales, plain, sp_model  # noqa: F401


@pytest.fixture(scope="module")
def good(plain, tmp_path_factory) -> Path:
    """A GGUF file, and beside it, as "s", scales for it."""
    folder = tmp_path_factory.mktemp("gguf")
    make_scales(folder / "s", seal.read_config(plain), "channel")
    return source(plain, folder / "base.gguf", "Q8_0")


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def in_parts(whole: Path) -> list[Path]:
    """The file in three parts, as llama-gguf-split makes them."""
    reader = gguf.GGUFReader(whole)
    writer = gguf.GGUFWriter("m.gguf", "llama", split_max_tensors=8)
    for key, field in reader.fields.items():
        if not key.startswith(("GGUF.", "general.arch", "x.")):
            kind, inner = field.types[0], field.types[-1]
            writer.add_key_value(key, field.contents(), kind, inner)
    for t in reader.tensors:
        writer.add_tensor(t.name, t.data, raw_dtype=t.tensor_type)
    finish(writer)
    return sorted(Path().glob("m-*-of-00003.gguf"))


def test_a_model_in_parts_is_read_as_one_whichever_part_is_named(good, capsys):
    first, middle, last = in_parts(good)
    s = good.with_name("s")
    export(first, "a", "--scales", s)
    export(last, "b", "--scales", s)
    export(good, "c", "--scales", s)
    assert Path("a").read_bytes() == Path("b").read_bytes()
    found, wanted = gguf.GGUFReader("a"), {}
    for t in gguf.GGUFReader("c").tensors:
        wanted[t.name] = t
    assert len(found.tensors) == len(wanted)
    for t in found.tensors:
        assert same(t, wanted[t.name])
    assert value(found, "split.count") is None

    assert "is read" in refused(capsys, "--ckpt", first, "--outfile", middle)
    renamed = first.rename("renamed.gguf")
    assert "one of 3 parts" in refused(capsys, "--ckpt", renamed)
    renamed.rename(first)
    middle.write_bytes(last.read_bytes())
    assert middle.name in refused(capsys, "--ckpt", first)
    middle.unlink()
    assert middle.name in refused(capsys, "--ckpt", first)


def test_a_gguf_file_is_known_by_its_first_bytes(good, capsys):
    Path("sha256-0123").write_bytes(good.read_bytes())
    export(Path("sha256-0123"), "out.gguf")
    compare(good, "out.gguf")
    Path("model.gguf").write_text("version https://git-lfs.github.com/spec/v1")
    assert "no GGUF file" in refused(capsys, "--ckpt", "model.gguf")


@pytest.mark.parametrize("name, outfile", [
    ("a.b-Q4_K_M.gguf", "a.b-seal-h-Q4_K_M.gguf"),
    ("a.f16.gguf", "a.f16-seal-h.gguf"),
    ("a-7b.IQ4_XS.gguf", "a-7b-seal-h-IQ4_XS.gguf"),
    ("folder/a-Q8_0-00002-of-00003.gguf", "a-seal-h-Q8_0.gguf"),
    ("sha256-0123", "sha256-0123-seal-h.gguf"),
])
def test_a_file_is_named_as_llama_cpp_names_files(name, outfile):
    facts = seal.Facts("head", 2, 4, 16)
    assert export_gguf.usual_name(Path(name), facts, None) == outfile


# --------------------------------------------------------------------------------------
# Mistakes and damage
# --------------------------------------------------------------------------------------


def test_what_an_export_can_get_wrong_is_one_line_and_leaves_nothing(
    good, plain, capsys, monkeypatch
):
    config = seal.read_config(plain)
    make_scales(Path("s"), config, "head", "ntk:4")
    other = replace(config, num_attention_heads=8, head_dim=8)
    make_scales(Path("other"), other, "head")
    huge = torch.full((4,), 1e9)
    make_scales(Path("huge"), config, "head", values=[huge, huge])

    def said(ckpt, flags: str) -> str:
        flags = f"--ckpt {ckpt} --outfile out.gguf {flags}"
        return refused(capsys, *flags.split())

    for ckpt in (plain, good):
        assert "trained with ntk:4" in said(ckpt, "--scales s --extend yarn:4")
        assert "other" in said(ckpt, "--scales other")
        assert "ntk:0" in said(ckpt, "--scales none --extend ntk:0")
        assert "no/o.gguf" in said(ckpt, "--scales s --outfile no/o.gguf")
        with monkeypatch.context() as full:
            usage = type("Usage", (), {"free": 1000})
            full.setattr(export_gguf.shutil, "disk_usage", lambda _: usage)
            assert "GB" in said(ckpt, "--scales s")
    assert "too large" in said(plain, "--scales huge --outtype f16")
    assert "too large" in said(good, "--scales huge")
    assert "is read" in said(good, f"--outfile {good}")
    assert "for folders" in said(good, "--outtype f16")
    assert "for folders" in said(good, "--check")
    assert sorted(map(str, Path().iterdir())) == ["huge", "other", "s"]


@pytest.mark.parametrize("key, new, message", [
    ("general.architecture", "mamba", "'mamba'"),
    ("llama.attention.head_count", 8, "heads"),
    ("llama.attention.head_count", "four", "head_count"),
    ("llama.block_count", 3, "layers"),
    ("llama.rope.dimension_count", 8, "rotated"),
])
def test_files_of_other_kinds_are_refused(key, new, message, good, plain, capsys):
    source(plain, "base.gguf", "F32", **{key: new})
    flags = ["--ckpt", "base.gguf", "--outfile", "out", "--scales", good.with_name("s")]
    assert message in refused(capsys, *flags)


def test_scales_for_a_layer_that_is_not_there_are_refused(plain, capsys):
    source(plain, "base.gguf", "F32", **{"llama.block_count": 3})
    config = replace(seal.read_config(plain), num_hidden_layers=3)
    make_scales(Path("s"), config, "head")
    flags = "--ckpt base.gguf --outfile out --scales s"
    assert "blk.2.attn_output.weight" in refused(capsys, *flags.split())


def test_an_adapter_is_no_model(capsys):
    writer = gguf.GGUFWriter("lora.gguf", "llama")
    writer.add_tensor("blk.0.attn_q.weight.lora_a", np.ones((4, 64), np.float32))
    finish(writer)
    assert "language model" in refused(capsys, "--ckpt", "lora.gguf")


def header(tensors: int, keys: int) -> bytes:
    return struct.pack("<4sIQQ", b"GGUF", 3, tensors, keys)


def test_damaged_and_hostile_files_are_one_line(good, capsys):
    whole, rest = good.read_bytes(), good.read_bytes()[24:]
    bad = [b"", b"GGUF", b"not a model"]
    for size in (1000, len(whole) // 2, len(whole) - 40):
        bad.append(whole[:size])
    for count in (1 << 20, 1 << 63):
        bad.append(header(count, 30) + rest)
        bad.append(header(20, count) + rest)
    endless = struct.pack("<IIQ", 9, 0, 1 << 40)
    nested = struct.pack("<I", 9) + 5000 * struct.pack("<IQ", 9, 1)
    for array in (endless, nested):
        bad.append(header(0, 1) + export_gguf.pack("x") + array + bytes(1 << 16))
    flags = ["--ckpt", "bad.gguf", "--outfile", "out", "--scales", str(good.with_name("s"))]
    for data in bad:
        Path("bad.gguf").write_bytes(data)
        assert "bad.gguf" in refused(capsys, *flags)
    rng = random.Random(0)
    for _ in range(100):  # any other damage may go unseen, but never ends in a traceback
        data = bytearray(whole)
        for _ in range(rng.choice([1, 4])):
            at = rng.randrange(rng.choice([400, 24000]))
            data[at] = rng.randrange(256)
        Path("bad.gguf").write_bytes(data)
        assert seal.exit_status("export_gguf.py", export_gguf.main, flags) in (0, 2)
