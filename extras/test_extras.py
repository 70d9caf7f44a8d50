"""Tests of heads, direct, selfextend, several, baselines, folder and plot of extras/."""

import copy
import json
import os
import random
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import seal
from extras import baselines, direct, folder, heads, plot, selfextend, several
from seal import UserError
from test_seal import MISTRAL, load, logits, make, make_scales, reference, sp_model  # noqa: F401

torch.set_num_threads(1)
CONFIG = seal.Config(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, context=256,
)


@pytest.fixture
def model() -> seal.Llama:
    """A small one with weights drawn at random."""
    torch.manual_seed(0)
    model = seal.Llama(CONFIG)
    model.reset_scales("head")
    return model


@pytest.fixture(scope="module")
def scales(tmp_path_factory) -> str:
    """A file of scales for the toy, after ten prompts that fill its context."""
    out = str(tmp_path_factory.mktemp("scales") / "scales.safetensors")
    seal.main(["train", "--samples", "10", "--lr", "0.03", "--out", out])
    return out


def some_tokens(count: int, seed=0) -> list[int]:
    return random.Random(seed).choices(range(64), k=count)


def opened(ckpt) -> tuple[seal.Llama, seal.Tokenizer]:
    return seal.open_checkpoint(seal.Flags(ckpt=str(ckpt)))[:2]


def some_pairs(tokenizer, count: int, length: int, split: str) -> list[tuple]:
    samples = seal.make_samples("lines", tokenizer, length, count, split)
    return [tokenizer.pair(sample) for sample in samples]


# ---- extras.heads --------------------------------------------------------------------


@pytest.mark.parametrize("channels", [None, [1, 2]])
def test_a_gain_is_what_pruning_loses_and_the_gradient_its_slope(model, channels):
    pairs = []
    for seed in range(3):
        pairs.append((some_tokens(20, seed), some_tokens(2, seed + 9)))
    sites = heads.find_sites(CONFIG, channels)
    mode = "channel" if channels else "head"
    model.reset_scales(mode)
    slopes = heads.gains_by_gradient(model, pairs, sites)
    pruned = dict(heads.gains_by_pruning(model, pairs, sites))
    for scale in model.scales():
        assert (scale == 1).all()  # what was pruned is put back
    loss, _ = heads.measure(model, pairs)
    for name in (min(sites), max(sites)):
        layer, i = sites[name]
        assert not channels or (layer == 1 and 16 <= i < 24)
        for size, gains in ((1, pruned), (1e-2, slopes)):
            model.reset_scales(mode)
            model.scales()[layer].data[i] -= size
            without, _ = heads.measure(model, pairs)
            lost = (without - loss) / size
            assert lost == pytest.approx(gains[name]["loss"], rel=0.1, abs=2e-4)


def test_quadrants_scale_the_heads_that_agree_at_both_lengths(model):
    sites = heads.find_sites(CONFIG, None)
    shorter, longer = torch.zeros(3, 4), torch.zeros(3, 4)
    shorter[0] = torch.tensor([-1, 1, -1, 0])
    longer[0] = torch.tensor([-2, 3, 1, -1])
    gains = shorter.flatten().tolist(), longer.flatten().tolist()
    variants = heads.quadrants(model.scales(), sites, gains, 0.5, 1.5)
    first_layers = []
    for scales in variants.values():
        first_layers.append(scales[0].tolist())
        assert torch.equal(torch.stack(scales[1:]), torch.ones(2, 4))
    assert first_layers == [
        [1, 1, 1, 1],
        [0.5, 1, 1, 1],
        [1, 1.5, 1, 1],
        [0.5, 1.5, 1, 1],
    ]


