"""How some checkpoints ask for stretched positions: linear, Llama 3.1's way, YaRN.

    python seal.py train --ckpt llama-3.1-8b ...      config.json says rope_type llama3
    python seal.py train --ckpt DIR --extend yarn:4   the same, asked for by a flag

Opened by seal.py where a config has another rope_type than "default", or a flag asks for
one. Each kind is a function of the plain frequencies freq (d/2,), in radians a token, and
of config.json's own words, that returns other frequencies; stretched() adds what YaRN
does to cos and sin.
The formulas are those of transformers (modeling_rope_utils.py) and llama.cpp.
"""

import math
import re
from dataclasses import replace

import torch
from torch import Tensor

from seal import UserError


def linear(freq: Tensor, rope: dict) -> Tensor:
    """All positions are divided by a factor: LongChat."""
    return freq / rope["factor"]


def llama3(freq: Tensor, rope: dict) -> Tensor:
    """What turns often within the original context stays as it is, the rest is divided."""
    turns = rope["original_max_position_embeddings"] * freq / (2 * math.pi)
    low = rope["low_freq_factor"]
    high = rope["high_freq_factor"]
    kept = (turns - low) / (high - low)
    return mixed(freq, kept, rope["factor"])


def yarn(freq: Tensor, rope: dict) -> Tensor:
    """The same, by a ramp that is linear in a pair's number (arXiv 2309.00071)."""
    pairs = torch.arange(len(freq), dtype=torch.float64, device="cpu")
    turns = rope["original_max_position_embeddings"] / (2 * math.pi)  # of the first pair
    reach = len(freq) / math.log(rope["rope_theta"])  # pairs over which freq falls by e
    fast = rope.get("beta_fast") or 32
    slow = rope.get("beta_slow") or 1
    low = max(0, math.floor(reach * math.log(turns / fast)))
    high = min(2 * len(freq) - 1, math.ceil(reach * math.log(turns / slow)))
    kept = 1 - (pairs - low) / max(0.001, high - low)
    return mixed(freq, kept, rope["factor"])


def mixed(freq: Tensor, kept: Tensor, factor: float) -> Tensor:
    """The share `kept` (clamped to 0..1) of each frequency, and the rest of it divided."""
    kept = kept.clamp(0, 1)
    return kept * freq + (1 - kept) * freq / factor


KINDS = {"linear": linear, "llama3": llama3, "yarn": yarn}


def stretched(freq: Tensor, config) -> tuple[Tensor, float]:
    """The frequencies (d/2,) that the config asks for, and a factor on cos and sin."""
    rope = config.rope_scaling | {"rope_theta": config.rope_theta}
    kind, magnitude = rope["rope_type"], 1.0
    if kind == "yarn":  # attention gets sharper as contexts get longer
        magnitude = rope.get("attention_factor") or 0.1 * math.log(rope["factor"]) + 1
    return KINDS[kind](freq, rope), magnitude


def extend(config, spec: str):
    """seal.extend for linear:4 and yarn:4; UserError for what it does not know."""
    match = re.fullmatch(r"(linear|yarn):([1-9]\d{0,3}(?:\.\d+)?)", spec)
    if not match:
        known = "none, ntk:4, linear:4 or yarn:4, and in extras.selfextend self:6,1024"
        raise UserError(f"--extend {spec}: must be {known}")
    if config.rope_scaling["rope_type"] != "default":
        raise UserError(f"--extend {spec}: the model is stretched already; only ntk can follow")
    rope = {"rope_type": match[1], "factor": float(match[2])}
    rope["original_max_position_embeddings"] = config.context
    return replace(config, context=int(config.context * rope["factor"]), rope_scaling=rope)
