"""Tests of seal.py, also worked examples. The references: transformers, and plain loops."""

import ast
import graphlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # also for the processes that tests start

import pytest
import sentencepiece
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file

import seal
from seal import Sample

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
ROOT = Path(seal.__file__).parent

# ---- Small checkpoints ---------------------------------------------------------------

TEXT = []
for i in range(90):
    a, b = [("torpid", "kid"), ("ripe", "otter"), ("slow", "river")][i % 3]
    TEXT += [
        f"line {a}-{b}: REGISTER_CONTENT is <{i * 7919 % 50000}>, the {b} said to a {a} friend.\n",
        f"It's {i} o'clock,  ça va? ÉCOLE déjà-vu\tOK! 日本語の中文 привет МИР def f(x):\n"
        f"    return x[{i}]",
    ]
TEXT += [seal.RECORD] * 3
TEXT += [seal.NEEDLE.format(*needle) for needle in seal.TRAINING_NEEDLES]
TEXT += [f"{a}-{b}" for a, b in zip(seal.ADJECTIVES, seal.NOUNS)]


@pytest.fixture(scope="session")
def sp_model(tmp_path_factory) -> Path:
    """A tokenizer.model of 600 pieces with Llama's settings, [INST] as a control symbol."""
    prefix = tmp_path_factory.mktemp("sp") / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT), model_prefix=str(prefix), vocab_size=600,
        model_type="bpe", byte_fallback=True, split_digits=True, minloglevel=2,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True, control_symbols=["[INST]", "[/INST]"],
    )
    return prefix.with_suffix(".model")


def byte_level(folder: Path, name: str) -> None:
    """A tokenizer.json of 341 tokens that cuts text as the one that llama.cpp calls `name`."""
    known = seal.read_json(seal.ASSETS / "pre_tokenizers.json")
    model = tokenizers.models.BPE(ignore_merges=name in ("llama-bpe", "tekken"))
    raw = json.loads(tokenizers.Tokenizer(model).to_str())
    raw["pre_tokenizer"] = known[name]
    raw["normalizer"] = {"type": "NFC"} if name == "qwen2" else None
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(raw))
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=340, special_tokens=["<s>", "<|im_end|>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.add_tokens([tokenizers.AddedToken("<n7>", normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    hints = {"tokenizer_class": "PreTrainedTokenizerFast"}
    hints |= {"bos_token": "<s>", "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(hints))


def make(
    folder: Path, tokenizer: Path | str, model=transformers.LlamaForCausalLM, seed=0,
    dtype=torch.float32, hints=None, shard_size="5GB", **config,
) -> Path:
    """A random checkpoint as transformers writes it; tokenizer: a file, or byte_level's name."""
    torch.manual_seed(seed)
    small = dict(
        vocab_size=608, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        initializer_range=0.2,
    )
    network = model(model.config_class(**(small | config))).eval()
    for p in network.parameters():
        if p.ndim == 1:  # biases and norms start at 0 and 1, where a lost one would not show
            p.data += 0.2 * torch.randn_like(p)
    network.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    if isinstance(tokenizer, str):
        byte_level(folder, tokenizer)
    else:
        shutil.copy(tokenizer, folder / "tokenizer.model")
        llama = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}
        hints = llama | (hints or {})
    change_json(folder / "tokenizer_config.json", **(hints or {}))
    return folder


def change_json(path: Path, **changes) -> None:
    """Change keys of a JSON file; ... removes one."""
    raw = seal.read_json(path) | changes
    path.write_text(json.dumps({key: value for key, value in raw.items() if value is not ...}))


def change_weights(path: Path, change, **metadata) -> None:
    """Change the tensors of a folder's model.safetensors, or of this file."""
    path = path / "model.safetensors" if path.is_dir() else path
    with seal.safe_open(path, "pt") as file:
        metadata = file.metadata() | metadata
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata)


def no_o_bias(weights):
    for name in list(weights):
        if name.endswith("o_proj.bias"):
            del weights[name]


def other_output(weights):
    weights["lm_head.weight"] = 0.2 * torch.randn(608, 64)


def store(folder: Path, how: str) -> None:
    """As .bin files ("bin"), or with a config.json as transformers 4.3x wrote it ("old")."""
    if "bin" in how:
        for file in folder.glob("*.safetensors"):
            torch.save(load_file(file), folder / f"pytorch_{file.stem}.bin")
            file.unlink()
        for index in folder.glob("*.index.json"):
            names = index.read_text().replace("model-", "pytorch_model-")
            index.with_name("pytorch_model.bin.index.json").write_text(
                names.replace(".safetensors", ".bin"))
            index.unlink()
    if "old" in how:
        rope = seal.read_json(folder / "config.json")["rope_parameters"]
        theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
        rope = None if kind == "default" else {"type": kind} | rope
        change_json(
            folder / "config.json", rope_parameters=..., rope_theta=theta, rope_scaling=rope)


@pytest.fixture(scope="session")
def plain(tmp_path_factory, sp_model) -> Path:
    return make(tmp_path_factory.mktemp("plain") / "llama", sp_model)


@pytest.fixture
def folder(plain, tmp_path) -> Path:
    """A copy to change."""
    return shutil.copytree(plain, tmp_path / "copy")


@pytest.fixture
def model(plain) -> seal.Llama:
    return load(plain)


@pytest.fixture(scope="session")
def tokenizer(plain) -> seal.Tokenizer:
    return open_tokenizer(plain)


@pytest.fixture
def cli(capsys):
    """cli("fold", "--ckpt", ...): exit status, stdout and stderr, without a new process."""

    def call(*arguments):
        capsys.readouterr()
        status = seal.exit_status("seal.py", seal.main, [str(a) for a in arguments])
        return status, *capsys.readouterr()

    return call


def open_tokenizer(folder, template="auto") -> seal.Tokenizer:
    return seal.Tokenizer(folder, seal.read_config(folder), template)


def load(folder, spec="none", **more) -> seal.Llama:
    return seal.load_model(folder, seal.extend(seal.read_config(folder), spec), **more)


