"""What export_gguf.py makes of a folder's weights. References: seal.py's logits, llama.cpp."""

import shutil
from itertools import cycle
from pathlib import Path

import gguf
import pytest
import torch
import transformers
from safetensors.torch import load_file

import export_gguf
import seal
from extras.check import LlamaCpp
from test_seal import change_json, change_weights, gap, load, logits, make, make_scales
from test_seal import plain, some_tokens, sp_model, store  # noqa: F401


def export(ckpt: Path, out: Path, *flags) -> gguf.GGUFReader:
    flags = ["--ckpt", ckpt, "--outfile", out, "--scales", "none", *flags]
    export_gguf.main([str(flag) for flag in flags])
    return gguf.GGUFReader(out)


def value(reader: gguf.GGUFReader, key: str):
    return reader.fields[key].contents() if key in reader.fields else None


def refused(capsys, *flags) -> str:
    """The one line with which the command ends, status 2."""
    capsys.readouterr()
    flags = [str(flag) for flag in flags]
    assert seal.exit_status("export_gguf.py", export_gguf.main, flags) == 2
    said = capsys.readouterr().err.strip()
    assert "\n" not in said
    return said


def no_o_bias(weights):
    for layer in range(2):
        del weights[f"model.layers.{layer}.self_attn.o_proj.bias"]


def other_output(weights):
    weights["lm_head.weight"] = 0.2 * torch.randn(608, 64)


