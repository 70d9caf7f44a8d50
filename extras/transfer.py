"""Other tasks than the one that scales were learned on: do they help there, or harm?

    python -m extras.transfer --ckpt smollm2                 # everything
    python -m extras.transfer cwe vt --ckpt smollm2          # two parts of it

Parts, each for the base, for scales learned on line retrieval (--recipe, of
extras.realmodel's) and, where a name stands in brackets, for SEAL-C learned on the part's
own task:

    needles     the San Francisco needle in prose, by depth and length [needles: the ten
                others]
    meeting     who of three people has been to a city? Once the text names the cities,
                once it says only what stands there, so that question and fact share no
                word (as NoLiMa asks)
    cwe, vt     RULER's common words [cwe] and variable tracking, in its own form and
                scoring; the paper has common words: Llama-3.1-8B, 2.6 before, 95.8 (H)
                and 99.7 (C) after

The prose is the Python standard library's: its language reference, 700 KB of English.
Results stand beside those of extras.realmodel, in the same form, and are not done again.
"""

import random
import re
import shlex
import sys
from functools import partial
from pathlib import Path

import seal
from extras import ruler
from extras.realmodel import RECIPES, Bench, add_flags, open_bench, prose
from extras.realmodel_table import show
from extras.tasks import Task

MEETINGS = {  # city: what stands there, and nowhere else
    "Paris": "the Eiffel Tower", "London": "Buckingham Palace", "Rome": "the Colosseum",
    "Moscow": "the Kremlin", "Beijing": "the Forbidden City", "Athens": "the Acropolis",
    "Sydney": "the Harbour Bridge and the white Opera House", "Agra": "the Taj Mahal",
    "Berlin": "the Brandenburg Gate", "Pisa": "the Leaning Tower",
}
PEOPLE = "Yusuf Marta Ingrid Tomas Leila Hugo Anneke Ravi Sofia Kenji".split()


def haystack(folder: Path) -> Path:
    """The first half of the prose as a file; perplexity is measured on the other."""
    path = folder / "haystack.txt"
    if not path.exists():
        texts = prose()
        with seal.whole_file(path) as unfinished:
            unfinished.write_text("\n\n".join(texts[: len(texts) // 2]))
    return path


def needles(bench: Bench) -> None:
    names, columns = ["base", bench.args.recipe, "needles"], []
    text, count = str(haystack(bench.out.parent)), max(1, bench.args.prompts // 5)
    own = f"--mode channel --task needle --haystack {shlex.quote(text)}"
    RECIPES["needles"] = f"{own} --samples 10 --lr 5e-2"
    for length in bench.args.lengths:
        columns += [f"{length} at {depth}%" for depth in (0, 25, 50, 75, 100)]
    for recipe in names:
        bench.recipe = recipe
        for column in columns:
            length, depth = map(int, re.findall(r"\d+", column))
            draw = partial(
                seal.make_samples, "needle", bench.tokenizer, length, count, "eval",
                bench.args.seed, depth, text)
            bench.cell("needles", recipe, column, make=lambda name: bench.ask(name, draw()))
    show(bench.results["cells"], "needles", names, columns)


def meeting(bench: Bench, sentences: list[str], i: int, length: int, named: bool):
    """Prompt i: [a sample] of `length` tokens in whose text three people are somewhere."""
    rng = random.Random(f"meeting {bench.args.seed} {i}")
    cities, people = rng.sample(list(MEETINGS), 3), rng.sample(PEOPLE, 3)
    facts = []
    for city, person in zip(cities, people):
        place = city if named else MEETINGS[city]
        facts.append(f"Last summer {person} stood right in front of {place} for an hour.")
    question = f"Which person in the text has been to {cities[0]}? Answer with the name."
    start, depths = rng.randrange(len(sentences) - length), [rng.random() for _ in facts]

    def make(n):
        text = sentences[start : start + n]
        for fact, depth in zip(facts, depths):
            text.insert(int(depth * n), fact)
        prompt = "{}\n\n{}".format(" ".join(text), question)
        return [Task(prompt, people[0], expected=[people[0]])]

    return seal.largest_fit(make, bench.tokenizer, length, length)


def meetings(bench: Bench) -> None:
    names, ways = ["base", bench.args.recipe], ("named", "not named")
    length = bench.args.lengths[0]
    sentences = re.split(r"(?<=\.)\s", haystack(bench.out.parent).read_text())
    for recipe in names:
        bench.recipe = recipe
        for way in ways:
            samples = []
            for i in range(bench.args.prompts):
                samples += meeting(bench, sentences, i, length, way == "named")
            bench.cell("meeting", recipe, way, make=lambda name: bench.ask(name, samples))
    show(bench.results["cells"], "meeting", names, ways)


def ruler_file(bench: Bench, task: str, length: int, samples: int, seed: int) -> str:
    """RULER's prompts of a task as JSONL, made by extras.ruler."""
    path = bench.out.with_name(f"{task}-{length}-{samples}-{seed}.jsonl")
    if not path.exists():
        ruler.main([
            "--ckpt", bench.args.ckpt, "--task", task, "--length", str(length),
            "--samples", str(samples), "--seed", str(seed), "--out", str(path),
        ])
    return str(path)


def rulers(bench: Bench, task: str, names: list[str]) -> None:
    for recipe in names:
        bench.recipe = recipe
        for length in bench.args.lengths:
            count, room = bench.args.prompts, ruler.ROOM[task]
            file = ruler_file(bench, task, length, count, bench.args.seed)
            samples = seal.make_samples(file, bench.tokenizer, length, count, "eval")
            bench.cell(task, recipe, length, make=lambda name: bench.ask(name, samples, room))
    # A prompt's score is a share itself, which Wilson's interval is not for.
    show(bench.results["cells"], task, names, bench.args.lengths, "{score:.2f}")


def common_words(bench: Bench) -> None:
    length = bench.args.lengths[0]
    file = ruler_file(bench, "cwe", length, 50, 1000)
    RECIPES["cwe"] = f"--mode channel --lr 2e-2 --task {shlex.quote(file)} --length {length}"
    rulers(bench, "cwe", ["base", bench.args.recipe, "cwe"])


def variables(bench: Bench) -> None:
    rulers(bench, "vt", ["base", bench.args.recipe])


PARTS = {"needles": needles, "meeting": meetings, "cwe": common_words, "vt": variables}


def main(arguments=None) -> None:
    p = seal.Parser("extras.transfer", description=__doc__.splitlines()[0])
    p.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)} (default: all)")
    add_flags(p, prompts=25, lengths="1000,2000")
    p.add_argument(
        "--recipe", choices=RECIPES, default="25 records x 8", help="learned on lines")
    bench = open_bench(p.parse_args(arguments), PARTS)
    for part in bench.args.parts:
        PARTS[part](bench)


if __name__ == "__main__":
    sys.exit(seal.exit_status("extras.transfer", main))
