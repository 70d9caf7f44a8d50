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
99.7% (SEAL-C) after. Wording, counts, the keys of a line and the judging (the share of
`outputs` that an answer contains) are RULER's; older copies of it spell "assgined". Ours:
- `answer`, what training learns: in the form of the solved example.
- The words. RULER's come from a package; here, single words from Python's documentation
  (so another Python draws other prompts), and seal.py's adjective-noun pairs as keys.
- A prompt fills --length as far as it goes, chat template and room for the answer
  included; RULER grows in steps of five or ten.
Not here: needles of other kinds than words and numbers, coded words, questions (qa).
"""

import json
import random
import re
import string
import sys
from bisect import bisect_right
from functools import lru_cache, partial
from pathlib import Path

from tqdm import tqdm

import seal

# --------------------------------------------------------------------------------------
# RULER's wording, to the letter, and its numbers
# --------------------------------------------------------------------------------------

CWE = (
    "Below is a numbered list of words. In these words, some appear more often than "
    "others. Memorize the ones that appear most often.\n{context}\n"
    "Question: What are the 10 most common words in the above list?"
)
CWE_PREFIX = " Answer: The top 10 words that appear most often in the list are:"
VT = (
    "Memorize and track the chain(s) of variable assignment hidden in the following "
    "text.\n\n{context}\n"
    "Question: Find all variables that are assigned the value {value} in the text "
    "above."
)
VT_PREFIX = (
    " Answer: According to the chain(s) of variable assignment in the text above, 5 "
    "variables are assigned the value {value}, they are: "
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
ROOM = {"cwe": 120, "vt": 30} | dict.fromkeys(NIAH_TASKS, 128)  # tokens for the answer

# --------------------------------------------------------------------------------------
# The tasks: each makes one line of the file from a random generator and a size
# --------------------------------------------------------------------------------------


@lru_cache
def all_words() -> list[str]:
    """About 2,500 single words: of Python's documentation, and of seal.py's keys."""
    from pydoc_data.topics import topics
    text = " ".join(topics.values())
    found = re.findall(r"(?<![^\s(])[a-z]{4,}(?=[\s,.;:)])", text)  # no names, no code
    return sorted({*found, *seal.ADJECTIVES, *seal.NOUNS})


def numbered(words: list[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))


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
    solved = f"{CWE.format(context=example)}{CWE_PREFIX} {numbered(found)}\n"
    return {
        "input": solved + CWE.format(context=context),
        "answer_prefix": CWE_PREFIX,
        "outputs": common,
        "answer": numbered(common),
    }


def chain(rng, size: int, letters: int) -> tuple[str, str, list[str]]:
    """A chain in `size` lines of noise: question, answer's beginning, names."""
    names = []
    while len(names) < 5:
        name = "".join(rng.choices(string.ascii_uppercase, k=letters))
        if name not in names:
            names.append(name)
    value = rng.randrange(10000, 99999)
    steps = [f"VAR {names[0]} = {value}"]
    for old, new in zip(names, names[1:]):
        steps.append(f"VAR {new} = VAR {old} ")  # RULER's lines do end with a space
    lines = [NOISE] * size
    places = sorted(rng.sample(range(size), len(steps)), reverse=True)
    for place, step in zip(places, reversed(steps)):  # from the end: places stay
        lines.insert(place, step)
    question = VT.format(context="\n".join(lines), value=value)
    return question, VT_PREFIX.format(value=value), names


def variables(rng, size: int, example: int) -> dict:
    """A chain of names of five letters, after a solved one of three."""
    question, prefix, names = chain(rng, example, 3)
    solved = f"{question}{prefix} {' '.join(names)}\n\n"
    question, prefix, names = chain(rng, size, 5)
    return {
        "input": solved + question,
        "answer_prefix": prefix,
        "outputs": names,
        "answer": " ".join(names),
    }


def example_size(tokenizer) -> int:
    """Lines of noise in the solved chain: as many fives as fit 500 tokens."""
    size = 5
    while True:
        question, prefix, names = chain(random.Random(0), size + 5, 3)
        if len(tokenizer.encode(question + prefix + " ".join(names))) > 500:
            return size
        size += 5


def key_and_value(rng) -> tuple[str, str]:
    return rng.choice(seal.KEYS), str(rng.randrange(10**6, 10**7))


