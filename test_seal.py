"""Tests of seal.py, also worked examples. The references: transformers, and plain loops."""

import json
import random
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file

import export_gguf
import seal
from seal import Sample, UserError

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

# ---------------------------------------------------------------------------------------
# Small checkpoints
# ---------------------------------------------------------------------------------------

TEXT = [
    f"line {a}-{b}: REGISTER_CONTENT is <{i * 7919 % 50000}>, the {b} said to a {a} friend.\n"
    f"It's {i} o'clock,  ça va? ÉCOLE déjà-vu\tOK! 日本語の中文 привет МИР def f(x):\n    return x[{i}]"
    for i, (a, b) in enumerate([("torpid", "kid"), ("ripe", "otter"), ("slow", "river")] * 30)
]
TEXT += [seal.RECORD] * 3 + [seal.NEEDLE.format(*needle) for needle in seal.TRAINING_NEEDLES]
TEXT += [f"{a}-{b}" for a, b in zip(seal.ADJECTIVES, seal.NOUNS)]


@pytest.fixture(scope="session")
def sp_model(tmp_path_factory) -> Path:
    """A tokenizer.model of 600 pieces with Llama's settings, and [INST] as a control symbol."""
    prefix = tmp_path_factory.mktemp("sp") / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT), model_prefix=str(prefix), vocab_size=600, model_type="bpe",
        byte_fallback=True, split_digits=True, normalization_rule_name="identity", minloglevel=2,
        remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
        control_symbols=["[INST]", "[/INST]"],
    )
    return prefix.with_suffix(".model")


def byte_level(folder: Path, name: str) -> None:
    """A tokenizer.json of 341 tokens that cuts text as the one llama.cpp knows by this name."""
    model = tokenizers.models.BPE(ignore_merges=name in export_gguf.MERGES_IGNORED)
    raw = json.loads(tokenizers.Tokenizer(model).to_str())
    raw["pre_tokenizer"] = export_gguf.PRE_TOKENIZERS[name]
    raw["normalizer"] = {"type": "NFC"} if name == "qwen2" else None
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(raw))
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=340, special_tokens=["<s>", "<|im_end|>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.add_tokens([tokenizers.AddedToken("<n7>", normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    hints = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(hints))


def make(folder: Path, tokenizer: Path | str, model=transformers.LlamaForCausalLM, seed=0,
         dtype=torch.float32, hints=None, shard_size="5GB", **config) -> Path:
    """A random checkpoint as transformers writes it; tokenizer: a file, or byte_level's name."""
    torch.manual_seed(seed)
    small = dict(vocab_size=608, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
                 initializer_range=0.2)
    network = model(model.config_class(**(small | config))).eval()
    for p in network.parameters():
        if p.ndim == 1:  # biases and norms start at 0 and 1, where a lost one would not show
            p.data += 0.2 * torch.randn_like(p)
    network.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    if isinstance(tokenizer, str):
        byte_level(folder, tokenizer)
    else:
        shutil.copy(tokenizer, folder / "tokenizer.model")
        hints = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True} | (hints or {})
    change_json(folder / "tokenizer_config.json", **(hints or {}))
    return folder


def change_json(path: Path, **changes) -> None:
    """Change keys of a JSON file; ... removes one."""
    raw = (json.loads(path.read_text()) if path.exists() else {}) | changes
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
    for name in [name for name in weights if name.endswith("o_proj.bias")]:
        del weights[name]


def other_output(weights):
    weights["lm_head.weight"] = 0.2 * torch.randn(608, 64)


def store(folder: Path, how: str) -> None:
    """As .bin files, or with config.json in the words of transformers 4.3x ("old")."""
    for file in folder.glob("*.safetensors" if "bin" in how else "none"):
        torch.save(load_file(file), folder / f"pytorch_{file.stem}.bin")
        file.unlink()
    if "old" in how:
        rope = json.loads((folder / "config.json").read_text())["rope_parameters"]
        theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
        rope = None if kind == "default" else {"type": kind} | rope
        change_json(folder / "config.json", rope_parameters=..., rope_theta=theta, rope_scaling=rope)


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
        status = seal.run("seal.py", seal.main, [str(a) for a in arguments])
        return status, *capsys.readouterr()
    return call


def open_tokenizer(folder, template="auto") -> seal.Tokenizer:
    return seal.Tokenizer(folder, seal.read_config(folder), template)


def load(folder, spec="none", **more) -> seal.Llama:
    return seal.load_model(folder, seal.extend(seal.read_config(folder), spec), **more)


def reference(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def make_scales(path: Path, config, mode: str, extend="none", values=None,
                template="auto") -> list[torch.Tensor]:
    """Random scales around 1, saved as `seal.py train` does."""
    torch.manual_seed(1)
    size = config.num_attention_heads * (config.head_dim if mode == "channel" else 1)
    scales = values or [1 + 0.3 * torch.randn(size) for _ in range(config.num_hidden_layers)]
    scales = [scale.clone() for scale in scales]
    run = seal.Run(mode=mode, heads=config.num_attention_heads, head_size=config.head_dim,
                   layers=config.num_hidden_layers, extend=extend, template=template, task="lines",
                   length=100, lr=0.01)
    seal.save_scales(path, scales, run)
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


# ---------------------------------------------------------------------------------------
# Model, training, folding
# ---------------------------------------------------------------------------------------

LLAMA, MISTRAL = transformers.LlamaForCausalLM, transformers.MistralForCausalLM
QWEN2 = transformers.Qwen2ForCausalLM
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 24, "rope_theta": 1e4}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4}
ROPES = [{"rope_type": "default", "rope_theta": 5e5}, LLAMA3, YARN | {"finetuned": True},
         {"rope_type": "linear", "factor": 4.0, "rope_theta": 100.0},
         YARN | {"beta_fast": 8.0, "beta_slow": 2.0, "attention_factor": 1.3}]
