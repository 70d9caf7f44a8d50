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
over both kinds. A context of C tokens reaches (C - W) * G + W.

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


class SelfExtend:
    """What seal.attend does, with far keys at their group's position."""

    def __init__(self, config: seal.Config, group: int, window: int):
        self.group, self.window = group, window
        self.frequencies, _ = seal.rope_frequencies(config)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (B, H, T, d), k and v (B, G, S, d) -> (B, H, T, d). T = S or T = 1."""
        T, S = q.shape[2], k.shape[2]
        group, window = self.group, self.window
        sharing = q.shape[1] // k.shape[1]  # query heads of a key-value head
        k = k.repeat_interleave(sharing, dim=1)
        v = v.repeat_interleave(sharing, dim=1)
        i = torch.arange(S - T, S, device=q.device)  # positions of the queries
        j = torch.arange(S, device=q.device)         # and of the keys
        far_q = self.move(q, i, i // group + window - window // group)
        far_k = self.move(k, j, j // group)
        parts = []
        for at in range(0, T, CHUNK):
            near_rows = q[:, :, at : at + CHUNK]
            far_rows = far_q[:, :, at : at + CHUNK]
            # Computed again on the way back, or the weights of all would be kept.
            parts.append(recompute(
                self.chunk, S - T + at, near_rows, far_rows, k, far_k, v,
                use_reentrant=False, preserve_rng_state=False,
            ))
        return torch.cat(parts, dim=2)

    def move(self, x: Tensor, old: Tensor, new: Tensor) -> Tensor:
        """x (B, H, n, d), rotated to the positions `old` (n,), as if rotated to `new`."""
        angles = (new - old)[:, None] * self.frequencies.to(x.device)  # (n, d/2)
        cos, sin = angles.cos(), angles.sin()
        return seal.rotate(x, (cos.to(x.dtype), sin.to(x.dtype)))

    def chunk(self, first: int, q, far_q, k, far_k, v) -> Tensor:
        """Attention of C queries (B, H, C, d), which stand at first, first + 1, ..."""
        end, window = first + q.shape[2], self.window
        far_end = max(0, end - window)           # from here on no key is far for any of them
        near_start = max(0, first - window + 1)  # before here none is near
        queries = torch.arange(first, end, device=q.device)
        keys = torch.arange(end, device=q.device)
        back = queries[:, None] - keys  # (C, end)
        far = back >= window
        near = (back >= 0) & (back < window)
        shown = torch.cat((far[:, :far_end], near[:, near_start:]), dim=-1)

        far_scores = far_q @ far_k[:, :, :far_end].mT   # (B, H, C, far keys)
        near_scores = q @ k[:, :, near_start:end].mT    # (B, H, C, near keys)
        scores = torch.cat((far_scores, near_scores), dim=-1)
        wide = torch.promote_types(q.dtype, torch.float32)
        scores = scores.to(wide) / q.shape[-1] ** 0.5
        scores = scores.masked_fill(~shown, -torch.inf)
        weights = scores.softmax(dim=-1)
        values = torch.cat((v[:, :, :far_end], v[:, :, near_start:end]), dim=2)
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
