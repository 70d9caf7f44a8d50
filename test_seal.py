"""The tests, also a set of worked examples: `python -m pytest -q` runs them all in a few minutes on two cores.

Nothing is downloaded. Checkpoints are small random models that transformers itself writes, so they have the layouts
real ones have; its logits, and llama.cpp's, are the references. The weights are drawn ten times larger than usual:
attention then is sharp, and a wrong position or a wrong scale shows in the logits.

The parts follow seal.py's: Shared, Model, Checkpoints and scales, Text, Data, Training, Evaluation, Heads, Export,
The toy, Trust. Helpers that one part uses stand at its head.
"""

import json
import os
import pickle
import random
import re
import resource
import select
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path

import gguf
import numpy as np
import peft
import pytest
import sentencepiece
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

import export_gguf
import seal

torch.set_num_threads(1)  # models this small run faster so
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
CPU = torch.device("cpu")
LLAMA_2 = seal.Config(32000, 4096, 11008, 32, 32, 32, 128, 4096)  # the 7B's shape


# ---------------------------------------------------------------------------------------------------------------------
# Shared
# ---------------------------------------------------------------------------------------------------------------------

# Text with what trips tokenizers: runs of spaces, tabs, line ends, apostrophes, accents.
TRICKY = [
    f"line {a}-{b}: REGISTER_CONTENT is <{i * 7919 % 50000}>, the {b} said to a {a} friend.\n"
    f"It's {i} o'clock,  ça va?\tOK!"
    for i, (a, b) in enumerate([("torpid", "kid"), ("ripe", "otter"), ("slow", "river"), ("bright", "lamp")] * 20)
]


def train_vocabulary(folder, text, **settings) -> Path:
    """A small tokenizer.model with Llama's settings: BPE, byte fallback, digits apart, a space put in front."""
    llama = dict(
        vocab_size=600, model_type="bpe", byte_fallback=True, split_digits=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, minloglevel=2,
    )
    prefix = str(Path(folder) / "tokenizer")
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(text), model_prefix=prefix, **llama | settings)
    return Path(folder) / "tokenizer.model"


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory) -> Path:
    """The tokenizer.model of nearly all tests, trained on what the tasks are made of: 600 pieces."""
    rng = random.Random(0)
    keys = [f"{rng.choice(seal.ADJECTIVES)}-{rng.choice(seal.NOUNS)}" for _ in range(800)]
    lines = [seal.LINE.format(key=key, number=rng.randint(1, 50000)) for key in keys]
    prose = [seal.prose(rng) for _ in range(800)]
    return train_vocabulary(tmp_path_factory.mktemp("vocabulary"), [seal.RECORD, *lines, *prose, *TRICKY])


def make_checkpoint(
    folder, vocabulary, seed=0, bin=False, shard_size="5GB", model=transformers.LlamaForCausalLM, dtype=torch.float32,
    **config,
):
    """A random checkpoint as transformers writes it, and the transformers model.

    bin: in the older .bin layout. vocabulary None: without a tokenizer. config: changes to config.json.
    """
    torch.manual_seed(seed)
    small = dict(vocab_size=608, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
                 max_position_embeddings=512, initializer_range=0.2)
    reference = model(model.config_class(**(small | config))).eval()
    for p in reference.parameters():
        if p.ndim == 1:  # biases and norms start at 0 and 1, where one that is dropped or misplaced would not show
            p.data += 0.2 * torch.randn_like(p)
    reference.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    if bin:  # newer transformers only writes safetensors; the layout is the same but for names and pickling
        for file in sorted(Path(folder).glob("*.safetensors")):
            name = file.name.replace("model", "pytorch_model", 1).replace(".safetensors", ".bin")
            torch.save(load_file(file), file.with_name(name))
            file.unlink()
        for index in Path(folder).glob("*.index.json"):
            text = index.read_text().replace("model-0", "pytorch_model-0").replace(".safetensors", ".bin")
            index.with_name("pytorch_model.bin.index.json").write_text(text)
            index.unlink()
    if vocabulary:
        shutil.copy(vocabulary, Path(folder) / "tokenizer.model")
    return reference


def spell_as_older_releases(folder) -> None:
    """config.json in the words of transformers 4.3x: rope_scaling with `type`, rope_theta beside it, torch_dtype."""
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"], kind = rope.pop("rope_theta"), rope.pop("rope_type")
    config["rope_scaling"] = None if kind == "default" else {"type": kind} | rope
    config["torch_dtype"] = config.pop("dtype")
    config["max_sequence_length"] = 2048
    if config["num_key_value_heads"] == config["num_attention_heads"]:
        del config["num_key_value_heads"]
    if config["head_dim"] * config["num_attention_heads"] == config["hidden_size"]:
        del config["head_dim"]
    path.write_text(json.dumps(config))


