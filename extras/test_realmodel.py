"""Tests of the real model's measurements, on the toy: in seal.py and in llama.cpp."""

import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch

import export_gguf
import seal
from extras import llamacpp, realmodel, realmodel_table, transfer
from test_seal import change_json, make_scales, open_tokenizer

torch.set_num_threads(1)

# ---- realmodel, realmodel_table, transfer --------------------------------------------

ASKED = {"lines", "format", "needles", "meeting"}  # parts whose answers are kept
OWN = "--mode channel --pull 0.02 --samples 3"  # a recipe that is its own name


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """What is measured of the toy, trained briefly: the file, and the flags that made it."""
    folder = tmp_path_factory.mktemp("measured")
    shutil.copytree(seal.TOY, folder / "toy")
    # Two examples and a question are longer than its context.
    change_json(folder / "toy" / "config.json", max_position_embeddings=1024)
    flags = ["--ckpt", f"{folder}/toy", "--out", f"{folder}/r.json", "--prompts", "2"]
    parts = [*flags, "--train-length", "110", "--lengths", "110,140"]
    parts += ["--recipes", f"{OWN};SEAL-L", "--questions", "5", "--windows", "2"]
    other = ["--lengths", "400", "--train-length", "400", "--prompts", "5"]
    with pytest.MonkeyPatch.context() as patch:
        for name in "SEAL-C", "SEAL-L":
            recipe = realmodel.RECIPES[name]
            patch.setitem(realmodel.RECIPES, name, f"{recipe} --samples 3")
        realmodel.main(parts)
        transfer.main(["needles", "meeting", "--recipe", "SEAL-C", *flags, *other])
    return folder / "r.json", parts


def cells_of(out) -> dict[str, dict]:
    return json.loads(out.read_text())["cells"]


def test_every_part_leaves_its_cells_and_every_answer_is_kept(measured):
    out, _ = measured
    parts, answers = set(), 0
    for name, cell in cells_of(out).items():
        part = name.split(" / ")[0]
        parts.add(part)
        if part in ASKED:
            answers += cell["prompts"]
        if "low" in cell:
            assert cell["low"] <= cell["share"] <= cell["high"]
    assert parts == ASKED | {"first sentences", "perplexity", "same"}
    assert len((out.parent / "r-answers.jsonl").read_text().splitlines()) == answers


def test_a_cell_is_what_seal_says_of_the_same_prompts(measured):
    out, _ = measured
    scales = str(out.with_name("mode-channel-pull-0-02-samples-3.safetensors"))
    asked = seal.Flags(ckpt=f"{out.parent}/toy", scales=scales, prompts=2, compare=True)
    asked.lengths, asked.max_new_tokens = [110, 140], realmodel.ANSWER
    results = seal.measure(asked)
    for recipe, method in ("base", "base"), (OWN, "SEAL-C"):
        for cell in results[method]:
            found = cells_of(out)[f"lines / {recipe} / {cell['length']}"]
            for key in "prompts", "correct", "score":
                assert found[key] == cell[key]


def test_a_meeting_is_answered_by_the_one_who_has_been_there():
    bench = SimpleNamespace(args=SimpleNamespace(seed=0), tokenizer=open_tokenizer(seal.TOY))
    sentences = ["A kid sleeps here. "] * 999
    for i in range(3):
        (sample,) = transfer.meeting(bench, sentences, i, 300, named=True)
        others = [person for person in transfer.PEOPLE if person != sample.answer]
        assert sample.score(f"It was {sample.answer}, in 1999.") == 1
        assert sample.score(f"It was {others[0]}.") == 0


def test_what_is_finished_is_not_done_again(measured, capsys, monkeypatch):
    out, flags = measured
    monkeypatch.setattr(seal, "train", None)
    for scales in out.parent.glob("*.safetensors"):
        scales.rename(scales.with_suffix(".away"))  # nor missed
    answers = out.parent / "r-answers.jsonl"
    before = out.read_text(), answers.read_text()
    realmodel.main(["lines", "kept", *flags])
    assert before == (out.read_text(), answers.read_text())
    assert "110" in capsys.readouterr().out
    for scales in out.parent.glob("*.away"):
        scales.rename(scales.with_suffix(".safetensors"))


