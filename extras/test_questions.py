"""Tests of extras.questions: what a record that is asked many questions saves."""

import math
from concurrent.futures import Future
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

import seal
from extras import pieces, questions, shapes, speed, sweep

torch.set_num_threads(1)
TINY = f"--ckpt {seal.TOY} --json figures.json --paper 3x1 --paper-length 90".split()
AS_PAPER = "--mode channel --length 90 --samples 3 --lr 2e-2"


@contextmanager
def this_process(threads):
    """In fresh processes, as the sides run, imports take most of the time."""
    def submit(function, *inputs):
        future = Future()
        future.set_result(function(*inputs))
        return future

    yield SimpleNamespace(submit=submit)


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(questions, "Process", this_process)
    small = {"ROUNDS": 2, "RECORDS": 1, "NEW": 3, "SHAPE": "toy", "LENGTH": 3000}
    small["PLANS"] = (50, 1), (13, 4)
    for name, value in small.items():
        monkeypatch.setattr(questions, name, value)


def figures(*flags) -> dict:
    """What the command stores."""
    questions.main([*TINY, *flags])
    return seal.read_json("figures.json")


def test_all_sides_learn_the_same_from_the_same_prompts(capsys):
    found = figures("train", "--recipe", AS_PAPER)["train"]["figures"]
    ours, *others = found.values()
    assert len(others) == 2 and "processor s" in capsys.readouterr().out
    for side in others:
        for a, b in zip(ours["turns"], side["turns"], strict=True):
            assert a["last loss"] == pytest.approx(b["last loss"], rel=1e-4)
        assert side["steps"] == 3
        assert side["s"] == sum(turn["s"] for turn in side["turns"])
        assert side["seal.py's s, of these"] == ours["s"] / side["s"]


def test_nothing_is_timed_where_the_sides_do_not_agree(monkeypatch):
    monkeypatch.setattr(seal, "rotate", lambda x, rope: x)
    with pytest.raises(seal.UserError, match="did not do the same work"):
        figures("train", "--recipe", AS_PAPER)


def test_turns_train_as_the_command_does():
    recipe = "--mode head --length 90,120 --samples 3 --questions 2 --lr .05 --pull .1"
    recipe += " --epochs 2 --recompute never --offload"
    args = SimpleNamespace(ckpt=str(seal.TOY), dtype="float32", seed=4, recipe=recipe)
    side = questions.Seal(args)
    side.step([5, 6], [7])
    for until in 1, 4, 6:
        side.train(until)
    seal.main(["train", "--seed", "4", *recipe.split()])
    assert len(side.saved["losses"]) == len(side.work) == 6
    scales, facts = seal.read_scales("scales.safetensors", side.model.config)
    assert facts.steps == 6
    for ours, theirs in zip(side.model.scales(), scales, strict=True):
        assert torch.equal(ours.data, theirs) and not torch.equal(theirs, torch.ones(8))


def test_a_record_in_a_row_is_answered_as_question_by_question():
    flags = ["ask", "--length", "120", "--questions", "3"]
    alone, in_a_row = figures(*flags)["ask"]["figures"].values()
    assert alone["questions"] == alone["texts as in a row"] == questions.ALONE
    assert in_a_row["questions"] == 3
    rate = in_a_row["questions"] / in_a_row["s"] * alone["s"] / alone["questions"]
    assert in_a_row["times alone's, by s"] == pytest.approx(rate)


def test_what_is_there_is_not_done_again_unless_it_is_named(monkeypatch, capsys):
    done = []
    for part in questions.PARTS:
        def measure(args, part=part):
            done.append(part)
            if done == ["train", "ask", "count"]:
                raise seal.UserError("interrupted")
            return {"a side": {f"row of {part}": len(done)}}

        monkeypatch.setitem(questions.PARTS, part, measure)
    with pytest.raises(seal.UserError, match="interrupted"):
        figures()
    assert list(seal.read_json("figures.json")) == ["train", "ask"]
    assert list(figures()) == ["train", "ask", "count"]
    assert done == ["train", "ask", "count", "count"]
    again = figures("ask")["ask"]
    assert again["figures"] == {"a side": {"row of ask": 5}}
    assert again["flags"]["paper"] == "3x1"
    capsys.readouterr()
    figures()
    assert len(done) == 5 and "row of count" in capsys.readouterr().out


def test_more_questions_need_fewer_operations_and_hardly_more_memory():
    found = figures("count")["count"]["figures"]
    assert list(found) == ["50 x 1", "13 x 4"]
    one, four = found.values()
    assert 0.25 < four["of 50 x 1"] < 0.3
    assert four["of 50 x 1"] == four["operations"] / one["operations"]
    assert one["questions"] == 50 and four["questions"] == 52
    layer = 2 * (4 * 256 * 1024 + 3 * 256 * 512)  # bytes, with heads of 128
    for plan in one, four:
        assert 4 * layer / 2**30 < plan["GB with --offload"] < plan["GB at the peak of a step"]
    assert four["GB at the peak of a step"] < 1.2 * one["GB at the peak of a step"]