ROPE = {"rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
YARN = ROPE | {"rope_type": "yarn"}
OTHER_YARN = YARN | {"beta_fast": 8.0, "attention_factor": 1.5}
LLAMA3 = ROPE | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
MISTRAL = {"model": transformers.MistralForCausalLM, "sliding_window": None}
QWEN2 = {"model": transformers.Qwen2ForCausalLM}
QWEN3 = {"model": transformers.Qwen3ForCausalLM, "head_dim": 32}

KINDS = {  # name: (config, extension, change of the weights)
    "grouped queries": ({}, "none", None),
    "one head of keys": ({"num_key_value_heads": 1}, "none", None),
    "odd head size": ({"head_dim": 20}, "none", None),
    "tied": ({"tie_word_embeddings": True}, "none", None),
    "said to be tied": ({"tie_word_embeddings": True}, "none", other_output),
    "biases": ({"attention_bias": True}, "none", None),
    "q k v biases": ({"attention_bias": True}, "none", no_o_bias),
    "ntk": ({}, "ntk:4", None),
    "linear": ({}, "linear:2", None),
    "linear, then ntk": ({"rope_parameters": LINEAR}, "ntk:2", None),
    "yarn": ({}, "yarn:4", None),
    "yarn in config": ({"rope_parameters": YARN}, "none", None),
    "other yarn": ({"rope_parameters": OTHER_YARN}, "none", None),
    "llama3": ({"rope_parameters": LLAMA3}, "none", None),
    "llama3, then ntk": ({"rope_parameters": LLAMA3}, "ntk:2", None),
    "mistral": (MISTRAL, "none", None),
    "qwen2": (QWEN2, "ntk:2", None),
    "qwen2, yarn": (QWEN2, "yarn:4", None),
    "qwen3": (QWEN3, "ntk:2", None),
}


@pytest.mark.parametrize("kind, mode", [*zip(KINDS, cycle(seal.METHOD))])
def test_llama_cpp_answers_as_seal_does_without_and_with_scales(
    kind, mode, sp_model, tmp_path
):
    config, extension, change = KINDS[kind]
    folder = make(tmp_path / "llama", sp_model, **config)
    if change:
        change_weights(folder, change)
    model = load(folder, extension)
    prompt, s = [1, *some_tokens(60)], tmp_path / "s"
    scales = make_scales(s, model.config, mode, extension)
    for flags in (["--extend", extension], ["--scales", s]):  # which remember the extension
        if "--scales" in flags:
            model.set_scales(scales)
        reader = export(folder, tmp_path / "out.gguf", "--outtype", "f32", *flags)
        arch = value(reader, "general.architecture")
        assert arch == (kind[:5] if kind.startswith("qwen") else "llama")
        assert value(reader, f"{arch}.context_length") == model.config.context
        tokens = prompt + seal.generate(model, prompt, 40)
        ours, theirs = logits(model, tokens), LlamaCpp(tmp_path / "out.gguf").logits(tokens)
        assert gap(ours, theirs) < 1e-3
        best = ours.topk(2).values
        clear = best[:, 0] - best[:, 1] > 2e-3  # no tie that rounding could decide
        assert clear.sum() > 80
        assert (ours.argmax(-1) == theirs.argmax(-1))[clear].all()


KEPT = {  # what becomes of rows of 64 in these types, and of 80, which cannot be cut into 32s
    ("f16", 64): "F16", ("bf16", 64): "BF16", ("q8_0", 64): "Q8_0", ("auto", 64): "BF16",
    ("q8_0", 80): "F16",
}


@pytest.mark.parametrize("outtype, width", KEPT)
def test_every_type_is_the_float32_fold_cast_once(
    outtype, width, sp_model, tmp_path, monkeypatch
):
    monkeypatch.setattr(export_gguf, "BLOCK", 7 * 64)  # some rows at a time
    folder = make(tmp_path / "llama", sp_model, hidden_size=width, dtype=torch.bfloat16)
    s = tmp_path / "s"
    scales = make_scales(s, seal.read_config(folder), "channel")
    reader = export(folder, tmp_path / "out.gguf", "--outtype", outtype, "--scales", s)
    types = {"f16": 1, "bf16": 32, "auto": 32, "q8_0": 7}
    assert value(reader, "general.file_type") == types[outtype]
    found = {t.name: t for t in reader.tensors}
    for t in reader.tensors:
        assert (t.tensor_type.name == "F32") == (len(t.shape) == 1)
    o_proj = found["blk.1.attn_output.weight"]
    assert o_proj.tensor_type.name == KEPT[outtype, width]
    weights = load_file(folder / "model.safetensors")
    weight = weights["model.layers.1.self_attn.o_proj.weight"]
    expected = gguf.quantize((weight.float() * scales[1]).numpy(), o_proj.tensor_type)
    assert o_proj.data.tobytes() == expected.tobytes()


def test_auto_says_that_f16_is_nearer_than_bf16_on_llama_cpps_cpu_and_it_is(
    sp_model, tmp_path, capsys
):
    folder = make(tmp_path / "llama", sp_model, dtype=torch.bfloat16)
    tokens, gaps = some_tokens(60), {}
    ours = logits(load(folder), tokens)
    for outtype in ("auto", "f16", "bf16"):
        export(folder, tmp_path / "out.gguf", "--outtype", outtype)
        assert ("--outtype f16" in capsys.readouterr().out) == (outtype == "auto")
        gaps[outtype] = gap(ours, LlamaCpp(tmp_path / "out.gguf").logits(tokens))
    assert gaps["auto"] == gaps["bf16"] > 3 * gaps["f16"]


def wrapped(prefix: str):
    def change(weights):
        for name in list(weights):
            weights[prefix + name] = weights.pop(name)

    return change


def in_a_trainers_file(key: str):
    """As .bin, with a step count beside the tensors, or the state a level down."""

    def change(folder: Path):
        store(folder, "bin")
        (path,) = folder.glob("*.bin")
        state = torch.load(path)
        torch.save({key: state, "step": 7} if key else state | {"step": 7}, path)

    return change


@pytest.mark.parametrize("change", [
    "old", "bin", "_orig_mod.", "module.", "base_model.model.",
    in_a_trainers_file(""), in_a_trainers_file("model"), in_a_trainers_file("state_dict"),
])
def test_a_file_is_the_same_however_a_folder_holds_the_weights(change, plain, tmp_path):
    folder = shutil.copytree(plain, tmp_path / "llama")
    if callable(change):
        change(folder)
    elif change.endswith("."):
        change_weights(folder, wrapped(change))
    else:
        store(folder, change)
    for ckpt in (plain, folder):
        export(ckpt, tmp_path / f"{ckpt is plain}.gguf")
    assert (tmp_path / "True.gguf").read_bytes() == (tmp_path / "False.gguf").read_bytes()


@pytest.fixture
def here(plain, tmp_path, monkeypatch) -> Path:
    """A working folder with scales.safetensors for NTK in it, and a checkpoint that they fit."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(plain, "tiny-llama")
    template = "{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}"
    change_json(Path("tiny-llama/tokenizer_config.json"), chat_template=template)
    config = seal.read_config("tiny-llama")
    make_scales(Path("scales.safetensors"), config, "head", "ntk:2")
    make_scales(Path("others"), config, "channel")
    return tmp_path


def test_metadata_names_the_model_its_base_and_the_training(here, capsys):
    export_gguf.main(["--ckpt", "tiny-llama"])
    said, name = capsys.readouterr(), "tiny-llama-seal-h-F16.gguf"
    assert said.out.startswith(f"{name}: ") and "scales.safetensors" in said.err
    assert f"-m {name} -c 512" in said.out
    reader = gguf.GGUFReader(name)
    hints = seal.read_json("tiny-llama/tokenizer_config.json")
    _, facts = seal.read_scales("scales.safetensors", seal.read_config("tiny-llama"))
    expected = {
        "general.base_model.0.name": "tiny-llama", "general.base_model.count": 1,
        "general.type": "model", "general.finetune": "seal-h", "seal.mode": "head",
        "seal.extend": "ntk:2", "seal.task": "lines", "seal.length": "100",
        "seal.fingerprint": facts.fingerprint, "llama.context_length": 512,
        "llama.rope.scaling.type": None, "tokenizer.chat_template": hints["chat_template"],
    }
    assert {key: value(reader, key) for key in expected} == expected
    assert "SEAL-H" in value(reader, "general.description")
    assert value(reader, "llama.rope.freq_base") == pytest.approx(1e4 * 2 ** (16 / 14))
    export_gguf.main(["--ckpt", "tiny-llama", "--scales", "none"])
    assert Path("tiny-llama-F16.gguf").is_file()


def test_scales_that_are_in_a_folders_weights_are_told_of_and_refused_a_second_time(
    here, capsys
):
    seal.main("fold --ckpt tiny-llama --scales scales.safetensors --out folded".split())
    out = here / "out.gguf"
    assert "already" in refused(capsys, "--ckpt", "folded", "--outfile", out)
    assert not out.exists()
    reader = export(Path("folded"), out)
    (past,) = seal.read_json("folded/config.json")["seal"]
    assert {key: value(reader, f"seal.{key}") for key in past} == past
    assert "SEAL-H" in value(reader, "general.description")
    reader = export(Path("folded"), out, "--scales", "others")
    config = seal.read_config("tiny-llama")
    first, second = (
        seal.read_scales(name, config)[1].fingerprint for name in ("scales.safetensors", "others")
    )
    assert value(reader, "seal.fingerprint") == f"{first},{second}"
    assert value(reader, "seal.mode") == "channel"


def test_what_is_no_checkpoint_is_one_line(here, capsys):
    Path("adapter").mkdir()
    Path("adapter/adapter_config.json").write_text("{}")
    Path("notes.txt").write_text("no model")
    for ckpt in ("adapter", "org/name", "tiny-lama", "notes.txt", "tiny-llama/config.json"):
        assert ckpt in refused(capsys, "--ckpt", ckpt)
    assert not list(here.glob("*.gguf"))