LLAMA_2 = seal.Config(32000, 4096, 11008, 32, 32, 32, 128, 4096)  # the 7B's shape


def draw_config(seed: int) -> dict:
    """Kinds of heads, models and ropes in turn, the rest drawn."""
    rng, kind = random.Random(seed), [LLAMA, LLAMA, LLAMA, MISTRAL, LLAMA, QWEN2][seed % 6]
    heads, groups = [(4, 4), (4, 2), (6, 2), (4, 1)][seed % 4]
    size, bias = rng.choice([6, 10, 14, 32]), rng.random() < 0.7
    more = dict(attention_bias=bias) if kind is LLAMA else dict(sliding_window=None)
    return more | dict(
        model=kind, num_attention_heads=heads, num_key_value_heads=groups, head_dim=size,
        hidden_size=heads * size if kind is QWEN2 else rng.choice([48, 72]),
        rms_norm_eps=rng.choice([1e-6, 0.5]), tie_word_embeddings=rng.random() < 0.3,
        rope_parameters=ROPES[seed % 5],
    )


@pytest.mark.parametrize("seed", range(24))
def test_logits_equal_transformers_whatever_shape_and_layout(seed, sp_model, tmp_path):
    shard_size = "100KB" if seed >= 12 else "5GB"
    make(tmp_path, sp_model, seed=seed, shard_size=shard_size, **draw_config(seed))
    expected = logits(reference(tmp_path), some_tokens(60))
    store(tmp_path, ("old " if seed // 6 % 2 else "") + ("bin" if seed % 3 == 0 else ""))
    assert gap(logits(load(tmp_path), some_tokens(60)), expected) < 1e-4


@pytest.mark.parametrize("s, base", [(2, 20221), (4, 40890), (8, 82685)])
def test_ntk_base_is_the_published_one_and_stretches_the_slowest_pair_by_s(s, base):
    stretched = seal.extend(LLAMA_2, f"ntk:{s}")
    assert round(stretched.rope_theta) == base and stretched.context == 4096 * s
    ratio = seal.rope_frequencies(LLAMA_2)[0] / seal.rope_frequencies(stretched)[0]
    assert ratio[0] == 1 and ratio[-1].item() == pytest.approx(s) and (ratio.diff() > 0).all()


@pytest.mark.parametrize("rope", ROPES[:4], ids=lambda rope: rope["rope_type"])
def test_cached_generation_is_uncached_and_transformers_greedy(rope, sp_model, tmp_path):
    make(tmp_path, sp_model, rope_parameters=rope)
    ours, prompt, ids = load(tmp_path), some_tokens(40), some_tokens(40)
    answer = seal.generate(ours, prompt, 12)
    for _ in answer:
        ids.append(logits(ours, ids)[-1].argmax().item())
    greedy = dict(max_new_tokens=12, do_sample=False, eos_token_id=-1)
    theirs = reference(tmp_path).generate(torch.tensor([prompt]), **greedy)[0].tolist()
    assert prompt + answer == ids == theirs and len(answer) == 12
    assert seal.generate(ours, prompt, 12, {answer[4]}) == answer[: answer.index(answer[4])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", seal.METHOD)
def test_scales_of_one_are_the_base_bit_for_bit(mode, dtype, plain, monkeypatch):
    model, seen, attend = load(plain, dtype=dtype), [], seal.attend
    monkeypatch.setattr(seal, "attend", lambda *qkv: seen.append(attend(*qkv)) or seen[-1])
    for layer in model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.reset_scales(mode)
    logits(model, some_tokens(30))
    for attention, x in zip(seen[::2], seen[1::2], strict=True):
        assert x.dtype == dtype and torch.equal(x, attention.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("groups, d", [(4, 16), (2, 6), (1, 20)])
def test_attention_is_the_papers_equation(groups, d, sp_model, tmp_path):
    """y = concat_h( s_h * softmax(q_h k_h^T / sqrt(d)) v_h ) W_o, a head and a row at a time."""
    make(tmp_path, sp_model, num_key_value_heads=groups, head_dim=d)
    model, x, heads = load(tmp_path), torch.randn(9, 64), []
    model.set_scales(make_scales(tmp_path / "s", model.config, "head"))
    turn = torch.exp(1j * torch.arange(9)[:, None] * 1e4 ** (-2 * torch.arange(d // 2) / d))
    a = model.layers[0].self_attn
    q, k, v = (p(x).view(9, -1, d) for p in (a.q_proj, a.k_proj, a.v_proj))  # (T, heads, d)
    for h, s in enumerate(a.scale):
        g, rows = h * groups // 4, []
        # Channels i and i + d/2 are a complex number, turned by position * base^(-2i/d).
        turned = [torch.complex(*y.chunk(2, 1)) * turn for y in (q[:, h], k[:, g])]
        for t in range(9):
            weights = torch.exp((turned[1][: t + 1].conj() * turned[0][t]).real.sum(1) / d**0.5)
            rows.append(weights / weights.sum() @ v[: t + 1, g])
        heads.append(s * torch.stack(rows))
    ours = a(x[None], (turn.real, turn.imag))[0]
    assert gap(ours, torch.cat(heads, 1) @ a.o_proj.weight.T) < 1e-4


@pytest.mark.parametrize("seed", range(12))
def test_loss_and_gradients_are_those_of_transformers_scaled_by_hooks(seed, sp_model, tmp_path):
    """Recomputed and offloaded; by finite differences, too."""
    make(tmp_path, sp_model, seed=seed, **draw_config(seed))
    model, theirs, prompt, answer = load(tmp_path), reference(tmp_path), some_tokens(40), [7, 8, 9]
    heads, d, grads = make_scales(tmp_path / "s", model.config, "head"), model.config.head_dim, []
    channels = [s.repeat_interleave(d).requires_grad_() for s in heads]
    for layer, s in zip(theirs.model.layers, channels):
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args, s=s: (args[0] * s,))
    chances = theirs(torch.tensor([prompt + answer])).logits[0, -4:-1].softmax(1)
    exact = -chances[range(3), answer].log().mean()
    slopes = torch.stack(torch.autograd.grad(exact, channels)).view(2, len(heads[0]), d)
    for scales in (channels, heads):
        model.set_scales(scales)
        with torch.autograd.graph.save_on_cpu():
            loss = seal.answer_loss(model, prompt, answer)
            grads.append(torch.stack(torch.autograd.grad(loss, model.scales())))
        assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
    largest = slopes.abs().max()
    assert gap(grads[0].view_as(slopes), slopes) < 1e-4 * largest
    assert gap(grads[1], slopes.sum(2)) < 1e-4 * largest  # a head's: the sum of its channels'
    model.set_scales([s + 1e-3 for s in heads])
    moved = (seal.answer_loss(model, prompt, answer) - loss) / 1e-3
    assert gap(moved, slopes.sum()) < 0.05 * largest * d


@pytest.mark.parametrize("mode", seal.METHOD)
def test_training_lowers_the_loss_moves_scales_alone_and_pull_leads_to_1(mode, model, tokenizer):
    pairs = [tokenizer.pair(s) for s in seal.make_samples(seal.Run(), tokenizer, 208, 4, "train")]
    model.reset_scales(mode)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = seal.train(model, pairs, lr=0.05, epochs=4)
    assert len(losses) == 16 and sum(losses[12:]) < sum(losses[:4]) - 0.1
    moved = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert moved == [f"layers.{i}.self_attn.scale" for i in range(2)]
    model.set_scales([torch.full_like(s, 3.0) for s in model.scales()])
    seal.train(model, pairs[:1], lr=0.01, pull=0.25)  # Adam's first step is lr; nothing decays
    for s in model.scales():
        assert gap((s - 2.5).abs(), torch.tensor(0.0075)) < 1e-4


@pytest.mark.parametrize("mode, size, rates", [("head", 1024, [1e-2, 2e-2, 4e-2]),
                                               ("channel", 131072, [2e-2, 2e-2, 5e-2])])
def test_a_7b_has_the_papers_count_of_trainable_numbers_and_rates(mode, size, rates):
    with torch.device("meta"):
        model = seal.Llama(LLAMA_2)
        model.reset_scales(mode)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == size
    tasks = ("lines", 32), ("lines", 40), ("needle", 32)
    assert [seal.paper_lr(task, mode, layers) for task, layers in tasks] == rates


@pytest.mark.parametrize("mode", seal.METHOD)
def test_an_interrupted_run_leaves_scales_and_resumes_bit_for_bit(
    mode, plain, tmp_path, cli, monkeypatch
):
    def train(name, *more):
        flags = "--extend ntk:2 --length 208 --samples 4 --lr 0.05 --epochs 2 --mode".split()
        return cli("train", "--ckpt", plain, "--out", tmp_path / name, *flags, mode, *more)[0]

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 6:
            signal.raise_signal(signal.SIGINT)
        return loss(*args)

    assert train("a") == train("c", "--seed", 1) == train("d", "--offload") == 0
    calls, loss = [], seal.answer_loss
    monkeypatch.setattr(seal, "answer_loss", interrupted)
    (tmp_path / ".b.part").write_text("left by a killed run")
    def learned(name):
        return seal.read_scales(tmp_path / name, seal.read_config(plain))

    assert train("b") == 130 and learned("b")[1].steps == 5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "b.state", "c", "d"]
    assert train("b", "--resume", "--seed", 1) == 2  # it is another run's
    assert train("b", "--resume") == 0 and len(calls) == 6 + 3
    (a, about), (b, again), (c, _), (d, _) = map(learned, "abcd")
    for w, x, y, z in zip(a, b, c, d, strict=True):
        assert torch.equal(w, x) and not torch.equal(w, y) and torch.equal(w, z)
    assert replace(about, out=again.out) == again and (about.steps, about.length) == (8, 208)
    assert (about.mode, about.extend, about.lr, about.head_size) == (mode, "ntk:2", 0.05, 16)
    sizes = {name: len(tensor) for name, tensor in load_file(tmp_path / "a").items()}
    assert sizes == dict.fromkeys(["layers.0.scale", "layers.1.scale"], 64 if mode == "channel" else 4)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c", "d"]


@pytest.mark.parametrize("mode, spec, stored, config", [
    ("channel", "ntk:4", "bin", {"head_dim": 20}),
    ("channel", "ntk:2", "old shards", {"num_key_value_heads": 1}),
    ("head", "linear:2.5", "old bin shards", {"attention_bias": True}),
    ("head", "linear:2", "", {"model": QWEN2}),
    ("channel", "yarn:4", "shards", {"model": QWEN2}),
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
    ckpt, out, s = (tmp_path / name for name in ("ckpt", "out", "s"))
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
    theirs = reference(out)
    if stored is no_o_bias:  # transformers draws what is missing
        for layer in theirs.model.layers:
            layer.self_attn.o_proj.bias.data.zero_()
    near = 0.5 if "dtype" in config else 1e-4  # a bfloat16 is rounded, once:
    assert gap(logits(load(out), tokens), expected) < near < gap(expected, base)
    assert gap(logits(theirs, tokens), logits(load(out), tokens)) < 1e-4
    source, folded = seal.Checkpoint(ckpt), seal.Checkpoint(out)
    tied = json.loads((out / "config.json").read_text())["tie_word_embeddings"]
    assert tied == ("lm_head.weight" not in folded.files)
    for name in source.files:
        tensor = source[name]
        if name.endswith("o_proj.weight"):
            scale = scales[int(name.split(".")[2])]
            scale = scale.repeat_interleave(tensor.shape[1] // len(scale))
            tensor = (tensor.float() * scale).to(tensor.dtype)
        assert torch.equal(folded[name], tensor)
    for file in ("tokenizer.model", "tokenizer_config.json", "chat_template.jinja"):
        assert (out / file).read_bytes() == (ckpt / file).read_bytes()
    assert not list(tmp_path.glob(".*"))


# ---------------------------------------------------------------------------------------
# Data and text
# ---------------------------------------------------------------------------------------

CASE = (  # as in LongEval's own files
    "Below is a record of lines I want you to remember. Each line begins with 'line <line index>' "
    "and contains a '<REGISTER_CONTENT>' at the end of the line as a numerical value. For each line "
    "index, memorize its corresponding <REGISTER_CONTENT>. At the end of the record, I will ask you "
    "to retrieve the corresponding <REGISTER_CONTENT> of a certain line index. Now the record start:"
    "\n\nline wide-eyed-exam: REGISTER_CONTENT is <49232>\nline ad hoc-kid: REGISTER_CONTENT is <307>"
    "\n\nNow the record is over. Tell me what is the <REGISTER_CONTENT> in line ad hoc-kid? "
    "I need the number. "
)
LATIN = "Is this text? It is! Mr. Poe's sentence is longer than\nthe others, since he has time.  "
LATIN += " ".join(f"Sentence {i} says{' very' * (i % 7)} little." for i in range(60))
CHINESE = "".join(f"今天天气{'很' * (i % 5)}好！你吃了{i}次吗？我去学校。" for i in range(30))


class Words:
    """A tokenizer for tests that count: a token is a word, and a line of the record is five."""

    encode = staticmethod(str.split)

    def prompt(self, text: str, prefix="") -> list[str]:
        return f"{text} {prefix}".split()


@pytest.fixture
def essay(tmp_path) -> Path:
    (tmp_path / "essay.txt").write_text(LATIN)
    return tmp_path / "essay.txt"


def test_longevals_own_cases_are_read_and_the_generated_ones_are_worded_so(tmp_path):
    case = {"random_idx": ["ad hoc-kid", 1], "expected_number": 307, "num_lines": 2, "prompt": CASE}
    (tmp_path / "cases.jsonl").write_text("\ufeff" + json.dumps(case) + "\r\n\n")
    answer = "The <REGISTER_CONTENT> in line ad hoc-kid is 307."
    assert seal.read_jsonl(tmp_path / "cases.jsonl") == [Sample(CASE, answer, 307)]
    lines = [("wide-eyed-exam", 49232), ("ad hoc-kid", 307)]
    lines = "".join(seal.LINE.format(key=key, number=number) for key, number in lines)
    assert seal.RECORD.format(lines=lines, key="ad hoc-kid") + " " == CASE


def test_lines_fill_the_budget_with_unique_keys_uniform_numbers_and_a_uniform_question():
    places, tenths = Counter(), Counter()
    length = len(seal.RECORD.format(lines="", key="a-b").split()) + 5 * 10 + 4
    for sample in seal.make_samples(seal.Run(), Words(), length, 600, "train"):
        record = re.findall(r"^line (.+): REGISTER_CONTENT is <(\d+)>$", sample.prompt, re.M)
        asked = re.search(r"in line (.+)\? I need", sample.prompt)[1]
        places[[key for key, _ in record].index(asked)] += 1
        tenths.update((int(number) - 1) // 5000 for _, number in record)
        assert len(dict(record)) == len(record) == 10  # one more would not have fitted
        assert sample.expected == int(dict(record)[asked]) and sample.score(sample.answer) == 1
    for counts, n in ((places, 60), (tenths, 600)):  # chi-square, 9 degrees: 1 in 1000
        assert counts.keys() == set(range(10))
        assert sum((count - n) ** 2 / n for count in counts.values()) < 27.9


@pytest.mark.parametrize("text", [LATIN, CHINESE], ids=["latin", "chinese"])
@pytest.mark.parametrize("depth", [0, 10, 50, 75, 100])
def test_a_needle_fills_the_budget_and_lands_at_its_depth_between_sentences(
    text, depth, tokenizer, essay
):
    essay.write_text(text)
    question = f"\n\n{seal.QUESTION.format('San Francisco')}"
    run = seal.Run(task="needle", haystack=essay)
    for sample in seal.make_samples(run, tokenizer, 700, 9, "eval", depth):
        assert 650 < len(tokenizer.prompt(sample.prompt)) <= 700
        before, after = sample.prompt.removesuffix(question).split(sample.answer)
        assert re.search(r"(^|[.!?]\s+|[。！？])$", before) and not re.match(r"\S", after)
        sizes = [len(tokenizer.encode(part)) for part in (before, after)]
        assert -50 <= sizes[0] - depth / 100 * sum(sizes) <= 2  # a sentence has up to 50 tokens
        assert depth % 100 or (before, after)[depth // 100].strip() == ""
        words = "".join((before + after).split())
        assert words in "".join(text.split()) * 9  # nothing is lost, going round at the end


@pytest.mark.parametrize("task", ["lines", "needle", "t.jsonl"])
def test_prompts_are_seeded_and_none_is_tested_that_was_trained_on(task, essay, monkeypatch):
    monkeypatch.chdir(essay.parent)
    rows = [json.dumps({"prompt": f"Question {i}?", "answer": "Yes."}) for i in range(60)]
    Path("t.jsonl").write_text("\n".join(rows))

    def prints(split, seed=0, avoid=()):
        run = seal.Run(task=task, haystack=essay, seed=seed, trained_on=",".join(avoid))
        made = seal.make_samples(run, Words(), 150, 40, split)
        return [s.fingerprint() for s in made]

    trained = prints("train")
    tested = prints("eval", avoid=trained)
    assert trained == prints("train") != prints("train", 1) and len(set(trained)) > 30
    assert not set(trained) & set(tested) and len(tested) == (20 if task == "t.jsonl" else 40)


@pytest.mark.parametrize("expected, answer, text, score", [
    (7, "", "It was 9, now 7.", 1), (7, "", "7, not 9", 0), (7, "", "seven", 0), (7, "", "<007>", 1),
    (-5, "", "It is -5.", 1), (-5, "", "It is 5.", 0), (5, "", "range 3-5", 1), (30, "", "3 0", 0),
    ("Paris", "", "I think it is PARIS.", 1), ("Paris", "", "Par is", 0), ("012", "", "a 012", 1),
    (["one", "Two", "3"], "", "two, then 3", 2 / 3), (None, "the blue door", "The door: blue!", 1),
    (None, "a a b", "a", 1 / 3), (None, "a b", "", 0),
])
def test_judges(expected, answer, text, score):
    assert Sample("", answer, expected).score(text) == pytest.approx(score)


def test_rulers_keys_are_read_and_a_prefix_is_given_and_not_learned(tokenizer, tmp_path):
    case = {"input": "Count.", "outputs": ["otter", "kid"], "answer_prefix": " Answer: They are"}
    (tmp_path / "r.jsonl").write_text(json.dumps(case))
    (sample,) = seal.make_samples(seal.Run(task=tmp_path / "r.jsonl"), tokenizer, 99, 9, "eval")
    prompt, answer = tokenizer.pair(sample)
    assert sample.score("a kid") == 0.5 and prompt == tokenizer.prompt("Count.", sample.prefix)
    assert tokenizer.decode(prompt).endswith("Answer: They are") and answer[-1] == tokenizer.end
    assert tokenizer.decode(answer).strip() == "otter, kid"


ALL, GO = "{% for m in messages %}", "{% endfor %}{% if add_generation_prompt %}"
CHATML = (
    ALL + "{% if loop.first and m.role != 'system' %}<|im_start|>system\nSYS<|im_end|>\n{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}" + GO
    + "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
IM = "<|im_start|>system\nSYS<|im_end|>\n<|im_start|>user\nSay hi<|im_end|>\n<|im_start|>assistant\n"
SMOLLM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
QWEN = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
INST = (
    "{{ bos_token }}" + ALL + "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if m.role == 'user' %}"
    "{{ '[INST] ' + m.content | trim + '@[/INST]' }}{% else %}"
    "{{ ' ' + m.content | trim + '@' + eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    ALL + "\n{{ '<|' + m.role + '|>\n' + m.content + eos_token }}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
DATED = "<|a|>system<|b|>\n\nCutting Knowledge Date: December 2023\nToday Date: DAY\n\n<|eot|>"
LLAMA_31 = (  # with <|a|> and <|b|> around a role, and <|eot|>, in place of the longer names
    "{% set DAY = strftime_now('%d %b %Y') if strftime_now is defined else '26 Jul 2024' %}"
    "{{- bos_token + '" + DATED.replace("DAY", "' + DAY + '") + "' }}" + ALL + "{{- '<|a|>' + m.role"
    " + '<|b|>\n\n' + m.content | trim + '<|eot|>' }}" + GO + "{{- '<|a|>assistant<|b|>\n\n' }}{% endif %}"
)
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. USER: Say hi ASSISTANT:"
)
CHATS = {  # the folder's name: (tokenizer, template, prompt, answer)
    "SmolLM2": ("smollm", CHATML.replace("SYS", SMOLLM), IM.replace("SYS", SMOLLM), "Hi<|im_end|>"),
    "Qwen2.5": ("qwen2", CHATML.replace("SYS", QWEN), IM.replace("SYS", QWEN), "Hi<|im_end|>"),
    "Llama-2": ("sp", INST.replace("@", " "), "<s>[INST] Say hi [/INST]", " Hi </s>"),
    "Mistral-v0.3": ("sp", INST.replace("@", ""), "<s>[INST] Say hi[/INST]", " Hi</s>"),
    "Zephyr": ("sp", ZEPHYR, "<|user|>\nSay hi</s>\n<|assistant|>\n", "Hi</s>"),
    "Llama-3.1": ("llama-bpe", LLAMA_31, "<s>" + DATED.replace("DAY", "26 Jul 2024")
                  + "<|a|>user<|b|>\n\nSay hi<|eot|><|a|>assistant<|b|>\n\n", "Hi<|eot|>"),
    # without a template, by the name:
    "longchat-7b-v1.5-32k": ("sp", ..., VICUNA, " Hi</s>"),
    "Llama-2-7b-chat-hf": ("sp", ..., "[INST] Say hi [/INST]", " Hi </s>"),
    "Mistral-7B-Instruct-v0.2": ("sp", ..., "[INST] Say hi [/INST]", " Hi</s>"),
    "renamed": ("sp", ..., "Say hi", " Hi</s>"),
}


def added(first: int, *tokens, special=True) -> dict:
    """added_tokens_decoder of tokenizer_config.json."""
    return {str(i): {"content": t, "special": special} for i, t in enumerate(tokens, first)}


def to_byte_level(folder: Path, name="llama-bpe") -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    byte_level(folder, name)


@pytest.mark.parametrize("name", CHATS)
def test_prompt_answer_and_end_are_those_of_the_published_templates(name, folder):
    kind, template, prompt, answer = CHATS[name]
    folder = folder.rename(folder.with_name(name))
    if kind != "sp":
        to_byte_level(folder, kind)
        tokens = added(341, "<|im_start|>", "<|a|>", "<|b|>", "<|eot|>")
        change_json(folder / "tokenizer_config.json", added_tokens_decoder=tokens)
    change_json(folder / "tokenizer_config.json", chat_template=template)
    ours, theirs = open_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    ids, learned = ours.pair(Sample("Say hi", "Hi"))
    for text, found in ((prompt, ids), (prompt + answer, ids + learned)):
        leave_bos = kind == "sp" and "<s>" not in prompt  # to the tokenizer
        assert found == theirs.encode(text, add_special_tokens=leave_bos)
    assert ids == ours.prompt("Say hi") and learned[-1] == ours.end in ours.stop
    assert theirs.decode(ours.end) == answer.split("Hi")[1].strip()


@pytest.mark.parametrize("template", [
    "{{ raise_exception('no') }}", "{{ ''.__class__.__mro__ }}", "{% for m in messages %}", "{{ 1 / 0 }}",
    "{{ messages.append(1) }}", "{% for i in range(10**9) %}{% endfor %}",
])
def test_a_template_that_raises_or_reaches_out_is_one_line(template, folder, cli):
    change_json(folder / "tokenizer_config.json", chat_template=template)
    status, out, err = cli("generate", "--ckpt", folder, "--prompt", "a")
    assert (status, out) == (2, "") and re.fullmatch("seal.py: error: .*template.*\n", err)


def test_bos_and_eos_may_be_replaced_and_added_tokens_that_are_not_special_are_kept(folder):
    tokens = added(600, "<|im_start|>", "<|im_end|>") | added(602, "<n7>", special=False)
    change_json(folder / "tokenizer_config.json", added_tokens_decoder=tokens,
                bos_token="<|im_start|>", eos_token="<|im_end|>")
    change_json(folder / "generation_config.json", eos_token_id=[2, 77])
    ours = open_tokenizer(folder)
    assert ours.prompt("a")[0] == 600 and ours.end == 601 and ours.stop == {601, 2, 77}
    ids = ours.encode("is <n7>")
    assert ids[-1] == 602 and ours.decode([*ids, 601]) == "is <n7>"


def test_tokenizer_json_is_read_whatever_is_beside_it_or_left_in_it(folder, sp_model):
    """Truncation and padding are not applied, no BOS is made up, an eos may be the config's."""
    to_byte_level(folder)
    raw = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    raw.enable_truncation(16)
    raw.enable_padding(length=64)
    raw.save(str(folder / "tokenizer.json"))
    assert len(open_tokenizer(folder).prompt("word " * 100)) > 100
    assert len(open_tokenizer(folder).prompt("a")) == 1
    for file in ("tokenizer_config.json", "generation_config.json"):
        (folder / file).unlink()
    change_json(folder / "config.json", eos_token_id=9)
    change_json(folder / "params.json", dim=64)
    for beside in (b"IQ== 0\nIg== 1\n", sp_model.read_bytes()):  # tiktoken's, SentencePiece's
        (folder / "tokenizer.model").write_bytes(beside)
        ours = open_tokenizer(folder)
        assert ours.encode("<n7>") == [340] and ours.stop == {9} and ours.end == 9
        assert ours.decode(ours.encode("ça va <n7>")) == "ça va <n7>"


def test_a_tokenizer_may_put_no_space_in_front_and_control_symbols_are_one_id_each(folder, tokenizer):
    change_json(folder / "tokenizer_config.json", add_prefix_space=False, add_eos_token=True)
    ours = open_tokenizer(folder)
    assert ours.encode(" line") == tokenizer.encode("line") != ours.encode("line")
    assert ours.prompt("line")[-1] != 2  # an eos behind a prompt would end it
    ids = tokenizer.prompt("a [INST] b</s> <unk>")
    assert ids[0] == 1 and [i for i in ids[1:] if i < 5] == [3, 2, 0]


def test_a_token_beyond_the_embedding_is_refused_and_hurts_nothing_else(sp_model, tmp_path, cli):
    make(tmp_path, sp_model, vocab_size=600, hints={"pad_token": "<pad>"})
    ask = ["generate", "--ckpt", tmp_path, "--max-new-tokens", 3, "--prompt"]
    assert cli(*ask, "a")[0] == 0
    status, _, err = cli(*ask, "a<pad>")
    assert status == 2 and "'<pad>'" in err.splitlines()[-1]


@pytest.mark.parametrize("names", [..., None, [], ["LLaMAForCausalLM"]])
def test_config_json_is_read_as_people_write_it(names, folder):
    change_json(folder / "config.json", architectures=names, max_sequence_length=2048, head_dim=...)
    config = seal.read_config(folder)
    assert (config.context, config.head_dim) == (2048, 16)


# ---------------------------------------------------------------------------------------
# Commands
# ---------------------------------------------------------------------------------------


def test_eval_answers_judges_and_averages_and_writes_a_table_and_json(
    plain, essay, tmp_path, cli, monkeypatch
):
    make_scales(tmp_path / "s", seal.read_config(plain), "head", "ntk:2")
    said, asked = iter(["", seal.TEST_NEEDLE[1]] * 4), []  # twelve of the needle's 21 words
    monkeypatch.setattr(seal, "generate", lambda m, *_: asked.append(bool((m.scales()[0] == 1).all())))
    monkeypatch.setattr(seal.Tokenizer, "decode", lambda *_: next(said))
    status, table, _ = cli(
        "eval", "--ckpt", plain, "--scales", tmp_path / "s", "--compare", "--task", "needle",
        "--haystack", essay, "--lengths", 200, "--depths", "0,100", "--prompts", 4,
        "--json", tmp_path / "r.json")
    assert status == 0 and "base" in table and "SEAL-H" in table and len(table.splitlines()) == 4
    report = json.loads((tmp_path / "r.json").read_text())
    assert report.keys() == {"ckpt", "scales", "task", "extend", "cells", "base", "seconds"}
    cell = {"length": 200, "depth": 100, "prompts": 2, "correct": 1, "score": pytest.approx(2 / 7)}
    assert report["cells"][1] == report["base"][1] == cell and report["extend"] == "ntk:2"
    assert asked == [True, True, False, False] * 2  # the base, then the scales


def test_generate_continues_as_the_scales_were_trained(plain, tmp_path, cli):
    model, tokenizer = load(plain, "ntk:2"), open_tokenizer(plain, "vicuna")
    trained = {"extend": "ntk:2", "template": "vicuna"}
    model.set_scales(make_scales(tmp_path / "s", model.config, "channel", **trained))
    ids = seal.generate(model, tokenizer.prompt("line\n"), 20, tokenizer.stop)
    ask = ["generate", "--ckpt", plain, "--scales", tmp_path / "s", "--max-new-tokens", "20", "--prompt"]
    said = cli(*ask, "line\n")[1]
    ask = [sys.executable, seal.__file__, *ask, "-"]  # from a pipe
    done = subprocess.run(ask, input="line\n", capture_output=True, text=True)
    assert said == done.stdout == tokenizer.decode(ids) + "\n", done.stderr


def test_a_file_whose_writing_is_interrupted_stays_what_it_was(tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(KeyboardInterrupt), seal.whole_file(tmp_path / "file") as unfinished:
        unfinished.write_text("half")
        raise KeyboardInterrupt
    assert (tmp_path / "file").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_demo_learns_both_modes_on_the_toy_and_leaves_scales_and_a_picture(tmp_path, cli):
    status, said, err = cli("demo", "--samples", 1, "--prompts", 1, "--out", tmp_path / "demo")
    assert status == 0 and all(word in said for word in ("base", "SEAL-H", "SEAL-C")), err
    names = sorted(path.name for path in (tmp_path / "demo").iterdir())
    assert names == ["accuracy.png", "channel.safetensors", "head.safetensors"]


def test_help_imports_nothing_slow():
    code = "import sys, seal\ntry: seal.main(['train', '--help'])\nexcept SystemExit: pass\n"
    code += "print(sorted({'transformers', 'matplotlib', 'scipy'} & set(sys.modules)))"
    ask, root = [sys.executable, "-c", code], Path(seal.__file__).parent
    said = subprocess.run(ask, cwd=root, capture_output=True, text=True).stdout
    assert "--resume" in said and said.endswith("\n[]\n")


@pytest.fixture
def good(plain, tmp_path, monkeypatch) -> None:
    """A folder to work in: model/, learned, t.jsonl, essay.txt."""
    (tmp_path / "w").mkdir()
    monkeypatch.chdir(tmp_path / "w")
    shutil.copytree(plain, "model")
    make_scales(Path("learned"), seal.read_config(plain), "head", "ntk:2")
    rows = [json.dumps({"prompt": f"The {noun}", "answer": "a pound"}) for noun in seal.NOUNS[:9]]
    Path("t.jsonl").write_text("\n".join(rows))
    Path("essay.txt").write_text(LATIN)


TRAIN = "train --ckpt model --length 208 --samples 1 --out new"
EVAL = "eval --ckpt model --prompts 1 --max-new-tokens 2 --json new --scales learned --lengths 208"
FOLD = "fold --ckpt model --scales learned --out new"
FILE, HAY = TRAIN + " --task t.jsonl", TRAIN + " --task needle --haystack essay.txt"
SAY = "generate --ckpt model --max-new-tokens 2 --prompt "
LINES = [f"{TRAIN} --{more}" for more in (
    "lenght 9", "length x", "length 12", "length 257", "samples 0", "epochs 0", "mode layer", "lr 0",
    "lr nan", "lr 1e38", "pull 7", "extend dynamic:2", "extend ntk:0.5", "device gpu",
    "template x", "template own", "out model",
    "out a/b", "task no.jsonl", "task needle", "task needle --haystack no.txt")] + [
    "", "tarin", EVAL + "999", EVAL + " --extend none", HAY.replace("train", "eval"), SAY + "ab" * 999, SAY + "\udcff",
    FOLD + " --out model", "fold --ckpt model --scales learned", "fold --ckpt model --out new",
    "eval --ckpt model --compare"]
BROKEN = {  # what a file may be instead: missing, bytes, or changes of its JSON, tensors or metadata
    "model/config.json": (TRAIN, [
        None, b"{", b"\xff\xfe{}", b"[" * 99999, {"model_type": "gpt2"}, {"hidden_act": "gelu"},
        {"sliding_window": 32, "model_type": "mistral"},
        {"hidden_size": "64"}, {"num_key_value_heads": 3}, {"head_dim": 7}, {"num_hidden_layers": 1 << 30},
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "yarn"}}, {"rope_scaling": {"type": "yarn", "factor": 4.0}}]),
    "model/model.safetensors": (TRAIN, [
        None, b"", b"<html>404</html>", lambda t: t.pop("model.norm.weight"),
        lambda t: t.update(extra=torch.ones(1)),
        lambda t: t.update({"model.norm.weight": torch.ones(63)})]),
    "model/tokenizer.model": (TRAIN, [None, b"none"]),
    "learned": (FOLD, [
        None, b"", {"format": "x"}, {"mode": "lora"}, {"mode": "channel"}, {"heads": "four"},
        {"head_size": "8"}, {"layers": "3"}, {"layers": "1"},
        lambda t: t.pop("layers.1.scale"), lambda t: t["layers.1.scale"].fill_(float("inf"))]),
    "t.jsonl": (FILE, [
        None, b"\n", b"{prompt}", b"[]", b'{"prompt": "x"}', b'{"prompt": "x", "answer": 3}',
        b'{"prompt": "x", "answer": "y", "expected": []}', b'{"input": "x", "outputs": [3]}',
        b'{"prompt": "x", "answer": "y", "prefix": 3}',
        rb'{"prompt": "\ud800", "answer": "y"}', b'{"prompt": "\xff", "answer": "y"}',
        b'{"prompt": "%s", "answer": "y"}' % (b"long " * 999)]),
    "essay.txt": (HAY, [None, b"", b"\x80"]),
}
CASES = [(name, new, line) for name, (line, news) in BROKEN.items() for new in news]


def ends_in_one_line(cli, line: str, words="") -> None:
    before = {p: p.is_file() and p.read_bytes() for p in Path().rglob("*")}
    status, out, err = cli(*line.split())
    last = re.split(r"[\r\n]", err.rstrip("\n"))[-1]
    assert (status, out) == (2, "") and last.startswith("seal.py: error: ") and words in last, err
    assert {p: p.is_file() and p.read_bytes() for p in Path().rglob("*")} == before


@pytest.mark.parametrize("line", LINES)
def test_a_wrong_command_line_is_one_line_and_nothing_is_written(line, good, cli):
    ends_in_one_line(cli, line)


@pytest.mark.parametrize("name, new, line", CASES)
def test_a_wrong_file_is_one_line_that_names_it_and_nothing_is_written(name, new, line, good, cli):
    path = Path(name)
    if new is None:
        path.unlink()
    elif isinstance(new, bytes):
        path.write_bytes(new)
    elif name == "learned" or callable(new):
        change_weights(path, new if callable(new) else dict, **({} if callable(new) else new))
    else:
        change_json(path, **new)
    ends_in_one_line(cli, line, path.name.split(".")[0])


def test_the_same_commands_work_when_nothing_is_wrong(good, cli):
    for line in (TRAIN, FILE, HAY, EVAL, SAY + "line", FOLD + "er"):
        status, _, err = cli(*line.split())
        assert status == 0, err


@pytest.mark.parametrize("name", [*BROKEN][:2] + ["learned", "t.jsonl", "model/tokenizer_config.json"])
def test_damaged_files_are_read_or_refused_in_one_line(name, good):
    rng, path, refused = random.Random(name), Path(name), 0
    whole = path.read_bytes()
    for _ in range(40):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            at, n = rng.randrange(min(len(data), 2000)), rng.choice([0, 1, 1, 9])
            data[at : at + n] = rng.choice([b"", b"0", b"-", b"null", b'"', b"}", b"9e9", b"\xff"])
        path.write_bytes(data[: rng.choice([len(data), len(data), rng.randrange(len(data))])])
        try:
            config = seal.read_config("model")
            seal.read_scales("learned", config)
            seal.load_model("model", config)(torch.tensor([[1, 2]]))
            run = seal.Run(task="t.jsonl")
            for sample in seal.make_samples(run, open_tokenizer("model"), 200, 9, "train"):
                sample.score("1")
        except UserError:
            refused += 1
    assert refused > 5


def test_files_are_no_longer_than_a_person_takes_in():
    root, tests = Path(seal.__file__).parent, (1000, 50000)
    limits = dict.fromkeys(root.glob("extras/*.py"), (300, 14000)) | {
        root / "seal.py": (1000, 48000),
        root / "export_gguf.py": (500, 25000),
        root / "README.md": (220, 14000), root / "test_seal.py": tests,
        root / "extras/test_extras.py": tests}
    for path, (lines, size) in limits.items():
        data = path.read_bytes()
        assert data.count(b"\n") <= lines and len(data) <= size, path
