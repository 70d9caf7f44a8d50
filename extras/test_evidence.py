"""Tests of what the evidence is made with: the toy, and speed beside peft."""

import random
import re

import pytest
import torch
from safetensors.torch import load_file

import seal
from extras import shapes, speed, speed_export, toy, toy_tables, toy_words
from test_seal import open_tokenizer

torch.set_num_threads(1)

# ---- toy: how it was made, and its tables --------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> seal.Tokenizer:
    return open_tokenizer(seal.TOY)


@pytest.fixture(scope="module")
def lessons(tokenizer) -> toy_words.Lessons:
    return toy_words.Lessons(tokenizer)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A toy's folder, after two steps of each stage."""
    folder = tmp_path_factory.mktemp("made") / "toy"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy, "STAGES", [(name, 2, 300, 1e-3, 1e-3) for name, *_ in toy.STAGES])
        toy.main(["make", "--out", str(folder)])
    return folder


def test_the_bundled_tokenizer_is_what_the_recipe_makes(made):
    name = "tokenizer.model"
    assert (made / name).read_bytes() == (seal.TOY / name).read_bytes()


def test_a_toy_made_in_a_few_steps_is_a_folder_as_the_bundled_one(made):
    for file in seal.TOY.iterdir():
        assert (made / file.name).exists()
        if file.suffix == ".json":
            assert seal.read_json(made / file.name) == seal.read_json(file)
    assert len(list(made.iterdir())) == len(list(seal.TOY.iterdir()))
    ours = load_file(made / "model.safetensors")
    bundled = load_file(seal.TOY / "model.safetensors")
    assert ours.keys() == bundled.keys()
    for name, tensor in bundled.items():
        assert (ours[name].shape, ours[name].dtype) == (tensor.shape, tensor.dtype)


def test_the_drift_moves_the_o_proj_matrices_alone(lessons):
    model, moved = toy.new_model(seed=0), set()
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    toy.pretrain(model, lessons, [("drift", 2, 300, 2e-3, 2e-3)], seed=0)
    for name, weight in model.named_parameters():
        if not torch.equal(weight, before[name]):
            moved.add(name)
    assert moved == {f"layers.{i}.self_attn.o_proj.weight" for i in range(4)}


def key_and_number(answer: str) -> list[str]:
    """What "The <REGISTER_CONTENT> in line KEY is NUMBER." says."""
    return re.fullmatch(r"The <REGISTER_CONTENT> in line (.*) is (\d+)\.", answer).groups()


def test_lessons_ask_for_what_they_told(lessons, tokenizer):
    decode, rng = tokenizer.decode, random.Random(0)
    for _ in range(5):
        (prompt, _), (answer, learn), *more = lessons.record(rng, 9)
        key, number = key_and_number(decode(answer))
        assert f"line {key}: REGISTER_CONTENT is <{number}>" in decode(prompt)
        assert learn
        assert answer[-1] == tokenizer.end_token
        assert len(more) == 10
    for stage, *_ in toy.STAGES:
        ids, learn = lessons.tensors(lessons.batch(stage, rng, 0.9), 600)
        assert ids.shape == learn.shape
        assert ids.numel() >= 600
        assert (ids[:, 0] == 1).all()
        assert 0 < learn.sum() < learn.numel() / 2 + ids.shape[1]


def test_the_drift_asks_for_a_line_that_is_missing_and_teaches_the_last(lessons, tokenizer):
    decode, rng = tokenizer.decode, random.Random(0)
    for _ in range(5):
        (prompt, _), (answer, _) = lessons.missing(rng, 9)
        key, number = key_and_number(decode(answer))
        told = decode(prompt)
        assert f"line {key}:" not in told
        assert f"in line {key}?" in told
        assert f"is <{number}>\n\nNow the record is over." in told


def test_tables_tell_what_a_wrong_answer_says():
    record = "line a: <12>\nline b: <7>\nline c: <30>\n"
    sample = seal.Sample(record, "", expected=7)
    for said, kind in {
        "is 7.": "right",
        "is 30.": "the last line's",
        "is 12.": "another line's",
        "is 5.": "no line's",
        "?": "no line's",
    }.items():
        assert toy_tables.kind(sample, said) == kind


def test_tables_train_each_method_once(tmp_path, monkeypatch):
    short = {"length": [80], "samples": 2}  # two prompts of one line
    for method in toy_tables.NAMES:
        asked = toy_tables.trained(method, tmp_path, **short)
        with monkeypatch.context() as patch:
            patch.setattr(seal, "train", None)  # would fail if it were trained again
            assert toy_tables.trained(method, tmp_path, **short) == asked
        (cell,) = toy_tables.cells(asked, lengths=[80], prompts=1)
        assert cell["prompts"] == 1


