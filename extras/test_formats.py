"""Tests of extras/formats.py and extras/benchmarks.py: other people's files as ours."""

import json

import pytest

import seal
from extras import formats, tasks


def converted(folder, content, *flags, name="rows.jsonl") -> list[dict]:
    """The lines that are made of a file's content: rows, or a text."""
    if isinstance(content, list):
        content = "".join(f"{json.dumps(row)}\n" for row in content)
    (folder / name).write_text(content, encoding="utf-8")
    out = folder / "out.jsonl"
    formats.main([str(folder / name), "--out", str(out), *flags])
    assert len(tasks.read_lines(out)) == out.read_text().count("\n")
    return [json.loads(line) for line in out.read_text().splitlines()]


def refused(folder, content, *flags, name="rows.jsonl") -> str:
    """The line with which a file is refused; nothing is written."""
    with pytest.raises(seal.UserError) as error:
        converted(folder, content, *flags, name=name)
    assert not (folder / "out.jsonl").exists()
    assert "\n" not in str(error.value)
    return str(error.value)


RECORD = "line ad hoc-cat: REGISTER_CONTENT is <7>\nWhat is in line ad hoc-cat? "
LINES = {
    "random_idx": ["ad hoc-cat", 0],
    "expected_number": 7,
    "num_lines": 1,
    "correct_line": "line ad hoc-cat: REGISTER_CONTENT is <7>\n",
    "prompt": RECORD,
}
LINES_SAMPLE = {
    "prompt": RECORD,
    "answer": "The <REGISTER_CONTENT> in line ad hoc-cat is 7.",
    "expected": 7,
    "judge": "longeval",
}
FIRST = "USER: Let us talk. ASSISTANT: Yes. Now what is the first topic we discussed?"
TOPICS = {"test_id": 0, "prompt": FIRST, "topics": ["Art", "The sea"], "prompt_length": -1}
TOPICS_SAMPLE = {"prompt": FIRST, "answer": "Art", "expected": "Art"}
ASKED = "Answer the question based on the given documents. ...\n\nQuestion: Where?"
SQUAD = {
    "index": 0,
    "input": ASKED,
    "outputs": ["Rome", "in Rome"],
    "length_w_model_temp": 60,
    "answer_prefix": " Answer:",
}
SQUAD_SAMPLE = {
    "prompt": ASKED,
    "answer": "Rome",
    "any": ["Rome", "in Rome"],
    "prefix": " Answer:",
}
VT = "Memorize and track the chain(s) ... in the text above."
VT_PREFIX = " Answer: According to the chain(s), they are: "
OLD_VT = {"input": VT + VT_PREFIX, "outputs": ["ABCDE", "FGHIJ"]}
OLD_VT_SAMPLE = {
    "prompt": VT,
    "answer": "ABCDE FGHIJ",
    "expected": ["ABCDE", "FGHIJ"],
    "prefix": VT_PREFIX,
}
BOOK = {"context": "A book.", "input": "Who?", "length": 5}
BOOK_PROMPT = "A book.\n\nWho?"
QASPER = BOOK | {"answers": ["Ann", "Anna"], "dataset": "qasper", "all_classes": None}
QASPER_SAMPLE = {"prompt": BOOK_PROMPT, "answer": "Ann", "any": ["Ann", "Anna"]}
SAMSUM = QASPER | {"dataset": "samsum_e"}
CHOICE = {"id": 1, **BOOK, "answer": ["Bo"], "options": ["Ann", "Bo"]}
CHOICE_SAMPLE = {
    "prompt": f"{BOOK_PROMPT}\n\nA. Ann\nB. Bo",
    "answer": "B. Bo",
    "expected": "Bo",
}
CODE_RUN = BOOK | {"answer": -4, "options": []}
CODE_RUN_SAMPLE = {"prompt": BOOK_PROMPT, "answer": "-4", "expected": -4}
CHAT = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}]
SHARED = [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Yes."}]
SAID = {"prompt": "Hi?", "answer": "Yes."}
ADD = {"instruction": "Add.", "output": "3"}


@pytest.mark.parametrize("name, row, sample", [
    ("LongEval lines", LINES, LINES_SAMPLE),
    ("LongEval topics", TOPICS, TOPICS_SAMPLE),
    ("RULER", SQUAD, SQUAD_SAMPLE),
    ("RULER", OLD_VT, OLD_VT_SAMPLE),
    ("LongBench", QASPER, QASPER_SAMPLE),
    ("LongBench", SAMSUM, {"prompt": BOOK_PROMPT, "answer": "Ann"}),
    ("InfiniteBench", CHOICE, CHOICE_SAMPLE),
    ("InfiniteBench", CODE_RUN, CODE_RUN_SAMPLE),
    ("chat messages", {"messages": CHAT}, SAID),
    ("chat conversations", {"id": "x", "conversations": SHARED}, SAID),
    ("completions", {"prompt": "Hi?", "completion": "Yes."}, SAID),
    ("completions", {"prompt": CHAT[:1], "completion": CHAT[1:]}, SAID),
    ("Alpaca", ADD | {"input": "1, 2"}, {"prompt": "Add.\n\n1, 2", "answer": "3"}),
    ("Alpaca", ADD | {"input": None}, {"prompt": "Add.", "answer": "3"}),
])
def test_a_format_is_told_by_its_keys(tmp_path, capsys, name, row, sample):
    assert converted(tmp_path, [row, row]) == [sample, sample]
    said = capsys.readouterr()
    assert said.out.endswith(f": {name}; {tmp_path}/out.jsonl: 2 samples\n")
    assert said.err == ""


@pytest.mark.parametrize("head, tail", [
    ("[INST] ", " [/INST]"),
    ("A chat between a user and an assistant. USER: ", " ASSISTANT:"),
    ("<|user|>\n", "<|end|>\n<|assistant|>\n"),
    ("<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n",
     "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"),
    ("User: hi\n\nAssistant: Hi. Please ask.\n\nUser: ", "\n\nAssistant:"),
    ("<BOS_TOKEN><|START_OF_TURN_TOKEN|><|USER_TOKEN|>",
     "<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"),
    ("<SPECIAL_10>System\n\n<SPECIAL_11>User\n", "\n<SPECIAL_11>Assistant\n"),
])
def test_rulers_chat_templates_are_taken_off(tmp_path, capsys, head, tail):
    """With the answer's beginning at the input's end, or in a key of its own."""
    row = {"outputs": ["ABCDE"], "input": f"{head}{VT}{tail}{VT_PREFIX}"}
    newer = row | {"input": f"{head}{VT}{tail}", "answer_prefix": VT_PREFIX}
    for sample in converted(tmp_path, [row, newer]):
        assert (sample["prompt"], sample["prefix"]) == (VT, VT_PREFIX)
    assert "2 rows: a chat template" in capsys.readouterr().err
    (tmp_path / "out.jsonl").unlink()
    newer["input"] = f"{head}{VT}"
    assert "line 1: 'input' begins with" in refused(tmp_path, [newer])


def test_the_harness_examples_are_put_in_front(tmp_path, capsys):
    """lm-evaluation-harness keeps the solved example of common words in a key of its own."""
    asked = "Below is a numbered list of words. ... 1. a 2. b"
    row = {"input": asked, "input_example": "Below is a numbered list of words. solved"}
    row |= {"outputs": ["b", "a"], "gen_prefix": "Answer: they are:", "max_length": 99}
    (sample,) = converted(tmp_path, [row])
    assert sample["prompt"] == f"{row['input_example']}\n{asked}"
    assert (sample["answer"], sample["prefix"]) == ("1. b 2. a", "Answer: they are:")
    assert "input_example" in capsys.readouterr().err


def test_the_wording_of_a_benchmark_is_the_users(tmp_path, capsys):
    plain, by_dataset = tmp_path / "wording.txt", tmp_path / "dataset2prompt.json"
    plain.write_text("Read {context} and {not a field}.\nQ: {input}\n")
    by_dataset.write_text('{"qasper": "{context}? A:", "lcc": "{context}"}')
    tricky = QASPER | {"context": "A {input}."}
    (sample,) = converted(tmp_path, [tricky], "--wording", str(plain))
    assert sample["prompt"] == "Read A {input}. and {not a field}.\nQ: Who?"
    (sample,) = converted(tmp_path, [QASPER], "--wording", str(by_dataset))
    assert sample["prompt"] == "A book.? A:"
    assert "1 rows: 'input' has no place in --wording" in capsys.readouterr().err
    (tmp_path / "out.jsonl").unlink()
    flags = "--wording", str(by_dataset)
    assert "none for 'trec'" in refused(tmp_path, [QASPER | {"dataset": "trec"}], *flags)
    assert "what is asked" in refused(tmp_path, [QASPER | {"input": ""}])
    assert "has its own" in refused(tmp_path, [ADD], "--judge", "any")


def test_several_answers_are_judged_as_the_task_or_the_user_says(tmp_path):
    row = BOOK | {"answer": ["Ann", "Bo"]}
    (sample,) = converted(tmp_path, [row], name="longbook_qa_eng.jsonl")
    assert sample["any"] == ["Ann", "Bo"]
    (sample,) = converted(tmp_path, [row], name="longbook_sum_eng.jsonl")
    assert not {"any", "expected"} & set(sample)
    (sample,) = converted(tmp_path, [row], "--judge", "all")
    assert (sample["answer"], sample["expected"]) == ("Ann, Bo", ["Ann", "Bo"])
    (tmp_path / "out.jsonl").unlink()
    assert "line 1: 'rows' is not known: --judge" in refused(tmp_path, [row])


def test_turns_and_system_messages_are_told(tmp_path, capsys):
    system = [{"role": "system", "content": "Be brief."}]
    (sample,) = converted(tmp_path, [{"messages": system + CHAT}])
    assert sample == {"prompt": "Be brief.\n\nHi?", "answer": "Yes."}
    assert "system" in capsys.readouterr().err
    rows = [{"messages": CHAT}, {"messages": system + CHAT + CHAT}]
    assert converted(tmp_path, rows, "--turns", "skip") == [SAID]
    assert "1 rows: left out for their several turns" in capsys.readouterr().err
    sample = converted(tmp_path, rows, "--turns", "transcript")[1]
    assert sample["prompt"] == "Be brief.\n\nUSER: Hi?\n\nASSISTANT: Yes.\n\nUSER: Hi?"
    (tmp_path / "out.jsonl").unlink()
    assert "line 2: has 3 messages before the answer" in refused(tmp_path, rows)


@pytest.mark.parametrize("content", [
    json.dumps([ADD, ADD]),
    json.dumps({"version": 1, "data": [ADD, ADD]}, indent=2),
    "\ufeff" + f"{json.dumps(ADD)}\n\n" * 2,
])
def test_rows_come_as_lines_as_an_array_or_in_an_object(tmp_path, content):
    assert converted(tmp_path, content) == [{"prompt": "Add.", "answer": "3"}] * 2


@pytest.mark.parametrize("row, message", [
    ({"a": 1, "b": 2}, "line 1: has the keys of no format that is known: a, b"),
    (SAID | {"id": 3}, "line 1: has seal.py's own keys already (prompt, answer, id)"),
    ({"messages": CHAT, "conversations": SHARED}, "the keys of chat messages and chat conv"),
    ("text", "rows.jsonl: is \"text\", must hold objects"),
    (ADD | {"output": None}, "line 1: 'output' is null, must be a text"),
    (ADD | {"output": " "}, "line 1: 'output' is empty"),
    (ADD | {"output": "\ud800"}, "line 1: "),
    (ADD | {"history": [["a", "b"]]}, "holds 'history', which is not read in Alpaca"),
    (LINES | {"expected_number": "7"}, "line 1: 'expected_number' is '7', must be"),
    (LINES | {"expected_number": 8}, "line 1: no line 'ad hoc-cat' of the prompt has 8"),
    (LINES | {"random_idx": 3}, "line 1: 'random_idx' is 3, must be"),
    (TOPICS | {"topics": []}, "line 1: 'topics' is [], must be a list of texts"),
    ({"input": "Count the words.", "outputs": ["a"]}, "as no task of RULER's does"),
    ({"input": VT, "outputs": ["a", 5]}, "line 1: 'outputs' is 5, must be a text"),
    (CHOICE | {"answer": ["Cy"]}, "line 1: 'answer' [\"Cy\"] is none of 'options'"),
    (BOOK | {"answer": [1, 5, 9]}, "line 1: 'answer' is 1, must be a text"),
    (QASPER | {"question": "Or?"}, "holds 'question', which is not read in LongBench"),
    (CODE_RUN | {"answer": float("nan")}, "line 1: Out of range float"),
    ({"messages": CHAT[:1]}, "must end with a user's question and the assistant's"),
    ({"messages": "Hi"}, "line 1: the messages are \"Hi\", must be a list"),
    ({"messages": [{"role": "tool", "content": "5"}]}, "line 1: a message of 'tool'"),
    ({"messages": [CHAT[0] | {"tool_calls": [{}]}]}, "a message has 'tool_calls'"),
    ({"messages": [CHAT[0] | {"content": None}]}, "line 1: 'content' is null"),
])
def test_what_cannot_be_read_is_named_in_one_line(tmp_path, row, message):
    assert message in refused(tmp_path, [row])


def test_files_that_hold_no_rows_are_refused(tmp_path):
    assert "holds no row" in refused(tmp_path, "[]")
    assert "rows.jsonl, line 3: " in refused(tmp_path, f"{json.dumps(ADD)}\n\n{{\n")
    pretty = json.dumps([ADD, ADD], indent=1)
    assert "line 6 column" in refused(tmp_path, pretty.replace("},", "}"))
    twice = '{"instruction": "Add.", "instruction": "Sub.", "output": "3"}'
    assert "has a key twice: instruction" in refused(tmp_path, twice)
    mixed = [ADD, {"messages": CHAT}]
    message = "line 2: is of chat messages, the rows before it of Alpaca"
    assert message in refused(tmp_path, mixed)
    array = json.dumps([ADD, ADD | {"output": 1}])
    assert "entry 2: 'output' is 1" in refused(tmp_path, array)
    with pytest.raises(seal.UserError, match="is the file that is read"):
        same = f"{tmp_path}/../{tmp_path.name}/rows.jsonl"
        formats.main([str(tmp_path / "rows.jsonl"), "--out", same])
    with pytest.raises(seal.UserError, match="none.jsonl"):
        formats.main([str(tmp_path / "none.jsonl"), "--out", f"{tmp_path}/out.jsonl"])


def test_other_keys_with_text_are_named(tmp_path, capsys):
    row = ADD | {"text": "Below is an instruction", "category": "", "score": 3}
    converted(tmp_path, [row, row])
    assert capsys.readouterr().err == "2 rows: 'text' was left out\n"


def test_a_chat_template_in_a_prompt_is_told(tmp_path, capsys):
    rows = [{"prompt": "Who is the assistant", "completion": "Ann"}]
    converted(tmp_path, rows)
    assert capsys.readouterr().err == ""
    rows[0]["prompt"] = "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
    converted(tmp_path, rows)
    assert "1 rows: the prompt has a chat template already" in capsys.readouterr().err
