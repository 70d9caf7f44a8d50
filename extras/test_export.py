"""What export_gguf.py makes of a folder. The references: seal.py's logits, transformers'
tokens, llama.cpp."""

import json
import random
import re
from pathlib import Path

import gguf
import pytest
import torch
import transformers
from safetensors.torch import load_file

import export_gguf
import seal
from extras.check import LlamaCpp
from test_seal import change_weights, logits, make, make_scales, no_o_bias
from test_seal import other_output, sp_model  # noqa: F401

# What trips tokenizers, to be strung together at random. Left out is what llama.cpp is known
# to cut otherwise: decomposed accents (it lacks Qwen's NFC), U+3000 (deepseek-llm's \s).
PIECES = ["0", "12345", " 7", " ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", " \n ", "'s", "'LL", "é", "É",
          "ÀÉ", "ß", "ñ", "日本", "語。", "中文，", "한국", "привет", "МИР", "🙂", "👍🏽", "def f(x):", "{}", "[i]",
          "    return", "//", "!=", "->", "<n7>", "<|im_end|>", "<s>", "[INST]", "a", "B", "aB", "ABc", "hello",
          " World", "_", "-", "\u00a0", "\u200b", "½", "²", "٣", "\x00", "$", "€"]


def strings(count: int) -> list[str]:
    rng = random.Random(0)
    return ["".join(rng.choices(PIECES, k=rng.randrange(1, 14))) for _ in range(count)]


def export(ckpt: Path, out: Path, *flags) -> gguf.GGUFReader:
    export_gguf.main([str(a) for a in ("--ckpt", ckpt, "--outfile", out, "--scales", "none", *flags)])
    return gguf.GGUFReader(out)


def value(reader: gguf.GGUFReader, key: str):
    return reader.fields[key].contents() if key in reader.fields else None


def vocabulary_keys(reader: gguf.GGUFReader) -> dict:
    prefix = "tokenizer.ggml."
    return {k.removeprefix(prefix): value(reader, k) for k in reader.fields if k.startswith(prefix)}


ADDED = {"600": {"content": "<|im_start|>", "special": True}, "601": {"content": "<|im_end|>", "special": True},
         "602": {"content": "<n7>", "special": False, "normalized": False}}

# ---------------------------------------------------------------------------------------
# From a folder
# ---------------------------------------------------------------------------------------

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 48}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
QWEN2 = transformers.Qwen2ForCausalLM


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
    "other yarn": ({"rope_parameters": YARN | {"beta_fast": 8.0, "attention_factor": 1.5}}, "none", None),
    "llama3": ({"rope_parameters": LLAMA3}, "none", None),
    "llama3, then ntk": ({"rope_parameters": LLAMA3}, "ntk:2", None),
    "mistral": ({"model": transformers.MistralForCausalLM, "sliding_window": None}, "none", None),
    "qwen2": ({"model": QWEN2}, "ntk:2", None),
    "qwen2, yarn": ({"model": QWEN2}, "yarn:4", None),
}


@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_answers_as_seal_does_without_and_with_scales(kind, sp_model, tmp_path):
    config, extension, change = KINDS[kind]
    folder = make(tmp_path / "llama", sp_model, **config)
    if change:
        change_weights(folder, change)
    extended = seal.extend(seal.read_config(folder), extension)
    model = seal.load_model(folder, extended, dtype=torch.float32)
    prompt = [1] + torch.randint(3, 600, (60,), generator=torch.Generator().manual_seed(1)).tolist()
    for mode in ("none", "head", "channel"):
        flags = ["--extend", extension]
        if mode != "none":
            scales = make_scales(tmp_path / "s", extended, mode, extension)
            model.reset_scales(mode)
            model.set_scales(scales)
            flags = ["--scales", tmp_path / "s"]  # which remember the extension
        reader = export(folder, tmp_path / "out.gguf", "--outtype", "f32", *flags)
        arch = value(reader, "general.architecture")
        assert arch == (kind[:5] if kind.startswith("qwen") else "llama")
        context = extended.context
        assert value(reader, f"{arch}.context_length") == context
        tokens = prompt + seal.generate(model, prompt, 40)
        ours, theirs = logits(model, tokens), LlamaCpp(tmp_path / "out.gguf").logits(tokens)
        assert (ours - theirs).abs().max() < 1e-3, mode
        best = ours.topk(2).values
        clear = best[:, 0] - best[:, 1] > 2e-3  # no tie that rounding could decide
        assert (ours.argmax(-1) == theirs.argmax(-1))[clear].all() and clear.sum() > 80


