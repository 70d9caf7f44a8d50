"""Which heads help and which hurt: pruned one at a time, or by the gradient.

    python -m extras.heads --how both --scales scales.safetensors --plot heads.png
    python -m extras.heads --how prune --channels 2.6       inside layer 2, head 6
    python -m extras.heads --how prune --quadrants 0.9,1.1
    python -m extras.heads --how both --top 20              the ends of the ranking alone

Everywhere here the gain of a head is what it is worth to the base model: what is lost
when it is pruned, its scale set to 0. Positive: a helpful head, blue in the pictures.
Negative: a harmful one, red. Learned scales are blue above 1 and red below. (The paper,
section 3, plots what pruning changes, the same with the other sign: its first quadrant
is the harmful heads'.)

--how prune is exact: the gain in accuracy (answers right to the last token) and in loss
(nats), a pass for each head and prompt. It goes on from what the --json file holds.
--how gradient is first order, -dL/ds, the slope at s = 1 drawn out to 0: all heads from
one pass a prompt. It ranks heads roughly as pruning does, and is wrong, on the toy,
- where the loss is saturated: at 120 tokens all answers are right, and L0H0, without which
  none is, loses 1.23 nats, by the gradient 0.03 (Spearman over all heads 0.44);
- where heads stand in for each other: L1H3 and L1H4 lose 0.17 one at a time, both at once
  1.05, by the gradient -0.12;
- for several at once: the 17 heads that are harmful alone lose 0.12 together, where the
  sums are -0.22 by pruning and -0.46 by the gradient (these two at 464 tokens, 12 prompts).
--quadrants scales the heads that are harmful at both lengths by its first number, those
helpful at both by its second, and evaluates on other prompts; nothing is trained.

The toy, 50 prompts at each of 418 and 464 tokens: pruning L0H0 costs accuracy 0.58 and
0.44, pruning L0H7 nothing and -0.14. The gradient ranks losses as pruning does with a
Spearman of 0.59 and 0.44; SEAL-H's scales and the gains in accuracy have 0.61. Helpful
heads times 1.1 answer 0.52 instead of 0.40 at 464 tokens.
"""

import sys

import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

import seal
from seal import UserError

FLAGS = """
    ckpt scales task extend template haystack lengths prompts max_new_tokens device dtype
    seed json plot
""".split()  # of seal.py, with their meaning there

# --------------------------------------------------------------------------------------
# Gains. A site is (layer, index into that layer's scales).
# --------------------------------------------------------------------------------------


def answer_logits(model: seal.Llama, prompt, answer) -> Tensor:
    """The logits (A, V) that predict the answer, each from the token before."""
    tokens = torch.tensor([prompt + answer[:-1]], device=model.norm.weight.device)
    return model.logits(model(tokens)[0, -len(answer) :])


@torch.no_grad()
def measure(model: seal.Llama, pairs) -> tuple[float, float]:
    """Mean loss, and share of answers right to the last token. A pass for each pair, where
    evaluation generates and judges: stricter, and much cheaper."""
    losses, right = [], 0
    for prompt, answer in pairs:
        logits = answer_logits(model, prompt, answer)  # (A, V)
        target = torch.tensor(answer, device=logits.device)
        losses.append(F.cross_entropy(logits, target).item())
        right += bool((logits.argmax(-1) == target).all())
    return sum(losses) / len(pairs), right / len(pairs)


def gains_by_gradient(model: seal.Llama, pairs, sites) -> list[dict]:
    """The gain in loss of each site, to first order: L(0) - L(1) is about -dL/ds."""
    slopes = [torch.zeros_like(s) for s in model.scales()]
    for pair in tqdm(pairs, desc="gradients", unit="prompt"):
        loss = seal.answer_loss(model, *pair)
        for slope, grad in zip(slopes, torch.autograd.grad(loss, model.scales())):
            slope += grad / len(pairs)
    return [{"loss": -slopes[layer][i].item()} for layer, i in sites]


@torch.no_grad()
def gains_by_pruning(model: seal.Llama, pairs, sites, gains: list[dict], keep) -> None:
    """Append the gains of the sites that are not in `gains` yet, each pruned in turn."""
    loss, accuracy = measure(model, pairs)
    for layer, i in tqdm(sites[len(gains) :], desc="pruning", unit="site"):
        model.scales()[layer][i] = 0.0
        without, right = measure(model, pairs)
        model.scales()[layer][i] = 1.0
        gains.append({"loss": without - loss, "accuracy": accuracy - right})
        keep()


