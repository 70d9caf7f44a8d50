"""Tests of extras/: each capability keeps what its head promises."""

import copy
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import sentencepiece
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, trainers
from tokenizers.pre_tokenizers import ByteLevel

import export_gguf
import seal
from extras import (
    baselines, convert, direct, heads, llamacpp, meta, ruler, selfextend, several,
    shapes, speed, speed_export, toy, toy_tables, toy_words,
)
from extras.check import LlamaCpp


# --------------------------------------------------------------------------------------
# convert: a GGUF file, or Meta's release, as a folder
# --------------------------------------------------------------------------------------

WORDS = (
    "Hello| world|don't|I'LL|naïve|日本語|中文。|한국어|русский|العربية|🙂|👩‍👧|12345|3.14|007|½|²"
    "| |  |   |\t|\n|\n\n|\r\n| \n |\u00a0|\x0b|def f(x):\n    return x|{\"a\": [1]}|<div>|!="
    "|...|—|“q”|_snake_case|camelCase|x86_64|//|#|'s|'|’s|ß|<0x0A>|▁|Ġ|€|$|^|~|`|A|b|1|。|！"
    "|<s>|</s>|<im>|<n7>|हिन्दी|Ελλάδα|Ångström|\u2028"
).split("|")
TEMPLATE = "{% for m in messages %}<im>{{ m['content'] }}</s>{% endfor %}"
# Here llama.cpp itself does not do what the tokenizers' own rules say.
STRAYS = {"tekken": "हΕÅ", "deepseek-llm": "\u2028"}


def texts(count: int, seed: int = 0, without: str = "") -> list[str]:
    rng, words = random.Random(seed), [w for w in WORDS if not set(w) & set(without)]
    return ["".join(rng.choices(words, k=rng.randint(1, 12))) for _ in range(count)]


def make_folder(folder: Path, kind="llama", tokenizer="llama-bpe", **more) -> Path:
    """A small folder of random weights, with the toy's tokenizer or a BPE that cuts as named."""
    sizes = dict(
        vocab_size=624, hidden_size=256, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        bos_token_id=0, eos_token_id=1, rms_norm_eps=1e-5, tie_word_embeddings=False,
    )
    hints = {"bos_token": "<s>", "eos_token": "</s>", "clean_up_tokenization_spaces": False}
    folder.mkdir()
    if tokenizer == "sentencepiece":
        sizes |= {"vocab_size": 1290, "bos_token_id": 1, "eos_token_id": 2}
        shutil.copy(seal.TOY / "tokenizer.model", folder)
        added = {1280: {"content": "<im>", "special": True}, 1281: {"content": "<n7>"}}
        hints |= {"tokenizer_class": "LlamaTokenizer", "added_tokens_decoder": added}
    else:
        ignored = tokenizer in export_gguf.MERGES_IGNORED
        data = json.loads(Tokenizer(models.BPE(ignore_merges=ignored)).to_str())
        data["pre_tokenizer"] = export_gguf.PRE_TOKENIZERS[tokenizer]
        backend = Tokenizer.from_str(json.dumps(data))
        backend.train_from_iterator(texts(2000), trainers.BpeTrainer(
            vocab_size=610, special_tokens=["<s>", "</s>", "<im>"], show_progress=False,
            initial_alphabet=ByteLevel.alphabet()))
        backend.add_tokens(["<n7>"])
        backend.save(str(folder / "tokenizer.json"))
        hints |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **(sizes | more))
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name, weight in model.named_parameters():
        if "norm" in name or "bias" in name:
            weight.data.normal_(1, 0.3)
    model.save_pretrained(folder)
    seal.write_json(folder / "tokenizer_config.json", hints)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def to_gguf(folder: Path, outtype: str = "f32") -> Path:
    path = folder.with_suffix(f".{outtype}.gguf")
    export_gguf.main(["--ckpt", str(folder), "--scales", "none", "--outfile", str(path),
                      "--outtype", outtype])
    return path


def converted(source: Path) -> Path:
    out = source.with_name(source.name + "-hf")
    convert.main([str(source), "--out", str(out)])
    return out


def weights(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = seal.Checkpoint(folder)
    return {name: checkpoint[name] for name in checkpoint.files}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """A GGUF file in float32; the folder that it was made from is beside it."""
    return to_gguf(make_folder(tmp_path_factory.mktemp("plain") / "model"))


def altered(source: Path, target: Path, changes: dict) -> Path:
    """The same GGUF file with some keys changed; None takes a key away."""
    reader, kind = gguf.GGUFReader(source), gguf.GGUFValueType
    writer = gguf.GGUFWriter(target, changes.pop("general.architecture", "llama"))
    for key, field in reader.fields.items():
        if key not in changes and key != "general.architecture" and "GGUF." not in key:
            writer.add_key_value(key, field.contents(), field.types[0], field.types[-1])
    for key, value in changes.items():
        if value is not None:
            writer.add_key_value(key, value, kind.get_type(value))
    for t in reader.tensors:
        writer.add_tensor(t.name, t.data, raw_dtype=t.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192, "rope_theta": 500000.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}


@pytest.mark.parametrize("kind, more", [
    ("llama", {}),
    ("llama", {"attention_bias": True, "head_dim": 32}),
    ("llama", {"rope_parameters": LLAMA3}),
    ("llama", {"rope_parameters": YARN | {"rope_theta": 1e6}}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}),
    ("mistral", {"tie_word_embeddings": True, "sliding_window": None}),
    ("qwen2", {}),
])
def test_a_folder_exported_and_converted_back_is_the_folder(tmp_path, monkeypatch, kind, more):
    folder = make_folder(tmp_path / "model", kind, **more)
    monkeypatch.setattr(convert, "SHARD", 500_000)
    monkeypatch.setattr(convert, "BLOCK", 3000)
    back = converted(to_gguf(folder))
    assert len(list(back.glob("*.safetensors"))) > 4
    assert same(weights(back), weights(folder))
    assert seal.read_config(back) == seal.read_config(folder)
    assert (back / "chat_template.jinja").read_text() == TEMPLATE
    for key in ("bos_token_id", "eos_token_id", "dtype", "tie_word_embeddings"):
        ours, theirs = (seal.read_json(f / "config.json").get(key) for f in (back, folder))
        assert ours == theirs
    model = transformers.AutoModelForCausalLM.from_pretrained(back)  # finds all, and no more
    assert model.state_dict().keys() - {"lm_head.weight"} <= weights(back).keys()