def test_interrupted_pruning_goes_on_as_if_nothing_had_happened(tmp_path, capsys, monkeypatch):
    sites = heads.find_sites(seal.read_config(seal.TOY), None)
    first_layer = {name: sites[name] for name in sites if name.startswith("L0")}
    monkeypatch.setattr(heads, "find_sites", lambda *args: first_layer)
    flags = ["--how", "both", "--lengths", "90,99", "--prompts", "1", "--json"]
    heads.main([*flags, f"{tmp_path}/whole.json"])
    out, measure, calls = capsys.readouterr().out, heads.measure, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 13:  # the second length's base and two sites are done
            raise KeyboardInterrupt
        return measure(*args)

    monkeypatch.setattr(heads, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        heads.main([*flags, f"{tmp_path}/part.json"])
    for _ in range(2):
        heads.main([*flags, f"{tmp_path}/part.json"])
    assert len(calls) == 13 + 1 + 6  # the base again, and the sites that were left
    whole = (tmp_path / "whole.json").read_bytes()
    assert (tmp_path / "part.json").read_bytes() == whole
    assert capsys.readouterr().out == 2 * out
    assert out.count("Spearman") == 2
    with pytest.raises(UserError, match="is of another run"):
        heads.main([*flags, f"{tmp_path}/part.json", "--seed", "1"])


def test_the_ends_of_the_gradients_ranking_are_looked_at_and_no_gradient_twice(
    capsys, monkeypatch
):
    calls, answer_loss = [], seal.answer_loss

    def counted(*args):
        calls.append(args)
        return answer_loss(*args)

    monkeypatch.setattr(seal, "answer_loss", counted)
    flags = ["--lengths", "90,99", "--prompts", "1"]
    heads.main(flags)
    all_heads = capsys.readouterr().out.splitlines()
    heads.main([*flags, "--top", "2"])
    ends = capsys.readouterr().out.splitlines()
    assert len(calls) == 2 + 2  # a prompt at each of two lengths
    assert len(ends) == 3 + 4
    for row in (3, 4):  # the most helpful on the left, the most harmful on the right
        assert ends[row].split() == all_heads[row].split()


def test_no_prompt_is_looked_at_that_the_scales_were_trained_on(tmp_path, monkeypatch):
    """Nor do quadrants evaluate on prompts that their gains were measured on."""
    task, file, found = (tmp_path / name for name in ("task.jsonl", "scales", "h.json"))
    with open(task, "w") as lines:
        for i in range(9):
            case = {"prompt": f"What is {i}?", "answer": f"It is {i}."}
            lines.write(json.dumps(case) + "\n")
    seal.main(f"train --task {task} --samples 3 --length 99 --out {file}".split())
    _, facts = seal.read_scales(file, seal.read_config(seal.TOY))
    trained, asked = facts.trained_on.split(","), []

    def ask(model, tokenizer, samples, *more):
        asked.extend(sample.fingerprint() for sample in samples)
        return [""] * len(samples)

    monkeypatch.setattr(seal, "ask", ask)
    flags = f"--task {task} --scales {file} --json {found} --lengths 90,99 --prompts 4"
    heads.main([*flags.split(), "--quadrants", "0.9,1.1"])
    seen = seal.read_json(found)["prompts"]["90"]
    assert seen == seal.read_json(found)["prompts"]["99"]
    assert (len(trained), len(seen)) == (3, 4)
    assert len({*trained, *seen, *asked}) == 9  # all that there are


def test_heads_and_channels_are_ranked_and_drawn(scales, tmp_path, capsys):
    heads.main(f"--scales {scales} --prompts 2 --plot {tmp_path}/a.png".split())
    out = capsys.readouterr().out
    names, helpful, harmful = set(), [], []
    for line in out.splitlines()[3:13]:
        good, _, gain, bad, _, loss = line.split()
        names |= {good, bad}
        helpful.append(float(gain))
        harmful.append(float(loss))
    assert len(names) == 20
    assert helpful == sorted(helpful, reverse=True) and harmful == sorted(harmful)
    assert helpful[0] > 0 > harmful[0]
    assert "418" in out and "464" in out and "learned scales and gains" in out
    heads.main(f"--channels 2.6 --prompts 1 --lengths 90,99 --plot {tmp_path}/b.png".split())
    assert capsys.readouterr().out.count("channel ") == 20
    assert {p.name for p in tmp_path.iterdir()} == {"a.png", "b.png"}


@pytest.mark.parametrize("flags, words", [
    ("--lengths 90", "--lengths"),
    ("--top 0", "--top 0"),
    ("--channels 4.0", "no layer 4 with a head 0"),
    ("--channels 4", "is not like 2.6"),
    ("--quadrants 0.9", "is not like 0.9,1.1"),
    ("--plot no/folder.png", "no/folder.png"),
    ("--json /", "/: "),
    ("--scales none.safetensors", "none.safetensors"),
])
def test_what_heads_cannot_do_is_said_before_the_work(flags, words, monkeypatch):
    monkeypatch.setattr(heads, "draw", None)  # would be called next
    with pytest.raises(UserError, match=words):
        heads.main(flags.split())


# ---- extras.direct -------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["head", "channel"])
def test_direct_effects_add_up_to_the_logits_without_the_final_norm(mode, model):
    """Heads, feed-forwards and the embedding are all that the stream is made of."""
    tokens, targets = some_tokens(25), [3, 40, 60]
    model.reset_scales(mode)
    for scale in model.scales():
        scale.data.uniform_(0.5, 1.5)
    model.scales()[1].data.view(4, -1)[2] = 0  # a pruned head says nothing
    effects = direct.direct_effects(model, tokens, targets)
    assert effects.shape == (3, 5, 3)
    silent = (effects == 0).nonzero().tolist()
    assert silent == [[1, 2, 0], [1, 2, 1], [1, 2, 2]]
    rows = model.lm_head.weight[targets]
    with torch.no_grad():
        stream = model(torch.tensor([tokens]))[0, -1]
        votes = effects.sum((0, 1)) + rows @ model.embed_tokens.weight[tokens[-1]]
        torch.testing.assert_close(votes, rows @ stream, rtol=1e-4, atol=1e-4)


def test_a_repaired_answer_is_found_and_its_votes_are_shown(scales, tmp_path, capsys):
    direct.main(f"--scales {scales} --plot {tmp_path}/a.png".split())
    said, *table = capsys.readouterr().out.splitlines()
    assert said.startswith("asked for 'The <REGISTER_CONTENT> in line ")
    assert len(table) == 2 + 3 + 5
    rows = []
    for line in table[2:5]:
        base, scaled, change = map(float, line.split()[-3:])
        assert scaled - base == pytest.approx(change, abs=0.02)
        rows.append((base, scaled, change))
    for right, wrong, difference in zip(*rows):
        assert right - wrong == pytest.approx(difference, abs=0.02)
    assert (tmp_path / "a.png").exists()
    with pytest.raises(UserError, match="--scales"):
        direct.main([])


# ---- extras.plot ---------------------------------------------------------------------


@pytest.fixture
def drawn(monkeypatch) -> list:
    """Figures, in the place of files."""
    figures = []
    monkeypatch.setattr(plot, "save", lambda figure, *rest, **more: figures.append(figure))
    return figures


def test_helpful_is_blue_in_every_picture(drawn):
    maps = [
        ("gains", torch.tensor([[0.2, -0.1]]), 0, ""),
        ("scales", torch.tensor([[1.1, 0.8]]), 1, ""),
    ]
    gains = [[0.1, -0.1], [0.2, -0.2]]
    plot.plot_gains("a.png", ["a", "b"], [90, 99], gains, "", maps)
    votes = torch.tensor([[1.0, -1.0]])
    plot.plot_votes("b.png", {"base": votes, "scaled": votes}, "'7'", "'8'")
    colours = []
    for ax in drawn[0].axes + drawn[1].axes:
        for shown in [*ax.images, *ax.collections[:1]]:
            if ax.get_title():  # the others are the bars of colours
                values = shown.get_array().flatten()
                colours.append(shown.cmap(shown.norm(values)))
    assert len(colours) == 5
    for helpful, harmful in colours:
        assert helpful[2] > helpful[0]  # more blue than red
        assert harmful[2] < harmful[0]


def test_shares_of_all_depths_are_drawn_with_wilsons_intervals(drawn):
    cells = [
        {"length": 100, "prompts": 10, "correct": 9},
        {"length": 100, "prompts": 10, "correct": 10},
        {"length": 200, "prompts": 10, "correct": 1},
    ]
    plot.plot_scores("a.png", {"base": cells})
    ax = drawn[0].axes[0]
    assert ax.lines[0].get_ydata() == pytest.approx([0.95, 0.1])
    edge = ax.collections[0].get_paths()[0].vertices[:, 1]
    for limit in (0.7639, 0.9911, 0.0179, 0.4042):  # of 19 in 20 and of 1 in 10
        assert limit == pytest.approx(edge[abs(edge - limit).argmin()], abs=1e-4)


# ---- extras.selfextend ---------------------------------------------------------------


def turned(x, position, freq):
    """x (d,) at a position: its channels i and i + d/2 are a complex number."""
    turn = torch.polar(torch.ones_like(freq), position * freq)
    pairs = torch.complex(*x.chunk(2)) * turn
    return torch.cat((pairs.real, pairs.imag))


def slow_self_extend(q, k, v, freq, group: int, window: int):
    """By the book, a query and a key at a time; q (H, T, d), k and v (G, T, d), unrotated."""
    outputs = torch.empty_like(q)
    for h in range(len(q)):
        g = h * len(k) // len(q)
        for i in range(q.shape[1]):
            scores = []
            for j in range(i + 1):
                at, key_at = i, j
                if i - j >= window:
                    at, key_at = i // group + window - window // group, j // group
                query = turned(q[h, i], at, freq)
                key = turned(k[g, j], key_at, freq)
                scores.append(query @ key / q.shape[2] ** 0.5)
            weights = torch.stack(scores).softmax(0)
            outputs[h, i] = weights @ v[g, : i + 1]
    return outputs


@pytest.mark.parametrize("group, window, G, linear", [
    (2, 5, 4, 1),
    (3, 10, 2, 1),
    (6, 1, 1, 1),
    (4, 13, 2, 2.5),
    (1, 7, 2, 1),
])
def test_self_extend_is_the_books(group, window, G, linear, monkeypatch):
    """Outputs and gradients, in uneven chunks of queries; groups of one change nothing."""
    monkeypatch.setattr(selfextend, "CHUNK", 9)
    monkeypatch.setattr(seal, "attend", seal.attend)
    config = CONFIG
    if linear > 1:
        config = replace(CONFIG, rope_scaling={"rope_type": "linear", "factor": linear})
    stretched = selfextend.extend(config, f"self:{group},{window}")
    assert stretched.context == (256 - window) * group + window
    freq = seal.rope_frequencies(config)[0].double()
    rng = torch.Generator().manual_seed(0)
    raw = []
    for count in (4, G, G):
        x = torch.randn(1, count, 23, 8, dtype=torch.float64, generator=rng)
        raw.append(x.requires_grad_())
    angles = torch.arange(23)[:, None] * freq
    rope = angles.cos(), angles.sin()
    q = seal.rotate(raw[0], rope)
    k = seal.rotate(raw[1], rope)
    _, mask = seal.arrange(0, 23, [1])
    found = seal.attend(q, k, raw[2], mask)[0]
    expected = slow_self_extend(*(x[0] for x in raw), freq, group, window)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)

    weight = torch.randn(found.shape, dtype=torch.float64, generator=rng)
    ours = torch.autograd.grad(found, raw, weight, retain_graph=True)
    theirs = torch.autograd.grad(expected, raw, weight)
    for gradient, slow in zip(ours, theirs):
        torch.testing.assert_close(gradient, slow, rtol=1e-4, atol=1e-5)
    newest = q[:, :, -1:]  # one token asks, as in generation
    last = seal.attend(newest, k, raw[2], mask)[0]
    torch.testing.assert_close(last, found[:, -1:])
    plain = selfextend.plain_attend(q, k, raw[2], mask)[0]
    assert torch.allclose(plain, found, atol=1e-6) == (group == 1)