def all_gains(path, about: dict, how, model, pairs: dict, sites) -> dict:
    """{how: {length: a gain for each site}}, kept in the file as it grows."""
    saved = seal.read_json(path) if path else {}
    if saved and about != {key: saved.get(key) for key in about}:
        raise UserError(f"{path}: is of another run; give its flags, or another name")
    gains = saved.get("gains", {})

    def keep():
        if path:
            seal.write_json(path, about | {"gains": gains})

    for kind in how:
        for length in pairs:
            done = gains.setdefault(kind, {}).setdefault(str(length), [])
            if kind == "prune" and len(done) < len(sites):
                gains_by_pruning(model, pairs[length], sites, done, keep)
            elif not done:
                done += gains_by_gradient(model, pairs[length], sites)
    keep()
    return gains


def quadrants(like: list[Tensor], sites, gains, low: float, high: float) -> dict:
    """Scales by name, shaped as `like`, from the gains at two lengths."""
    variants = {}
    for name, harmful, helpful in (
        ("base", 1, 1),
        (f"harmful x {low:g}", low, 1),
        (f"helpful x {high:g}", 1, high),
        ("both", low, high),
    ):
        variants[name] = [torch.ones_like(s) for s in like]
        for (layer, i), short, long in zip(sites, *gains):
            if short < 0 and long < 0:
                variants[name][layer][i] = harmful
            elif short > 0 and long > 0:
                variants[name][layer][i] = helpful
    return variants


# --------------------------------------------------------------------------------------
# The table and the picture
# --------------------------------------------------------------------------------------


def plot(path, names, lengths, gains, unit: str, maps: list) -> None:
    """The paper's figure 2, gains at two lengths, and maps of layers x heads: (title,
    values (L, H), middle, label), blue above the middle, red below."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels, (x, y) = 1 + len(maps), gains
    figure = plt.figure(figsize=(4.6 * panels, 3.8), layout="constrained")  # inches
    ax = figure.add_subplot(1, panels, 1)
    ax.axhline(0, color="#999999", linewidth=0.8)
    ax.axvline(0, color="#999999", linewidth=0.8)
    reach = max(map(abs, y)) or 1.0
    ax.scatter(x, y, c=y, cmap="RdBu", vmin=-reach, vmax=reach, edgecolors="#777777", s=24)
    order = sorted(range(len(y)), key=y.__getitem__)
    for i in order[:2] + order[-2:]:
        ax.annotate(names[i], (x[i], y[i]), (3, 3), textcoords="offset points", fontsize=8)
    x_label, y_label = (f"{unit}, {length:,} tokens" for length in lengths)
    ax.set(title="top right: helpful at both", xlabel=x_label, ylabel=y_label)
    for n, (title, values, middle, label) in enumerate(maps):
        ax = figure.add_subplot(1, panels, 2 + n)
        reach = (values - middle).abs().max().item() or 1.0
        ends = {"vmin": middle - reach, "vmax": middle + reach}
        image = ax.imshow(values, cmap="RdBu", aspect="auto", **ends)
        ax.set(title=title, xlabel="head", ylabel="layer")
        ax.yaxis.get_major_locator().set_params(integer=True)
        figure.colorbar(image, ax=ax, label=label)
    with seal.whole_file(path) as unfinished:
        figure.savefig(unfinished, format="png", dpi=110)
    plt.close(figure)


def ranking(names, lengths, gains, loss) -> str:
    """The ten most helpful and the ten most harmful at the second length; its losses tell
    equal accuracies apart."""
    x, y = gains
    order, rows = sorted(range(len(y)), key=lambda i: (y[i], loss[i])), []
    for good, bad in zip(order[::-1][:10], order[:10]):
        rows.append([names[good], x[good], y[good], names[bad], x[bad], y[bad]])
    return tabulate(rows, ["helpful", *lengths, "harmful", *lengths], floatfmt="+.4f")


# --------------------------------------------------------------------------------------
# The command
# --------------------------------------------------------------------------------------


def find_sites(config: seal.Config, channels: tuple | None) -> tuple[list, list]:
    """What is pruned, and the names: all heads, or the channels of one."""
    H, d = config.num_attention_heads, config.head_dim
    sites = [(layer, head) for layer in range(config.num_hidden_layers) for head in range(H)]
    if not channels:
        return sites, [f"L{layer}H{head}" for layer, head in sites]
    layer, head = channels
    if channels not in sites:
        raise UserError(f"--channels {layer}.{head}: there is no such layer and head")
    return [(layer, head * d + c) for c in range(d)], [f"channel {c}" for c in range(d)]


def draw(run: seal.Run, tokenizer, lengths, split: str) -> dict:
    """{length: samples}"""
    return {n: seal.make_samples(run, tokenizer, n, run.prompts, split) for n in lengths}


def try_quadrants(run: seal.Run, model, tokenizer, samples: dict, variants: dict) -> dict:
    """{name: a cell per length}, from answers generated with each variant's scales."""
    results = {}
    for name, scales in variants.items():
        model.set_scales(scales)
        results[name] = []
        for length, prompts in samples.items():
            cell = seal.evaluate(model, tokenizer, prompts, run.max_new_tokens, name)
            results[name].append({"length": length, "depth": None} | cell)
    return results


