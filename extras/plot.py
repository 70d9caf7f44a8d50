"""Pictures of what was measured: accuracy by length, gains of heads, votes for an answer.

    python seal.py eval --plot accuracy.png ...
    python -m extras.heads --plot heads.png
    python -m extras.direct --scales scales.safetensors --plot direct.png

In maps of heads blue is what helps and red what harms: a gain above 0 or below, a scale
above 1 or below, votes for the right token or for the wrong one.
"""

import os
from collections import Counter

os.environ["MPLBACKEND"] = "agg"  # a notebook may have set one that cannot be imported here

import torch
from matplotlib.colors import CenteredNorm
from matplotlib.figure import Figure  # no window, whatever backend is set
from scipy.stats import binomtest
from torch import Tensor

import seal


def save(figure: Figure, path, dpi=100) -> None:
    with seal.whole_file(path) as unfinished:
        figure.savefig(unfinished, format="png", dpi=dpi)


def plot_scores(path, results) -> None:
    """A PNG of the share answered right by length, with Wilson's 95% intervals.

    results: {method: cells with their length, prompts and correct}.
    """
    figure = Figure(layout="constrained")
    ax = figure.subplots()
    for method, cells in results.items():
        right, asked = Counter(), Counter()  # by length, all depths together
        for cell in cells:
            right[cell["length"]] += cell["correct"]
            asked[cell["length"]] += cell["prompts"]
        lengths, shares, lows, highs = list(asked), [], [], []
        for length in lengths:
            test = binomtest(right[length], asked[length])
            low, high = test.proportion_ci(method="wilson")
            shares.append(test.statistic)
            lows.append(low)
            highs.append(high)
        ax.plot(lengths, shares, "o-", label=method)
        ax.fill_between(lengths, lows, highs, alpha=0.2)
    ax.set(xlabel="tokens of the prompt", ylabel="share answered right", ylim=(0, 1.02))
    ax.legend()
    save(figure, path)


def colours(values: Tensor, middle=0.0) -> dict:
    """White for the middle, and as far from it blue above and red below."""
    reach = (values - middle).abs().max().item() or 1.0
    return {"cmap": "RdBu", "norm": CenteredNorm(middle, reach)}


def draw_map(ax, values: Tensor, how: dict):
    """Values (L, heads), in colours(...), with whole numbers of layers."""
    ax.yaxis.get_major_locator().set_params(integer=True)
    return ax.imshow(values.numpy(), aspect="auto", **how)


def plot_gains(path, names, lengths, gains, unit: str, maps: list) -> None:
    """A PNG of the paper's figure 2, gains at two lengths, beside maps of layers x heads.

    gains: two lists, in the order of names. maps: (title, values (L, H), middle, label).
    """
    panels = 1 + len(maps)
    figure = Figure(figsize=(4.6 * panels, 3.8), layout="constrained")  # inches
    ax = figure.add_subplot(1, panels, 1)
    ax.axhline(0, color="#999999", linewidth=0.8)
    ax.axvline(0, color="#999999", linewidth=0.8)
    x, y = gains
    ax.scatter(x, y, s=24, c=y, edgecolors="#777777", **colours(torch.tensor(y)))
    order = sorted(range(len(y)), key=y.__getitem__)
    for i in order[:2] + order[-2:]:
        ax.annotate(names[i], (x[i], y[i]), (3, 3), textcoords="offset points", fontsize=8)
    ax.set_title("top right: helpful at both")
    ax.set_xlabel(f"{unit}, {lengths[0]:,} tokens")
    ax.set_ylabel(f"{unit}, {lengths[1]:,} tokens")
    for number, (title, values, middle, label) in enumerate(maps, 2):
        ax = figure.add_subplot(1, panels, number)
        image = draw_map(ax, values, colours(values, middle))
        ax.set_title(title)
        ax.set_xlabel("head")
        ax.set_ylabel("layer")
        figure.colorbar(image, ax=ax, label=label)
    save(figure, path, dpi=110)


def plot_votes(path, stages: dict[str, Tensor], right: str, wrong: str) -> None:
    """A PNG of maps of votes for the right token less votes for the wrong one.

    stages: {title: votes (L, H + 1)}, the feed-forward last; all in the same colours.
    """
    figure = Figure(figsize=(13.8, 3.8), layout="constrained")  # inches
    axes = figure.subplots(1, len(stages))
    how = colours(torch.stack(list(stages.values())))
    for ax, (name, votes) in zip(axes, stages.items()):
        image = draw_map(ax, votes, how)
        ax.set_title(f"{name}: {votes.sum():+.1f}")
        ax.set_xlabel("head (last: feed-forward)")
    axes[0].set_ylabel("layer")
    figure.colorbar(image, ax=axes, label=f"votes for {right} less votes for {wrong}")
    save(figure, path, dpi=110)