@pytest.mark.parametrize("group, window", [(2, 5), (6, 1), (3, 40)])
def test_questions_of_a_record_are_to_self_extend_what_single_prompts_are(
    group, window, model, monkeypatch
):
    """Loss and gradient; branches are longer than some windows, and than a chunk."""
    monkeypatch.setattr(selfextend, "CHUNK", 9)
    monkeypatch.setattr(seal, "attend", seal.attend)
    selfextend.extend(CONFIG, f"self:{group},{window}")
    model.double()
    for layer in model.layers:
        layer.self_attn.q_proj.weight.data *= 9  # so that attention tells tokens apart
    shared, record = some_tokens(31), []
    for seed, (rest, said) in enumerate([(1, 2), (9, 5), (20, 12)], 1):
        prompt = shared + some_tokens(rest, seed)
        record.append((prompt, some_tokens(said, 9 + seed)))
    model.reset_scales("channel")
    loss = seal.answer_loss(model, record)
    losses = [seal.answer_loss(model, [pair]) for pair in record]
    expected = torch.stack(losses).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    ours = torch.autograd.grad(loss, model.scales())
    theirs = torch.autograd.grad(expected, model.scales())
    for slopes, slow in zip(ours, theirs):
        torch.testing.assert_close(slopes, slow, rtol=1e-4, atol=1e-7)


