"""Every figure and picture that README.md shows of the bundled toy, by one command: `python bench/toy.py` (about 40
minutes on two cores). Numbers go to bench/toy.json, pictures to assets/. `python bench/toy.py NAME ...` makes some.

    table    accuracy by length: base, SEAL-H, SEAL-C, SEAL-L; three seeds, 200 prompts a cell (the paper's table 1)
    beyond   one, two and four times the context: none, NTK 4, NTK 4 + SEAL-C (table 2)
    sweep    learning rate x samples, SEAL-H and SEAL-C at the end of the context (table 4)
    errors   what the wrong answers at the end of the context are: the last line's number, another line's, no line's
    map      accuracy by length and depth of the asked line, base and SEAL-C (the form of figure 5)
    heads    pruning heads one at a time at two lengths (figure 2), the quadrants, the learned scales
    direct   direct effects on the logits of a prompt that the scales mend (section 5)
    kept     a task the scales were not trained on, before and after
"""

import json
import random
import re
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import seal

SEEDS, PROMPTS = (0, 1, 2), 200
METHODS = (("base", None), ("SEAL-H", "head"), ("SEAL-C", "channel"), ("SEAL-L", "lora"))
RECORD, ASSETS = ROOT / "bench" / "toy.json", ROOT / "assets"


def command(*arguments) -> None:
    """One documented command, as a person types it."""
    print("$ python seal.py", *arguments, flush=True)
    if seal.run("seal.py", seal.parse, [str(a) for a in arguments]):
        sys.exit(1)


def scales_file(folder: Path, mode: str, seed: int, *more) -> Path:
    path = folder / f"{mode}-{seed}{'-'.join(more).replace(':', '')}.safetensors"
    if not path.exists():
        command("train", "--mode", mode, "--seed", seed, "--out", path, *more)
    return path


def cells(path: Path) -> list[dict]:
    return json.loads(path.read_text())["cells"]


def open_toy() -> tuple[seal.Llama, seal.Tokenizer]:
    config = seal.read_config(seal.TOY)
    return seal.load_model(seal.TOY, config, torch.device("cpu")), seal.Tokenizer(seal.TOY, config)


def each_method(folder: Path, model: seal.Llama):
    """The methods' names, one after the other, while the model holds the scales that each learned with seed 0."""
    for method, mode in METHODS:
        if mode:
            model.set_scales(seal.read_scales(scales_file(folder, mode, 0), model.config)[0])
        yield method


def table(folder: Path) -> dict:
    result, out = {}, folder / "eval.json"
    for seed in SEEDS:
        for method, mode in METHODS:
            scales = ["--scales", scales_file(folder, mode, seed)] if mode else []
            command("eval", "--prompts", PROMPTS, "--seed", seed, "--json", out, *scales)
            result.setdefault(method, []).append(cells(out))
    seal.plot_scores(ASSETS / "accuracy.png", {method: merged(runs) for method, runs in result.items()})
    rows = []
    for method, runs in result.items():
        scores = [[run[i]["score"] for run in runs] for i in range(len(runs[0]))]
        rows.append([method] + [f"{sum(s) / len(s):.2f} ({min(s):.2f}-{max(s):.2f})" for s in scores])
    print(seal.table(["tokens"] + [str(c["length"]) for c in result["base"][0]], rows))
    return result


def merged(runs: list[list[dict]]) -> list[dict]:
    """The cells of several seeds as one."""
    return [
        {
            "length": c[0]["length"],
            "depth": c[0]["depth"],
            "prompts": sum(x["prompts"] for x in c),
            "correct": sum(x["correct"] for x in c),
            "score": sum(x["score"] for x in c) / len(c),
        }
        for c in zip(*runs)
    ]


def beyond(folder: Path) -> dict:
    config, result, out = seal.read_config(seal.TOY), {}, folder / "eval.json"
    end = seal.default_length(config)
    lengths = ",".join(str(end * n) for n in (1, 2, 4))
    scales = scales_file(folder, "channel", 0, "--extend", "ntk:4", "--length", str(4 * end))
    for method, flags in (("none", []), ("NTK 4", ["--extend", "ntk:4"]), ("NTK 4 + SEAL-C", ["--scales", scales])):
        command("eval", "--lengths", lengths, "--prompts", PROMPTS, "--json", out, *flags)
        result[method] = cells(out)
    seal.plot_scores(ASSETS / "beyond.png", result)
    print(seal.score_table(result))
    return result