def spell_as_meta(source, folder) -> None:
    """The checkpoint in `source` as Meta would release it: two slices of every matrix, neighbours rotated as pairs."""
    config, weights, slices = json.loads((source / "config.json").read_text()), seal.Checkpoint(source), [{}, {}]
    names = {  # Hugging Face's: Meta's, and the dimension that is cut
        "embed_tokens": ("tok_embeddings", 1), "lm_head": ("output", 0), "norm": ("norm", None),
        "input_layernorm": ("attention_norm", None), "post_attention_layernorm": ("ffn_norm", None),
        "q_proj": ("attention.wq", 0), "k_proj": ("attention.wk", 0), "v_proj": ("attention.wv", 0),
        "o_proj": ("attention.wo", 1), "gate_proj": ("feed_forward.w1", 0), "down_proj": ("feed_forward.w2", 1),
        "up_proj": ("feed_forward.w3", 0),
    }
    for name in weights:
        tensor, part = weights[name].clone(), name.split(".")[-2]
        theirs, cut = names[part]
        if part in ("q_proj", "k_proj"):  # rows (heads, 2, d/2) -> (heads, d/2, 2)
            tensor = tensor.view(-1, 2, config["head_dim"] // 2, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        layer = re.search(r"layers\.\d+\.|$", name)[0]
        for i in (0, 1):
            half = tensor if cut is None else tensor.chunk(2, cut)[i]
            slices[i][f"{layer}{theirs}.weight"] = half.clone()
    folder.mkdir(parents=True)
    for i in (0, 1):
        torch.save(slices[i] | {"rope.freqs": torch.ones(config["head_dim"] // 2)}, folder / f"consolidated.0{i}.pth")
    params = dict(
        dim=config["hidden_size"], n_layers=config["num_hidden_layers"], n_heads=config["num_attention_heads"],
        n_kv_heads=config["num_key_value_heads"], norm_eps=config["rms_norm_eps"], vocab_size=-1,
    )
    (folder / "params.json").write_text(json.dumps(params))
    shutil.copy(source / "tokenizer.model", folder)


@pytest.fixture(scope="session")
def plain(tmp_path_factory, vocabulary) -> Path:
    """A checkpoint for everything that is not about layouts: grouped queries, 512 tokens of context."""
    folder = tmp_path_factory.mktemp("plain") / "ckpt"
    make_checkpoint(folder, vocabulary, num_key_value_heads=2)
    return folder


@pytest.fixture
def model(plain) -> seal.Llama:
    return load(plain)


@pytest.fixture(scope="session")
def tokenizer(plain) -> seal.Tokenizer:
    return seal.Tokenizer(plain, seal.read_config(plain))


def load(folder, spec="none", **kw) -> seal.Llama:
    return seal.load_model(folder, seal.extend(seal.read_config(folder), spec), CPU, **kw)


@torch.no_grad()
def logits(model, tokens) -> torch.Tensor:
    """(B, T, V) of either our model or transformers'."""
    return model.logits(model(tokens)) if isinstance(model, seal.Llama) else model(tokens).logits


def some_tokens(*shape, seed=0) -> torch.Tensor:
    return torch.randint(3, 600, shape, generator=torch.Generator().manual_seed(seed))


LEARNED = {"head": ["scale"], "channel": ["scale"], "lora": [f"{p}_proj.lora_{m}" for p in "qkvo" for m in "AB"]}


def make_scales(config, mode, path=None, **facts) -> list[torch.Tensor]:
    """Random scales around 1, or LoRA around 0; with a path also saved there, as `seal.py train` does, with facts."""
    torch.manual_seed(1)
    shapes = [*seal.learned_shapes(mode, config).values()] * config.num_hidden_layers
    scales = [0.2 * torch.randn(shape) if mode == "lora" else 1 + 0.5 * torch.randn(shape) for shape in shapes]
    if path:
        seal.save_scales(path, scales, config, **facts)
    return scales


def gap(a, b) -> float:
    return (a - b).abs().max().item()


def command(capsys, *arguments) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of `python seal.py ...`, without paying for a new process each time."""
    capsys.readouterr()
    status = seal.run("seal.py", seal.parse, [str(a) for a in arguments])
    return status, *capsys.readouterr()


# ---------------------------------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------------------------------

ROPES = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 24},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    {"rope_type": "yarn", "factor": 2.5, "original_max_position_embeddings": 64, "beta_fast": 8.0, "beta_slow": 2.0,
     "attention_factor": 1.3},
]


def draw_config(seed: int) -> tuple[dict, dict]:
    """(config.json's values, how the checkpoint is stored): kinds of heads and ropes in turn, the rest drawn."""
    rng = random.Random(seed)
    heads, groups = [(4, 4), (4, 2), (6, 2), (4, 1)][seed % 4]
    head_dim = rng.choice([6, 10, 12, 14, 18, 32])
    width = heads * head_dim if rng.random() < 0.3 else rng.choice([48, 72])
    config = dict(
        hidden_size=width, intermediate_size=rng.choice([40, 96]), num_attention_heads=heads,
        num_key_value_heads=groups, head_dim=head_dim, num_hidden_layers=2, tie_word_embeddings=rng.random() < 0.3,
        rms_norm_eps=rng.choice([1e-6, 1e-5, 0.5]), initializer_range=0.15,
        rope_parameters=ROPES[seed % 5] | {"rope_theta": rng.choice([100.0, 10000.0, 5e5])},
    )
    if rng.random() < 0.2:
        config |= dict(model=transformers.MistralForCausalLM, sliding_window=rng.choice([None, 4096]))
    else:
        config |= dict(attention_bias=rng.random() < 0.4, mlp_bias=rng.random() < 0.4)
    stored = dict(bin=rng.random() < 0.5, shard_size=rng.choice(["100KB", "5GB"]), old=seed // 4 % 2 == 1)
    return config, stored


@pytest.mark.parametrize("seed", range(24))
def test_logits_equal_transformers(seed, tmp_path, vocabulary):
    """On every supported layout and spelling, and the same comparison fails if rope or grouping is misread."""
    config, stored = draw_config(seed)
    reference = make_checkpoint(tmp_path, vocabulary, seed, stored["bin"], stored["shard_size"], **config)
    if stored["old"]:
        spell_as_older_releases(tmp_path)
    ours, tokens = load(tmp_path), some_tokens(2, 60, seed=seed)
    expected = logits(reference, tokens)
    assert gap(logits(ours, tokens), expected) < 1e-4
    assert ours.config.max_position_embeddings == (2048 if stored["old"] else 512)
    assert ours.config.tie_word_embeddings == (ours.lm_head.weight is ours.embed_tokens.weight)

    if config["rope_parameters"]["rope_type"] != "default":
        ours.frequencies, ours.magnitude = seal.rope_frequencies(
            seal.replace(ours.config, rope_scaling={"rope_type": "default"})
        )
        assert gap(logits(ours, tokens), expected) > 1e-2
        ours.frequencies, ours.magnitude = seal.rope_frequencies(ours.config)
    G, d = config["num_key_value_heads"], ours.config.head_dim
    if G > 1:  # query head h must read key-value head h // (H / G), so their order matters
        for layer in ours.layers:
            for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
                projection.weight.data = projection.weight.data.view(G, d, -1).flip(0).reshape(G * d, -1)
        assert gap(logits(ours, tokens), expected) > 1e-2


def test_the_drawn_configs_cover_what_they_should():
    draws = [draw_config(seed) for seed in range(24)]
    seen = {
        (key, value)
        for config, stored in draws
        for key, value in (config | stored).items()
        if not isinstance(value, dict)
    }
    for key, value in [
        ("tie_word_embeddings", True), ("attention_bias", True), ("mlp_bias", True), ("sliding_window", None),
        ("sliding_window", 4096),
    ]:
        assert (key, value) in seen, key
    layouts = {(s["bin"], s["shard_size"]) for _, s in draws}
    assert len(layouts) == 4, "single and sharded, safetensors and .bin"
    kinds = {(c["rope_parameters"]["rope_type"], s["old"]) for c, s in draws}
    assert len(kinds) == 8, "four kinds of rope in two spellings"
    assert any(c["head_dim"] * c["num_attention_heads"] != c["hidden_size"] and c["head_dim"] % 4 for c, _ in draws)


def test_bf16_checkpoints_are_read_in_float32_on_a_cpu_unless_told_otherwise(tmp_path, vocabulary):
    make_checkpoint(tmp_path, vocabulary, dtype=torch.bfloat16)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert load(tmp_path).embed_tokens.weight.dtype == torch.float32
    assert gap(logits(load(tmp_path), some_tokens(1, 30)), logits(reference, some_tokens(1, 30))) < 1e-4
    half = load(tmp_path, dtype=torch.bfloat16)
    assert half.embed_tokens.weight.dtype == torch.bfloat16 and half.scales()[0].dtype == torch.float32


@pytest.mark.parametrize("s, base", [(2, 20221), (4, 40890), (8, 82685)])
def test_ntk_base_is_the_published_one_and_stretches_only_what_it_should(s, base):
    stretched = seal.extend(LLAMA_2, f"ntk:{s}")
    assert round(stretched.rope_theta) == base and stretched.max_position_embeddings == 4096 * s
    ratio = seal.rope_frequencies(LLAMA_2)[0] / seal.rope_frequencies(stretched)[0]
    assert ratio[0] == 1 and ratio[-1].item() == pytest.approx(s, rel=1e-5) and (ratio.diff() > 0).all()


@pytest.mark.parametrize(
    "spec, theirs",
    [
        ("none", {"rope_type": "default"}),
        ("linear:4", {"rope_type": "linear", "factor": 4.0}),
        ("yarn:4", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}),
        ("yarn:1", {"rope_type": "yarn", "factor": 1.0, "original_max_position_embeddings": 4096}),
    ],
)
def test_extensions_have_transformers_frequencies(spec, theirs):
    config = transformers.LlamaConfig(
        head_dim=128, max_position_embeddings=16384, rope_parameters=theirs | {"rope_theta": 10000.0}
    )
    rope = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    frequencies, magnitude = seal.rope_frequencies(seal.extend(LLAMA_2, spec))
    torch.testing.assert_close(frequencies, rope.inv_freq, rtol=1e-6, atol=0)
    assert magnitude == pytest.approx(rope.attention_scaling)


def test_extensions_of_extended_checkpoints():
    """LongChat is linear:8 already: linear multiplies, ntk goes with anything, yarn is refused."""
    longchat = seal.extend(LLAMA_2, "linear:8")
    assert seal.extend(longchat, "linear:2") == seal.extend(LLAMA_2, "linear:16")
    assert seal.extend(longchat, "ntk:2").rope_scaling == longchat.rope_scaling
    with pytest.raises(seal.UserError, match="already has rope type linear; use ntk:S"):
        seal.extend(longchat, "yarn:2")


@pytest.mark.parametrize("rope", ROPES[:4], ids=lambda r: r["rope_type"])
def test_cached_generation_of_unequal_prompts_equals_uncached_and_transformers(rope, tmp_path, vocabulary):
    reference = make_checkpoint(
        tmp_path, vocabulary, num_key_value_heads=2, rope_parameters=rope | {"rope_theta": 1e4},
        tie_word_embeddings=True,
    )
    ours, prompts = load(tmp_path), [some_tokens(n, seed=n).tolist() for n in (5, 40, 1, 17)]
    together = seal.generate(ours, prompts, 12)
    for prompt, answer in zip(prompts, together):
        ids = list(prompt)
        for _ in range(12):
            ids.append(int(logits(ours, torch.tensor([ids]))[0, -1].argmax()))
        assert answer == ids[len(prompt) :]
        theirs = reference.generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=-1
        )
        assert answer == theirs[0, len(prompt) :].tolist()


def test_self_extend_reads_pieces_and_unequal_prompts_as_it_reads_all_at_once(plain, monkeypatch):
    """Through the cache, and in chunks of queries, as without either; groups of one are plain attention."""
    model, tokens = load(plain, "self:3,10"), some_tokens(2, 60)
    assert model.config.max_position_embeddings == (512 - 10) * 3 + 10
    expected, base = logits(model, tokens), logits(load(plain), tokens)
    assert gap(expected[:, :10], base[:, :10]) < 1e-4 and gap(expected[:, 10:], base[:, 10:]) > 1
    assert gap(logits(load(plain, "self:1,10"), tokens), base) < 1e-4
    monkeypatch.setattr(seal, "CHUNK", 8)
    cache, parts = seal.Cache(model, 2, 60), []
    with torch.no_grad():
        for piece in tokens.split([7, 30, 1, 1, 21], dim=1):
            parts.append(model.logits(model(piece, cache)))
    assert gap(torch.cat(parts, dim=1), expected) < 1e-4

    prompts = [tokens[0, :41].tolist(), tokens[1, :13].tolist()]
    for prompt, answer in zip(prompts, seal.generate(model, prompts, 15)):
        found = logits(model, torch.tensor([prompt + answer]))[0, len(prompt) - 1 : -1]
        assert found.argmax(-1).tolist() == answer


def test_a_cache_is_used_whether_gradients_are_on_or_not(model):
    tokens = some_tokens(1, 20)
    with torch.enable_grad():
        cache = seal.Cache(model, 1, 20)
        model(tokens[:, :15], cache)
        last = model.logits(model(tokens[:, 15:], cache))
    assert gap(last, logits(model, tokens)[:, 15:]) < 1e-4


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("last", [1, 3, 7, 13, 19, 20])
def test_the_last_positions_alone_are_what_they_are_among_all(last, cached, tmp_path, vocabulary, monkeypatch):
    """Also when they are more than a chunk, or read on a cache; and the last block works for no others."""
    make_checkpoint(tmp_path, vocabulary, num_key_value_heads=2, attention_bias=True)
    model, tokens, seen = load(tmp_path), some_tokens(3, 30), []
    monkeypatch.setattr(seal, "CHUNK", 16)
    model.layers[-1].self_attn.o_proj.register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    with torch.no_grad():
        cache = seal.Cache(model, 3, 30) if cached else None
        if cached:
            model(tokens[:, :10], cache, last)
            tokens = tokens[:, 10:]
        alone = model(tokens, cache, last)
        if cached:
            cache.lengths, cache.width = cache.lengths - 20, 10  # read them again
        assert gap(alone, model(tokens, cache)[:, -last:]) < 1e-5
    everyone = tokens.shape[1]
    assert seen[-2:] == [last if last <= 16 else everyone, everyone]


def test_generation_ends_before_the_first_stop_token_of_each_row(model):
    prompts = [some_tokens(n, seed=n).tolist() for n in (5, 9)]
    free = seal.generate(model, prompts, 10)
    stop = free[0][4]
    cut = [answer[: answer.index(stop)] if stop in answer else answer for answer in free]
    assert seal.generate(model, prompts, 10, {stop}) == cut and len(cut[0]) <= 4


def test_a_sliding_window_is_exact_up_to_its_size_and_refused_beyond(tmp_path, vocabulary):
    reference = make_checkpoint(
        tmp_path, vocabulary, model=transformers.MistralForCausalLM, num_key_value_heads=2, sliding_window=32
    )
    ours, tokens = load(tmp_path), some_tokens(1, 40)
    assert gap(logits(ours, tokens[:, :32]), logits(reference, tokens[:, :32])) < 1e-4
    with pytest.raises(seal.UserError, match="33 tokens exceed the .*sliding window of 32"):
        logits(ours, tokens[:, :33])
    assert len(seal.generate(ours, [tokens[0, :30].tolist()], 3)[0]) == 3  # the third token is never read: 32 in all
    with pytest.raises(seal.UserError, match="sliding window"):
        seal.generate(ours, [tokens[0, :30].tolist()], 4)
    with pytest.raises(seal.UserError, match="sliding window"):
        seal.make_samples("lines", None, ours.config, 33, 1, "train")


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints and scales
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["channel", "lora"])
def test_metas_own_release_is_the_checkpoint_it_was_converted_to(mode, vocabulary, tmp_path, capsys):
    """params.json and two slices of every matrix: the same config, logits and, folded, the same as scaled."""
    source, meta, out, path = (tmp_path / name for name in ("ckpt", "meta", "out", "s.safetensors"))
    reference = make_checkpoint(
        source, vocabulary, num_key_value_heads=2, rms_norm_eps=1e-5, max_position_embeddings=4096
    )
    spell_as_meta(source, meta)
    ours, tokens = load(meta), some_tokens(2, 60)
    assert ours.config == seal.read_config(source)
    assert torch.equal(logits(ours, tokens), logits(load(source), tokens))
    assert gap(logits(ours, tokens), logits(reference, tokens)) < 1e-4

    ours.set_scales(make_scales(ours.config, mode, path))
    status, _, err = command(capsys, "fold", "--ckpt", meta, "--scales", path, "--out", out)
    assert status == 0, err
    assert seal.read_config(out) == ours.config and not (out / "params.json").exists()
    assert gap(logits(load(out), tokens), logits(ours, tokens)) < 1e-4


def test_transformers_reads_a_folded_release_of_metas(vocabulary, tmp_path, capsys):
    source, meta, out, path = (tmp_path / name for name in ("ckpt", "meta", "out", "s.safetensors"))
    make_checkpoint(source, vocabulary, num_key_value_heads=2, rms_norm_eps=1e-5, max_position_embeddings=4096)
    spell_as_meta(source, meta)
    ours, tokens = load(meta), some_tokens(2, 60)
    ours.set_scales(make_scales(ours.config, "channel", path))
    assert command(capsys, "fold", "--ckpt", meta, "--scales", path, "--out", out)[0] == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert gap(logits(theirs, tokens), logits(ours, tokens)) < 1e-4


@pytest.mark.parametrize("mode", ["head", "channel", "lora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_of_one_are_the_base_model_bit_for_bit(mode, dtype, plain, monkeypatch):
    """What reaches o_proj is attention's own output, every bit of it; so, too, where LoRA starts, and after LoRA."""
    model, plain_outputs, inputs = load(plain, dtype=dtype), [], []
    base = logits(model, some_tokens(2, 30))
    model.set_scales(make_scales(model.config, "lora"))
    assert gap(logits(model, some_tokens(2, 30)), base) > 1e-1
    model.reset_scales(mode)
    assert torch.equal(logits(model, some_tokens(2, 30)), base)
    attention = seal.F.scaled_dot_product_attention
    monkeypatch.setattr(
        seal.F, "scaled_dot_product_attention",
        lambda *a, **k: plain_outputs.append(attention(*a, **k)) or plain_outputs[-1],
    )
    for layer in model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    logits(model, some_tokens(2, 30))
    assert len(inputs) == 3
    for x, y in zip(inputs, plain_outputs):
        assert x.dtype == dtype and torch.equal(x, y.transpose(1, 2).reshape(x.shape))


@pytest.mark.parametrize("mode, size", [("head", 1024), ("channel", 131072), ("lora", 4194304)])
def test_a_7b_has_as_many_trainable_scales_as_the_paper_says(mode, size):
    seven_b = seal.Config(32000, 4096, 11008, 32, 32, 32, 128, 4096)
    with torch.device("meta"):
        model = seal.Llama(seven_b)
        model.reset_scales(mode)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == size


def test_scales_survive_their_file_and_other_programs_can_read_it(tmp_path, model):
    for mode, names in LEARNED.items():
        path = tmp_path / "s.safetensors"
        scales = make_scales(model.config, mode, path, extend="ntk:2", lr=0.01)
        back, about = seal.read_scales(path, model.config)
        assert all(torch.equal(a, b) for a, b in zip(scales, back, strict=True))
        assert about == {
            "format": "seal-1", "mode": mode, "heads": "4", "head_size": "16", "layers": "3", "extend": "ntk:2",
            "lr": "0.01",
        }
        tensors = load_file(path)
        named = zip([f"layers.{i}.{name}" for i in range(3) for name in names], scales, strict=True)
        assert {name: t.shape for name, t in tensors.items()} == {name: scale.shape for name, scale in named}


def test_scales_of_another_model_are_refused(tmp_path, model):
    config, path = model.config, tmp_path / "s.safetensors"
    for mode, other in [
        ("head", dict(num_hidden_layers=2)), ("head", dict(num_attention_heads=8)), ("channel", dict(head_dim=8)),
        ("lora", dict(num_hidden_layers=4)), ("lora", dict(hidden_size=32)), ("lora", dict(num_key_value_heads=4)),
    ]:
        make_scales(seal.replace(config, **other), mode, path)
        with pytest.raises(seal.UserError, match="the model has 3 of"):
            seal.read_scales(path, config)


@pytest.mark.parametrize(
    "mode, spec, old, bin, shard_size",
    [
        ("head", "none", False, False, "5GB"),
        ("channel", "ntk:4", False, True, "5GB"),
        ("channel", "ntk:2", True, False, "200KB"),
        ("head", "linear:2", True, True, "200KB"),
        ("head", "linear:2.5", False, False, "5GB"),
        ("channel", "yarn:4", False, False, "200KB"),
        ("channel", "yarn:2", True, False, "5GB"),
        ("lora", "none", False, False, "5GB"),
        ("lora", "ntk:4", True, True, "200KB"),
    ],
)
def test_folded_equals_unfolded(mode, spec, old, bin, shard_size, tmp_path, vocabulary, capsys):
    """The folder that `fold` writes, read by seal.py and by transformers, is the scaled and extended model."""
    make_checkpoint(
        tmp_path / "ckpt", vocabulary, 0, bin, shard_size, num_key_value_heads=2, head_dim=20,
        max_position_embeddings=64, initializer_range=0.15, attention_bias=mode == "lora",
    )
    if old:
        spell_as_older_releases(tmp_path / "ckpt")
    before, tokens = load(tmp_path / "ckpt", spec), some_tokens(2, 90)
    before.set_scales(make_scales(before.config, mode, tmp_path / "s.safetensors", extend=spec))
    expected = logits(before, tokens)
    assert gap(expected, logits(load(tmp_path / "ckpt"), tokens)) > 1e-1  # the scales matter

    status, _, err = command(
        capsys, "fold", "--ckpt", tmp_path / "ckpt", "--scales", tmp_path / "s.safetensors", "--out", tmp_path / "out"
    )
    assert status == 0, err
    assert seal.read_config(tmp_path / "out") == before.config
    assert gap(logits(load(tmp_path / "out"), tokens), expected) < 1e-4
    assert gap(logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out"), tokens), expected) < 1e-4
    assert (tmp_path / "out" / "tokenizer.model").exists()
    if old and not spec.startswith("ntk"):  # releases before 4.43 know no rope_type
        assert json.loads((tmp_path / "out" / "config.json").read_text())["rope_scaling"]["type"] == spec.split(":")[0]
    weights, source = seal.Checkpoint(tmp_path / "out"), seal.Checkpoint(tmp_path / "ckpt")
    folded = re.compile("[qkvo]_proj.weight" if mode == "lora" else "o_proj.weight")
    assert all(torch.equal(weights[name], source[name]) != bool(folded.search(name)) for name in source)


def test_a_folded_checkpoint_keeps_the_template_of_its_sources_name(tmp_path, vocabulary, capsys):
    source, out, scales = tmp_path / "longchat-7b", tmp_path / "mine", tmp_path / "s.safetensors"
    make_checkpoint(source, vocabulary)
    make_scales(seal.read_config(source), "head", scales)
    assert command(capsys, "fold", "--ckpt", source, "--scales", scales, "--out", out)[0] == 0
    assert seal.guess_template(out)[0] == seal.guess_template(source)[0] == "vicuna"


def test_a_bf16_checkpoint_is_folded_in_float32_and_rounded_once(tmp_path, vocabulary, capsys):
    make_checkpoint(tmp_path / "ckpt", vocabulary, dtype=torch.bfloat16)
    scales = make_scales(seal.read_config(tmp_path / "ckpt"), "channel", tmp_path / "s.safetensors")
    folded = ("fold", "--ckpt", tmp_path / "ckpt", "--scales", tmp_path / "s.safetensors", "--out", tmp_path / "out")
    assert command(capsys, *folded)[0] == 0
    before, after = seal.Checkpoint(tmp_path / "ckpt"), seal.Checkpoint(tmp_path / "out")
    assert list(before) == list(after) and {after[name].dtype for name in after} == {torch.bfloat16}
    for i, scale in enumerate(scales):
        name = f"model.layers.{i}.self_attn.o_proj.weight"
        assert torch.equal(after[name], (before[name].float() * scale).bfloat16())


def test_lora_is_added_to_bf16_weights_in_float32_and_rounded_once(tmp_path, vocabulary):
    """Against float64: never farther from it than half a step of bf16's eight bits."""
    make_checkpoint(tmp_path, vocabulary, num_key_value_heads=2, dtype=torch.bfloat16)
    model, weights = load(tmp_path), seal.Checkpoint(tmp_path)
    scales = make_scales(model.config, "lora")
    model.set_scales(scales)
    for name in (n for n in weights if re.search("[qkvo]_proj", n)):
        module = model.get_submodule(name.removeprefix("model.").removesuffix(".weight"))
        exact = weights[name].double() + module.lora_B.double() @ module.lora_A.double()
        folded = seal.fold(name, weights[name], scales)
        half_step = 2.0 ** (exact.abs().log2().floor() - 8)
        assert ((folded.bfloat16().double() - exact).abs() <= half_step * (1 + 1e-4)).all()
        some = torch.randperm(len(exact))[:5]  # rows by themselves, in any order, are the same rows
        assert torch.equal(seal.fold(name, weights[name], scales, some), folded[some])


@pytest.mark.parametrize("groups", [4, 2])
def test_folding_into_v_proj_would_be_right_for_multi_head_attention_only(groups, tmp_path, vocabulary):
    """With grouped queries a value head serves several query heads, whose scales differ: o_proj is the place."""
    make_checkpoint(tmp_path, vocabulary, num_key_value_heads=groups)
    scaled, by_o, by_v, tokens = load(tmp_path), load(tmp_path), load(tmp_path), some_tokens(1, 30)
    scales = make_scales(scaled.config, "head")
    scaled.set_scales(scales)
    for i, s in enumerate(scales):
        name = f"layers.{i}.self_attn.o_proj.weight"
        by_o.get_parameter(name).data = seal.fold(name, by_o.get_parameter(name).data, scales)
        rows = s[:: 4 // groups].repeat_interleave(16)  # the best a value head can do: one of its query heads' scales
        by_v.get_parameter(f"layers.{i}.self_attn.v_proj.weight").data *= rows[:, None]
    expected = logits(scaled, tokens)
    assert gap(logits(by_o, tokens), expected) < 1e-4
    assert (gap(logits(by_v, tokens), expected) < 1e-4) == (groups == 4)


# ---------------------------------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------------------------------

TEMPLATED = {  # whole conversations, from FastChat's; the prompt is "Say hi" and the answer "Hi there"
    "none": "Say hi Hi there",
    "vicuna": "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions. USER: Say hi ASSISTANT: Hi there",
    "llama-2": "[INST] Say hi [/INST] Hi there ",
    "mistral": "[INST] Say hi [/INST] Hi there",
}


@pytest.fixture(scope="session")
def llama3(tmp_path_factory) -> Path:
    """A checkpoint as Llama-3's: a byte-level tokenizer.json, with special tokens, and no tokenizer.model."""
    folder = tmp_path_factory.mktemp("llama3") / "ckpt"
    make_checkpoint(folder, None)
    model = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=True))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(export_gguf.LLAMA3_SPLIT), "isolated"),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    model.decoder = tokenizers.decoders.ByteLevel()
    special = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"]
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(["Say hi to the user", *TRICKY], trainer)
    model.save(str(folder / "tokenizer.json"))
    hints = {
        "bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>",
        "chat_template": "{{ '<|start_header_id|>' }}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(hints))
    return folder


@pytest.mark.parametrize("name", TEMPLATED)
def test_prompt_and_answer_are_the_whole_conversation_tokenised_at_once(name, plain, vocabulary):
    """One BOS in front, the space before the answer once, the end token after it."""
    tokenizer = seal.Tokenizer(plain, seal.read_config(plain), name)
    whole = sentencepiece.SentencePieceProcessor(model_file=str(vocabulary)).encode(TEMPLATED[name])
    prompt, answer = tokenizer.prompt("Say hi"), tokenizer.answer("Hi there")
    assert prompt + answer == [tokenizer.bos] + whole + [tokenizer.eos]
    assert tokenizer.decode(prompt + answer[:-1]).strip() == TEMPLATED[name].strip()


def test_llama_3_has_one_bos_and_its_special_tokens(llama3):
    tokenizer = seal.Tokenizer(llama3, seal.read_config(llama3))
    assert tokenizer.template == "llama-3"
    assert tokenizer.why.endswith("chat template has <|start_header_id|>")
    prompt, answer = tokenizer.prompt("Say hi"), tokenizer.answer("Hi there")
    reference = tokenizers.Tokenizer.from_file(str(llama3 / "tokenizer.json"))
    whole = (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nSay hi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHi there<|eot_id|>"
    )
    assert prompt + answer == reference.encode(whole).ids
    assert prompt.count(tokenizer.bos) == 1
    assert tokenizer.stop >= {tokenizer.id("<|eot_id|>"), tokenizer.id("<|end_of_text|>")}


@pytest.mark.parametrize("name", ["none", "vicuna", "mistral"])
def test_byte_level_tokenizers_put_the_space_before_the_answer_too(name, llama3):
    """sentencepiece adds it by itself, tokenizer.json does not: either way the whole conversation comes out."""
    (tokenizer := seal.Tokenizer(llama3, seal.read_config(llama3), "none")).template = name
    assert tokenizer.decode(tokenizer.prompt("Say hi") + tokenizer.answer("Hi there")[:-1]) == TEMPLATED[name]


def test_pieces_added_to_a_sentencepiece_vocabulary_are_one_token(plain, tmp_path):
    """As fine-tuned checkpoints have them: added_tokens.json, ids beyond tokenizer.model's and even the embedding."""
    shutil.copytree(plain, tmp_path, dirs_exist_ok=True)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|call|>": 600, "<pad>": 601, "<far>": 608}))
    tokenizer = seal.Tokenizer(tmp_path, seal.read_config(plain), "none")
    base = seal.Tokenizer(plain, seal.read_config(plain), "none")
    assert tokenizer.encode("the line<|call|>the line") == base.encode("the line") + [600] + base.encode("the line")
    assert (tokenizer.id("<pad>"), tokenizer.id("no such piece"), tokenizer.size) == (601, None, 602)
    assert tokenizer.id("<far>") is None and tokenizer.encode("a <far> line") == base.encode("a <far> line")


def test_a_checkpoint_may_go_without_bos(plain, tmp_path):
    shutil.copytree(plain, tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": False}))
    ours, usual = (seal.Tokenizer(folder, seal.read_config(plain), "none") for folder in (tmp_path, plain))
    assert ours.prompt("Say hi") == ours.encode("Say hi") == usual.prompt("Say hi")[1:]


@pytest.mark.parametrize(
    "folder, chat, expected, why",
    [
        ("x", "[INST] <<SYS>>", "llama-2", "chat template has <<SYS>>"),
        ("vicuna-copy", "[INST]", "mistral", "chat template has [INST]"),
        ("x", "USER: ASSISTANT:", "vicuna", "chat template has ASSISTANT"),
        ("longchat-7b-v1.5-32k", None, "vicuna", "the name has"),
        ("vicuna-13b-v1.5-16k", None, "vicuna", "the name has"),
        ("Llama-2-7b-chat-hf", None, "llama-2", "the name has"),
        ("Llama-2-7b-hf", None, "none", "no known name"),
        ("Mistral-7B-Instruct-v0.2", None, "mistral", "the name has"),
        ("Meta-Llama-3.1-8B-Instruct", None, "llama-3", "the name has"),
        ("renamed", None, "none", "no chat template and no known name"),
    ],
)
def test_auto_takes_the_checkpoints_own_hint_then_its_name_and_says_which(folder, chat, expected, why, tmp_path):
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "config.json").write_text("{}")
    if chat:
        (tmp_path / folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": chat}))
    name, reason = seal.guess_template(tmp_path / folder)
    assert name == expected and why in reason


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


class Words:
    """A tokenizer for tests that count: a token is a word, and a line of the record is five."""

    prompt = answer = encode = staticmethod(str.split)


def record_of(sample) -> list[tuple[str, int]]:
    """(key, number) of every line of a record."""
    return [(key, int(n)) for key, n in re.findall(r"^line (.+): REGISTER_CONTENT is <(\d+)>$", sample.prompt, re.M)]


LONGEVAL = {  # the fields of a case in LongEval's own files, and its wording; real keys are not always [a-z]+-[a-z]+
    "random_idx": ["ad hoc-supporter", 1],
    "expected_number": 307,
    "num_lines": 3,
    "token_size": 170,
    "correct_line": "line ad hoc-supporter: REGISTER_CONTENT is <307>\n",
    "prompt_length": -1,
    "prompt": "Below is a record of lines I want you to remember. Each line begins with 'line <line index>' and "
    "contains a '<REGISTER_CONTENT>' at the end of the line as a numerical value. For each line index, memorize its "
    "corresponding <REGISTER_CONTENT>. At the end of the record, I will ask you to retrieve the corresponding "
    "<REGISTER_CONTENT> of a certain line index. Now the record start:\n\n"
    "line wide-eyed-exam: REGISTER_CONTENT is <49232>\n"
    "line ad hoc-supporter: REGISTER_CONTENT is <307>\n"
    "line abnormal-CD: REGISTER_CONTENT is <12>\n"
    "\nNow the record is over. Tell me what is the <REGISTER_CONTENT> in line ad hoc-supporter? I need the number. ",
}


def test_longevals_own_files_are_read_and_judged_as_longeval_does(tmp_path):
    path = tmp_path / "longeval.jsonl"
    path.write_text(json.dumps(LONGEVAL) + "\n\n")
    (sample,) = seal.read_jsonl(path)
    assert sample.prompt == LONGEVAL["prompt"]  # the trailing space, too
    assert sample.answer == "The <REGISTER_CONTENT> in line ad hoc-supporter is 307." and sample.expected == 307
    for text, right in [
        (sample.answer, 1), ("It is 307", 1), ("<307>", 1), ("000307", 1), ("49232, no: 307!", 1), ("307 or 12", 0),
        ("3070", 0), ("30 7", 0), ("none", 0), ("", 0),
    ]:
        assert sample.score(text) == right, text


def test_the_generated_record_is_worded_as_longevals_to_the_letter():
    keys = [("wide-eyed-exam", 49232), ("ad hoc-supporter", 307), ("abnormal-CD", 12)]
    lines = "".join(seal.LINE.format(key=k, number=n) for k, n in keys)
    assert seal.LINE.format(key="ad hoc-supporter", number=307) == LONGEVAL["correct_line"]
    made = seal.RECORD.format(lines=lines, key="ad hoc-supporter")
    assert made + " " == LONGEVAL["prompt"]  # the space is in LongEval's files, not in its generator


def test_lines_have_unique_keys_numbers_to_50000_and_a_uniform_question():
    samples = seal.make_samples("lines", Words, LLAMA_2, 89 + 44, 600, "train")
    places, numbers = Counter(), []
    for sample in samples:
        record = record_of(sample)
        asked = re.search(r"in line (.+)\? I need", sample.prompt)[1]
        places[[key for key, _ in record].index(asked)] += 1
        numbers += [n for _, n in record]
        assert len({key for key, _ in record}) == len(record) == 10
        assert sample.expected == dict(record)[asked]
        assert sample.answer == f"The <REGISTER_CONTENT> in line {asked} is {sample.expected}."
        assert sample.score(sample.answer) == 1
    assert sum((places[i] - 60) ** 2 / 60 for i in range(10)) < 27.9  # chi-square, 9 degrees: 1 in 1000 by chance
    tenths = Counter((n - 1) // 5000 for n in numbers)
    assert min(numbers) >= 1 and max(numbers) <= 50000 and sum((tenths[i] - 600) ** 2 / 600 for i in range(10)) < 27.9


def test_long_records_have_unique_keys_too():
    """9,000 lines, when there are 8,010 pairs of an adjective and a noun."""
    sample = seal.lines_sample(random.Random(0), Words, 84 + 5 * 9000)
    record = record_of(sample)
    assert len({key for key, _ in record}) == len(record) == 9000 > len(seal.KEYS)
    asked = re.search(r"in line (.+)\? I need", sample.prompt)[1]
    assert sample.expected == dict(record)[asked]


@pytest.mark.parametrize("task", ["lines", "needle"])
@pytest.mark.parametrize("length", [400, 440, 500])
def test_prompts_fill_the_budget_and_never_exceed_it(task, length, plain):
    """Template and BOS included; one more line, or sentence, would not have fitted."""
    unit = 32 if task == "lines" else 24  # no line of the vocabulary is longer, and no sentence
    for template in ("none", "vicuna"):
        tokenizer = seal.Tokenizer(plain, seal.read_config(plain), template)
        for sample in seal.make_samples(task, tokenizer, LLAMA_2, length, 4, "eval", depths=[0, 100]):
            assert length - unit < len(tokenizer.prompt(sample.prompt)) <= length == sample.length


@pytest.mark.parametrize("task", ["lines", "needle"])
def test_samples_are_seeded_and_training_shares_no_prompt_with_evaluation(task):
    def make(split, seed=0, avoid=()):
        return [
            s.prompt for s in seal.make_samples(task, Words, LLAMA_2, 200, 40, split, seed, [0, 50, 100], avoid=avoid)
        ]

    train, test = make("train"), make("eval")
    assert train == make("train") and train != make("train", 1) and len(set(train + test)) == 80
    avoid = [seal.prompt_id(p) for p in test[:3]]
    assert make("eval", avoid=avoid) == test[3:]


ESSAY = "Is this text? It is! Mr. Poe's first sentence is longer than\nthe others, since he has time.  " + " ".join(
    f"Sentence {i} says{' very' * (i % 7)} little." for i in range(60)
)


@pytest.mark.parametrize("haystack", [None, "essay.txt"])
@pytest.mark.parametrize("depth", [0, 10, 50, 75, 100])
def test_a_needle_lands_at_its_depth_between_two_sentences(haystack, depth, tokenizer, tmp_path):
    if haystack:
        haystack = tmp_path / haystack
        haystack.write_text(ESSAY)
    fact, question = seal.TEST_NEEDLE
    for sample in seal.make_samples("needle", tokenizer, LLAMA_2, 700, 4, "eval", 0, [depth], haystack):
        before, after = sample.prompt.removesuffix(f"\n\n{question}").split(fact)
        assert sample.prompt.endswith(question) and sample.depth == depth
        assert sample.answer == fact and sample.score(fact) == 1
        assert before == "" or re.search(r"[.!?] $", before)
        assert after == "" or after.startswith(" ")
        counts = [len(tokenizer.encode(text)) if text.strip() else 0 for text in (before, after)]
        longest = max(len(tokenizer.encode(s)) for s in re.split(r"(?<=[.!?])\s", before + after))
        assert -longest - 1 <= counts[0] - depth / 100 * sum(counts) <= 1, (
            "the needle goes before the sentence that the depth falls into"
        )
        if depth in (0, 100):
            assert counts[depth // 100] == 0
        if haystack:  # nothing is lost or reordered, going round when the text ends
            assert " ".join((before.strip() + after).split()) in " ".join(ESSAY.split() * 3)


def test_training_needles_are_not_the_test_needle():
    samples = seal.make_samples("needle", Words, LLAMA_2, 100, 60, "train")
    assert len({s.answer for s in samples}) == 10
    assert not any("San Francisco" in s.prompt or "Dolores" in s.prompt + s.answer for s in samples)
    assert all(s.answer in s.prompt and 0 <= s.depth <= 100 for s in samples)
    for fact, question in [*seal.TRAINING_NEEDLES, seal.TEST_NEEDLE]:  # the needle restates its question
        assert fact.startswith("The best" + question.removeprefix("What is the best").rstrip("?"))


def test_a_users_own_file_is_split_between_training_and_evaluation(tmp_path):
    rows = [{"prompt": f"Question {i}?", "answer": f"It is {i}.", "expected": i} for i in range(20)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    make = lambda split, count, **kw: seal.make_samples(tmp_path / "t.jsonl", Words, LLAMA_2, 50, count, split, **kw)
    train = make("train", 12)
    test = make("eval", 50, avoid=[seal.prompt_id(s.prompt) for s in train])
    assert len(train) == 12 and {s.prompt for s in train + test} == {r["prompt"] for r in rows} and len(test) == 8
    assert all(s.expected == int(s.prompt[9:-1]) for s in train)


@pytest.mark.parametrize(
    "expected, answer, text, score",
    [
        (7, "", "It was 9, now 7.", 1),
        (7, "", "7, not 9", 0),
        (7, "", "seven", 0),
        ("Paris", "", "I think it is PARIS.", 1),
        ("Paris", "", "Par is", 0),
        (None, "the blue door", "The door: blue!", 1),
        (None, "the blue door", "blue", 1 / 3),
        (None, "a a b", "a", 1 / 3),
        (None, "a b", "", 0),
    ],
)
def test_judges(expected, answer, text, score):
    """A number: the last one in the text. A string: contained, ignoring case. Neither: the answer's words recalled."""
    assert seal.Sample("", answer, expected).score(text) == pytest.approx(score)


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def slow_loss(model: seal.Llama, tokens: list[int], scales: list[torch.Tensor], count: int, group=1, window=1):
    """The loss on the last `count` tokens, in float64 and by the book: a head, a position, a softmax at a time.

    By Self-Extend's book, a key by itself, too: beyond the window it stands at its group's position.
    """
    c, weights = model.config, {name: p.detach().double() for name, p in model.named_parameters()}
    H, G, d = c.num_attention_heads, c.num_key_value_heads, c.head_dim

    def norm(x, weight):
        return x / (x.pow(2).mean(-1, keepdim=True) + c.rms_norm_eps).sqrt() * weight

    def turn(x, positions):  # (T, d): channels i and i + d/2 are a complex number, turned by position * base^(-2i/d)
        pairs = torch.complex(x[:, : d // 2], x[:, d // 2 :])
        angles = torch.tensor(
            [[t / c.rope_scaling.get("factor", 1) * c.rope_theta ** (-2 * i / d) for i in range(d // 2)]
             for t in positions], dtype=torch.float64
        ).view(-1, d // 2)
        pairs = pairs * torch.polar(torch.ones_like(angles), angles)
        return torch.cat((pairs.real, pairs.imag), dim=1)

    x = weights["embed_tokens.weight"][tokens[:-1]]  # (T, D)
    for i in range(c.num_hidden_layers):
        w = {name.removeprefix(f"layers.{i}."): p for name, p in weights.items() if name.startswith(f"layers.{i}.")}
        y, heads = norm(x, w["input_layernorm.weight"]), []
        for h in range(H):
            g = h // (H // G)
            q = y @ w["self_attn.q_proj.weight"][h * d : (h + 1) * d].T
            k = y @ w["self_attn.k_proj.weight"][g * d : (g + 1) * d].T
            v = y @ w["self_attn.v_proj.weight"][g * d : (g + 1) * d].T
            rows = []
            for t in range(len(x)):
                far = max(0, t - window + 1) if group > 1 else 0  # so many keys are as far as the window, or farther
                near_scores = turn(k[far : t + 1], range(far, t + 1)) @ turn(q[t : t + 1], [t])[0]
                at = t // group + window - window // group
                far_scores = turn(k[:far], [j // group for j in range(far)]) @ turn(q[t : t + 1], [at])[0]
                rows.append(torch.softmax(torch.cat((far_scores, near_scores)) / d**0.5, 0) @ v[: t + 1])
            s = scales[i][h] if len(scales[i]) == H else scales[i][h * d : (h + 1) * d]
            heads.append(s * torch.stack(rows))
        x = x + torch.cat(heads, 1) @ w["self_attn.o_proj.weight"].T
        y = norm(x, w["post_attention_layernorm.weight"])
        gate = y @ w["mlp.gate_proj.weight"].T
        x = x + (gate / (1 + (-gate).exp()) * (y @ w["mlp.up_proj.weight"].T)) @ w["mlp.down_proj.weight"].T
    logits = norm(x, weights["norm.weight"])[-count:] @ weights["lm_head.weight"].T
    return -torch.log_softmax(logits, -1)[range(count), tokens[-count:]].mean()


def test_the_loss_is_of_the_answer_alone(model):
    """Mean cross-entropy of the answer's tokens, each predicted from what stands before it."""
    prompt, answer = some_tokens(20).tolist(), some_tokens(3, seed=1).tolist()
    logp = logits(model, torch.tensor([prompt + answer]))[0].log_softmax(-1)
    expected = -sum(logp[len(prompt) + i - 1, t] for i, t in enumerate(answer)) / 3
    assert seal.answer_loss(model, prompt, answer)[0].item() == pytest.approx(expected.item(), rel=1e-5)
    best = seal.generate(model, [prompt], 3)[0]
    assert seal.answer_loss(model, prompt, best)[1]  # right to the last token, or not
    assert not seal.answer_loss(model, prompt, [*best[:2], best[2] ^ 1])[1]


@pytest.mark.parametrize("mode", ["head", "channel"])
def test_loss_and_gradients_equal_the_slow_reference_and_finite_differences(mode, model):
    """Float32, recomputed, against autograd through plain loops in float64, and that against (f(s+h) - f(s-h)) / 2h."""
    prompt, answer = some_tokens(12).tolist(), some_tokens(4, seed=1).tolist()
    model.set_scales(make_scales(model.config, mode))
    loss, _ = seal.answer_loss(model, prompt, answer)
    loss.backward()

    scales = [s.detach().double().requires_grad_() for s in model.scales()]
    slow = slow_loss(model, prompt + answer, scales, len(answer))
    assert abs(loss.item() - slow.item()) < 1e-5 * abs(slow.item())
    slow.backward()
    size = max(s.grad.abs().max() for s in scales)
    for ours, reference in zip(model.scales(), scales):
        assert gap(ours.grad, reference.grad) < 1e-4 * size

    with torch.no_grad():
        for layer, i in [(0, 1), (1, 3), (2, len(scales[2]) - 1)]:
            at = []
            for step in (1e-5, -1e-5):
                moved = [s.detach().clone() for s in scales]
                moved[layer][i] += step
                at.append(slow_loss(model, prompt + answer, moved, len(answer)))
            assert (at[0] - at[1]).item() / 2e-5 == pytest.approx(
                model.scales()[layer].grad[i].item(), rel=1e-3, abs=1e-5 * size.item()
            )


@pytest.mark.parametrize("seed", range(6))
def test_self_extend_equals_the_slow_reference(seed, tmp_path, vocabulary, monkeypatch):
    """Loss and gradients, recomputed and in uneven chunks of queries, for drawn groups, windows, heads and ropes."""
    rng = random.Random(seed)
    group, window, rope = rng.randint(2, 6), rng.randint(1, 14), {"rope_theta": 100.0, "rope_type": "default"}
    rope |= {"rope_type": "linear", "factor": 2.5} if seed % 2 else {}
    make_checkpoint(
        tmp_path, vocabulary, seed, num_hidden_layers=2, head_dim=rng.choice([6, 16]), rope_parameters=rope,
        num_key_value_heads=rng.choice([1, 2, 4]),
    )
    model, prompt, answer = load(tmp_path, f"self:{group},{window}"), some_tokens(28).tolist(), [7, 8, 9]
    monkeypatch.setattr(seal, "CHUNK", 9)
    model.keep_attention = seed % 3 > 0
    model.set_scales(make_scales(model.config, "head"))
    loss, _ = seal.answer_loss(model, prompt, answer)
    loss.backward()
    scales = [s.detach().double().requires_grad_() for s in model.scales()]
    slow = slow_loss(model, prompt + answer, scales, 3, group, window)
    assert abs(loss.item() - slow.item()) < 1e-5 * slow.item()
    for g, w in ((1, 1), (group + 1, window), (group, window + 1)):
        assert abs(slow_loss(model, prompt + answer, scales, 3, g, w).item() - slow.item()) > 1e-3
    slow.backward()
    size = max(s.grad.abs().max() for s in scales)
    for ours, reference in zip(model.scales(), scales):
        assert gap(ours.grad, reference.grad) < 1e-4 * size


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")  # PEFT asks transformers for it by its old name
@pytest.mark.parametrize("seed", range(8))
def test_lora_is_pefts(seed, tmp_path, vocabulary):
    """On the drawn configs, from the same values (PEFT's factor alpha / r being 1): the same loss and gradients."""
    reference = make_checkpoint(tmp_path, vocabulary, seed, **draw_config(seed)[0])
    ours, prompt, answer = load(tmp_path), some_tokens(40).tolist(), some_tokens(5, seed=1).tolist()
    ours.set_scales(make_scales(ours.config, "lora"))
    projections = ["q_proj", "k_proj", "v_proj", "o_proj"]
    theirs = peft.get_peft_model(reference, peft.LoraConfig(r=4, lora_alpha=4, target_modules=projections))
    pairs = [
        (ours.get_parameter(name.removeprefix("base_model.model.model.").replace(".default.weight", "")), p)
        for name, p in theirs.named_parameters() if p.requires_grad
    ]
    assert len(pairs) == len(ours.scales()) == 2 * 4 * 2
    for mine, other in pairs:
        other.data.copy_(mine)
    loss, _ = seal.answer_loss(ours, prompt, answer)
    loss.backward()
    found = theirs(torch.tensor([prompt + answer[:-1]])).logits[0, len(prompt) - 1 :]
    expected = torch.nn.functional.cross_entropy(found, torch.tensor(answer))
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    size = max(p.grad.abs().max() for _, p in pairs)
    for mine, other in pairs:
        assert mine.grad.abs().max() > 0 and gap(mine.grad, other.grad) < 1e-4 * size


def test_lora_starts_as_pefts_does(model):
    """B is 0. A is uniform and as wide as PEFT draws it, anew for every matrix, and by the seed."""
    torch.manual_seed(0)
    model.reset_scales("lora", seed=3)
    first = [p.detach().clone() for p in model.scales()]
    theirs = peft.inject_adapter_in_model(
        peft.LoraConfig(r=4, target_modules=["q_proj"]), torch.nn.ModuleDict({"q_proj": torch.nn.Linear(64, 64)})
    )
    (wide,) = (p for name, p in theirs.named_parameters() if "lora_A" in name)
    a = torch.stack(first[::2])
    assert all((b == 0).all() for b in first[1::2]) and len(a.unique()) > 0.99 * a.numel()
    for x in (a, wide):
        assert 0.95 / 8 < x.abs().max() <= 1 / 8 and x.std().item() == pytest.approx(1 / 8 / 3**0.5, rel=0.1)
    for seed, same in ((3, True), (4, False)):
        model.reset_scales("lora", seed)
        assert torch.equal(torch.stack(model.scales()[::2]), a) == same


@pytest.mark.parametrize("keep, offload", [(True, False), (False, False), (True, True)])
@pytest.mark.parametrize("mode, count", [("head", 5), ("channel", 5), ("lora", 5), ("channel", 15)])
def test_recomputed_gradients_equal_plain_autograds(mode, count, keep, offload, tmp_path, vocabulary, monkeypatch):
    """With biases, grouped queries, several uneven chunks, and whatever is kept or moved to save memory.

    The reference lets every block work for all positions; an answer longer than a chunk does so, too.
    """
    make_checkpoint(tmp_path, vocabulary, num_key_value_heads=2, attention_bias=True, mlp_bias=True)
    model, pair = load(tmp_path), (some_tokens(40).tolist(), some_tokens(count, seed=1).tolist())
    model.set_scales(make_scales(model.config, mode))
    model.frozen = False  # every block an ordinary part of the graph
    every = model.logits(model(torch.tensor([pair[0] + pair[1][:-1]])))[0, -count:]
    loss = torch.nn.functional.cross_entropy(every, torch.tensor(pair[1]))
    plain = torch.autograd.grad(loss, model.scales())
    model.frozen, model.keep_attention, model.offload = True, keep, offload
    monkeypatch.setattr(seal, "CHUNK", 12)
    again, _ = seal.answer_loss(model, *pair)
    again.backward()
    assert again.item() == pytest.approx(loss.item(), rel=1e-6)
    for scale, reference in zip(model.scales(), plain):
        assert gap(scale.grad, reference) < 1e-5 * max(g.abs().max().item() for g in plain)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_the_count_of_operations_is_what_torch_counts(tmp_path, vocabulary):
    """Of the matrix products, which grow with T; attention's share is what grows with T^2."""
    make_checkpoint(tmp_path, vocabulary, num_key_value_heads=2)
    model, T = load(tmp_path), 200
    model.frozen = False  # nothing is computed twice
    forward, step, share = seal.useful_flop(model.config, T)
    twice = seal.useful_flop(model.config, 2 * T)
    assert (twice[1] - 2 * step) / 2 == pytest.approx(share * step)
    counts = []
    for run in (lambda: model(some_tokens(1, T), last=1), lambda: model(some_tokens(1, T), last=1).sum().backward()):
        with FlopCounterMode(display=False) as counter:
            run()
        counts.append(sum(n for kind, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(kind)))
    for counted, claimed, double in zip(counts, (forward, step), twice):
        assert 1 <= counted / (2 * claimed - double / 2) < 1.01  # one position of the last block is not in the claim


def test_offloading_moves_the_blocks_inputs_and_nothing_else(model, monkeypatch):
    moved, (prompt, answer) = [], (some_tokens(40).tolist(), some_tokens(5, seed=1).tolist())

    def save_on_cpu(pin_memory):
        return torch.autograd.graph.saved_tensors_hooks(lambda x: moved.append(x.shape) or x, lambda x: x)

    monkeypatch.setattr(torch.autograd.graph, "save_on_cpu", save_on_cpu)
    seal.plan_memory(model, 44, offload=True)
    seal.answer_loss(model, prompt, answer)[0].backward()
    assert moved == [(1, 44, model.config.hidden_size)] * 3


def test_a_heads_gradient_is_the_sum_of_its_channels(model):
    grads = {}
    for mode in ("head", "channel"):
        model.reset_scales(mode)
        seal.answer_loss(model, some_tokens(30).tolist(), some_tokens(5, seed=1).tolist())[0].backward()
        grads[mode] = torch.stack([s.grad for s in model.scales()])
    H = model.config.num_attention_heads
    torch.testing.assert_close(
        grads["channel"].view(-1, H, model.config.head_dim).sum(-1), grads["head"], rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("mode, lr", [("head", 0.05), ("channel", 0.05), ("lora", 0.002)])
def test_training_lowers_the_loss_and_moves_nothing_but_the_scales(mode, lr, model, tokenizer):
    pairs = [
        (tokenizer.prompt(s.prompt), tokenizer.answer(s.answer))
        for s in seal.make_samples("lines", tokenizer, model.config, 310, 4, "train")
    ]
    model.reset_scales(mode)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = seal.train(model, pairs, lr=lr, epochs=4)
    assert len(losses) == 16 and sum(losses[-4:]) < 0.98 * sum(losses[:4])
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {f"layers.{i}.self_attn.{name}" for i in range(3) for name in LEARNED[mode]}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("mode", ["head", "lora"])
def test_train_writes_scales_with_their_story_and_resumes_bit_for_bit(mode, plain, tmp_path, capsys, monkeypatch):
    """Interrupted in the second epoch, and of 16 steps only the missing ten are done again; another seed differs."""
    stop = 6

    def train(name, *more):
        flags = ("--extend", "ntk:2", "--length", 310, "--samples", 4, "--lr", 0.05, "--epochs", 4, *more)
        return command(capsys, "train", "--mode", mode, "--ckpt", plain, "--out", tmp_path / name, *flags)[0]

    assert train("a.safetensors", "--json", tmp_path / "a.json") == 0
    calls, real = [], seal.answer_loss

    def interrupted(*args):
        calls.append(torch.is_grad_enabled())
        if sum(calls) > stop:
            signal.raise_signal(signal.SIGINT)
        return real(*args)

    monkeypatch.setattr(seal, "answer_loss", interrupted)
    assert train("b.safetensors") == 130 and not (tmp_path / "b.safetensors").exists()
    calls.clear()
    monkeypatch.setattr(seal, "answer_loss", lambda *args: calls.append(torch.is_grad_enabled()) or real(*args))
    assert train("b.safetensors", "--resume") == 0 and sum(calls) == 16 - stop
    assert train("c.safetensors", "--seed", 1) == 0
    (a, about), (b, again), (c, _) = (seal.read_scales(tmp_path / f"{n}.safetensors") for n in "abc")
    assert all(torch.equal(x, y) and not torch.equal(x, z) for x, y, z in zip(a, b, c, strict=True)) and about == again

    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "a.safetensors", "b.safetensors", "c.safetensors"]
    prompts = about.pop("prompts").split(",")
    report = json.loads((tmp_path / "a.json").read_text())
    assert float(about.pop("loss")) == report["losses"][-1] and len(report["losses"]) == 16 and len(prompts) == 4
    assert about == {
        "format": "seal-1", "mode": mode, "heads": "4", "head_size": "16", "layers": "3", "extend": "ntk:2",
        "task": "lines", "length": "310", "samples": "4", "epochs": "4", "steps": "16", "lr": "0.05", "seed": "0",
        "checkpoint": plain.name, "template": "none", "batch": "1",
    }


@pytest.mark.parametrize("mode", ["head", "channel"])
def test_a_step_is_the_mean_loss_of_its_batch(mode, model):
    """Five prompts, two a step, twice over: six steps, the third and the last of a single prompt."""
    pairs = [(some_tokens(20 + 9 * i, seed=i).tolist(), some_tokens(2 + i, seed=9 + i).tolist()) for i in range(5)]
    model.reset_scales(mode)
    losses = seal.train(model, pairs, lr=0.05, epochs=2, batch=2)
    learned = torch.cat(model.scales()).detach()
    model.reset_scales(mode)
    optimizer, expected = torch.optim.AdamW(model.scales(), lr=0.05, weight_decay=0.0), []
    for batch in [pairs[:2], pairs[2:4], pairs[4:]] * 2:
        loss = torch.stack([seal.answer_loss(model, *pair)[0] for pair in batch]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    assert losses == pytest.approx(expected, rel=1e-5) and gap(learned, torch.cat(model.scales())) < 1e-5


RANKS = """
import json, os, sys

sys.path.insert(0, sys.argv[1])
import seal
import torch

rank, store, results = int(os.environ["RANK"]), seal.join_ranks(), []
train, answer_loss, destroy = seal.train, seal.answer_loss, seal.dist.destroy_process_group
seal.dist.destroy_process_group = lambda: None  # the processes stay together from one command to the next
if rank:
    seal.whole_file = "only the first writes"
for job, arguments in enumerate(json.loads(sys.argv[2])):
    seal.join_ranks, held = lambda: seal.dist.PrefixStore(str(job), store), []

    def watched(model, *rest):
        losses = train(model, *rest)
        held.append(sum((p.to_local() if hasattr(p, "to_local") else p).numel() for p in model.layers.parameters()))
        return losses

    def broken(*args):
        if rank == 1 and torch.is_grad_enabled():
            raise MemoryError
        return answer_loss(*args)

    seal.train = watched
    if "broken" in " ".join(arguments):
        seal.answer_loss = broken
    results.append([seal.run("seal.py", seal.parse, arguments), *held])
    with open(f"rank{rank}.json", "w") as file:
        json.dump(results, file)
"""


def test_two_processes_learn_what_one_does_whole_or_sharded(good, tmp_path, capsys, monkeypatch):
    """Under torchrun, on batches of 4 and 3; one speaks and writes, it resumes, and it ends if one process fails."""
    monkeypatch.chdir(tmp_path)
    line = f"train --ckpt {good}/model --task {good}/task.jsonl --samples 7 --batch 4 --epochs 2 --lr 0.05"
    modes = ("head", "channel")
    for mode in modes:
        assert command(capsys, *f"{line} --mode {mode} --out {mode}1 --json {mode}1.json".split())[0] == 0
    calls, real = [], seal.answer_loss

    def interrupted(*args):
        calls.append(torch.is_grad_enabled())
        if sum(calls) > 8:  # in the third step of four
            signal.raise_signal(signal.SIGINT)
        return real(*args)

    monkeypatch.setattr(seal, "answer_loss", interrupted)
    assert command(capsys, *f"{line} --out head3".split())[0] == 130 and whole_state(Path("head3.state")) == 2
    monkeypatch.setattr(seal, "answer_loss", real)
    assert "made with batch 4, not 1;" in command(capsys, *f"{line} --out head3 --resume --batch 1".split())[2]

    jobs = [f"{line} --mode {mode} --out {mode}2{shard} --json {mode}2{shard}.json {more}"
            for shard, more in (("", ""), ("s", "--shard --offload")) for mode in modes]
    jobs += [f"{line} --out head3 --resume --shard", f"eval --ckpt {good}/model", f"{line} --out broken"]
    jobs = json.dumps([job.split() for job in jobs])
    Path("ranks.py").write_text(RANKS)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*torchrun, "ranks.py", Path(seal.__file__).parent, jobs], capture_output=True, text=True,
                          timeout=200, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.stdout.count("not trained on") == 5 and done.stderr.count("model    ") == 6, done.stderr
    assert re.findall("error: .{12}", done.stderr) == ["error: torchrun: on", "error: out of memor"], done.stderr
    first, second = (json.loads(Path(f"rank{i}.json").read_text()) for i in (0, 1))
    assert [r[0] for r in first] == [r[0] for r in second] == [0, 0, 0, 0, 0, 2, 2]
    for whole, half in ((0, 2), (1, 3), (0, 4)):  # the scales are whole everywhere
        scales = sum(map(torch.numel, seal.read_scales(f"{modes[whole]}1")[0]))
        held = [r[i][1] - scales for r in (first, second) for i in (whole, half)]
        assert held[0] == held[2] == held[1] + held[3] and held[1] == held[3]

    for one, two in [("head1", "head2"), ("channel1", "channel2"), ("head1", "head2s"), ("channel1", "channel2s"),
                     ("head1", "head3")]:
        (a, about), (b, again) = seal.read_scales(one), seal.read_scales(two)
        torch.testing.assert_close(b, a, rtol=0, atol=1e-6)
        assert float(about.pop("loss")) == pytest.approx(float(again.pop("loss")), rel=1e-5) and about == again
        if two != "head3":
            a, b = (json.loads(Path(f"{name}.json").read_text()) for name in (one, two))
            assert b["losses"] == pytest.approx(a["losses"], rel=1e-5)
            assert all(b[when] == pytest.approx(a[when], rel=1e-5) for when in ("before", "after"))
    made = {p.name for p in tmp_path.iterdir()} - {"ranks.py", "rank0.json", "rank1.json", "head3", "broken.state"}
    assert made == {f"{mode}{kind}" for mode in modes for kind in ("1", "1.json", *(
        f"2{shard}{suffix}" for shard in ("", "s") for suffix in ("", ".json")))}


def test_each_of_several_processes_takes_its_own_gpu(monkeypatch):
    monkeypatch.setattr(seal.dist, "is_initialized", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "99")
    with pytest.raises(seal.UserError, match="--device cuda:99: not usable here"):
        seal.pick_device("cuda")
    assert seal.pick_device("cpu") == CPU


def test_the_papers_learning_rates():
    thirteen_b = seal.replace(LLAMA_2, num_hidden_layers=40)
    rates = {
        (task, mode, c.num_hidden_layers): seal.paper_lr(task, mode, c)
        for task in ("lines", "needle", "qa.jsonl")
        for mode in ("head", "channel", "lora")
        for c in (LLAMA_2, thirteen_b)
    }
    assert {rate for (_, mode, _), rate in rates.items() if mode == "lora"} == {2e-4}
    assert rates["lines", "head", 32] == 1e-2 and rates["lines", "channel", 32] == 2e-2
    assert rates["lines", "head", 40] == rates["lines", "channel", 40] == 2e-2
    assert rates["needle", "head", 32] == 4e-2 and rates["needle", "channel", 32] == 5e-2
    assert rates["qa.jsonl", "head", 32] == 1e-2 and rates["qa.jsonl", "channel", 32] == 2e-2


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------------------


def test_eval_json_and_table_compare_base_and_scales(plain, model, tmp_path, capsys, monkeypatch):
    """stdout is the table alone; the scales' extension is applied without being told; a trained prompt is left out."""
    config = model.config
    score = lambda sample, text: int(seal.prompt_id(text), 16) % 1000 / 1000  # a random model is never right: tell its
    monkeypatch.setattr(seal.Sample, "score", score)                          # answers apart by a fingerprint
    some = seal.make_samples("needle", seal.Tokenizer(plain, config), config, 300, 1, "eval", 0, [0])
    path = tmp_path / "s.safetensors"
    scales = make_scales(config, "channel", path, extend="ntk:2", prompts=seal.prompt_id(some[0].prompt))
    args = ("--ckpt", plain, "--scales", path, "--task", "needle", "--depths", "0,100", "--lengths", "200,300",
            "--prompts", 4, "--max-new-tokens", 6)
    status, out, err = command(
        capsys, "eval", *args, "--compare", "--json", tmp_path / "e.json", "--plot", tmp_path / "e.png"
    )
    assert status == 0, err
    report = json.loads((tmp_path / "e.json").read_text())
    about = {"ckpt": str(plain), "scales": str(path), "task": "needle", "extend": "ntk:2"}
    assert report | about == report and report["seconds"] >= 0
    for cells in (report["cells"], report["base"]):
        assert sorted((c["length"], c["depth"], c["prompts"]) for c in cells) == [
            (200, 0, 2), (200, 100, 2), (300, 0, 1), (300, 100, 2),
        ]
        assert all(set(c) == {"length", "depth", "prompts", "correct", "score"} and 0 <= c["score"] <= 1 for c in cells)
    rows = out.splitlines()
    methods = [f"{method}, depth {depth}%" for depth in (0, 100) for method in ("base", "SEAL-C")]
    assert rows[0].split() == ["tokens", "200", "300"] and [row.split("  ")[0] for row in rows[2:]] == methods
    assert "extension ntk:2" in err and (tmp_path / "e.png").read_bytes()[1:4] == b"PNG"

    # the figures are those of the model without and with its scales, extended, asked one prompt at a time
    extended, tokenizer = load(plain, "ntk:2"), seal.Tokenizer(plain, config)
    samples = seal.make_samples("needle", tokenizer, config, 300, 4, "eval", 0, [0, 100])[1::2]
    for key in ("base", "cells"):
        said = [seal.generate(extended, [tokenizer.prompt(s.prompt)], 6, tokenizer.stop)[0] for s in samples]
        (cell,) = (c for c in report[key] if (c["length"], c["depth"]) == (300, 100))
        assert cell["score"] == pytest.approx(sum(score(None, tokenizer.decode(ids)) for ids in said) / 2)
        extended.set_scales(scales)
    assert report["base"] != report["cells"]


def test_batched_answers_equal_answers_one_by_one(model, tokenizer, monkeypatch):
    samples = [s for n in (400, 300, 350) for s in seal.make_samples("lines", tokenizer, model.config, n, 2, "eval")]
    batched = seal.answers(model, tokenizer, samples, 12)
    assert seal.rows_that_fit(model, 412) > 6
    monkeypatch.setattr(seal, "rows_that_fit", lambda *_: 1)
    assert seal.answers(model, tokenizer, samples, 12) == batched


def test_evaluation_near_a_sliding_window_ends_answers_at_it(tmp_path, vocabulary, monkeypatch):
    """A model that rambles on does not end the run."""
    make_checkpoint(
        tmp_path, vocabulary, model=transformers.MistralForCausalLM, num_key_value_heads=2, sliding_window=320
    )
    ours, asked = load(tmp_path), []
    tokenizer = seal.Tokenizer(tmp_path, ours.config, "none")
    tokenizer.stop = set()
    generate = seal.generate
    monkeypatch.setattr(
        seal, "generate", lambda model, prompts, new, stop: asked.append(new) or generate(model, prompts, new, stop)
    )
    samples = seal.make_samples("lines", tokenizer, ours.config, 300, 2, "eval")
    seal.answers(ours, tokenizer, samples, 100)
    assert asked == [321 - max(len(tokenizer.prompt(s.prompt)) for s in samples)]


def test_cells_gather_scores_by_length_and_depth():
    samples = [seal.Sample("", "", length=n, depth=d) for n, d in [(10, None), (20, 50), (10, None), (20, 0), (20, 50)]]
    assert seal.cells_of(samples, [1.0, 0.6, 0.5, 0.0, 0.2]) == [
        {"length": 10, "depth": None, "prompts": 2, "correct": 1, "score": 0.75},
        {"length": 20, "depth": 50, "prompts": 2, "correct": 1, "score": 0.4},
        {"length": 20, "depth": 0, "prompts": 1, "correct": 0, "score": 0.0},
    ]


@pytest.mark.parametrize(
    "correct, prompts, low, high",
    [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (50, 50, 0.9287, 1.0), (1, 2, 0.0945, 0.9055)],
)
def test_wilson_interval(correct, prompts, low, high):
    assert seal.interval(correct, prompts) == pytest.approx((low, high), abs=1e-4)


def test_the_interval_holds_its_share_for_every_count():
    """To the last bit: matplotlib refuses an error bar of -2e-16."""
    for n in range(1, 101):
        for k in range(n + 1):
            low, high = seal.interval(k, n)
            assert 0 <= low <= k / n <= high <= 1


# ---------------------------------------------------------------------------------------------------------------------
# Heads
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def known(model) -> tuple[seal.Llama, list]:
    """A model in which head L1H2 pushes the right answer, token 7, down, L0H1 pushes it up, and nothing else speaks.

    Prompts repeat one token, so every position has the same value and each head's output is that value.
    """
    for layer in model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    word = model.lm_head.weight[7] * model.norm.weight  # (D,) the direction that raises token 7's logit
    for layer, head, push in [(0, 1, 1.0), (1, 2, -1.0)]:
        o_proj, said, columns = model.layers[layer].self_attn.o_proj, [], slice(head * 16, (head + 1) * 16)
        hook = o_proj.register_forward_pre_hook(lambda module, args: said.append(args[0][0, -1, columns]))
        logits(model, torch.tensor([[5]]))
        hook.remove()
        o_proj.weight.data[:, columns] = push * torch.outer(word / word.norm(), said[0] / said[0].square().sum())
    return model, [([5] * 6, [7]), ([5] * 9, [7])]


def test_the_harmful_head_is_ranked_first_and_the_helpful_one_last(known):
    model, pairs = known
    sites = [(layer, head) for layer in range(3) for head in range(4)]
    for effects in (seal.gradient_effects(model, pairs, sites), seal.prune_effects(model, pairs, sites)):
        loss = dict(zip(sites, (e["loss"] for e in effects)))
        assert loss[1, 2] < -0.01 and loss[0, 1] > 0.01
        assert all(abs(loss[site]) < 1e-5 for site in sites if site not in {(1, 2), (0, 1)})
    assert all((s == 1).all() for s in model.scales())  # pruning puts back what it takes


def test_pruning_is_the_loss_without_the_head_and_the_gradient_its_first_order(model):
    pairs = [(some_tokens(20, seed=i).tolist(), some_tokens(2, seed=9 + i).tolist()) for i in range(3)]
    sites = [(0, 3), (2, 1)]
    base, _ = seal.held_out(model, pairs)
    first = seal.gradient_effects(model, pairs, sites)
    pruned = seal.prune_effects(model, pairs, sites)
    for (layer, i), gradient, exact in zip(sites, first, pruned):
        ones = [torch.ones(4) for _ in range(3)]
        for size, effect, tolerance in ((1.0, exact, 1e-6), (1e-3, gradient, 0.05)):
            scales = [s.clone() for s in ones]
            scales[layer][i] -= size
            model.set_scales(scales)
            assert (seal.held_out(model, pairs)[0] - base) / size == pytest.approx(
                effect["loss"], rel=tolerance, abs=1e-5
            )


def test_pruning_resumes_after_what_is_done(model):
    pairs, sites, kept = [(some_tokens(9).tolist(), [7])], [(0, 0), (0, 1), (1, 0)], []
    whole = seal.prune_effects(model, pairs, sites, keep=lambda effects: kept.append(list(effects)))
    assert [len(k) for k in kept] == [1, 2, 3] and seal.prune_effects(model, pairs, sites, done=kept[0]) == whole


def test_quadrants_scale_the_heads_that_agree_at_both_lengths(model):
    sites = [(0, 0), (0, 1), (1, 2), (2, 3), (2, 0)]
    variants = seal.quadrant_scales(model, sites, [1, -1, 1, -1, 0], [1, -1, -1, -2, 1], 0.9, 1.1)
    changed = {
        name: {(i, h): round(v, 3) for i, s in enumerate(scales) for h, v in enumerate(s.tolist()) if v != 1}
        for name, scales in variants.items()
    }
    assert changed == {
        "Q1 x 0.9": {(0, 0): 0.9}, "Q3 x 1.1": {(0, 1): 1.1, (2, 3): 1.1},
        "Q1 x 0.9, Q3 x 1.1": {(0, 0): 0.9, (0, 1): 1.1, (2, 3): 1.1},
    }


@pytest.mark.parametrize(
    "x, y, rho",
    [
        ([1, 2, 3, 4, 5], [5, 6, 7, 8, 7], 0.8207826817),
        ([1, 2, 3], [10, 20, 1000], 1.0),
        ([1, 2, 3], [0, -1, -9], -1.0),
        ([1, 1, 2, 2], [1, 2, 1, 2], 0.0),
    ],
)
def test_spearman_equals_scipys(x, y, rho):
    assert seal.spearman(x, y) == pytest.approx(rho, abs=1e-6)


@pytest.mark.parametrize("mode", ["head", "channel"])
def test_direct_effects_add_up_to_the_logits_without_the_final_norm(mode, model):
    """Heads, feed-forwards and the embedding are all that the residual stream is made of."""
    tokens, targets = some_tokens(25).tolist(), [3, 77, 400]
    scales = make_scales(model.config, mode)
    scales[1].view(4, -1)[2] = 0  # a pruned head says nothing
    model.set_scales(scales)
    effects = seal.direct_effects(model, tokens, targets)
    assert effects.shape == (3, 5, 3) and (effects[1, 2] == 0).all() and (effects != 0).sum() == 3 * 5 * 3 - 3
    out = model.lm_head.weight[targets]
    with torch.no_grad():
        stream = model(torch.tensor([tokens]))[0, -1]
    torch.testing.assert_close(
        effects.sum((0, 1)) + out @ model.embed_tokens.weight[tokens[-1]], out @ stream, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("how", ["gradient", "both"])
def test_heads_prints_ten_of_each_end_and_writes_every_effect(how, plain, tmp_path, capsys):
    status, out, err = command(
        capsys, "heads", "--ckpt", plain, "--how", how, "--lengths", "300,330", "--prompts", 2, "--json",
        tmp_path / "h.json", "--plot", tmp_path / "h.png",
    )
    assert status == 0, err
    report = json.loads((tmp_path / "h.json").read_text())
    y = {f"L{layer}H{i}": e for (layer, i), e in zip(report["sites"], report["effects"]["gradient"]["330"])}
    rows = [r.split() for r in out.splitlines()[3:13]]
    assert len(y) == 12 and len({r[0] for r in rows}) == 10
    if how == "gradient":
        order = sorted(y, key=lambda site: -y[site]["loss"])
        assert [r[0] for r in rows] == order[:10] and [r[3] for r in rows] == order[::-1][:10]
        assert float(rows[0][2]) == pytest.approx(-y[order[0]]["loss"], abs=1e-4)
    assert ("Spearman" in out) == (how == "both") and (tmp_path / "h.png").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Export
# ---------------------------------------------------------------------------------------------------------------------

# What a checkpoint may be (changes to its config), and what --extend may say.
LLAMA3_ROPE = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=64, rope_theta=1e4)
YARN_ROPE = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64, rope_theta=1e4)
EXPORTED = {
    "plain": ({}, "none"),
    "ntk": ({"max_position_embeddings": 128}, "ntk:4"),
    "linear": ({"max_position_embeddings": 128}, "linear:4"),
    "yarn": ({"max_position_embeddings": 64}, "yarn:8"),
    "linear in the config": ({"rope_parameters": dict(rope_type="linear", factor=3.0, rope_theta=5e3)}, "none"),
    "yarn in the config": ({"rope_parameters": YARN_ROPE}, "none"),
    "yarn, other ramp": ({"rope_parameters": YARN_ROPE | dict(beta_fast=16.0, beta_slow=2.0)}, "none"),
    "yarn, other magnitude": ({"rope_parameters": YARN_ROPE | dict(attention_factor=1.5)}, "none"),
    "llama3": ({"rope_parameters": LLAMA3_ROPE}, "none"),
    "llama3 and ntk": ({"rope_parameters": LLAMA3_ROPE}, "ntk:2"),
    "grouped queries": ({"num_key_value_heads": 2}, "none"),
    "one key head": ({"num_key_value_heads": 1}, "none"),
    "tied": ({"tie_word_embeddings": True}, "none"),
    "biased": ({"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 2}, "none"),
    "odd heads": ({"num_key_value_heads": 2, "head_dim": 20}, "none"),
}


def convert(folder, outfile, *flags) -> gguf.GGUFReader:
    """The GGUF file that export_gguf.py makes, read back; without scales unless the flags say so."""
    arguments = ["--ckpt", folder, "--outfile", outfile, "--scales", "none", *flags]
    export_gguf.run(export_gguf.parse([str(a) for a in arguments]))
    return gguf.GGUFReader(outfile)


def value(reader: gguf.GGUFReader, key: str):
    """One piece of the file's metadata, None if it is not there."""
    return reader.fields[key].contents() if key in reader.fields else None


def clear_answer(model) -> tuple[list[int], list[int]]:
    """A prompt and its 200 greedy tokens, none of them so near a tie that llama.cpp's rounding could decide it."""
    for seed in range(100):
        prompt = [1] + some_tokens(100, seed=seed).tolist()
        answer = seal.generate(model, [prompt], 200)[0]
        best = logits(model, torch.tensor([prompt + answer]))[0, len(prompt) - 1 : -1].topk(2).values
        if (best[:, 0] - best[:, 1]).min() > 5e-4:
            return prompt, answer
    raise AssertionError("every answer has a tie")


WITH_LORA = ("plain", "ntk", "grouped queries", "biased", "odd heads")


@pytest.mark.parametrize(
    "name, mode",
    [*((n, mode) for n in EXPORTED for mode in ("none", "head", "channel")), *((n, "lora") for n in WITH_LORA)],
)
def test_llama_cpp_answers_as_seal_does(name, mode, vocabulary, tmp_path):
    changes, extension = EXPORTED[name]
    make_checkpoint(tmp_path / "llama", vocabulary, num_hidden_layers=2, **changes)
    model = load(tmp_path / "llama", extension)
    flags = ["--extend", extension]
    if mode != "none":  # the scales remember the extension
        model.set_scales(make_scales(model.config, mode, tmp_path / "s.safetensors", extend=extension))
        flags = ["--scales", tmp_path / "s.safetensors"]
    reader = convert(tmp_path / "llama", tmp_path / "out.gguf", "--outtype", "f32", *flags)
    assert value(reader, "llama.context_length") == model.config.max_position_embeddings

    prompt, answer = clear_answer(model)
    tokens = prompt + answer
    found = export_gguf.LlamaCpp(tmp_path / "out.gguf", len(tokens), threads=1).logits(tokens)  # (T, V)
    assert gap(found, logits(model, torch.tensor([tokens]))[0]) < 1e-3
    # Where every argmax along seal.py's 200 tokens is the next of them, llama.cpp's own greedy answer is the same.
    assert found.argmax(-1)[len(prompt) - 1 : -1].tolist() == answer


@pytest.mark.parametrize("mode", ["channel", "lora"])
def test_metas_own_release_exports_to_the_same_tensors(mode, vocabulary, tmp_path):
    make_checkpoint(tmp_path / "llama", vocabulary, num_key_value_heads=2, rms_norm_eps=1e-5, dtype=torch.float16)
    spell_as_meta(tmp_path / "llama", tmp_path / "meta")
    config, scales = seal.read_config(tmp_path / "llama"), tmp_path / "s.safetensors"
    make_scales(config, mode, scales)
    ours, theirs = (
        {t.name: t for t in convert(tmp_path / name, tmp_path / f"{name}.gguf", "--scales", scales).tensors}
        for name in ("llama", "meta")
    )
    assert ours.keys() == theirs.keys() and len(ours) == 3 + 9 * 3
    for name, t in ours.items():
        assert t.tensor_type == theirs[name].tensor_type and np.array_equal(t.data, theirs[name].data), name
    assert ours["blk.0.attn_q.weight"].tensor_type == gguf.GGMLQuantizationType.F16  # "auto" reads the slices, too


@pytest.mark.parametrize("outtype", ["f16", "bf16", "q8_0", "auto"])
@pytest.mark.parametrize("width", [64, 80])  # rows of 80 cannot be cut into 32s, so q8_0 keeps them in f16
def test_every_type_is_the_float32_fold_cast_once(outtype, width, vocabulary, tmp_path):
    folder, path = tmp_path / "llama", tmp_path / "s.safetensors"
    make_checkpoint(folder, vocabulary, dtype=torch.bfloat16, hidden_size=width, attention_bias=True)
    model = load(folder)
    model.set_scales(scales := make_scales(model.config, "channel", path))
    reader = convert(folder, tmp_path / "out.gguf", "--outtype", outtype, "--scales", path)
    kind = {"f16": "F16", "bf16": "BF16", "q8_0": "Q8_0", "auto": "BF16"}[outtype]
    assert value(reader, "general.file_type") == {"F16": 1, "BF16": 32, "Q8_0": 7}[kind]
    tensors = {t.name: t for t in reader.tensors}
    rows = "F16" if outtype == "q8_0" and width == 80 else kind
    assert {t.tensor_type.name for t in tensors.values() if len(t.shape) == 1} == {"F32"}
    assert tensors["token_embd.weight"].tensor_type.name == tensors["blk.0.attn_output.weight"].tensor_type.name == rows
    assert tensors["blk.0.ffn_down.weight"].tensor_type.name == kind  # its rows are the 96 of the feed-forward
    weight = seal.Checkpoint(folder)["model.layers.1.self_attn.o_proj.weight"]  # (D, H * d)
    expected = gguf.quantize((weight.float() * scales[1]).numpy(), gguf.GGMLQuantizationType[rows])
    assert np.array_equal(tensors["blk.1.attn_output.weight"].data.view(np.uint8), expected.view(np.uint8))
    # Near the float32 model, as near as 8 bits are.
    tokens = [1] + some_tokens(50, seed=3).tolist()
    expected = logits(model, torch.tensor([tokens]))[0]
    found = export_gguf.LlamaCpp(tmp_path / "out.gguf", len(tokens), threads=1).logits(tokens)
    assert (found - expected).norm() / expected.norm() < 0.1


@pytest.mark.parametrize("stored, kind", [("float32", "F16"), ("float16", "F16"), ("mixed", "BF16")])
def test_auto_is_the_checkpoints_own_type(stored, kind, vocabulary, tmp_path):
    folder = tmp_path / "llama"
    make_checkpoint(folder, vocabulary, dtype=torch.float16 if stored == "float16" else torch.float32)
    if stored == "mixed":  # the first matrix in 16 bits decides
        tensors = load_file(folder / "model.safetensors")
        tensors["model.layers.0.input_layernorm.weight"] = tensors["model.layers.0.input_layernorm.weight"].half()
        tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"].bfloat16()
        save_file(tensors, folder / "model.safetensors")
    assert value(convert(folder, tmp_path / "out.gguf"), "general.file_type") == {"F16": 1, "BF16": 32}[kind]


def test_metadata_names_the_model_and_the_method(vocabulary, tmp_path, capsys):
    folder, path, out = tmp_path / "tiny-llama", tmp_path / "s.safetensors", tmp_path / "out.gguf"
    make_checkpoint(folder, vocabulary, tie_word_embeddings=True)
    make_scales(seal.read_config(folder), "head", path, task="lines", extend="ntk:2")
    template = "{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}"
    hints = {"chat_template": template, "add_bos_token": True, "add_eos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(hints))
    reader = convert(folder, out, "--scales", path)
    assert value(reader, "general.architecture") == "llama"
    assert value(reader, "general.name") == "tiny-llama-seal"
    assert "SEAL-H" in value(reader, "general.description") and "ntk:2" in value(reader, "general.description")
    assert value(reader, "llama.context_length") == 1024
    assert value(reader, "llama.rope.freq_base") == pytest.approx(1e4 * 2 ** (16 / 14))
    assert value(reader, "llama.rope.scaling.type") is None
    assert value(reader, "llama.vocab_size") == 608
    assert value(reader, "tokenizer.chat_template") == template
    assert value(reader, "tokenizer.ggml.add_bos_token") is True
    assert value(reader, "tokenizer.ggml.add_eos_token") is False
    assert "output.weight" not in {t.name for t in reader.tensors}
    said = capsys.readouterr().out
    assert "SEAL-H folded into 3 layers; extension ntk:2" in said and f"llama-cli -m {out} -c 1024" in said
    (folder / "chat_template.jinja").write_text("{{ messages }}")  # where newer releases keep it
    assert value(convert(folder, out), "tokenizer.chat_template") == "{{ messages }}"


def test_llama_cpp_tokenises_as_sentencepiece_does(vocabulary, tmp_path):
    folder, out = tmp_path / "llama", tmp_path / "out.gguf"
    make_checkpoint(folder, vocabulary)
    added = {
        0: ("<unk>", True), 1: ("<s>", True), 2: ("</s>", True),
        600: ("<pad>", True), 601: ("<|im_end|>", True), 602: ("<tool>", False), 700: ("<far>", False),
    }
    hints = {
        "added_tokens_decoder": {i: {"content": text, "special": special} for i, (text, special) in added.items()},
        "pad_token": "<pad>", "eos_token": {"content": "<|im_end|>"},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(hints))
    reader = convert(folder, out)
    pieces, kinds = value(reader, "tokenizer.ggml.tokens"), value(reader, "tokenizer.ggml.token_type")
    assert len(pieces) == len(kinds) == 608 and pieces[-1] == "[PAD607]" and kinds[-1] == gguf.TokenType.UNUSED
    assert kinds[:4] == [2, 3, 3, 6] and kinds[600:604] == [3, 3, 4, 5]
    special = [value(reader, f"tokenizer.ggml.{key}_token_id") for key in ("unknown", "bos", "eos", "padding")]
    assert special == [0, 1, 601, 600]

    tokenizer = seal.Tokenizer(folder, seal.read_config(folder), "none")
    llama = export_gguf.LlamaCpp(out, threads=1)
    rng = random.Random(4)
    alphabet = "abc ERTGIS<>_-:.,'\n\t  019éß→日本語🙂\u00a0\u200b" + TRICKY[0]
    texts = [*TRICKY[:8], "", " ", "  a", "\n", "\n\n x", "a ", "x  \t y", "日本語 🙂", "\x00\x01", "<unk> is text"]
    texts += ["Ａﬁ", "▁a ▁", *("".join(rng.choices(alphabet, k=rng.randrange(1, 40))) for _ in range(200))]
    around = [(a, b) for a in ("", "a", "a ") for b in ("", "b", " b")]
    texts += [f"{a}{token}{b}" for a, b in around for token in ("<tool>", "<|im_end|>", "<pad><tool>", "<far>")]
    for text in texts:
        tokens = llama.tokenize(text, add_special=True, parse_special="<|" in text or "<pad>" in text)
        assert tokens == tokenizer.prompt(text), repr(text)

    (folder / "tokenizer_config.json").write_text(json.dumps(hints | {"add_bos_token": False}))
    assert value(convert(folder, out), "tokenizer.ggml.add_bos_token") is False
    tokens = export_gguf.LlamaCpp(out, threads=1).tokenize(TRICKY[0], add_special=True)
    assert tokens == seal.Tokenizer(folder, seal.read_config(folder), "none").prompt(TRICKY[0])


def test_llama_cpp_tokenises_llama_3_as_tokenizers_does(llama3, tmp_path):
    shutil.copytree(llama3, folder := tmp_path / "llama")
    assert value(convert(folder, tmp_path / "out.gguf"), "tokenizer.ggml.pre") == "llama-bpe"
    llama = export_gguf.LlamaCpp(tmp_path / "out.gguf", threads=1)
    reference = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    rng = random.Random(5)
    alphabet = "abc ERT<>_-:.,'\n\r\t  0123456789éß→日本語🙂\u00a0" + TRICKY[0] + "'s'll"
    texts = [*TRICKY[:8], " ", "\n\n x", "x  \n\n  y", "a<|eot_id|>b", "12345 6", "I'LL it's"]
    texts += ["".join(rng.choices(alphabet, k=rng.randrange(1, 40))) for _ in range(200)]
    bos = reference.token_to_id("<|begin_of_text|>")
    for text in texts:
        assert llama.tokenize(text, add_special=True) == [bos] + reference.encode(text).ids, repr(text)

    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\s+"
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(seal.UserError, match="splits as Llama 3 does"):
        convert(folder, tmp_path / "out.gguf")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"model_type": "unigram"}, "unigram"),
        ({"byte_fallback": False}, "byte_fallback"),
        ({"normalization_rule_name": "nfkc"}, "changes its text"),
        ({"remove_extra_whitespaces": True}, "changes its text"),
    ],
)
def test_tokenizers_that_llama_cpp_cannot_run_are_refused(settings, message, tmp_path):
    other = train_vocabulary(tmp_path, TRICKY, vocab_size=400, hard_vocab_limit=False, **settings)
    make_checkpoint(tmp_path / "llama", other)
    with pytest.raises(seal.UserError, match=message):
        convert(tmp_path / "llama", tmp_path / "out.gguf")
    assert not list(tmp_path.glob("*gguf*"))


def test_shards_and_pickles_give_the_same_file(vocabulary, tmp_path):
    one, shards, pickle = (tmp_path / name / "llama" for name in ("one", "shards", "pickle"))
    make_checkpoint(one, vocabulary)
    make_checkpoint(shards, vocabulary, shard_size="100KB")
    make_checkpoint(pickle, vocabulary, bin=True)
    assert len(list(shards.glob("*.safetensors"))) > 2
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}  # old files hold it; config.json decides
    torch.save(torch.load(pickle / "pytorch_model.bin") | old, pickle / "pytorch_model.bin")
    files = [tmp_path / f"{i}.gguf" for i in range(3)]
    for folder, file in zip((one, shards, pickle), files):
        convert(folder, file)
    assert files[0].read_bytes() == files[1].read_bytes() == files[2].read_bytes()


@pytest.mark.parametrize("mode", ["channel", "lora"])
def test_blocks_of_rows_change_nothing(mode, plain, tmp_path, monkeypatch):
    make_scales(seal.read_config(plain), mode, tmp_path / "s.safetensors")
    for block, file in ((1 << 20, "whole"), (7 * 64, "blocks")):
        monkeypatch.setattr(export_gguf, "BLOCK", block)
        convert(plain, tmp_path / file, "--outtype", "q8_0", "--scales", tmp_path / "s.safetensors")
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "blocks").read_bytes()


def test_a_file_that_reads_back_wrong_is_not_kept(plain, tmp_path, monkeypatch):
    write = export_gguf.Stored.tofile

    def tofile(tensor, file):
        write(tensor, file)
        if tensor.name == "output_norm.weight":  # one byte of one number
            file.seek(-1, 2)
            file.write(b"\x00")

    monkeypatch.setattr(export_gguf.Stored, "tofile", tofile)
    with pytest.raises(seal.UserError, match="output_norm.weight does not read back"):
        convert(plain, tmp_path / "out.gguf")
    assert not list(tmp_path.glob("*gguf*"))


def test_a_sliding_window_bounds_the_exported_context(vocabulary, tmp_path, capsys):
    mistral = dict(model=transformers.MistralForCausalLM, num_key_value_heads=2, sliding_window=256)
    make_checkpoint(tmp_path / "llama", vocabulary, **mistral)
    assert value(convert(tmp_path / "llama", tmp_path / "out.gguf"), "llama.context_length") == 256
    assert "sliding window" in capsys.readouterr().err


def test_check_runs_the_file(plain, tmp_path, capsys):
    make_scales(seal.read_config(plain), "head", tmp_path / "s.safetensors")
    convert(plain, tmp_path / "out.gguf", "--outtype", "f32", "--scales", tmp_path / "s.safetensors", "--check")
    assert re.search(r"check: (\d+) of \1 greedy tokens", capsys.readouterr().out)


def test_what_only_an_export_can_get_wrong_is_one_line_and_leaves_nothing(vocabulary, tmp_path, monkeypatch):
    make_checkpoint(tmp_path / "llama", vocabulary)
    config = seal.read_config(tmp_path / "llama")
    monkeypatch.chdir(tmp_path)
    make_scales(config, "head", "s.safetensors", extend="ntk:4")
    seal.save_scales("other.safetensors", [torch.ones(3), torch.ones(3)], config)
    before = sorted(tmp_path.rglob("*"))

    def mistake(flags, message, ckpt="llama"):
        with pytest.raises(seal.UserError, match=message) as e:
            export_gguf.run(export_gguf.parse(["--ckpt", ckpt, *flags.split()]))
        assert "\n" not in str(e.value)

    mistake("--scales other.safetensors", "the model has")
    mistake("--scales s.safetensors --extend yarn:4", "trained with ntk:4")
    mistake("--scales s.safetensors --extend none", "trained with ntk:4")
    mistake("--extend ntk:0", "--extend ntk:0")
    with monkeypatch.context() as here:
        here.setattr(export_gguf.importlib.util, "find_spec", lambda _: None)
        mistake("--check", "pip install cyllama")
    with monkeypatch.context() as here:
        here.setattr(export_gguf.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
        mistake("", "GB free")
    assert sorted(tmp_path.rglob("*")) == before

    # A product beyond the range of the file's type.
    shutil.copytree("llama", "broken")
    seal.save_scales("twice.safetensors", [torch.full((4,), 2.0)] * 3, config)
    large = {"model.layers.1.self_attn.o_proj.weight": torch.full((64, 64), 65000.0)}
    save_file(load_file("llama/model.safetensors") | large, "broken/model.safetensors")
    mistake("--outtype f16 --outfile out.gguf --scales twice.safetensors", "o_proj.* f16", ckpt="broken")
    assert not list(tmp_path.rglob("*gguf*"))


def test_export_from_the_shell(vocabulary, tmp_path):
    """Exit status and streams of the real command; a kill in the middle of the write leaves nothing."""
    make_checkpoint(tmp_path / "llama", vocabulary)
    make_scales(seal.read_config(tmp_path / "llama"), "head", tmp_path / "scales.safetensors")
    slow = (
        "import sys, time, export_gguf as e; write = e.Stored.tofile\n"
        "e.Stored.tofile = lambda *a: (write(*a), time.sleep(60))\n"
        "sys.exit(e.seal.run('x', e.parse))"
    )
    running = subprocess.Popen(
        [sys.executable, "-c", slow, "--ckpt", "llama", "--outfile", "slow.gguf"], cwd=tmp_path,
        stderr=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": str(Path(export_gguf.__file__).parent)},
    )
    line = [sys.executable, export_gguf.__file__, "--ckpt", "llama"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "scales.safetensors, which is here" in done.stderr
    assert done.stdout.startswith("llama-seal-f16.gguf: ") and (tmp_path / "llama-seal-f16.gguf").is_file()
    done = subprocess.run([*line, "--extend", "x"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert re.fullmatch(r".*which is here.*\nexport_gguf.py: error: --extend x.*\n", done.stderr)

    while not list(tmp_path.glob(".slow.gguf.*.part")):
        assert running.poll() is None
        time.sleep(0.05)
    running.terminate()
    assert running.wait() == 143 and not list(tmp_path.glob("*slow*"))


# ---------------------------------------------------------------------------------------------------------------------
# The toy
# ---------------------------------------------------------------------------------------------------------------------


def test_the_toy_falls_with_length_and_scales_lift_it():
    """The claim of the demo, small: wide margins, because forty prompts are few."""
    config = seal.read_config(seal.TOY)
    toy, tokenizer = seal.load_model(seal.TOY, config, CPU), seal.Tokenizer(seal.TOY, config)
    results = seal.demo(toy, tokenizer, [70, seal.default_length(config)], 40, ["head", "channel"], seed=3)
    (short, base), (_, head), (_, channel) = ([c["score"] for c in cells] for cells in results.values())
    assert short > 0.85 and base < 0.65
    assert head > base + 0.08 and channel > base + 0.2


def test_without_a_flag_from_training_to_llama_cpp(capsys, tmp_path, monkeypatch):
    """train, eval --compare and export on the bundled toy; llama.cpp then answers records as seal.py does."""
    monkeypatch.chdir(tmp_path)
    for arguments in (["train"], ["eval", "--scales", "scales.safetensors", "--compare", "--prompts", 2]):
        status, out, err = command(capsys, *arguments)
        assert status == 0, err
    assert re.search(r"^base +\d.*\nSEAL-H +\d", out, re.M)
    export_gguf.run(export_gguf.parse([]))
    config = seal.read_config(seal.TOY)
    toy, tokenizer = seal.load_model(seal.TOY, config, CPU), seal.Tokenizer(seal.TOY, config)
    toy.set_scales(seal.read_scales("scales.safetensors", config)[0])
    llama = export_gguf.LlamaCpp(tmp_path / "toy-llama-seal-bf16.gguf", threads=1)
    for sample in seal.make_samples("lines", tokenizer, config, 400, 3, "eval"):
        prompt = llama.tokenize(sample.prompt, add_special=True)
        assert prompt == tokenizer.prompt(sample.prompt)
        answer = seal.generate(toy, [prompt], 60, tokenizer.stop)[0] + [tokenizer.eos]
        found = llama.logits(prompt + answer)[len(prompt) - 1 : -1]  # after every token, llama.cpp's next is ours
        assert found.argmax(-1).tolist() == answer


def test_pretrain_writes_a_checkpoint_that_loads(capsys, tmp_path, monkeypatch):
    """Two steps of each stage; the weights that a stage should not touch it does not touch."""
    monkeypatch.setattr(seal, "TOY_STAGES", tuple((name, 2, 300, a, b) for name, _, _, a, b in seal.TOY_STAGES[:-1]))
    status, _, err = command(capsys, "pretrain", "--out", tmp_path / "toy")
    assert status == 0, err
    model = load(tmp_path / "toy")
    before = {name: p.clone() for name, p in model.named_parameters()}
    tokenizer = seal.Tokenizer(tmp_path / "toy", model.config)
    seal.pretrain(model, seal.ToyData(tokenizer), [("drift", 2, 300, 1e-3, 1e-3)], seed=0)
    assert {n.split(".")[-2] for n, p in model.named_parameters() if not torch.equal(p, before[n])} == {"o_proj"}


def test_the_bundled_tokenizer_is_what_the_recipe_makes(tmp_path):
    seal.toy_vocabulary(tmp_path / "tokenizer.model")
    assert (tmp_path / "tokenizer.model").read_bytes() == (seal.TOY / "tokenizer.model").read_bytes()


# ---------------------------------------------------------------------------------------------------------------------
# Trust
# ---------------------------------------------------------------------------------------------------------------------

# --- bad input ---
#
# A folder with all that a user can get wrong, one thing broken at a time. Every case must end in one line that has the
# words given, exit status 2, and leave the folder as it was: nothing written, nothing lost, no half files.


@pytest.fixture(scope="session")
def good(vocabulary, tmp_path_factory) -> Path:
    """model/ in one file, shards/ the same in several, scales, a task, a haystack."""
    w = tmp_path_factory.mktemp("good")
    tiny = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    make_checkpoint(w / "model", vocabulary, **tiny)
    make_checkpoint(w / "shards", vocabulary, shard_size="60KB", **tiny)
    config = seal.read_config(w / "model")
    learned = [torch.tensor([0.5, 1.0, 1.5, 2.0]) for _ in "ab"]
    seal.save_scales(w / "scales.safetensors", learned, config, extend="none", task="lines", length=9)
    things = zip(seal.ADJECTIVES[:14], seal.NOUNS)
    rows = [{"prompt": f"The {a} {b} weighs", "answer": f"{i} pounds"} for i, (a, b) in enumerate(things)]
    (w / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (w / "hay.txt").write_text(" ".join(seal.prose(random.Random(0)) for _ in range(40)))
    return w


def config(**changes):
    """Change keys of config.json; a None removes the key."""
    def edit(w):
        path = w / "model" / "config.json"
        raw = {k: v for k, v in (json.loads(path.read_text()) | changes).items() if v is not None}
        path.write_text(json.dumps(raw))
    return edit


def content(name, new):
    """Replace a file's bytes; `new` may be a function of the old ones."""
    def edit(w):
        path = w / name
        data = new(path.read_bytes()) if callable(new) else new
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return edit


def weights(change, name="model/model.safetensors", metadata=None):
    """Change the dictionary of tensors in a safetensors file."""
    def edit(w):
        with seal.safe_open(w / name, "pt") as file:
            about = file.metadata()
        tensors = load_file(w / name)
        change(tensors)
        save_file({k: v.contiguous() for k, v in tensors.items()}, w / name, about | (metadata or {}))
    return edit


def scales(change=lambda t: None, **metadata):
    return weights(change, "scales.safetensors", metadata)


def lora(change=lambda t: None, metadata=None, **config):
    """LoRA in place of the scales, made for the model with these changes to its config."""
    def edit(w):
        make_scales(seal.replace(seal.read_config(w / "model"), **config), "lora", w / "scales.safetensors")
        scales(change, **(metadata or {}))(w)
    return edit


def header(change):
    """Change the safetensors header as a dictionary, whatever comes out."""
    def edit(old):
        n = struct.unpack("<Q", old[:8])[0]
        new = json.dumps(change(json.loads(old[8 : 8 + n]))).encode()
        return struct.pack("<Q", len(new)) + new + old[8 + n :]
    return content("model/model.safetensors", edit)


def index(change):
    return content("shards/model.safetensors.index.json", lambda old: json.dumps(change(json.loads(old))))


def all_in(file):
    """The index says that this one file holds everything."""
    return index(lambda i: {"weight_map": dict.fromkeys(i["weight_map"], file)})


def to_bin(make):
    """The weights as a pickle that holds make(tensors)."""
    def edit(w):
        tensors = load_file(w / "model" / "model.safetensors")
        (w / "model" / "model.safetensors").unlink()
        torch.save(make(tensors), w / "model" / "pytorch_model.bin")
    return edit


def remove(name):
    return lambda w: (w / name).unlink()


def to_meta(make, **params):
    """Meta's own layout, as far as the first errors need it."""
    def edit(w):
        shutil.copy(w / "model" / "tokenizer.model", w)
        shutil.rmtree(w / "model")
        (w / "model").mkdir()
        shutil.move(w / "tokenizer.model", w / "model")
        about = dict(dim=32, n_layers=2, n_heads=4, norm_eps=1e-5) | params
        (w / "model" / "params.json").write_text(json.dumps(about))
        tensors = {"tok_embeddings.weight": torch.ones(608, 32), "layers.0.feed_forward.w1.weight": torch.ones(48, 32)}
        torch.save(make(tensors), w / "model" / "consolidated.00.pth")
    return edit


class Bomb:
    """What an attacker pickles: code that runs on loading."""

    def __reduce__(self):
        return os.system, ("touch exploded",)


def cast(dtype, name="model.norm.weight"):
    return weights(lambda t: t.update({name: t[name].to(dtype)}))


def fill(value, name="model.layers.1.mlp.up_proj.weight"):
    return weights(lambda t: t[name].view(-1)[-1:].fill_(value))


def claim(name, **changes):
    """Lie about one tensor in the safetensors header."""
    return header(lambda h: h | {name: h[name] | changes})


Q, NORM = "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"
TRAIN = "train --ckpt model --out new.safetensors --length 300 --samples 1 --json new.json"
EVAL = "eval --ckpt model --scales scales.safetensors --lengths 300 --prompts 1 --json new.json --max-new-tokens 4"
HEADS = "heads --ckpt model --lengths 300 --prompts 1 --json new.json"
GENERATE = "generate --ckpt model --scales scales.safetensors --prompt line --max-new-tokens 4"
FOLD = "fold --ckpt model --scales scales.safetensors --out new"
EXPORT = "export --ckpt model --scales scales.safetensors --outfile new.gguf --outtype f32"
LOADS, READS, SCALED, DATA = [TRAIN, EVAL, FOLD, EXPORT], [TRAIN, EVAL, EXPORT], [EVAL, FOLD, EXPORT], [TRAIN, EVAL]
OTHER = [c.replace("--ckpt model", "--ckpt shards") for c in LOADS]
PICKLE = "cannot be read as weights|must hold a dictionary"
FILE = [c + " --task task.jsonl" for c in DATA]
HAY = [c + " --task needle --haystack hay.txt" for c in DATA]
rope = lambda **k: config(rope_parameters={"rope_theta": 1e4} | k)

# name: (what to break, words of the error, commands to try)
BAD = {
    # config.json
    "no folder": (lambda w: shutil.rmtree(w / "model"), "no such checkpoint folder", LOADS),
    "folder is a file": (lambda w: (shutil.rmtree(w / "model"), (w / "model").write_text("")),
        "no such checkpoint folder", LOADS),
    "no config": (remove("model/config.json"), "config.json: cannot be read", LOADS),
    "config not JSON": (content("model/config.json", "{'a': 1"), "is not JSON", LOADS),
    "config not UTF-8": (content("model/config.json", b"\xff\xfe{}"), "is not JSON", LOADS),
    "config nested deep": (content("model/config.json", "[" * 100000), "is not JSON", LOADS),
    "config a list": (content("model/config.json", "[]"), "must hold a JSON object", LOADS),
    "config number too long": (content("model/config.json", '{"hidden_size": %s}' % ("9" * 5000)), "is not JSON",
        LOADS),
    "no architecture": (config(architectures=None), "architecture None is not supported", LOADS),
    "other architecture": (config(architectures=["GPT2LMHeadModel"]), "GPT2LMHeadModel is not supported", LOADS),
    "architecture an object": (config(architectures={"a": 1}), "is not supported", LOADS),
    "other activation": (config(hidden_act="gelu"), "gelu", LOADS),
    "no hidden_size": (config(hidden_size=None), "hidden_size is missing", LOADS),
    "no vocab_size": (config(vocab_size=None), "vocab_size is missing", LOADS),
    "hidden_size text": (config(hidden_size="32"), "hidden_size must be a whole number", LOADS),
    "hidden_size a fraction": (config(hidden_size=32.5), "hidden_size must be a whole number", LOADS),
    "layers true": (config(num_hidden_layers=True), "num_hidden_layers must be", LOADS),
    "heads negative": (config(num_attention_heads=-4), "num_attention_heads must be", LOADS),
    "heads zero": (config(num_attention_heads=0), "num_attention_heads must be", LOADS),
    "heads do not divide": (config(num_attention_heads=5, num_key_value_heads=5, head_dim=None), "not a multiple",
        LOADS),
    "groups do not divide": (config(num_key_value_heads=3), "not a multiple", LOADS),
    "head_dim odd": (config(head_dim=7), "must be even", LOADS),
    "hidden_size 1e8": (config(hidden_size=10**8), "hidden_size|shape", LOADS),
    "hidden_size 1e300": (config(hidden_size=10**300), "hidden_size must be", LOADS),
    "vocab_size 1e8": (config(vocab_size=10**8), "vocab_size|shape|tokenizer", LOADS),
    "layers 1e8": (config(num_hidden_layers=10**8), "num_hidden_layers must be", LOADS),
    "everything huge": (config(hidden_size=2**23, head_dim=2**23, num_attention_heads=2**23, num_key_value_heads=2**23),
        "head_dim|shape", LOADS),
    "context 1e9": (config(max_position_embeddings=10**9), "max_position_embeddings",
        [TRAIN.replace("--length 300", "--task needle")]),
    "eps NaN": (config(rms_norm_eps=float("nan")), "rms_norm_eps must be", LOADS),
    "tie a word": (config(tie_word_embeddings="yes"), "tie_word_embeddings must be true or false", LOADS),
    "rope a word": (config(rope_parameters="yarn"), "rope", LOADS),
    "rope type unknown": (rope(rope_type="dynamic", factor=2), "'dynamic' is not supported", LOADS),
    "rope type a list": (rope(rope_type=["yarn"]), "rope type", LOADS),
    "rope factor missing": (rope(rope_type="linear"), "factor is missing", LOADS),
    "rope factor 1e9": (rope(rope_type="linear", factor=1e9), "factor must be", LOADS),
    "rope factor below 1": (rope(rope_type="linear", factor=0.5), "factor must be", LOADS),
    "rope beta 0": (rope(rope_type="yarn", factor=2, original_max_position_embeddings=512, beta_fast=0),
        "beta_fast must be", LOADS),
    "rope theta 1": (rope(rope_type="yarn", factor=2, original_max_position_embeddings=512, rope_theta=1),
        "rope_theta must be", LOADS),
    "rope parameter unknown": (rope(rope_type="linear", factor=2, fast=1), "fast", LOADS),
    "llama3 ramp upside down": (rope(rope_type="llama3", factor=2, low_freq_factor=4), "must be below", LOADS),
    # weights
    "no weights": (remove("model/model.safetensors"), "no weights", LOADS),
    "weights empty": (content("model/model.safetensors", b""), "cannot be read as weights", LOADS),
    "weights truncated": (content("model/model.safetensors", lambda old: old[:-100]), "cannot be read as weights",
        LOADS),
    "header truncated": (content("model/model.safetensors", lambda old: old[:100]), "cannot be read as weights", LOADS),
    "header longer than the file": (
        content("model/model.safetensors", lambda old: struct.pack("<Q", 1 << 62) + old[8:]),
        "cannot be read as weights", LOADS),
    "header not JSON": (content("model/model.safetensors", lambda old: old[:8] + b"x" + old[9:]),
        "cannot be read as weights", LOADS),
    "weights are a web page": (content("model/model.safetensors", "<!DOCTYPE html><html>404 not found</html>"),
        "cannot be read as weights", LOADS),
    "offsets beyond the file": (claim(NORM, data_offsets=[0, 1 << 40]), "cannot be read as weights", LOADS),
    "shape beyond the bytes": (claim(NORM, shape=[1 << 40]), "cannot be read as weights", LOADS),
    "tensor missing": (weights(lambda t: t.pop(Q)), "the weights lack layers.0.self_attn.q_proj.weight", LOADS),
    "tensor unknown": (weights(lambda t: t.update({"model.layers.0.extra": torch.ones(1)})), "model.layers.0.extra",
        LOADS),
    "layer too many": (weights(lambda t: t.update({"model.layers.7.self_attn.o_proj.weight": torch.ones(32, 32)})),
        "model.layers.7", LOADS),
    "tensor twice": (weights(lambda t: t.update({Q.removeprefix("model."): t[Q].clone()})), "q_proj", LOADS),
    "wrong shape": (weights(lambda t: t.update({Q: torch.ones(32, 31)})),
        r"shape \[32, 31\], config.json says \[32, 32\]", LOADS),
    "o_proj a vector": (weights(lambda t: t.update({Q.replace("q_", "o_"): torch.ones(32)})),
        r"o_proj.weight has shape \[32\]", LOADS),
    "config of another size": (config(intermediate_size=56), "config.json says", LOADS),
    "int8": (cast(torch.int8), "is int8; quantised", LOADS),
    "float8": (cast(torch.float8_e4m3fn), "is float8_e4m3fn; quantised", LOADS),
    "bool": (cast(torch.bool), "is bool; quantised", LOADS),
    "NaN": (fill(float("nan")), "up_proj.weight:? holds NaN", LOADS),
    "infinity": (fill(float("inf")), "up_proj.weight:? holds NaN", LOADS),
    "index not JSON": (content("shards/model.safetensors.index.json", "{"), "is not JSON", OTHER),
    "index a list": (content("shards/model.safetensors.index.json", "[1]"), "must hold a JSON object|weight_map",
        OTHER),
    "index without map": (index(lambda i: {}), "has no weight_map", OTHER),
    "index maps to numbers": (index(lambda i: {"weight_map": {NORM: 1}}), "has no weight_map", OTHER),
    "index leaves the folder": (all_in("../model/model.safetensors"),
        "not in the folder", OTHER),
    "index names the parent": (all_in(".."),
        "not in the folder|missing", OTHER),
    "index absolute": (all_in("/etc/passwd"),
        "not in the folder", OTHER),
    "index names config.json": (all_in("config.json"),
        "cannot be read as weights", OTHER),
    "index names a missing tensor": (
        index(lambda i: {"weight_map": i["weight_map"] | {"model.more": max(i["weight_map"].values())}}),
        "model.more", OTHER),
    "index forgets a tensor": (index(lambda i: {"weight_map": {k: v for k, v in i["weight_map"].items() if k != Q}}),
        "q_proj", OTHER),
    "shard missing": (lambda w: max((w / "shards").glob("*.safetensors")).unlink(), "is missing; download that shard",
        OTHER),
    "shard truncated": (lambda w: os.truncate(max((w / "shards").glob("*.safetensors")), 1000),
        "cannot be read as weights", OTHER),
    "pickle runs code": (to_bin(lambda t: t | {"x": Bomb()}), PICKLE, LOADS),
    "pickle without torch": (lambda w: (remove("model/model.safetensors")(w),
        (w / "model/pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))), PICKLE, LOADS),
    "pickle truncated": (lambda w: (to_bin(dict)(w), os.truncate(w / "model/pytorch_model.bin", 9000)), PICKLE, LOADS),
    "pickle a list": (to_bin(lambda t: list(t.values())), PICKLE, LOADS),
    "pickle empty": (lambda w: (remove("model/model.safetensors")(w), (w / "model/pytorch_model.bin").touch()),
        PICKLE, LOADS),
    "pickle with number keys": (to_bin(lambda t: dict(enumerate(t.values()))), PICKLE, LOADS),
    "pickle nests": (to_bin(lambda t: {"model": t}), PICKLE, LOADS),
    "pickle sparse": (to_bin(lambda t: t | {Q: t[Q].to_sparse()}), "q_proj", LOADS),
    "pickle on meta": (to_bin(lambda t: t | {Q: t[Q].to("meta")}), "q_proj", LOADS),
    "pickle inflates": (to_bin(lambda t: t | {Q: torch.ones(1).expand(32, 32)}), "q_proj", LOADS),
    "Meta's without embedding": (to_meta(lambda t: {}), "the weights lack model.embed_tokens", LOADS),
    "Meta's with numbers for weights": (to_meta(lambda t: dict.fromkeys(t, torch.tensor(1.0))),
        "vocab_size is missing", LOADS),
    "Meta's width a word": (to_meta(dict, dim="32"), "params.json: hidden_size must be", LOADS),
    "Meta's runs code": (to_meta(lambda t: t | {"x": Bomb()}), PICKLE, LOADS),
    "Meta's tensor unknown": (to_meta(lambda t: t | {"x\ny": torch.ones(1)}), "holds model.x y.weight", [TRAIN]),
    "Meta's q of another shape": (to_meta(lambda t: t | {"layers.0.attention.wq.weight": torch.ones(31)}),
        "attention.wq.weight", [TRAIN]),
    # tokenizer
    "no tokenizer": (remove("model/tokenizer.model"), "no tokenizer.model", READS),
    "tokenizer empty": (content("model/tokenizer.model", b""), "is not a sentencepiece model", READS),
    "tokenizer truncated": (content("model/tokenizer.model", lambda old: old[:1000]), "is not a sentencepiece model",
        READS),
    "tokenizer is text": (content("model/tokenizer.model", "version https://git-lfs.github.com/spec/v1\n"),
        "is not a sentencepiece model", READS),
    "tokenizer too large": (lambda w: (config(vocab_size=590)(w),
        weights(lambda t: t.update({k: t[k][:590] for k in t if "embed" in k or "lm_head" in k}))(w)),
        "600 pieces, the model (only )?590", READS),
    "tokenizer too small": (lambda w: (config(vocab_size=6080)(w),
        weights(lambda t: t.update({k: t[k].repeat(10, 1) for k in t if "embed" in k or "lm_head" in k}))(w)),
        "belong together", [TRAIN, EVAL]),
    "tokenizer.json a page": (
        lambda w: (remove("model/tokenizer.model")(w), (w / "model/tokenizer.json").write_text("<html>")),
        "tokenizer.json", READS),
    "tokenizer_config a list": (lambda w: (w / "model/tokenizer_config.json").write_text("[]"),
        "must hold a JSON object", READS),
    "added token without an id": (lambda w: (w / "model/added_tokens.json").write_text('{"<x>": "y"}'),
        "added_tokens.json|added tokens", READS),
    "added token negative": (lambda w: (w / "model/added_tokens.json").write_text('{"line": -3}'),
        "added_tokens.json|added tokens", READS),
    "added tokens a list": (lambda w: (w / "model/tokenizer_config.json").write_text('{"added_tokens_decoder": [1]}'),
        "added tokens|added_tokens", READS),
    "generation_config a list": (lambda w: (w / "model/generation_config.json").write_text("[]"),
        "must hold a JSON object", [TRAIN, EVAL]),
    "template unknown": (None, "--template chatml: must be",
        [TRAIN + " --template chatml", EVAL + " --template chatml"]),
    "template's end unknown": (None, "the tokenizer has no <|eot_id|>", [TRAIN + " --template llama-3"]),
    # scales
    "no scales": (remove("scales.safetensors"), "cannot be read as scales", SCALED),
    "scales a folder": (lambda w: (remove("scales.safetensors")(w), (w / "scales.safetensors").mkdir()),
        "cannot be read as scales", SCALED),
    "scales empty": (content("scales.safetensors", b""), "cannot be read as scales", SCALED),
    "scales truncated": (content("scales.safetensors", lambda old: old[:-3]), "cannot be read as scales", SCALED),
    "scales of another program": (lambda w: shutil.copy(w / "model/model.safetensors", w / "scales.safetensors"),
        "is not a scales file", SCALED),
    "scales of more heads": (scales(lambda t: t.update({k: torch.ones(8) for k in t})), r"\[8\]", SCALED),
    "scales of more layers": (scales(lambda t: t.update({"layers.2.scale": torch.ones(4)})), "3 layers", SCALED),
    "scales lack a layer": (scales(lambda t: t.pop("layers.0.scale")), "layers are missing", SCALED),
    "scales of nothing": (scales(lambda t: t.clear()), "layers are missing", SCALED),
    "scales and more": (scales(lambda t: t.update({"lora": torch.ones(4)})), "layers are missing or unknown", SCALED),
    "scales of the other mode": (scales(mode="channel"), "made for", SCALED),
    "scales of no mode": (scales(mode="banana"), "mode", SCALED),
    "scales say other heads": (
        scales(lambda t: t.update({k: torch.ones(32) for k in t}), mode="channel", heads="8", head_size="4"),
        "made for", SCALED),
    "scales NaN": (scales(lambda t: t["layers.1.scale"].fill_(float("nan"))), "finite float32", SCALED),
    "scales float16": (scales(lambda t: t.update({k: v.half() for k, v in t.items()})), "finite float32", SCALED),
    "LoRA of a wider model": (lora(hidden_size=64), r"2 layers of \[4, 64\] .* 2 of \[4, 32\]", SCALED),
    "LoRA of fewer key heads": (lora(num_key_value_heads=2), r"of \[16, 4\] .* of \[32, 4\]", SCALED),
    "LoRA of more layers": (lora(num_hidden_layers=3), "3 layers", SCALED),
    "LoRA of another rank": (lora(lambda t: t.update({k: v[:3] for k, v in t.items() if k.endswith("A")})),
        r"of \[3, 32\] .* of \[4, 32\]", SCALED),
    "LoRA lacks a matrix": (lora(lambda t: t.pop("layers.1.v_proj.lora_B")), "layers are missing", SCALED),
    "LoRA and scales": (lora(lambda t: t.update({"layers.0.scale": torch.ones(4)})), "missing or unknown", SCALED),
    "LoRA that says it is scales": (lora(metadata={"mode": "head"}), "missing or unknown", SCALED),
    "scales that say they are LoRA": (scales(mode="lora"), "missing or unknown", SCALED),
    "LoRA NaN": (lora(lambda t: t["layers.1.q_proj.lora_A"].fill_(float("nan"))), "finite float32", SCALED),
    "LoRA of heads": (lora(), "SEAL-L has no numbers per head", [HEADS + " --scales scales.safetensors"]),
    "scales' extension unknown": (scales(extend="magic:4"), "magic:4: must be", SCALED),
    "scales were trained extended": (scales(extend="ntk:2"), "trained with ntk:2",
        [c + " --extend ntk:4" for c in SCALED]),
    # a task of one's own
    "no task file": (remove("task.jsonl"), "task.jsonl", FILE),
    "task unknown": (None, "must be lines, needle or a file", [c + " --task summaries" for c in DATA]),
    "task a folder": (lambda w: (w / "x.jsonl").mkdir(), "x.jsonl", [c + " --task x.jsonl" for c in DATA]),
    "task empty": (content("task.jsonl", "\n\n"), "holds no samples", FILE),
    "task line not JSON": (content("task.jsonl", lambda old: old + b"{prompt}\n"), "task.jsonl, line 15", FILE),
    "task line a list": (content("task.jsonl", "[]"), "line 1: not an object", FILE),
    "task without answer": (content("task.jsonl", '{"prompt": "x"}'), 'line 1: needs a "prompt" and an "answer"', FILE),
    "task answer empty": (content("task.jsonl", '{"prompt": "x", "answer": " "}'), "line 1: needs", FILE),
    "task answer a number": (content("task.jsonl", '{"prompt": "x", "answer": 3}'), "line 1: needs", FILE),
    "task expects a list": (content("task.jsonl", '{"prompt": "x", "answer": "y", "expected": []}'),
        '"expected" must be', FILE),
    "task expects a space": (content("task.jsonl", '{"prompt": "x", "answer": "y", "expected": " "}'),
        '"expected" must be', FILE),
    "task expects infinity": (content("task.jsonl", '{"prompt": "x", "answer": "y", "expected_number": 1e999}'),
        "line 1: ", FILE),
    "task without random_idx": (content("task.jsonl", '{"prompt": "x", "expected_number": 1}'),
        "line 1: .*random_idx", FILE),
    "task not UTF-8": (content("task.jsonl", b'{"prompt": "\xff", "answer": "y"}'), "UTF-8", FILE),
    "task half a character": (content("task.jsonl", r'{"prompt": "\ud800", "answer": "y"}'), "line 1: ", FILE),
    "task prompt too long": (content("task.jsonl", json.dumps({"prompt": "long " * 999, "answer": "y"})),
        "sample 1: .* tokens", FILE),
    "task answer too long": (content("task.jsonl", json.dumps({"prompt": "x", "answer": "long " * 999})),
        "sample 1: .* tokens", FILE),
    # haystacks and depths
    "no haystack": (remove("hay.txt"), "--haystack hay.txt: cannot be read", HAY),
    "haystack empty": (content("hay.txt", ""), "no two sentences", HAY),
    "haystack one sentence": (content("hay.txt", "A single sentence"), "no two sentences", HAY),
    "haystack not text": (content("hay.txt", b"\x80\x81"), "cannot be read as UTF-8", HAY),
    "haystack of endless sentences": (content("hay.txt", ("word " * 2000 + ". ") * 2),
        "too short, the smallest prompt", HAY),
    "depth above 100": (None, "must be from 0 to 100", [EVAL + " --task needle --depths 0,101"]),
    "depth below 0": (None, "must be from 0 to 100", [EVAL + " --task needle --depths=-1"]),
    "depth NaN": (None, "must be from 0 to 100", [EVAL + " --task needle --depths nan"]),
    # flags
    "no command": (None, "required", [""]),
    "command unknown": (None, "invalid choice", ["tarin"]),
    "flag unknown": (None, "unrecognized arguments: --lenght", [TRAIN + " --lenght 9"]),
    "flag without value": (None, "expected one argument", [TRAIN + " --lr"]),
    "length 0": (None, "whole number from 1", [TRAIN + " --length 0"]),
    "length a word": (None, "whole number from 1", [TRAIN + " --length long", EVAL + " --lengths 300,long"]),
    "length too short": (None, "--length 12: too short", [TRAIN + " --length 12", EVAL + " --lengths 12"]),
    "length beyond the context": (None, "context of 512", [TRAIN + " --length 513", HEADS + " --lengths 999999"]),
    "length 1e30": (None, "--lengths?:? must be|--lengths?: must be",
        [TRAIN + f" --length {10**30}", EVAL + f" --lengths {10**30}"]),
    "samples 0": (None, "whole number from 1", [TRAIN + " --samples 0"]),
    "batch of none": (None, "--batch: must be a whole number", [TRAIN + " --batch 0"]),
    "shards of one": (None, "--shard: .* torchrun", [TRAIN + " --shard"]),
    "lr negative": (None, "number above 0", [TRAIN + " --lr=-1"]),
    "lr huge": (None, "number above 0", [TRAIN + " --lr 1e38"]),
    "lr NaN": (None, "number above 0", [TRAIN + " --lr nan"]),
    "seed a word": (None, "--seed", [TRAIN + " --seed x"]),
    "mode unknown": (None, "invalid choice", [TRAIN + " --mode layer"]),
    "extension unknown": (None, "--extend dynamic:2: (must be|the scales)",
        [TRAIN + " --extend dynamic:2", FOLD + " --extend dynamic:2"]),
    "extension below 1": (None, "factor S from 1", [TRAIN + " --extend ntk:0.5"]),
    "Self-Extend by half": (None, "must be self:G,W", [TRAIN + f" --extend self:{x}" for x in (
        "", "4", "4,", "0,32", "4,0", "4,512", "-4,32", "4,32,1", "4.5,32", "1e3,32", "9999999,32")]),
    "Self-Extend in a file": (scales(extend="self:4,32"), "--extend none, .* --grp-attn-n 4 --grp-attn-w 32",
        [FOLD, EXPORT]),
    "Self-Extend in a bare file": (None, "--grp-attn-n 4 --grp-attn-w 32",
        ["export --ckpt model --scales none --extend self:4,32 --outfile new.gguf"]),
    "Self-Extend left out": (scales(extend="self:4,32"), "trained with self:4,32", [EVAL + " --extend none"]),
    "extension NaN": (None, "factor S from 1", [TRAIN + " --extend ntk:nan"]),
    "extension on an extension": (rope(rope_type="linear", factor=2.0), "rope type linear",
        [TRAIN + " --extend yarn:2"]),
    "device unknown": (None, "--device gpu: not usable", [TRAIN + " --device gpu"]),
    "device absent": (None, "--device cuda:7: not usable", [TRAIN + " --device cuda:7"]),
    "device without memory": (None, "--device meta: not usable", [TRAIN + " --device meta"]),
    "no out": (None, "--out", ["fold --ckpt model --scales scales.safetensors"]),
    "out in no folder": (None, "does not exist", [TRAIN + " --out a/b.safetensors", EVAL + " --json a/b.json",
        EXPORT + " --outfile a/b.gguf", FOLD + " --out a/b"]),
    "out a folder": (None, "is a folder", [TRAIN + " --out model", EVAL + " --json model", EVAL + " --plot model",
        TRAIN + " --json model", EXPORT + " --outfile model"]),
    "out a device": (lambda w: os.mkfifo(w / "pipe"), "is not a file",
        [TRAIN + " --out pipe", EVAL + " --json pipe", EXPORT + " --outfile pipe"]),
    "out is the task": (None, "is one of the inputs",
        [TRAIN + " --task task.jsonl --out task.jsonl", TRAIN + " --task task.jsonl --json task.jsonl"]),
    "out is the haystack": (None, "is one of the inputs",
        [TRAIN + " --task needle --haystack hay.txt --out model/../hay.txt"]),
    "out is the scales": (None, "is one of the inputs", [EVAL + " --json scales.safetensors",
        EVAL + " --plot scales.safetensors", EXPORT + " --outfile scales.safetensors"]),
    "out is in the checkpoint": (None, "is one of the inputs", [TRAIN + " --out model/model.safetensors",
        EVAL + " --json model/config.json", HEADS + " --plot model/tokenizer.model",
        EXPORT + " --outfile model/config.json"]),
    "one out for two": (None, "is one of the inputs|is the same|twice",
        [TRAIN + " --json new.safetensors", EVAL + " --plot new.json"]),
    "fold onto a folder": (None, "exists already", [FOLD + " --out model"]),
    "compare with nothing": (None, "--compare: needs --scales", ["eval --ckpt model --lengths 300 --compare"]),
    "resume from nothing": (None, "--resume: needs the --json file",
        ["eval --ckpt model --lengths 300 --prompts 1 --resume"]),
    "resume another's": (lambda w: (w / "new.json").write_text("{}"), "is of another run",
        [EVAL + " --resume", HEADS + " --resume"]),
    "resume a wreck": (lambda w: (w / "new.safetensors.state").write_bytes(b"PK\x03\x04"), "cannot be read",
        [TRAIN + " --resume"]),
    "resume a bomb": (lambda w: torch.save({"recipe": Bomb()}, w / "new.safetensors.state"), "cannot be read",
        [TRAIN + " --resume"]),
    "resume a stranger": (lambda w: torch.save([1], w / "new.safetensors.state"), "cannot be read",
        [TRAIN + " --resume"]),
    "answer without end": (None, "--max-new-tokens",
        [EVAL + f" --max-new-tokens {10**9}", GENERATE + f" --max-new-tokens {10**12}"]),
    "prompt empty": (None, "--prompt: is empty", [["generate", "--ckpt", "model", "--prompt", ""]]),
    "prompt half a character": (None, "--prompt: .*UTF-8", [["generate", "--ckpt", "model", "--prompt", "a\udcff"]]),
    "prompt beyond the context": (None, "context of 512", [["generate", "--ckpt", "model", "--prompt", "long " * 999]]),
    "quadrants of one": (None, "--quadrants", [HEADS + " --quadrants 0.9"]),
    "channels of no head": (None, "--channels 0.4: there are 2 layers of 4 heads", [HEADS + " --channels 0.4"]),
    "direct without scales": (None, "--direct: needs --scales", [HEADS + " --direct"]),
}


def snapshot(folder) -> dict:
    return {p: p.read_bytes() if p.is_file() else None for p in sorted(Path(folder).rglob("*"))}


def invoke(capsys, arguments) -> tuple[str, int, str, str]:
    """`seal.py ...`, or export_gguf.py where the command is "export"; in this process."""
    arguments = arguments.split() if isinstance(arguments, str) else arguments
    if arguments[:1] != ["export"]:
        return "seal.py", *command(capsys, *arguments)
    capsys.readouterr()
    status = seal.run("export_gguf.py", export_gguf.parse, arguments[1:])
    return "export_gguf.py", status, *capsys.readouterr()


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_answered_in_one_line(case, good, tmp_path, monkeypatch, capsys):
    broken, words, commands = BAD[case]
    w = tmp_path / "w"
    shutil.copytree(good, w)
    monkeypatch.chdir(w)
    if broken:
        broken(w)
    before = snapshot(w)
    for arguments in commands:
        with limits(seconds=20):
            program, status, out, err = invoke(capsys, arguments)
        last = re.split(r"[\r\n]", err.rstrip("\n"))[-1]
        assert (status, out) == (2, ""), (arguments, status, out, err)
        assert last.startswith(f"{program}: error: ") and re.search(words, last), (arguments, last)
        assert err.count("error:") == 1 and "Traceback" not in err, (arguments, err)
        assert snapshot(w) == before, (arguments, "files changed", set(snapshot(w)) ^ set(before))


def test_good_input_is_accepted(good, tmp_path, monkeypatch, capsys):
    """The commands that the table breaks do work: otherwise it would prove nothing."""
    shutil.copytree(good, tmp_path / "w")
    monkeypatch.chdir(tmp_path / "w")
    for arguments in [*LOADS, *OTHER, GENERATE, HEADS, *FILE, *HAY, EVAL + " --task needle --depths 0,100"]:
        assert invoke(capsys, arguments)[1] == 0, arguments
        shutil.rmtree("new", ignore_errors=True)
    for make in (dict, lambda t: {k: torch.nn.Parameter(v) for k, v in t.items()}):
        shutil.rmtree("model")
        shutil.copytree(good / "model", "model")
        to_bin(make)(tmp_path / "w")
        for arguments in LOADS:
            assert invoke(capsys, arguments)[1] == 0, arguments
        shutil.rmtree("new", ignore_errors=True)
    assert not list(Path().rglob("*.part"))


@contextmanager
def limits(seconds: float, gigabytes: float = 3):
    """No hang and no memory blow-up: an alarm, and a lid on the memory this process may map."""
    def alarm(*_):
        raise AssertionError(f"still running after {seconds} s")
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if sys.platform == "linux" else 0
    kept, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, alarm)
    if pages:
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + int(gigabytes * 2**30), kept[1]))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, kept)


def test_a_real_process_ends_in_one_line(good, tmp_path):
    """The same from outside: exit status, one line, no traceback; a full disk behind stdout is said, too."""
    def start(*arguments, stdout):
        line = [sys.executable, seal.__file__, *arguments]
        return subprocess.Popen(line, cwd=good, stdout=stdout, stderr=subprocess.PIPE, text=True)

    error = r"seal\.py: error: "
    with open("/dev/full", "w") as full:
        running = [
            (start("train", "--ckpt", "nowhere", stdout=subprocess.PIPE), error + "nowhere: no such checkpoint.*\n"),
            (start(*GENERATE.split(), stdout=full), r"(model|context|scales) .*\n" * 3 + error + ".*No space left.*\n"),
        ]
    for process, expected in running:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 2 and not out and re.fullmatch(expected, err), (process.returncode, out, err)


# --- fuzz ---

NASTY = [None, True, False, -1, 0, 1, 3, 2**31, 10**30, 1e308, float("nan"), float("inf"), -0.5, 0.1, "", "x", "none",
         "../x", "0", "\ud800", "9" * 400, [], {}, [1], [[]], {"a": 1}, {"rope_type": "yarn"}, ["F32"], "F8_E4M3",
         "BOOL", "I64"]


def mutated(rng, value):
    """A copy of a JSON value with one thing in it replaced, removed, renamed or doubled."""
    value = json.loads(json.dumps(value))
    spots = []
    def walk(node):
        for key in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            spots.append((node, key))
            walk(node[key])
    walk(value)
    for _ in range(rng.randint(1, 2)):
        node, key = rng.choice(spots)
        kind = rng.random() if isinstance(node, list) or key in node else 0
        if kind < 0.6:
            node[key] = rng.choice(NASTY)
        elif kind < 0.7 and type(node[key]) in (int, float):
            node[key] *= rng.choice([-1, 2, 0.5, 1000, 1e9])
        elif kind < 0.8 and isinstance(node, dict):
            node.pop(key, None)
        elif kind < 0.9 and isinstance(node, dict):
            node[rng.choice(["x", "\ud800", "", "__class__", key + "x"])] = node[key] if key in node else 0
        else:
            other, where = rng.choice(spots)
            node[key] = json.loads(json.dumps(other[where] if not isinstance(other, dict) or where in other else None))
    return json.dumps(value).encode()


def scrambled(rng, data: bytes, until: int) -> bytes:
    """Bytes with a few flipped, cut out, put in or doubled within the first `until`."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(max(1, min(until, len(data))))
        kind, n = rng.random(), rng.choice([1, 1, 2, 8, 60])
        if kind < 0.5:
            data[at : at + 1] = bytes([rng.randrange(256)])
        elif kind < 0.7:
            del data[at : at + n]
        elif kind < 0.9:
            data[at:at] = data[at : at + n] or b"{"
        else:
            del data[at:]
    return bytes(data)


def fuzz(rng, data: bytes, framed: bool = False) -> bytes:
    """A mutation of a JSON text, or (framed) of a safetensors file: of its header's meaning or of its bytes."""
    n = struct.unpack("<Q", data[:8])[0] if framed else len(data)
    if rng.random() < 0.35:
        return scrambled(rng, data, n + 8 * framed)
    if not framed:
        return mutated(rng, json.loads(data))
    header = mutated(rng, json.loads(data[8 : 8 + n]))
    return struct.pack("<Q", len(header)) + header + data[8 + n :]


@pytest.mark.parametrize("what", ["config", "weights", "scales", "task"])
def test_fuzzed_input_ends_in_success_or_a_user_error(what, good, tmp_path, monkeypatch):
    """500 mutations each: every one is read, or is a UserError. Anything else, a hang or 3 GB more fails the test."""
    w = tmp_path / "w"
    shutil.copytree(good, w)
    monkeypatch.chdir(w)
    rng, ends = random.Random(what), {"accepted": 0, "refused": 0}
    config = seal.read_config("model")
    tokenizer = seal.Tokenizer("model", config)
    raw = json.loads(Path("model/config.json").read_text()) | {"generator": None}
    ropes = [{"rope_type": "default"}, {"rope_type": "linear", "factor": 2.0},
             seal.ROPE_KINDS["llama3"] | {"rope_type": "llama3", "factor": 8.0},
             seal.ROPE_KINDS["yarn"] | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}]

    def use_config():
        c = seal.extend(seal.read_config("model"), rng.choice(["none", "ntk:4", "linear:2", "yarn:8"]))
        seal.load_model("model", c, CPU)(torch.tensor([[1, 2, 3]]))

    def use_weights():
        model = seal.load_model("model", config, CPU)
        assert all(p.isfinite().all() for p in model.parameters())

    def use_scales():
        learned, about = seal.read_scales("scales.safetensors", config)
        seal.extend(config, seal.resolve_extension(None, about))
        assert len(learned) == 2 and about["mode"] in seal.METHOD and about.get("prompts", "").split(",")

    def use_task():
        for sample in seal.make_samples("task.jsonl", tokenizer, config, 400, 3, "eval"):
            assert 0 <= sample.score("12 or " + sample.answer) <= 1 and tokenizer.answer(sample.answer)

    path, use = {"config": ("model/config.json", use_config), "weights": ("model/model.safetensors", use_weights),
                 "scales": ("scales.safetensors", use_scales), "task": ("task.jsonl", use_task)}[what]
    path, pristine = Path(path), Path(path).read_bytes()
    longeval = {"prompt": "Tell me", "expected_number": 7, "random_idx": ["a-b", 3], "answer": "seven", "expected": "7"}
    for i in range(500):
        if what == "config":
            key = rng.choice(["rope_scaling", "rope_parameters"])
            data = fuzz(rng, json.dumps(raw | {key: rng.choice(ropes)}).encode())
        elif what == "task":
            lines = pristine.splitlines()[:3] + [json.dumps(longeval).encode()]
            at = rng.randrange(4)
            lines[at] = fuzz(rng, lines[at])
            data = b"\n".join(lines)
        else:
            data = fuzz(rng, pristine, framed=True)
        path.write_bytes(data)
        try:
            with limits(seconds=10):
                use()
            ends["accepted"] += 1
        except seal.UserError as e:
            assert len(str(e)) < 2000, e
            ends["refused"] += 1
        except Exception as e:
            pytest.fail(f"mutation {i}: {e!r} from {data[:600]!r}")
    assert min(ends.values()) >= 5, ends


# --- kills and full disks ---

SERVER = """
import json, os, signal, sys, threading
sys.path.insert(0, sys.argv[1])
import torch, seal, export_gguf
torch.set_num_threads(1)
seal.tqdm.set_lock(threading.RLock())  # its own lock is shared by children, and a killed one would keep it
seal.tqdm.monitor_interval = 0
p = torch.nn.Parameter(torch.ones(2))  # torch imports much at its first uses: here, not in every child
p.grad = torch.ones(2)
o = torch.optim.AdamW([p])
o.step(), o.zero_grad(), o.load_state_dict(o.state_dict())
seal.load_model(sys.argv[2], seal.read_config(sys.argv[2]), torch.device("cpu"))
for line in sys.stdin:
    folder, arguments = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.chdir(folder)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0), os.dup2(log, 1), os.dup2(log, 2)
        status = None
        try:
            if arguments[0] == "export":
                status = seal.run("export_gguf.py", export_gguf.parse, arguments[1:])
            else:
                status = seal.run("seal.py", seal.parse, arguments)
        except BaseException:
            if status is None:  # not a signal that came when all was done
                import traceback
                traceback.print_exc()
                status = 1
        finally:
            sys.stderr.flush()
            os._exit(status)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@pytest.fixture(scope="session")
def processes(good):
    """start(folder, command, kill=(seconds, signal) or None) -> exit status; a real process, forked from a warm one."""
    server = subprocess.Popen([sys.executable, "-c", SERVER, str(Path(seal.__file__).parent), str(good / "model")],
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def start(folder, line, kill=None) -> int:
        server.stdin.write(json.dumps([str(folder), line.split()]) + "\n")
        server.stdin.flush()
        pid = int(server.stdout.readline())
        if kill and not select.select([server.stdout], [], [], kill[0])[0]:
            with suppress(ProcessLookupError):  # it has ended by itself just now
                os.kill(pid, kill[1])
        if not select.select([server.stdout], [], [], 60)[0]:
            os.kill(pid, signal.SIGKILL)
            pytest.fail(f"{line}: hangs")
        return int(server.stdout.readline())

    yield start
    server.stdin.close()
    server.wait(timeout=60)


def same(path):
    """What has to be the same in two runs: all but the seconds, and the order of a safetensors header."""
    if path.suffix == ".json":
        return json.loads(path.read_text()) | {"seconds": 0}
    if path.suffix != ".safetensors":
        return path.read_bytes()
    with seal.safe_open(path, "pt") as file:
        return file.metadata(), {name: file.get_tensor(name).numpy().tobytes() for name in file.keys()}


def whole_state(path) -> int:
    """Steps in a training state that must be whole, if there is one."""
    return len(torch.load(path, weights_only=True)["losses"]) if path.exists() else 0


LONG_TRAIN = "train --ckpt model --task task.jsonl --samples 8 --epochs 4 --out new.safetensors --json new.json"
LONG_EVAL = "eval --ckpt model --scales scales.safetensors --task needle --lengths 180,220 --depths 0,50,100 "
LONG_EVAL += "--prompts 6 --max-new-tokens 4 --json new.json"
LONG_HEADS = "heads --ckpt model --task task.jsonl --how prune --prompts 6 --json new.json"


KILLS = {LONG_TRAIN: 18, LONG_EVAL: 12, LONG_HEADS: 10, FOLD: 12, EXPORT: 10}


@pytest.mark.parametrize("line, kills", KILLS.items(), ids=[line.split()[0] for line in KILLS])
def test_killed_at_any_moment(line, kills, good, tmp_path, processes):
    """Killed processes, 62 in all: what stands under a final name is whole, what was there stays, --resume ends so."""
    what, rng = line.split()[0], random.Random(line)
    reference, times = tmp_path / "reference", []
    for _ in range(2):  # the second is not slowed by first uses
        shutil.rmtree(reference, ignore_errors=True)
        shutil.copytree(good, reference)
        began = time.monotonic()
        assert processes(reference, line) == 0, (reference / "log").read_text()
        times.append(time.monotonic() - began)
    resumable = what in ("train", "eval", "heads")
    outputs = {"train": ["new.safetensors", "new.json"], "export": ["new.gguf"], "fold": ["new"]}
    outputs = outputs.get(what, ["new.json"])

    def complete(path):
        files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
        return {str(p.relative_to(path)): same(p) for p in files}

    done = endings = 0
    while done < kills:
        w = tmp_path / f"run{endings}"
        shutil.copytree(good, w)
        if what == "export":
            (w / "new.gguf").write_bytes(b"the old one")
        progress, status = 0, None
        for _ in range(4):
            sign, parts = rng.choice([signal.SIGINT, signal.SIGTERM, signal.SIGKILL]), set(w.rglob("*.part"))
            moment = rng.uniform(0, 0.7 if progress else 1.0) * min(times)
            status = processes(w, line + " --resume" * resumable, (moment, sign))
            log = (w / "log").read_text() if (w / "log").exists() else ""
            # A progress bar that is stopped while it is being made complains when it is collected; tqdm's own affair.
            log = re.sub(r"(?s)Exception ignored in: <function tqdm.__del__.*?AttributeError: [^\n]*\n", "", log)
            assert status in (0, 130, 143, -sign) and "Traceback" not in log, (status, sign, log)
            if status == 0:
                break
            done += 1
            if status in (130, 143):
                assert set(w.rglob("*.part")) == parts, (sign, log)
            for name in outputs:
                path = w / name
                if path.exists() and not (what == "export" and path.read_bytes() == b"the old one"):
                    if what in ("eval", "heads"):
                        kept = json.loads(path.read_text())
                        pruned = kept.get("effects", {}).get("prune", {}).values()
                        now = len(kept.get("cells", ())) + sum(map(len, pruned))
                        assert now >= progress, "finished work was lost"
                        progress = now
                    else:
                        assert complete(path) == complete(reference / name)
            if what == "train" and not (w / "new.safetensors").exists():
                now = whole_state(w / "new.safetensors.state")
                assert now >= progress, "finished steps were lost"
                progress = now
            if not resumable:
                break
        if status != 0 and not (what == "fold" and (w / "new").exists()):  # killed after its last act
            assert processes(w, line + " --resume" * resumable) == 0, (w / "log").read_text()
        for name in outputs:
            assert complete(w / name) == complete(reference / name), "another result than without interrupts"
        endings += 1
        assert endings < 3 * kills
    assert done >= kills


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 512 KB, and fill(free): leave so many bytes on it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")

    def fill(free: int) -> None:
        (disk / "filler").unlink(missing_ok=True)
        with open(disk / "filler", "wb", buffering=0) as file:
            file.write(bytes(max(0, shutil.disk_usage(disk).free - free)))

    yield disk, fill
    subprocess.run(["umount", str(disk)], check=True)


def test_full_and_read_only_disks(good, tmp_path, small_disk, monkeypatch, capsys):
    disk, fill = small_disk
    monkeypatch.chdir(good)
    train, evaluate = (c.replace("new.", f"{disk}/new.") for c in (LONG_TRAIN, LONG_EVAL))
    fold, export = FOLD.replace("--out new", f"--out {disk}/new"), EXPORT.replace("new.gguf", f"{disk}/new.gguf")
    assert invoke(capsys, LONG_TRAIN.replace("new.", f"{tmp_path}/new."))[1] == 0
    for line, name, rooms in ((train, "new.safetensors", (0, 4096, 8192)), (evaluate, "new.json", (0,)),
                              (fold, "new", (0, 8192, 100 << 10)), (export, "new.gguf", (0, 8192, 100 << 10))):
        for room in rooms:
            if name != "new":
                (disk / name).write_bytes(b"the old one")
            fill(room)
            program, status, out, err = invoke(capsys, line)
            last = re.split(r"[\r\n]", err.rstrip("\n"))[-1]
            assert (status, out) == (2, "") and last.startswith(f"{program}: error: "), (line, room, out, err)
            assert re.search("No space left|free", last), (line, room, err)
            assert (disk / name).read_bytes() == b"the old one" if name != "new" else not (disk / name).exists()
            assert not list(disk.rglob("*.part"))
        fill(400 << 10)
        if line is evaluate:
            (disk / name).unlink()
        program, status, out, err = invoke(capsys, line + " --resume" * (line in (train, evaluate)))
        assert status == 0, err
    assert same(disk / "new.safetensors") == same(tmp_path / "new.safetensors")  # in spite of the stops

    fill(0)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for line in (train, evaluate, fold.replace("/new", "/newer"), export):
        before = snapshot(disk)
        program, status, out, err = invoke(capsys, line)
        assert (status, out) == (2, "") and "cannot be written to" in err.splitlines()[-1], err
        assert err.count("\n") == 1 or line is export, "said before the work"
        assert snapshot(disk) == before


# --- honest numbers ---

SMALL_TRAIN = "train --ckpt model --task task.jsonl --samples 8 --out {} --lr {}"


def test_training_that_goes_astray_stops_at_once(good, tmp_path, monkeypatch, capsys):
    """NaN or infinity in the loss or, behind it, in a gradient: step and cause are named, the state is good."""
    monkeypatch.chdir(good)
    honest, broken = seal.answer_loss, {}

    def answer_loss(model, prompt, answer):
        loss, right = honest(model, prompt, answer)
        broken["calls"] = broken.get("calls", 0) + torch.is_grad_enabled()
        if torch.is_grad_enabled() and broken["calls"] == 4:
            s = model.scales()[0]
            loss = {"loss": loss * float("nan"), "gradient": loss + (s.sum() * 0).sqrt()}[broken["where"]]
        return loss, right

    for where in ("loss", "gradient"):
        broken.update(where=where, calls=0)
        monkeypatch.setattr(seal, "answer_loss", answer_loss)
        out = tmp_path / f"{where}.safetensors"
        status, stdout, err = command(capsys, *SMALL_TRAIN.format(out, 0.01).split())
        assert (status, stdout) == (2, "") and not out.exists()
        assert re.search("error: step 4: .*--lr 0.01 .*--dtype float32", err), err
        state = torch.load(f"{out}.state", weights_only=True)
        assert len(state["losses"]) == 3 and all(s.isfinite().all() for s in state["scales"])
        monkeypatch.setattr(seal, "answer_loss", honest)
        assert command(capsys, *SMALL_TRAIN.format(out, 0.01).split(), "--resume")[0] == 0
        assert seal.read_scales(out)[1]["steps"] == "8" and not Path(f"{out}.state").exists()
    status, stdout, err = command(capsys, *SMALL_TRAIN.format(tmp_path / "wild", 1e5).split(), "--dtype", "float16")
    assert status == 2 and re.search(r"error: step \d: .*--lr 100000 is too high, or the numbers .* float16", err), err


def test_harm_is_said(good, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(good)
    for lr, samples, said in ((0.001, 8, False), (10, 1, True)):
        status, out, err = command(capsys, *SMALL_TRAIN.format(tmp_path / "x", lr).split(), "--samples", samples)
        rows = [row.split() for row in out.splitlines()[2:]]
        assert status == 0 and [row[0] for row in rows] == ["base", "SEAL-H"] and "prompts not trained on" in out
        worse = float(rows[1][1]) > float(rows[0][1])
        assert ("warning  these scales make the loss worse" in err) == said == worse, (lr, out, err)
    status, out, err = command(capsys, *SMALL_TRAIN.format(tmp_path / "x", 0.01).split(), "--samples", 14)
    assert status == 0 and not out and "warning  every prompt was trained on" in err


def test_self_extend_is_remembered_by_the_scales_and_left_out_of_files_if_asked(good, tmp_path, monkeypatch, capsys):
    w = tmp_path / "w"
    shutil.copytree(good, w)
    monkeypatch.chdir(w)
    train = SMALL_TRAIN.format("scales.safetensors", 0.01) + " --extend self:3,200"
    for line in (train, EVAL.replace("300", "1000"), FOLD + " --extend none", EXPORT + " --extend none --check"):
        program, status, out, err = invoke(capsys, line)
        assert status == 0, (line, out, err)
        if "none" not in line:
            assert "context  1,136 tokens, extension self:3,200" in err  # (512 - 200) * 3 + 200
    assert seal.read_config("new").max_position_embeddings == 512 and " greedy tokens agree" in out


def test_lora_goes_all_the_ways_that_scales_go(good, tmp_path, monkeypatch, capsys):
    """The commands, one after the other; and a state of scales is none to go on from with LoRA."""
    w = tmp_path / "w"
    shutil.copytree(good, w)
    monkeypatch.chdir(w)
    train = SMALL_TRAIN.format("scales.safetensors", 0.01) + " --mode lora --json t.json --plot t.png"
    for line, words in [
        (train, r"(?s)base .*SEAL-L "),
        (EVAL + " --compare --plot e.png", r"(?s)base .*SEAL-L "),
        (GENERATE, ""),
        (FOLD, "SEAL-L folded into 2 layers"),
        (EXPORT + " --check", "(?s)SEAL-L folded into 2 layers.* greedy tokens agree"),
        ("bench --shape model --length 40 --steps 1 --mode lora --json b.json", "training step"),
    ]:
        program, status, out, err = invoke(capsys, line)
        assert status == 0 and re.search(words, out), (line, out, err)

    torch.save({"recipe": json.loads(Path("t.json").read_text()) | {"mode": "head"}}, "scales.safetensors.state")
    program, status, out, err = invoke(capsys, train + " --resume")
    assert (status, out) == (2, "") and "was made with mode head, not lora" in err, err


@pytest.mark.parametrize("mode", ["head", "channel", "lora"])
def test_same_seed_same_scales_and_bfloat16_agrees(mode, good, tmp_path, monkeypatch, capsys):
    """On a CPU a seed gives the same file to the last bit; in bfloat16 the same heads move in the same direction."""
    monkeypatch.chdir(good)
    def train(name, *more):
        line = SMALL_TRAIN.format(tmp_path / f"{name}.safetensors", 0.01).split()
        return command(capsys, *line, "--mode", mode, *more)[0] == 0

    assert train("a") and train("b") and train("c", "--seed", 1) and train("d", "--dtype", "bfloat16")
    a, b, c, d = (same(tmp_path / f"{name}.safetensors") for name in "abcd")
    assert a == b and len({str(x[1]) for x in (a, c, d)}) == 3
    def moves(name):
        learned = seal.read_scales(tmp_path / f"{name}.safetensors")[0]
        return torch.cat([b.flatten() for b in learned[1::2]]) if mode == "lora" else torch.cat(learned) - 1

    if mode == "lora":  # where A starts is the seed's, too: 8 steps at this rate move it by less
        starts = [seal.read_scales(tmp_path / f"{name}.safetensors")[0][0] for name in "ac"]
        assert gap(*starts) > 0.2
    full, half = moves("a"), moves("d")
    assert torch.corrcoef(torch.stack([full, half]))[0, 1] > 0.9


def test_an_evaluation_resumes_only_as_itself(good, tmp_path, monkeypatch, capsys):
    """Other scales under the same name, other prompts, another template: the kept cells would be another run's."""
    w = tmp_path / "w"
    shutil.copytree(good, w)
    monkeypatch.chdir(w)
    assert command(capsys, *EVAL.split())[0] == command(capsys, *EVAL.split(), "--resume")[0] == 0
    before = Path("new.json").read_bytes()
    for more in ("--prompts 2", "--template mistral", "--max-new-tokens 5", "--dtype bfloat16", "--lengths 310"):
        status, out, err = command(capsys, *EVAL.split(), "--resume", *more.split())
        assert (status, out) == (2, "") and "is of another run" in err, (more, err)
        assert Path("new.json").read_bytes() == before, more
    scales(lambda t: t["layers.0.scale"].fill_(0.9))(w)
    assert "is of another run" in command(capsys, *EVAL.split(), "--resume")[2]
