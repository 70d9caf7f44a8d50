"""RULER's tasks as JSONL, to train on and to evaluate with seal.py.

    python -m extras.ruler --ckpt DIR --task cwe --length 2000 --seed 0 --out a.jsonl
    python -m extras.ruler --ckpt DIR --task cwe --length 2000 --seed 1 --out b.jsonl
    python seal.py train --ckpt DIR --task a.jsonl --length 2000
    python seal.py eval  --ckpt DIR --task b.jsonl --lengths 2000 --max-new-tokens 120

RULER (Hsieh et al. 2024, github.com/NVIDIA/RULER) asks for more than one fact at a time:

    cwe       the ten common words of a long numbered list; one solved example in front
    vt        the five variables that a chain of assignments gives a number; one example
    niah_...  "magic numbers" in a text: of one of four keys, four of a key, of four keys

The paper has common words: Llama-3.1-8B at 32K tokens, 2.6% before, 95.8% (SEAL-H) and
99.7% (SEAL-C) after. The wording is that of RULER's code of 2024 to the letter, also its
"assgined", as lm-evaluation-harness has it still. RULER's later code gives each statement
of vt a line of its own: figures made with it are no measure for these prompts. The judge
is RULER's: the share of the expected strings that an answer contains. Not RULER's are:
- `answer`, what training learns: in the form of the solved example.
- The words: single ones from Python's documentation (so another Python draws other
  prompts), and seal.py's adjective-noun pairs as keys. RULER's come from a package.
- No other needle has a key that is asked for; RULER's may, and two answers are right then.
- A prompt fills --length as far as it goes, chat template and room for the answer
  included; RULER grows in steps. vt's example has ten lines of noise, what RULER's limit
  of 500 tokens holds with Llama's tokenizers.
- Sentences of a --haystack end at . ! or ?; RULER asks a package where they end.
Not here: needles of other kinds than words and numbers, coded words, questions (qa).
"""

import json
import random
import re
import string
import sys
from bisect import bisect_right
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path

from tqdm import tqdm

import seal
from extras.gguf_model import folder_of

# ---- RULER's wording, and its numbers ----

CWE = (
    "Below is a numbered list of words. In these words, some appear more often than "
    "others. Memorize the ones that appear most often.\n{context}\n"
    "Question: What are the 10 most common words in the above list?"
)
CWE_PREFIX = " Answer: The top 10 words that appear most often in the list are:"
VT = (
    "Memorize and track the chain(s) of variable assignment hidden in the following "
    "text.\n\n{context}\nQuestion: Find all variables that are assigned the value "
    "{value} in the text above."
)
VT_PREFIX = (
    " Answer: According to the chain(s) of variable assignment in the text above, 5 "
    "variables are assgined the value {value}, they are: "
)
NIAH = (
    "{some} special magic {numbers} {are} hidden within the following text. Make sure "
    "to memorize it. I will quiz you about the {numbers} afterwards.\n{context}\n"
    "What {are_all} the special magic {numbers} for {keys} mentioned in the provided text?"
)
NIAH_PREFIX = (
    " The special magic {numbers} for {keys} mentioned in the provided text {are}"
)
MANY = {"some": "Some", "numbers": "numbers", "are": "are", "are_all": "are all"}
ONE = {"some": "A", "numbers": "number", "are": "is", "are_all": "is"}
NEEDLE = "One of the special magic numbers for {key} is: {value}."
NOISE = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. "
    "There and back again."
)
NIAH_TASKS = {  # haystack, keys, values of each key, keys asked for
    "niah_single_1": ("noise", 1, 1, 1),
    "niah_single_2": ("text", 1, 1, 1),
    "niah_multikey_1": ("text", 4, 1, 1),
    "niah_multikey_2": ("needles", 1, 1, 1),
    "niah_multivalue": ("text", 1, 4, 1),
    "niah_multiquery": ("text", 4, 1, 4),
}
DEPTHS = [round(step * 100 / 39) for step in range(40)]  # percent of a text's sentences
ROOM = {"cwe": 120, "vt": 30} | dict.fromkeys(NIAH_TASKS, 128)  # tokens for the answer

# ---- The tasks: each makes one line of the file from a random generator and a size ----