def test_self_extend_is_remembered_by_scales_and_known_to_no_other_program(
    tmp_path, capsys, monkeypatch
):
    for name in ("extend", "attend", "COMMANDS"):
        monkeypatch.setattr(seal, name, getattr(seal, name))
    file, toy = tmp_path / "scales.safetensors", seal.read_config(seal.TOY)
    train = "train --extend self:3,100 --length 600 --samples 1 --questions 2"
    for line in (
        f"{train} --out {file}",
        f"eval --scales {file} --lengths 600 --prompts 1 --max-new-tokens 9",
        f"generate --scales {file} --max-new-tokens 3 --prompt line",
        f"heads --scales {file} --lengths 150,600 --prompts 1",
    ):
        selfextend.main(line.split())
    assert seal.read_scales(file, toy)[1].extend == "self:3,100"
    assert "600" in capsys.readouterr().out

    model = seal.load_model(seal.TOY, selfextend.extend(toy, "self:3,100"))
    prompt = some_tokens(130)
    answer = seal.generate(model, prompt, 6)  # through the cache, token by token
    at_once = logits(model, prompt + answer)[129:-1]
    assert at_once.argmax(-1).tolist() == answer
    cache = model.new_cache(200)
    seal.generate(model, prompt[:120] + some_tokens(20), 3, cache=cache)
    assert seal.generate(model, prompt, 6, cache=cache, start=120) == answer
    monkeypatch.undo()
    with pytest.raises(UserError, match="--extend self:3,100: must be none, ntk:"):
        seal.main(f"fold --scales {file} --out {tmp_path}/folded".split())
    for spec in ("self:0,9", "self:2", "self:2,512", "self:2,0"):
        with pytest.raises(UserError, match="must be self:G,W"):
            selfextend.extend(toy, spec)


