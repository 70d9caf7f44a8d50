"""Tokenizers and templates in the files that export_gguf.py makes. References: transformers'
tokens, and llama.cpp's."""

import json
import random
import re
import shutil
from pathlib import Path

import gguf
import pytest
import transformers

import export_gguf
import seal
from extras import check
from extras.check import LlamaCpp
from extras.test_export import export, refused, value
from test_seal import change_json, make, make_scales, open_tokenizer, plain  # noqa: F401
from test_seal import sp_model  # noqa: F401

# What trips tokenizers, to be strung together at random. Left out is what llama.cpp is
# known to cut otherwise: decomposed accents (it lacks Qwen's NFC), U+3000 (deepseek-llm's \s).
PIECES = (
    "0¦12345¦ 7¦3.14¦007¦½¦²¦٣¦ ¦  ¦   ¦\t¦\n¦\n\n¦\r\n¦ \n ¦\u00a0¦\u200b¦\x00¦\x0b"
    "¦\u2028¦'s¦'LL¦’s"
    "¦don't¦I'LL¦é¦É¦ÀÉ¦ß¦ñ¦naïve¦Ångström¦Ελλάδα¦हिन्दी¦日本¦日本語¦語。¦中文，¦한국¦한국어¦привет¦МИР"
    "¦العربية¦🙂¦👍🏽¦👩‍👧¦def f(x):\n    return x¦{}¦[i]¦{\"a\": [1]}¦<div>¦//¦#¦!=¦->¦...¦…¦—¦“q”"
    "¦_snake_case¦camelCase¦x86_64¦$¦€¦^¦~¦`¦-¦_¦▁¦Ġ¦<0x0A>¦<n7>¦<im>¦<|im_end|>¦<s>¦</s>¦[INST]¦a"
    "¦B¦aB¦ABc¦hello¦ World¦。¦！"
).split("¦")
# And what some kinds cut otherwise there.
STRAYS = {"tekken": "हΕÅ", "deepseek-llm": "\u2028"}


def strings(count: int, without="") -> list[str]:
    rng, made = random.Random(0), []
    pieces = [piece for piece in PIECES if not set(piece) & set(without)]
    for _ in range(count):
        made.append("".join(rng.choices(pieces, k=rng.randrange(1, 14))))
    return made


def keys_of(reader: gguf.GGUFReader) -> dict:
    """The vocabulary's keys, without what they begin with."""
    found, prefix = {}, "tokenizer.ggml."
    for key in reader.fields:
        if key.startswith(prefix):
            found[key.removeprefix(prefix)] = value(reader, key)
    return found


# --------------------------------------------------------------------------------------
# How text is cut
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", export_gguf.PRE_TOKENIZERS)
def test_llama_cpp_cuts_text_as_each_byte_level_tokenizer_does(name, tmp_path):
    folder = make(tmp_path / "llama", name)
    keys = keys_of(export(folder, tmp_path / "out.gguf"))
    assert (keys["model"], keys["pre"]) == ("gpt2", name)
    assert (keys["bos_token_id"], keys["eos_token_id"]) == (0, 1)
    assert not keys["add_bos_token"] and not keys["add_eos_token"]
    assert keys["token_type"][:3] == [3, 3, 1]
    assert keys["token_type"][339:] == [1, 4] + [5] * 267
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    llama = LlamaCpp(tmp_path / "out.gguf")
    for text in strings(1000, without=STRAYS.get(name, "")):
        ids = reference.encode(text, add_special_tokens=False)
        assert llama.tokenize(text) == ids, repr(text)


