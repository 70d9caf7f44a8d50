"""Tests of tokenizers and chat templates as people have them, beside transformers."""

import json
import re
from pathlib import Path

import pytest
import tokenizers
import transformers

from seal import Sample
from test_seal import byte_level, change_json, cli, folder, make  # noqa: F401
from test_seal import open_tokenizer, plain, sp_model, tokenizer  # noqa: F401

ALL, GO = "{% for m in messages %}", "{% endfor %}{% if add_generation_prompt %}"
CHATML = (
    ALL + "{% if loop.first and m.role != 'system' %}<|im_start|>system\nSYS<|im_end|>\n"
    "{% endif %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}"
    + GO + "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
IM = "<|im_start|>system\nSYS<|im_end|>\n<|im_start|>user\nSay hi<|im_end|>\n"
IM += "<|im_start|>assistant\n"
SMOLLM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
QWEN = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
INST = (
    "{{ bos_token }}" + ALL + "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if m.role == 'user' %}"
    "{{ '[INST] ' + m.content | trim + '@[/INST]' }}{% else %}"
    "{{ ' ' + m.content | trim + '@' + eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    ALL + "\n{{ '<|' + m.role + '|>\n' + m.content + eos_token }}\n{% if loop.last and "
    "add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
DATED = (
    "<|a|>system<|b|>\n\nCutting Knowledge Date: December 2023\nToday Date: DAY\n\n<|eot|>"
)
LLAMA_31 = (  # with <|a|> and <|b|> around a role, and <|eot|>, for the longer names
    "{% set DAY = strftime_now('%d %b %Y') if strftime_now is defined else '26 Jul 2024' %}"
    "{{- bos_token + '" + DATED.replace("DAY", "' + DAY + '") + "' }}" + ALL
    + "{{- '<|a|>' + m.role + '<|b|>\n\n' + m.content | trim + '<|eot|>' }}" + GO
    + "{{- '<|a|>assistant<|b|>\n\n' }}{% endif %}"
)
LLAMA_31_PROMPT = (
    "<s>" + DATED.replace("DAY", "26 Jul 2024")
    + "<|a|>user<|b|>\n\nSay hi<|eot|><|a|>assistant<|b|>\n\n"
)
THINK = (  # a reasoning model's: it opens a thought to ask, and keeps none afterwards
    ALL + "{{ '<|im_start|>' + m.role + '\n' + m.content.split('</think>')[-1] }}"
    "<|im_end|>\n" + GO + "{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
QWEN3 = (  # one that begins a finished answer with a thought that is empty
    ALL + "{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n" + GO
    + "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ASKED = IM.split("\n", 2)[2]  # without a system message
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant "
    "gives helpful, detailed, and polite answers to the user's questions. USER: Say hi "
    "ASSISTANT:"
)
CHATS = {  # the folder's name: (tokenizer, template, prompt, answer)
    "SmolLM2": ("smollm", CHATML.replace("SYS", SMOLLM), IM.replace("SYS", SMOLLM),
                "Hi<|im_end|>"),
    "Qwen2.5": ("qwen2", CHATML.replace("SYS", QWEN), IM.replace("SYS", QWEN),
                "Hi<|im_end|>"),
    "QwQ": ("qwen2", THINK, ASKED + "<think>\n", "Hi<|im_end|>"),
    "Qwen3": ("qwen2", QWEN3, ASKED, "<think>\n\n</think>\n\nHi<|im_end|>"),
    "Llama-2": ("sp", INST.replace("@", " "), "<s>[INST] Say hi [/INST]", " Hi </s>"),
    "Mistral-v0.3": ("sp", INST.replace("@", ""), "<s>[INST] Say hi[/INST]", " Hi</s>"),
    "Zephyr": ("sp", ZEPHYR, "<|user|>\nSay hi</s>\n<|assistant|>\n", "Hi</s>"),
    "Llama-3.1": ("llama-bpe", LLAMA_31, LLAMA_31_PROMPT, "Hi<|eot|>"),
    # without a template, by the name:
    "longchat-7b-v1.5-32k": ("sp", ..., VICUNA, " Hi</s>"),
    "Llama-2-7b-chat-hf": ("sp", ..., "[INST] Say hi [/INST]", " Hi </s>"),
    "Mistral-7B-Instruct-v0.2": ("sp", ..., "[INST] Say hi [/INST]", " Hi</s>"),
    "renamed": ("sp", ..., "Say hi", " Hi</s>"),
}


def added(first: int, *tokens, special=True) -> dict:
    """added_tokens_decoder of tokenizer_config.json."""
    return {str(i): {"content": t, "special": special} for i, t in enumerate(tokens, first)}


def to_byte_level(folder: Path, name="llama-bpe", **hints) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    byte_level(folder, name)
    change_json(folder / "tokenizer_config.json", **hints)


@pytest.mark.parametrize("name", CHATS)
def test_prompt_answer_and_end_are_those_of_the_published_templates(name, folder):
    kind, template, prompt, answer = CHATS[name]
    folder = folder.rename(folder.with_name(name))
    if kind != "sp":
        tokens = added(341, "<|im_start|>", "<|a|>", "<|b|>", "<|eot|>")
        to_byte_level(folder, kind, added_tokens_decoder=tokens)
    change_json(folder / "tokenizer_config.json", chat_template=template)
    ours = open_tokenizer(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ids, learned = ours.pair(Sample("Say hi", "Hi"))
    for text, found in ((prompt, ids), (prompt + answer, ids + learned)):
        leave_bos = kind == "sp" and "<s>" not in prompt  # to the tokenizer
        assert found == theirs.encode(text, add_special_tokens=leave_bos)
    assert ids == ours.prompt("Say hi")
    assert learned[-1] == ours.end_token in ours.stop
    assert theirs.decode(ours.end_token) == answer.split("Hi")[1].strip()


@pytest.mark.parametrize("answer", ["Hi", "end", "a", "user"])
@pytest.mark.parametrize("prefix", ["", "The answer is", "a"])
def test_what_is_trained_is_what_will_be_asked_behind_an_opened_thought(prefix, answer, folder):
    tokens = added(341, "<|im_start|>")
    to_byte_level(folder, "qwen2", added_tokens_decoder=tokens, chat_template=THINK)
    ours = open_tokenizer(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    prompt, learned = ours.pair(Sample("Say a", answer, prefix=prefix))
    asked = theirs.apply_chat_template(
        [{"role": "user", "content": "Say a"}], add_generation_prompt=True, tokenize=False)
    assert prompt == ours.prompt("Say a", prefix) == theirs.encode(asked + prefix)
    assert theirs.decode(learned) == f" {answer}<|im_end|>"[prefix == "" :]
    assert learned[-1] == ours.end_token


@pytest.mark.parametrize("template", [
    "{{ raise_exception('no') }}",
    "{{ ''.__class__.__mro__ }}",
    "{% for m in messages %}",
    "{{ 1 / 0 }}",
    "{{ messages.append(1) }}",
    "{% for i in range(10**9) %}{% endfor %}",
])
def test_a_template_that_raises_or_reaches_out_is_one_line(template, folder, cli):
    change_json(folder / "tokenizer_config.json", chat_template=template)
    status, out, err = cli("generate", "--ckpt", folder, "--prompt", "a")
    assert (status, out) == (2, "")
    assert re.fullmatch("seal.py: error: .*template.*\n", err)


@pytest.mark.parametrize("hints, bos", [
    (None, True),
    ({}, True),
    ({"add_bos_token": None}, True),
    ({"add_bos_token": True}, True),
    ({"add_bos_token": False}, False),
    ({"tokenizer_class": None}, True),
    ({"tokenizer_class": "LlamaTokenizerFast"}, True),
    ({"tokenizer_class": "LlamaTokenizer", "legacy": False}, True),
    ({"bos_token": {"content": "<s>", "__type": "AddedToken"}}, True),
])
def test_a_sentencepiece_llama_begins_with_bos_unless_it_says_no(hints, bos, folder):
    path = folder / "tokenizer_config.json"
    path.unlink()
    if hints is not None:
        path.write_text(json.dumps(hints))
    prompt = open_tokenizer(folder).prompt("line")
    assert prompt[: prompt.count(1)] == [1] * bos


def test_a_tokenizer_of_vocab_json_and_merges_has_no_bos_that_it_did_not_ask_for(folder):
    to_byte_level(folder, "gpt-2", tokenizer_class="GPT2Tokenizer")
    raw = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(raw["vocab"]))
    merges = [" ".join(pair) for pair in raw["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert open_tokenizer(folder).prompt("line") == theirs("line").input_ids


def test_what_transformers_saves_is_read_as_what_it_was_made_of(folder, tokenizer):
    for file in folder.glob("tokenizer*"):
        file.unlink()
    tokenizer.hf.save_pretrained(folder)
    text = "  line [INST] ça </s>"
    assert open_tokenizer(folder).prompt(text) == tokenizer.prompt(text)


BOS_TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize("hints, post_processor, bos", [
    ({}, False, 0),
    ({"add_bos_token": False}, False, 0),
    ({"add_bos_token": True}, False, 1),
    ({}, True, 1),
    ({"add_bos_token": True}, True, 1),
    ({"add_bos_token": True, "chat_template": BOS_TEMPLATE}, True, 1),
    ({"chat_template": BOS_TEMPLATE}, False, 1),
    ({"add_bos_token": True, "tokenizer_class": "LlamaTokenizerFast"}, False, 1),
    ({"add_bos_token": True, "bos_token": None}, False, 0),
])
def test_a_byte_level_tokenizer_has_bos_where_it_is_asked_for_and_once(
    hints, post_processor, bos, folder
):
    to_byte_level(folder, **hints)
    path = str(folder / "tokenizer.json")
    raw = tokenizers.Tokenizer.from_file(path)
    first, line = raw.token_to_id("<s>"), raw.encode("line").ids
    if post_processor:
        raw.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", first)])
    raw.save(path)
    assert open_tokenizer(folder).prompt("line") == [first] * bos + line


def test_bos_and_eos_may_be_replaced_and_added_tokens_that_are_not_special_are_kept(folder):
    tokens = added(600, "<|im_start|>", "<|im_end|>") | added(602, "<n7>", special=False)
    change_json(
        folder / "tokenizer_config.json", added_tokens_decoder=tokens,
        bos_token="<|im_start|>", eos_token="<|im_end|>")
    change_json(folder / "generation_config.json", eos_token_id=[2, 77])
    ours = open_tokenizer(folder)
    assert ours.prompt("a")[0] == 600
    assert ours.end_token == 601
    assert ours.stop == {601, 2, 77}
    ids = ours.encode("is <n7>")
    assert ids[-1] == 602
    assert ours.decode([*ids, 601]) == "is <n7>"


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
        assert ours.encode("<n7>") == [340]
        assert ours.stop == {9} and ours.end_token == 9
        assert ours.decode(ours.encode("ça va <n7>")) == "ça va <n7>"


def test_a_tokenizer_may_put_no_space_in_front_and_control_symbols_are_one_id(folder, tokenizer):
    hints = {"add_prefix_space": False, "add_eos_token": True}
    change_json(folder / "tokenizer_config.json", **hints)
    ours = open_tokenizer(folder)
    assert ours.encode(" line") == tokenizer.encode("line") != ours.encode("line")
    assert ours.prompt("line")[-1] != 2  # an eos behind a prompt would end it
    ids = tokenizer.prompt("a [INST] b</s> <unk>")
    assert ids[0] == 1
    assert [i for i in ids[1:] if i < 5] == [3, 2, 0]


def test_a_token_beyond_the_embedding_is_refused_and_hurts_nothing_else(sp_model, tmp_path, cli):
    make(tmp_path, sp_model, vocab_size=600, hints={"pad_token": "<pad>"})
    ask = ["generate", "--ckpt", tmp_path, "--max-new-tokens", 3, "--prompt"]
    assert cli(*ask, "a")[0] == 0
    status, _, err = cli(*ask, "a<pad>")
    assert status == 2
    assert "'<pad>'" in err.splitlines()[-1]


LOST = {
    "the answer": "{{ messages[0].content }}",
    "the prompt": "{% for m in messages[1:] %}{{ m.content }}{% endfor %}",
    "all but parts": "{% for m in messages %}{{ m.content[:3] }}{% endfor %}",
    "texts in lists": "{% for m in messages %}{% for c in m.content %}{{ c.text }}"
                      "{% endfor %}{% endfor %}",
}


@pytest.mark.parametrize("what", LOST)
def test_a_template_that_loses_what_is_said_is_refused(what, folder, cli):  # noqa: F811
    change_json(folder / "tokenizer_config.json", chat_template=LOST[what])
    status, _, err = cli("generate", "--ckpt", folder, "--prompt", "What is it?")
    assert status == 2 and "template" in err.splitlines()[-1]


@pytest.mark.parametrize("name", ["GPT2Tokenizer", "LlamaTokenizerFast", "LlamaTokenizer"])
def test_tokenizer_json_is_read_as_it_is_whatever_class_is_named(name, folder):  # noqa: F811
    """transformers 5 makes some classes' tokenizers anew (huggingface/transformers 45920)."""
    for file in folder.glob("tokenizer*"):
        file.unlink()
    byte_level(folder, "smollm")
    change_json(folder / "tokenizer_config.json", tokenizer_class=name)
    plainly = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    ours = open_tokenizer(folder)
    for text in ("line 24169 is  42", "  It's OK", "def f(x):\n\n    return 7"):
        assert ours.encode(text) == plainly.encode(text, add_special_tokens=False).ids


def test_an_end_that_is_no_token_is_passed_over(folder):  # noqa: F811
    change_json(folder / "config.json", eos_token_id=[-1, 9999])
    assert open_tokenizer(folder).stop == {2}