def reference(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def make_scales(
    path: Path, config, mode: str, extend="none", values=None, template="auto"
) -> list[torch.Tensor]:
    """Random scales around 1, saved as `seal.py train` does."""
    torch.manual_seed(1)
    size = config.num_attention_heads * (config.head_dim if mode == "channel" else 1)
    scales = values or [1 + 0.3 * torch.randn(size) for _ in range(config.num_hidden_layers)]
    scales = [scale.clone() for scale in scales]
    facts = seal.Facts(
        mode, config.num_hidden_layers, config.num_attention_heads, config.head_dim,
        extend=extend, template=template, task="lines", length="100", lr=0.01)
    seal.save_scales(path, scales, facts)
    return scales


@torch.no_grad()
def logits(model, tokens: list[int]) -> torch.Tensor:
    """(T, V) of seal.py's model or of transformers'."""
    x = model(torch.tensor([tokens]))
    return (model.logits(x) if isinstance(model, seal.Llama) else x.logits)[0]


def some_tokens(count: int, seed=0) -> list[int]:
    return random.Random(seed).choices(range(5, 600), k=count)


def gap(a, b) -> float:
    return (a - b).abs().max().item()


# ---- Model and training --------------------------------------------------------------

LLAMA, MISTRAL = transformers.LlamaForCausalLM, transformers.MistralForCausalLM
QWEN2, QWEN3 = transformers.Qwen2ForCausalLM, transformers.Qwen3ForCausalLM
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 24,
}
YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
    "original_max_position_embeddings": 32,
}
ROPES = [
    {"rope_type": "default", "rope_theta": 5e5},
    LLAMA3,
    YARN | {"finetuned": True},
    {"rope_type": "linear", "factor": 4.0, "rope_theta": 100.0},
    YARN | {"beta_fast": 8.0, "beta_slow": 2.0, "attention_factor": 1.3},
]
LLAMA_2 = seal.Config(32000, 4096, 11008, 32, 32, 32, 128, context=4096)  # the 7B's shape


def draw_config(seed: int) -> dict:
    """Kinds of heads, models and ropes in turn, the rest drawn."""
    rng = random.Random(seed)
    kind = [LLAMA, LLAMA, QWEN3, MISTRAL, LLAMA, QWEN2][seed % 6]
    heads, groups = [(4, 4), (4, 2), (6, 2), (4, 1)][seed % 4]
    size, width = rng.choice([6, 10, 14, 32]), rng.choice([48, 72])
    if kind is LLAMA:
        more = {"attention_bias": rng.random() < 0.7}
    else:
        more = {"sliding_window": None}
    return more | dict(
        model=kind, num_attention_heads=heads, num_key_value_heads=groups, head_dim=size,
        hidden_size=heads * size if kind is QWEN2 else width,
        rms_norm_eps=rng.choice([1e-6, 0.5]), tie_word_embeddings=rng.random() < 0.3,
        rope_parameters=ROPES[seed % 5],
    )


