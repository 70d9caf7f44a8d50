"""Checkpoints in PyTorch's own files, and parts without an index, for seal.py's commands.

    python seal.py train --ckpt FOLDER      # with pytorch_model.bin, or its parts

Opened by seal.py where a folder has neither model.safetensors nor its index. A pickle is
read as data (weights_only): nothing in it is run.
"""

from pathlib import Path

import torch
from torch import Tensor

import seal


def other_files(folder: Path) -> list[Path]:
    """The files of a folder: a .bin, those that its index names, or a whole set of parts.

    UserError where there are none, or where a part is missing.
    """
    parts = sorted(folder.glob("model-*-of-*.safetensors"))  # seal.py has found no more
    if not parts:
        single = folder / "pytorch_model.bin"
        index = seal.read_json(f"{single}.index.json").get("weight_map", {})
        if single.exists():
            return [single]
        if index:
            return [folder / name for name in sorted({*index.values()})]
        parts = sorted(folder.glob("pytorch_model-*-of-*.bin"))
    if not parts:
        raise seal.UserError(f"{folder}: has no model.safetensors or pytorch_model.bin")
    if len(parts) != int(parts[0].stem[-5:]):
        raise seal.UserError(f"{parts[0]}: there are {len(parts)} parts like it, not all")
    return parts


class Pickled:
    """The tensors of a file that torch.save wrote, memory-mapped."""

    def __init__(self, path: Path):
        state = torch.load(path, "cpu", weights_only=True, mmap=True)
        for key in ("state_dict", "model_state_dict", "model", "module"):
            state = state.get(key, state)  # some trainers put them a level down
        self.tensors = {}
        for name, value in state.items():
            if isinstance(value, Tensor):  # and not a count of steps
                self.tensors[name] = value

    def keys(self) -> list[str]:
        return list(self.tensors)

    def get_tensor(self, name: str) -> Tensor:
        return self.tensors[name]
