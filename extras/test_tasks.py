"""Tests of extras/tasks.py: task files, their records, and the judges of what is said."""

import json
import random
import re

import pytest

import seal
from extras.tasks import Task, read_lines, read_records
from seal import UserError
from test_seal import task_file

FACT = {"prompt": "Where?", "answer": "In Rome."}


def test_a_task_file_has_five_keys_more_and_bom_and_empty_lines_do_no_harm(tmp_path):
    rows = [
        FACT,
        FACT | {"expected": "Rome", "prefix": "The answer is"},
        FACT | {"expected": -3.5},
        FACT | {"expected": ["Rome", "Italy"]},
        FACT | {"any": ["Rome", "Roma"], "prompt": "a\u2028b"},
        FACT | {"expected": 7, "judge": "longeval"},
    ]
    path = task_file(tmp_path, *rows)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n\n"))
    assert read_lines(path) == [Task(**row) for row in rows]


WRONG_LINES = """
answer    {"prompt": "x"}
prompt    {"answer": "y"}
question  {"prompt": "x", "answer": "y", "question": "z"}
context   {"prompt": "x", "answer": "y", "context": "a book"}
prompt    {"context": "a book", "input": "x", "answers": ["y"]}
prompt    {"input": "x", "outputs": ["y"], "answer_prefix": " z"}
prompt    {"instruction": "x", "input": "", "output": "y"}
prompt    {"messages": [{"role": "user", "content": "x"}]}
answer    {"prompt": "x", "completion": "y"}
prompt    {"prompt": null, "answer": "y"}
prompt    {"prompt": ["x"], "answer": "y"}
prompt    {"prompt": " \\n", "answer": "y"}
answer    {"prompt": "x", "answer": ""}
answer    {"prompt": "x", "answer": 3}
answer    {"prompt": "x", "answer": "y", "answer": "z"}
prefix    {"prompt": "x", "answer": "y", "prefix": 3}
prefix    {"prompt": "x", "answer": "y", "prefix": null}
judge     {"prompt": "x", "answer": "y", "expected": 3, "judge": "rouge"}
expected  {"prompt": "x", "answer": "y", "judge": "longeval"}
expected  {"prompt": "x", "answer": "y", "expected": "7", "judge": "longeval"}
expected  {"prompt": "x", "answer": "y", "expected": ""}
expected  {"prompt": "x", "answer": "y", "expected": []}
expected  {"prompt": "x", "answer": "y", "expected": true}
expected  {"prompt": "x", "answer": "y", "expected": null}
expected  {"prompt": "x", "answer": "y", "expected": {"text": "y"}}
expected  {"prompt": "x", "answer": "y", "expected": ["y", ""]}
expected  {"prompt": "x", "answer": "y", "expected": ["y", 3]}
expected  {"prompt": "x", "answer": "y", "expected": NaN}
expected  {"prompt": "x", "answer": "y", "expected": 1e999}
expected  {"prompt": "x", "answer": "y", "any": ["y"], "expected": "y"}
any       {"prompt": "x", "answer": "y", "any": []}
any       {"prompt": "x", "answer": "y", "any": "y"}
any       {"prompt": "x", "answer": "y", "any": [3]}
"""


@pytest.mark.parametrize("line", WRONG_LINES.strip().splitlines())
def test_a_wrong_line_of_a_task_file_is_named_with_its_key(line, tmp_path):
    key, wrong = line.split(maxsplit=1)
    path = task_file(tmp_path, FACT, wrong, FACT)
    with pytest.raises(UserError, match=rf"t\.jsonl, line 2\b.*\b{key}\b"):
        read_lines(path)


DOCUMENTS = ["The otter sleeps by day. " * 16, "The kid climbs the hill. " * 18]


def two_documents(folder):
    """A file of three questions about each, which do not stand beside each other."""
    rows = []
    for i in range(3):
        for text in DOCUMENTS:
            rows.append({"prompt": f"{text}\nWhat is {i}?", "answer": f"It is {i}."})
    return task_file(folder, *rows)


def test_lines_that_begin_alike_are_a_record_of_up_to_as_many_questions(tmp_path):
    path = two_documents(tmp_path)
    tasks = read_lines(path)
    for questions, sizes in (2, [1, 1, 2, 2]), (3, [3, 3]), (9, [3, 3]):
        records = read_records(path, 0, "", questions)
        assert sorted(map(len, records)) == sizes
        assert sorted(sum(records, []), key=tasks.index) == tasks
        for record in records:
            (text,) = {task.prompt.split("\n")[0] for task in record}
            assert record == sorted(record, key=tasks.index)
    known = tasks[1].fingerprint() + "," + tasks[4].fingerprint()
    left = read_records(path, 0, known, 9)
    assert left == [[t for t in record if t not in (tasks[1], tasks[4])] for record in records]


@pytest.mark.parametrize("a, b, alike", [
    ("aaab", "aaac", True),
    ("aabb", "aacc", False),
    ("aaa", "aaab", True),
    ("aaa", "aaabb", False),  # the longer one counts
    ("abbb", "cbbb", False),
])
def test_three_quarters_of_the_longer_prompt_must_begin_both(a, b, alike, tmp_path):
    path = task_file(tmp_path, FACT | {"prompt": a}, FACT | {"prompt": b})
    records = read_records(path, 0, "", 2)
    assert (len(records) == 1) == alike