@pytest.mark.parametrize("seed", range(24))
def test_logits_equal_transformers_whatever_shape_and_layout(seed, sp_model, tmp_path):
    shard_size = "100KB" if seed >= 12 else "5GB"
    make(tmp_path, sp_model, seed=seed, shard_size=shard_size, **draw_config(seed))
    expected = logits(reference(tmp_path), some_tokens(60))
    store(tmp_path, ["", "old"][seed // 6 % 2] + ["bin", "", ""][seed % 3])
    assert gap(logits(load(tmp_path), some_tokens(60)), expected) < 1e-4


@pytest.mark.parametrize("s, base", [(2, 20221), (4, 40890), (8, 82685)])
def test_ntk_base_is_the_published_one_and_stretches_the_slowest_pair_by_s(s, base):
    stretched = seal.extend(LLAMA_2, f"ntk:{s}")
    assert round(stretched.rope_theta) == base
    assert stretched.context == 4096 * s
    ratio = seal.rope_frequencies(LLAMA_2)[0] / seal.rope_frequencies(stretched)[0]
    assert ratio[0] == 1
    assert ratio[-1].item() == pytest.approx(s)
    assert (ratio.diff() > 0).all()


@pytest.mark.parametrize("rope", ROPES[:4], ids=["default", "llama3", "yarn", "linear"])
def test_cached_generation_is_uncached_and_transformers_greedy(rope, sp_model, tmp_path):
    make(tmp_path, sp_model, rope_parameters=rope)
    ours, prompt = load(tmp_path), some_tokens(40)
    uncached = list(prompt)
    for _ in range(12):
        uncached.append(logits(ours, uncached)[-1].argmax().item())
    theirs = reference(tmp_path).generate(
        torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=-1)
    answer = seal.generate(ours, prompt, 12)
    assert prompt + answer == uncached == theirs[0].tolist()
    stop = answer[4]
    assert seal.generate(ours, prompt, 12, {stop}) == answer[: answer.index(stop)]
    end = ours.config.context  # where it stops by itself
    assert len(seal.generate(ours, some_tokens(end - 9), 5000)) == 9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", seal.METHOD)
def test_scales_of_one_are_the_base_bit_for_bit(mode, dtype, plain, monkeypatch):
    model, attend = load(plain, dtype=dtype), seal.attend
    attended, projected = [], []

    def watched(*qkv):
        attended.append(attend(*qkv))
        return attended[-1]

    monkeypatch.setattr(seal, "attend", watched)
    for layer in model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(
            lambda _, args: projected.append(args[0]))
    model.reset_scales(mode)
    logits(model, some_tokens(30))
    assert len(attended) == 2
    for attention, x in zip(attended, projected, strict=True):
        assert x.dtype == dtype
        assert torch.equal(x, attention.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("groups, d", [(4, 16), (2, 6), (1, 20)])
def test_attention_is_the_papers_equation(groups, d, sp_model, tmp_path):
    """y = concat_h( s_h * softmax(q_h k_h^T / sqrt(d)) v_h ) W_o, a head and a row at a time."""
    make(tmp_path, sp_model, num_key_value_heads=groups, head_dim=d)
    model, T = load(tmp_path), 9
    model.set_scales(make_scales(tmp_path / "s", model.config, "head"))
    a = model.layers[0].self_attn
    x = torch.randn(T, 64)
    q = a.q_proj(x).view(T, 4, d)
    k = a.k_proj(x).view(T, groups, d)
    v = a.v_proj(x).view(T, groups, d)
    # Channels i and i + d/2 are a complex number, turned by position * base^(-2i/d).
    angles = torch.arange(T)[:, None] * 1e4 ** (-2 * torch.arange(d // 2) / d)
    turn = torch.exp(1j * angles)
    heads = []
    for h, s in enumerate(a.scale):
        g, rows = h * groups // 4, []
        q_h = torch.complex(*q[:, h].chunk(2, 1)) * turn
        k_h = torch.complex(*k[:, g].chunk(2, 1)) * turn
        for t in range(T):
            scores = (k_h[: t + 1].conj() * q_h[t]).real.sum(1) / d**0.5
            weights = torch.exp(scores) / torch.exp(scores).sum()
            rows.append(weights @ v[: t + 1, g])
        heads.append(s * torch.stack(rows))
    y = torch.cat(heads, 1) @ a.o_proj.weight.T
    _, mask = seal.arrange(0, T, [1])  # without branches
    assert gap(a(x[None], (turn.real, turn.imag), mask)[0], y) < 1e-4


@pytest.mark.parametrize("seed", range(12))
def test_loss_and_gradients_are_those_of_transformers_scaled_by_hooks(seed, sp_model, tmp_path):
    """Recomputed and offloaded; by finite differences, too."""
    make(tmp_path, sp_model, seed=seed, **draw_config(seed))
    model, theirs = load(tmp_path), reference(tmp_path)
    prompt, answer = some_tokens(40), [7, 8, 9]
    H, d = model.config.num_attention_heads, model.config.head_dim
    heads = make_scales(tmp_path / "s", model.config, "head")
    channels = [s.repeat_interleave(d).requires_grad_() for s in heads]
    for layer, s in zip(theirs.model.layers, channels):
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args, s=s: (args[0] * s,))
    chances = theirs(torch.tensor([prompt + answer])).logits[0, -4:-1].softmax(1)
    exact = -chances[range(3), answer].log().mean()
    exact.backward()
    slopes = torch.stack([s.grad for s in channels]).view(2, H, d)
    largest = slopes.abs().max()

    for scales in (channels, heads):
        model.set_scales(scales)
        with torch.autograd.graph.save_on_cpu():
            loss = seal.backward(model, [(prompt, answer)])
        assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
        found = torch.stack([s.grad for s in model.scales()]).view(2, H, -1)
        if scales is heads:  # a head's slope is the sum of its channels'
            slopes = slopes.sum(2, keepdim=True)
        assert gap(found, slopes) < 1e-4 * largest

    step = 1e-3
    model.set_scales([s + step for s in heads])
    moved = seal.answer_loss(model, [(prompt, answer)]) - loss
    assert gap(moved / step, slopes.sum()) < 0.05 * largest * d


def draw_record(count: int) -> list[tuple[list[int], list[int]]]:
    """Prompts that begin alike, with their answers; the first one has nothing of its own."""
    shared, record = some_tokens(40), []
    for i in range(count):
        question = some_tokens(5 * i % 7, seed=i + 1)
        answer = some_tokens(1 + i % 3, seed=i + 20)
        record.append((shared + question, answer))
    return record


def one_by_one(model, record) -> torch.Tensor:
    """The loss of a record the slow way: each prompt is read whole, and alone."""
    losses = []
    for prompt, answer in record:
        x = model(torch.tensor([prompt + answer]))
        chances = model.logits(x[0]).softmax(1)
        for i, token in enumerate(answer, len(prompt) - 1):
            losses.append(-chances[i, token].log() / len(answer))
    return sum(losses) / len(record)


@pytest.mark.parametrize("room", [0, 2**40], ids=["recomputed", "kept"])
@pytest.mark.parametrize("count, spec, groups", [
    (1, "ntk:4", 2), (2, "none", 4), (2, "ntk:4", 1), (7, "none", 1), (7, "ntk:4", 2),
])
def test_loss_and_gradient_of_branches_are_the_mean_over_single_prompts(
    count, spec, groups, room, sp_model, tmp_path
):
    make(tmp_path, sp_model, num_key_value_heads=groups)
    model, record = load(tmp_path, spec), draw_record(count)
    model.set_scales(make_scales(tmp_path / "s", model.config, "channel"))
    model.double()
    expected = one_by_one(model, record)
    slopes = torch.autograd.grad(expected, model.scales())
    model.room = room
    loss = seal.backward(model, record)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for scale, slope in zip(model.scales(), slopes, strict=True):
        largest = slope.abs().max()
        assert gap(scale.grad, slope) < 1e-6 * largest


def picture(mask) -> list[str]:
    """A row of 0 and 1 for each query."""
    rows = []
    for row in mask.int().tolist():
        rows.append("".join(map(str, row)))
    return rows


def test_branches_go_on_where_the_record_ends_and_see_the_record_and_themselves():
    positions, mask = seal.arrange(0, 6, [1, 2])
    assert positions.tolist() == [0, 1, 2, 3, 3, 4]
    assert picture(mask) == ["111100", "111010", "111011"]
    positions, mask = seal.arrange(4, 2, [1])  # all that follows a cache is one branch
    assert positions.tolist() == [4, 5]
    assert picture(mask) == ["111110", "111111"]


@pytest.mark.parametrize("rope", ROPES[:4], ids=["default", "llama3", "yarn", "linear"])
def test_a_branch_is_read_as_by_transformers_alone_whatever_the_others_are(
    rope, sp_model, tmp_path
):
    make(tmp_path, sp_model, rope_parameters=rope)
    ours, theirs, record = load(tmp_path), reference(tmp_path), some_tokens(30)
    branches = [some_tokens(n, seed=n) for n in (5, 1, 8)]

    @torch.no_grad()
    def read():
        """Logits of the record and of each branch."""
        x = ours(torch.tensor([sum(branches, record)]), [5, 1, 8])
        return ours.logits(x[0]).split([30, 5, 1, 8])

    first, *rest = before = read()
    for branch, found in zip(branches, rest, strict=True):
        expected = logits(theirs, record + branch)
        assert gap(torch.cat((first, found)), expected) < 1e-4
    branches[2] = some_tokens(8, seed=99)
    gaps = list(map(gap, read(), before))
    assert max(gaps[:3]) < 1e-6
    assert gaps[3] > 0.1


@pytest.mark.parametrize("branches", [[1], [20, 30]])
def test_layers_are_recomputed_where_they_would_keep_more_than_there_is_room_for(branches):
    torch.manual_seed(0)
    model = seal.Llama(seal.Config(600, 128, 344, 2, 4, 4, 32))  # a 7B's shape, smaller
    model.reset_scales("channel")
    frozen = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def kept(room) -> int:
        """Bytes that the model keeps for the way back, its weights not counted."""
        sizes = {}

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in frozen:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        model.room = room
        with torch.autograd.graph.saved_tensors_hooks(keep, keep):
            model(torch.tensor([some_tokens(200)]), branches)
        return sum(sizes.values())

    most = kept(2**40)
    assert kept(1.2 * most) == most
    assert kept(0.8 * most) < most / 5


def test_layers_run_once_or_twice_a_step_as_told(plain, tmp_path, cli, monkeypatch):
    forward, runs = seal.Block.forward, Counter()

    def counted(*args):
        runs[told] += 1
        return forward(*args)

    monkeypatch.setattr(seal.Block, "forward", counted)
    line = f"train --ckpt {plain} --samples 3 --length 200 --out {tmp_path}/s --recompute "
    for told in ("auto", "always", "never"):
        assert cli(*(line + told).split())[0] == 0
    assert runs == {"auto": 3 * 2, "always": 3 * 2 * 2, "never": 3 * 2}


@pytest.mark.parametrize("mode", seal.METHOD)
def test_training_lowers_the_loss_moves_scales_alone_and_pull_leads_to_1(mode, model, tokenizer):
    records = []
    for sample in seal.make_samples("lines", tokenizer, 208, 4, "train"):
        records.append([tokenizer.pair(sample)])
    model.reset_scales(mode)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = seal.train(model, records, lr=0.05, epochs=4)
    assert len(losses) == 16
    assert sum(losses[12:]) < sum(losses[:4]) - 0.1
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != name.endswith("scale")
    model.set_scales([torch.full_like(s, 3.0) for s in model.scales()])
    seal.train(model, records[:1], lr=0.01, pull=0.25)  # Adam's first step is lr; nothing decays
    for s in model.scales():
        assert gap((s - 2.5).abs(), torch.tensor(0.0075)) < 1e-4


@pytest.mark.parametrize("mode, size, rates", [
    ("head", 1024, [1e-2, 2e-2, 4e-2]),
    ("channel", 131072, [2e-2, 2e-2, 5e-2]),
])
def test_a_7b_has_the_papers_count_of_trainable_numbers_and_rates(mode, size, rates):
    with torch.device("meta"):
        model = seal.Llama(LLAMA_2)
        model.reset_scales(mode)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == size
    tasks = [("lines", 32), ("lines", 40), ("needle", 32)]
    assert [seal.paper_lr(task, mode, layers) for task, layers in tasks] == rates


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("mode, size", [("head", 4), ("channel", 64)])
def test_an_interrupted_run_leaves_scales_and_resumes_bit_for_bit(
    mode, size, plain, tmp_path, cli, monkeypatch
):
    flags = "--extend ntk:2 --length 208,190 --questions 2 --samples 4 --lr 0.05".split()
    flags += ["--epochs", "2", "--mode"]
    calls, backward = [], seal.backward

    def train(name, *more):
        status, *_ = cli("train", "--ckpt", plain, "--out", tmp_path / name, *flags, mode, *more)
        return status

    def learned(name):
        return seal.read_scales(tmp_path / name, seal.read_config(plain))

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 6:
            signal.raise_signal(signal.SIGINT)
        return backward(*args)

    assert train("a") == train("c", "--seed", 1) == train("d", "--offload") == 0
    monkeypatch.setattr(seal, "backward", interrupted)
    (tmp_path / ".b.part").write_text("left by a killed run")
    assert train("b") == 130
    assert learned("b")[1].steps == 5
    assert names_in(tmp_path) == ["a", "b", "b.state", "c", "d"]
    assert train("b", "--resume", "--seed", 1) == 2  # it is another run's
    assert train("b", "--resume") == 0
    assert len(calls) == 6 + 3
    assert names_in(tmp_path) == ["a", "b", "c", "d"]

    a, about = learned("a")
    for name, same in (("b", True), ("c", False), ("d", True)):
        scales, again = learned(name)
        assert all(map(torch.equal, a, scales)) == same
        assert (again == about) == same
    assert (about.mode, about.extend, about.lr) == (mode, "ntk:2", 0.05)
    assert (about.head_size, about.steps, about.length) == (16, 8, "208,190")
    assert (about.samples, about.questions, about.trained_on.count(",")) == (4, 2, 7)
    sizes = {name: len(tensor) for name, tensor in load_file(tmp_path / "a").items()}
    assert sizes == {"layers.0.scale": size, "layers.1.scale": size}


# ---- Folding -------------------------------------------------------------------------


@pytest.mark.parametrize("mode, spec, stored, config", [
    ("channel", "ntk:4", "bin", {"head_dim": 20}),
    ("channel", "ntk:2", "old shards", {"num_key_value_heads": 1}),
    ("head", "linear:2.5", "old bin shards", {"attention_bias": True}),
    ("head", "linear:2", "", {"model": QWEN2}),
    ("channel", "yarn:4", "shards", {"model": QWEN2}),
    ("head", "ntk:2", "old bin", {"model": QWEN3, "head_dim": 32}),
    ("channel", "yarn:2", "old", {"tie_word_embeddings": True}),
    ("channel", "ntk:2", "", {"rope_parameters": YARN}),
    ("head", "ntk:2", "old", {"rope_parameters": LLAMA3}),
    ("head", "none", no_o_bias, {"attention_bias": True}),
    ("head", "none", other_output, {"tie_word_embeddings": True}),
    ("channel", "none", "", {"dtype": torch.bfloat16}),
])
def test_folded_is_unfolded_here_and_in_transformers(
    mode, spec, stored, config, sp_model, tmp_path, cli
):
    ckpt, out, s = tmp_path / "ckpt", tmp_path / "out", tmp_path / "s"
    size = "150KB" if "shards" in str(stored) else "5GB"
    make(ckpt, sp_model, shard_size=size, max_position_embeddings=64, **config)
    if callable(stored):
        change_weights(ckpt, stored)
    store(ckpt, str(stored))
    (ckpt / "chat_template.jinja").write_text("{{ messages[0].content }}")
    tokens, before = some_tokens(90), load(ckpt, spec)
    base, scales = logits(before, tokens), make_scales(s, before.config, mode, spec)
    before.set_scales(scales)
    expected = logits(before, tokens)
    (tmp_path / ".out.part").mkdir()  # left by a killed run
    assert cli("fold", "--ckpt", ckpt, "--scales", s, "--out", out)[0] == 0
    assert not list(tmp_path.glob(".*"))

    theirs, ours = reference(out), logits(load(out), tokens)
    if stored is no_o_bias:  # transformers draws what is missing
        for layer in theirs.model.layers:
            layer.self_attn.o_proj.bias.data.zero_()
    near = 0.5 if "dtype" in config else 1e-4  # a bfloat16 is rounded, once:
    assert gap(ours, expected) < near < gap(expected, base)
    assert gap(ours, logits(theirs, tokens)) < 1e-4

    source, folded = seal.Weights(ckpt), seal.Weights(out)
    tied = seal.read_json(out / "config.json")["tie_word_embeddings"]
    assert tied == ("lm_head.weight" not in folded.places)
    assert folded.places.keys() == source.places.keys()
    for name in source.places:
        tensor = source[name]
        if name.endswith("o_proj.weight"):
            scale = scales[int(name.split(".")[1])]
            scale = scale.repeat_interleave(tensor.shape[1] // len(scale))
            tensor = (tensor.float() * scale).to(tensor.dtype)
        assert torch.equal(folded[name], tensor)
    for file in ("tokenizer.model", "tokenizer_config.json", "chat_template.jinja"):
        assert (out / file).read_bytes() == (ckpt / file).read_bytes()


# ---- Data and judging ----------------------------------------------------------------

CASE = (  # as in LongEval's own files
    "Below is a record of lines I want you to remember. Each line begins with 'line <line "
    "index>' and contains a '<REGISTER_CONTENT>' at the end of the line as a numerical value. "
    "For each line index, memorize its corresponding <REGISTER_CONTENT>. At the end of the "
    "record, I will ask you to retrieve the corresponding <REGISTER_CONTENT> of a certain line "
    "index. Now the record start:\n\nline wide-eyed-exam: REGISTER_CONTENT is <49232>\nline ad "
    "hoc-kid: REGISTER_CONTENT is <307>\n\nNow the record is over. Tell me what is the "
    "<REGISTER_CONTENT> in line ad hoc-kid? I need the number. "
)
LATIN = "Is this text? It is! Mr. Poe's sentence is longer than\nthe others, since he has time.  "
LATIN += " ".join(f"Sentence {i} says{' very' * (i % 7)} little." for i in range(60))
CHINESE = "".join(f"今天天气{'很' * (i % 5)}好！你吃了{i}次吗？我去学校。" for i in range(30))


class Words:
    """A tokenizer for tests that count: a token is a word, and a line of the record is five."""

    context = 10**6
    encode = staticmethod(str.split)

    def prompt(self, text: str, prefix="") -> list[str]:
        return f"{text} {prefix}".split()

    def pair(self, sample: Sample) -> tuple[list[str], list[str]]:
        return self.prompt(sample.prompt), sample.answer.split()


@pytest.fixture
def essay(tmp_path) -> Path:
    (tmp_path / "essay.txt").write_text(LATIN)
    return tmp_path / "essay.txt"


def form(record: str) -> str:
    """The wording of a record, without its lines and the key that is asked for."""
    key = re.search(r"in line (.+)\? I need", record)[1]
    return re.sub(r"(line .+: REGISTER_CONTENT is <\d+>\n)+", "", record).replace(key, "KEY")


def test_a_record_is_worded_as_in_longevals_own_files():
    (sample,) = seal.make_samples("lines", Words(), 150, 1, "train")
    assert form(sample.prompt) + " " == form(CASE)
    assert re.search(f"^line .*: REGISTER_CONTENT is <{sample.expected}>$", sample.prompt, re.M)


def take_apart(record: list[Sample]) -> tuple[dict[str, int], list[int]]:
    """Numbers of its lines by their keys, and the places of those that are asked for."""
    places, texts = [], set()
    for sample in record:
        text, question = sample.prompt.split("\nNow the record is over.")
        texts.add(text)
        found = re.findall(r"^line (.+): REGISTER_CONTENT is <(\d+)>$", text, re.M)
        lines = {key: int(number) for key, number in found}
        assert len(lines) == len(found)
        asked = re.search(r"in line (.+)\? I need", question)[1]
        places.append(list(lines).index(asked))
        assert sample.expected == lines[asked]
        assert sample.score(sample.answer) == 1
    assert len(texts) == 1
    return lines, places


def test_lines_fill_the_budget_with_unique_keys_uniform_numbers_and_a_uniform_question():
    places, tenths = Counter(), Counter()
    length = len(form(CASE).split()) + 5 * 10 + 4
    for sample in seal.make_samples("lines", Words(), length, 600, "train"):
        lines, asked = take_apart([sample])
        assert len(lines) == 10  # one more would not have fitted
        places.update(asked)
        tenths.update((number - 1) // 5000 for number in lines.values())
    for counts, n in ((places, 60), (tenths, 600)):  # chi-square, 9 degrees: 1 in 1000
        assert counts.keys() == set(range(10))
        assert sum((count - n) ** 2 / n for count in counts.values()) < 27.9


@pytest.mark.parametrize("depth", [None, 0, 50, 100])
def test_questions_of_a_record_ask_for_lines_far_apart_the_first_as_ever(depth, plain):
    tokenizer, lengths = open_tokenizer(plain), range(561, 601, 2)
    tokenizer.context = 800
    draw = ["lines", tokenizer, lengths, 20, "train", 0, depth]
    singles = seal.make_records(*draw)
    records = seal.make_records(*draw, questions=3)
    same = 0
    for single, record, length in zip(singles, records, lengths, strict=True):
        lines, places = take_apart(record)
        before, _ = take_apart(single)
        first, second, third = sorted(places)
        assert min(second - first, third - second) >= len(lines) // 3
        for sample in record:
            assert len(tokenizer.prompt(sample.prompt)) <= length
        if len(lines) == len(before):
            assert record[0] == single[0]
            same += 1
    assert same > 10  # with a longer key to ask for, a line fewer may fit
    (record,) = seal.make_records("lines", tokenizer, [600], 1, "eval", questions=99)
    lines, places = take_apart(record)
    assert sorted(places) == list(range(len(lines)))


def test_records_have_the_lengths_in_turn():
    records = seal.make_records("lines", Words(), [150, 300, 200], 4, "train", questions=2)
    rest = len(form(CASE).split())  # what is no line
    for record, length in zip(records, [150, 300, 200, 150], strict=True):
        lines, _ = take_apart(record)
        assert len(lines) == (length - rest) // 5


@pytest.mark.parametrize("text", [LATIN, CHINESE], ids=["latin", "chinese"])
@pytest.mark.parametrize("depth", [0, 10, 50, 75, 100])
def test_a_needle_fills_the_budget_and_lands_at_its_depth_between_sentences(
    text, depth, plain, essay
):
    essay.write_text(text)
    tokenizer = open_tokenizer(plain)
    tokenizer.context = 800
    question = f"\n\n{seal.QUESTION.format('San Francisco')}"
    for sample in seal.make_samples("needle", tokenizer, 700, 9, "eval", 0, depth, essay):
        assert 650 < len(tokenizer.prompt(sample.prompt)) <= 700
        before, after = sample.prompt.removesuffix(question).split(sample.answer)
        assert re.search(r"(^|[.!?]\s+|[。！？])$", before) and not re.match(r"\S", after)
        sizes = [len(tokenizer.encode(part)) for part in (before, after)]
        assert -50 <= sizes[0] - depth / 100 * sum(sizes) <= 2  # a sentence has up to 50 tokens
        if depth % 100 == 0:
            assert (before, after)[depth // 100].strip() == ""
        words = "".join((before + after).split())
        assert words in "".join(text.split()) * 9  # nothing is lost, going round at the end


@pytest.mark.parametrize("task", ["lines", "needle", "t.jsonl"])
def test_prompts_are_seeded_and_none_is_tested_that_was_trained_on(task, essay, monkeypatch):
    monkeypatch.chdir(essay.parent)
    rows = [json.dumps({"prompt": f"Question {i}?", "answer": "Yes."}) for i in range(60)]
    Path("t.jsonl").write_text("\n".join(rows))

    def prints(split, seed=0, avoid=()):
        made = seal.make_samples(
            task, Words(), 150, 40, split, seed, haystack=essay, trained_on=",".join(avoid))
        return [s.fingerprint() for s in made]

    trained = prints("train")
    assert trained == prints("train") != prints("train", 1)
    assert len(set(trained)) > 30
    tested = prints("eval", avoid=trained)
    assert not set(trained) & set(tested)
    assert len(tested) == {"t.jsonl": 20}.get(task, 40)


def task_file(folder: Path, *rows) -> Path:
    """A JSONL file: rows are dictionaries, or lines as they are."""
    path, lines = folder / "t.jsonl", []
    for row in rows:
        lines.append(row if isinstance(row, str) else json.dumps(row, ensure_ascii=False))
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.mark.parametrize("expected, text, score", [
    (7, "It was 9, now <007>.", 1),
    (7, "7, not 9", 0),
    (7, "seven", 0),
    (7, "", 0),
    (169, "It is 24,169.", 1),  # as LongEval counts
    (24169, "It is 24,169.", 0),
    (None, "The door: blue!", 1),
    (None, "a blue sky", 1 / 3),
    (None, "", 0),
])
def test_a_text_is_judged_by_its_last_number_or_by_its_words(expected, text, score):
    sample = Sample("", "the blue door", expected)
    assert sample.score(text) == pytest.approx(score)


def test_a_prefix_is_given_behind_the_prompt_and_not_learned(tokenizer, tmp_path):
    path = task_file(tmp_path, {
        "prompt": "Count.", "answer": "otter, kid", "expected": ["otter", "kid"],
        "prefix": "Answer: They are"})
    (sample,) = seal.make_samples(path, tokenizer, 99, 9, "eval")
    prompt, answer = tokenizer.pair(sample)
    assert prompt == tokenizer.prompt("Count.", sample.prefix)
    assert tokenizer.decode(prompt).endswith("Answer: They are")
    assert tokenizer.decode(answer).strip() == "otter, kid"
    assert answer[-1] == tokenizer.end_token
    assert sample.score("a kid") == 0.5


# ---- Commands ------------------------------------------------------------------------


def test_eval_answers_judges_and_averages_and_writes_a_table_and_json(
    plain, essay, tmp_path, cli, monkeypatch
):
    make_scales(tmp_path / "s", seal.read_config(plain), "head", "ntk:2")
    said = iter(["", seal.TEST_NEEDLE[1]] * 4)  # the second has twelve of the needle's 21 words
    asked = []

    def generate(model, *_):
        asked.append(bool((model.scales()[0] == 1).all()))

    monkeypatch.setattr(seal, "generate", generate)
    monkeypatch.setattr(seal.Tokenizer, "decode", lambda *_: next(said))
    status, table, _ = cli(
        "eval", "--ckpt", plain, "--scales", tmp_path / "s", "--compare", "--task", "needle",
        "--haystack", essay, "--lengths", 440, "--depths", "0,100", "--prompts", 4,
        "--json", tmp_path / "r.json")
    assert status == 0
    assert "base" in table and "SEAL-H" in table
    assert len(table.splitlines()) == 4
    report = seal.read_json(tmp_path / "r.json")
    assert report.keys() == {"ckpt", "scales", "task", "extend", "cells", "base", "seconds"}
    cell = {"length": 440, "depth": 100, "prompts": 2, "correct": 1, "score": pytest.approx(2 / 7)}
    assert report["cells"][1] == report["base"][1] == cell
    assert report["extend"] == "ntk:2"
    assert asked == [True, True, False, False] * 2  # the base, then the scales


def test_eval_counts_questions(plain, tmp_path, cli):
    line = f"eval --ckpt {plain} --extend ntk:2 --questions 3 --lengths 220,240 --prompts 2"
    line += f" --max-new-tokens 2 --json {tmp_path}/r.json"
    assert cli(*line.split())[0] == 0
    for cell in seal.read_json(tmp_path / "r.json")["cells"]:
        assert cell["prompts"] == 6


def watch(model) -> list[int]:
    """How many tokens the model is given, call by call, from now on."""
    given = []
    model.register_forward_pre_hook(lambda _, args: given.append(args[0].shape[1]))
    return given


def test_a_record_is_read_once_and_answered_as_if_read_for_each_question(model, tokenizer):
    samples = seal.make_samples("lines", tokenizer, 240, 3, "eval", questions=3)
    samples.append(samples[-1])
    expected = []
    for sample in samples:
        prompt = tokenizer.prompt(sample.prompt)
        expected.append(tokenizer.decode(seal.generate(model, prompt, 12, tokenizer.stop)))
    assert len(set(expected)) > 5
    given = watch(model)
    assert seal.ask(model, tokenizer, samples, 12) == expected
    assert sum(tokens > 200 for tokens in given) == 3
    assert sum(tokens > 25 for tokens in given) == 3
    assert seal.ask(model, tokenizer, samples[::-2], 12) == expected[::-2]
    seal.ask(model, tokenizer, samples[:1], 10**9)  # takes no memory beyond the context


def test_a_prompt_that_shares_little_with_the_one_before_is_read_from_its_beginning(
    model, tokenizer
):
    # The second shares 24 of its 40 words with the first, the third 36 with the second.
    endings = ["kid " * 16, "otter " * 16, "otter " * 12 + "slow " * 4]
    samples = [Sample("river " * 24 + ending, "") for ending in endings]
    given = watch(model)
    seal.ask(model, tokenizer, samples, 1)
    for sample, tokens in zip(samples[:2], given):
        assert tokens == len(tokenizer.prompt(sample.prompt))
    assert 4 <= given[2] < given[1] / 4


def run_python(*arguments, **more) -> tuple[str, str]:
    """stdout and stderr of a new process."""
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **more)
    return done.stdout, done.stderr


def test_generate_continues_as_the_scales_were_trained(plain, tmp_path, cli):
    model, tokenizer = load(plain, "ntk:2"), open_tokenizer(plain, "vicuna")
    make_scales(tmp_path / "s", model.config, "channel", "ntk:2", template="vicuna")
    model.set_scales(seal.read_scales(tmp_path / "s", model.config)[0])
    prompt = tokenizer.prompt("line\n")
    text = tokenizer.decode(seal.generate(model, prompt, 20, tokenizer.stop))
    ask = ["generate", "--ckpt", plain, "--scales", tmp_path / "s", "--max-new-tokens", "20"]
    assert cli(*ask, "--prompt", "line\n")[1] == text + "\n"

    # The same from a pipe, to a terminal that knows only ASCII.
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii"}
    said, err = run_python("seal.py", *ask, "--prompt", "-", input="line\n", env=ascii_only)
    assert not text.isascii()
    assert said == text.encode("ascii", "backslashreplace").decode() + "\n", err


def test_a_mistake_that_an_extra_finds_is_one_line_of_the_script_too():
    said, err = run_python("seal.py", "train", "--extend", "dynamic:2")
    assert said == ""
    assert re.fullmatch("seal.py: error: .*dynamic:2.*\n", err)


def test_a_prompt_of_other_bytes_than_text_is_one_line(plain, cli, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), "utf-8"))
    status, out, err = cli("generate", "--ckpt", plain, "--prompt", "-")
    assert (status, out) == (2, "")
    assert err.splitlines()[-1].startswith("seal.py: error: ")


def test_a_file_whose_writing_is_interrupted_stays_what_it_was(tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(KeyboardInterrupt), seal.whole_file(tmp_path / "file") as unfinished:
        unfinished.write_text("half")
        raise KeyboardInterrupt
    assert (tmp_path / "file").read_text() == "old"
    assert names_in(tmp_path) == ["file"]


def test_demo_learns_both_modes_on_the_toy_and_leaves_scales_and_a_picture(tmp_path, cli):
    status, said, err = cli("demo", "--samples", 1, "--prompts", 1, "--out", tmp_path / "demo")
    assert status == 0, err
    assert all(word in said for word in ("base", "SEAL-H", "SEAL-C"))
    names = names_in(tmp_path / "demo")
    assert names == ["accuracy.png", "channel.safetensors", "head.safetensors"]


def test_help_imports_nothing_slow():
    code = "import sys, seal\ntry: seal.main(['train', '--help'])\nexcept SystemExit: pass\n"
    code += "print(sorted({'transformers', 'matplotlib', 'scipy'} & set(sys.modules)))"
    said, _ = run_python("-c", code)
    assert "--resume" in said
    assert said.endswith("\n[]\n")


def test_a_picture_is_drawn_whatever_backend_a_notebook_has_set(tmp_path):
    code = "from extras.plot import plot_scores\ncell = dict(length=9, correct=1, prompts=2)\n"
    code += f"plot_scores({str(tmp_path / 'p.png')!r}, dict(base=[cell]))"
    backend = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    assert run_python("-c", code, env=os.environ | backend) == ("", "")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def good(plain, tmp_path, monkeypatch) -> None:
    """A folder to work in: model/, huge/, learned, t.jsonl, essay.txt."""
    (tmp_path / "w").mkdir()
    monkeypatch.chdir(tmp_path / "w")
    shutil.copytree(plain, "model")
    shutil.copytree(plain, "huge")
    change_weights(Path("huge"), lambda t: t["model.norm.weight"].fill_(1e5))
    make_scales(Path("learned"), seal.read_config(plain), "head", "ntk:2")
    task_file(Path(), *({"prompt": f"The {n}", "answer": "a pound"} for n in seal.NOUNS[:9]))
    Path("essay.txt").write_text(LATIN)


TRAIN = "train --ckpt model --length 208 --samples 1 --out new"
EVAL = "eval --ckpt model --prompts 1 --max-new-tokens 2 --json new --lengths 208"
SCALED = EVAL + " --scales learned"
FOLD = "fold --ckpt model --scales learned --out new"
FILE, HAY = TRAIN + " --task t.jsonl", TRAIN + " --task needle --haystack essay.txt"
SAY = "generate --ckpt model --max-new-tokens 2 --prompt "
LINES = {  # a command line, and what its answer names
    "": "required.*train",
    "tarin": "tarin",
    TRAIN + " --lenght 9": "lenght",
    TRAIN + " --length x": "length.*x",
    TRAIN + " --length 12": "12",
    TRAIN + " --length 0": "length.*0",
    TRAIN + " --samples 2 --length 208,257": "257|context",
    TRAIN + " --length 256": "answer",  # has no room
    TRAIN + " --questions 0": "questions.*0",
    TRAIN + " --recompute often": "recompute.*often",
    EVAL + " --questions 2 --task needle --haystack essay.txt": "questions.*2",
    EVAL + " --questions 2 --depths 50": "questions.*2",
    TRAIN + " --samples 0": "samples.*0",
    TRAIN + " --epochs 0": "epochs.*0",
    TRAIN + " --mode layer": "layer",
    TRAIN + " --lr 0": "lr.*0",
    TRAIN + " --lr nan": "flags: ",
    TRAIN + " --lr 1e38": r"lr.*1e\+?38",
    TRAIN + " --pull 7": "pull.*7",
    TRAIN + " --pull -0.1": "pull.*-0.1",
    TRAIN + " --seed -1": "seed.*-1",
    TRAIN + " --extend dynamic:2": "extend.*dynamic:2",
    TRAIN + " --extend ntk:0.5": "extend.*ntk:0.5",
    TRAIN + " --device gpu": "device.*gpu",
    TRAIN + " --template x": "template.*x",
    TRAIN + " --template own": "template.*own",
    TRAIN + " --out model": "model",
    TRAIN + " --out a/b": "a/b",
    TRAIN + " --task no.jsonl": "no.jsonl",
    TRAIN + " --task needle": "--haystack",
    TRAIN + " --task needle --haystack no.txt": "no.txt",
    EVAL + " --task needle": "--haystack",
    EVAL + "9": "tokens",  # 2,089 of them
    EVAL + " --lengths -5": "lengths.*-5",
    EVAL + " --lengths 100,": "lengths.*100,",
    EVAL + " --lengths 100,x": "lengths.*x",
    EVAL + " --lengths 208,256": "answer",  # has no room in the second
    EVAL + " --depths 500": "depths.*500",
    EVAL + " --depths -1": "depths.*-1",
    EVAL + " --prompts 0": "prompts.*0",
    EVAL + " --json no/new": "no/new",
    EVAL + " --json model": "model",
    EVAL + " --plot no/new": "no/new",
    EVAL + " --compare": "scales",
    SCALED + " --json learned": "learned.*learned",
    FILE + " --out t.jsonl": "t.jsonl.*t.jsonl",
    SAY + "a --dtype float16 --ckpt huge": "dtype",  # its numbers are too large for it
    EVAL + " --scales no": "no",
    SCALED + " --extend none": "extend.*none",
    HAY.replace("train", "eval"): "--",
    SAY + "ab" * 999: "prompt",
    SAY + "\udcff": "udcff",
    SAY + "a --max-new-tokens 0": "max.new.tokens.*0",
    FOLD + " --out model": "model",
    FOLD + " --out no/new": "no/new",
    "fold --ckpt model --scales learned": "--out",
    "fold --ckpt model --out new": "--scales",
}
BEFORE_THE_WORK = [" --out a/b", " --out model", " --json no/new", " --plot no/new"]
BROKEN = {  # what a file may be instead: missing, bytes, or changes of its JSON or tensors
    "model/config.json": (TRAIN, [
        None, b"{", b"\xff\xfe{}", b"[" * 99999, b"[]", {"model_type": "gpt2"},
        {"hidden_act": "gelu"}, {"sliding_window": 32, "model_type": "mistral"},
        {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 0,
         "model_type": "qwen2"},
        {"hidden_size": "64"}, {"num_key_value_heads": 3}, {"head_dim": 7},
        {"num_hidden_layers": 1 << 30},
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "yarn"}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 2.0}},
        {"rope_parameters": YARN | {"truncate": False}}, {"mlp_bias": True},
        {"rope_parameters": YARN | {"attention_factor": 0.0}},
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        {"rope_scaling": {"type": "yarn", "factor": 4.0}}]),
    "model/model.safetensors": (TRAIN, [
        None, b"", b"<html>404</html>", lambda t: t.pop("model.norm.weight"),
        lambda t: t.update(extra=torch.ones(1)),
        lambda t: t.update({"model.norm.weight": torch.ones(63)})]),
    "model/tokenizer.model": (TRAIN, [None, b"none"]),
    "learned": (FOLD, [
        None, b"", {"format": "x"}, {"mode": "lora"}, {"mode": "channel"}, {"heads": "four"},
        {"head_size": "8"}, {"layers": "3"}, {"layers": "1"},
        lambda t: t.pop("layers.1.scale"), lambda t: t["layers.1.scale"].fill_(torch.inf)]),
    "t.jsonl": (FILE, [
        None, b"\n", b"{prompt}", b"[]", b'{"prompt": "x"}',
        rb'{"prompt": "\ud800", "answer": "y"}', b'{"prompt": "\xff", "answer": "y"}',
        b'{"prompt": "%s", "answer": "y"}' % (b"long " * 999),
        b'{"prompt": "y", "answer": "%s"}' % (b"long " * 240)]),
    "essay.txt": (HAY, [None, b"", b"\x80"]),
}
CASES = [(name, new, line) for name, (line, news) in BROKEN.items() for new in news]


def what_is_here() -> dict[Path, bytes | None]:
    """Files with what they hold, and folders."""
    found = {}
    for path in Path().rglob("*"):
        found[path] = path.read_bytes() if path.is_file() else None
    return found


def ends_in_one_line(cli, line: str, words="") -> str:
    """What stood on stderr; files and folders are as before."""
    before = what_is_here()
    status, out, err = cli(*line.split())
    last = re.split(r"[\r\n]", err.rstrip("\n"))[-1]
    assert (status, out) == (2, ""), err
    assert re.match(f"seal.py: error: .*({words})", last), err
    assert what_is_here() == before
    return err


@pytest.mark.parametrize("line", LINES)
def test_a_wrong_command_line_is_one_line_that_names_it_and_nothing_is_written(line, good, cli):
    err = ends_in_one_line(cli, line, LINES[line])
    if line.endswith(tuple(BEFORE_THE_WORK)):
        assert err.count("\n") == 1  # not even a model was opened


@pytest.mark.parametrize("name, new, line", CASES)
def test_a_wrong_file_is_one_line_that_names_it_and_nothing_is_written(name, new, line, good, cli):
    path = Path(name)
    if new is None:
        path.unlink()
    elif isinstance(new, bytes):
        path.write_bytes(new)
    elif callable(new):
        change_weights(path, new)
    elif name == "learned":
        change_weights(path, dict, **new)
    else:
        change_json(path, **new)
    ends_in_one_line(cli, line, path.name.split(".")[0])


def test_the_same_commands_work_when_nothing_is_wrong(good, cli):
    for line in (TRAIN, FILE, HAY, EVAL, SCALED, SAY + "line", FOLD + "er"):
        status, _, err = cli(*line.split())
        assert status == 0, err


@pytest.mark.parametrize("line, file", [(FILE, "t.jsonl"), (HAY, "essay.txt")])
def test_a_run_does_not_go_on_with_other_prompts(line, file, good, cli, monkeypatch):
    backward, calls = seal.backward, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return backward(*args)

    monkeypatch.setattr(seal, "backward", interrupted)
    line += " --samples 3"
    assert cli(*line.split())[0] == 130
    text = Path(file).read_text()
    Path(file).write_text(text.replace("The", "A").replace("little", "much"))
    ends_in_one_line(cli, line + " --resume", "other prompts")
    Path(file).write_text(text)
    assert cli(*line.split(), "--resume")[0] == 0
    assert len(calls) == 4


# ---- The files themselves ------------------------------------------------------------


def test_files_are_no_longer_and_no_wider_than_a_person_takes_in():
    limits = {path.relative_to(ROOT): 300 for path in ROOT.glob("extras/*.py")}
    limits |= {Path("seal.py"): 1000, Path("export_gguf.py"): 500, Path("README.md"): 150}
    limits |= {Path("test_seal.py"): 1200, Path("extras/test_extras.py"): 1200}
    for path, most in limits.items():
        lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
        assert len(lines) <= most, path
        if path.suffix == ".py":
            assert max(map(len, lines)) <= 100, path


def imported(tree: ast.AST, lazy: bool) -> set[str]:
    """Names that a file imports when it is itself imported; lazy: or at any time."""
    names = set()
    for node in ast.walk(tree) if lazy else tree.body:
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.update([node.module], (f"{node.module}.{a.name}" for a in node.names))
    return names


@pytest.mark.parametrize("lazy, paths", [
    (False, [*ROOT.glob("*.py"), *ROOT.glob("extras/*.py")]),
    (True, [*ROOT.glob("extras/*.py")]),  # an extra opens no extra that opens it
])
def test_files_import_each_other_in_no_circle(lazy, paths):
    graph = {}
    for path in paths:
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        graph[module] = imported(ast.parse(path.read_text(encoding="utf-8")), lazy)
    own = {module: names & graph.keys() for module, names in graph.items()}
    assert len(own) > 15
    list(graphlib.TopologicalSorter(own).static_order())  # raises CycleError