# ---- extras.several ------------------------------------------------------------------

RANKS = """
import json, os, sys

sys.path.insert(0, sys.argv[1])
import seal, torch
from extras import several

torch.set_num_threads(1)
rank, store, train, results = int(os.environ["RANK"]), several.join(), several.train, []
several.dist.destroy_process_group = lambda: None  # one meeting for all jobs
if rank:
    seal.whole_file = "only the first writes"

def watched(model, *args, **more):
    held = (getattr(p, "_local_tensor", p) for p in model.layers.parameters())
    results.append(sum(p.numel() for p in held))
    return train(model, *args, **more)

def broken(*args):
    calls.append(args)
    if len(calls) == 4 or rank and "broken" in line:
        raise MemoryError("no room")
    return answer_loss(*args)

several.train, answer_loss = watched, seal.answer_loss
for job, line in enumerate(json.loads(sys.argv[2])):
    several.join = lambda: several.dist.PrefixStore(str(job), store)
    calls, seal.answer_loss = [], answer_loss
    if "broken" in line or "stopped" in line and "resume" not in line:
        seal.answer_loss = broken
    try:
        results.append(seal.exit_status("extras.several", several.main, line.split()))
    except SystemExit as end:
        results.append(end.code)
with open(f"rank{rank}.json", "w") as file:
    json.dump(results, file)
"""
TRAIN = "--samples 5 --length 110 --questions 2 --epochs 2 --lr 0.05"
JOBS = [
    f"{TRAIN} --batch 4 --mode head --out head",
    f"{TRAIN} --batch 4 --mode channel --out whole",
    f"{TRAIN} --batch 0",
    f"{TRAIN} --shard --ckpt ranks.py",
    f"{TRAIN} --batch 4 --mode head --out stopped",
    f"{TRAIN} --batch 2 --mode head --out stopped --resume",
    f"{TRAIN} --batch 4 --mode head --out stopped --resume",
    f"{TRAIN} --batch 4 --mode channel --out channel --shard --offload",
    f"{TRAIN} --batch 4 --mode channel --out kept --shard --recompute never",
    f"{TRAIN} --batch 4 --mode head --out broken",
]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """The folder in which two processes have done the jobs, and what they said."""
    place = tmp_path_factory.mktemp("ranks")
    (place / "ranks.py").write_text(RANKS)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc-per-node", "2", "ranks.py", str(Path(seal.__file__).parent)]
    torchrun += [json.dumps(JOBS)]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        torchrun, cwd=place, env=one_thread, timeout=300, capture_output=True, text=True)
    assert (place / "rank0.json").exists(), done.stderr
    return place, done


