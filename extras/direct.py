"""What each head says to the answer: direct effects on the logits, base and scaled.

    python seal.py train --mode channel --out channel.safetensors
    python -m extras.direct --scales channel.safetensors --plot direct.png

The paper's section 5. The residual stream at the last position is the sum of what the
token, every head and every feed-forward put there. So the logits are, but for the final
norm, a sum of votes: the output matrix times a component's output. The paper leaves the
norm out, too.

For a prompt that the base answers wrongly and the scaled model rightly, this shows the
votes for the right token and for the base's wrong one, at the first place where the two
answers part. In the picture blue is for the right token and red for the wrong one.

The toy: where a 6 should stand the base says 3, the votes being -2 for the 6 in balance.
With SEAL-C they are +177. Most of it comes from layer 2, its feed-forward (+61) and the
heads 6 and 7 (+40 and +29), which pruning finds helpful, too (extras.heads).
"""

import sys

import torch
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

import seal
from seal import UserError

FLAGS = """
    ckpt scales task extend template haystack length prompts device dtype seed plot
""".split()  # of seal.py, with their meaning there


@torch.no_grad()
def direct_effects(model: seal.Llama, tokens: list[int], targets: list[int]) -> Tensor:
    """What each head and feed-forward adds to the logits of `targets` at the last
    position: (L, H + 1, targets), the feed-forward last."""
    heard, hooks = {}, []

    def hear(module, inputs, output):
        heard[module] = inputs[0][0, -1].float(), output[0, -1].float()

    for layer in model.layers:
        hooks.append(layer.self_attn.o_proj.register_forward_hook(hear))
        hooks.append(layer.mlp.register_forward_hook(hear))
    model(torch.tensor([tokens], device=model.norm.weight.device))
    for hook in hooks:
        hook.remove()

    effects = []
    rows = model.lm_head.weight[targets].float()           # (targets, D)
    H = model.config.num_attention_heads
    for layer in model.layers:
        o_proj = layer.self_attn.o_proj
        y, _ = heard[o_proj]                               # (H * d,): scaled by SEAL
        _, mlp = heard[layer.mlp]                          # (D,)
        by_channel = o_proj.weight.float() * y             # (D, H * d)
        by_head = by_channel.unflatten(1, (H, -1)).sum(2)  # (D, H)
        parts = torch.cat((by_head, mlp[:, None]), dim=1)  # (D, H + 1)
        effects.append(parts.T @ rows.T)                   # (H + 1, targets)
    return torch.stack(effects).cpu()


def find_repaired(model, tokenizer, samples, scales):
    """The first sample that only the scaled model answers, up to where the base goes
    wrong: (sample, tokens so far, [right token, wrong token])."""
    for sample in tqdm(samples, desc="looking for a repaired answer", unit="prompt"):
        prompt, answer = tokenizer.pair(sample)
        model.reset_scales("head")
        base = seal.generate(model, prompt, len(answer))
        model.set_scales(scales)
        if base != answer and seal.generate(model, prompt, len(answer)) == answer:
            at = 0
            while base[at] == answer[at]:
                at += 1
            return sample, prompt + answer[:at], [answer[at], base[at]]
    raise UserError(f"none of {len(samples)} prompts is wrong without the scales and right "
                    "with them; give more --prompts, or another --length")


def margin(effects: Tensor) -> Tensor:
    """Votes for the right token less votes for the wrong: (L, H + 1, 2) -> (L, H + 1)."""
    return effects[..., 0] - effects[..., 1]


def table(stages: dict[str, Tensor], right: str, wrong: str) -> str:
    """Sums over all components, and the five that the scales changed most."""
    shown = {
        f"all, for {right}": [effects[..., 0].sum() for effects in stages.values()],
        f"all, for {wrong}": [effects[..., 1].sum() for effects in stages.values()],
        "all, difference": [margin(effects).sum() for effects in stages.values()],
    }
    change = margin(stages["change"])
    H = change.shape[1] - 1
    for i in change.flatten().abs().argsort(descending=True)[:5].tolist():
        layer, head = divmod(i, H + 1)
        part = f"head {head}" if head < H else "feed-forward"
        votes = [margin(effects)[layer, head] for effects in stages.values()]
        shown[f"layer {layer}, {part}, difference"] = votes
    rows = [[name, *map(float, votes)] for name, votes in shown.items()]
    return tabulate(rows, ["votes", *stages], floatfmt="+.2f")


def plot(path, stages: dict[str, Tensor], right: str, wrong: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = 13.8, 3.8  # inches
    figure, axes = plt.subplots(1, len(stages), figsize=size, layout="constrained")
    limit = max(margin(effects).abs().max().item() for effects in stages.values())
    for ax, (name, effects) in zip(axes, stages.items()):
        votes = margin(effects)
        image = ax.imshow(votes, "RdBu", vmin=-limit, vmax=limit, aspect="auto")
        ax.set(title=f"{name}: {votes.sum():+.1f}", xlabel="head (last: feed-forward)")
        ax.yaxis.get_major_locator().set_params(integer=True)
    axes[0].set_ylabel("layer")
    figure.colorbar(image, ax=axes, label=f"votes for {right} less votes for {wrong}")
    with seal.whole_file(path) as unfinished:
        figure.savefig(unfinished, format="png", dpi=110)
    plt.close(figure)


def main(arguments=None) -> None:
    parser = seal.Parser(prog="extras.direct", description=__doc__.splitlines()[0])
    parser.add_flags(FLAGS)
    run = seal.Run(**vars(parser.parse_args(arguments)))
    if not run.scales:
        raise UserError("--scales: is needed, to compare the base with")
    model, tokenizer, run = seal.open_checkpoint(run)
    scales, length = model.scales(), run.length or seal.full_length(model.config)
    samples = seal.make_samples(run, tokenizer, length, run.prompts, "heads")
    sample, tokens, targets = find_repaired(model, tokenizer, samples, scales)
    stages = {}
    model.reset_scales("head")
    stages["base"] = direct_effects(model, tokens, targets)  # (L, H + 1, 2)
    model.set_scales(scales)
    stages["scaled"] = direct_effects(model, tokens, targets)
    stages["change"] = stages["scaled"] - stages["base"]
    right, wrong = (repr(tokenizer.decode([token])) for token in targets)
    print(f"asked for {sample.answer!r}; where {right} should stand, the base says {wrong}")
    print(table(stages, right, wrong))
    if run.plot:
        plot(run.plot, stages, right, wrong)


if __name__ == "__main__":
    sys.exit(seal.run("extras.direct", main))
