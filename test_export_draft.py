"""Tests of export_gguf.py. The references: seal.py's logits, transformers' tokens, llama.cpp."""

import json
import random
import re
import shutil
import struct
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import sentencepiece
import tokenizers
import torch
import transformers
from gguf import GGMLQuantizationType, GGUFValueType
from safetensors.torch import load_file, save_file

import export_gguf
import seal
from extras.check import LlamaCpp

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
# What trips tokenizers, to be strung together at random. Left out is what llama.cpp is known
# to cut otherwise: decomposed accents (it lacks Qwen's NFC), U+3000 (deepseek-llm's \s).
PIECES = ["0", "12345", " 7", " ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", " \n ", "'s", "'LL", "é", "É",
          "ÀÉ", "ß", "ñ", "日本", "語。", "中文，", "한국", "привет", "МИР", "🙂", "👍🏽", "def f(x):", "{}", "[i]",
          "    return", "//", "!=", "->", "<n7>", "<|im_end|>", "<s>", "[INST]", "a", "B", "aB", "ABc", "hello",
          " World", "_", "-", "\u00a0", "\u200b", "½", "²", "٣", "\x00", "$", "€"]


def strings(count: int) -> list[str]:
    rng = random.Random(0)
    return ["".join(rng.choices(PIECES, k=rng.randrange(1, 14))) for _ in range(count)]


@pytest.fixture(scope="session")
def sp_model(tmp_path_factory) -> Path:
    """A tokenizer.model of 460 pieces with Llama's settings, and [INST] as a control symbol."""
    prefix = tmp_path_factory.mktemp("sp") / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT), model_prefix=str(prefix), vocab_size=460, model_type="bpe",
        byte_fallback=True, split_digits=True, normalization_rule_name="identity", minloglevel=2,
        remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
        control_symbols=["[INST]", "[/INST]"],
    )
    return prefix.with_suffix(".model")


