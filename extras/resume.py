"""A training that was interrupted goes on as if nothing had happened.

    python seal.py train --resume ...    # with the flags that it was begun with

seal.py writes a state beside the scales after every step (the scales, the optimizer's
moments, the losses) and removes it when the run is over. With --resume it opens this file.
"""

from pathlib import Path

import torch

import seal


def read_state(path: Path, run: str) -> dict:
    """What seal.train is to go on from. UserError unless `run`, a digest of the flags and
    of all prompts, is the one that the state was written with."""
    with seal.blame(path):
        saved = torch.load(path, weights_only=True)
        if saved["run"] != run:
            raise ValueError("is of a run with other flags or other prompts")
        return saved
