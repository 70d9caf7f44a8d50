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
from extras.heads import answer_logits
from extras.toy import Lessons

NAMES = {"base": "base"} | seal.METHOD | baselines.METHOD
SEEDS, PROMPTS = (0, 1, 2), 200
FIGURES, ASSETS = Path(__file__).with_name("toy.json"), seal.TOY.parent


def trained(method: str, folder: Path, seed: int = 0, **flags) -> seal.Run:
    """A run to evaluate what a method learned; it is trained once for each folder."""
    run = seal.Run(seed=seed, prompts=PROMPTS)
    out = folder / "-".join(map(str, (method, seed, *flags.values()))).replace(":", "")
    with redirect_stdout(sys.stderr):  # stdout is for the tables
        if method in baselines.METHOD and not out.exists():
            baselines.train(replace(run, out=str(out), **flags), method)
        if method in seal.METHOD and not out.exists():
            seal.train_command(replace(run, mode=method, out=str(out), **flags))
    if method in baselines.METHOD:
        return replace(run, ckpt=str(out))
    if method in seal.METHOD:
        return replace(run, scales=str(out))
    return run


def cells(run: seal.Run, **flags) -> list[dict]:
    (found,) = seal.compare(replace(run, **flags)).values()
    return found


def end_of_context() -> int:
    return seal.full_length(seal.read_config(seal.TOY))


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
            scores = [cell["score"] for cell in same]
            mean = sum(scores) / len(scores)
            row[same[0]["length"]] = f"{mean:.2f} ({min(scores):.2f}-{max(scores):.2f})"
            cell = {key: sum(c[key] for c in same) for key in ("prompts", "correct")}
            together[name].append(same[0] | cell | {"score": mean})
        rows.append(row)
    seal.plot_scores(ASSETS / "methods.png", together)
    print(tabulate(rows, headers="keys"))
    return result


def beyond(folder: Path) -> dict:
    end = end_of_context()
    lengths = [end, 2 * end, 4 * end]
    scaled = trained("channel", folder, extend="ntk:4", length=4 * end)
    base = trained("base", folder)
    result = {
        "none": cells(base, lengths=lengths),
        "NTK 4": cells(base, lengths=lengths, extend="ntk:4"),
        "NTK 4 + SEAL-C": cells(scaled, lengths=lengths),
    }
    seal.plot_scores(ASSETS / "beyond.png", result)
    print(seal.score_table(result))
    return result


def sweep(folder: Path) -> dict:
    result, rows = {"head": [], "channel": []}, []
    rates = {"head": (5e-3, 1e-2, 2e-2, 4e-2), "channel": (1e-2, 2e-2, 4e-2)}
    for mode in result:
        for lr in rates[mode]:
            row = {"samples": f"{NAMES[mode]}, lr {lr:g}"}
            for samples in (10, 30, 50, 100):
                run = trained(mode, folder, lr=lr, samples=samples)
                (cell,) = cells(run, lengths=[end_of_context()], prompts=PROMPTS // 2)
                result[mode].append({"lr": lr, "samples": samples} | cell)
                row[samples] = cell["score"]
            rows.append(row)
    print(tabulate(rows, headers="keys", floatfmt=".2f"))
    return result


def kind(sample: seal.Sample, answer: str) -> str:
    """What an answer is: right, or whose number it says instead."""
    if sample.score(answer):
        return "right"
    said = (re.findall(r"\d+", answer) or ["none"])[-1]
    in_record = re.findall(r"<(\d+)>\n", sample.prompt)
    if said == in_record[-1]:
        return "the last line's"
    return "another line's" if said in in_record else "no line's"


def errors(folder: Path) -> dict:
    result, end = {}, end_of_context()
    kinds = "right", "the last line's", "another line's", "no line's"
    for name, model, tokenizer in opened(folder):
        samples = seal.make_samples(seal.Run(), tokenizer, end, PROMPTS, "eval")
        counts = Counter(dict.fromkeys((*kinds, "begin right"), 0))
        for sample in samples:
            prompt = tokenizer.prompt(sample.prompt)
            answer = tokenizer.decode(seal.generate(model, prompt, 30, tokenizer.stop))
            counts[kind(sample, answer)] += 1
            said = (re.findall(r"\d+", answer) or ["none"])[-1]
            if not sample.score(answer) and said[0] == str(sample.expected)[0]:
                counts["begin right"] += 1  # of the wrong ones
        result[name] = dict(counts)
    rows = [{f"of {PROMPTS} answers": name} | counts for name, counts in result.items()]
    print(tabulate(rows, headers="keys"))
    return result


def depth_map(folder: Path) -> dict:
    """Two maps, length across and depth down, in the same colours."""
    from matplotlib.figure import Figure

    run = replace(trained("channel", folder), depths=list(range(0, 101, 10)))
    result = seal.compare(replace(run, compare=True, prompts=330))
    figure = Figure(figsize=(9, 3.6), layout="constrained")  # inches
    axes = figure.subplots(1, len(result), sharey=True)
    for ax, (name, found) in zip(axes, result.items()):
        lengths = list(dict.fromkeys(cell["length"] for cell in found))
        scores = torch.tensor([cell["score"] for cell in found]).view(len(lengths), -1)
        image = ax.imshow(scores.T, vmin=0, vmax=1, aspect="auto")  # (depths, lengths)
        ax.set(title=name, xlabel="prompt length (tokens)")
        ax.set_xticks(range(len(lengths)), lengths)
    axes[0].set_yticks(range(len(run.depths)), run.depths)
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
            prompt = tokenizer.bos + [token for tokens, _ in told for token in tokens]
            logits = answer_logits(model, prompt, answer)  # (A, V)
            right += logits.argmax(-1).tolist() == answer
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
