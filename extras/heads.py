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

import argparse
import re
import sys
from itertools import chain, product

import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

import seal
from seal import UserError

# Of seal.py, with their meaning there.
FLAGS = "ckpt scales task extend template haystack lengths prompts max_new_tokens"
FLAGS += " device dtype seed json plot"
Sites = dict[str, tuple[int, int]]  # by name: the layer, and the index into its scales

# ---- Gains --------------------------------------------------------------------------


def find_sites(config: seal.Config, channels: list | None) -> Sites:
    """What is pruned: all heads, or the channels of one, [layer, head]."""
    sites, H, d = {}, config.num_attention_heads, config.head_dim
    for layer, head in product(range(config.num_hidden_layers), range(H)):
        if not channels:
            sites[f"L{layer}H{head}"] = layer, head
        elif channels == [layer, head]:
            for c in range(d):
                sites[f"channel {c}"] = layer, head * d + c
    if not sites:
        raise UserError("--channels: there is no layer {} with a head {}".format(*channels))
    return sites


@torch.no_grad()
def measure(model: seal.Llama, pairs) -> tuple[float, float]:
    """Mean loss in nats, and the share of answers right to the last token.

    A pass for each pair, where evaluation generates and judges: stricter, and cheaper.
    """
    losses, right = [], 0
    for prompt, answer in pairs:
        tokens = torch.tensor([prompt + answer], device=model.norm.weight.device)
        target = tokens[0, -len(answer) :]
        x = model(tokens[:, :-1])[0, -len(answer) :]  # (A, D), a token ahead each
        logits = model.logits(x)  # (A, V)
        losses.append(F.cross_entropy(logits, target).item())
        right += bool((logits.argmax(-1) == target).all())
    return sum(losses) / len(pairs), right / len(pairs)


def gains_by_gradient(model: seal.Llama, pairs, sites: Sites) -> dict:
    """The gain in loss of each site, to first order: L(0) - L(1) is about -dL/ds."""
    slopes = [torch.zeros_like(s) for s in model.scales()]
    for pair in tqdm(pairs, desc="gradients", unit="prompt"):
        loss = seal.answer_loss(model, [pair])
        grads = torch.autograd.grad(loss, model.scales())
        for slope, grad in zip(slopes, grads):
            slope += grad / len(pairs)
    gains = {}
    for name, (layer, i) in sites.items():
        gains[name] = {"loss": -slopes[layer][i].item()}
    return gains


@torch.no_grad()
def gains_by_pruning(model: seal.Llama, pairs, sites: Sites):
    """Yield (name, gain in loss and in accuracy) of each site: it is pruned and put back."""
    loss, accuracy = measure(model, pairs)
    for name, (layer, i) in tqdm(sites.items(), desc="pruning", unit="site"):
        model.scales()[layer][i] = 0.0
        without, right = measure(model, pairs)
        model.scales()[layer][i] = 1.0
        yield name, {"loss": without - loss, "accuracy": accuracy - right}


class Gains:
    """{how: {length: {a site's name: its gain}}}, kept in a file as it grows."""

    def __init__(self, path, about: dict):
        """about: what has to be the same in a file that is there already."""
        self.path, self.about = path, about
        saved = {}
        if path:
            saved = seal.read_json(path)
        if saved and not about.items() <= saved.items():
            raise UserError(f"{path}: is of another run; give its flags, or another name")
        self.known = saved.get("gains", {})

    def store(self) -> None:
        if self.path:
            seal.write_json(self.path, self.about | {"gains": self.known})

    def find(self, how: str, length: int, model, pairs, sites: Sites) -> None:
        """Measure the sites that are not known yet."""
        lengths = self.known.setdefault(how, {})
        known = lengths.setdefault(str(length), {})
        left = {name: site for name, site in sites.items() if name not in known}
        if how == "gradient" and left:
            known |= gains_by_gradient(model, pairs, left)
        elif left:
            for name, gain in gains_by_pruning(model, pairs, left):
                known[name] = gain
                self.store()
        self.store()

    def column(self, how: str, length: int, key: str, sites: Sites) -> list[float]:
        known = self.known[how][str(length)]
        return [known[name][key] for name in sites]


def quadrants(like: list[Tensor], sites: Sites, gains, low: float, high: float) -> dict:
    """Scales by name, shaped as `like`, from the gains at two lengths."""
    variants = {}
    for name, harmful, helpful in (
        ("base", 1, 1),
        (f"harmful x {low:g}", low, 1),
        (f"helpful x {high:g}", 1, high),
        ("both", low, high),
    ):
        variants[name] = [torch.ones_like(s) for s in like]
        for (layer, i), short, long in zip(sites.values(), *gains):
            if short < 0 and long < 0:
                variants[name][layer][i] = harmful
            elif short > 0 and long > 0:
                variants[name][layer][i] = helpful
    return variants


def ranking(sites: Sites, lengths, gains, losses) -> str:
    """The ten most helpful and the ten most harmful at the second length.

    Sites of equal gains there are told apart by their losses.
    """
    rows = sorted(zip(gains[1], losses, gains[0], sites))
    table = []
    for good, bad in zip(rows[::-1][:10], rows[:10]):
        row = []
        for at_second, _, at_first, name in (good, bad):
            row += [name, at_first, at_second]
        table.append(row)
    return tabulate(table, ["helpful", *lengths, "harmful", *lengths], floatfmt="+.4f")


# ---- The command --------------------------------------------------------------------