ADDED = {
    "600": {"content": "<|im_start|>", "special": True},
    "601": {"content": "<|im_end|>", "special": True},
    "602": {"content": "<n7>", "special": False, "normalized": False},
}
OTHER_ENDS = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "legacy": True}
SP_KINDS = {  # name: (tokenizer_config.json, {key: value in the GGUF})
    "no config": (None, {"add_space_prefix": True, "bos_token_id": 1, "eos_token_id": 2}),
    "bos": ({}, {"add_bos_token": True, "add_space_prefix": True}),
    "no bos": ({"add_bos_token": False}, {"add_bos_token": False}),
    "eos too": ({"add_eos_token": True}, {"add_eos_token": False}),
    "no space": (
        {"add_prefix_space": False, "added_tokens_decoder": ADDED},
        {"add_space_prefix": False},
    ),
    "others": (
        OTHER_ENDS | {"added_tokens_decoder": ADDED},
        {"bos_token_id": 600, "eos_token_id": 601},
    ),
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
    keys = keys_of(export(folder, tmp_path / "out.gguf"))
    assert expected.items() <= keys.items()
    assert keys["model"] == "llama"
    assert keys["token_type"][:6] == [2, 3, 3, 3, 3, 6]  # <unk> <s> </s> [INST] [/INST] <0x00>
    llama = LlamaCpp(tmp_path / "out.gguf")
    # Where it adds a space in front, transformers' Llama class does not do so before a
    # space or, unless it is "legacy", after a special token; llama.cpp does: no key could
    # tell it.
    differs = keys["add_space_prefix"] and kind != "no config"
    for text in strings(1000):
        if differs:
            text = "a" + re.sub(r"\[INST\]|<s>|</s>|<\|im_end\|>|<n7>", "", text)
        ids = reference.encode(text, add_special_tokens=False)
        assert llama.tokenize(text) == ids, repr(text)


INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("hints", [None, {}, {"chat_template": INST}, {"add_bos_token": False}])
def test_llama_cpp_begins_a_prompt_as_seal_does(hints, sp_model, tmp_path):
    """With BOS for a bare tokenizer.model, too, and once, if the template holds it."""
    folder = make(tmp_path / "llama", sp_model, hints=hints)
    if hints is None:
        (folder / "tokenizer_config.json").unlink()
    reader = export(folder, tmp_path / "out.gguf")
    tokenizer, llama = open_tokenizer(folder), LlamaCpp(tmp_path / "out.gguf")
    begins = "add_bos_token" not in (hints or {})
    assert value(reader, "tokenizer.ggml.add_bos_token") == begins
    asked = tokenizer.render("line torpid-kid?")
    template = value(reader, "tokenizer.chat_template")
    assert template == (hints or {}).get("chat_template")
    ids = llama.tokenize(asked, add_special=template is None)
    assert ids == tokenizer.prompt("line torpid-kid?")
    assert (ids[0] == 1) == begins and 1 not in ids[1:]


def test_a_token_without_a_row_is_left_out_and_an_end_named_by_the_model_is_known(
    tmp_path, capsys
):
    folder = make(tmp_path / "llama", "smollm", vocab_size=340, eos_token_id=7)
    (folder / "tokenizer_config.json").unlink()
    keys = keys_of(export(folder, tmp_path / "out.gguf"))
    assert len(keys["tokens"]) == 340
    assert "'<n7>' left out" in capsys.readouterr().err
    assert keys["eos_token_id"] == 7


WORD_LEVEL = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}


@pytest.mark.parametrize("change, message", [
    ({"pre_tokenizer": {"type": "Whitespace"}}, "unknown way.*Whitespace"),
    ({"normalizer": {"type": "Lowercase"}}, "unknown way"),
    ({"model": WORD_LEVEL}, "WordLevel"),
])
def test_tokenizers_that_llama_cpp_cannot_run_are_refused_by_name(
    change, message, tmp_path, capsys
):
    folder = make(tmp_path / "llama", "gpt-2")
    change_json(folder / "tokenizer.json", **change)
    said = refused(capsys, "--ckpt", folder, "--outfile", tmp_path / "out.gguf")
    assert re.search(message, said)
    assert not list(tmp_path.glob("*gguf*"))