@pytest.mark.parametrize("outtype", ["f16", "bf16", "q8_0", "auto"])
@pytest.mark.parametrize("width", [64, 80])  # rows of 80 cannot be cut into 32s: q8_0 has them in f16
def test_every_type_is_the_float32_fold_cast_once(outtype, width, sp_model, tmp_path, monkeypatch):
    monkeypatch.setattr(export_gguf, "BLOCK", 7 * 64)  # some rows at a time
    folder = make(tmp_path / "llama", sp_model, hidden_size=width, dtype=torch.bfloat16)
    scales = make_scales(tmp_path / "s", seal.read_config(folder), "channel")
    reader = export(folder, tmp_path / "out.gguf", "--outtype", outtype, "--scales", tmp_path / "s")
    kind = {"f16": "F16", "bf16": "BF16", "q8_0": "Q8_0", "auto": "BF16"}[outtype]
    assert value(reader, "general.file_type") == {"F16": 1, "BF16": 32, "Q8_0": 7}[kind]
    found = {t.name: t for t in reader.tensors}
    assert {t.tensor_type.name for t in found.values() if len(t.shape) == 1} == {"F32"}
    o_proj = found["blk.1.attn_output.weight"]
    assert o_proj.tensor_type.name == ("F16" if (outtype, width) == ("q8_0", 80) else kind)
    weight = load_file(folder / "model.safetensors")["model.layers.1.self_attn.o_proj.weight"]
    expected = gguf.quantize((weight.float() * scales[1]).numpy(), o_proj.tensor_type)
    assert o_proj.data.tobytes() == expected.tobytes()


def test_metadata_names_the_model_its_base_and_the_training(sp_model, tmp_path, capsys, monkeypatch):
    template = "{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}"
    folder = make(tmp_path / "tiny-llama", sp_model, hints={"chat_template": template}, dtype=torch.bfloat16)
    monkeypatch.chdir(tmp_path)
    make_scales(Path("scales.safetensors"), seal.read_config(folder), "head", "ntk:2")
    export_gguf.main(["--ckpt", "tiny-llama"])
    said = capsys.readouterr()
    assert said.out.startswith("tiny-llama-seal-h-BF16.gguf: ") and "scales.safetensors" in said.err
    assert "-m tiny-llama-seal-h-BF16.gguf -c 512" in said.out
    reader = gguf.GGUFReader("tiny-llama-seal-h-BF16.gguf")
    expected = {
        "general.base_model.0.name": "tiny-llama", "general.base_model.count": 1, "general.type": "model",
        "general.finetune": "seal-h", "seal.mode": "head", "seal.extend": "ntk:2", "seal.task": "lines",
        "llama.context_length": 512, "llama.rope.scaling.type": None, "tokenizer.chat_template": template,
    }
    assert {key: value(reader, key) for key in expected} == expected
    assert "SEAL-H" in value(reader, "general.description")
    assert value(reader, "llama.rope.freq_base") == pytest.approx(1e4 * 2 ** (16 / 14))
    export_gguf.main(["--ckpt", "tiny-llama", "--scales", "none"])
    assert Path("tiny-llama-BF16.gguf").is_file()


def test_check_compares_tokens_and_logits_in_llama_cpp(sp_model, tmp_path, capsys):
    template = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>\n{% endfor %}"
    hints = {"added_tokens_decoder": ADDED, "chat_template": template}
    folder = make(tmp_path / "llama", sp_model, hints=hints)
    export(folder, tmp_path / "out.gguf", "--outtype", "f32", "--check")
    assert re.search(r"check: (\d+) of \1 next tokens.* 8 added tokens", capsys.readouterr().out)
    template = template.replace("<|im_start|>", "user: ")  # a space here, none after <|im_end|>
    make(folder, sp_model, hints=hints | {"chat_template": template})
    with pytest.raises(seal.UserError, match="not as transformers"):
        export(folder, tmp_path / "out.gguf", "--check")