def sweep(folder: Path) -> dict:
    end, result, out = seal.default_length(seal.read_config(seal.TOY)), {}, folder / "eval.json"
    counts = (10, 30, 50, 100)
    for mode, rates in (("head", (5e-3, 1e-2, 2e-2, 4e-2)), ("channel", (1e-2, 2e-2, 4e-2))):
        rows = []
        for lr in rates:
            row = [f"{seal.METHOD[mode]}, lr {lr:g}"]
            for samples in counts:
                scales = scales_file(folder, mode, 0, "--lr", str(lr), "--samples", str(samples))
                command("eval", "--lengths", end, "--prompts", PROMPTS // 2, "--json", out, "--scales", scales)
                result.setdefault(mode, []).append({"lr": lr, "samples": samples, **cells(out)[0]})
                row.append(f"{cells(out)[0]['score']:.2f}")
            rows.append(row)
        print(seal.table(["samples", *map(str, counts)], rows))
    return result


def errors(folder: Path) -> dict:
    (model, tokenizer), counts = open_toy(), {}
    end = seal.default_length(model.config)
    samples = seal.make_samples("lines", tokenizer, model.config, end, PROMPTS, "eval", 0)
    for method in each_method(folder, model):
        counts[method] = dict.fromkeys(("right", "the last line's", "another line's", "no line's", "begin right"), 0)
        for i in range(0, PROMPTS, 20):
            for sample, answer in zip(samples[i : i + 20], seal.answers(model, tokenizer, samples[i : i + 20], 30)):
                in_record = [int(n) for n in re.findall(r"<(\d+)>\n", sample.prompt)]
                said = int((re.findall(r"\d+", answer) or ["-1"])[-1])
                if said == sample.expected:
                    counts[method]["right"] += 1
                elif said == in_record[-1]:
                    counts[method]["the last line's"] += 1
                else:
                    counts[method]["another line's" if said in in_record else "no line's"] += 1
                if said != sample.expected and str(said)[0] == str(sample.expected)[0]:
                    counts[method]["begin right"] += 1  # of the wrong ones
    rows = [[method, *(str(n) for n in c.values())] for method, c in counts.items()]
    print(seal.table([f"of {PROMPTS} answers", *counts["base"]], rows))
    return counts


def depth_map(folder: Path) -> dict:
    out, depths = folder / "eval.json", ",".join(str(depth) for depth in range(0, 101, 10))
    shown = ["--depths", depths, "--prompts", 330, "--json", out, "--plot", ASSETS / "map.png"]
    command("eval", "--scales", scales_file(folder, "channel", 0), "--compare", *shown)
    return json.loads(out.read_text())


def heads(folder: Path) -> dict:
    out = folder / "heads.json"
    how = ["--how", "both", "--prompts", 50, "--quadrants", "0.9,1.1", "--json", out, "--plot", ASSETS / "heads.png"]
    command("heads", "--scales", scales_file(folder, "head", 0), *how)
    return json.loads(out.read_text())


def direct(folder: Path) -> None:
    command("heads", "--direct", "--scales", scales_file(folder, "channel", 0), "--plot", ASSETS / "direct.png")


def kept(folder: Path) -> dict:
    """Bare pairs of key and number, which the toy knows from pretraining: right to the last token."""
    model, tokenizer = open_toy()
    data, rng, pairs, result = seal.ToyData(tokenizer), random.Random("kept"), [], {}
    for _ in range(2 * PROMPTS):
        sequence = data.pairs(rng, 16, 0)[:18]  # sixteen pairs, then one key and its number
        told = [token for part, _ in sequence[:17] for token in part]
        pairs.append(([tokenizer.bos, *told], sequence[17][0]))
    for method in each_method(folder, model):
        result[method] = {"prompts": len(pairs), "right": seal.held_out(model, pairs)[1]}
    print(seal.table(["16 bare pairs", "right"], [[method, f"{r['right']:.3f}"] for method, r in result.items()]))
    return result


def main() -> None:
    parts = {
        "table": table,
        "beyond": beyond,
        "sweep": sweep,
        "errors": errors,
        "map": depth_map,
        "heads": heads,
        "direct": direct,
        "kept": kept,
    }
    torch.set_num_threads(1)  # as fast as two for a model this small
    with tempfile.TemporaryDirectory() as folder:
        for name in sys.argv[1:] or parts:
            result = parts[name](Path(folder))
            record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
            seal.write_json(RECORD, record | ({name: result} if result else {}))


if __name__ == "__main__":
    main()