def test_a_sentencepiece_tokenizer_needs_a_token_for_each_byte(sp_model, tmp_path, capsys):
    """llama.cpp ends at the first unknown letter otherwise, and the program with it."""
    folder = make(tmp_path / "llama", sp_model)
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    (folder / "tokenizer.model").unlink()
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace("<0xE9>", "<other>"))
    said = refused(capsys, "--ckpt", folder, "--outfile", tmp_path / "out.gguf")
    assert "byte 233" in said


@pytest.mark.parametrize("name", ["lstrip", "rstrip", "single_word"])
def test_added_tokens_that_take_spaces_or_whole_words_are_named(name, tmp_path, capsys):
    folder = make(tmp_path / "llama", "smollm")
    raw = seal.read_json(folder / "tokenizer.json")
    raw["added_tokens"][-1][name] = True
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    export(folder, tmp_path / "out.gguf")
    assert f"'<n7>' has {name}" in capsys.readouterr().err


# --------------------------------------------------------------------------------------
# Templates, and --check
# --------------------------------------------------------------------------------------

SAID = "{% for m in messages %}{{ m.content }}{% endfor %}"
NAMED = {"default": SAID, "tool_use": "{{ 1 }}", "rag-2": "{{ 2 }}"}


def as_list(folder: Path) -> None:
    """As transformers 4.40 and later had them."""
    templates = [{"name": name, "template": text} for name, text in NAMED.items()]
    change_json(folder / "tokenizer_config.json", chat_template=templates)


def as_files(folder: Path) -> None:
    """As transformers saves them today."""
    more = folder / "additional_chat_templates"
    more.mkdir()
    for name, text in NAMED.items():
        (more / f"{name}.jinja").write_text(text)
    (more / "default.jinja").rename(folder / "chat_template.jinja")


@pytest.mark.parametrize("store", [as_list, as_files])
def test_named_templates_are_kept(store, plain, tmp_path):
    folder = shutil.copytree(plain, tmp_path / "llama")
    store(folder)
    reader, main = export(folder, tmp_path / "out.gguf"), "tokenizer.chat_template"
    assert value(reader, main) == NAMED["default"]
    assert value(reader, f"{main}.tool_use") == "{{ 1 }}"
    assert value(reader, f"{main}.rag_2") == "{{ 2 }}"
    assert sorted(value(reader, f"{main}s")) == ["rag_2", "tool_use"]


def test_scales_bring_the_template_that_they_were_trained_in(plain, tmp_path):
    folder = shutil.copytree(plain, tmp_path / "llama")
    as_list(folder)
    config = seal.read_config(folder)
    make_scales(tmp_path / "s", config, "head", template="vicuna")
    reader = export(folder, tmp_path / "out.gguf", "--scales", tmp_path / "s")
    assert "USER: " in value(reader, "tokenizer.chat_template")
    assert value(reader, "tokenizer.chat_template.tool_use") == "{{ 1 }}"


CHATML = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>\n{% endfor %}"


def test_check_compares_tokens_and_logits_in_llama_cpp(sp_model, tmp_path, capsys):
    folder, out = tmp_path / "llama", tmp_path / "out.gguf"
    hints = {"added_tokens_decoder": ADDED, "chat_template": CHATML}
    make(folder, sp_model, hints=hints)
    reader = export(folder, out, "--outtype", "f32", "--check")
    assert value(reader, "tokenizer.ggml.eot_token_id") == 601  # what ends an answer
    said = capsys.readouterr().out
    assert re.search(r"check: (\d+) of \1 next tokens.* 8 added tokens", said)
    change_json(folder / "tokenizer_config.json", add_bos_token=False)
    with pytest.raises(seal.UserError, match="begins a text"):
        check.main(["--ckpt", str(folder), str(out)])
    # A space here, and none after <|im_end|>:
    template = CHATML.replace("<|im_start|>", "user: ")
    change_json(folder / "tokenizer_config.json", chat_template=template)
    with pytest.raises(seal.UserError, match="not as transformers"):
        export(folder, out, "--check")
