"""What the bundled toy shows: its tables and pictures, in the form of the paper's.

    python -m extras.toy table beyond sweep errors map kept       or some of them

    table    accuracy by length: base, SEAL-H, SEAL-C, SEAL-L, SEAL-D; three seeds, 200
             prompts a cell (the paper's table 1)
    beyond   one, two and four times the context: none, NTK 4, NTK 4 + SEAL-C (table 2)
    sweep    learning rate x samples, SEAL-H and SEAL-C, at the end of the context
             (table 4)
    errors   what the wrong answers there are: the last line's number, another line's,
             or no line's
    map      accuracy by length and depth of the asked line, base and SEAL-C (figure 5)
    kept     a task that no scales were trained on, as the paper's MMLU

Figures go to extras/toy.json, pictures to assets/. At 464 tokens, the end of the
context, the base answers 0.46, SEAL-H 0.69, SEAL-C 0.86, SEAL-L 0.66 (means of three
seeds).
"""

import random
import re
import sys
import tempfile
from collections import Counter
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import torch
from tabulate import tabulate

import seal
from extras import baselines
from extras.plot import plot_scores
from extras.toy_words import Lessons

NAMES = {"base": "base"} | seal.METHOD | baselines.METHOD
SEEDS, PROMPTS = (0, 1, 2), 200
FIGURES, ASSETS = Path(__file__).with_name("toy.json"), seal.TOY.parent


def trained(method: str, folder: Path, seed: int = 0, **flags) -> seal.Flags:
    """Flags to evaluate what a method learned; it is trained once for each folder."""
    asked = seal.Flags(seed=seed, prompts=PROMPTS)
    out = folder / "-".join(map(str, (method, seed, *flags.values()))).replace(":", "")
    with redirect_stdout(sys.stderr):  # stdout is for the tables
        if method in baselines.METHOD and not out.exists():
            baselines.train(replace(asked, out=str(out), **flags), method)
        if method in seal.METHOD and not out.exists():
            seal.train_command(replace(asked, mode=method, out=str(out), **flags))
    if method in baselines.METHOD:
        return replace(asked, ckpt=str(out))
    if method in seal.METHOD:
        return replace(asked, scales=str(out))
    return asked


def cells(asked: seal.Flags, **flags) -> list[dict]:
    (found,) = seal.measure(replace(asked, **flags)).values()
    return found


def end_of_context() -> int:
    return seal.longest_prompt(seal.read_config(seal.TOY))


def opened(folder: Path):
    """(name, model, tokenizer) of each method."""
    for method, name in NAMES.items():
        model, tokenizer, _ = seal.open_checkpoint(trained(method, folder))
        yield name, model, tokenizer


# --------------------------------------------------------------------------------------
# The tables: each returns what goes into toy.json
# --------------------------------------------------------------------------------------


def table(folder: Path) -> dict:
    result, together, rows = {}, {}, []
    for method, name in NAMES.items():
        result[name] = [cells(trained(method, folder, seed)) for seed in SEEDS]
        together[name], row = [], {"tokens": name}
        for same in zip(*result[name]):  # the same length, by seeds
            length = same[0]["length"]
            scores = [cell["score"] for cell in same]
            mean = sum(scores) / len(scores)
            row[length] = f"{mean:.2f} ({min(scores):.2f}-{max(scores):.2f})"
            asked = sum(cell["prompts"] for cell in same)
            right = sum(cell["correct"] for cell in same)
            cell = {"length": length, "prompts": asked, "correct": right}
            together[name].append(cell)
        rows.append(row)
    plot_scores(ASSETS / "methods.png", together)
    print(tabulate(rows, headers="keys"))
    return result


def cells_anywhere(asked: seal.Flags, lengths: list[int]) -> list[dict]:
    """Cells of prompts that may be longer than the context, which seal.py would refuse.

    The model itself takes any length: the limit is only what the checkpoint was made for.
    """
    model, tokenizer, facts = seal.open_checkpoint(asked)
    tokenizer.context = max(lengths) + asked.max_new_tokens
    model.config = replace(model.config, context=tokenizer.context)
    asked, found = replace(asked, lengths=lengths), []
    for length, depth, samples in seal.draw_cells(asked, tokenizer, facts.trained_on):
        said = seal.ask(model, tokenizer, samples, asked.max_new_tokens, str(length))
        found.append({"length": length, "depth": depth} | seal.judge(samples, said))
    return found


def beyond(folder: Path) -> dict:
    end = end_of_context()
    lengths = [end, 2 * end, 4 * end]
    scaled = trained("channel", folder, extend="ntk:4", length=[4 * end])
    base = trained("base", folder)
    result = {
        "none": cells_anywhere(base, lengths),
        "NTK 4": cells_anywhere(replace(base, extend="ntk:4"), lengths),
        "NTK 4 + SEAL-C": cells_anywhere(scaled, lengths),
    }
    plot_scores(ASSETS / "beyond.png", result)
    print(seal.score_table(result))
    return result


