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

# Of seal.py, with their meaning there.
FLAGS = "ckpt scales task extend template haystack length prompts device dtype seed plot"


@torch.no_grad()
def direct_effects(model: seal.Llama, tokens: list[int], targets: list[int]) -> Tensor:
    """What each head and feed-forward adds to the logits of `targets` at the last position.

    (L, H + 1, targets), float32, the feed-forward last.
    """
    heard, hooks = {}, []

    def hear(module, inputs, output):
        heard[module] = inputs[0][0, -1], output[0, -1]

    for layer in model.layers:
        hooks.append(layer.self_attn.o_proj.register_forward_hook(hear))
        hooks.append(layer.mlp.register_forward_hook(hear))
    model(torch.tensor([tokens], device=model.norm.weight.device))
    for hook in hooks:
        hook.remove()

    effects, H = [], model.config.num_attention_heads
    for layer in model.layers:
        o_proj = layer.self_attn.o_proj
        y, _ = heard[o_proj]                              # (H * d,): scaled by SEAL
        _, mlp = heard[layer.mlp]                         # (D,)
        alone = torch.block_diag(*y.view(H, 1, -1))       # (H, H * d): a head a row
        by_head = o_proj(alone) - o_proj(0 * y)           # (H, D), without the bias
        parts = torch.cat((by_head, mlp[None]))           # (H + 1, D)
        effects.append(model.lm_head(parts)[:, targets])  # (H + 1, targets)
    return torch.stack(effects).float().cpu()


def find_repaired(model, tokenizer, samples, scales):
    """The first sample that only the scaled model answers: (sample, tokens up to where the
    base goes wrong, [right token, wrong token])."""
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
    rows = [[f"all, for {right}"], [f"all, for {wrong}"], ["all, difference"]]
    for effects in stages.values():
        for row, votes in zip(rows, (effects[..., 0], effects[..., 1], margin(effects))):
            row.append(votes.sum().item())
    change = margin(stages["change"])
    H = change.shape[1] - 1
    for i in change.flatten().abs().argsort(descending=True)[:5].tolist():
        layer, head = divmod(i, H + 1)
        part = f"head {head}" if head < H else "feed-forward"
        row = [f"layer {layer}, {part}, difference"]
        for effects in stages.values():
            row.append(margin(effects)[layer, head].item())
        rows.append(row)
    return tabulate(rows, ["votes", *stages], floatfmt="+.2f")


def main(arguments=None) -> None:
    parser = seal.Parser(prog="extras.direct", description=__doc__.splitlines()[0])
    parser.add_flags(FLAGS, required="scales")
    flags = seal.Flags(**vars(parser.parse_args(arguments)))
    if flags.plot:
        seal.check_place(flags.plot)  # before the work
    model, tokenizer, facts = seal.open_checkpoint(flags)
    scales, lengths = model.scales(), flags.length or [seal.longest_prompt(model.config)]
    records = seal.make_records(
        flags.task, tokenizer, lengths, flags.prompts, "heads", flags.seed,
        haystack=flags.haystack, trained_on=facts.trained_on)
    sample, tokens, targets = find_repaired(model, tokenizer, sum(records, []), scales)
    stages = {}
    model.reset_scales("head")
    stages["base"] = direct_effects(model, tokens, targets)  # (L, H + 1, 2)
    model.set_scales(scales)
    stages["scaled"] = direct_effects(model, tokens, targets)
    stages["change"] = stages["scaled"] - stages["base"]
    right, wrong = (repr(tokenizer.decode([token])) for token in targets)
    print(f"asked for {sample.answer!r}; where {right} should stand, the base says {wrong}")
    print(table(stages, right, wrong))
    if flags.plot:
        from extras.plot import plot_votes

        margins = {name: margin(effects) for name, effects in stages.items()}
        plot_votes(flags.plot, margins, right, wrong)


if __name__ == "__main__":
    sys.exit(seal.exit_status("extras.direct", main))
