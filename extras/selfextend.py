"""Self-Extend: a context stretched by sharing positions, in seal.py's commands.

    python -m extras.selfextend train --ckpt DIR --mode channel --extend self:6,1024
    python -m extras.selfextend eval  --ckpt DIR --scales scales.safetensors --compare
    python -m extras.selfextend heads --ckpt DIR --extend self:6,1024    (extras.heads)

Beside NTK the paper mends this extension with scales (section 6, table 2): Llama-2-7B-
Chat at 16K tokens, four times its context, goes from 0.10 to 0.56. The method is Jin et
al.'s (2024, arXiv 2401.01325). --extend self:G,W is groups of G tokens and a window W:

    the key is less than W back   both have their own positions, i and j
    W back or more                the key's is j // G, the query's i // G + W - W // G

so that G far keys share a position and no distance is new to the model. One softmax runs
over both kinds. A context of C tokens reaches (C - W) * G + W. With --questions each of
them goes on at the positions behind the record, as in seal.py.

It is no table of frequencies but another attention: extend() below replaces seal.extend,
and puts SelfExtend in the place of seal.attend. Neither weights nor a GGUF file's
metadata can hold it, so such scales are not folded and not exported: plain seal.py and
export_gguf.py do not know their extension, and say so.

The toy, context 512, share of 50 prompts answered right at 464 and 928 tokens: base 0.40
and 0.12, NTK 4 0.48 and 0.22, self:4,256 0.58 and 0.24, with SEAL-C trained at 928 tokens
0.92 and 0.70; self:4,128 without scales 0.66 and 0.34.
"""

import re
import sys
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

import seal

CHUNK = 256  # queries at a time: their weights over all keys are in memory at once
COMMANDS = "train", "eval", "generate"
plain_extend, plain_attend = seal.extend, seal.attend


def extend(config: seal.Config, spec: str) -> seal.Config:
    """seal.extend, which knows self:G,W, too; sets the attention that goes with it."""
    if not spec.startswith("self:"):
        seal.attend = plain_attend
        return plain_extend(config, spec)
    context = config.context
    match = re.fullmatch(r"self:([1-9]\d{0,3}),([1-9]\d{0,7})", spec)
    if not match or int(match[2]) >= context:
        raise seal.UserError(f"--extend {spec}: must be self:G,W, groups of G tokens and a "
                             f"window W below the context, {context}")
    group, window = int(match[1]), int(match[2])
    seal.attend = SelfExtend(config, group, window)
    return replace(config, context=(context - window) * group + window)


def columns(shown: Tensor) -> slice:
    """From the first to the last column of a (rows, columns) that shows anything."""
    found = shown.any(0).nonzero().flatten().tolist()
    if not found:
        return slice(0)
    return slice(found[0], found[-1] + 1)


class SelfExtend:
    """What seal.attend does, with far keys at their group's position."""

    def __init__(self, config: seal.Config, group: int, window: int):
        self.group, self.window = group, window
        self.frequencies, _ = seal.rope_frequencies(config)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """q (B, H, T, d), k and v (B, G, S, d), mask (R, S) -> (B, H, T, d)."""
        T, S, R = q.shape[2], k.shape[2], len(mask)
        P = T - R  # queries before the branches
        group, window = self.group, self.window
        sharing = q.shape[1] // k.shape[1]  # query heads of a key-value head
        k = k.repeat_interleave(sharing, dim=1)
        v = v.repeat_interleave(sharing, dim=1)
        # A token sees what stands before it, and itself: its position + 1 tokens.
        shared = torch.arange(S - R, device=q.device)
        own = mask.sum(1) - 1
        j = torch.cat((shared, own))  # positions of the keys (S,)
        i = j[S - T :]                # and of the queries (T,)
        far_q = self.move(q, i, i // group + window - window // group)
        far_k = self.move(k, j, j // group)
        parts = []
        for at in range(0, T, CHUNK):
            rows = slice(at, at + CHUNK)
            first, end = max(0, at - P), max(0, at - P + CHUNK)
            near_rows = q[:, :, rows]
            far_rows = far_q[:, :, rows]
            # Computed again on the way back, or the weights of all would be kept.
            parts.append(recompute(
                self.chunk, i[rows], j, mask[first:end], near_rows, far_rows, k, far_k, v,
                use_reentrant=False, preserve_rng_state=False,
            ))
        return torch.cat(parts, dim=2)

    def move(self, x: Tensor, old: Tensor, new: Tensor) -> Tensor:
        """x (B, H, n, d), rotated to the positions `old` (n,), as if rotated to `new`."""
        angles = (new - old)[:, None] * self.frequencies.to(x.device)  # (n, d/2)
        cos, sin = angles.cos(), angles.sin()
        return seal.rotate(x, (cos.to(x.dtype), sin.to(x.dtype)))

    def chunk(self, i: Tensor, j: Tensor, mask, q, far_q, k, far_k, v) -> Tensor:
        """Attention of C queries (B, H, C, d) at positions i (C,) to keys at j (S,).

        mask: what those of them that are of branches see, the last ones.
        """
        back = i[:, None] - j  # (C, S)
        seen = back >= 0
        seen[len(i) - len(mask) :] = mask
        far = seen & (back >= self.window)
        near = seen & (back < self.window)
        # The columns of all other keys need not be computed.
        there, here = columns(far), columns(near)
        shown = torch.cat((far[:, there], near[:, here]), dim=-1)

        far_scores = far_q @ far_k[:, :, there].mT  # (B, H, C, far keys)
        near_scores = q @ k[:, :, here].mT          # (B, H, C, near keys)
        scores = torch.cat((far_scores, near_scores), dim=-1)
        wide = torch.promote_types(q.dtype, torch.float32)
        scores = scores.to(wide) / q.shape[-1] ** 0.5
        scores = scores.masked_fill(~shown, -torch.inf)
        weights = scores.softmax(dim=-1)
        values = torch.cat((v[:, :, there], v[:, :, here]), dim=2)
        return weights.to(v.dtype) @ values


def main(arguments=None) -> None:
    from extras import heads

    seal.extend = extend
    seal.COMMANDS = {name: seal.COMMANDS[name] for name in COMMANDS}
    if arguments is None:
        arguments = sys.argv[1:]
    if arguments[:1] == ["heads"]:
        heads.main(arguments[1:])
    else:
        seal.main(arguments)


if __name__ == "__main__":
    sys.exit(seal.exit_status("extras.selfextend", main))