def layer_and_head(text: str) -> tuple[int, int]:
    layer, head = text.split(".")
    return int(layer), int(head)


def low_and_high(text: str) -> tuple[float, float]:
    low, high = text.split(",")
    return float(low), float(high)


def main(arguments=None) -> None:
    parser = seal.Parser(prog="extras.heads", description=__doc__.splitlines()[0])
    parser.add_flags(FLAGS)
    parser.add_argument("--how", default="gradient", choices=["gradient", "prune", "both"])
    parser.add_argument("--channels", metavar="L.H", type=layer_and_head)
    parser.add_argument("--quadrants", metavar="LOW,HIGH", type=low_and_high)
    parser.add_argument("--top", type=int, help="the N that the gradient ranks first and last")
    args = parser.parse_args(arguments)
    run = seal.Run(**{name: getattr(args, name) for name in FLAGS})
    model, tokenizer, run = seal.open_checkpoint(run)
    learned = model.scales()
    sites, names = find_sites(model.config, args.channels)
    end = seal.full_length(model.config)
    lengths = run.lengths or [round(0.9 * end), end]  # the paper's 28K and 31K of 32K
    if len(lengths) != 2:
        raise UserError("--lengths: must be two, A,B")

    samples = draw(run, tokenizer, lengths, "heads")
    pairs = {n: [tokenizer.pair(s) for s in samples[n]] for n in samples}
    seen = {str(n): [s.fingerprint() for s in samples[n]] for n in samples}
    about = {"ckpt": run.ckpt, "extend": run.extend, "dtype": run.dtype}
    model.reset_scales("channel" if args.channels else "head")  # gains are the base's
    if args.top:
        first = [gain["loss"] for gain in gains_by_gradient(model, pairs[lengths[1]], sites)]
        order = sorted(range(len(sites)), key=first.__getitem__)
        order = order[: args.top] + order[-args.top :]
        sites, names = [sites[i] for i in order], [names[i] for i in order]
    about |= {"sites": [list(site) for site in sites], "prompts": seen}
    how = ["gradient", "prune"] if args.how == "both" else [args.how]
    gains = all_gains(run.json, about, how, model, pairs, sites)

    def at_both(kind, key):
        return [[gain[key] for gain in gains[kind][str(n)]] for n in lengths]

    best = how[-1]
    unit, shown = "gain in loss (nats)", at_both(best, "loss")
    if best == "prune":
        unit, shown = "gain in accuracy", at_both(best, "accuracy")
    print(f"{unit} by {best}, {len(pairs[lengths[1]])} prompts at each length")
    print(ranking(names, lengths, shown, at_both(best, "loss")[1]))
    if args.how == "both":
        for n, *losses in zip(lengths, at_both("gradient", "loss"), at_both("prune", "loss")):
            rank = spearmanr(*losses).statistic
            print(f"losses by gradient and by pruning, {n} tokens: Spearman {rank:+.2f}")
    maps, H, all_heads = [], model.config.num_attention_heads, not (args.channels or args.top)
    if all_heads:
        title = f"gain by {best}, {lengths[1]:,} tokens"
        maps.append((title, torch.tensor(shown[1]).view(-1, H), 0, unit))
    if run.scales and all_heads:
        means = [s.detach().view(H, -1).mean(1).cpu() for s in learned]
        maps.append(("learned scales", torch.stack(means), 1, "scale, mean of a head"))
        rank = spearmanr(torch.cat(means), shown[1]).statistic
        print(f"learned scales and gains, {lengths[1]} tokens: Spearman {rank:+.2f}")
    if run.plot:
        plot(run.plot, names, lengths, shown, unit, maps)
    if args.quadrants:
        for prints in seen.values():  # nor any that was looked at
            run.trained_on += "," + ",".join(prints)
        samples = draw(run, tokenizer, lengths, "eval")
        variants = quadrants(model.scales(), sites, shown, *args.quadrants)
        print(seal.score_table(try_quadrants(run, model, tokenizer, samples, variants)))


if __name__ == "__main__":
    sys.exit(seal.run("extras.heads", main))