def byte_level(folder: Path, name: str) -> None:
    """A tokenizer.json of 341 tokens that cuts text as the one that llama.cpp knows by this name."""
    model = tokenizers.models.BPE(ignore_merges=name in export_gguf.MERGES_IGNORED)
    raw = json.loads(tokenizers.Tokenizer(model).to_str())
    raw["pre_tokenizer"] = export_gguf.PRE_TOKENIZERS[name]
    raw["normalizer"] = {"type": "NFC"} if name == "qwen2" else None
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(raw))
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=340, special_tokens=["<s>", "<|im_end|>"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.add_tokens([tokenizers.AddedToken("<n7>", normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    hints = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(hints))


def make(folder: Path, tokenizer: Path | str, model=transformers.LlamaForCausalLM, seed=0,
         dtype=torch.float32, hints=None, **config) -> Path:
    """A random checkpoint as transformers writes it; tokenizer: a tokenizer.model, or a name for byte_level."""
    torch.manual_seed(seed)
    small = dict(vocab_size=608, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
                 initializer_range=0.2)
    network = model(model.config_class(**(small | config))).eval()
    for p in network.parameters():
        if p.ndim == 1:  # biases and norms start at 0 and 1, where a lost one would not show
            p.data += 0.2 * torch.randn_like(p)
    network.to(dtype).save_pretrained(folder)
    if isinstance(tokenizer, str):
        byte_level(folder, tokenizer)
    else:
        shutil.copy(tokenizer, folder / "tokenizer.model")
        hints = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True} | (hints or {})
    if hints:
        (folder / "tokenizer_config.json").write_text(json.dumps(hints))
    return folder


def change_weights(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture(scope="session")
def plain(tmp_path_factory, sp_model) -> Path:
    return make(tmp_path_factory.mktemp("plain") / "llama", sp_model)


def make_scales(path: Path, config, mode: str, extend="none", values=None) -> list[torch.Tensor]:
    """Random scales around 1, saved as `seal.py train` does."""
    torch.manual_seed(1)
    size = config.num_attention_heads * (config.head_dim if mode == "channel" else 1)
    scales = values or [1 + 0.3 * torch.randn(size) for _ in range(config.num_hidden_layers)]
    scales = [scale.clone() for scale in scales]
    run = seal.Run(mode=mode, heads=config.num_attention_heads, head_size=config.head_dim,
                   layers=config.num_hidden_layers, extend=extend, template="auto", task="lines", length=100, lr=0.01)
    seal.save_scales(path, scales, run)
    return scales


def export(ckpt: Path, out: Path, *flags) -> gguf.GGUFReader:
    export_gguf.main([str(a) for a in ("--ckpt", ckpt, "--outfile", out, "--scales", "none", *flags)])
    return gguf.GGUFReader(out)


def value(reader: gguf.GGUFReader, key: str):
    return reader.fields[key].contents() if key in reader.fields else None


def vocabulary_keys(reader: gguf.GGUFReader) -> dict:
    prefix = "tokenizer.ggml."
    return {k.removeprefix(prefix): value(reader, k) for k in reader.fields if k.startswith(prefix)}


@torch.no_grad()
def logits(model, tokens: list[int]) -> torch.Tensor:
    return model.logits(model(torch.tensor([tokens])))[0]


ADDED = {"460": {"content": "<|im_start|>", "special": True}, "461": {"content": "<|im_end|>", "special": True},
         "462": {"content": "<n7>", "special": False, "normalized": False}}

# ---------------------------------------------------------------------------------------
# From a folder
# ---------------------------------------------------------------------------------------

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 48}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
QWEN2, QWEN3 = transformers.Qwen2ForCausalLM, transformers.Qwen3ForCausalLM


def other_output(weights):
    weights["lm_head.weight"] = 0.2 * torch.randn(608, 64)


def no_o_bias(weights):
    for name in [name for name in weights if name.endswith("o_proj.bias")]:
        del weights[name]


KINDS = {  # name: (config, extension, change of the weights)
    "grouped queries": ({}, "none", None),
    "one head of keys": ({"num_key_value_heads": 1}, "none", None),
    "odd head size": ({"head_dim": 20}, "none", None),
    "tied": ({"tie_word_embeddings": True}, "none", None),
    "said to be tied": ({"tie_word_embeddings": True}, "none", other_output),
    "biases": ({"attention_bias": True, "mlp_bias": True}, "none", None),
    "q k v biases": ({"attention_bias": True}, "none", no_o_bias),
    "ntk": ({}, "ntk:4", None),
    "linear": ({}, "linear:2", None),
    "linear, then ntk": ({"rope_parameters": LINEAR}, "ntk:2", None),
    "yarn": ({}, "yarn:4", None),
    "yarn in config": ({"rope_parameters": YARN}, "none", None),
    "other yarn": ({"rope_parameters": YARN | {"beta_fast": 8.0, "attention_factor": 1.5}}, "none", None),
    "llama3": ({"rope_parameters": LLAMA3}, "none", None),
    "llama3, then ntk": ({"rope_parameters": LLAMA3}, "ntk:2", None),
    "mistral": ({"model": transformers.MistralForCausalLM, "sliding_window": 128}, "none", None),
    "qwen2": ({"model": QWEN2}, "ntk:2", None),
    "qwen2, yarn": ({"model": QWEN2}, "yarn:4", None),
    "qwen3": ({"model": QWEN3, "head_dim": 32}, "none", None),
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
        context = min(extended.max_position_embeddings, extended.sliding_window or 10**9)
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
                "added_tokens_decoder": ADDED}, {"bos_token_id": 460, "eos_token_id": 461}),
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


# ---------------------------------------------------------------------------------------
# From a GGUF file
# ---------------------------------------------------------------------------------------

EXACT = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL")


def source(folder: Path, out: Path, kind: str, alignment=32, **keys) -> Path:
    """The folder as a GGUF file with matrices of this type, and metadata that others have broken."""
    made = export(folder, out, "--outtype", "f32")
    entries = {}
    for key, field in made.fields.items():
        if not key.startswith("GGUF."):
            entries[key] = b"".join(part.tobytes() for part in field.parts)
    for key, new in {"general.alignment": alignment, "x.floats": [0.1], "x.empty": [], **keys}.items():
        entries[key] = export_gguf.entry(key, new)
    longs = struct.pack("<IIQ3q", GGUFValueType.ARRAY, GGUFValueType.INT64, 3, -1, 0, 1 << 40)
    entries["x.longs"] = export_gguf.pack("x.longs") + longs
    tensors = []
    for t in made.tensors:
        shape, wanted, data = tuple(t.shape.tolist()[::-1]), t.tensor_type, np.array(t.data)
        block, size = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
        if len(shape) == 2 and shape[1] % block == 0:
            wanted = GGMLQuantizationType[kind]
            if kind in ("IQ4_NL", "Q6_K"):  # the gguf package cannot write them: any bytes, small scales
                data = np.random.default_rng(0).integers(0, 256, (shape[0], shape[1] // block, size), np.uint8)
                at = 0 if kind == "IQ4_NL" else size - 2
                data[:, :, at : at + 2] = np.float16([0.003]).view(np.uint8)
                data = data.reshape(shape[0], -1)
            else:
                data = gguf.quantize(data, wanted)
        tensors.append(export_gguf.Stored(t.name, shape, wanted, data.__getitem__))
    export_gguf.write(out, list(entries.values()), tensors, alignment)
    return out


def compare(source: Path, result: Path, changed=()) -> list[tuple]:
    """Keys, with types, and tensors are the source's to the bit, but for these keys, SEAL's, and o_proj's."""
    a, b = gguf.GGUFReader(source), gguf.GGUFReader(result)
    for key in a.fields.keys() - {"GGUF.kv_count", *changed}:
        x, y = a.fields[key], b.fields[key]
        assert x.types == y.types and list(map(bytes, x.parts)) == list(map(bytes, y.parts)), key
    for key in b.fields.keys() - a.fields.keys() - set(changed):
        assert key.startswith("seal.") or key == "general.description"
    assert a.alignment == b.alignment and not any(t.data_offset % b.alignment for t in b.tensors)
    pairs = list(zip(a.tensors, b.tensors, strict=True))
    for x, y in pairs:
        assert (x.name, x.shape.tolist()) == (y.name, y.shape.tolist())
        if not x.name.endswith("attn_output.weight"):
            assert x.tensor_type == y.tensor_type and x.data.tobytes() == y.data.tobytes(), x.name
    return [pair for pair in pairs if pair[0].name.endswith("attn_output.weight")]


@pytest.fixture(scope="module")
def wide(tmp_path_factory, sp_model) -> Path:
    """Heads of 64, so that every type's blocks fit the rows."""
    return make(tmp_path_factory.mktemp("wide") / "llama", sp_model, hidden_size=256)


@pytest.mark.parametrize("mode", ["head", "channel", "ones"])
@pytest.mark.parametrize("kind", [*EXACT, "F32", "F16", "BF16", "Q6_K"])
def test_a_gguf_file_keeps_all_but_o_proj_which_is_scaled(kind, mode, wide, tmp_path, capsys):
    file, scales = source(wide, tmp_path / "base.gguf", kind, 64), [torch.ones(256)] * 2
    config, s = seal.read_config(wide), tmp_path / "s"
    if mode == "ones":
        make_scales(s, config, "channel", values=scales)
    else:
        scales = make_scales(s, config, mode)
    export(file, tmp_path / "out.gguf", "--scales", s)
    said = capsys.readouterr().out
    exact = mode == "head" and kind in EXACT
    now = "Q8_0" if kind == "Q6_K" or (kind == "IQ4_NL" and not exact) else kind
    assert ("exactly" in said) == exact
    for (x, y), scale in zip(compare(file, tmp_path / "out.gguf"), scales, strict=True):
        if mode == "ones":
            assert x.tensor_type == y.tensor_type and x.data.tobytes() == y.data.tobytes()
            continue
        assert y.tensor_type.name == now and ("now Q8_0" in said) == (now != kind)
        columns = scale.repeat_interleave(256 // len(scale)).numpy()
        wanted = gguf.dequantize(x.data, x.tensor_type) * columns
        if exact:  # to the last bit of the blocks' own scales
            found = gguf.dequantize(y.data, y.tensor_type)
            assert np.abs(found - wanted).max() <= 2**-10 * np.abs(wanted).max()
        else:
            assert y.data.tobytes() == gguf.quantize(wanted, y.tensor_type).tobytes()


@pytest.mark.parametrize("kind", [*EXACT, "F32", "BF16"])
def test_scales_can_be_divided_out_again(kind, wide, tmp_path):
    file, config, s = source(wide, tmp_path / "base.gguf", kind), seal.read_config(wide), tmp_path / "s"
    scales = [torch.tensor([2.0, 0.5, -1.0, 4.0]), torch.tensor([1.0, -0.25, 8.0, 1.0])]
    make_scales(s, config, "head", values=scales)
    export(file, tmp_path / "scaled.gguf", "--scales", s)
    make_scales(s, config, "head", values=[1 / scale for scale in scales])
    export(tmp_path / "scaled.gguf", tmp_path / "out.gguf", "--scales", s)
    for x, y in compare(file, tmp_path / "out.gguf"):
        assert x.data.tobytes() == y.data.tobytes()


@pytest.mark.parametrize("extension", ["ntk:2", "linear:2", "yarn:4"])
def test_a_gguf_file_and_its_folder_answer_alike_with_scales_and_extension(extension, plain, tmp_path):
    file = source(plain, tmp_path / "base.gguf", "F32")
    make_scales(tmp_path / "s", seal.read_config(plain), "channel", extension)
    export(file, tmp_path / "a.gguf", "--scales", tmp_path / "s")
    export(plain, tmp_path / "b.gguf", "--scales", tmp_path / "s", "--outtype", "f32")
    changed = [f"llama.{key}" for key in ("context_length", "rope.freq_base", "rope.scaling.type",
               "rope.scaling.factor", "rope.scaling.original_context_length")]
    compare(file, tmp_path / "a.gguf", changed)
    tokens = list(range(3, 100))
    found, expected = (LlamaCpp(tmp_path / name).logits(tokens) for name in ("a.gguf", "b.gguf"))
    assert (found - expected).abs().max() < 1e-5
    assert value(gguf.GGUFReader(tmp_path / "a.gguf"), "seal.extend") == extension


# ---------------------------------------------------------------------------------------
# Mistakes and damage
# ---------------------------------------------------------------------------------------


def refused(capsys, *flags) -> str:
    """The one line with which the command ends, status 2."""
    assert seal.run("export_gguf.py", export_gguf.main, [str(flag) for flag in flags]) == 2
    said = capsys.readouterr().err.strip()
    assert "\n" not in said
    return said


def test_what_an_export_can_get_wrong_is_one_line_and_leaves_nothing(plain, tmp_path, capsys, monkeypatch):
    config, out, s = seal.read_config(plain), tmp_path / "out.gguf", tmp_path / "s"
    file = source(plain, tmp_path / "base.gguf", "Q8_0")
    make_scales(s, config, "head", "ntk:4")
    make_scales(tmp_path / "other", replace(config, num_attention_heads=8, head_dim=8), "head")
    make_scales(tmp_path / "huge", config, "head", values=[torch.full((4,), 1e9)] * 2)
    before = sorted(tmp_path.iterdir())
    for ckpt in (plain, file):
        base = ("--ckpt", ckpt, "--outfile", out, "--scales")
        assert "trained with ntk:4" in refused(capsys, *base, s, "--extend", "yarn:4")
        refused(capsys, *base, tmp_path / "other")
        refused(capsys, *base, "none", "--extend", "ntk:0")
        flags = () if ckpt == file else ("--outtype", "f16")
        assert "too large" in refused(capsys, *base, tmp_path / "huge", *flags)
    assert "is read" in refused(capsys, "--ckpt", file, "--outfile", file, "--scales", s)
    assert "for folders" in refused(capsys, *base, s, "--outtype", "f16")
    assert "for folders" in refused(capsys, *base, s, "--check")
    with monkeypatch.context() as here:
        here.setattr(export_gguf.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
        assert "GB" in refused(capsys, *base, s)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("key, new, message", [
    ("split.count", 3, "one of 3 parts"), ("general.architecture", "mamba", "'mamba'"),
    ("llama.attention.head_count", 8, ""), ("llama.attention.head_count", "four", ""),
    ("llama.block_count", 3, ""),
])
def test_files_of_other_kinds_are_refused(key, new, message, plain, tmp_path, capsys):
    file = source(plain, tmp_path / "base.gguf", "F32", **{key: new})
    make_scales(tmp_path / "s", seal.read_config(plain), "channel")
    assert message in refused(capsys, "--ckpt", file, "--scales", tmp_path / "s", "--outfile", tmp_path / "o")


def test_damaged_and_hostile_files_are_one_line(plain, tmp_path, capsys):
    whole = source(plain, tmp_path / "base.gguf", "Q8_0").read_bytes()
    make_scales(tmp_path / "s", seal.read_config(plain), "channel")
    bad, rng = [b"", b"GGUF", b"not a model", whole[:1000], whole[: len(whole) // 2], whole[:-40]], random.Random(0)
    bad += [whole[:8] + struct.pack("<Q", count) + whole[16:] for count in (1 << 20, 1 << 63)]   # tensors
    bad += [whole[:16] + struct.pack("<Q", count) + whole[24:] for count in (1 << 20, 1 << 63)]  # keys
    endless = export_gguf.pack("x") + struct.pack("<IIQ", 9, 0, 1 << 40)
    bad.append(struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + endless + bytes(1 << 16))
    nested = export_gguf.pack("x") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 5000
    bad.append(struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + nested + bytes(1 << 16))
    file, flags = tmp_path / "bad.gguf", ("--scales", tmp_path / "s", "--outfile", tmp_path / "out")
    for data in bad:
        file.write_bytes(data)
        assert str(file) in refused(capsys, "--ckpt", file, *flags)
    for _ in range(150):  # any other damage may go unseen, but never ends in a traceback
        data = bytearray(whole)
        for _ in range(rng.choice([1, 4])):
            data[rng.randrange(rng.choice([400, 24000]))] = rng.randrange(256)
        file.write_bytes(data)
        status = seal.run("export_gguf.py", export_gguf.main, [str(a) for a in ("--ckpt", file, *flags)])
        assert status in (0, 2) and "Traceback" not in capsys.readouterr().err