@pytest.mark.parametrize("kind", [*export_gguf.PRE_TOKENIZERS, "sentencepiece"])
def test_the_tokenizer_gives_llama_cpps_ids(tmp_path, kind):
    pytest.importorskip("cyllama")
    path = to_gguf(make_folder(tmp_path / "model", tokenizer=kind, hidden_size=64))
    for change in ({}, {"add_bos_token": None}, {"add_space_prefix": False}):
        keys = {f"tokenizer.ggml.{key}": value for key, value in change.items()}
        source = altered(path, tmp_path / f"{len(list(tmp_path.iterdir()))}.gguf", keys)
        tokenizer = transformers.AutoTokenizer.from_pretrained(converted(source))
        llama = LlamaCpp(source)
        for i, text in enumerate(texts(300, seed=1, without=STRAYS.get(kind, ""))):
            ids = tokenizer(text, add_special_tokens=i % 2 == 0)["input_ids"]
            assert ids == llama.tokenize(text, add_special=i % 2 == 0), repr(text)


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0", "Q2_K", "Q4_K_M", "IQ4_XS", "Q5_0"])
def test_every_type_is_read_as_transformers_reads_it(tmp_path, plain, kind):
    path = tmp_path / "model.gguf"
    if kind.islower():
        shutil.move(to_gguf(plain.parent / "model", kind), path)
    else:
        cpp = pytest.importorskip("cyllama.llama.llama_cpp")
        how = cpp.LlamaModelQuantizeParams()
        how.ftype = int(gguf.LlamaFileType[f"MOSTLY_{kind}"])
        cpp.disable_logging()
        cpp.model_quantize(str(plain), str(path), how)
    out, ids = converted(path), torch.arange(3, 100)[None]
    read = transformers.AutoModelForCausalLM.from_pretrained
    theirs = read(tmp_path, gguf_file=path.name, dtype=torch.float32)(ids).logits
    assert torch.allclose(read(out, dtype=torch.float32)(ids).logits, theirs, atol=1e-4)
    model = seal.load_model(out, seal.read_config(out), "cpu", torch.float32)
    assert torch.allclose(model.logits(model(ids)), theirs, atol=1e-4)
    exact = {"f16": "float16", "bf16": "bfloat16"}.get(kind, "float32")
    assert seal.read_json(out / "config.json")["dtype"] == exact


def refused(capsys, source: Path, out: Path) -> str:
    """The one line that is said of a source that is no good. Nothing is left behind."""
    before = set(out.parent.iterdir())
    capsys.readouterr()
    status = seal.run("extras.convert", convert.main, [str(source), "--out", str(out)])
    said = capsys.readouterr().err.strip()
    assert status == 2 and "\n" not in said and set(out.parent.iterdir()) == before
    return said


