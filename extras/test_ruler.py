"""Tests of extras/ruler.py: RULER's prompts to the letter, one right answer each."""

import json
import random
import re
from collections import Counter

import pytest

import seal
from extras import ruler, tasks


@pytest.fixture(scope="module")
def tokenizer():
    return seal.Tokenizer(seal.TOY, seal.read_config(seal.TOY))


@pytest.mark.parametrize("length, often, seldom", [(3000, 6, 1), (9000, 30, 3)])
def test_common_words_are_as_common_as_in_ruler(tokenizer, length, often, seldom):
    line = next(ruler.make_prompts("cwe", tokenizer, length, 1))
    solved, asked = line["prompt"].split("Below is a numbered list of words.")[1:]
    shown = re.findall(r"\d+\. (\w+)", solved)[-10:]
    assert solved.endswith(f"in the list are:{ruler.numbered(shown)}\n")
    words = re.findall(r"\d+\. (\w+)", asked)
    count = Counter(words)
    common = sorted(word for word in count if count[word] == often)
    assert sorted(line["expected"]) == common and len(common) == 10
    assert set(count.values()) == {often, seldom}
    assert line["answer"] == ruler.numbered(line["expected"])
    question = "Question: What are the 10 most common words in the above list?"
    assert asked.endswith(f" {len(words)}. {words[-1]}\n{question}")


def test_variables_are_found_by_following_the_chain(tokenizer):
    for line in ruler.make_prompts("vt", tokenizer, 3000, 3):
        solved, asked = line["prompt"].split("Memorize and track")[1:]
        for text, letters in (solved, 3), (asked, 5):
            value = re.search(r"assigned the value (\d{5}) in the text above\.", text)[1]
            held = {value}
            for name, old in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", text):
                assert len(name) == letters and old in held  # steps stand in order
                held.add(name)
            assert len(held) == 6
        assert set(line["expected"]) == held - {value}
        assert line["prefix"].endswith(f"are assgined the value {value}, they are: ")


def test_statements_stand_in_the_running_text_as_in_rulers_code_of_2024(tokenizer):
    """Read off what lm-evaluation-harness 0.4.13 makes with RULER's code."""
    text = ruler.chain_text(["ABC", "DEF", "GHI"], 12345, size=3, places=[0, 1, 1])
    noise = "The grass is green. The sky is blue. The sun is yellow. "
    noise += "Here we go. There and back again.\n"
    assert text == (
        f"VAR ABC = 12345 {noise} VAR DEF = VAR ABC  VAR GHI = VAR DEF  {noise} {noise}"
    )
    prompt = next(ruler.make_prompts("vt", tokenizer, 3000, 1))["prompt"]
    solved, asked = prompt.split("\n\n\n\n")
    assert re.search(r"they are:  [A-Z]{3}( [A-Z]{3}){4}$", solved)
    assert solved.count("There and back again.\n") == 10
    for part in solved, asked:
        assert part.startswith("Memorize and track the chain(s) of variable assignment")
        assert "again.\n\nQuestion: Find all variables" in part


@pytest.mark.parametrize("task", ruler.NIAH_TASKS)
def test_needles_hold_the_values_asked_for(tokenizer, tmp_path, task):
    text = tmp_path / "text.txt"
    text.write_text("One fish swam by. Was it red? It was not!\nThe sea is deep. " * 9)
    haystack, keys, values, asked = ruler.NIAH_TASKS[task]
    needle = r"One of the special magic numbers for ([\w-]+) is: (\d{7})\."
    for line in ruler.make_prompts(task, tokenizer, 2000, 3, 5, text):
        held = {}
        for key, value in re.findall(needle, line["prompt"]):
            held.setdefault(key, set()).add(value)
        names = re.findall(r"[a-z]+-[a-z]+", line["prefix"])
        assert len(names) == asked and len(line["expected"]) == asked * values
        assert set(line["expected"]) == set().union(*(held[name] for name in names))
        assert haystack == "needles" or len(held) == keys
        one = "is the special magic number for" in line["prompt"].split("\n")[-1]
        assert one == (len(line["expected"]) == 1)


def test_no_filler_has_the_key_that_is_asked_for(monkeypatch):
    monkeypatch.setattr(seal, "KEYS", ["red-fish", "blue-sea", "old-boat"])
    for seed in range(5):
        case = ruler.needles(random.Random(seed), 40, "niah_multikey_2", [])
        key = re.search(r"number for (\S+) mentioned", case["prefix"])[1]
        (value,) = case["expected"]
        needle = f"One of the special magic numbers for {key} is: "
        assert case["prompt"].count(needle) == 1
        assert f"{needle}{value}." in case["prompt"]
        assert case["prompt"].count("One of the special magic") == 41


def test_needles_in_a_text_stand_at_rulers_shares_of_its_sentences():
    class Depths:
        def sample(self, depths, count):
            assert len(depths) == 40 and depths[:3] == [0, 3, 5] and depths[-1] == 100
            return [100, 0, 51]

    text = ruler.between_sentences(Depths(), "A b. C d! E f? G", ["x.", "y.", "z."])
    assert text == " x. A b. C d! y. E f? G z. "


@pytest.mark.parametrize("task", ["cwe", "vt", "niah_single_1"])
def test_prompts_fill_the_length_and_seeds_share_none(tokenizer, task):
    lines = []
    for seed in 0, 1, 1:
        lines.append(list(ruler.make_prompts(task, tokenizer, 2500, 6, seed)))
    for line in lines[0]:
        ids = tokenizer.prompt(line["prompt"], line["prefix"])
        assert 2300 < len(ids) + ruler.ROOM[task] <= 2500
    assert len({line["prompt"] for line in lines[0] + lines[1]}) == 12
    assert lines[1] == lines[2]


def test_ruler_writes_what_seal_reads(tmp_path, capsys):
    out = tmp_path / "vt.jsonl"
    ruler.main(f"--task vt --length 2500 --samples 2 --out {out}".split())
    line = json.loads(out.read_text().splitlines()[0])
    assert set(line) == {"prompt", "answer", "expected", "prefix"}
    sample = tasks.read_lines(out)[0]
    assert (sample.prompt, sample.prefix) == (line["prompt"], line["prefix"])
    assert sample.answer.split() == line["expected"] == sample.expected
    assert sample.score(line["answer"]) == 1
    assert sample.score(line["expected"][0]) == 0.2
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    for flags in (
        "vt --length 300", "cwe --length 300", "niah_multivalue --length 900",
        f"niah_single_2 --haystack {empty}",
    ):
        with pytest.raises(seal.UserError):
            ruler.main(f"--task {flags} --out {tmp_path / 'no'}".split())
        assert not (tmp_path / "no").exists()
