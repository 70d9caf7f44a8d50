"""A task of your own: a JSONL file for seal.py, read strictly and judged as a person would.

    python seal.py train --task my.jsonl --length 4000 ...
    python seal.py eval  --task other.jsonl --lengths 4000 ...

A line is {"prompt": ..., "answer": ...}: what is asked, and what training learns. It may
say what decides whether a text answers it:

    "expected"  a number: the last number of the text is to be the same, as a person reads
                numbers (-5, 24,169, 3.50); a text: it stands in the text; a list of texts:
                the share that does, as RULER counts. Without it: the share of the answer's
                words that the text has (ROUGE-1 recall).
    "any"       a list of texts in the place of "expected": one is enough
    "prefix"    the beginning of the answer: given behind the prompt and not learned
    "judge"     "longeval": the last run of digits decides, as LongEval counts

Texts are compared in Unicode's NFC and without case. Other keys, wrong types and empty
texts are refused with the line's number (assets/task.schema.json); extras.formats makes
such files of other people's. Opened by seal.py for --task FILE.jsonl.

With --questions K, up to K questions about a document are a record: the document is
read once for all of them, in a step of training and when they are asked. No key says so:
prompts are of one document if they begin alike, for three quarters of the longer one at
least. So the document must stand first, and then the question.
"""

import json
import math
import os
import random
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

import seal

# Scripts that put no spaces between words (Thai, Lao, Burmese, Khmer, Japanese, Chinese):
# there each character counts as a word.
SPACELESS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
WORD = re.compile(rf"[{SPACELESS}]|[^\W{SPACELESS}]+")
# A number as a person reads it: -5, 24,169 or 3.50; not the 5 of v5, and of 3-5 no -5.
NUMBER = re.compile(
    rf"(?<![^\W{SPACELESS}])(?<!\d\.)-?(?:\d{{1,3}}(?:,\d{{3}})+(?!\d)|\d+)(?:\.\d+)?"
)


def plain(text: str) -> str:
    """Text to compare: without case, and one spelling of letters and minus signs."""
    return unicodedata.normalize("NFC", text).casefold().replace("−", "-")


def as_number(value) -> Decimal | None:
    """The number that a value or a text is; None if it is something else."""
    if isinstance(value, int | float):
        return Decimal(repr(value))
    if NUMBER.fullmatch(value):
        return Decimal(value.replace(",", ""))
    return None


@dataclass
class Task(seal.Sample):
    """A line of a task file."""

    any: list[str] | None = None
    judge: str = ""

    def score(self, text: str) -> float:
        """How right a text is, 0 to 1: see the head of this file."""
        if self.judge == "longeval":
            return super().score(text)
        said = plain(text)
        if self.any:
            return max(float(plain(way) in said) for way in self.any)
        if isinstance(self.expected, list):
            found = [plain(part) in said for part in self.expected]
            return sum(found) / len(found)
        if self.expected is None:
            wanted = Counter(WORD.findall(plain(self.answer)))
            found = Counter(WORD.findall(said))
            return (wanted & found).total() / max(1, wanted.total())
        number, numbers = as_number(self.expected), NUMBER.findall(said)
        if number is None:
            return float(plain(self.expected) in said)
        return float(numbers != [] and as_number(numbers[-1]) == number)


def strict(pairs: list[tuple]) -> dict:
    """A JSON object; ValueError if it has a key twice, or a number that is none.

    Of a key that stands there twice Python takes the last, and it reads NaN and 1e999.
    """
    case = {}
    for key, value in pairs:
        if key in case:
            raise ValueError(f"has the key {key!r} twice")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{key!r} is {value}, which is no number")
        case[key] = value
    return case


def read_lines(path) -> list[Task]:
    """A task per line; UserError, with the line's number, for what is not one."""
    tasks = []
    with seal.blame(f"--task {path}"):
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        with seal.blame(f"{path}, line {number} (extras.formats converts other files)"):
            case = json.loads(line, object_pairs_hook=strict)
            if "any" in case and "expected" in case:
                raise ValueError("has 'any' and 'expected'; only one of them can decide")
            seal.check_json(case, "task.schema.json")
            tasks.append(Task(**case))
    return tasks


def begin_alike(a: str, b: str) -> bool:
    """Whether at least three quarters of the longer text begin the other one, too."""
    shared = len(os.path.commonprefix([a, b]))
    return 4 * shared >= 3 * max(len(a), len(b))


def read_records(path, seed: int, trained_on: str, questions: int) -> list[list[Task]]:
    """The file's lines by records: up to `questions` of them, whose prompts begin alike.

    The seed shuffles the records. Lines whose fingerprint stands in the text `trained_on`
    are left out, but only then: the records of the others do not change by it.
    """
    tasks, records, record = read_lines(path), [], []
    if questions > 1:
        tasks.sort(key=lambda task: task.prompt)  # puts those side by side
    for task in tasks:
        full = len(record) == questions
        if not record or full or not begin_alike(record[0].prompt, task.prompt):
            record = []
            records.append(record)
        record.append(task)
    random.Random(seed).shuffle(records)
    left = []
    for record in records:
        left.append([task for task in record if task.fingerprint() not in trained_on])
    return [record for record in left if record]


def read_sentences(path) -> list[str]:
    """The sentences of a haystack, each with the space behind it; UserError if it has none."""
    if not path:
        raise seal.UserError("--task needle: needs --haystack FILE.txt, to hide needles in")
    with seal.blame(f"--haystack {path}"):
        text = Path(path).read_text(encoding="utf-8-sig").rstrip() + "\n"
        # A sentence ends at . ! ? before a space, at the full-width ones, or else at the
        # first space behind a thousand characters.
        end = r"(?:[.!?](?=\s)|[。！？।]|$)"
        sentences = re.findall(rf"(?s)\S.{{,999}}?{end}\s*|\S.{{,999}}\S*\s*", text)
        if not sentences:
            raise ValueError("holds no sentence")
        return sentences