def test_with_one_question_each_line_is_a_record_and_the_seed_alone_shuffles_them(tmp_path):
    path = two_documents(tmp_path)
    tasks = read_lines(path)
    for seed in 0, 1:
        expected = list(tasks)
        random.Random(seed).shuffle(expected)
        assert read_records(path, seed, "", 1) == [[task] for task in expected]
        rest = [[task] for task in expected if task != tasks[2]]
        assert read_records(path, seed, tasks[2].fingerprint(), 1) == rest


def test_a_document_is_read_once_for_all_of_its_questions(tmp_path, monkeypatch):
    """By training, and by evaluation; without --questions it is read for each of them."""
    path, scales, read, forward = two_documents(tmp_path), tmp_path / "s", [], seal.Llama.forward

    def watched(model, tokens, *more, **named):
        if tokens.shape[1] > 100:  # tokens: a document, not a question or a part of an answer
            read.append(tokens.shape[1])
        return forward(model, tokens, *more, **named)

    monkeypatch.setattr(seal.Llama, "forward", watched)
    for questions, times in (1, 6), (3, 2):
        read.clear()
        flags = f"--task {path} --samples 9 --length 400 --questions {questions}"
        seal.main(["train", *flags.split(), "--out", str(scales)])
        assert len(read) == times
        _, facts = seal.read_scales(scales, seal.read_config(seal.TOY))
        assert (facts.samples, facts.questions) == (times, questions)
    read.clear()
    flags = f"--task {path} --lengths 400 --questions 3 --max-new-tokens 2"
    seal.main(["eval", *flags.split()])
    assert len(read) == 2


@pytest.mark.parametrize("line, words", [
    ("train --questions 0", "questions 0 is less than the minimum of 1"),
    ("eval --questions -1", "questions -1 is less"),
    ("train --questions 2.5", "--questions: "),
    ("train --task needle --haystack a.txt --questions 3", "questions 3 is greater"),
    ("eval --task needle --questions 3", "questions 3 is greater than the maximum of 1"),
    ("eval --depths 0,50 --questions 2", "questions 2 is greater than the maximum of 1"),
])
def test_so_many_questions_as_nobody_can_ask_are_refused_in_one_line(line, words, capsys):
    """A needle is one fact; with --depths the others of a record stand elsewhere."""
    assert seal.exit_status("seal.py", seal.main, line.split()) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("seal.py: error: ") and words in error


NUMBERS = """
7        is in   It was 9, now 7. | <007> | 7.0 | 7% | x=7 | no. 7
7        not in  7, not 9 | seven | 77 | v7 | -7
30       not in  3 0
-5       is in   It is -5. | -5.00 | −5
-5       not in  5 | range 3-5 | -50
5        is in   range 3-5 | 5 -> 5
5        not in  -5 | 3.5 | 5.5
3.5      is in   about 3.5. | 3.50 | $3.5
3.5      not in  3 | 5 | 35
10.0     is in   10 | 10.0
10.0     not in  1.0 | 100
24169    is in   24169 | 24,169 | 24,169.00 | (24,169)
24169    not in  169 | 24 | 24,1690
"24,169" is in   24169 | It is 24,169.
"24,169" not in  169
1234567  is in   1,234,567
1234567  not in  234,567
"012"    is in   a 012
1e-05    is in   0.00001
3        is in   1,2,3 | 1, 2, 3
3        not in  3,2,1
8        is in   答案是8。 | คำตอบคือ8 | 8です
"""


@pytest.mark.parametrize("line", NUMBERS.strip().splitlines())
def test_a_number_is_the_last_of_the_text_as_a_person_reads_it(line):
    expected, score, texts = re.fullmatch("(\\S+) +(is|not) in +(.+)", line).groups()
    for text in texts.split(" | "):
        assert Task("", "", json.loads(expected)).score(text) == (score == "is"), text


@pytest.mark.parametrize("expected, text, score", [
    (169, "It is <24,169>.", 1),
    (24169, "It is <24,169>.", 0),
    (7, "line 9: <007>", 1),
    (7.0, "It is 7.", 1),
    (7, "seven", 0),
])
def test_longevals_own_rule_is_the_last_run_of_digits(expected, text, score):
    assert Task("", "", expected, judge="longeval").score(text) == score


@pytest.mark.parametrize("keys, text, score", [
    ({"expected": "Paris"}, "I think it is PARIS.", 1),
    ({"expected": "Paris"}, "Par is", 0),
    ({"expected": "Café Ünal"}, "the CAFE\u0301 U\u0308NAL", 1),
    ({"expected": "STRASSE"}, "die Straße", 1),
    ({"expected": ["one", "Two", "3"]}, "two, then 3", 2 / 3),
    ({"any": ["Nile", "the River Nile", "Al-Nil"]}, "It is the NILE.", 1),
    ({"any": ["Nile", "the River Nile", "Al-Nil"]}, "the Congo", 0),
    ({"answer": "the blue door"}, "The door: blue!", 1),
    ({"answer": "a a b"}, "a", 1 / 3),
    ({"answer": "a b"}, "", 0),
    ({"answer": "déjà vu"}, "De\u0301ja\u0300 lu", 1 / 2),
    ({"answer": "他在北京"}, "北京在哪", 3 / 4),
    ({"answer": "東京タワー"}, "東京駅とタワー", 1),
    ({"answer": "กรุงเทพ"}, "อยู่ที่กรุงเทพ", 1),
    ({"answer": "GPT是模型"}, "gpt 模型", 3 / 4),
    ({"answer": "서울 타워"}, "서울의 타워", 1 / 2),  # Korean has spaces
])
def test_texts_are_compared_without_case_in_nfc_and_by_the_share_that_was_said(keys, text, score):
    sample = Task("", **{"answer": ""} | keys)
    assert sample.score(text) == pytest.approx(score)