def test_one_of_two_processes_writes_and_speaks_and_all_end_if_one_fails(ranks):
    place, done = ranks
    assert done.stdout.count("scales, loss") == 5, done.stderr
    errors = re.findall("extras.several: error: (.*)", done.stderr)
    assert errors == [
        "--batch 0: must be 1 or more",
        "--shard: ranks.py must be a folder (python -m extras.convert)",
        "no room",
        "--resume: the run began with --batch 4, not 2",
        "no room",
    ]
    first = (place / "rank0.json").read_text()
    assert first == (place / "rank1.json").read_text()
    held, statuses = [], []
    for number in json.loads(first):
        if number > 2:
            held.append(number)
        else:
            statuses.append(number)
    assert statuses == [0, 0, 2, 2, 2, 2, 0, 0, 0, 2]
    assert held[5] < 0.51 * held[1]  # of the channel's numbers; norms and scales are whole
    made = {path.name for path in place.iterdir()}
    assert made == {
        "ranks.py", "rank0.json", "rank1.json",
        "head", "whole", "stopped", "channel", "kept",
    }


def test_two_processes_learn_what_one_does_whole_or_sharded(ranks):
    """Batches of 4 and 1 records, twice over."""
    place, _ = ranks
    config = seal.read_config(seal.TOY)
    model, tokenizer = opened(seal.TOY)
    records = seal.make_records("lines", tokenizer, [110], 5, "train", questions=2)
    records = [list(map(tokenizer.pair, record)) for record in records]
    assert set(map(len, records)) == {2}
    for mode in seal.METHOD:
        model.reset_scales(mode)
        optimizer = torch.optim.AdamW(model.scales(), lr=0.05, weight_decay=0.0)
        for batch in [records[:4], records[4:]] * 2:
            for record in batch:
                loss = seal.answer_loss(model, record) / len(batch)
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        learned, facts = seal.read_scales(place / mode, config)
        assert facts.steps == 4
        for ours, expected in zip(learned, model.scales()):
            torch.testing.assert_close(ours, expected.detach(), rtol=0, atol=1e-4)
    for name, same in (("whole", "channel"), ("whole", "kept"), ("stopped", "head")):
        ours, _ = seal.read_scales(place / name, config)
        theirs, _ = seal.read_scales(place / same, config)
        assert all(map(torch.equal, ours, theirs))