# ---------------------------------------------------------------------------------------
# Vocabularies
# ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", export_gguf.PRE_TOKENIZERS)
def test_llama_cpp_cuts_text_as_each_byte_level_tokenizer_does(name, tmp_path):
    folder = make(tmp_path / "llama", name)
    keys = vocabulary_keys(export(folder, tmp_path / "out.gguf"))
    assert (keys["model"], keys["pre"], keys["add_bos_token"]) == ("gpt2", name, False)
    assert (keys["bos_token_id"], keys["eos_token_id"], keys["add_eos_token"]) == (0, 1, False)
    assert keys["token_type"][:3] == [3, 3, 1] and keys["token_type"][339:] == [1, 4] + [5] * 267
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    llama = LlamaCpp(tmp_path / "out.gguf")
    for text in strings(1000):
        assert llama.tokenize(text) == reference.encode(text, add_special_tokens=False), repr(text)


SP_KINDS = {  # name: (tokenizer_config.json, {key: value in the GGUF})
    "no config": (None, {"add_space_prefix": True, "bos_token_id": 1, "eos_token_id": 2}),
    "bos": ({}, {"add_bos_token": True}),
    "no bos": ({"add_bos_token": False}, {"add_bos_token": False}),
    "eos too": ({"add_eos_token": True}, {"add_eos_token": False}),
    "no space": ({"add_prefix_space": False, "added_tokens_decoder": ADDED}, {"add_space_prefix": False}),
    "others": ({"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "legacy": True,
                "added_tokens_decoder": ADDED}, {"bos_token_id": 600, "eos_token_id": 601}),
}


@pytest.mark.parametrize("saved", [False, True], ids=["tokenizer.model", "tokenizer.json"])
@pytest.mark.parametrize("kind", SP_KINDS)
def test_llama_cpp_cuts_text_as_sentencepiece_tokenizers_do(kind, saved, sp_model, tmp_path):
    hints, expected = SP_KINDS[kind]
    folder = make(tmp_path / "llama", sp_model, hints=hints)
    if hints is None:
        (folder / "tokenizer_config.json").unlink()
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    if saved:  # all that transformers 5 saves
        reference.save_pretrained(folder)
        (folder / "tokenizer.model").unlink()
        reference = transformers.AutoTokenizer.from_pretrained(folder)
    keys = vocabulary_keys(export(folder, tmp_path / "out.gguf"))
    assert expected.items() <= keys.items() and keys["model"] == "llama"
    assert keys["token_type"][:6] == [2, 3, 3, 3, 3, 6]  # <unk> <s> </s> [INST] [/INST] <0x00>
    llama, prefix = LlamaCpp(tmp_path / "out.gguf"), keys["add_space_prefix"]
    # Where it adds a space in front, transformers' Llama class does not do so before a space
    # or, unless it is "legacy", after a special token; llama.cpp does: no key could tell it.
    for text in strings(1000):
        if prefix and kind != "no config":
            text = "a" + text
            for special in ("[INST]", "<s>", "<|im_end|>", "<n7>"):
                text = text.replace(special, "")
        assert llama.tokenize(text) == reference.encode(text, add_special_tokens=False), repr(text)


def test_a_token_beyond_the_embedding_is_left_out_and_an_end_named_by_the_model_is_known(tmp_path, capsys):
    folder = make(tmp_path / "llama", "smollm", vocab_size=340, eos_token_id=7)
    (folder / "tokenizer_config.json").unlink()
    keys = vocabulary_keys(export(folder, tmp_path / "out.gguf"))
    assert len(keys["tokens"]) == 340 and "'<n7>' left out" in capsys.readouterr().err
    assert keys["eos_token_id"] == 7


@pytest.mark.parametrize("change, message", [
    ({"pre_tokenizer": {"type": "Whitespace"}}, "unknown way.*Whitespace"),
    ({"normalizer": {"type": "Lowercase"}}, "unknown way"),
    ({"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}, "WordLevel"),
])
def test_tokenizers_that_llama_cpp_cannot_run_are_refused_by_name(change, message, tmp_path):
    folder = make(tmp_path / "llama", "gpt-2")
    raw = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(raw | change))
    with pytest.raises(seal.UserError, match=message):
        export(folder, tmp_path / "out.gguf")
    assert not list(tmp_path.glob("*gguf*"))