def test_the_table_has_every_recipe_and_the_picture_is_drawn(measured, tmp_path, capsys):
    out, _ = measured
    flags = [str(out), "--plot", f"{tmp_path}/p.png", "--at", "110"]
    assert seal.exit_status("extras.realmodel_table", realmodel_table.main, flags) == 0
    said = capsys.readouterr().out
    for name in "base", "--pull 0.02", "SEAL-L", "| 110", "perplexity":
        assert name in said
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("command, flags", [
    (realmodel, ["nothing", "--ckpt", str(seal.TOY)]),
    (realmodel, ["--ckpt", str(seal.TOY), "--recipes", "SEAL-X"]),
    (realmodel, ["--ckpt", str(seal.TOY), "--windows", "0"]),
    (realmodel, ["--ckpt", str(seal.TOY), "--lengths", "110,0"]),
    (transfer, ["needles", "--ckpt", "no"]),
    (realmodel_table, ["no.json"]),
])
def test_a_mistake_is_one_line(command, flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert seal.exit_status("extras", command.main, flags) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("extras: error: ")


# ---- llamacpp ------------------------------------------------------------------------


def in_llama_cpp(file, *flags) -> dict:
    """What extras.llamacpp writes: facts of the file, and the settings beside them."""
    pytest.importorskip("xllamacpp")
    out = file.with_suffix(".json")
    llamacpp.main([str(file), "--threads", "1", "--json", str(out), *flags])
    report = seal.read_json(out)
    return report | report["files"][str(file)]


def test_llama_cpp_says_what_seal_says(tmp_path):
    file, scales = tmp_path / "a.gguf", tmp_path / "scales.safetensors"
    model = seal.load_model(seal.TOY, seal.read_config(seal.TOY))
    model.set_scales(make_scales(scales, model.config, "head", template="none"))
    export_gguf.main(f"--scales {scales} --outtype f32 --outfile {file}".split())
    flags = "--lengths 130,160 --prompts 2 --max-new-tokens 16 --chat --n-ubatch 32"
    found, said, tokenizer = in_llama_cpp(file, *flags.split()), [], open_tokenizer(seal.TOY)
    for length in 130, 160:
        samples = seal.make_samples("lines", tokenizer, length, 2, "eval")
        said += seal.ask(model, tokenizer, samples, 16)
    assert len(said) == len(found["answers"])
    for answer, expected in zip(found["answers"], said):
        assert answer["said"].strip() == expected.strip()
    assert found["chat the same"] == "4 of 4" and found["n_ubatch"] == 32
    assert found["bytes"] == file.stat().st_size
    assert [cell["prompts"] for cell in found["cells"]] == [2, 2]


LLAMA_2 = """{% for m in messages %}{% if m.role == 'user' %}
{{- bos_token + '[INST] ' + m.content + ' [/INST]' }}{% else %}
{{- ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"""
LLAMA_3 = """{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}
{%- endif %}Today: {{ date_string }}. {% for m in messages %}{{ m.content }}{% endfor %}"""
DEEPSEEK = """{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}
{{- '<|User|>' + m.content }}{% else %}{% set content = m.content %}
{%- if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}
{{- '<|Assistant|>' + content + eos_token }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|Assistant|><think>\\n' }}{% endif %}"""


@pytest.fixture
def chat(tmp_path):
    """chat(template, task's line): how many answers the chat endpoint gives as well."""

    def call(template: str, **line) -> str:
        folder, file = tmp_path / "toy", tmp_path / "toy.gguf"
        shutil.copytree(seal.TOY, folder)
        (folder / "chat_template.jinja").write_text(template)
        task = tmp_path / "task.jsonl"
        task.write_text(json.dumps(line))
        flags = ["--ckpt", str(folder), "--outfile", str(file), "--outtype", "f32"]
        export_gguf.main([*flags, "--scales", "none"])
        asked = ["--ckpt", str(folder), "--task", str(task), "--max-new-tokens", "8"]
        return in_llama_cpp(file, *asked, "--chat")["chat the same"]

    return call


@pytest.mark.parametrize(
    "template", [LLAMA_2, LLAMA_3, DEEPSEEK], ids=["bos", "date", "think"]
)
def test_a_template_with_bos_or_a_date_or_an_open_think_is_the_same_in_llama_cpp(chat, template):
    assert chat(template, prompt="line a-b is <7>. Which?", answer="7") == "1 of 1"


def test_a_begun_answer_that_llama_cpp_renders_otherwise_is_not_counted_as_the_same(chat):
    line = {"prompt": "line a-b is <7>. Which?", "answer": "7", "prefix": "It is"}
    assert chat(LLAMA_2, **line) == "0 of 1"


@pytest.mark.parametrize(
    "file, wrong", [("damaged", "cannot open"), ("none", "not a file"), ("", "install")]
)
def test_what_llama_cpp_cannot_run_is_one_line(file, wrong, tmp_path, capsys, monkeypatch):
    pytest.importorskip("xllamacpp")
    (tmp_path / "damaged").write_bytes(b"GGUF\x03\0\0\0")
    if not file:
        monkeypatch.setitem(sys.modules, "xllamacpp", None)
    flags = [str(tmp_path / file), "--lengths", "150", "--prompts", "1"]
    assert seal.exit_status("extras.llamacpp", llamacpp.main, flags) == 2
    assert wrong in capsys.readouterr().err.splitlines()[-1]


def test_the_server_reads_prompts_in_pieces_of_the_size_asked_for(monkeypatch):
    xllamacpp, seen = pytest.importorskip("xllamacpp"), []
    monkeypatch.setattr(xllamacpp, "Server", seen.append)
    for size in 64, 1024:
        with pytest.raises(AttributeError):  # what was started is no server
            llamacpp.Server(seal.TOY / "config.json", context=512, n_ubatch=size)
        assert seen[-1].n_ubatch == size <= seen[-1].n_batch