def test_several_is_started_by_torchrun(capsys):
    assert seal.exit_status("extras.several", several.main, []) == 2
    assert "started by torchrun" in capsys.readouterr().err


# ---- extras.baselines ----------------------------------------------------------------


@pytest.mark.parametrize("method, size", [
    ("lora", 32_768),
    ("dora", 36_864),
])
def test_a_merged_folder_computes_what_the_adapters_do(method, size, tmp_path):
    """New adapters are the base model; merged ones are rounded once, to the files' type."""
    base, tokenizer = opened(seal.TOY)
    (pair,) = some_pairs(tokenizer, 1, 80, "eval")
    adapted = baselines.Adapted(seal.Flags(), base.norm.weight, method)
    assert sum(p.numel() for p in adapted.scales()) == size
    loss = seal.answer_loss(base, [pair])
    torch.testing.assert_close(seal.answer_loss(adapted, [pair]), loss, rtol=1e-5, atol=0)
    for p in adapted.scales():
        p.data += 0.3 * torch.randn(p.shape)
    moved = seal.answer_loss(adapted, [pair])
    assert abs(moved - loss) > 0.1 * loss

    source, wide, narrow = (tmp_path / name for name in ("source", "wide", "narrow"))
    shutil.copytree(seal.TOY, source)
    weights = load_file(seal.TOY / "model.safetensors")
    weights = {name: tensor.float() for name, tensor in weights.items()}
    save_file(weights, source / "model.safetensors")
    for ckpt, out in ((source, wide), (seal.TOY, narrow)):
        adapters = copy.deepcopy(adapted).adapters()
        out.mkdir()
        folder.write_folder(out, ckpt, baselines.merged_weights(ckpt, adapters), {})
    ours, _ = opened(wide)
    torch.testing.assert_close(seal.answer_loss(ours, [pair]), moved, rtol=1e-4, atol=0)
    exact = load_file(wide / "model.safetensors")
    rounded = load_file(narrow / "model.safetensors")
    assert exact.keys() == weights.keys()
    for name, weight in exact.items():
        assert torch.equal(rounded[name], weight.bfloat16())
        adapter = re.search(r"[qkvo]_proj", name)
        assert torch.equal(weight, weights[name]) == (not adapter)


def test_adapters_read_a_record_once_and_learn_from_it_what_single_prompts_teach():
    base, tokenizer = opened(seal.TOY)
    (samples,) = seal.make_records("lines", tokenizer, [200], 1, "train", questions=3)
    record = []
    for tokens, sample in zip((4, 9, 6), samples, strict=True):  # branches of unequal length
        prompt, answer = tokenizer.pair(sample)
        record.append((prompt, answer[:tokens]))
    adapted = baselines.Adapted(seal.Flags(), base.norm.weight, "lora")
    for p in adapted.scales():
        p.data += 0.1 * torch.randn(p.shape)
    loss = seal.answer_loss(adapted, record)
    expected = torch.stack([seal.answer_loss(adapted, [pair]) for pair in record]).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    ours = torch.autograd.grad(loss, adapted.scales())
    theirs = torch.autograd.grad(expected, adapted.scales())
    for slopes, slow in zip(ours, theirs):
        torch.testing.assert_close(slopes, slow, rtol=1e-3, atol=1e-5)