def needles(rng, size: int, task: str, text: list[str]) -> dict:
    """Needles between `size` lines or sentences, and a question for some keys' values."""
    haystack, keys, values, asked = NIAH_TASKS[task]
    held = {}
    while len(held) < keys:
        held[key_and_value(rng)[0]] = [key_and_value(rng)[1] for _ in range(values)]
    hidden = []
    for key, found in held.items():
        hidden += [NEEDLE.format(key=key, value=value) for value in found]
    rng.shuffle(hidden)
    if haystack == "text":
        lines = [text[i % len(text)] for i in range(size)]
        depths = rng.sample(range(40), len(hidden))  # forty of them, from 0 to 100%
        places = [size * round(depth * 100 / 39) // 100 for depth in depths]
    else:
        lines = [NOISE] * size
        if haystack == "needles":
            others = [key_and_value(rng) for _ in range(size)]
            lines = [NEEDLE.format(key=key, value=value) for key, value in others]
        places = rng.sample(range(size), len(hidden))
    for place, needle in zip(sorted(places, reverse=True), hidden):
        lines.insert(place, needle)

    chosen = rng.sample(list(held), asked)
    outputs = [value for key in chosen for value in held[key]]
    named = chosen[0] if asked == 1 else f"{', '.join(chosen[:-1])}, and {chosen[-1]}"
    words = {"keys": named} | (ONE if len(outputs) == 1 else MANY)
    context = (" " if haystack == "text" else "\n").join(lines)
    return {
        "input": NIAH.format(context=context, **words),
        "answer_prefix": NIAH_PREFIX.format(**words),
        "outputs": outputs,
        "answer": f"{', '.join(outputs)}.",
    }


# --------------------------------------------------------------------------------------
# Filling a length, and the command
# --------------------------------------------------------------------------------------


def maker(task: str, tokenizer, length: int, haystack=None):
    """The task's function of (rng, size), and the sizes that it can have."""
    if task == "cwe":
        sizes = range(11, len(all_words()) + 1)
        return partial(common_words, short=length < 4096), sizes
    if task == "vt":
        return partial(variables, example=example_size(tokenizer)), range(5, length + 6)
    text = []
    if NIAH_TASKS[task][0] == "text":
        if not haystack:
            raise seal.UserError(f"--task {task}: in which text? --haystack FILE.txt")
        with seal.reading(haystack):
            text = Path(haystack).read_text(encoding="utf-8")
            text = re.split(r"(?<=[.!?])\s", " ".join(text.split()))
    return partial(needles, task=task, text=text), range(5, length + 6)


def make_prompts(task: str, tokenizer, length: int, count: int, seed=0, haystack=None):
    """Yield `count` lines of the file, each of up to `length` tokens, answer included."""
    make, sizes = maker(task, tokenizer, length, haystack)

    def build(index: int, size: int) -> dict:
        case = make(random.Random(f"{task} {length} {seed} {index}"), size)
        tokens = len(tokenizer.prompt(case["input"], case["answer_prefix"]))
        return {"index": index, **case, "length": tokens + ROOM[task]}

    fitting = bisect_right(sizes, length, key=lambda size: build(0, size)["length"])
    if fitting == 0:
        least = build(0, sizes[0])["length"]
        raise seal.UserError(f"--length {length}: too short, {task} takes {least}")
    if fitting == len(sizes):
        raise seal.UserError(f"--length {length}: too long, {task} has no more words")
    for index in tqdm(range(count), task, unit="prompt"):
        size = sizes[fitting - 1]
        while build(index, size)["length"] > length and size > sizes[0]:
            size -= 1
        yield build(index, size)


FLAGS = "ckpt template length samples seed haystack out".split()  # as in seal.py


def main(arguments=None) -> None:
    parser = seal.Parser("extras.ruler", description=__doc__.splitlines()[0])
    parser.add_argument("--task", required=True, choices=ROOM)
    parser.add_flags(FLAGS)
    args = parser.parse_args(arguments)

    config = seal.read_config(args.ckpt)
    tokenizer = seal.Tokenizer(args.ckpt, config, args.template)
    length = args.length or seal.full_length(config)
    out = args.out or f"{args.task}-{length}-seed{args.seed}.jsonl"
    flags = args.task, tokenizer, length, args.samples, args.seed, args.haystack
    with seal.whole_file(out) as path, open(path, "w", encoding="utf-8") as file:
        for line in make_prompts(*flags):
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    seal.note(f"RULER's answers have up to {ROOM[args.task]} tokens: --max-new-tokens")
    print(out)


if __name__ == "__main__":
    sys.exit(seal.run("extras.ruler", main))
