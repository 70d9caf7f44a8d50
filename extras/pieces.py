"""Training in less memory: the feed-forward in pieces of tokens, on the way back, too.

    python -m extras.pieces train --ckpt llama-7b --offload

seal.py's flags and results. Where a layer is recomputed on the way back, most of what it
holds for a moment is the feed-forward's: three tensors that are wider than the layer's
input, and their gradients. But the feed-forward sees one token at a time. So here it takes
4,096 tokens at a time, keeps only their inputs, and computes the rest of a piece again
when its turn comes. The price is the feed-forward's forward pass, once more in each step.

Counted, not run (extras.questions, part `count`): a 7B in bfloat16, a prompt of 31,000
tokens.
"""

import sys

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

import seal

PIECE = 4096  # tokens
plain_forward = seal.FeedForward.forward


def forward(self: seal.FeedForward, x: Tensor) -> Tensor:
    """seal.FeedForward's, x (B, T, D) -> (B, T, D), a piece of the tokens at a time."""
    parts = []
    for part in x.split(PIECE, dim=1):
        if torch.is_grad_enabled():
            part = recompute(plain_forward, self, part, use_reentrant=False)
        else:
            part = plain_forward(self, part)
        parts.append(part)
    return torch.cat(parts, dim=1)


def main(arguments=None) -> None:
    seal.FeedForward.forward = forward
    seal.main(arguments)


if __name__ == "__main__":
    sys.exit(seal.exit_status("extras.pieces", main))