def layer_and_head(text: str) -> list[int]:
    if not re.fullmatch(r"\d+\.\d+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not like 2.6")
    return [int(part) for part in text.split(".")]


def low_and_high(text: str) -> list[float]:
    if not re.fullmatch(r"\d*\.?\d+,\d*\.?\d+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not like 0.9,1.1")
    return [float(part) for part in text.split(",")]


def draw(flags: seal.Flags, tokenizer, length: int, split: str, trained_on: str) -> list:
    return seal.make_samples(
        flags.task, tokenizer, length, flags.prompts, split, flags.seed,
        haystack=flags.haystack, trained_on=trained_on)


def try_variants(flags: seal.Flags, model, tokenizer, samples: dict, variants) -> dict:
    """{name: a cell per length}, from answers generated with each variant's scales."""
    results = {}
    for name, scales in variants.items():
        model.set_scales(scales)
        results[name] = []
        for length, prompts in samples.items():
            said = seal.ask(model, tokenizer, prompts, flags.max_new_tokens, name)
            cell = {"length": length, "depth": None} | seal.judge(prompts, said)
            results[name].append(cell)
    return results


def parse(arguments) -> argparse.Namespace:
    parser = seal.Parser(prog="extras.heads", description=__doc__.splitlines()[0])
    parser.add_flags(FLAGS)
    parser.add_argument("--how", default="gradient", choices=["gradient", "prune", "both"])
    parser.add_argument("--channels", metavar="L.H", type=layer_and_head)
    parser.add_argument("--quadrants", metavar="LOW,HIGH", type=low_and_high)
    parser.add_argument("--top", type=int, help="the N that the gradient ranks first and last")
    return parser.parse_args(arguments)


def main(arguments=None) -> None:
    args = parse(arguments)
    flags = seal.Flags(**{name: getattr(args, name) for name in FLAGS.split()})
    for path in filter(None, (flags.json, flags.plot)):
        seal.check_place(path)  # before the work
    if flags.lengths and len(flags.lengths) != 2:
        raise UserError("--lengths: must be two, A,B")
    if args.top is not None and args.top < 1:
        raise UserError(f"--top {args.top}: must be 1 or more")
    model, tokenizer, facts = seal.open_checkpoint(flags)
    H = model.config.num_attention_heads
    longest = seal.longest_prompt(model.config)
    lengths = flags.lengths or [round(0.9 * longest), longest]  # the paper's 28K and 31K of 32K
    sites = find_sites(model.config, args.channels)
    learned = model.scales()

    pairs, seen = {}, {}
    for length in lengths:
        samples = draw(flags, tokenizer, length, "heads", facts.trained_on)
        pairs[length] = [tokenizer.pair(s) for s in samples]
        seen[str(length)] = [s.fingerprint() for s in samples]
    about = {"ckpt": flags.ckpt, "extend": facts.extend, "dtype": flags.dtype}
    about |= {"channels": args.channels, "prompts": seen}
    gains = Gains(flags.json, about)
    model.reset_scales("channel" if args.channels else "head")  # gains are the base's
    if args.top:
        last = lengths[1]
        gains.find("gradient", last, model, pairs[last], sites)
        slopes = dict(zip(sites, gains.column("gradient", last, "loss", sites)))
        order = sorted(sites, key=slopes.get)
        first, rest = order[: args.top], order[args.top :]
        sites = {name: sites[name] for name in first + rest[-args.top :]}
    ways = ["gradient", "prune"] if args.how == "both" else [args.how]
    for how, length in product(ways, lengths):
        gains.find(how, length, model, pairs[length], sites)

    best = ways[-1]
    key, unit = "loss", "gain in loss (nats)"
    if best == "prune":
        key, unit = "accuracy", "gain in accuracy"
    shown = [gains.column(best, length, key, sites) for length in lengths]
    losses = gains.column(best, lengths[1], "loss", sites)
    print(f"{unit} by {best}, {len(pairs[lengths[1]])} prompts at each length")
    print(ranking(sites, lengths, shown, losses))
    if args.how == "both":
        for length in lengths:
            both = [gains.column(how, length, "loss", sites) for how in ways]
            rank = spearmanr(*both).statistic
            print(f"losses by gradient and by pruning, {length} tokens: Spearman {rank:+.2f}")
    maps = []
    if not args.channels and not args.top:
        title = f"gain by {best}, {lengths[1]:,} tokens"
        maps.append((title, torch.tensor(shown[1]).view(-1, H), 0, unit))
    if maps and flags.scales:
        means = torch.stack(learned).detach().cpu()
        means = means.unflatten(1, (H, -1)).mean(2)  # (L, H)
        maps.append(("learned scales", means, 1, "scale, mean of a head"))
        rank = spearmanr(means.flatten(), shown[1]).statistic
        print(f"learned scales and gains, {lengths[1]} tokens: Spearman {rank:+.2f}")
    if flags.plot:
        from extras.plot import plot_gains

        plot_gains(flags.plot, list(sites), lengths, shown, unit, maps)
    if args.quadrants:
        # On other prompts than those that were looked at, or trained on.
        known = ",".join([facts.trained_on, *chain(*seen.values())])
        samples = {}
        for length in lengths:
            samples[length] = draw(flags, tokenizer, length, "eval", known)
        variants = quadrants(model.scales(), sites, shown, *args.quadrants)
        results = try_variants(flags, model, tokenizer, samples, variants)
        print(seal.score_table(results))


if __name__ == "__main__":
    sys.exit(seal.exit_status("extras.heads", main))