@lru_cache
def all_words() -> list[str]:
    """About 2,500 single words: of Python's documentation, and of seal.py's keys."""
    from pydoc_data.topics import topics
    text = " ".join(topics.values())
    found = re.findall(r"(?<![^\s(])[a-z]{4,}(?=[\s,.;:)])", text)  # no names, no code
    return sorted({*found, *seal.ADJECTIVES, *seal.NOUNS})


def numbered(words: list[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))


def answer_text(task: str, found: list[str]) -> str:
    """What training learns: found words or numbers as a solved example writes them."""
    if task == "cwe":
        return numbered(found)
    if task == "vt":
        return " ".join(found)
    return f"{', '.join(found)}."


def word_list(rng, size: int, often: int, seldom: int) -> tuple[str, list[str]]:
    """The list as text, and its ten common words: the first ten of `size` drawn."""
    words = rng.sample(all_words(), size)
    listed = words[:10] * often + words[10:] * seldom
    rng.shuffle(listed)
    return numbered(listed), words[:10]


def common_words(rng, size: int, short: bool) -> dict:
    """Prompts under 4,096 tokens repeat their words less often, as RULER's do."""
    if short:
        example, found = word_list(rng, 20, 3, 1)
        context, common = word_list(rng, size, 6, 1)
    else:
        example, found = word_list(rng, 40, 10, 3)
        context, common = word_list(rng, size, 30, 3)
    solved = f"{CWE.format(context=example)}{CWE_PREFIX}{numbered(found)}\n"
    return {
        "prompt": solved + CWE.format(context=context),
        "answer": answer_text("cwe", common),
        "expected": common,
        "prefix": CWE_PREFIX,
    }


def chain_text(names: list[str], value: int, size: int, places: list[int]) -> str:
    """A chain in `size` lines of noise, statement i in front of line places[i]."""
    statements = [f"VAR {names[0]} = {value}"]
    for old, new in pairwise(names):
        statements.append(f"VAR {new} = VAR {old} ")  # RULER's do end with a space
    pieces = [f"{NOISE}\n"] * size  # a statement does not end its line
    for before, (place, statement) in enumerate(zip(places, statements)):
        pieces.insert(place + before, statement)
    return " ".join(pieces)


def chain(rng, size: int, letters: int) -> tuple[str, str, list[str]]:
    """Question, the answer's beginning, and the five names to be found."""
    names = []
    while len(names) < 5:
        name = "".join(rng.choices(string.ascii_uppercase, k=letters))
        if name not in names:
            names.append(name)
    value = rng.randrange(10000, 99999)
    places = sorted(rng.sample(range(size), len(names)))
    context = chain_text(names, value, size, places)
    question = VT.format(context=context, value=value)
    return question, VT_PREFIX.format(value=value), names


def variables(rng, size: int) -> dict:
    """A chain of names of five letters, after a solved one of three."""
    question, prefix, names = chain(rng, 10, 3)
    solved = f"{question}{prefix} {' '.join(names)}\n\n\n\n"
    question, prefix, names = chain(rng, size, 5)
    return {
        "prompt": solved + question,
        "answer": answer_text("vt", names),
        "expected": names,
        "prefix": prefix,
    }


def new_key(rng, taken: dict) -> str:
    key = rng.choice(seal.KEYS)
    while key in taken:
        key = rng.choice(seal.KEYS)
    return key


def number(rng) -> str:
    return str(rng.randrange(10**6, 10**7))


def between_sentences(rng, text: str, hidden: list[str]) -> str:
    """The needles in their order. Where two of them meet, or one stands at the start,
    there is a space too many in RULER's texts, and so here."""
    sentences = re.split(r"(?<=[.!?])\s", text)
    depths = sorted(rng.sample(DEPTHS, len(hidden)))
    cuts = [0, *(int(len(sentences) * (depth / 100)) for depth in depths)]
    parts = []
    for needle, (start, end) in zip(hidden, pairwise(cuts)):
        parts += [" ".join(sentences[start:end]), needle]
    return " ".join([*parts, " ".join(sentences[cuts[-1] :])])


def between_lines(rng, lines: list[str], hidden: list[str]) -> str:
    places = sorted(rng.sample(range(len(lines)), len(hidden)), reverse=True)
    for place, needle in zip(places, hidden):
        lines.insert(place, needle)
    return "\n".join(lines)