def test_beyond_the_context_the_same_prompts_are_asked_as_within_and_longer_ones():
    asked = seal.Flags(prompts=3, max_new_tokens=24)
    within = toy_tables.cells(asked, lengths=[80])
    found = toy_tables.cells_anywhere(asked, [80, 600])
    assert found[0] == within[0]
    assert within[0]["correct"] > 0
    assert found[1]["length"] == 600
    assert found[1]["prompts"] == 3
    with pytest.raises(seal.UserError):
        toy_tables.cells(asked, lengths=[600])


def test_a_table_leaves_the_figures_of_others(tmp_path, monkeypatch):
    monkeypatch.setattr(toy_tables, "FIGURES", tmp_path / "toy.json")
    tables = {"one": lambda _: {"a": 1}, "two": lambda _: {"b": 2}}
    monkeypatch.setattr(toy_tables, "TABLES", tables)
    toy_tables.measure(["one"])
    toy_tables.measure(["two"])
    assert seal.read_json(tmp_path / "toy.json") == {"one": {"a": 1}, "two": {"b": 2}}


# ---- speed, speed_export -------------------------------------------------------------


def run_speed(out, *flags) -> dict:
    """The last record that extras.speed wrote to `out`."""
    shortest = ["--lengths", "60", "--steps", "1", "--json", str(out)]
    speed.main([*shortest, *flags])
    return seal.read_json(out)["records"][-1]


TOY = ["--ckpt", str(seal.TOY)]


@pytest.mark.parametrize(
    "what, row", [("train", "seconds a step"), ("answer", "seconds a token")]
)
def test_both_sides_do_the_same_work_and_are_told_apart_if_not(
    what, row, tmp_path, capsys, monkeypatch
):
    """In this process: in fresh ones, as they run, imports take most of the time."""
    monkeypatch.setattr(speed, "in_a_fresh_process", lambda work, *inputs: work(*inputs))
    out, flags = tmp_path / "speed.json", ["--what", what, "--offload"]
    for model, pairs in (["--shape", "toy"], 1), (TOY, 2):
        record = run_speed(out, *flags, *model, "--pairs", str(pairs))
        assert row in capsys.readouterr().out
        for side in "seal", "peft":
            assert len(record["runs"][side]) == pairs
            assert record["median"][side][row] > 0
    assert len(seal.read_json(out)["records"]) == 2
    monkeypatch.setattr(seal, "rotate", lambda x, rope: x)
    with pytest.raises(seal.UserError, match="did not do the same work"):
        run_speed(out, *flags, *TOY, "--pairs", "1")


def test_a_side_that_does_not_fit_leaves_the_others_figures(tmp_path, capsys, monkeypatch):
    def run(work, side, *inputs):
        if side == "peft":
            raise torch.OutOfMemoryError("2 GB\nmore")
        return work(side, *inputs)

    monkeypatch.setattr(speed, "in_a_fresh_process", run)
    out, flags = tmp_path / "speed.json", [*TOY, "--pairs", "1"]
    record = run_speed(out, *flags)
    assert record["runs"]["peft"] == [{"error": "OutOfMemoryError: 2 GB more"}]
    assert record["median"]["seal"]["seconds a step"] > 0
    assert not record["median"]["peft"]
    assert "seconds a step" in capsys.readouterr().out
    with pytest.raises(seal.UserError, match="neither side"):
        run_speed(out, *flags, "--device", "no-such-device")
    with pytest.raises(seal.UserError, match="--steps"):
        run_speed(out, *flags, "--steps", "0")


def test_operations_are_the_products_that_a_step_needs_and_no_more():
    """By hand for one layer: forward all; back, the output matrix and the feed-forward to
    their inputs, o_proj to the scale, and nothing below it."""
    T, D, hidden, H, d, V = 100, 64, 96, 4, 16, 50
    config = seal.Config(
        vocab_size=V, hidden_size=D, intermediate_size=hidden, num_hidden_layers=1,
        num_attention_heads=H, num_key_value_heads=2, head_dim=d, context=512)
    before = 2 * T * D * (H + 2 * 2) * d
    after = 2 * T * (D * H * d + 3 * D * hidden)
    attention = 2 * ((T - 1) ** 2 + T) * H * d  # half of a square, and of the last row
    output = 2 * speed.ANSWER * D * V
    total, share = speed.operations(config, T)
    assert total == before + attention + 2 * after + 2 * output
    assert share == attention / total


def test_a_random_checkpoint_is_exported_and_copied_side_by_side(tmp_path, capfd):
    shapes.main(["toy", "--out", f"{tmp_path}/toy"])
    speed_export.main(f"--ckpt {tmp_path}/toy --outtypes f16 --repeats 1".split())
    head, _, row = capfd.readouterr().out.splitlines()[1:]
    kind, export, processor, peak, *_ = row.split()
    assert head.split()[0] == "type" and kind == "f16"
    assert 0 < float(processor) and 0 < float(peak) < 2