@pytest.mark.parametrize("room", [math.inf, 0])
def test_operations_are_the_products_of_a_step(room):
    """By hand for two layers: nothing goes back below the first one's o_proj, and what is
    computed again ends with the feed-forward's gate and up."""
    D, hidden, H, d, V = 64, 96, 4, 16, 50
    config = seal.Config(
        vocab_size=V, hidden_size=D, intermediate_size=hidden, num_hidden_layers=2,
        num_attention_heads=H, num_key_value_heads=2, head_dim=d, context=512)
    record = [([1] * 90 + [2, 3], [7, 8, 9]), ([1] * 90 + [4], [7, 8, 9, 6])]
    P, R, answers = 90, 4 + 4, 3 + 4
    with torch.device("meta"):
        model = seal.Llama(config)
    model.room = room
    before = 2 * (P + R) * D * (H + 2 * 2) * d
    attention = 2 * (P * P + 2 * R * (P + R)) * H * d  # half a square, and a rectangle
    down = 2 * (P + R) * D * hidden
    after = 2 * (P + R) * D * H * d + 3 * down
    expected = before + attention + 2 * after  # the first layer
    expected += 2 * before + 3 * attention + 2 * after
    expected += 2 * 2 * answers * D * V
    if room == 0:
        expected += 2 * (before + attention + after - down)
    assert questions.operations(model, record) == expected


def test_one_question_costs_what_speed_counts():
    """It halves all of attention, so the few tokens of the answer make a difference."""
    sizes = dict(zip(shapes.NAMES, shapes.SHAPES["toy"]))
    config = seal.Config(**sizes, head_dim=32)
    with torch.device("meta"):
        model = seal.Llama(config)
    model.room = math.inf
    prompt = [1] * (2000 - speed.ANSWER + 1)
    ours = questions.operations(model, [(prompt, [0] * speed.ANSWER)])
    total, _ = speed.operations(config, 2000)
    assert ours == pytest.approx(total, rel=0.02) and ours > total


@pytest.mark.parametrize(
    "flags, reason",
    [
        ("train --paper 3", "--paper"),
        ("ask --questions 0", "1 or more"),
        ("table", "parts are"),
        ("train --recipe=--mode=chanel", "chanel"),
        ("train --recipe=--samples=0", "--recipe"),
        ("train --recipe=--mode=\"", "--recipe"),
    ],
)
def test_a_users_mistake_is_one_line(flags, reason):
    with pytest.raises(seal.UserError, match=reason) as error:
        figures(*flags.split())
    assert "\n" not in str(error.value)


def test_only_the_count_does_without_a_checkpoint(monkeypatch):
    monkeypatch.setitem(questions.PARTS, "count", lambda args: {"a": {"b": 1}})
    with pytest.raises(seal.UserError, match="--ckpt"):
        questions.main(["ask", "count"])
    questions.main(["count"])
    assert list(seal.read_json("questions.json")) == ["count"]


def test_the_feed_forward_in_pieces_learns_the_same_in_less_memory(monkeypatch):
    torch.manual_seed(0)
    model = seal.Llama(seal.Config(600, 64, 4096, 2, 4, 4, 16, context=600))
    record = [(list(range(500)), [1, 2, 3])]
    monkeypatch.setattr(pieces, "PIECE", 64)
    model.reset_scales("channel")
    seal.backward(model, record)
    expected = [scale.grad for scale in model.scales()]
    needed = questions.peak(model, record)
    monkeypatch.setattr(seal.FeedForward, "forward", pieces.forward)
    assert questions.peak(model, record) < 0.6 * needed
    for scale, slope in zip(model.scales(), expected, strict=True):
        torch.testing.assert_close(scale.grad, slope)


def test_a_sweep_counts_the_answers_that_generation_finds(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = f"--ckpt {seal.TOY} --lengths 100,150 --records 2 --windows 1 --json sweep.json"
    sweep.main([*flags.split(), "--recipes", "--length 90 --samples 2 --questions 2"])
    base, trained = seal.read_json("sweep.json")["results"]
    model = seal.load_model(seal.TOY, seal.read_config(seal.TOY))
    tokenizer = seal.Tokenizer(seal.TOY, model.config)
    for length in 100, 150:
        samples = seal.make_samples(
            "lines", tokenizer, length, 2, "eval", 1000, questions=8)
        right = 0
        for sample, said in zip(samples, seal.ask(model, tokenizer, samples, 40)):
            right += said.strip() == sample.answer
        assert base[str(length)] == right / len(samples)
    assert trained["of the base's perplexity"] != 1 and trained["seconds"] > 0
    assert "--samples 2" in capsys.readouterr().out
