"""Tests of the evidence's machinery, on the toy."""

import json

import pytest

import seal
from extras import realmodel, realmodel_table, transfer


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """What is measured of the toy: the file, and the flags that made it."""
    out = tmp_path_factory.mktemp("measured") / "r.json"
    flags = ["--ckpt", str(seal.TOY), "--out", str(out), "--prompts", "2", "--train-length", "110"]
    lines = ["--recipes", "--mode channel --pull 0.02;SEAL-L", "--lengths", "110,140"]
    kept = ["--questions", "5", "--windows", "2"]
    realmodel.main([*flags, *lines, *kept])
    other = ["--lengths", "400", "--train-length", "400", "--prompts", "5"]
    transfer.main(["needles", "meeting", "--recipe", "SEAL-C", *flags, *other])
    return out, [*flags, *lines, *kept]


def test_every_part_leaves_its_cells_and_every_answer_is_kept(measured):
    out, _ = measured
    cells = json.loads(out.read_text())["cells"]
    parts = {name.split(" / ")[0] for name in cells}
    assert parts >= {"lines", "format", "perplexity", "same", "needles", "meeting"}
    asked = {"lines", "format", "needles", "meeting"}
    answers = sum(cell["prompts"] for name, cell in cells.items() if name.split(" / ")[0] in asked)
    assert len((out.parent / "r-answers.jsonl").read_text().splitlines()) == answers
    assert all(cell["low"] <= cell["share"] <= cell["high"] for cell in cells.values() if "low" in cell)


def test_what_is_finished_is_not_done_again(measured, capsys, monkeypatch):
    out, flags = measured
    monkeypatch.setattr(seal, "train", None)
    for scales in out.parent.glob("*.safetensors"):
        scales.unlink()  # nor missed
    before = out.read_text(), (out.parent / "r-answers.jsonl").read_text()
    realmodel.main(["lines", "kept", *flags])
    assert before == (out.read_text(), (out.parent / "r-answers.jsonl").read_text())
    assert "110" in capsys.readouterr().out


def test_the_table_has_every_recipe_and_the_picture_is_drawn(measured, tmp_path, capsys):
    out, _ = measured
    flags = [str(out), "--plot", f"{tmp_path}/p.png", "--at", "110"]
    assert seal.run("extras.realmodel_table", realmodel_table.main, flags) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in ("base", "--pull 0.02", "SEAL-L", "| 110", "perplexity"))
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("command, flags", [
    (realmodel, ["nothing", "--ckpt", str(seal.TOY)]),
    (realmodel, ["--ckpt", str(seal.TOY), "--recipes", "SEAL-X"]),
    (transfer, ["needles", "--ckpt", "no"]),
    (realmodel_table, ["no.json"]),
])
def test_a_mistake_is_one_line(command, flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert seal.run("extras", command.main, flags) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("extras: error: ")