def sweep(folder: Path) -> dict:
    result, rows = {"head": [], "channel": []}, []
    rates = {"head": (5e-3, 1e-2, 2e-2, 4e-2), "channel": (1e-2, 2e-2, 4e-2)}
    for mode in result:
        for lr in rates[mode]:
            row = {"samples": f"{NAMES[mode]}, lr {lr:g}"}
            for samples in (10, 30, 50, 100):
                scaled = trained(mode, folder, lr=lr, samples=samples)
                end = [end_of_context()]
                (cell,) = cells(scaled, lengths=end, prompts=PROMPTS // 2)
                result[mode].append({"lr": lr, "samples": samples} | cell)
                row[samples] = cell["score"]
            rows.append(row)
    print(tabulate(rows, headers="keys", floatfmt=".2f"))
    return result


def last_number(answer: str) -> str:
    """The last run of digits, which is what LongEval takes for the answer."""
    return (re.findall(r"\d+", answer) or ["none"])[-1]


def kind(sample: seal.Sample, answer: str) -> str:
    """What an answer is: right, or whose number it says instead."""
    if sample.score(answer):
        return "right"
    in_record = re.findall(r"<(\d+)>\n", sample.prompt)
    if last_number(answer) == in_record[-1]:
        return "the last line's"
    if last_number(answer) in in_record:
        return "another line's"
    return "no line's"


def errors(folder: Path) -> dict:
    result, end = {}, end_of_context()
    kinds = "right", "the last line's", "another line's", "no line's"
    for name, model, tokenizer in opened(folder):
        samples = seal.make_samples("lines", tokenizer, end, PROMPTS, "eval")
        counts = Counter(dict.fromkeys((*kinds, "begin right"), 0))
        answers = seal.ask(model, tokenizer, samples, 30, name)
        for sample, answer in zip(samples, answers):
            found = kind(sample, answer)
            counts[found] += 1
            first = last_number(answer)[0]
            if found != "right" and first == str(sample.expected)[0]:
                counts["begin right"] += 1  # of the wrong ones
        result[name] = dict(counts)
    rows = [{f"of {PROMPTS} answers": name} | counts for name, counts in result.items()]
    print(tabulate(rows, headers="keys"))
    return result


def depth_map(folder: Path) -> dict:
    """Two maps, length across and depth down, in the same colours."""
    from matplotlib.figure import Figure

    asked = replace(trained("channel", folder), depths=list(range(0, 101, 10)))
    result = seal.measure(replace(asked, compare=True, prompts=330))
    figure = Figure(figsize=(9, 3.6), layout="constrained")  # inches
    axes = figure.subplots(1, len(result), sharey=True)
    for ax, (name, found) in zip(axes, result.items()):
        lengths = list(dict.fromkeys(cell["length"] for cell in found))
        scores = torch.tensor([cell["score"] for cell in found]).view(len(lengths), -1)
        image = ax.imshow(scores.T, vmin=0, vmax=1, aspect="auto")  # (depths, lengths)
        ax.set(title=name, xlabel="prompt length (tokens)")
        ax.set_xticks(range(len(lengths)), lengths)
    axes[0].set_yticks(range(len(asked.depths)), asked.depths)
    axes[0].set_ylabel("depth of the line (percent)")
    figure.colorbar(image, ax=axes, label="share answered right")
    with seal.whole_file(ASSETS / "map.png") as unfinished:
        figure.savefig(unfinished, format="png", dpi=110)
    print(seal.score_table(result))
    return result


def kept(folder: Path) -> dict:
    """Bare pairs of key and number, known from pretraining: right to the last token."""
    result, count = {}, 2 * PROMPTS
    for name, model, tokenizer in opened(folder):
        lessons, rng, right = Lessons(tokenizer), random.Random("kept"), 0
        for _ in range(count):
            # Sixteen keys with their numbers, and then a key ...
            *told, (answer, _) = lessons.pairs(rng, 16, 0)[:18]  # ... and its number
            prompt = list(tokenizer.bos)
            for tokens, _ in told:
                prompt += tokens
            right += seal.generate(model, prompt, len(answer)) == answer
        result[name] = {"prompts": count, "right": right / count}
    rows = [{"16 bare pairs": name, "right": r["right"]} for name, r in result.items()]
    print(tabulate(rows, headers="keys", floatfmt=".3f"))
    return result


TABLES = {
    "table": table, "beyond": beyond, "sweep": sweep, "errors": errors,
    "map": depth_map, "kept": kept,
}


def measure(names: list[str]) -> None:
    torch.set_num_threads(1)  # as fast as two for a model this small
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            result = TABLES[name](Path(folder))
            seal.write_json(FIGURES, seal.read_json(FIGURES) | {name: result})
