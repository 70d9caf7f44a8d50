"""README's table and picture of the real model, from what extras.realmodel measured.

    python -m extras.realmodel_table assets/realmodel.json --plot assets/smollm2.png

The table has a row per recipe: the share of held-out records answered right by length, with
Wilson's 95% interval, and what the recipe costs elsewhere. In the picture that is accuracy
by length on the left, and accuracy against perplexity on the right: up and left is better.
"""

import sys
from pathlib import Path

from tabulate import tabulate

import seal


def by_recipe(cells: dict) -> dict:
    """{recipe: {length: cell}} of the line retrieval cells, both in the order measured."""
    found = {}
    for name, cell in cells.items():
        part, recipe, *rest = name.split(" / ")
        if part == "lines":
            found.setdefault(recipe, {})[int(rest[0])] = cell
    return found


def perplexities(cells: dict) -> dict:
    """{recipe: perplexity}, all over as many windows of prose as most of them."""
    found = {}
    for name, cell in cells.items():
        part, recipe, *rest = name.split(" / ")
        if part == "perplexity":
            found.setdefault(rest[0], {})[recipe] = cell["perplexity"]
    return max(found.values(), key=len, default={})


def table(cells: dict) -> str:
    found, costs, rows = by_recipe(cells), perplexities(cells), []
    lengths = sorted({length for recipe in found.values() for length in recipe})
    for recipe, measured in found.items():
        row = [recipe]
        for length in lengths:
            cell = measured.get(length)
            row.append("{share:.2f} ({low:.2f}-{high:.2f})".format(**cell) if cell else "")
        same = cells.get(f"same / {recipe}")
        row.append(f"{costs[recipe]:.2f}" if recipe in costs else "")
        row.append("{correct} of {prompts}".format(**same) if same and recipe != "base" else "")
        rows.append(row)
    heads = ["", *(f"{length:,}" for length in lengths), "perplexity", "first sentence unchanged"]
    return tabulate(rows, heads, tablefmt="github", disable_numparse=True)


def plot(path: Path, cells: dict, shown: list[str], at: int) -> None:
    import matplotlib.pyplot as plt

    found, costs = by_recipe(cells), perplexities(cells)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.4), layout="constrained")
    for i, recipe in enumerate(shown):
        color = plt.cm.tab10(i)
        lengths = sorted(found[recipe])
        measured = [found[recipe][length] for length in lengths]
        left.plot(lengths, [c["share"] for c in measured], "o-", color=color, label=recipe)
        low, high = [c["low"] for c in measured], [c["high"] for c in measured]
        left.fill_between(lengths, low, high, alpha=0.12, color=color)
        if recipe in costs and at in found[recipe]:
            cell = found[recipe][at]
            sides = [[cell["share"] - cell["low"]], [cell["high"] - cell["share"]]]
            right.errorbar(costs[recipe], cell["share"], sides, fmt="o", color=color)
    left.set(xlabel="tokens of the prompt", ylabel="share answered right", ylim=(0, 1.02))
    left.set_xscale("log")
    left.set_xticks((500, 1000, 2000, 4000), ("500", "1,000", "2,000", "4,000"))
    left.minorticks_off()
    right.set(xlabel="perplexity of prose", ylabel=f"right at {at:,} tokens", ylim=(0, 1.02))
    figure.legend(loc="outside lower center", ncols=4)
    with seal.whole_file(path) as unfinished:
        figure.savefig(unfinished, format="png", dpi=110)


def main(arguments=None) -> None:
    p = seal.Parser("extras.realmodel_table", description=__doc__.splitlines()[0])
    p.add_argument("json", help="extras.realmodel's file")
    p.add_argument("--plot", help="a PNG")
    p.add_argument("--recipes", help="those in the picture, ; between (default: all)")
    p.add_argument("--at", type=int, default=1000, help="tokens, for the right half")
    args = p.parse_args(arguments)
    cells = seal.read_json(args.json).get("cells")
    if not cells:
        raise seal.UserError(f"{args.json}: holds no cells; extras.realmodel writes them")
    print(table(cells))
    if args.plot:
        known = {name: name for name in by_recipe(cells)}
        with seal.reading("--recipes"):
            shown = [known[name] for name in args.recipes.split(";")] if args.recipes else known
        plot(args.plot, cells, shown, args.at)


if __name__ == "__main__":
    sys.exit(seal.run("extras.realmodel_table", main))