def test_baselines_train_into_a_folder_for_every_command(tmp_path, capsys, monkeypatch):
    """The folder has the files of its source; a user's mistake is met before training."""
    command = ["--method", "lora", "--length", "80", "--samples", "2", "--lr", "1e-3"]
    command += ["--out", f"{tmp_path}/merged"]
    baselines.main(command)
    assert "SEAL-L, 32,768 numbers merged" in capsys.readouterr().out
    made = sorted((tmp_path / "merged").iterdir())
    sources = sorted(seal.TOY.iterdir())
    for source, path in zip(sources, made, strict=True):
        assert path.name == source.name
        same = path.read_bytes() == source.read_bytes()
        assert same == (path.suffix != ".safetensors")
    model, tokenizer = opened(tmp_path / "merged")
    samples = seal.make_samples("lines", tokenizer, 80, 4, "eval")
    answers = seal.ask(model, tokenizer, samples)
    assert seal.judge(samples, answers)["correct"] >= 3

    monkeypatch.setattr(seal, "train", None)  # would be called
    for line in (
        f"--out {tmp_path}/merged",
        f"--out {tmp_path}/none/new",
        f"--out {tmp_path}/new --length 513",
        f"--out {tmp_path}/new --lr -1",
        f"--out {tmp_path}/new --epochs 0",
        "--method ia3",
    ):
        with pytest.raises(UserError):
            baselines.main(command + line.split())
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


# ---- extras.folder -------------------------------------------------------------------


def test_a_folder_gets_its_name_when_it_is_whole(tmp_path):
    for left in (tmp_path / ".a.part/x", tmp_path / ".b.part"):
        left.parent.mkdir(exist_ok=True)
        left.write_text("by a run that was killed")
    for name in ("a", "b"):
        with folder.new_folder(tmp_path / name) as unfinished:
            assert not list(unfinished.iterdir())
            assert not (tmp_path / name).exists()
            (unfinished / "file").write_text(name)
        assert (tmp_path / name / "file").read_text() == name
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}


def test_a_folder_that_is_not_finished_leaves_nothing_and_one_line(tmp_path):
    out = tmp_path / "out"
    for error in (OSError(28, "No space left on device"), KeyboardInterrupt()):
        with pytest.raises((UserError, KeyboardInterrupt)) as said:
            with folder.new_folder(out) as unfinished:
                (unfinished / "file").write_text("half")
                raise error
        assert not list(tmp_path.iterdir())
        if isinstance(error, OSError):
            assert str(said.value) == f"{out}: [Errno 28] No space left on device"


def test_no_folder_is_made_where_something_is_or_nothing_could_be(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nowhere")
    for place in ("", "file", "link", "none/out", "file/out"):
        with pytest.raises(UserError, match="give another name"):
            with folder.new_folder(tmp_path / place):
                raise AssertionError("the work began")
    assert {path.name for path in tmp_path.iterdir()} == {"file", "link"}


def test_changes_are_made_in_copies_of_the_sources_small_files(sp_model, tmp_path):
    source, out = make(tmp_path / "source", sp_model, shard_size="100KB"), tmp_path / "out"
    (source / "notes.md").write_text("not of the model")
    (source / "data.json").mkdir()
    part, turned_round = torch.arange(6.0)[2:5], torch.rand(2, 3).T  # as .bin files hold them
    weights = {"a": part, "b": turned_round}
    out.mkdir()
    folder.write_folder(out, source, weights, {
        "config.json": {"vocab_size": 5, "model_type": None},
        "generation_config.json": {"eos_token_id": 7},
    })
    before, after = (seal.read_json(path / "config.json") for path in (source, out))
    del before["model_type"]
    assert after == before | {"vocab_size": 5}
    assert seal.read_json(out / "generation_config.json")["eos_token_id"] == 7
    made = {path.name for path in out.iterdir()}
    assert made == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.model",
        "tokenizer_config.json",
    }
    stored = load_file(out / "model.safetensors")
    assert all(torch.equal(stored[name], weights[name]) for name in weights)


def test_a_window_that_reached_over_the_context_reaches_over_the_longer_one(
    sp_model, tmp_path
):
    source, scales, out = (tmp_path / name for name in ("source", "scales", "out"))
    make(source, sp_model, model=MISTRAL, sliding_window=256, max_position_embeddings=256)
    make_scales(scales, seal.read_config(source), "head", "ntk:2")
    seal.main(f"fold --ckpt {source} --scales {scales} --out {out}".split())
    assert reference(out).config.sliding_window == 512
    tokens = some_tokens(400)
    ours, theirs = logits(load(out), tokens), logits(reference(out), tokens)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