def needles(rng, size: int, task: str, words: list[str]) -> dict:
    """Needles in `size` words or lines, and a question for some keys' values."""
    haystack, keys, values, asked = NIAH_TASKS[task]
    held, hidden, expected = {}, [], []
    for _ in range(keys):
        held[new_key(rng, taken=held)] = [number(rng) for _ in range(values)]
    for key, found in held.items():
        hidden += [NEEDLE.format(key=key, value=value) for value in found]
    rng.shuffle(hidden)
    if haystack == "text":
        text = " ".join(words[i % len(words)] for i in range(size))
        context = between_sentences(rng, text, hidden)
    else:
        lines = [NOISE] * size
        if haystack == "needles":
            for i in range(size):
                key = new_key(rng, taken=held)
                lines[i] = NEEDLE.format(key=key, value=number(rng))
        context = between_lines(rng, lines, hidden)

    chosen = rng.sample(list(held), asked)
    for key in chosen:
        expected += held[key]
    named = chosen[0] if asked == 1 else f"{', '.join(chosen[:-1])}, and {chosen[-1]}"
    wording = {"keys": named} | (ONE if len(expected) == 1 else MANY)
    return {
        "prompt": NIAH.format(context=context, **wording),
        "answer": answer_text(task, expected),
        "expected": expected,
        "prefix": NIAH_PREFIX.format(**wording),
    }


# ---- Filling a length, and the command ----


def maker(task: str, length: int, haystack=None):
    """The task's function of (rng, size), and the sizes that it can have."""
    if task == "cwe":
        sizes = range(11, len(all_words()) + 1)
        return partial(common_words, short=length < 4096), sizes
    if task == "vt":
        return variables, range(6, length + 7)
    words = []
    if NIAH_TASKS[task][0] == "text":
        if not haystack:
            raise seal.UserError(f"--task {task}: in which text? --haystack FILE.txt")
        with seal.blame(f"--haystack {haystack}"):
            words = Path(haystack).read_text(encoding="utf-8").split()
            if not words:
                raise ValueError("holds no text")
    return partial(needles, task=task, words=words), range(5, length + 6)


def make_prompts(task: str, tokenizer, length: int, count: int, seed=0, haystack=None):
    """Yield `count` lines of the file, each of up to `length` tokens, answer included."""
    make, sizes = maker(task, length, haystack)

    def build(index: int, size: int) -> tuple[int, dict]:
        case = make(random.Random(f"{task} {length} {seed} {index}"), size)
        return len(tokenizer.prompt(case["prompt"], case["prefix"])) + ROOM[task], case

    fitting = bisect_right(sizes, length, key=lambda size: build(0, size)[0])
    if fitting == 0:
        least = build(0, sizes[0])[0]
        raise seal.UserError(f"--length {length}: too short, {task} takes {least}")
    if fitting == len(sizes):
        raise seal.UserError(f"--length {length}: too long, {task} has no more words")
    for index in tqdm(range(count), task, unit="prompt"):
        size = sizes[fitting - 1]
        while build(index, size)[0] > length and size > sizes[0]:
            size -= 1
        yield build(index, size)[1]


def main(arguments=None) -> None:
    parser = seal.Parser("extras.ruler", description=__doc__.splitlines()[0])
    parser.add_argument("--task", required=True, choices=ROOM)
    parser.add_argument("--length", type=int, help="tokens of a prompt and its answer")
    parser.add_flags("ckpt template samples seed haystack out")
    args = parser.parse_args(arguments)
    folder = folder_of(args.ckpt)
    tokenizer = seal.Tokenizer(folder, seal.read_config(folder), args.template)
    length = args.length or seal.longest_prompt(tokenizer)
    out = args.out or f"{args.task}-{length}-seed{args.seed}.jsonl"
    flags = args.task, tokenizer, length, args.samples, args.seed, args.haystack
    with seal.whole_file(out) as path, open(path, "w", encoding="utf-8") as file:
        for line in make_prompts(*flags):
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    seal.note(f"RULER's answers have up to {ROOM[args.task]} tokens: --max-new-tokens")
    print(out)


if __name__ == "__main__":
    sys.exit(seal.exit_status("extras.ruler", main))
