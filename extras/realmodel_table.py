"""EVIDENCE.md's table and picture of the real model, from what extras.realmodel measured.

    python -m extras.realmodel_table assets/realmodel.json --plot assets/smollm2.png

The table has a row per recipe: the share of held-out records answered right by length,
with Wilson's 95% interval, and what the recipe costs elsewhere. In the picture that is
accuracy by length on the left, and accuracy against perplexity on the right: up and left
is better.
"""

import sys

from tabulate import tabulate

import seal

SHARE = "{share:.2f} ({low:.2f}-{high:.2f})"


def show(cells: dict, part: str, names: list[str], columns, wording=SHARE) -> None:
    """Print a part's cells as a table, a row per recipe; wording: what is said of a cell."""
    rows = []
    for recipe in names:
        row = [recipe]
        for column in columns:
            cell = cells[f"{part} / {recipe} / {column}"]
            row.append(wording.format(**cell))
        rows.append(row)
    title = ", 95% intervals" if wording == SHARE else ""
    print(f"\n{part}, {cell['prompts']} prompts a cell{title}")
    print(tabulate(rows, ["", *columns], tablefmt="github", disable_numparse=True))


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
    lengths = set()
    for measured in found.values():
        lengths |= measured.keys()
    for recipe, measured in found.items():
        row = dict.fromkeys(sorted(lengths), "")  # what was not measured stays empty
        row |= {"perplexity": "", "first sentence unchanged": ""}
        for length, cell in measured.items():
            row[length] = SHARE.format(**cell)
        if recipe in costs:
            row["perplexity"] = f"{costs[recipe]:.2f}"
        same = cells.get(f"same / {recipe}")
        if same and recipe != "base":
            row["first sentence unchanged"] = "{correct} of {prompts}".format(**same)
        rows.append([recipe, *row.values()])
    heads = ["", *(f"{length:,}" for length in sorted(lengths))]
    heads += ["perplexity", "first sentence unchanged"]
    return tabulate(rows, heads, tablefmt="github", disable_numparse=True)


def plot(path, cells: dict, shown: list[str], at: int) -> None:
    """A PNG of the recipes `shown`, its right half at `at` tokens."""
    import matplotlib
    from matplotlib.figure import Figure

    found, costs = by_recipe(cells), perplexities(cells)
    figure = Figure(figsize=(10, 4.4), layout="constrained")  # inches
    left, right = figure.subplots(1, 2)
    for color, recipe in zip(matplotlib.color_sequences["tab10"] * len(shown), shown):
        lengths = sorted(found[recipe])
        measured = [found[recipe][length] for length in lengths]
        low = [cell["low"] for cell in measured]
        high = [cell["high"] for cell in measured]
        shares = [cell["share"] for cell in measured]
        left.plot(lengths, shares, "o-", color=color, label=recipe)
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
    known = list(by_recipe(cells))
    shown = args.recipes.split(";") if args.recipes else known
    for name in shown:
        if name not in known:
            raise seal.UserError(f"--recipes: {name!r} is not of {'; '.join(known)}")
    print(table(cells))
    if args.plot:
        plot(args.plot, cells, shown, args.at)


if __name__ == "__main__":
    sys.exit(seal.exit_status("extras.realmodel_table", main))