@pytest.mark.parametrize("changes, words", [
    ({"general.architecture": "falcon"}, "falcon"),
    ({"split.count": 3}, "llama-gguf-split"),
    ({"tokenizer.ggml.pre": "../../x"}, "../../x"),
    ({"tokenizer.ggml.model": "t5"}, "t5"),
    ({"tokenizer.ggml.merges": ["Ġ t", "no one"]}, "vocabulary"),
    ({"tokenizer.ggml.token_type": [1, 2]}, "shorter"),
    ({"tokenizer.ggml.tokens": None}, "tokens"),
    ({"llama.block_count": 2_000_000_000}, "2000000000 layers"),
    ({"llama.block_count": 3}, "layers.2"),
    ({"llama.attention.head_count": 0}, "x.gguf"),
    ({"llama.attention.head_count": [4, 4]}, "head_count"),
    ({"llama.attention.key_length": 2**31 - 1}, "x.gguf"),
    ({"llama.attention.key_length": 0}, "x.gguf"),
    ({"llama.context_length": None}, "context_length"),
    ({"llama.embedding_length": 255}, "x.gguf"),
    ({"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 4.0}, "longrope"),
    ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "epsilon"),
])
def test_what_is_wrong_in_a_file_is_one_line(tmp_path, capsys, plain, changes, words):
    path = altered(plain, tmp_path / "x.gguf", changes)
    assert words in refused(capsys, path, tmp_path / "out")


def test_damaged_files_and_wrong_places(tmp_path, capsys, plain):
    data, path = plain.read_bytes(), tmp_path / "x.gguf"
    rng, end = random.Random(0), int(gguf.GGUFReader(plain).data_offset)
    for _ in range(20):
        path.write_bytes(data[: rng.randrange(end)])
        refused(capsys, path, tmp_path / "out")
        start = rng.randrange(24, 2000)
        path.write_bytes(data[:start] + b"\xff" * 8 + data[start + 8 :])
        refused(capsys, path, tmp_path / "out")
    (tmp_path / "there").mkdir()
    assert "there already" in refused(capsys, plain, tmp_path / "there")
    assert "No such file" in refused(capsys, tmp_path / "none.gguf", tmp_path / "out")
    assert "already" in refused(capsys, plain.parent / "model", tmp_path / "out")
    assert "params.json" in refused(capsys, tmp_path / "there", tmp_path / "out")


def release(folder: Path, files: int, **params) -> dict[str, torch.Tensor]:
    """A folder of Meta's kind, its matrices cut into some files. Returns Hugging Face's weights."""
    make_folder(folder, tokenizer="sentencepiece")
    (folder / "config.json").unlink()
    expected, slices = weights(folder), [{} for _ in range(files)]
    names = {theirs: (name, dim) for name, (theirs, dim) in meta.NAMES.items()}
    for full, tensor in expected.items():
        *layer, name = full.removesuffix(".weight").removeprefix("model.").split(".", 2)
        name, dim = names[name]
        if name in ("attention.wq", "attention.wk"):
            tensor = tensor.view(-1, 2, 32, 256).transpose(1, 2).reshape(tensor.shape)
        parts = [tensor] * files if dim is None else tensor.chunk(files, dim)
        for held, part in zip(slices, parts):
            held[".".join([*layer, name, "weight"])] = part.clone()
    for i, held in enumerate(slices):
        torch.save(held | {"rope.freqs": torch.zeros(32)}, folder / f"consolidated.{i:02}.pth")
    sizes = {"dim": 256, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-5}
    seal.write_json(folder / "params.json", sizes | params)
    return expected


@pytest.mark.parametrize("files, params, context, kind", [
    (1, {"norm_eps": 1e-6}, 2048, "default"),                                  # Llama 1
    (2, {"vocab_size": -1}, 4096, "default"),                                  # Llama 2, 13B
    (1, {"rope_theta": 1000000}, 16384, "default"),                            # CodeLlama
    (1, {"rope_theta": 500000.0, "use_scaled_rope": True}, 131072, "llama3"),  # Llama 3.1
])
def test_metas_release(tmp_path, monkeypatch, files, params, context, kind):
    monkeypatch.setattr(meta, "BLOCK", 3000)
    expected = release(tmp_path / "meta", files, **params)
    out = converted(tmp_path / "meta")
    assert same(weights(out), expected)
    config = seal.read_config(out)
    assert (config.context, config.rope_scaling["rope_type"]) == (context, kind)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(out / "tokenizer.model"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer("Hello 12")["input_ids"] == [1, *pieces.encode("Hello 12")]


def test_what_is_wrong_in_metas_release_is_one_line(tmp_path, capsys):
    folder, out = tmp_path / "meta", tmp_path / "out"
    release(folder, 2)
    first = folder / "consolidated.00.pth"
    whole, tensors = first.read_bytes(), torch.load(first)
    torch.save(tensors | {"norm.weight": torch.zeros(3)}, first)
    assert "norm.weight" in refused(capsys, folder, out)
    first.write_bytes(whole[:5000])
    assert first.name in refused(capsys, folder, out)
    first.write_bytes(whole)
    (folder / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    assert "Llama 3" in refused(capsys, folder, out)
    seal.write_json(folder / "params.json", {"dim": 256, "n_layers": "2"})
    assert "n_layers" in refused(capsys, folder, out)


# --------------------------------------------------------------------------------------
# heads, direct, selfextend, several
# --------------------------------------------------------------------------------------

torch.set_num_threads(1)
CONFIG = seal.Config(64, 32, 48, 3, 4, 2, 8, 256)  # V, D, feed-forward, L, H, G, d, context


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
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(CONFIG.vocab_size, (count,), generator=rng).tolist()


# --------------------------------------------------------------------------------------
# extras.heads
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [None, (1, 2)])
def test_a_gain_is_what_pruning_loses_and_the_gradient_its_slope(model, channels):
    pairs = [(some_tokens(20, seed), some_tokens(2, seed + 9)) for seed in range(3)]
    sites, _ = heads.find_sites(CONFIG, channels)
    mode, pruned = "channel" if channels else "head", []
    model.reset_scales(mode)
    slopes = heads.gains_by_gradient(model, pairs, sites)
    heads.gains_by_pruning(model, pairs, sites, pruned, lambda: None)
    assert all((s == 1).all() for s in model.scales())  # what was pruned is put back
    loss, _ = heads.measure(model, pairs)
    for at in 0, len(sites) - 1:
        layer, i = sites[at]
        assert not channels or (layer == 1 and 16 <= i < 24)
        for size, gain in (1.0, pruned[at]), (1e-2, slopes[at]):
            model.reset_scales(mode)
            model.scales()[layer].data[i] -= size
            lost = (heads.measure(model, pairs)[0] - loss) / size
            assert lost == pytest.approx(gain["loss"], rel=0.1, abs=2e-4)


def test_quadrants_scale_the_heads_that_agree_at_both_lengths(model):
    sites = [(0, 0), (0, 1), (1, 2), (2, 3), (2, 0)]
    gains = [-1, 1, -1, 1, 0], [-1, 1, 1, 2, -1]
    changed = []
    for scales in heads.quadrants(model.scales(), sites, gains, 0.5, 1.5).values():
        changed.append({site: s for site, s in zip(sites, (scales[l][i].item() for l, i in sites)) if s != 1})
        assert sum((s != 1).sum() for s in scales) == len(changed[-1])
    harmful, helpful = {(0, 0): 0.5}, {(0, 1): 1.5, (2, 3): 1.5}
    assert changed == [{}, harmful, helpful, harmful | helpful]


def test_interrupted_pruning_goes_on_as_if_nothing_had_happened(tmp_path, capsys, monkeypatch):
    sites = heads.find_sites(seal.read_config(seal.TOY), None)
    monkeypatch.setattr(heads, "find_sites", lambda *args: [part[:8] for part in sites])
    flags = "--how both --lengths 90,99 --prompts 1 --json".split()
    heads.main([*flags, str(tmp_path / "whole.json")])
    out, measure, calls = capsys.readouterr().out, heads.measure, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 13:  # the second length's base and two sites are done
            raise KeyboardInterrupt
        return measure(*args)

    monkeypatch.setattr(heads, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        heads.main([*flags, str(tmp_path / "part.json")])
    for _ in range(2):
        heads.main([*flags, str(tmp_path / "part.json")])
    assert len(calls) == 13 + 1 + 6  # the base again, and the sites that were left
    assert (tmp_path / "part.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert capsys.readouterr().out == 2 * out and out.count("Spearman") == 2
    with pytest.raises(seal.UserError, match="is of another run"):
        heads.main([*flags, str(tmp_path / "part.json"), "--seed", "1"])


def test_no_prompt_is_looked_at_that_the_scales_were_trained_on(tmp_path, capsys, monkeypatch):
    """Nor do quadrants evaluate on prompts that their gains were measured on."""
    task, file = tmp_path / "task.jsonl", tmp_path / "scales.safetensors"
    cases = [{"prompt": f"What is {i}?", "answer": f"It is {i}."} for i in range(9)]
    task.write_text("\n".join(map(json.dumps, cases)))
    seal.main(f"train --task {task} --samples 3 --length 99 --out {file}".split())
    trained = set(seal.read_scales(file, seal.read_config(seal.TOY))[1].trained_on.split(","))
    asked = []
    monkeypatch.setattr(seal, "evaluate", lambda *args: asked.extend(args[2]) or {"score": 0})
    heads.main(f"--task {task} --scales {file} --lengths 90,99 --prompts 4 --quadrants "
               f"0.9,1.1 --json {tmp_path}/h.json".split())
    seen = set(sum(seal.read_json(tmp_path / "h.json")["prompts"].values(), []))
    evaluated = {sample.fingerprint() for sample in asked}
    assert (len(trained), len(seen), len(evaluated)) == (3, 4, 2)
    assert len(trained | seen | evaluated) == 9


def test_helpful_is_blue_in_every_picture(tmp_path, monkeypatch):
    import matplotlib.pyplot as plt

    drawn = []
    monkeypatch.setattr(plt, "close", drawn.append)
    maps = [("gains", torch.tensor([[0.2, -0.1]]), 0, ""), ("scales", torch.tensor([[1.1, 0.8]]), 1, "")]
    heads.plot(tmp_path / "a.png", "ab", [90, 99], [[0.1, -0.1], [0.2, -0.2]], "", maps)
    votes = torch.tensor([[[2.0, 1.0], [1.0, 2.0]]])
    direct.plot(tmp_path / "b.png", dict.fromkeys(("base", "scaled"), votes), "'7'", "'8'")
    scatter, *images = [ax for figure in drawn for ax in figure.axes if ax.get_title()]
    colours = [scatter.collections[0].get_facecolor()]
    for image in [ax.images[0] for ax in images]:
        colours.append(image.cmap(image.norm(image.get_array()[0])))
    for (red, _, blue, _), (other_red, _, other_blue, _) in colours:
        assert blue > red and other_blue < other_red
    assert len(colours) == 5 and {p.name for p in tmp_path.iterdir()} == {"a.png", "b.png"}


def test_heads_and_channels_are_ranked_and_drawn(scales, tmp_path, capsys):
    heads.main(f"--scales {scales} --prompts 2 --plot {tmp_path}/a.png".split())
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines()[3:13]]
    assert len({name for row in rows for name in (row[0], row[3])}) == 20
    helpful = [float(row[2]) for row in rows]
    assert helpful == sorted(helpful, reverse=True) and helpful[0] > 0 > float(rows[0][5])
    assert "418" in out and "464" in out and "learned scales and gains" in out
    heads.main(f"--channels 2.6 --prompts 1 --lengths 90,99 --plot {tmp_path}/b.png".split())
    assert capsys.readouterr().out.count("channel ") == 20
    assert {p.name for p in tmp_path.iterdir()} == {"a.png", "b.png"}


# --------------------------------------------------------------------------------------
# extras.direct
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["head", "channel"])
def test_direct_effects_add_up_to_the_logits_without_the_final_norm(mode, model):
    """Heads, feed-forwards and the embedding are all that the stream is made of."""
    tokens, targets = some_tokens(25), [3, 40, 60]
    model.reset_scales(mode)
    for scale in model.scales():
        scale.data.uniform_(0.5, 1.5)
    model.scales()[1].data.view(4, -1)[2] = 0  # a pruned head says nothing
    effects = direct.direct_effects(model, tokens, targets)
    assert effects.shape == (3, 5, 3) and (effects == 0).nonzero().tolist() == [[1, 2, 0], [1, 2, 1], [1, 2, 2]]
    rows = model.lm_head.weight[targets]
    with torch.no_grad():
        stream = model(torch.tensor([tokens]))[0, -1]
        votes = effects.sum((0, 1)) + rows @ model.embed_tokens.weight[tokens[-1]]
        torch.testing.assert_close(votes, rows @ stream, rtol=1e-4, atol=1e-4)


def test_a_repaired_answer_is_found_and_its_votes_are_shown(scales, tmp_path, capsys):
    direct.main(f"--scales {scales} --plot {tmp_path}/a.png".split())
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("asked for 'The <REGISTER_CONTENT> in line ") and len(out) == 11
    right, wrong, difference = ([float(x) for x in line.split()[-3:]] for line in out[3:6])
    for i in range(3):
        assert right[i] - wrong[i] == pytest.approx(difference[i], abs=0.02)
    assert difference[1] - difference[0] == pytest.approx(difference[2], abs=0.02)
    assert (tmp_path / "a.png").exists()
    with pytest.raises(seal.UserError, match="--scales: is needed"):
        direct.main([])


# --------------------------------------------------------------------------------------
# extras.selfextend
# --------------------------------------------------------------------------------------


def slow_self_extend(q, k, v, freq, group: int, window: int):
    """By the book, a query and a key at a time; q (H, T, d), k and v (G, T, d), unrotated."""

    def turn(x, position):  # channels i and i + d/2 are a complex number
        pairs = torch.complex(*x.chunk(2)) * torch.polar(torch.ones_like(freq), position * freq)
        return torch.cat((pairs.real, pairs.imag))

    heads = []
    for h in range(len(q)):
        g, rows = h * len(k) // len(q), []
        for i in range(q.shape[1]):
            scores = []
            for j in range(i + 1):
                at, key_at = i, j
                if i - j >= window:
                    at, key_at = i // group + window - window // group, j // group
                scores.append(turn(q[h, i], at) @ turn(k[g, j], key_at) / q.shape[2] ** 0.5)
            rows.append(torch.softmax(torch.stack(scores), 0) @ v[g, : i + 1])
        heads.append(torch.stack(rows))
    return torch.stack(heads)


@pytest.mark.parametrize(
    "spec, G, linear",
    [("self:2,5", 4, 1), ("self:3,10", 2, 1), ("self:6,1", 1, 1), ("self:4,13", 2, 2.5), ("self:1,7", 2, 1)],
)
def test_self_extend_is_the_books(spec, G, linear, monkeypatch):
    """Outputs and gradients, in uneven chunks of queries; in groups of one it changes nothing."""
    monkeypatch.setattr(selfextend, "CHUNK", 9)
    monkeypatch.setattr(seal, "attend", seal.attend)
    rope = {"rope_type": "linear", "factor": linear} if linear > 1 else {"rope_type": "default"}
    config = replace(CONFIG, rope_scaling=rope)
    stretched, (group, window) = selfextend.extend(config, spec), eval(spec[5:])
    assert stretched.context == (256 - window) * group + window
    freq = seal.rope_frequencies(config)[0].double()
    rng = torch.Generator().manual_seed(0)
    raw = [torch.randn(1, n, 23, 8, dtype=torch.float64, generator=rng).requires_grad_() for n in (4, G, G)]
    angles = torch.arange(23)[:, None] * freq
    q, k = (seal.rotate(x, (angles.cos(), angles.sin())) for x in raw[:2])
    found, expected = seal.attend(q, k, raw[2])[0], slow_self_extend(*(x[0] for x in raw), freq, group, window)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    weight = torch.randn(found.shape, dtype=torch.float64, generator=rng)
    pairs = zip(*(torch.autograd.grad((y * weight).sum(), raw, retain_graph=True) for y in (found, expected)))
    for ours, slow in pairs:
        torch.testing.assert_close(ours, slow, rtol=1e-4, atol=1e-5)
    last = seal.attend(q[:, :, -1:], k, raw[2])[0]  # one token asks, as in generation
    torch.testing.assert_close(last, found[:, -1:])
    plain = selfextend.plain_attend(q, k, raw[2])[0]
    assert torch.allclose(plain, found, atol=1e-6) == (group == 1)


def test_self_extend_is_remembered_by_scales_and_known_to_no_other_program(tmp_path, capsys, monkeypatch):
    for name in "extend", "attend", "COMMANDS":
        monkeypatch.setattr(seal, name, getattr(seal, name))
    file = tmp_path / "scales.safetensors"
    selfextend.main(f"train --extend self:3,100 --length 600 --samples 1 --out {file}".split())
    assert seal.read_scales(file, seal.read_config(seal.TOY))[1].extend == "self:3,100"
    selfextend.main(f"eval --scales {file} --lengths 600 --prompts 1 --max-new-tokens 9".split())
    selfextend.main(f"generate --scales {file} --max-new-tokens 3 --prompt line".split())
    selfextend.main(f"heads --scales {file} --lengths 150,600 --prompts 1".split())
    assert "600" in capsys.readouterr().out
    config = seal.read_config(seal.TOY)
    model = seal.load_model(seal.TOY, selfextend.extend(config, "self:3,100"))
    prompt = (some_tokens(150) * 4)[:130]
    answer = seal.generate(model, prompt, 6)  # through the cache, token by token, as all at once
    with torch.no_grad():
        logits = model.logits(model(torch.tensor([prompt + answer]))[0, 129:-1])
    assert logits.argmax(-1).tolist() == answer
    monkeypatch.undo()
    with pytest.raises(seal.UserError, match="--extend self:3,100: must be none, ntk:S"):
        seal.main(f"fold --scales {file} --out {tmp_path}/folded".split())
    for spec in "self:0,9", "self:2", "self:2,512", "self:2,0":
        with pytest.raises(seal.UserError, match="must be self:G,W"):
            selfextend.extend(config, spec)


# --------------------------------------------------------------------------------------
# extras.several
# --------------------------------------------------------------------------------------

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
    if rank:
        raise MemoryError("broken")
    return answer_loss(*args)

several.train, answer_loss = watched, seal.answer_loss
for job, line in enumerate(json.loads(sys.argv[2])):
    several.join = lambda: several.dist.PrefixStore(str(job), store)
    if "broken" in line:
        seal.answer_loss = broken
    try:
        results.append(seal.run("extras.several", several.main, line.split()))
    except SystemExit as end:
        results.append(end.code)
with open(f"rank{rank}.json", "w") as file:
    json.dump(results, file)
"""


def test_two_processes_learn_what_one_does_whole_or_sharded(tmp_path, monkeypatch, capsys):
    """Batches of 4 and 1, twice over. One writes and speaks, and all end if one fails."""
    monkeypatch.chdir(tmp_path)
    flags = "--samples 5 --length 110 --epochs 2 --batch 4 --lr 0.05 --mode"
    jobs = [f"{flags} head --out head", f"{flags} channel --out c", f"{flags} head --batch 0",
            f"{flags} channel --shard --offload --out channel", f"{flags} head --out broken"]
    Path("ranks.py").write_text(RANKS)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    line = [*torchrun, "ranks.py", str(Path(seal.__file__).parent), json.dumps(jobs)]
    done = subprocess.run(line, timeout=200, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.stdout.count("scales, loss") == 3, done.stderr
    assert done.stderr.count(": 5 prompts of") == 4
    errors = re.findall("extras.several: error: (.*)", done.stderr)
    assert errors == ["--batch 0: must be 1 or more", "broken"]
    first, second = (json.loads(Path(f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first.pop(4) == second.pop(4) == 2 and first == second and first[1::2] == [0, 0, 0, 2]
    assert first[4] < 0.51 * first[2]  # norms and scales are whole
    made = {p.name for p in tmp_path.iterdir()} - {"ranks.py", "rank0.json", "rank1.json"}
    assert made == {"head", "channel", "c"}

    config = seal.read_config(seal.TOY)
    model, tokenizer = seal.load_model(seal.TOY, config), seal.Tokenizer(seal.TOY, config)
    pairs = [tokenizer.pair(s) for s in seal.make_samples(seal.Run(), tokenizer, 110, 5, "train")]
    for mode in seal.METHOD:
        model.reset_scales(mode)
        optimizer = torch.optim.AdamW(model.scales(), lr=0.05, weight_decay=0.0)
        for batch in [pairs[:4], pairs[4:]] * 2:
            for pair in batch:
                (seal.answer_loss(model, *pair) / len(batch)).backward()
            optimizer.step()
            optimizer.zero_grad()
        learned, run = seal.read_scales(mode, config)
        assert run.steps == 4
        for ours, expected in zip(learned, model.scales()):
            torch.testing.assert_close(ours, expected.detach(), rtol=0, atol=1e-4)
    whole, sharded = (seal.read_scales(name, config)[0] for name in ("c", "channel"))
    assert all(map(torch.equal, whole, sharded))
    assert seal.run("extras.several", several.main, []) == 2
    assert "started by torchrun" in capsys.readouterr().err


# --------------------------------------------------------------------------------------
# ruler, llamacpp
# --------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def tokenizer():
    return seal.Tokenizer(seal.TOY, seal.read_config(seal.TOY))


@pytest.mark.parametrize("length, often, seldom", [(3000, 6, 1), (9000, 30, 3)])
def test_common_words_are_as_common_as_in_ruler(tokenizer, length, often, seldom):
    line = next(ruler.make_prompts("cwe", tokenizer, length, 1))
    solved, asked = line["input"].split("Below is a numbered list of words.")[1:]
    shown = re.findall(r"\d+\. (\w+)", solved)[-10:]
    assert solved.endswith(f"in the list are: {ruler.numbered(shown)}\n")
    words = re.findall(r"\d+\. (\w+)", asked)
    count = Counter(words)
    assert sorted(line["outputs"]) == sorted(w for w in count if count[w] == often)
    assert set(count.values()) == {often, seldom} and len(line["outputs"]) == 10
    question = "Question: What are the 10 most common words in the above list?"
    assert asked.endswith(f" {len(words)}. {words[-1]}\n{question}")


def test_variables_are_found_by_following_the_chain(tokenizer):
    for line in ruler.make_prompts("vt", tokenizer, 3000, 3):
        solved, asked = line["input"].split("Memorize and track")[1:]
        for text, letters in (solved, 3), (asked, 5):
            value = re.search(r"assigned the value (\d{5}) in the text above\.", text)[1]
            held = {value}
            for name, old in re.findall(r"VAR (\w+) = (?:VAR )?(\w+) ?\n", text):
                assert len(name) == letters and old in held  # steps stand in order
                held.add(name)
            assert len(held) == 6
        assert set(line["outputs"]) == held - {value}
        wording = f"5 variables are assigned the value {value}, they are: "
        assert line["answer_prefix"].endswith(wording)


@pytest.mark.parametrize("task", ruler.NIAH_TASKS)
def test_needles_hold_the_values_asked_for(tokenizer, tmp_path, task):
    text = tmp_path / "text.txt"
    text.write_text("One fish swam by. Was it red? It was not!\nThe sea is deep. " * 9)
    haystack, keys, values, asked = ruler.NIAH_TASKS[task]
    needle = r"One of the special magic numbers for ([\w-]+) is: (\d{7})\."
    for line in ruler.make_prompts(task, tokenizer, 2000, 3, 5, text):
        held = {}
        for key, value in re.findall(needle, line["input"]):
            held.setdefault(key, set()).add(value)
        names = re.findall(r"[a-z]+-[a-z]+", line["answer_prefix"])
        assert len(names) == asked and len(line["outputs"]) == asked * values
        assert set(line["outputs"]) == set().union(*(held[name] for name in names))
        assert haystack == "needles" or len(held) == keys
        one = "is the special magic number for" in line["input"].split("\n")[-1]
        assert one == (len(line["outputs"]) == 1)


@pytest.mark.parametrize("task", ["cwe", "vt", "niah_single_1"])
def test_prompts_fill_the_length_and_seeds_share_none(tokenizer, task):
    lines = [list(ruler.make_prompts(task, tokenizer, 2500, 6, seed)) for seed in (0, 1, 1)]
    for line in lines[0]:
        ids = tokenizer.prompt(line["input"], line["answer_prefix"])
        assert 2300 < line["length"] == len(ids) + ruler.ROOM[task] <= 2500
    assert len({line["input"] for line in lines[0] + lines[1]}) == 12
    assert lines[1] == lines[2]


def test_ruler_writes_what_seal_reads(tmp_path, capsys):
    out = tmp_path / "vt.jsonl"
    ruler.main(f"--task vt --length 2500 --samples 2 --out {out}".split())
    line = json.loads(out.read_text().splitlines()[0])
    sample = seal.read_jsonl(out)[0]
    assert (sample.prompt, sample.prefix) == (line["input"], line["answer_prefix"])
    assert sample.answer.split() == line["outputs"] == sample.expected
    assert sample.score(line["answer"]) == 1 and sample.score(line["outputs"][0]) == 0.2
    for flags in "vt --length 300", "cwe --length 300", "niah_multivalue --length 900":
        flags = f"--task {flags} --out {tmp_path / 'no'}".split()
        capsys.readouterr()
        assert seal.run("extras.ruler", ruler.main, flags) == 2
        assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "no").exists()


def test_llama_cpp_says_what_seal_says(tokenizer, tmp_path, capsys, monkeypatch):
    pytest.importorskip("xllamacpp")
    file, figures, scales = (tmp_path / name for name in ("a.gguf", "all.json", "s"))
    model = seal.load_model(seal.TOY, seal.read_config(seal.TOY))
    model.set_scales([torch.linspace(0.8, 1.2, 8) for _ in range(4)])
    run = seal.Run(mode="head", template="none", layers=4, heads=8, head_size=32)
    seal.save_scales(scales, model.scales(), run)
    export_gguf.main(f"--scales {scales} --outtype f32 --outfile {file}".split())
    flags = "--lengths 130,160 --prompts 2 --max-new-tokens 16 --threads 1 --chat --json"
    llamacpp.main([str(file), *flags.split(), str(figures)])
    facts = json.loads(figures.read_text())["files"][str(file)]
    said = []
    for length in 130, 160:
        for sample in seal.make_samples(seal.Run(), tokenizer, length, 2, "eval"):
            ids = seal.generate(model, tokenizer.prompt(sample.prompt), 16, tokenizer.stop)
            said.append(tokenizer.decode(ids).strip())
    assert [answer["said"].strip() for answer in facts["answers"]] == said
    assert facts["chat the same"] == "4 of 4" and facts["bytes"] == file.stat().st_size
    assert [cell["prompts"] for cell in facts["cells"]] == [2, 2]
    file.write_bytes(file.read_bytes()[:5000])
    for name, wrong in ("a.gguf", "cannot open"), ("b.gguf", "not a file"), ("", "install"):
        monkeypatch.setitem(sys.modules, "xllamacpp", sys.modules["xllamacpp"] if name else None)
        flags = [str(tmp_path / name), "--lengths", "150", "--prompts", "1"]
        assert seal.run("extras.llamacpp", llamacpp.main, flags) == 2
        assert wrong in capsys.readouterr().err.splitlines()[-1]


# --------------------------------------------------------------------------------------
# toy, baselines, speed
# --------------------------------------------------------------------------------------

torch.set_num_threads(1)
SHORT = {"length": 80, "samples": 2}  # two prompts of one line


def opened(folder) -> tuple[seal.Llama, seal.Tokenizer]:
    return seal.open_checkpoint(seal.Run(ckpt=str(folder)))[:2]


# --------------------------------------------------------------------------------------
# The toy
# --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lessons() -> toy.Lessons:
    config = seal.read_config(seal.TOY)
    return toy.Lessons(seal.Tokenizer(seal.TOY, config))


def test_the_bundled_tokenizer_is_what_the_recipe_makes(tmp_path):
    toy_words.make_vocabulary(tmp_path / "tokenizer.model", toy.CONFIG.vocab_size)
    made = (tmp_path / "tokenizer.model").read_bytes()
    assert made == (seal.TOY / "tokenizer.model").read_bytes()


def test_a_toy_made_in_a_few_steps_is_a_folder_as_the_bundled_one(
    tmp_path, lessons, monkeypatch
):
    """Two steps of each stage; and the drift moves the o_proj matrices alone."""
    few = [(name, 2, 300, first, last) for name, _, _, first, last in toy.STAGES]
    monkeypatch.setattr(toy, "STAGES", few)
    toy.main(["make", "--out", f"{tmp_path}/toy"])
    folder = tmp_path / "toy"
    assert {p.name for p in folder.iterdir()} == {p.name for p in seal.TOY.iterdir()}
    for name in ("config.json", "tokenizer_config.json"):
        assert seal.read_json(folder / name) == seal.read_json(seal.TOY / name)
    made, bundled = (load_file(p / "model.safetensors") for p in (folder, seal.TOY))
    kinds = [{n: (t.shape, t.dtype) for n, t in side.items()} for side in (made, bundled)]
    assert kinds[0] == kinds[1]
    model = toy.new_model(seed=0)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    toy.pretrain(model, lessons, few[-1:], seed=0)
    moved = {n for n, w in model.named_parameters() if not torch.equal(w, before[n])}
    assert moved == {f"layers.{i}.self_attn.o_proj.weight" for i in range(4)}


def test_lessons_ask_for_what_they_told_and_the_drift_for_a_line_that_is_missing(lessons):
    decode = seal.Tokenizer(seal.TOY, toy.CONFIG).decode
    rng = random.Random(0)
    for _ in range(5):
        (prompt, _), (answer, learn), *more = lessons.record(rng, 9)
        key, number = decode(answer).removesuffix(".").split(" in line ")[1].split(" is ")
        assert f"line {key}: REGISTER_CONTENT is <{number}>" in decode(prompt)
        assert learn and answer[-1] == lessons.end and len(more) == 10
        (prompt, _), (answer, _) = lessons.missing(rng, 9)
        key, number = decode(answer).removesuffix(".").split(" in line ")[1].split(" is ")
        assert f"line {key}:" not in decode(prompt) and f"in line {key}?" in decode(prompt)
        assert f"is <{number}>\n\nNow the record is over." in decode(prompt)
    for stage, *_ in toy.STAGES:
        ids, learn = lessons.tensors(lessons.batch(stage, rng, 0.9), 600)
        assert ids.shape == learn.shape and ids.numel() >= 600
        assert (ids[:, 0] == 1).all() and 0 < learn.sum() < learn.numel() / 2 + ids.shape[1]


def test_tables_judge_answers_train_each_method_once_and_keep_other_figures(
    tmp_path, monkeypatch
):
    numbers = {"a": 12, "b": 7, "c": 30}
    lines = "".join(seal.LINE.format(key=key, number=n) for key, n in numbers.items())
    sample = seal.Sample(seal.RECORD.format(lines=lines, key="b"), "", expected=7)
    said = {"is 7.": "right", "is 30.": "the last line's"}
    said |= {"is 12.": "another line's", "?": "no line's"}
    assert {text: toy_tables.kind(sample, text) for text in said} == said
    for method in toy_tables.NAMES:
        run = toy_tables.trained(method, tmp_path, **SHORT)
        with monkeypatch.context() as patch:
            patch.setattr(seal, "train", None)  # would fail if it were trained again
            assert toy_tables.trained(method, tmp_path, **SHORT) == run
        (cell,) = toy_tables.cells(run, lengths=[80], prompts=1)
        assert cell["prompts"] == 1
    monkeypatch.setattr(toy_tables, "FIGURES", tmp_path / "toy.json")
    tables = {"one": lambda _: {"a": 1}, "two": lambda _: {"b": 2}}
    monkeypatch.setattr(toy_tables, "TABLES", tables)
    toy_tables.measure(["one"])
    toy_tables.measure(["two"])
    assert seal.read_json(tmp_path / "toy.json") == {"one": {"a": 1}, "two": {"b": 2}}


# --------------------------------------------------------------------------------------
# The paper's baselines
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method, size", [("lora", 32_768), ("dora", 36_864)])
def test_a_merged_folder_computes_what_the_adapters_do(method, size, tmp_path):
    """New adapters are the base model; merged ones are rounded once, to the files' type."""
    base, tokenizer = opened(seal.TOY)
    pair = tokenizer.pair(seal.make_samples(seal.Run(), tokenizer, 80, 1, "eval")[0])
    adapted = baselines.Adapted(seal.Run(), base.norm.weight, method)
    assert sum(p.numel() for p in adapted.scales()) == size
    loss = seal.answer_loss(base, *pair).item()
    assert seal.answer_loss(adapted, *pair).item() == pytest.approx(loss, rel=1e-5)
    for p in adapted.scales():
        p.data += 0.3 * torch.randn(p.shape)
    moved = seal.answer_loss(adapted, *pair).item()
    assert abs(moved - loss) > 0.1 * loss
    source, wide, narrow = (tmp_path / name for name in ("source", "wide", "narrow"))
    shutil.copytree(seal.TOY, source)
    weights = {n: t.float() for n, t in load_file(seal.TOY / "model.safetensors").items()}
    save_file(weights, source / "model.safetensors")
    for ckpt, folder in ((source, wide), (seal.TOY, narrow)):
        folder.mkdir()
        baselines.write_folder(ckpt, folder, copy.deepcopy(adapted).adapters())
    exact, rounded = (load_file(folder / "model.safetensors") for folder in (wide, narrow))
    assert seal.answer_loss(opened(wide)[0], *pair).item() == pytest.approx(moved, rel=1e-4)
    for name, weight in exact.items():
        assert torch.equal(rounded[name], weight.bfloat16())
        assert torch.equal(weight, weights[name]) == (name.split(".")[-2][1:] != "_proj")


def test_baselines_train_into_a_folder_for_every_command(tmp_path, capsys):
    """The folder has the files of its source; a user's mistake is met before training."""
    command = ["--method", "lora", "--length", "80", "--samples", "2", "--lr", "1e-3"]
    command += ["--out", f"{tmp_path}/merged"]
    baselines.main(command)
    assert "SEAL-L, 32,768 numbers merged" in capsys.readouterr().out
    for source in seal.TOY.iterdir():
        made = (tmp_path / "merged" / source.name).read_bytes()
        assert (made == source.read_bytes()) == (source.suffix != ".safetensors")
    model, tokenizer = opened(tmp_path / "merged")
    samples = seal.make_samples(seal.Run(), tokenizer, 80, 4, "eval")
    assert seal.evaluate(model, tokenizer, samples)["correct"] >= 3
    too_long = ["--out", f"{tmp_path}/new", "--length", "513"]
    for more in ([], too_long, ["--method", "ia3"]):
        with pytest.raises(seal.UserError):
            baselines.main(command + more)
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


# --------------------------------------------------------------------------------------
# Speed
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "what, rows", [("train", "seconds a step"), ("answer", "seconds a token")]
)
def test_both_sides_do_the_same_work_and_are_told_apart_if_not(
    what, rows, tmp_path, capsys, monkeypatch
):
    """In this process: in fresh ones, as they run, imports take most of the time."""
    monkeypatch.setattr(speed, "in_a_fresh_process", lambda work, *inputs: work(*inputs))
    flags = ["--what", what, "--lengths", "60", "--pairs", "2", "--steps", "1"]
    flags += ["--json", f"{tmp_path}/speed.json", "--offload"]
    speed.main([*flags, "--shape", "toy"])
    speed.main([*flags, "--ckpt", str(seal.TOY)])
    assert rows in capsys.readouterr().out
    random_, bundled = seal.read_json(tmp_path / "speed.json")["records"]
    for record in (random_, bundled):
        assert [len(side) for side in record["runs"].values()] == [2, 2]
        assert all(side[rows] > 0 for side in record["median"].values())
    monkeypatch.setattr(speed.seal, "rotate", lambda x, rope: x)
    with pytest.raises(seal.UserError, match="did not do the same work"):
        speed.main([*flags, "--ckpt", str(seal.TOY)])


def test_a_side_that_does_not_fit_leaves_the_others_figures(
    tmp_path, capsys, monkeypatch
):
    def run(work, side, *inputs):
        if side == "peft":
            raise torch.OutOfMemoryError("2 GB\nmore")
        return work(side, *inputs)

    monkeypatch.setattr(speed, "in_a_fresh_process", run)
    flags = ["--ckpt", str(seal.TOY), "--lengths", "60", "--pairs", "1", "--steps", "1"]
    speed.main([*flags, "--json", f"{tmp_path}/speed.json"])
    (record,) = seal.read_json(tmp_path / "speed.json")["records"]
    assert record["runs"]["peft"] == [{"error": "OutOfMemoryError: 2 GB more"}]
    assert record["median"]["seal"]["seconds a step"] > 0 and not record["median"]["peft"]
    assert "seconds a step" in capsys.readouterr().out
    with pytest.raises(seal.UserError, match="neither side"):
        speed.main([*flags, "--device", "no-such-device"])


def test_operations_are_the_products_that_a_step_needs_and_no_more():
    """By hand for one layer: forward all; back, the output matrix and the feed-forward to
    their inputs, o_proj to the scale, and nothing below it."""
    T, D, hidden, H, d, V = 100, 64, 96, 4, 16, 50
    config = seal.Config(V, D, hidden, 1, H, 2, d, 512)
    before, after = 2 * T * D * (H + 2 * 2) * d, 2 * T * (D * H * d + 3 * D * hidden)
    attention, output = 2 * T**2 * H * d, 2 * speed.ANSWER * D * V  # half of a square
    total, share = speed.operations(config, T)
    assert total == before + attention + 2 * after + 2 * output
    assert share == attention / total


def test_a_random_checkpoint_is_exported_and_copied_side_by_side(tmp_path, capfd):
    shapes.main(["toy", "--out", f"{tmp_path}/toy"])
    speed_export.main(["--ckpt", f"{tmp_path}/toy", "--outtypes", "f16", "--repeats", "1"])
    head, _, row = capfd.readouterr().out.splitlines()[1:]
    kind, export, processor, peak, *_ = row.split()
    assert head.split()[0] == "type" and kind == "f16"
    assert 0 < float(processor) and 0 < float(peak) < 2
