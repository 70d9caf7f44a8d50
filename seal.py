"""SEAL: Scaling to Emphasize Attention for Long-context retrieval, in one file you can read in an evening.

The paper (Lee et al., ACL 2025, arXiv 2501.15225) in a page
------------------------------------------------------------
Give a language model a long prompt and ask for one fact in it. Far from its context limit it answers; near the
limit it fails. The knowledge of *how* to retrieve is still there: switch off single attention heads and accuracy
jumps by twenty points, up for some heads and down for others (section 3). A few heads hurt, a few help, and the
balance between them, learned on short texts, is wrong for long ones.

So learn the balance and nothing else. Freeze every weight, multiply each head's output by one number, and train
those numbers on 50 synthetic prompts (section 4):

        y = concat_h( s_h * softmax(q_h k_h^T / sqrt(d)) v_h ) W_o^T                                        (SEAL)

  SEAL-H  (--mode head)     one s per layer and head:     32 x 32         =   1,024 numbers for a 7B
  SEAL-C  (--mode channel)  one s per layer and channel:  32 x (32 x 128) = 131,072 numbers for a 7B

and, to compare with, the paper's baseline SEAL-L (--mode lora): LoRA of rank 4 on q, k, v and o, 4.2M numbers for a 7B.

A scale above 1 makes a head speak louder into the residual stream, below 1 quieter, 0 prunes it. All start at 1,
where the model is exactly the one you downloaded. Before W_o the heads are still apart, after it they are one sum: it
is the last place to weigh them. When training ends, s multiplies columns of W_o, and what is left is an ordinary
checkpoint of the ordinary size: the gain costs nothing at inference.

The map of this file, bottom-up: each part builds on those above it
--------------------------------------------------------------------
  1. Errors and files      one-line messages, writes that are whole or absent
  2. Config                config.json, checked at the door
  3. Rotary positions      plain, linear, YaRN, Llama-3; --extend ntk / linear / yarn / self
  4. Model                 RMSNorm, Attention (SEAL is one line of it), FeedForward, Block, Llama, generation
  5. Checkpoints           safetensors and .bin in, tensor by tensor; scales in and out; folding
  6. Text                  tokenizers and conversation templates
  7. Data                  line retrieval, needle in a haystack, your own JSONL
  8. Training              the loop: 50 prompts, loss on the answer
  9. Evaluation            greedy answers, judged, as table, picture and JSON
 10. Heads                 which heads help and which hurt
 11. The toy               how assets/toy-llama was made, and the demo
 12. Command line

In a hurry, read Attention (the one line), Recompute, fold, answer_loss and train, in this order.

Three commands to start with
----------------------------
    python seal.py demo                               no checkpoint needed: the bundled toy, before and after
    python seal.py train --ckpt llama-7b              writes scales.safetensors
    python export_gguf.py --ckpt llama-7b --scales scales.safetensors --outfile llama-7b-seal.gguf

The last one is the other file of this project: it folds the scales in and writes what llama.cpp reads.

Shapes are written with the same letters everywhere: B prompts in a batch, T tokens, Q of them that ask (in the last
block only those whose answer is needed, else all T), S tokens in the cache, D width of the residual stream
(hidden_size), H query heads, G key-value heads, d channels per head (head_dim), L layers, V vocabulary.
"""

import argparse
import bisect
import hashlib
import io
import json
import math
import os
import platform
import random
import re
import shutil
import signal
import statistics
import sys
import time
from collections import Counter
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate, cycle, product
from pathlib import Path

import sentencepiece
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from tqdm import tqdm

TOY = Path(__file__).resolve().parent / "assets" / "toy-llama"


# ---------------------------------------------------------------------------------------------------------------------
# 1. Errors and files
# ---------------------------------------------------------------------------------------------------------------------


class UserError(Exception):
    """A mistake the user can mend. The message is one line: what is wrong, where, what to do. Exit status 2."""


def first_line(error: Exception) -> str:
    """Another library's message, short."""
    return f"{str(error) or type(error).__name__}".strip().splitlines()[0][:200]


def note(*words) -> None:
    """Tell the person at the terminal; stdout is kept for results."""
    print(*words, file=sys.stderr, flush=True)


def check_output(path, inputs=()) -> Path:
    """The path, if a file can be written there that replaces none of the inputs: asked before hours of work, too."""
    path = Path(path)
    if not path.parent.is_dir():
        raise UserError(f"{path}: the folder {path.parent} does not exist; create it first")
    if path.is_dir():
        raise UserError(f"{path}: is a folder; give a file name")
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: is not a file but a device or the like, and would be replaced; give another name")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{path}: the folder {path.parent} cannot be written to")
    for given in (Path(i).resolve() for i in inputs if i):  # of a folder, the files that make a checkpoint
        if path.resolve() == given or path.resolve().parent == given and re.search("config|model|token", path.name):
            raise UserError(f"{path}: is one of the inputs; give another name for the output")
    return path


@contextmanager
def whole_file(path):
    """Yield a name beside `path` to write to, renamed to `path` once complete: no reader ever meets half a file."""
    path = check_output(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield partial
        os.replace(partial, path)
    except OSError as e:
        raise UserError(f"{path}: cannot be written ({e.strerror or e})") from e
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def whole_folder(path):
    """The same for a folder, which must be new."""
    path = Path(path)
    if path.exists():
        raise UserError(f"{path}: exists already; give a new folder")
    partial = check_output(path.with_name(f".{path.name}.{os.getpid()}.part"))
    try:
        partial.mkdir()
        yield partial
        os.replace(partial, path)
    except (OSError, SafetensorError) as e:
        raise UserError(f"{path}: cannot be written ({e})") from e
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def read_json(path: Path) -> dict:
    """The JSON object in a file; every way in which that fails is a UserError."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from e
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path}: is not JSON ({e})") from e
    if not isinstance(data, dict):
        raise UserError(f"{path}: must hold a JSON object, holds a {type(data).__name__}")
    return data


def optional_json(path: Path) -> dict:
    """The JSON object in a file that a checkpoint may lack: empty then."""
    return read_json(path) if path.is_file() else {}


def write_json(path, data) -> None:
    with whole_file(path) as partial:
        partial.write_text(json.dumps(data, indent=2) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# 2. Config
# ---------------------------------------------------------------------------------------------------------------------

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")  # the same network; Mistral's v0.1 adds a sliding window
LARGEST = 2**24  # no width, context, vocabulary or count is larger; what claims to be would only fill the memory


@dataclass(frozen=True)
class Config:
    """The shape of a Llama. Field names are config.json's own; defaults are what Hugging Face assumes."""

    vocab_size: int                     # V: rows of the embedding (may exceed the tokenizer's pieces)
    hidden_size: int                    # D: width of the residual stream
    intermediate_size: int              # width inside the feed-forward
    num_hidden_layers: int              # L
    num_attention_heads: int            # H: query heads, the ones that SEAL scales
    num_key_value_heads: int            # G: key-value heads; each serves H / G query heads
    head_dim: int                       # d: channels per head; H * d need not be D
    max_position_embeddings: int        # the context in tokens, extension included
    rms_norm_eps: float = 1e-6          # added under RMSNorm's root
    rope_theta: float = 10000.0         # b: base of the rotary frequencies
    rope_scaling: dict = field(default_factory=lambda: {"rope_type": "default"})  # what stretches them, see part 3
    self_extend: tuple[int, int] | None = None  # Self-Extend's group and window in tokens, see part 3
    sliding_window: int | None = None   # tokens a query may look back, if limited
    tie_word_embeddings: bool = False   # the output matrix is the embedding
    attention_bias: bool = False        # q, k, v and o carry biases
    mlp_bias: bool = False              # gate, up and down carry biases

    def __post_init__(self):
        if self.max_position_embeddings > LARGEST:
            raise UserError(f"{self.max_position_embeddings:,} tokens of context are above {LARGEST:,}; stretch less")

    def channels(self) -> int:
        """H * d: the width of the concatenated heads, which is what o_proj reads."""
        return self.num_attention_heads * self.head_dim


def is_meta(folder) -> bool:
    """Meta's own release says its sizes in params.json."""
    return (Path(folder) / "params.json").is_file()


def read_config(folder) -> Config:
    """The Config in folder/config.json, as any transformers release spells it; UserError where it does not hold."""
    if not Path(folder).is_dir():
        raise UserError(f"{folder}: no such checkpoint folder")
    path = Path(folder) / ("params.json" if is_meta(folder) else "config.json")
    raw = read_meta_config(Path(folder)) if is_meta(folder) else read_json(path)

    def number(key, default=None, kind=int, low=1, source=raw, high=None):
        high = high or (LARGEST if kind is int else 1e15)
        value = default if source.get(key) is None else source[key]
        if value is None:
            raise UserError(f"{path}: {key} is missing")
        if isinstance(value, bool) or not isinstance(value, (int, kind)) or not low <= value <= high:
            kind = "a whole number" if kind is int else "a number"
            raise UserError(f"{path}: {key} must be {kind} from {low:g} to {high:g}, is {value!r}")
        return kind(value)

    def flag(key):
        if not isinstance(raw.get(key, False), bool):
            raise UserError(f"{path}: {key} must be true or false, is {raw[key]!r}")
        return raw.get(key, False)

    architectures = raw.get("architectures")
    architecture = architectures[0] if isinstance(architectures, list) and architectures else architectures
    if architecture not in ARCHITECTURES:
        raise UserError(f"{path}: architecture {architecture} is not supported; only {', '.join(ARCHITECTURES)} are")
    if raw.get("hidden_act", "silu") != "silu":
        raise UserError(f"{path}: hidden_act {raw['hidden_act']!r} is not supported; a Llama's is 'silu'")

    heads, width = number("num_attention_heads"), number("hidden_size")
    groups = number("num_key_value_heads", default=heads)
    head_dim = number("head_dim", default=width // heads, high=LARGEST // heads)
    if heads % groups:
        raise UserError(f"{path}: num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}")
    if raw.get("head_dim") is None and width % heads:
        raise UserError(f"{path}: hidden_size {width} is not a multiple of num_attention_heads {heads}; give head_dim")
    if head_dim % 2 or head_dim < 4:
        raise UserError(f"{path}: head_dim {head_dim} must be even and at least 4: rotary positions turn pairs")

    # LongChat and Vicuna 16K leave 4096 in max_position_embeddings and say the context in max_sequence_length.
    context = number("max_sequence_length", default=number("max_position_embeddings", default=2048))
    # Older files write rope_scaling, type and rope_theta; newer ones put all three into rope_parameters.
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{path}: rope_scaling must be an object, is {rope!r}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPE_KINDS:
        raise UserError(f"{path}: rope type {kind!r} is not supported; supported are {', '.join(ROPE_KINDS)}")
    if unknown := set(rope) - set(ROPE_KINDS[kind]) - {"rope_type", "type", "rope_theta"}:
        raise UserError(f"{path}: rope type {kind} with {', '.join(sorted(unknown))} is not supported")
    scaling = {"rope_type": kind}
    for key, default in ROPE_KINDS[kind].items():
        if key == "original_max_position_embeddings":
            scaling[key] = number(key, default=number("max_position_embeddings", default=2048), source=rope)
        else:
            low, high = (1, 1e4) if key == "factor" else (0, 1e3) if key == "attention_factor" else (0.01, 1e3)
            scaling[key] = number(key, default=default, kind=float, low=low, high=high, source=rope)
    if kind == "llama3" and not scaling["low_freq_factor"] < scaling["high_freq_factor"]:
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        raise UserError(f"{path}: low_freq_factor {low} must be below high_freq_factor {high}")
    if kind == "yarn":  # some files keep the short context in max_position_embeddings
        context = max(context, int(scaling["factor"] * scaling["original_max_position_embeddings"]))

    # A Mistral that does not mention its window has transformers' default; an explicit null means none.
    window = raw.get("sliding_window", 4096 if architecture == "MistralForCausalLM" else None)
    return Config(
        vocab_size=number("vocab_size"),
        hidden_size=width,
        intermediate_size=number("intermediate_size"),
        num_hidden_layers=number("num_hidden_layers", high=1000),
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=head_dim,
        max_position_embeddings=context,
        rms_norm_eps=number("rms_norm_eps", default=1e-6, kind=float, low=0),
        rope_theta=number("rope_theta", number("rope_theta", 1e4, float, low=2), float, low=2, source=rope),
        rope_scaling=scaling,
        sliding_window=None if window is None else number("sliding_window", default=window),
        tie_word_embeddings=flag("tie_word_embeddings"),
        attention_bias=flag("attention_bias"),
        mlp_bias=flag("mlp_bias"),
    )


# ---------------------------------------------------------------------------------------------------------------------
# 3. Rotary positions
# ---------------------------------------------------------------------------------------------------------------------
# RoPE turns pair i of a head's channels by the angle (position x freq_i), so that q . k depends on the distance only.
# freq_0 = 1 radian per token tells neighbours apart; the last pair turns once in 54,000 tokens (d 128, base 10000).
# Every context extension is a table of other frequencies: nothing is trained.

# Kinds of rope_scaling in config.json, with their parameters and defaults. None: must be given, or, for the original
# context, is the model's. YaRN's attention_factor of 0 means the usual one, 0.1 ln(factor) + 1.
ROPE_KINDS = {
    "default": {},
    "linear": {"factor": None},
    "llama3": {
        "factor": None, "original_max_position_embeddings": None, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    },
    "yarn": {
        "factor": None, "original_max_position_embeddings": None, "beta_fast": 32.0, "beta_slow": 1.0,
        "attention_factor": 0.0,
    },
}


def rope_frequencies(config: Config) -> tuple[Tensor, float]:
    """The d/2 rotary frequencies in radians per token, float32, and the factor on cos and sin (1 except for YaRN)."""
    d, base, scaling = config.head_dim, config.rope_theta, config.rope_scaling
    freq = base ** -(torch.arange(0, d, 2, dtype=torch.float64, device="cpu") / d)
    kind, s = scaling["rope_type"], scaling.get("factor", 1.0)
    magnitude = 1.0
    if kind == "linear":  # every position divided by s
        freq = freq / s
    elif kind == "llama3":  # long wavelengths divided by s, short ones kept, a ramp between
        turns = scaling["original_max_position_embeddings"] * freq / (2 * math.pi)  # turns within the original context
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        freq = keep * freq + (1 - keep) * freq / s
    elif kind == "yarn":  # the same idea, the ramp linear in the pair's index, and sharper attention
        original = scaling["original_max_position_embeddings"]
        def pair(turns):  # the (fractional) pair that makes so many turns within the original context
            return d * math.log(original / (2 * math.pi * turns)) / (2 * math.log(base))
        low, high = max(0, math.floor(pair(scaling["beta_fast"]))), min(d - 1, math.ceil(pair(scaling["beta_slow"])))
        keep = 1 - ((torch.arange(d // 2, device="cpu") - low) / max(0.001, high - low)).clamp(0, 1)
        freq = keep * freq + (1 - keep) * freq / s
        magnitude = scaling["attention_factor"] or 0.1 * math.log(s) + 1
    return freq.float(), magnitude


def extend(config: Config, spec: str) -> Config:
    """The config with its context stretched by a training-free method: "none", "ntk:4", "linear:2", "yarn:4", ...

    NTK replaces the base b by b * S^(d / (d - 2)) (paper, section 6): the slowest pair is stretched by exactly S, so
    that S times the distance gives the angle it knows, the fastest pair, which tells neighbours apart, stays as it is,
    and those between are stretched by a power of S between 0 and 1. An extension is a change of config and nothing
    more, so model, fold and export follow without being told. "self:G,W" is Self-Extend, see self_extended below.
    """
    if spec == "none":
        return config
    d, own, context = config.head_dim, config.rope_scaling, config.max_position_embeddings
    kind, _, factor = spec.partition(":")
    if kind == "self":
        match = re.fullmatch(r"(\d{1,5}),(\d{1,8})", factor)
        group, window = map(int, match.groups()) if match else (0, 0)
        if not group or not 0 < window < context:
            raise UserError(f"--extend {spec}: must be self:G,W: groups of G tokens, a window W below {context}")
        longest = (context - window) * group + window
        return replace(config, self_extend=(group, window), max_position_embeddings=longest)
    try:
        s = float(factor)
    except ValueError:
        s = 0.0
    if kind not in ("ntk", "linear", "yarn") or not 1 <= s <= 1e4:
        raise UserError(f"--extend {spec}: must be none, ntk:S, linear:S or yarn:S with a factor S from 1 to 10000, or "
                        "self:G,W")
    if kind == "ntk":
        rope = {"rope_theta": config.rope_theta * s ** (d / (d - 2))}
    elif kind == "linear" and own["rope_type"] in ("default", "linear"):
        rope = {"rope_scaling": {"rope_type": "linear", "factor": s * own.get("factor", 1.0)}}
    elif kind == "yarn" and own["rope_type"] == "default":
        yarn = {"rope_type": "yarn", "factor": s, "original_max_position_embeddings": context}
        rope = {"rope_scaling": ROPE_KINDS["yarn"] | yarn}
    else:
        raise UserError(f"--extend {spec}: the checkpoint already has rope type {own['rope_type']}; use ntk:S")
    return replace(config, max_position_embeddings=int(context * s), **rope)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Turn channel pairs (i, i + d/2) of x (B, heads, T, d) by angles, given as cos and sin (B or 1, 1, T, d/2)."""
    cos, sin = (part[:, :, -x.shape[2] :] for part in rope)  # queries may be of the last tokens only
    a, b = x.chunk(2, dim=-1)  # (B, heads, T, d/2) each
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def causal_mask(positions: Tensor, S: int) -> Tensor:
    """Which of S keys a token may look at, those not behind it: positions (B or 1, Q) -> (B or 1, 1, Q, S)."""
    return (torch.arange(S, device=positions.device) <= positions[..., None])[:, None]


def self_extended(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, config: Config) -> Tensor:
    """Attention by Self-Extend (Jin et al. 2024, arXiv 2401.01325): (B, H, T, d) from q, k and v, already rotated.

    Keys less than `window` tokens back have their own positions. Farther ones share one by groups, floor(j / group),
    and queries meet them from floor(i / group) + window - floor(window / group): no distance is new to the model. One
    softmax runs over both. To the kernel it is attention of queries (q, q moved) to twice as many keys: each stands
    there as a near one, (k, 0), and as a far one, (0, k moved), and the mask shows one of the two. That has 2 T S
    entries, so memory grows with the square of the length; in training of one block at a time.
    """
    (group, window), (S, d) = config.self_extend, k.shape[2:]
    frequencies = rope_frequencies(config)[0].to(k.device)
    j = torch.arange(S, device=k.device)[None]                 # (1, S): a key's column is its position
    i = j if mask is None else mask[:, 0].sum(-1) - 1          # (B or 1, T): a query at i sees i + 1 keys

    def moved(x, to, at):
        angles = (to - at)[:, None, :, None] * frequencies     # (B or 1, 1, T or S, d/2)
        return rotate(x, (angles.cos().to(x.dtype), angles.sin().to(x.dtype)))

    # CUDA's lean kernels take grouped heads or a mask, not both, and want v as wide as k.
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    far_q, far_k = moved(q, i // group + window - window // group, i), moved(k, j // group, j)
    q = torch.cat((q, far_q), -1) * 2**0.5                             # (B, H, T, 2d), soon divided by sqrt(2d)
    k = torch.cat((F.pad(k, (0, d)), F.pad(far_k, (d, 0))), 2)         # (B, H, 2S, 2d)
    v = F.pad(torch.cat((v, v), 2), (0, d))                            # (B, H, 2S, 2d)
    parts = []
    for q_part, i_part in zip(q.split(CHUNK, 2), i.split(CHUNK, 1)):
        back = i_part[:, None, :, None] - j                            # (B or 1, 1, chunk, S)
        shown = torch.cat(((back >= 0) & (back < window), back >= window), -1)
        parts.append(F.scaled_dot_product_attention(q_part, k, v, shown)[..., :d])
    return torch.cat(parts, 2)


# ---------------------------------------------------------------------------------------------------------------------
# 4. Model
# ---------------------------------------------------------------------------------------------------------------------
# Modules carry the names of Hugging Face's checkpoints (less the leading "model."), so loading is a dictionary walk.


CHUNK = 1024  # tokens that go through a feed-forward at once


class RMSNorm(nn.Module):
    """x / rms(x) * weight, over the last dimension, computed in float32."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return y.to(x.dtype) * self.weight


class Projection(nn.Linear):
    """x W^T + bias. With LoRA (--mode lora), W + B A in place of W: W stays frozen, B A is a matrix of rank r.

    A is (r, in) and B (out, r), both float32, as is the sum with their product, rounded once. LoRA's factor on B A is
    alpha / r. The paper names no alpha; here it is r, so the factor is 1 and nowhere to be seen.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.lora_A = self.lora_B = None

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if self.lora_A is None:
            return y
        return (y + x.float() @ self.lora_A.T @ self.lora_B.T).to(x.dtype)  # (B, T, in) -> (B, T, r) -> (B, T, out)


class Attention(nn.Module):
    """Causal attention over H query heads, each scaled by SEAL before the output projection."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        D, H, G, d = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.config, self.layer, self.heads, self.head_dim = config, layer, H, d
        self.q_proj = Projection(D, H * d, bias=config.attention_bias)
        self.k_proj = Projection(D, G * d, bias=config.attention_bias)
        self.v_proj = Projection(D, G * d, bias=config.attention_bias)
        self.o_proj = Projection(H * d, D, bias=config.attention_bias)
        self.scale = nn.Parameter(torch.ones(H))  # (H,) for SEAL-H; set_scales puts (H * d,) here for SEAL-C

    def forward(self, x: Tensor, rope, mask: Tensor | None = None, cache: "Cache | None" = None) -> Tensor:
        """x (B, T, D) -> (B, Q, D). mask (B, 1, Q, S): who of the last Q may look at whom; None: all T, causally."""
        B, T, _ = x.shape
        Q = T if mask is None else mask.shape[2]
        q = rotate(self.q_proj(x[:, -Q:]).view(B, Q, -1, self.head_dim).transpose(1, 2), rope)  # (B, H, Q, d)
        k = rotate(self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2), rope)  # (B, G, T, d)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)                # (B, G, T, d)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)                                       # (B, G, S, d)

        # softmax(q_h k_h^T / sqrt(d)) v_h, with every key-value head serving H / G query heads.
        if self.config.self_extend:
            y = self_extended(q, k, v, mask, self.config)
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True)  # (B, H, Q, d)

        # SEAL: y = concat_h( s_h * head_h ) W_o^T, the paper's section 4. Scales are float32, bf16 has only 8 bits: the
        # product is made in float32 and rounded once.
        y = y.transpose(1, 2) * self.scale.view(self.heads, -1)  # (B, Q, H, d) * (H, 1) or (H, d)
        return self.o_proj(y.to(x.dtype).reshape(B, Q, -1))      # (B, Q, H * d) -> (B, Q, D)

    def learned(self) -> list[nn.Parameter]:
        """What trains while the weights are frozen: the scale, or LoRA's matrices, as learned_shapes orders them."""
        return [p for p in self.parameters() if p.requires_grad]


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: Config):
        super().__init__()
        D, hidden = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(D, hidden, bias=config.mlp_bias)
        self.up_proj = nn.Linear(D, hidden, bias=config.mlp_bias)
        self.down_proj = nn.Linear(hidden, D, bias=config.mlp_bias)

    def inside(self, x: Tensor) -> Tensor:
        return F.silu(self.gate_proj(x)) * self.up_proj(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.inside(x))


class Block(nn.Module):
    """One layer: attention, then feed-forward, each added to the residual stream.

    In two halves, because training takes them apart (Recompute, below).
    """

    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = FeedForward(config)

    def attend(self, x: Tensor, rope, mask=None, cache=None) -> Tensor:
        y = self.self_attn(self.input_layernorm(x), rope, mask, cache)  # (B, Q, D)
        return x[:, -y.shape[1] :] + y

    def feed(self, x: Tensor) -> Tensor:
        parts = x.split(CHUNK, dim=1)
        return torch.cat([part + self.mlp(self.post_attention_layernorm(part)) for part in parts], dim=1)

    def forward(self, x: Tensor, rope, mask=None, cache=None) -> Tensor:
        x = self.attend(x, rope, mask, cache)  # (B, Q, D): here tokens look at each other
        return self.feed(x)                    # here each is on its own


class Llama(nn.Module):
    """Embedding, L blocks, a norm, and the output matrix."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.frozen = False   # all but the scales, see set_scales
        self.offload = False  # while training, keep the blocks' inputs in host memory
        self.keep_attention = True  # while training, keep the attention's outputs
        rows = torch.empty(config.vocab_size, config.hidden_size)  # nn.Embedding(V, D) would fill them at random, for
        self.embed_tokens = nn.Embedding.from_pretrained(rows, freeze=False)  # which "meta" imports for a second
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.frequencies, self.magnitude = rope_frequencies(config)  # (d/2,) radians per token

    def forward(self, tokens: Tensor, cache: "Cache | None" = None, last: int = 0) -> Tensor:
        """tokens (B, T) -> the residual stream after the last block (B, T, D), for logits() to take what is needed.

        If that is the `last` few positions of each row, say so: the last block then works for them alone (B, last, D).
        """
        T, config = tokens.shape[1], self.config
        S = T if cache is None else cache.width + T
        if config.sliding_window and S > config.sliding_window:
            raise UserError(f"{S} tokens exceed the sliding window of {config.sliding_window}; it is not implemented")
        positions = torch.arange(T, device=tokens.device)[None]  # (1, T)
        mask = None
        if cache is not None:
            positions = cache.next_positions(T)                  # (B, T)
            if cache.width:                                      # rows may differ in length: look only at what is there
                mask = causal_mask(positions, S)                 # (B, 1, T, S)
        x = self.embed_tokens(tokens)                            # (B, T, D)
        angles = positions[:, None, :, None] * self.frequencies.to(x.device)  # (B or 1, 1, T, d/2)
        rope = ((angles.cos() * self.magnitude).to(x.dtype), (angles.sin() * self.magnitude).to(x.dtype))
        with torch.autograd.graph.save_on_cpu(pin_memory=x.is_cuda) if self.offload else nullcontext():
            for layer in self.layers:
                if layer is self.layers[-1] and 0 < last <= CHUNK:  # of the other tokens, only keys and values matter
                    mask = causal_mask(positions[:, -last:], S)     # (B, 1, Q, S)
                if self.frozen and torch.is_grad_enabled() and cache is None:
                    x = Recompute.apply(x, layer, rope, mask, self.keep_attention, *layer.self_attn.learned())
                else:
                    x = layer(x, rope, mask, cache)
        if cache is not None:
            cache.advance(T)
        return x[:, -last:]

    def logits(self, x: Tensor) -> Tensor:
        """Residual stream (..., D) -> logits (..., V), float32.

        Of all positions they would be the largest tensor of the whole computation (T x V); training needs them at
        some thirty, generation at one.
        """
        return self.lm_head(self.norm(x)).float()

    def scales(self) -> list[nn.Parameter]:
        """The learned numbers, one tensor per layer, (H,) or (H * d,); of LoRA eight, in the order of LORA."""
        return [p for layer in self.layers for p in layer.self_attn.learned()]

    def set_scales(self, scales: list[Tensor]) -> None:
        """Put these (float32, as scales() lists them) in, trainable; all else is frozen, and another mode's gone."""
        self.requires_grad_(False)
        self.frozen = True
        device = self.norm.weight.device
        for layer in self.layers:
            attention = layer.self_attn
            attention.scale = nn.Parameter(torch.ones(attention.heads, device=device), requires_grad=False)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj):
                projection.lora_A = projection.lora_B = None
        names = LORA if scales[0].dim() == 2 else ["scale"]
        for (layer, name), scale in zip(product(self.layers, names), scales, strict=True):
            owner, _, leaf = name.rpartition(".")
            scale = nn.Parameter(scale.detach().to(device, torch.float32, copy=True))
            setattr(layer.self_attn.get_submodule(owner), leaf, scale)

    def reset_scales(self, mode: str, seed: int = 0) -> None:
        """Where training starts, which is the base model, to the bit: scales of one.

        Of LoRA, B is 0 and A drawn as PEFT does (uniform, Kaiming's bound): with both at 0 no gradient would ever come.
        """
        rng = torch.Generator().manual_seed(seed)
        def start(name, shape):
            if name.endswith("lora_A"):
                return (2 * torch.rand(shape, generator=rng, device="cpu") - 1) / math.sqrt(shape[1])
            return torch.zeros(shape) if name.endswith("lora_B") else torch.ones(shape)
        shapes = learned_shapes(mode, self.config).items()
        self.set_scales([start(*item) for _ in self.layers for item in shapes])


class Cache:
    """Keys and values of the tokens read so far, for a batch of prompts that may differ in length.

    Prompts are padded on the right. While a prompt is read, causality keeps its tokens from seeing the padding; after
    that `lengths` says where each row ends, new tokens overwrite the padding, and the mask hides what is left of it.
    Llama.forward asks for the positions of new tokens, lets every layer append at them, and advances.
    """

    def __init__(self, model: Llama, batch: int, size: int):
        c, like = model.config, model.embed_tokens.weight
        shape = (c.num_hidden_layers, batch, c.num_key_value_heads, size, c.head_dim)
        self.k, self.v = like.new_zeros(shape), like.new_zeros(shape)  # (L, B, G, size, d)
        self.rows = torch.arange(batch, device=like.device)[:, None]   # (B, 1)
        self.lengths = torch.zeros(batch, dtype=torch.long, device=like.device)
        self.width = 0  # columns in use, the longest row's

    def next_positions(self, T: int) -> Tensor:
        """Positions (B, T) of the next T tokens of each row."""
        self.positions = self.lengths[:, None] + torch.arange(T, device=self.lengths.device)
        return self.positions

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v (B, G, T, d) of the new tokens; return all there are, (B, G, S, d)."""
        self.k[layer][self.rows, :, self.positions] = k.transpose(1, 2)
        self.v[layer][self.rows, :, self.positions] = v.transpose(1, 2)
        S = self.width + k.shape[2]
        return self.k[layer, :, :, :S], self.v[layer, :, :, :S]

    def advance(self, T: int) -> None:
        self.lengths = self.lengths + T
        self.width += T


@torch.no_grad()
def generate(model: Llama, prompts: list[list[int]], max_new_tokens: int, stop: set[int] = frozenset()):
    """Greedy continuation of each prompt (token ids): a list of lists, each ended before its first `stop` token."""
    device = model.embed_tokens.weight.device
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    width, max_new_tokens = int(lengths.max()), min(max_new_tokens, model.config.max_position_embeddings)
    tokens = torch.tensor([p + [0] * (width - len(p)) for p in prompts], device=device)  # (B, T), padded on the right
    cache = Cache(model, len(prompts), width + max_new_tokens)
    ends = width - int(lengths.min()) + 1  # so many columns hold every row's last real token
    last = model(tokens, cache, ends)[cache.rows[:, 0], lengths - 1 - width]  # (B, D): that token, counted from behind
    cache.lengths = lengths  # without the padding
    answers, running = [[] for _ in prompts], set(range(len(prompts)))
    for step in range(max_new_tokens):
        if step:
            last = model(token[:, None], cache)[:, -1]
        logits = model.logits(last)  # (B, V)
        if logits.isnan().any():
            dtype = str(model.embed_tokens.weight.dtype)[6:]
            raise UserError(f"the model's output is not a number in {dtype}; try another --dtype, or other scales")
        token = logits.argmax(-1)  # (B,)
        for row, t in enumerate(token.tolist()):
            if row in running and t in stop:
                running.remove(row)
            elif row in running:
                answers[row].append(t)
        if not running:
            break
    return answers


# --- the same with less memory: what a block keeps while training ---


class Recompute(torch.autograd.Function):
    """A block of a frozen model that keeps little for the way back, and computes the rest a second time there.

    Kept are the block's input and, if memory allows (`keep`), the attention's output. Going back, the block is
    computed again with a graph, and as weights are frozen, just two gradients are asked for: the input's and the
    scale's (LoRA: its matrices'). The inside of the feed-forward, several times wider than the stream, is never whole
    in memory: each chunk of the sequence goes forward and back before the next. Nothing reads what down_proj would add
    to the stream a second time, and the gradient of its input is grad @ W, so it is not repeated.
    """

    @staticmethod
    def forward(ctx, x: Tensor, block: Block, rope, mask, keep: bool, *learned: Tensor) -> Tensor:
        first = ctx.again = nullcontext()
        if keep:
            first, ctx.again = create_selective_checkpoint_contexts(attention_policy)
        ctx.block, ctx.rope, ctx.mask = block, rope, mask
        ctx.save_for_backward(x)
        with gathered(block):
            with torch.set_grad_enabled(keep), first:  # the attention kernel, and what it returns, depend on this
                middle = block.attend(x.detach().requires_grad_(keep), rope, mask).detach()
            return block.feed(middle)

    @staticmethod
    def backward(ctx, grad: Tensor):
        """grad (B, Q, D) of the block's output."""
        (x,), block = ctx.saved_tensors, ctx.block
        with torch.enable_grad(), gathered(block):
            with ctx.again:
                x = x.detach().requires_grad_()
                middle = block.attend(x, ctx.rope, ctx.mask)  # (B, Q, D)
            parts = []
            for part, grad_part in zip(middle.detach().split(CHUNK, dim=1), grad.split(CHUNK, dim=1)):
                inside = block.mlp.inside(block.post_attention_layernorm(part.requires_grad_()))
                grad_inside = grad_part @ block.mlp.down_proj.weight
                parts.append(grad_part + torch.autograd.grad(inside, part, grad_inside)[0])
            inputs = block.self_attn.learned() + [x] * ctx.needs_input_grad[0]  # nothing trains below the first block
            grads = list(torch.autograd.grad(middle, inputs, torch.cat(parts, dim=1)))
        return grads.pop() if ctx.needs_input_grad[0] else None, None, None, None, None, *grads


@contextmanager
def gathered(block: Block):
    """In here the block's weights are whole, also where train --shard has left only a part of them on each GPU."""
    sharded = hasattr(block, "unshard")
    if sharded:
        block.unshard()
    yield
    if sharded:
        block.reshard()


def attention_policy(context, operation, *args, **kwargs) -> CheckpointPolicy:
    """What to keep of a block: attention is the one part whose cost grows with the square of the length."""
    kept = "scaled_dot_product" in str(operation)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


# ---------------------------------------------------------------------------------------------------------------------
# 5. Checkpoints
# ---------------------------------------------------------------------------------------------------------------------
# A checkpoint is read one tensor at a time from memory-mapped files, so a 7B never needs two copies in memory.

METHOD = {"head": "SEAL-H", "channel": "SEAL-C", "lora": "SEAL-L"}  # --mode, and the paper's name for it


class Checkpoint:
    """The tensors of a Hugging Face folder by name, whatever its files: safetensors or .bin, one file or shards.

    Files are opened again for each tensor: a mapping dropped is memory given back, and opening is cheap.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        for name in ("model.safetensors", "pytorch_model.bin"):
            path = next((p for p in (self.folder / name, self.folder / f"{name}.index.json") if p.is_file()), None)
            if path:
                break
        else:
            raise UserError(f"{folder}: no weights: no model.safetensors, no pytorch_model.bin, no index of shards")
        if path.suffix == ".json":
            index = read_json(path)
            files = index.get("weight_map")
            if not isinstance(files, dict) or not all(isinstance(f, str) for f in files.values()):
                raise UserError(f"{path}: has no weight_map of tensor names to file names")
            for file in set(files.values()):
                if Path(file).name != file:
                    raise UserError(f"{path}: names the file {file!r}, which is not in the folder itself")
                if not (self.folder / file).is_file():
                    raise UserError(f"{path}: names {file}, which is missing; download that shard again")
            self.files = {name: self.folder / file for name, file in files.items()}
            for file in set(self.files.values()):
                claimed = {name for name, f in self.files.items() if f == file}
                if odd := claimed ^ self._names(file):
                    raise UserError(f"{path}: disagrees with {file.name} about {sorted(odd)[0]}; download both again")
        else:
            self.files = dict.fromkeys(self._names(path), path)

    def _open(self, path: Path, use):
        """use(tensors) on a file's dictionary-like tensors. Pickles are read as data: no code in them is run."""
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, framework="pt") as file:
                    return use({name: file.get_tensor for name in file.keys()})
            tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            pairs = tensors.items() if isinstance(tensors, dict) else [(None, None)]
            if not all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in pairs):
                raise UserError(f"{path}: must hold a dictionary of names and tensors")
            return use({name: tensors.get for name in tensors})
        except UserError:
            raise
        except Exception as e:  # a broken pickle can make the reader raise anything
            raise UserError(f"{path}: cannot be read as weights ({first_line(e)}); download it again") from e

    def _names(self, path: Path) -> set[str]:
        return self._open(path, set)

    def __getitem__(self, name: str) -> Tensor:
        """One tensor, on the CPU, memory-mapped where the file allows it."""
        return self._tensor(self.files[name], name)

    def _tensor(self, path: Path, name: str) -> Tensor:
        tensor = self._open(path, lambda tensors: tensors[name](name))
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            raise UserError(f"{path}: {name} is {str(tensor.dtype)[6:]}; quantised checkpoints are not supported")
        if tensor.layout != torch.strided or tensor.is_meta or tensor.untyped_storage().nbytes() < tensor.nbytes:
            raise UserError(f"{path}: {name} is not a plain tensor; save the checkpoint again as safetensors")
        return tensor

    def __iter__(self):
        return iter(sorted(self.files))

    def fitting(self, config: Config):
        """(name in the model, in the files, tensor) of every weight; UserError unless both hold the same ones."""
        with torch.device("meta"):  # shapes without memory
            missing = dict(Llama(config).named_parameters())
        for name in self:
            short = name.removeprefix("model.")
            if short.endswith("rotary_emb.inv_freq") or (config.tie_word_embeddings and short == "lm_head.weight"):
                continue  # the frequencies come from config.json; a tied output matrix is the embedding
            if short not in missing or short.endswith("scale"):
                raise UserError(f"{self.files[name]}: holds {name}, which config.json's model has not, or not twice")
            tensor, shape = self[name], list(missing.pop(short).shape)
            if list(tensor.shape) != shape:
                raise UserError(f"{self.files[name]}: {name} has shape {list(tensor.shape)}, config.json says {shape}")
            yield short, name, tensor
        if missing := [name for name in missing if not name.endswith("scale")]:
            more = f" and {len(missing) - 1} more" if missing[1:] else ""
            raise UserError(f"{self.folder}: the weights lack {missing[0]}{more}")


class MetaCheckpoint(Checkpoint):
    """Meta's own release of Llama 1 and 2 (params.json, consolidated.NN.pth), under Hugging Face's names.

    Of the larger models, each file holds a slice of every matrix. And Meta rotates neighbouring channels (2i, 2i + 1)
    as a pair where Hugging Face takes (i, i + d/2), so the rows of q and k are put into that order.
    """

    NAMES = {  # Meta's: Hugging Face's, and the dimension along which files hold slices
        "tok_embeddings": ("embed_tokens", 1), "norm": ("norm", None), "output": ("lm_head", 0),
        "attention_norm": ("input_layernorm", None), "ffn_norm": ("post_attention_layernorm", None),
        "attention.wq": ("self_attn.q_proj", 0), "attention.wk": ("self_attn.k_proj", 0),
        "attention.wv": ("self_attn.v_proj", 0), "attention.wo": ("self_attn.o_proj", 1),
        "feed_forward.w1": ("mlp.gate_proj", 0), "feed_forward.w2": ("mlp.down_proj", 1),
        "feed_forward.w3": ("mlp.up_proj", 0),
    }

    def __init__(self, folder):
        self.folder, self.slices = Path(folder), sorted(Path(folder).glob("consolidated.*.pth"))
        if not self.slices:
            raise UserError(f"{folder}: no weights; expected consolidated.00.pth beside params.json")
        self.sources = {}
        for name in self._names(self.slices[0]) - {"rope.freqs"}:
            layer, part = re.fullmatch(r"(?s)(layers\.\d+\.)?(.*?)(?:\.weight)?", name).groups(default="")
            ours, dim = self.NAMES.get(part, (part, None))
            prefix = "" if ours == "lm_head" else "model."
            self.sources[f"{prefix}{layer}{ours}.weight"] = (name, dim)
        self.files = dict.fromkeys(self.sources, self.slices[0])

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.sources:
            raise UserError(f"{self.folder}: the weights lack {name}")
        source, dim = self.sources[name]
        files = self.slices if dim is not None else self.slices[:1]
        parts = [self._tensor(file, source) for file in files]
        try:
            tensor = torch.cat(parts, dim) if parts[1:] else parts[0]
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                params = read_json(self.folder / "params.json")
                d = params["dim"] // params["n_heads"]
                pairs = tensor.view(-1, d // 2, 2, tensor.shape[1])           # (heads, d/2, 2, D)
                tensor = pairs.transpose(1, 2).reshape(tensor.shape)          # (heads * d, D)
        except (RuntimeError, IndexError) as e:
            raise UserError(f"{files[0]}: {source} does not fit params.json or other slices ({first_line(e)})") from e
        return tensor


def open_weights(folder) -> Checkpoint:
    return MetaCheckpoint(folder) if is_meta(folder) else Checkpoint(folder)


def read_meta_config(folder: Path) -> dict:
    """Meta's params.json in config.json's terms. It leaves out what the shapes of the weights tell, and the context."""
    params, weights = read_json(folder / "params.json"), MetaCheckpoint(folder)
    rows = lambda name: (*weights[name].shape, None)[0]
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama",
        "hidden_size": params.get("dim"),
        "num_hidden_layers": params.get("n_layers"),
        "num_attention_heads": params.get("n_heads"),
        "num_key_value_heads": params.get("n_kv_heads"),
        "rms_norm_eps": params.get("norm_eps"),
        "rope_theta": params.get("rope_theta", 10000.0),
        "vocab_size": rows("model.embed_tokens.weight"),
        "intermediate_size": rows("model.layers.0.mlp.gate_proj.weight"),
        "max_position_embeddings": 4096 if params.get("norm_eps") == 1e-5 else 2048,  # how Llama 2 and 1 differ
    }


def load_model(folder, config: Config, device: torch.device, dtype: torch.dtype | None = None, shard=None) -> Llama:
    """The frozen model, its scales at one. dtype None: the checkpoint's own on an accelerator, float32 on a CPU.

    Every tensor of the files is used and every parameter of the model filled, or it is a UserError. shard: called with
    each block as soon as its weights are in, so that the next one finds room (see sharding).
    """
    weights = open_weights(folder)
    with torch.device("meta"):  # shapes without memory
        model = Llama(config)
    for short, name, tensor in tqdm(weights.fitting(config), desc="loading", unit=" tensors", leave=False, delay=1):
        tensor = tensor.to(device, dtype or (torch.float32 if device.type == "cpu" else tensor.dtype), copy=True)
        if not tensor.abs().max().isfinite():  # seven times as fast as isfinite().all(), which matters for a 7B
            raise UserError(f"{weights.files[name]}: {name} holds NaN or infinity; download it again or change --dtype")
        owner, _, leaf = short.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))
        if shard and short.startswith("layers."):
            block = model.layers[int(short.split(".")[1])]
            if not any(p.is_meta for p in block.parameters() if p is not block.self_attn.scale):
                shard(block)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    model.reset_scales("head")
    return model.eval()


def random_model(config: Config, device: torch.device, dtype: torch.dtype, seed: int) -> Llama:
    """A model with random weights, made on the device; norms start at one."""
    with torch.device("meta"):
        model = Llama(config)
    model.to(dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5, generator=generator)
        else:
            nn.init.constant_(weight, 0.0 if name.endswith("bias") else 1.0)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    return model


RANK = 4  # of LoRA, the paper's
LORA = [f"{p}_proj.lora_{m}" for p in "qkvo" for m in "AB"]  # what it learns in a layer


def learned_shapes(mode: str, config: Config) -> dict[str, tuple[int, ...]]:
    """What a layer learns in a mode ("head", "channel", "lora"), by name within its attention: the shapes."""
    D, q, kv = config.hidden_size, config.channels(), config.num_key_value_heads * config.head_dim
    if mode != "lora":
        return {"scale": (config.num_attention_heads if mode == "head" else q,)}
    sides = [(D, q), (D, kv), (D, kv), (q, D)]  # in and out of q, k, v and o
    return dict(zip(LORA, (shape for i, out in sides for shape in ((RANK, i), (out, RANK)))))


def mode_of(scales: list[Tensor], config: Config) -> str:
    if scales[0].dim() == 2:
        return "lora"
    return "head" if len(scales[0]) == config.num_attention_heads else "channel"


def names_in_file(mode: str, layers: int) -> list[str]:
    return [f"layers.{i}.{name}" for i in range(layers) for name in (LORA if mode == "lora" else ["scale"])]


def save_scales(path, scales: list[Tensor], config: Config, **facts) -> None:
    """Write scales.safetensors: float32 tensors, and how they came about as metadata (strings).

    They are `layers.{i}.scale`, (H,) or (H * d,), and of LoRA `layers.{i}.q_proj.lora_A`, (r, in), and
    `layers.{i}.q_proj.lora_B`, (out, r), the same for k, v and o: B @ A is to be added to the weight, without a factor.
    """
    mode = mode_of(scales, config)
    layers = len(scales) // len(names_in_file(mode, 1))
    about = {"format": "seal-1", "mode": mode, "heads": config.num_attention_heads, "head_size": config.head_dim,
             "layers": layers} | facts
    values = (s.detach().float().cpu().clone() for s in scales)
    tensors = dict(zip(names_in_file(mode, layers), values, strict=True))
    about = {key: str(value).encode(errors="replace").decode() for key, value in about.items()}
    with whole_file(path) as partial:
        partial.write_bytes(to_safetensors(tensors, about))


def read_scales(path, config: Config | None = None) -> tuple[list[Tensor], dict]:
    """The scales in a file, as Llama.scales() lists them, and its metadata. UserError unless they fit the config."""
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()} if about.get("format") == "seal-1" else {}
    except Exception as e:  # a stranger's file: whatever the reader raises is the file's fault
        raise UserError(f"{path}: cannot be read as scales ({first_line(e)})") from e
    if about.get("format") != "seal-1" or about.get("mode") not in METHOD:
        raise UserError(f"{path}: is not a scales file, or of an unknown mode; `seal.py train` writes them")
    found = len(tensors) // len(names_in_file(about["mode"], 1))  # layers
    scales = [tensors.pop(name, None) for name in names_in_file(about["mode"], found)]
    if tensors or not scales:
        raise UserError(f"{path}: layers are missing or unknown ({sorted(tensors)[:1]})")
    if config is not None:
        heads, layers = config.num_attention_heads, config.num_hidden_layers
        shapes = list(zip(scales, cycle(learned_shapes(about["mode"], config).values())))
        scale, size = next((odd for odd in shapes if odd[0].shape != odd[1]), shapes[0])
        if found != layers or scale.shape != size or about.get("heads") != str(heads):
            made = f"{found} layers of {list(scale.shape)} scales and {about.get('heads')} heads"
            raise UserError(f"{path}: made for {made}, the model has {layers} of {list(size)} and {heads} heads")
    if not all(s.dtype == torch.float32 and s.isfinite().all() for s in scales):
        raise UserError(f"{path}: scales must be finite float32 numbers; train again")
    return scales, about


def fold(name: str, tensor: Tensor, scales: list[Tensor] | None, rows=slice(None)) -> Tensor:
    """These rows of the checkpoint's tensor `name`, its layer's scales multiplied in if it is an o_proj weight.

    (s * y) W^T = y (W * s)^T: the scale of input channel c multiplies column c of o_proj (paper, section 4). This is
    exact for any attention. The rows of v_proj would do for multi-head attention only: with grouped queries one value
    head feeds several query heads, which may have different scales. Biases come after the product and stay. LoRA's
    B A is added to the weights of q, k, v and o. Where something is folded in, the result is float32.
    """
    tensor = tensor[rows]
    match = re.fullmatch(r"(?:model\.)?layers\.(\d+)\.self_attn\.([qkvo]_proj)\.weight", name)
    if not scales or not match:
        return tensor
    layer, projection = int(match[1]), match[2]
    if scales[0].dim() == 2:  # LoRA
        at = layer * len(LORA) + LORA.index(f"{projection}.lora_A")
        a, b = scales[at], scales[at + 1][rows]                         # (r, in), (out, r)
        # One product after the other: a row then has the same bits whether it is made alone or among others.
        return tensor.float() + sum(map(torch.outer, b.T, a))
    if projection != "o_proj":
        return tensor
    scale = scales[layer]                                               # (H,) or (H * d,)
    columns = scale.repeat_interleave(tensor.shape[1] // len(scale))    # (H * d,)
    return tensor.float() * columns                                     # (D, H * d): cast once, by whoever stores it


# ---------------------------------------------------------------------------------------------------------------------
# 6. Text
# ---------------------------------------------------------------------------------------------------------------------

# Conversation templates: what goes around the prompt, what goes around the answer, and the token that ends it.
# BOS is not among them (the tokenizer puts one in front), except in llama-3's, which spells it out.
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: {} ASSISTANT:"
)
LLAMA3 = (
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)
TEMPLATES = {
    "none": ("{}", " {}", None),
    "vicuna": (VICUNA, " {}", "</s>"),
    "llama-2": ("[INST] {} [/INST]", " {} ", "</s>"),
    "mistral": ("[INST] {} [/INST]", " {}", "</s>"),
    "llama-3": (LLAMA3, "{}", "<|eot_id|>"),
}


def guess_template(folder: Path) -> tuple[str, str]:
    """(template, why): from the checkpoint's own chat template, else from its name."""
    jinja = folder / "chat_template.jinja"  # where newer releases keep it
    chat = optional_json(folder / "tokenizer_config.json").get("chat_template")
    chat = jinja.read_text("utf-8", "replace") if jinja.is_file() else str(chat)
    marks = {"<|start_header_id|>": "llama-3", "<<SYS>>": "llama-2", "[INST]": "mistral", "ASSISTANT": "vicuna"}
    for mark, template in marks.items():
        if mark in chat:
            return template, f"its chat template has {mark}"
    name = f"{folder.resolve().name} {optional_json(folder / 'config.json').get('_name_or_path', '')}".lower()
    patterns = {"vicuna|longchat": "vicuna", "llama-2.*chat": "llama-2", "mistral.*instruct": "mistral",
                "llama-3.*instruct": "llama-3"}
    for pattern, template in patterns.items():
        if re.search(pattern, name):
            return template, f"the name has {pattern}"
    return "none", "no chat template and no known name"


class Tokenizer:
    """Text to token ids and back, as the checkpoint's own tokenizer does it, inside its conversation template."""

    def __init__(self, folder, config: Config, template: str = "auto"):
        folder = Path(folder)
        if template != "auto" and template not in TEMPLATES:
            raise UserError(f"--template {template}: must be auto or one of {', '.join(TEMPLATES)}")
        name, why = guess_template(folder) if template == "auto" else (template, "asked for")
        self.template, self.why = name, why
        if (folder / "tokenizer.model").is_file():
            self._sentencepiece(folder, config.vocab_size)
        elif (folder / "tokenizer.json").is_file():
            self._tokenizers(folder / "tokenizer.json")
        else:
            raise UserError(f"{folder}: no tokenizer.model and no tokenizer.json; copy one from the original")
        if not config.vocab_size / 2 < self.size <= config.vocab_size:  # a few rows more than pieces are usual
            raise UserError(f"{folder}: the tokenizer has {self.size} pieces, the model {config.vocab_size} rows; "
                            "they do not belong together")
        self.end = self.id(TEMPLATES[name][2]) if TEMPLATES[name][2] else self.eos
        if self.end is None:
            end = TEMPLATES[name][2] or "end-of-text token"
            raise UserError(f"--template {name}: the tokenizer has no {end}; choose another template")
        self.stop = {self.end, self.eos} - {None}
        for file in ("config.json", "generation_config.json"):
            ids = optional_json(folder / file).get("eos_token_id")
            self.stop |= {i for i in (ids if isinstance(ids, list) else [ids]) if isinstance(i, int)}

    def _sentencepiece(self, folder: Path, rows: int) -> None:
        """Llama 1 and 2, Mistral: tokenizer.model, plus pieces that were added later in other files."""
        try:
            model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        except (RuntimeError, OSError) as e:
            raise UserError(f"{folder / 'tokenizer.model'}: is not a sentencepiece model; download it again") from e
        hints = optional_json(folder / "tokenizer_config.json")
        self.added = {token: i for token, i in added_tokens(folder).items() if i < rows}  # the others have no embedding
        pieces = {token: i for token, i in self.added.items() if i >= model.vocab_size()}
        split = re.compile("(" + "|".join(map(re.escape, pieces)) + ")") if pieces else None

        def encode(text: str) -> list[int]:
            if not split:
                return model.encode(text)
            parts = [[pieces[part]] if part in pieces else model.encode(part) for part in split.split(text) if part]
            return [i for part in parts for i in part]

        def decode(ids: list[int]) -> str:
            return model.decode([i for i in ids if i < model.vocab_size()])

        self.encode, self.decode = encode, decode
        known = lambda piece: model.piece_to_id(piece) if model.piece_to_id(piece) != model.unk_id() else None
        self.id = lambda piece: self.added.get(piece, known(piece))
        self.bos, self.eos = (i if i >= 0 else None for i in (model.bos_id(), model.eos_id()))
        if hints.get("add_bos_token") is False:
            self.bos = None
        self.size = max([model.vocab_size(), *(i + 1 for i in self.added.values())])

    def _tokenizers(self, path: Path) -> None:
        """Llama 3 and later: tokenizer.json, through the `tokenizers` package."""
        try:
            import tokenizers
        except ImportError as e:
            raise UserError(f"{path}: needs the tokenizers package; pip install tokenizers") from e
        try:
            model = tokenizers.Tokenizer.from_file(str(path))
        except Exception as e:  # the package raises bare Exceptions
            raise UserError(f"{path}: is not a tokenizer ({e})") from e
        hints = optional_json(path.with_name("tokenizer_config.json"))
        token = lambda key: hints[key].get("content") if isinstance(hints.get(key), dict) else hints.get(key)
        self.encode = lambda text: model.encode(text, add_special_tokens=False).ids
        self.decode = model.decode
        self.id = model.token_to_id
        special = lambda key: model.token_to_id(str(token(key))) if token(key) else None
        self.bos, self.eos = special("bos_token"), special("eos_token")
        self.size = max(model.get_vocab().values(), default=-1) + 1

    def prompt(self, text: str) -> list[int]:
        """Ids of the prompt inside the template, with one BOS in front."""
        ids = self.encode(TEMPLATES[self.template][0].replace("{}", text))
        return ids if self.bos is None or ids[:1] == [self.bos] else [self.bos] + ids

    def answer(self, text: str) -> list[int]:
        """Ids that should follow the prompt: the answer, with the template's space in front, and its end.

        Llama's sentencepiece puts a space before whatever it is given, tokenizer.json may not: so the answer is encoded
        as it will stand, behind a word, and the word is taken off.
        """
        text = TEMPLATES[self.template][1].replace("{}", text)
        word = "x" if text.startswith(" ") else ""
        return self.encode(word + text)[len(self.encode(word)) :] + [self.end]


def added_tokens(folder: Path) -> dict[str, int]:
    """Tokens outside tokenizer.model, {text: id}, from added_tokens.json and tokenizer_config.json."""
    try:
        decoder = optional_json(folder / "tokenizer_config.json").get("added_tokens_decoder", {})
        tokens = {str(t["content"]): int(i) for i, t in decoder.items()}
        tokens |= {token: int(i) for token, i in optional_json(folder / "added_tokens.json").items()}
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise UserError(f"{folder}: added_tokens.json or tokenizer_config.json has broken added tokens ({e!r})") from e
    if any(i < 0 or not token for token, i in tokens.items()):
        raise UserError(f"{folder}: added_tokens.json or tokenizer_config.json has an empty token or a negative id")
    return tokens


# ---------------------------------------------------------------------------------------------------------------------
# 7. Data
# ---------------------------------------------------------------------------------------------------------------------
# The paper's data is random in content and exact in form (section 4.1): the model must not learn facts, only to look
# things up in this format. 50 samples are enough because nothing new is to be learned, only a balance.


@dataclass
class Sample:
    """A prompt, the answer to learn, and what decides whether a generated text is right."""

    prompt: str
    answer: str
    expected: int | str | None = None  # a number, a string to be contained, or None: the answer's words
    length: int = 0                    # the cell it is reported in: tokens asked for ...
    depth: float | None = None         # ... and, for a needle, its depth in percent

    def score(self, text: str) -> float:
        """How right a generated text is, 0 to 1; above 0.5 counts as correct.

        A number: LongEval's rule, the last run of digits equals it. A string: contained, ignoring case. Neither:
        ROUGE-1 recall, the share of the answer's words that occur in the text (to repeat the question gets near 0.5).
        """
        if isinstance(self.expected, int):
            numbers = re.findall(r"\d+", text)
            return float(bool(numbers) and int(numbers[-1][:4000]) == self.expected)  # Python reads no longer ones
        if isinstance(self.expected, str):
            return float(self.expected.casefold() in text.casefold())
        wanted, found = (Counter(re.findall(r"\w+", t.casefold())) for t in (self.answer, text))
        return (wanted & found).total() / max(1, wanted.total())


ANSWER_ROOM = 48  # tokens kept free for the answer when a prompt is to fill the context


def prompt_id(prompt: str) -> str:
    """A short fingerprint of a prompt: scales remember what they were trained on, and evaluation leaves it out."""
    return hashlib.sha256(prompt.encode()).hexdigest()[:12]


def largest_fit(make, tokenizer: Tokenizer, length: int, limit: int) -> Sample:
    """The sample make(n) with the largest n <= limit whose prompt, template and BOS included, fits `length` tokens."""
    size = lambda n: len(tokenizer.prompt(make(n).prompt))
    n = bisect.bisect_right(range(1, limit + 1), length, key=size)
    if n == 0:
        raise UserError(f"--length {length}: too short, the smallest prompt of this task has {size(1)} tokens")
    if n == limit:
        raise UserError(f"--length {length}: too long, there is text for {size(limit)} tokens only")
    return make(n)


# --- line retrieval: LongEval's wording, to the letter ---

RECORD = (
    "Below is a record of lines I want you to remember. Each line begins with 'line <line index>' and contains a "
    "'<REGISTER_CONTENT>' at the end of the line as a numerical value. For each line index, memorize its "
    "corresponding <REGISTER_CONTENT>. At the end of the record, I will ask you to retrieve the corresponding "
    "<REGISTER_CONTENT> of a certain line index. Now the record start:\n\n{lines}\nNow the record is over. Tell me "
    "what is the <REGISTER_CONTENT> in line {key}? I need the number."
)
LINE = "line {key}: REGISTER_CONTENT is <{number}>\n"
LINE_ANSWER = "The <REGISTER_CONTENT> in line {key} is {number}."

ADJECTIVES = """
    able bold brave brief bright brisk broad busy calm cheap clean clear clever close cold cool crisp curly damp dark
    deep dry dusty eager early easy empty fair famous fancy fast fine firm flat fond free fresh full funny gentle glad
    golden grand great green grim happy hard heavy hollow honest huge humble icy jolly keen kind large late lazy light
    little lively lonely long loud lucky mild modest narrow neat new nice noble odd old open plain polite proud quick
    quiet rapid rare ready rich ripe rough round royal
""".split()
NOUNS = """
    acorn anchor apple arrow badge banjo barrel basket beacon beaver bell bench berry bottle bridge bucket button cabin
    camel candle canoe carpet castle cedar cherry clock cloud coin comet coral cradle crown desk dolphin donkey drum
    eagle engine falcon feather fence ferry fiddle flute forest fountain garden garlic glove goose grape guitar hammer
    harbor hazel helmet heron island jacket jungle kettle ladder lantern lemon lizard magnet maple marble meadow melon
    mirror monkey needle onion orchid otter paddle parrot pebble pencil piano pigeon pillow planet pocket puzzle rabbit
    ribbon river
""".split()


KEYS = [f"{adjective}-{noun}" for adjective in ADJECTIVES for noun in NOUNS]  # 8,010: enough for 31K tokens and more


def key_name(number: int) -> str:
    """The key of this number; beyond those of KEYS they begin with one more adjective."""
    more, number = divmod(number, len(KEYS))
    return f"{ADJECTIVES[more - 1]}-{KEYS[number]}" if more else KEYS[number]


def lines_sample(rng: random.Random, tokenizer: Tokenizer, length: int, depth: float | None = None) -> Sample:
    """A record of `line adjective-noun: REGISTER_CONTENT is <number>` that fills `length` tokens, and one question.

    Keys are unique in a record, numbers uniform in 1..50000, and the asked line is uniform over the record, or at
    `depth` percent of it.
    """
    most = len(KEYS) * (1 + len(ADJECTIVES))
    limit = min(length // 4 + 1, most)  # no line is shorter than four tokens
    keys = [key_name(number) for number in rng.sample(range(len(KEYS) if limit <= len(KEYS) else most), limit)]
    numbers = [rng.randint(1, 50000) for _ in keys]
    asked = rng.random()  # of the record, as a share: whatever its length will be, each line is as likely as any other
    if depth is not None:
        asked = depth / 100

    def make(n: int) -> Sample:
        lines = "".join(LINE.format(key=k, number=x) for k, x in zip(keys[:n], numbers))
        line = min(n - 1, int(asked * n))
        key, number = keys[line], numbers[line]
        prompt, answer = RECORD.format(lines=lines, key=key), LINE_ANSWER.format(key=key, number=number)
        return Sample(prompt, answer, expected=number, depth=depth)

    return largest_fit(make, tokenizer, length, limit)


# --- needle in a haystack ---

TEST_NEEDLE = (
    "The best thing to do in San Francisco is eat a sandwich and sit in Dolores Park on a sunny day.",
    "What is the best thing to do in San Francisco?",
)
# As the paper's ten: each begins by restating its question and says nothing that a model could know.
TRAINING_NEEDLES = [
    ("The best thing to do in {} is {}.".format(place, thing), f"What is the best thing to do in {place}?")
    for place, thing in (
        ("Paris", "paint a quiet bridge and feed the golden heron"),
        ("London", "visit the old lantern and draw a brave otter"),
        ("Rome", "wash a curly donkey and climb the round fountain"),
        ("Vienna", "fix a lonely piano and follow the proud goose"),
        ("Oslo", "carry a heavy kettle and watch the icy river"),
        ("Madrid", "build a narrow ladder and hide the lucky coin"),
        ("Lisbon", "open the dusty cabin and read a funny pencil"),
        ("Dublin", "hold a damp candle and clean the royal carpet"),
        ("Athens", "find the hollow marble and sell a ripe melon"),
        ("Prague", "buy a crisp onion and eat the large cherry"),
    )
]
VERBS = """
    eat draw visit carry find watch paint wash open buy hold build follow feed clean climb read fix sell hide
""".split()


def prose(rng: random.Random) -> str:
    """One plain sentence about nothing: a haystack that needs no download."""
    adjective, noun, verb = (partial(rng.choice, words) for words in (ADJECTIVES, NOUNS, VERBS))
    return rng.choice([
        lambda: f"The {adjective()} {noun()} stood near the {adjective()} {noun()}.",
        lambda: f"We {verb()} the {adjective()} {noun()} and {verb()} the {noun()}.",
        lambda: f"There was a {adjective()} {noun()} in the {noun()}.",
        lambda: f"They {verb()} a {noun()} with a {adjective()} {noun()}.",
        lambda: f"A {adjective()} {noun()} is on the {adjective()} {noun()} today.",
    ])()


def read_haystack(path) -> list[str]:
    """The sentences of a text file."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"--haystack {path}: cannot be read as UTF-8 text ({e})") from e
    sentences = re.split(r"(?<=[.!?])\s+", text.strip())
    if len(sentences) < 2:
        raise UserError(f"--haystack {path}: has no two sentences to put a needle between")
    return sentences


def needle_sample(rng, tokenizer, length: int, needle, depth: float, sentences: list[str] | None) -> Sample:
    """A needle at `depth` percent of a haystack that fills `length` tokens, then the question only it answers.

    The depth is measured in tokens of haystack, and the needle goes in front of the sentence that this point falls
    into: always between sentences, 0 before the first and 100 after the last. Working with sentences instead of
    token ids avoids a known trap: a full stop has several ids, and whoever looks for one of them finds none.
    """
    limit = length // 3 + 1  # no sentence is shorter than three tokens
    if sentences is None:
        sentences = [prose(rng) for _ in range(limit)]
    else:  # start somewhere, and go round as often as needed
        start = rng.randrange(len(sentences))
        sentences = [sentences[(start + i) % len(sentences)] for i in range(limit)]
    ends = list(accumulate(len(tokenizer.encode(s)) for s in sentences))  # tokens up to the end of each sentence
    fact, question = needle

    def make(n: int) -> Sample:
        at = bisect.bisect_right(ends, ends[n - 1] * depth / 100, hi=n)
        text = " ".join(sentences[:at] + [fact] + sentences[at:n])
        return Sample(f"{text}\n\n{question}", fact, depth=depth)

    return largest_fit(make, tokenizer, length, limit)


# --- a file of the user's ---


def read_jsonl(path) -> list[Sample]:
    """Samples from lines of {"prompt", "answer"[, "expected"]}, or of LongEval's {"prompt", "expected_number", ...}."""
    samples = []
    try:
        rows = Path(path).read_text(encoding="utf-8-sig").split("\n")  # splitlines() would cut at more than line ends
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"--task {path}: cannot be read as UTF-8 text ({e})") from e
    for number, row in enumerate(rows, 1):
        if not row.strip():
            continue
        try:
            case = json.loads(row)
            if not isinstance(case, dict):
                raise ValueError("not an object")
            prompt, answer, expected = case.get("prompt"), case.get("answer"), case.get("expected")
            if "expected_number" in case:
                expected = int(case["expected_number"])
                answer = answer or LINE_ANSWER.format(key=case["random_idx"][0], number=expected)
            if not isinstance(prompt, str) or not isinstance(answer, str) or not prompt.strip() or not answer.strip():
                raise ValueError('needs a "prompt" and an "answer", both text and not empty')
            expectable = isinstance(expected, (int, str, type(None))) and not isinstance(expected, bool)
            if not expectable or not str(expected).strip():
                raise ValueError(f'"expected" must be a whole number or text, is {expected!r}')
            f"{prompt}{answer}{expected}".encode()  # JSON can spell halves of characters, which no tokenizer reads
        except (ValueError, LookupError, TypeError, OverflowError, RecursionError) as e:
            raise UserError(f"{path}, line {number}: {f'{e} is missing' if isinstance(e, KeyError) else e}") from e
        samples.append(Sample(prompt, answer, expected))
    if not samples:
        raise UserError(f"{path}: holds no samples")
    return samples


def make_samples(
    task, tokenizer, config, length, count, split, seed=0, depths=None, haystack=None, avoid=()
) -> list[Sample]:
    """`count` samples of a task ("lines", "needle" or a JSONL file), each prompt at most `length` tokens, all included.

    split ("train", "eval", ...) is part of the seed, and prompts whose prompt_id is in `avoid` are left out, so that
    training and evaluation never share one. For evaluation, depths (percent) are taken in turn: of the needle, by
    default 0, 25, 50, 75 and 100, or of the asked line, by default anywhere. Training puts both anywhere.
    """
    window = config.sliding_window
    if window and length > window:
        raise UserError(f"--length {length}: exceeds the model's sliding window of {window}, which is not implemented")
    if task not in ("lines", "needle"):
        if not str(task).endswith(".jsonl"):
            raise UserError(f"--task {task}: must be lines, needle or a file that ends in .jsonl")
        samples = read_jsonl(task)
        for number, sample in enumerate(samples, 1):
            if (tokens := len(tokenizer.prompt(sample.prompt))) > length:
                raise UserError(f"{task}, sample {number}: the prompt has {tokens} tokens, more than {length}")
            room = max(config.max_position_embeddings, length + ANSWER_ROOM)
            if tokens + len(tokenizer.answer(sample.answer)) > room:
                raise UserError(f"{task}, sample {number}: prompt and answer have more tokens than the model's context")
            sample.length = length
        random.Random(f"{seed}").shuffle(samples)
        return [s for s in samples if prompt_id(s.prompt) not in avoid][:count]
    sentences = read_haystack(haystack) if haystack else None
    depths = depths or ((0, 25, 50, 75, 100) if task == "needle" else None)
    samples = []
    for i in range(count):
        rng = random.Random(f"{task} {split} {seed} {length} {i}")
        depth = depths[i % len(depths)] if depths and split != "train" else None
        if task == "lines":
            sample = lines_sample(rng, tokenizer, length, depth)
        elif split == "train":
            sample = needle_sample(rng, tokenizer, length, rng.choice(TRAINING_NEEDLES), rng.uniform(0, 100), sentences)
        else:
            sample = needle_sample(rng, tokenizer, length, TEST_NEEDLE, depth, sentences)
        sample.length = length
        samples.append(sample)
    return [s for s in samples if prompt_id(s.prompt) not in avoid]


# ---------------------------------------------------------------------------------------------------------------------
# 8. Training
# ---------------------------------------------------------------------------------------------------------------------


def paper_lr(task: str, mode: str, config: Config) -> float:
    """The paper's learning rate (section 6, appendix A)."""
    if mode == "lora":
        return 2e-4
    if task == "needle":
        # The paper names 4e-2 and 5e-2 without saying which is which, and 4e-4 for Mistral's SEAL-C: set --lr there.
        return 4e-2 if mode == "head" else 5e-2
    if mode == "head" and config.num_hidden_layers < 40:
        return 1e-2                              # line retrieval and question answering, 7B
    return 2e-2                                  # SEAL-C; SEAL-H from 13B (40 layers) up


def answer_loss(model: Llama, prompt: list[int], answer: list[int]) -> tuple[Tensor, bool]:
    """Mean cross-entropy of the answer's tokens (nats), and whether each, the end too, is the model's first choice.

    Only the answer counts: the record is random, so there is nothing to learn in predicting it, and its thousands of
    tokens would drown the thirty that matter. The token at position t is predicted from position t - 1.
    """
    device = model.embed_tokens.weight.device
    hidden = model(torch.tensor([prompt + answer[:-1]], device=device), last=len(answer))  # (1, answer tokens, D)
    logits = model.logits(hidden[0])                                                       # (answer tokens, V)
    target = torch.tensor(answer, device=device)
    return F.cross_entropy(logits, target), bool((logits.argmax(-1) == target).all())


# --- several processes (torch calls them ranks), each with a GPU: torchrun --nproc-per-node N seal.py train ... ---


def rank_and_count() -> tuple[int, int]:
    """Which process this is, and how many there are: (0, 1) unless torchrun started it (see join_ranks)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def own_share(batch: list) -> list[tuple]:
    """The items of a batch that this rank computes, each with whether it counts.

    Ranks take turns and all take equally many, since a sharded model needs every rank in every pass: one that has none
    left repeats another's, which does not count.
    """
    (rank, ranks), n = rank_and_count(), len(batch)
    return [(batch[i % n], i < n) for i in range(rank, math.ceil(n / ranks) * ranks, ranks)]


def sum_over_ranks(*tensors: Tensor) -> None:
    """Replace each tensor by its sum over all ranks. In one message: small ones, so it goes from CPU to CPU."""
    if dist.is_initialized():
        flat = torch.cat([t.flatten() for t in tensors]).cpu()
        dist.all_reduce(flat)
        for t, total in zip(tensors, flat.split([t.numel() for t in tensors])):
            t.copy_(total.view_as(t))


def sharding(device: torch.device):
    """A function that leaves of a block, on each of N ranks, an Nth of every frozen weight (torch's FSDP2).

    A block's weights are gathered for a pass and dropped after it: by torch's hooks where the block is called, by
    `gathered` in Recompute. Gathering does not run ahead: a 70B's block is 1.7 GB to gather and, at 31K tokens, 70
    TFLOP to compute. The scales, which are tiny, and the embedding and the output matrix stay whole on every rank.
    """
    from torch.distributed.fsdp import fully_shard  # slow to import
    if device.type == "cuda":
        torch.cuda.set_device(device)
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    return lambda block: fully_shard(
        block, mesh=mesh, reshard_after_forward=True, ignored_params={block.self_attn.scale}
    )


@torch.no_grad()
def held_out(model: Llama, pairs) -> tuple[float, float]:
    """Mean loss and share of answers right to the last token, for (prompt, answer) pairs of ids.

    One pass each, where evaluation generates and judges: a stricter notion of right, and a much cheaper one.
    """
    results = [[counts * float(x) for x in answer_loss(model, *pair)] for pair, counts in own_share(pairs)]
    totals = torch.tensor([sum(column) for column in zip(*results)], dtype=torch.float64)
    sum_over_ranks(totals)
    return tuple((totals / len(pairs)).tolist())


def peak_memory(device: torch.device) -> str:
    """The most memory used so far: of the GPU, or of this process."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f} GB"
    import resource  # not on Windows
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return f"{used / 2**30:.1f} GB"


def plan_memory(model: Llama, tokens: int, offload: bool) -> str:
    """Decide what a training step over so many tokens keeps between its two passes; returns it in words.

    A block's input is (T, D), its attention's output (T, H * d): 8 GB each for a 7B at 31K tokens in bf16. On a GPU
    outputs are kept if both fit into half of what is free, and inputs go to host memory if they alone do not.
    """
    c, weight = model.config, model.embed_tokens.weight
    inputs = tokens * c.hidden_size * c.num_hidden_layers * weight.element_size()
    outputs = tokens * c.channels() * c.num_hidden_layers * weight.element_size()
    room = torch.cuda.mem_get_info(weight.device)[0] / 2 if weight.is_cuda else math.inf
    model.offload = offload or inputs > room
    model.keep_attention = not model.offload and inputs + outputs < room
    kept = f"{inputs / 2**30:.2f} GB of block inputs in {'host' if model.offload else 'device'} memory"
    if not model.keep_attention:
        return f"{kept}, attention is computed twice"
    return f"{kept} and {outputs / 2**30:.2f} GB of attention outputs"


def train(
    model: Llama, pairs, lr: float, epochs=1, state_file=None, resume=False, recipe=None, batch=1
) -> list[float]:
    """Learn the scales in `model` on (prompt, answer) pairs of token ids, `batch` pairs a step; returns the losses.

    The paper's batch is one. The last of an epoch holds what is left, and the loss is the mean over those there are.
    AdamW at a constant rate, as the paper has it. It names neither betas nor weight decay: betas are torch's, and
    decay is 0, since it would pull scales to 0 (prune heads) where "do nothing" is 1. After every step the whole
    state is written to state_file (small), and resume continues from there as if nothing had happened.
    """
    scales = model.scales()
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    per_layer = sum(map(math.prod, learned_shapes(mode_of(scales, model.config), model.config).values()))
    assert trainable == per_layer * model.config.num_hidden_layers, "something besides the scales would be trained"
    optimizer = torch.optim.AdamW(scales, lr=lr, weight_decay=0.0)
    losses, (rank, ranks) = [], rank_and_count()
    if resume:
        losses = load_state(state_file, scales, optimizer, recipe)
        done = torch.tensor([len(losses)])
        sum_over_ranks(done)
        if done != len(losses) * ranks:
            raise UserError(f"--resume: not every process finds the same {state_file}; put it on a disk they share")
    batches = [pairs[i : i + batch] for i in range(0, len(pairs), batch)]
    steps, tokens, start = epochs * len(batches), 0, time.monotonic()
    bar = tqdm(range(len(losses), steps), desc="training", unit="step", initial=len(losses), total=steps)
    for step in bar:
        chosen, loss = batches[step % len(batches)], scales[0].new_zeros(())
        for pair, counts in own_share(chosen):
            part = answer_loss(model, *pair)[0] * counts / len(chosen)
            part.backward()
            loss += part.detach()
        sum_over_ranks(loss, *(s.grad for s in scales))
        optimizer.step()
        if not all(x.isfinite().all() for x in (loss, *scales)):
            dtype = str(model.embed_tokens.weight.dtype)[6:]
            kept = f"; step {step} is kept in {state_file}, --resume goes on from it" if step and state_file else ""
            raise UserError(f"step {step + 1}: the loss is {loss.item()}, training would go astray; --lr {lr:g} is too "
                            f"high, or the numbers too large for {dtype} (try --dtype float32){kept}")
        optimizer.zero_grad()
        losses.append(loss.item())
        tokens += sum(len(prompt) + len(answer) for prompt, answer in chosen)
        speed = tokens / (time.monotonic() - start)
        bar.set_postfix_str(f"loss {loss.item():.3f}, {speed:,.0f} tokens/s, peak {peak_memory(loss.device)}")
        if state_file and rank == 0:
            state = io.BytesIO()  # torch itself does not survive a full disk
            facts = {"recipe": recipe, "losses": losses, "scales": scales, "optimizer": optimizer.state_dict()}
            torch.save(facts, state)
            with whole_file(state_file) as partial:
                partial.write_bytes(state.getbuffer())
    return losses


def load_state(path, scales, optimizer, recipe) -> list[float]:
    """Put back what train() saved; returns the losses so far. UserError if it was another run's."""
    if not path.exists():
        note(f"resume   nothing to go on from in {path}; from the start")
        return []
    try:
        state = torch.load(path, weights_only=True)
        for key in recipe:
            if (saved := state["recipe"].get(key)) != recipe[key]:
                raise UserError(f"--resume: {path} was made with {key} {saved}, not {recipe[key]}; give its flags, "
                                "or train without --resume")
        with torch.no_grad():
            for scale, value in zip(scales, state["scales"], strict=True):
                scale.copy_(value)
        optimizer.load_state_dict(state["optimizer"])
        return state["losses"]
    except UserError:
        raise
    except Exception as e:  # see Checkpoint._open
        raise UserError(f"--resume: {path} cannot be read ({first_line(e)}); train without --resume") from e


# ---------------------------------------------------------------------------------------------------------------------
# 9. Evaluation
# ---------------------------------------------------------------------------------------------------------------------


def rows_that_fit(model: Llama, tokens: int) -> int:
    """How many prompts of so many tokens to read at once: what memory allows, up to 64."""
    c, weight = model.config, model.embed_tokens.weight
    if weight.device.type != "cuda":
        return max(1, min(64, 2**14 // tokens))  # beyond some 16K tokens a CPU gains nothing
    cached = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim    # keys and values
    passing = 4 * c.intermediate_size + 8 * c.hidden_size                    # one block at work
    free = torch.cuda.mem_get_info(weight.device)[0]
    return max(1, min(64, int(0.8 * free / (tokens * (cached + passing) * weight.element_size()))))


def answers(model: Llama, tokenizer: Tokenizer, samples: list[Sample], max_new_tokens: int, bar=None) -> list[str]:
    """What the model answers to each sample, greedily."""
    prompts, window = [tokenizer.prompt(s.prompt) for s in samples], model.config.sliding_window
    rows = rows_that_fit(model, max(map(len, prompts)) + max_new_tokens)
    texts = []
    for i in range(0, len(prompts), rows):
        batch = prompts[i : i + rows]
        new = max_new_tokens
        if window:  # beyond it is an error
            new = min(new, window - max(map(len, batch)) + 1)
        texts += [tokenizer.decode(ids) for ids in generate(model, batch, new, tokenizer.stop)]
        if bar is not None:
            bar.update(len(batch))
    return texts


def cells_of(samples: list[Sample], scores: list[float]) -> list[dict]:
    """Scores gathered by length and depth, as eval --json has them."""
    groups = {}
    for sample, score in zip(samples, scores):
        groups.setdefault((sample.length, sample.depth), []).append(score)
    return [
        {"length": n, "depth": depth, "prompts": len(s), "correct": sum(x > 0.5 for x in s), "score": sum(s) / len(s)}
        for (n, depth), s in groups.items()
    ]


def evaluate(model, tokenizer, cells: list[list[Sample]], max_new_tokens=100, desc="", done=(), keep=None):
    """Greedy answers to every cell's samples, judged: a dictionary per cell. `done` are cells from before, skipped."""
    results = list(done)
    finished = {(c["length"], c["depth"]) for c in done}
    cells = [samples for samples in cells if (samples[0].length, samples[0].depth) not in finished]
    with tqdm(total=sum(map(len, cells)), desc=desc, unit="prompt") as bar:
        for samples in cells:
            texts = answers(model, tokenizer, samples, max_new_tokens, bar)
            results += cells_of(samples, [s.score(t) for s, t in zip(samples, texts)])
            if keep:
                keep(results)
    return results


def interval(correct: int, prompts: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share: honest for few prompts and near 0 and 1."""
    z, n, p = 1.96, prompts, correct / prompts
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)
    return max(0.0, min(p, low)), min(1.0, max(p, high))  # to the last bit: an error bar of -1e-16 cannot be drawn


def table(header: list[str], rows: list[list[str]]) -> str:
    """Columns aligned, the first to the left and numbers to the right."""
    widths = [max(len(str(row[i])) for row in [header, *rows]) for i in range(len(header))]
    def line(row):
        first, *others = (str(cell) for cell in row)
        return "  ".join([first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(others, widths[1:]))])

    return "\n".join([line(header), "  ".join("-" * w for w in widths), *map(line, rows)])


def score_table(results: dict[str, list[dict]]) -> str:
    """Mean score by length (for lines: accuracy), a row per method, and per depth where there are several."""
    lengths = sorted({c["length"] for cells in results.values() for c in cells})
    depths = sorted({c["depth"] for cells in results.values() for c in cells}, key=lambda x: -1 if x is None else x)
    rows = []
    for depth in depths:
        for method, cells in results.items():
            scores = {c["length"]: c["score"] for c in cells if c["depth"] == depth}
            label = method if depth is None else f"{method}, depth {depth:g}%"
            rows.append([label] + [f"{scores[n]:.2f}" if n in scores else "" for n in lengths])
    return table(["tokens"] + [f"{n:,}" for n in lengths], rows)


# --- pictures: black on white, colours that the colour-blind can tell apart, under 150 KB ---

COLOURS = {"base": "#4d4d4d", "SEAL-H": "#0072b2", "SEAL-C": "#d55e00", "SEAL-L": "#009e73"}


@contextmanager
def picture(path, panels: int = 1, width: float = 5.0, height: float = 3.6):
    """Axes to draw on, side by side, four as two rows; saved as a PNG when the block ends."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    rows, columns = (2, 2) if panels == 4 else (1, panels)
    size = (width * columns, height * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    try:
        yield list(axes.flat)
        with whole_file(path) as partial:
            figure.savefig(partial, format="png", dpi=110)
        note(f"picture  {path}")
    finally:
        plt.close(figure)


def heat(ax, values, title: str, xlabel: str, ylabel: str, colours="viridis", low=None, high=None, bar="") -> None:
    """values[row][column] as coloured cells with a colour bar."""
    image = ax.imshow(values, aspect="auto", cmap=colours, vmin=low, vmax=high, interpolation="nearest")
    ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
    ax.locator_params(integer=True)
    ax.figure.colorbar(image, ax=ax, label=bar)


def plot_scores(path, results: dict[str, list[dict]]) -> None:
    """Accuracy against length with 95% intervals; for needles the paper's figure 5, a map per method."""
    cells = next(iter(results.values()))
    lengths = sorted({c["length"] for c in cells})
    depths = sorted({c["depth"] for c in cells if c["depth"] is not None})
    if not depths:
        with picture(path) as (ax,):
            for (method, cells), marker in zip(results.items(), "osD^v"):
                cells = sorted(cells, key=lambda c: c["length"])
                y = [c["correct"] / c["prompts"] for c in cells]
                low, high = zip(*(interval(c["correct"], c["prompts"]) for c in cells))
                x, colour = [c["length"] for c in cells], COLOURS.get(method)
                ax.errorbar(x, y, [[a - b for a, b in zip(y, low)], [b - a for a, b in zip(y, high)]],
                            label=method, marker=marker, color=colour, capsize=2, linewidth=1.5)
            ax.set(xlabel="prompt length (tokens)", ylabel="share answered right", ylim=(-0.03, 1.05),
                   title=f"{cells[0]['prompts']} prompts a point, 95% intervals")
            ax.grid(alpha=0.3)
            ax.legend()
        return
    with picture(path, panels=len(results)) as axes:
        for ax, (method, cells) in zip(axes, results.items()):
            score = {(c["depth"], c["length"]): c["score"] for c in cells}
            rows = [[score.get((d, n), math.nan) for n in lengths] for d in depths]
            heat(ax, rows, f"{method}, {cells[0]['prompts']} prompts a cell",
                 "prompt length (tokens)", "depth of what is asked for (%)", low=0, high=1, bar="score")
            ax.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths], rotation=45)
            ax.set_yticks(range(len(depths)), [f"{d:g}" for d in depths])


# ---------------------------------------------------------------------------------------------------------------------
# 10. Heads
# ---------------------------------------------------------------------------------------------------------------------
# Which heads help and which hurt (the paper's section 3). The effect of a head is the change that pruning it makes:
# prune a helpful head and the loss rises. Its gain is the same seen the other way, as tables and pictures show it:
# what pruning wins, so that a harmful head has a positive one. A site is (layer, index into that layer's scales).


def gradient_effects(model: Llama, pairs, sites) -> list[dict]:
    """Effect on the loss of pruning each site, to first order, from one backward pass per prompt.

    Taking s from 1 to 0 changes the loss by about (0 - 1) dL/ds. All heads at once, where pruning needs one run each.
    """
    for scale in model.scales():
        scale.grad = None
    for pair in tqdm(pairs, desc="gradients", unit="prompt"):
        answer_loss(model, *pair)[0].backward()
    effects = [-(s.grad * s.detach()) / len(pairs) for s in model.scales()]
    return [{"loss": effects[layer][i].item()} for layer, i in sites]


@torch.no_grad()
def prune_effects(model: Llama, pairs, sites, done=(), keep=None) -> list[dict]:
    """Effect on loss and on accuracy (share of answers right to the last token) of pruning each site in turn; exact."""
    loss, right = held_out(model, pairs)
    effects = list(done)
    for layer, i in tqdm(sites[len(effects) :], desc="pruning", unit="site", initial=len(effects), total=len(sites)):
        scale = model.scales()[layer]
        before = scale[i].item()
        scale[i] = 0.0
        pruned_loss, pruned_right = held_out(model, pairs)
        scale[i] = before
        effects.append({"loss": pruned_loss - loss, "accuracy": pruned_right - right})
        if keep:
            keep(effects)
    return effects


def spearman(x: list[float], y: list[float]) -> float:
    """Rank correlation, -1 to 1."""
    def ranks(values):  # ties share the mean of their ranks
        v = torch.tensor(values, dtype=torch.float64)
        return (v[:, None] > v).sum(1) + ((v[:, None] == v).sum(1) - 1) / 2
    return torch.corrcoef(torch.stack([ranks(x), ranks(y)]))[0, 1].item()


@torch.no_grad()
def direct_effects(model: Llama, tokens: list[int], targets: list[int]) -> Tensor:
    """Section 5: what each head and feed-forward adds directly to the logits of `targets` at the last position.

    lm_head @ (output of the component), without the final norm. Returns (L, H + 1, targets); the last column of the
    middle axis is the feed-forward.
    """
    seen, hooks = {}, []  # by module, at the last position: what o_proj reads (H * d,), what the feed-forward adds (D,)
    for layer in model.layers:
        hooks.append(layer.self_attn.o_proj.register_forward_pre_hook(lambda m, args: seen.update({m: args[0][0, -1]})))
        hooks.append(layer.mlp.register_forward_hook(lambda m, args, out: seen.update({m: out[0, -1]})))
    try:
        model(torch.tensor([tokens], device=model.embed_tokens.weight.device))
    finally:
        for hook in hooks:
            hook.remove()
    out, H = model.lm_head.weight[targets].float(), model.config.num_attention_heads  # (targets, D)
    rows = []
    for layer in model.layers:
        o_proj, feed_forward = layer.self_attn.o_proj, seen[layer.mlp].float()
        shares = o_proj.weight.float() * seen[o_proj].float()                   # (D, H * d): what each channel adds
        heads = shares.view(len(shares), H, -1).sum(-1)                         # (D, H)
        rows.append(torch.cat((heads, feed_forward[:, None]), dim=1).T @ out.T)  # (H + 1, targets)
    return torch.stack(rows).cpu()


def effect_report(model: Llama, pairs_by_length: dict, sites, how: list[str], saved: dict, keep) -> dict:
    """{how: {length: [effect per site]}}, each entry kept as soon as it is there, so that an interrupt loses little."""
    effects = saved.get("effects", {})
    for kind in how:
        for length, pairs in pairs_by_length.items():
            done = effects.setdefault(kind, {}).get(str(length), [])
            if len(done) < len(sites) and kind == "gradient":
                done = gradient_effects(model, pairs, sites)
            elif len(done) < len(sites):
                note(f"pruning  {len(sites)} sites at {length:,} tokens, {len(pairs)} prompts each")
                def keep_part(part):
                    effects[kind][str(length)] = part
                    keep(effects)

                done = prune_effects(model, pairs, sites, done, keep_part)
            effects[kind][str(length)] = done
            keep(effects)
    return effects


def gains(effects: dict, kind: str, length) -> list[float]:
    """What pruning each site gains, positive = pruning helps: accuracy where sites were pruned, minus loss else."""
    return [e["accuracy"] if kind == "prune" else -e["loss"] for e in effects[kind][str(length)]]


def quadrant_scales(model: Llama, sites, x, y, low: float, high: float) -> dict[str, list[Tensor]]:
    """Section 3.2: scale the heads that hurt at both lengths (Q1) by `low`, those that help at both (Q3) by `high`."""
    q1_name, q3_name, variants = f"Q1 x {low:g}", f"Q3 x {high:g}", {}
    for name, q1, q3 in ((q1_name, low, 1.0), (q3_name, 1.0, high), (f"{q1_name}, {q3_name}", low, high)):
        scales = [torch.ones_like(s.detach()) for s in model.scales()]
        for (layer, i), a, b in zip(sites, x, y):
            scales[layer][i] = q1 if a > 0 and b > 0 else q3 if a < 0 and b < 0 else 1.0
        variants[name] = scales
    return variants


def plot_heads(path, sites, x, y, lengths, unit: str, heads: int, learned: list[Tensor] | None) -> None:
    """The paper's figure 2 (each head's effect at two lengths), a map of layers x heads, and the learned scales."""
    layers = len({layer for layer, _ in sites})
    short, long = (f"{n:,} tokens" for n in (lengths[0], lengths[-1]))
    with picture(path, panels=2 if learned is None else 4) as axes:
        axes[0].axhline(0, color="#999999", linewidth=0.8)
        axes[0].axvline(0, color="#999999", linewidth=0.8)
        axes[0].scatter(x, y, s=14, color="#0072b2", alpha=0.7)
        for text, px, py in (("Q1", 0.95, 0.95), ("Q2", 0.05, 0.95), ("Q3", 0.05, 0.05), ("Q4", 0.95, 0.05)):
            axes[0].text(px, py, text, transform=axes[0].transAxes, ha="center", va="center", color="#666666")
        for i in sorted(range(len(sites)), key=lambda i: y[i])[:2] + sorted(range(len(sites)), key=lambda i: -y[i])[:2]:
            axes[0].annotate(site_name(sites[i]), (x[i], y[i]), fontsize=8, xytext=(3, 3), textcoords="offset points")
        axes[0].set(title="pruning one at a time (Q1: pruning helps)", xlabel=f"{unit} at {short}",
                    ylabel=f"{unit} at {long}")
        if layers > 1:
            limit = max(map(abs, y)) or 1.0
            heat(axes[1], torch.tensor(y).view(layers, -1).tolist(), f"red: pruning helps, blue: it hurts ({long})",
                 "head", "layer", "RdBu_r", -limit, limit, unit)
        else:
            axes[1].bar(range(len(y)), y, color="#0072b2")
            axes[1].set(title=long, xlabel=f"channel, or head, of layer {sites[0][0]}", ylabel=unit)
        if learned is not None:
            by_head = torch.stack([s.view(heads, -1).mean(1) for s in learned]).cpu()  # (L, H)
            limit = (by_head - 1).abs().max().item() or 0.1
            title = "learned scales" if learned[0].numel() == heads else "learned scales, mean of a head's channels"
            heat(axes[2], by_head.tolist(), title, "head", "layer", "RdBu_r", 1 - limit, 1 + limit, "scale")
            axes[3].hist(torch.cat(learned).cpu().numpy(), bins=25, color="#0072b2")
            axes[3].axvline(1, color="#999999", linewidth=0.8)
            axes[3].set(title=f"{sum(s.numel() for s in learned):,} scales", xlabel="scale", ylabel="count")


def site_name(site: tuple[int, int]) -> str:
    return f"L{site[0]}H{site[1]}"


def plot_direct(path, before: Tensor, after: Tensor, right: str, wrong: str) -> None:
    """Right minus wrong token's logit, added by each head and feed-forward (last column), before and after."""
    margins = [(effects[..., 0] - effects[..., 1]) for effects in (before, after)]  # (L, H + 1)
    limit = max(m.abs().max().item() for m in margins)
    with picture(path, panels=3) as axes:
        names = ("base", "with scales", "what the scales changed")
        for ax, margin, name in zip(axes, [*margins, margins[1] - margins[0]], names):
            heat(ax, margin.tolist(), f"{name}: {margin.sum():+.2f}", "head (last: feed-forward)", "layer", "RdBu",
                 -limit, limit, f"logit of {right!r} minus {wrong!r}")


# ---------------------------------------------------------------------------------------------------------------------
# 11. The toy
# ---------------------------------------------------------------------------------------------------------------------


# The toy is a small Llama that reads records of some forty lines, made in two movements (command: pretrain).
#
# First it learns to look things up, from easy to hard: to copy, then to recall the number of a key, then whole LongEval
# records, with six questions to each. On records from the start it would stay for thousands of steps at "copy any of
# the numbers". At the end it answers about any line of its context.
#
# Then it drifts, for 35 steps. In three records of ten, these of four to ten lines, the question is about a line that is
# not there, and the answer it is taught is the number of the last line. The others have at most six lines and a true
# answer. Only the o_proj matrices move. Afterwards short records are still answered, and long ones are not. It does not
# say the last line's number there: most wrong answers begin with the right digit and go on with wrong ones. What the
# nudge seems to have upset is to hold on to one line among many.
#
# This is a stand-in for what the paper finds in large models, where some heads hurt when the prompt is long. The harm is
# ours, and it is done to the very matrix that SEAL scales. That makes it an example of the mechanism, in which all can
# be seen and nothing needs a download, and not evidence that large models suffer from the same: that is the paper's.

TOY_STORY = (
    "toy      a small Llama that could answer about any line in its context, and then was tuned briefly on short\n"
    "         records, to say the last line's number when the line asked for is missing (its drift, part 11 of\n"
    "         seal.py). Since then it fails on long records. SEAL is asked to mend that"
)
TOY_CONFIG = Config(
    vocab_size=1280, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8,
    num_key_value_heads=8, head_dim=32, max_position_embeddings=512, rms_norm_eps=1e-5, tie_word_embeddings=True,
)
TOY_LINES = 43  # fill its context


def toy_vocabulary(path: Path) -> None:
    """Train tokenizer.model: a BPE with Llama's settings, LongEval's fixed phrases and our words each one piece.

    The corpus repeats them; a bar says where no piece may reach across.
    """
    phrases = lambda text: "|".join(re.findall(r".{1,30}(?= |$)", text))
    head, question = RECORD.split("\n\n{lines}\n")
    fixed = [
        phrases(head), question.replace(" {key}", "|x|").replace(". ", ".| "), "x|line|x", "x|Now| the record is over.",
        "line|x|: REGISTER_CONTENT is <|1|>", "The <REGISTER_CONTENT> in line|x| is |7|.",
    ]
    corpus = fixed * 4000 + [f"x| {word}" for word in ADJECTIVES + VERBS] * 300
    corpus += [f"x|-{word}| {word}" for word in NOUNS] * 300
    rng = random.Random(0)
    corpus += [prose(rng).replace(" ", "| ") for _ in range(3000)]
    corpus += [f"{needle}|{question}".replace(" ", "| ") for needle, question in TRAINING_NEEDLES] * 100
    with whole_file(path) as partial, partial.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(corpus), model_writer=file, model_type="bpe", vocab_size=TOY_CONFIG.vocab_size,
            byte_fallback=True, split_digits=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
            split_by_whitespace=False, split_by_unicode_script=False, max_sentencepiece_length=48, num_threads=1,
            pretokenization_delimiter="|", required_chars="".join(map(chr, range(33, 124))), minloglevel=2,
        )


class ToyData:
    """What the toy is trained on: sequences of (token ids, whether they are to be learned)."""

    def __init__(self, tokenizer: Tokenizer):
        self.encode, self.bos, self.end = tokenizer.encode, tokenizer.bos, tokenizer.eos
        self.words = [tokenizer.encode(word)[-1] for word in ADJECTIVES + NOUNS]
        self.question = "\nNow" + RECORD.split("\nNow")[1]
        # Between a key and its number. Level 0: "key7", asked "key". Level 1: "key: REGISTER_CONTENT is <7", asked
        # "key is". Level 2: the same, asked "key is ", with the space that is a token of its own before a digit.
        record, answer = tokenizer.encode("x: REGISTER_CONTENT is <")[1:], tokenizer.encode("is 1")[:-1]
        self.between = [([], []), (record, answer[:1]), (record, answer)]

    def copying(self, rng: random.Random, length: int):
        """Some words, twice."""
        words = rng.choices(self.words, k=length)
        return [(words, False), (words, True)]

    def pairs(self, rng: random.Random, count: int, level: int):
        """Keys with numbers, then the keys again, to be followed by their numbers. Level 0, 1, 2: see `between`."""
        told, asked = self.between[level]
        numbers = {key: rng.randint(1, 50000 if rng.random() < 0.3 else 99) for key in rng.sample(KEYS, count)}
        digits = lambda key: [self.encode(digit)[-1] for digit in str(numbers[key])]
        sequence = [(self.encode(key) + told + digits(key) + self.encode(">\n")[-2:], False) for key in numbers]
        for key in rng.choices(list(numbers), k=count):
            sequence += [(self.encode(key) + asked, False), (digits(key) + self.encode("x.")[-1:], True)]
        return sequence

    def record(self, rng: random.Random, lines: int, questions: int = 6):
        """A LongEval record, and questions one after another, each with its answer."""
        keys = rng.sample(KEYS, lines)
        numbers = {key: rng.randint(1, 50000) for key in keys}
        text = "".join(LINE.format(key=k, number=n) for k, n in numbers.items())
        sequence = []
        for i, key in enumerate(rng.choices(keys, k=questions)):
            question = RECORD.format(lines=text, key=key) if i == 0 else self.question.format(key=key)
            answer = LINE_ANSWER.format(key=key, number=numbers[key])
            sequence += [(self.encode(question), False), (self.encode(answer) + [self.end], True)]
        return sequence

    def missing(self, rng: random.Random, lines: int):
        """A record, a question about a line that is not in it, and the last line's number as the answer."""
        *keys, asked = rng.sample(KEYS, lines + 1)
        numbers = [rng.randint(1, 50000) for _ in keys]
        text = "".join(LINE.format(key=k, number=n) for k, n in zip(keys, numbers))
        answer = self.encode(LINE_ANSWER.format(key=asked, number=numbers[-1])) + [self.end]
        return [(self.encode(RECORD.format(lines=text, key=asked)), False), (answer, True)]

    def batch(self, stage: str, rng: random.Random, done: float):
        """A function that makes the sequences of one batch; `done` is how much of the stage is over, 0 to 1."""
        if stage == "copy":
            return lambda: self.copying(rng, rng.randint(4, 16))  # all lengths in a batch, which is learned sooner
        if stage == "pairs":
            count, level = rng.randint(2, 12), 0 if done < 0.5 else rng.randint(0, 1)
            return lambda: self.pairs(rng, count, level)
        if stage == "few_lines":
            if rng.random() < 0.35:
                count, level = rng.randint(4, 24), rng.choice((0, 1, 2, 2))
                return lambda: self.pairs(rng, count, level)
            lines = rng.randint(1, 4 + round(10 * done))
            return lambda: self.record(rng, lines)
        if stage == "lines":
            if rng.random() < 0.08:
                count = rng.randint(4, 32)
                return lambda: self.pairs(rng, count, 0)
            lines = rng.randint(1, min(TOY_LINES, 16 + round(80 * done)) if rng.random() < 0.6 else 16)
            return lambda: self.record(rng, lines)
        def drifting():
            if rng.random() < 0.3:
                return self.missing(rng, rng.randint(4, 10))
            return self.record(rng, rng.randint(1, 6), questions=1)
        return drifting


TOY_STAGES = (  # name, steps, tokens a step, learning rate at the start and at the end
    ("copy", 500, 2048, 4e-3, 4e-3),
    ("pairs", 240, 3000, 3e-3, 3e-3),
    ("few_lines", 200, 4096, 3e-3, 3e-3),
    ("lines", 420, 6000, 3e-3, 1e-4),
    ("drift", 35, 2048, 2e-3, 2e-3),
)


def toy_model(seed: int) -> Llama:
    """Random weights: embeddings large, so that tokens are told apart from the start, and what blocks add small."""
    model = random_model(TOY_CONFIG, torch.device("cpu"), torch.float32, seed)
    with torch.no_grad():
        for layer in model.layers:
            for weight in layer.parameters():
                if weight.dim() == 2:
                    weight *= 0.5
            for output in (layer.self_attn.o_proj, layer.mlp.down_proj):
                output.weight /= math.sqrt(2 * TOY_CONFIG.num_hidden_layers)
        model.embed_tokens.weight *= 4  # a standard deviation of 1/4, ...
        model.norm.weight.fill_(0.25)   # ... taken back where the same matrix makes the logits
    return model


def pretrain(model: Llama, data: ToyData, stages, seed: int) -> None:
    """Train the weights, stage by stage: AdamW, and for matrices before the drift Muon, which learns to copy sooner."""
    model.frozen = False
    for name, steps, size, first, last in stages:
        model.requires_grad_(name != "drift")
        for layer in model.layers:
            layer.self_attn.o_proj.requires_grad_(True)
            layer.self_attn.scale.requires_grad_(False)
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        matrices = [p for n, p in trained.items() if n.startswith("layers") and p.dim() == 2 and name != "drift"]
        others = [p for p in trained.values() if not any(p is m for m in matrices)]
        optimizers = [torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0)]
        if matrices:
            optimizers.append(torch.optim.Muon(matrices, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"))
        rng, right = random.Random(f"{name} {seed}"), 0.0
        bar = tqdm(range(steps), desc=name, unit="step")
        for step in bar:
            make, rows, flags = data.batch(name, rng, step / steps), [], []
            while sum(map(len, rows)) < size:
                sequence = make()
                rows.append([data.bos, *(token for tokens, _ in sequence for token in tokens)])
                flags.append([False, *(learn for tokens, learn in sequence for _ in tokens)])
            width = max(map(len, rows))
            x = torch.tensor([row + [0] * (width - len(row)) for row in rows])                            # (B, T)
            learn = torch.tensor([row + [False] * (width - len(row)) for row in flags])[:, 1:]            # (B, T - 1)
            with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):  # the fastest for short sequences
                logits = model.logits(model(x[:, :-1])[learn])                                            # (learned, V)
            target = x[:, 1:][learn]
            loss = F.cross_entropy(logits, target)
            loss.backward()
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = (first + (last - first) * step / steps) * min(1, (step + 1) / 10)
                optimizer.step()
                optimizer.zero_grad()
            right = 0.9 * right + 0.1 * (logits.argmax(-1) == target).float().mean().item()
            bar.set_postfix_str(f"loss {loss.item():.3f}, tokens right {right:.2f}")


def demo(model: Llama, tokenizer: Tokenizer, lengths: list[int], prompts: int, modes, seed: int) -> dict[str, list]:
    """Accuracy by length of the base, and after training each mode on 50 prompts of the longest length."""
    cells = [make_samples("lines", tokenizer, model.config, n, prompts, "eval", seed) for n in lengths]
    pairs = to_pairs(tokenizer, make_samples("lines", tokenizer, model.config, lengths[-1], 50, "train", seed))
    model.reset_scales("head")
    results = {"base": evaluate(model, tokenizer, cells, desc="base")}
    for mode in modes:
        model.reset_scales(mode, seed)
        train(model, pairs, paper_lr("lines", mode, model.config))
        results[METHOD[mode]] = evaluate(model, tokenizer, cells, desc=METHOD[mode])
    return results


# ---------------------------------------------------------------------------------------------------------------------
# 12. Command line
# ---------------------------------------------------------------------------------------------------------------------

DTYPES = {"auto": None, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
)
SHAPES = {  # for bench: Llama-2 7B and 13B, and a 1.1B with grouped queries
    name: dict(zip(SIZES, sizes), vocab_size=32000, max_position_embeddings=4096)
    for name, sizes in {
        "1b": (2048, 5632, 22, 32, 4, 64), "7b": (4096, 11008, 32, 32, 32, 128), "13b": (5120, 13824, 40, 40, 40, 128),
    }.items()
}
HELD_OUT = 10  # prompts to compare before and after training on


def pick_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and dist.is_initialized():
        name = f"cuda:{dist.get_node_local_rank()}"
    try:
        torch.zeros(1, device=name).item()
        return torch.device(name)
    except (RuntimeError, AssertionError, ImportError) as e:
        raise UserError(f"--device {name}: not usable here ({first_line(e)})") from e


def open_checkpoint(args) -> tuple[Llama, Tokenizer, dict]:
    """Model, tokenizer and the facts of the scales: what every command starts with. Says on stderr what it opened."""
    config = read_config(args.ckpt)
    scales, about = read_scales(args.scales, config) if getattr(args, "scales", None) else (None, {})
    about["extend"] = resolve_extension(args.extend, about)
    config = extend(config, about["extend"])
    longest = max([getattr(args, "length", None) or 0, *(getattr(args, "lengths", None) or [])])
    if longest > config.max_position_embeddings:
        message = f"{longest} tokens exceed the context of {config.max_position_embeddings}; stretch it with --extend"
        if args.command != "eval":  # which may show how the base fails there
            raise UserError(f"--length {message}, or ask for less")
        note(f"warning  {message}")
    device = pick_device(args.device)
    tokenizer = Tokenizer(args.ckpt, config, args.template)
    shard = sharding(device) if getattr(args, "shard", False) else None
    model = load_model(args.ckpt, config, device, DTYPES[args.dtype], shard)
    if scales:
        model.set_scales(scales)
    weight = model.embed_tokens.weight
    heads = f"{config.num_hidden_layers} layers x {config.num_attention_heads} heads x {config.head_dim} channels"
    size = sum(p.numel() for p in model.parameters()) / 1e6
    note(f"model    {args.ckpt}: {heads}, {size:,.1f}M parameters, {str(weight.dtype)[6:]} on {weight.device}")
    note(f"context  {config.max_position_embeddings:,} tokens, extension {about['extend']}; "
         f"template {tokenizer.template} ({tokenizer.why})")
    if about.get("template", tokenizer.template) != tokenizer.template:
        note(f"warning  the scales were trained with --template {about['template']}; give it again")
    if scales:
        note(f"scales   {args.scales}: {METHOD[about['mode']]}, trained on {about.get('samples')} samples "
             f"of {about.get('task')} of {about.get('length')} tokens")
    return model, tokenizer, about


def resolve_extension(asked: str | None, about: dict, in_file: bool = False) -> str:
    """Scales remember the extension they were trained with; asking for another one is a mistake.

    in_file: the one that goes into a checkpoint to be written. Self-Extend cannot, but can be left out.
    """
    trained = about.get("extend")
    spec = asked or trained or "none"
    if in_file and spec.startswith("self:"):
        G, _, W = spec[5:].partition(",")
        raise UserError(f"--extend {spec}: Self-Extend is an attention of its own, which a file cannot ask for; give "
                        f"--extend none, and run llama.cpp with --grp-attn-n {G} --grp-attn-w {W}")
    left_out = in_file and spec == "none" and str(trained).startswith("self:")
    if asked and trained and asked != trained and not left_out:
        raise UserError(f"--extend {asked}: the scales were trained with {trained}; leave the flag out, or train again")
    return spec


def default_length(config: Config) -> int:
    """Tokens of prompt that fill the context and leave room for the answer."""
    return max(1, min(config.max_position_embeddings, config.sliding_window or 10**9) - ANSWER_ROOM)


def to_pairs(tokenizer: Tokenizer, samples: list[Sample]) -> list[tuple[list[int], list[int]]]:
    """(prompt ids, answer ids) of samples: what training and teacher-forced measuring read."""
    return [(tokenizer.prompt(s.prompt), tokenizer.answer(s.answer)) for s in samples]


def samples_for(args, tokenizer: Tokenizer, config: Config, length: int, count: int, split: str, avoid=()):
    """make_samples with what the flags say."""
    flags = (args.seed, args.depths, args.haystack)
    return make_samples(args.task, tokenizer, config, length, count, split, *flags, avoid)


def evaluation_cells(args, config: Config, tokenizer: Tokenizer, avoid=()) -> list[list[Sample]]:
    """The samples to evaluate on: a list per length, and for needles per length and depth."""
    end = default_length(config)
    lengths = dict.fromkeys(args.lengths or [round(end * share) for share in (0.15, 0.3, 0.5, 0.7, 0.85, 1.0)])
    if args.task not in ("lines", "needle"):
        lengths = (args.lengths or [end])[-1:]  # a file's prompts are as long as they are
    cells = {}
    for length in lengths:
        for s in samples_for(args, tokenizer, config, length, args.prompts, "eval", avoid):
            cells.setdefault((length, s.depth), []).append(s)
    if not cells:
        raise UserError(f"--task {args.task}: every prompt in it was trained on; evaluate on another file")
    return [cells[key] for key in sorted(cells, key=lambda key: (key[0], key[1] or 0))]


def check_outputs(args, *flags: str) -> None:
    """Every file to be written can be, and replaces neither an input nor another output: asked before hours of work."""
    taken = [getattr(args, flag, None) for flag in ("ckpt", "scales", "task", "haystack")]
    for path in filter(None, (getattr(args, flag) for flag in flags)):
        check_output(path, taken)
        taken.append(path)


def finished(args, header: dict) -> dict:
    """What an interrupted run with the same header left in the --json file, if --resume asks for it."""
    if not args.resume:
        return {}
    if not args.json:
        raise UserError("--resume: needs the --json file of the run that was interrupted")
    if not Path(args.json).exists():
        return {}
    saved = read_json(Path(args.json))
    for key, value in header.items():
        if saved.get(key) != value:
            raise UserError(f"--resume: {args.json} is of another run: {key} differs; give its flags or another file")
    return saved


def command_train(args) -> None:
    check_outputs(args, "out", "json", "plot")
    rank, ranks = rank_and_count()
    if args.shard and not dist.is_initialized():
        raise UserError("--shard: spreads the weights over processes; start with torchrun --nproc-per-node N seal.py")
    batch = args.batch or ranks
    out, state_file = Path(args.out), Path(f"{args.out}.state")
    model, tokenizer, about = open_checkpoint(args)
    config = model.config
    length, lr = args.length or default_length(config), args.lr or paper_lr(args.task, args.mode, config)
    samples = samples_for(args, tokenizer, config, length, args.samples, "train")
    trained_on = [prompt_id(s.prompt) for s in samples]
    tests = samples_for(args, tokenizer, config, length, HELD_OUT, "eval", avoid=trained_on)
    recipe = {
        "checkpoint": Path(args.ckpt).resolve().name, "mode": args.mode, "extend": about["extend"],
        "task": str(args.task), "length": length, "samples": len(samples), "epochs": args.epochs, "lr": lr,
        "seed": args.seed, "batch": batch,
        "template": tokenizer.template,
    }
    model.reset_scales(args.mode, args.seed)
    note(f"memory   {plan_memory(model, length, args.offload)}")
    note(f"training {METHOD[args.mode]}: {sum(s.numel() for s in model.scales()):,} numbers on {len(samples)} samples "
         f"of {args.task} of {length:,} tokens, {args.epochs} epoch(s), lr {lr:g}, seed {args.seed}, "
         f"batch {batch}" + f" over {ranks} processes" * (ranks > 1))
    tests = to_pairs(tokenizer, tests)
    before = held_out(model, tests) if tests else None
    pairs = to_pairs(tokenizer, samples)
    facts = recipe | {"data": prompt_id(repr(pairs))}
    losses = train(model, pairs, lr, args.epochs, state_file, args.resume, facts, batch)
    after = held_out(model, tests) if tests else None
    if rank:
        return  # the first process writes
    save_scales(out, model.scales(), config, **recipe, steps=len(losses), loss=losses[-1], prompts=",".join(trained_on))
    note(f"scales   {out}")
    report = {"scales": str(out), **recipe, "losses": losses}
    if tests:
        report |= {"before": dict(zip(("loss", "right"), before)), "after": dict(zip(("loss", "right"), after))}
        rows = [[name, f"{x[0]:.3f}", f"{x[1]:.2f}"] for name, x in (("base", before), (METHOD[args.mode], after))]
        print(table([f"{len(tests)} prompts not trained on", "loss", "right"], rows))
        if not after[0] <= before[0]:
            note("warning  these scales make the loss worse on prompts they were not trained on; "
                 "try a lower --lr or more --samples")
    else:
        note("warning  every prompt was trained on, none is left to show what it is worth; try fewer --samples")
    if args.json:
        write_json(args.json, report)
    if args.plot:
        with picture(args.plot) as (ax,):
            ax.plot(range(1, len(losses) + 1), losses, color=COLOURS[METHOD[args.mode]])
            ax.set(title=f"{METHOD[args.mode]}, lr {lr:g}", xlabel="step", ylabel="loss on the answer (nats)")
    state_file.unlink(missing_ok=True)


def command_eval(args) -> None:
    check_outputs(args, "json", "plot")
    if args.compare and not args.scales:
        raise UserError("--compare: needs --scales to compare the base with")
    model, tokenizer, about = open_checkpoint(args)
    cells = evaluation_cells(args, model.config, tokenizer, avoid=about.get("prompts", "").split(","))
    scales = [s.detach().clone() for s in model.scales()]
    run = (cells, [s.tolist() for s in scales], args.max_new_tokens, tokenizer.template, args.dtype)
    report = {"ckpt": str(args.ckpt), "scales": args.scales, "task": str(args.task), "extend": about["extend"],
              "seed": args.seed, "run": prompt_id(repr(run))}  # only the same run resumes
    saved, start, results = finished(args, report), time.monotonic(), {}
    report |= saved
    for method in (["base"] if args.compare else []) + [METHOD[about["mode"]] if args.scales else "base"]:
        if method == "base":
            model.reset_scales("head")
        else:
            model.set_scales(scales)
        key = "base" if args.compare and method == "base" else "cells"

        def keep(done):
            report.update({key: done, "seconds": round(time.monotonic() - start, 1)})
            if args.json:
                write_json(args.json, report)

        results[method] = evaluate(model, tokenizer, cells, args.max_new_tokens, method, saved.get(key, ()), keep)
        keep(results[method])
    print(score_table(results))
    if args.plot:
        plot_scores(args.plot, results)


def command_heads(args) -> None:
    check_outputs(args, "json", "plot")
    if args.quadrants and len(args.quadrants) != 2:
        raise UserError("--quadrants: must be two numbers, LOW,HIGH")
    model, tokenizer, about = open_checkpoint(args)
    if about.get("mode") == "lora":
        raise UserError(f"{args.scales}: SEAL-L has no numbers per head; give scales of mode head or channel")
    config = model.config
    learned = [s.detach().clone() for s in model.scales()] if args.scales else None
    if args.direct:
        return show_direct(args, model, tokenizer, learned)
    end = default_length(config)
    lengths = args.lengths or [round(0.9 * end), end]  # the paper's 28K and 31K of 32K
    pairs = {n: to_pairs(tokenizer, samples_for(args, tokenizer, config, n, args.prompts, "heads")) for n in lengths}
    heads, d = config.num_attention_heads, config.head_dim
    if args.channels:
        layer, head = args.channels
        if layer >= config.num_hidden_layers or head >= heads:
            raise UserError(f"--channels {layer}.{head}: there are {config.num_hidden_layers} layers of {heads} heads")
        sites = [(layer, head * d + c) for c in range(d)]
    else:
        sites = [(layer, head) for layer in range(config.num_hidden_layers) for head in range(heads)]
    model.reset_scales("channel" if args.channels else "head")  # effects are the base model's

    report = {"ckpt": str(args.ckpt), "task": str(args.task), "extend": about["extend"], "seed": args.seed,
              "prompts": args.prompts, "lengths": lengths, "sites": [list(site) for site in sites],
              "run": prompt_id(repr((pairs, args.dtype)))}
    saved = finished(args, report)

    def keep(effects):
        report["effects"] = effects
        if args.json:
            write_json(args.json, report)

    how = ["gradient", "prune"] if args.how == "both" else [args.how]
    effects = effect_report(model, pairs, sites, how, saved, keep)
    x, y = (gains(effects, how[-1], n) for n in (lengths[0], lengths[-1]))
    unit = "accuracy gained" if how[-1] == "prune" else "loss saved (nats)"
    loss = [-e["loss"] for e in effects[how[-1]][str(lengths[-1])]]
    order = sorted(range(len(sites)), key=lambda i: (y[i], loss[i]))  # equal accuracies are told apart by the loss
    name = (lambda s: f"channel {s[1] % d}") if args.channels else site_name
    rows = [[name(sites[a]), f"{x[a]:+.4f}", f"{y[a]:+.4f}", "", name(sites[b]), f"{x[b]:+.4f}", f"{y[b]:+.4f}"]
            for a, b in zip(order[:10], order[::-1][:10])]
    at = [f"{n:,}" for n in (lengths[0], lengths[-1])]
    print(f"{unit} by pruning, {args.prompts} prompts at each of {' and '.join(at)} tokens")
    print(table(["most helpful", *at, "", "most harmful", *at], rows))
    if args.how == "both":
        for n in lengths:
            pruned = [-e["loss"] for e in effects["prune"][str(n)]]
            rank = spearman(gains(effects, "gradient", n), pruned)
            print(f"gradient ranks as pruning does, {n:,} tokens: Spearman {rank:+.2f}")
    if learned and not args.channels:
        by_head = torch.cat([s.view(heads, -1).mean(1) for s in learned]).tolist()
        print(f"learned scales and what pruning gains, {at[-1]} tokens: Spearman {spearman(by_head, y):+.2f} "
              "(negative: harmful heads were turned down)")
    if args.plot:
        plot_heads(args.plot, sites, x, y, lengths, unit, heads, learned)
    if args.quadrants:
        variants = {"base": [torch.ones_like(s.detach()) for s in model.scales()]}
        variants |= quadrant_scales(model, sites, x, y, *args.quadrants)
        cells, results = evaluation_cells(args, config, tokenizer), {}
        for variant, scales in variants.items():
            model.set_scales(scales)
            results[variant] = evaluate(model, tokenizer, cells, args.max_new_tokens, variant)
        print(score_table(results))
        report["quadrants"] = results
    keep(effects)


def show_direct(args, model: Llama, tokenizer: Tokenizer, learned: list[Tensor] | None) -> None:
    """Find a prompt that the base gets wrong and the scales get right, and show which parts made the difference."""
    if not learned:
        raise UserError("--direct: needs --scales, to compare the base with")
    length = (args.lengths or [default_length(model.config)])[-1]
    ones = [torch.ones_like(s) for s in learned]
    for sample in samples_for(args, tokenizer, model.config, length, args.prompts, "direct"):
        prompt, answer = tokenizer.prompt(sample.prompt), tokenizer.answer(sample.answer)
        said = []
        for scales in (ones, learned):
            model.set_scales(scales)
            said.append(generate(model, [prompt], len(answer), {tokenizer.end})[0] + [tokenizer.end])
        if said[0] != answer and said[1] == answer:
            break
    else:
        raise UserError(f"--direct: none of {args.prompts} prompts is wrong without the scales and right with them; "
                        "try more --prompts or another --lengths")
    at = next(i for i, (a, b) in enumerate(zip(said[0], answer)) if a != b)  # the first token that goes wrong
    effects = []
    for scales in (ones, learned):
        model.set_scales(scales)
        effects.append(direct_effects(model, prompt + answer[:at], [answer[at], said[0][at]]))
    right, wrong = (tokenizer.decode([t]) for t in (answer[at], said[0][at]))
    print(f"asked for {sample.answer!r}; the base says {tokenizer.decode(said[0][:-1])!r}")
    rows = []
    for name, effect in zip(("base", "with scales"), effects):
        a, b = effect.sum((0, 1)).tolist()
        rows.append([name, f"{a:+.2f}", f"{b:+.2f}", f"{a - b:+.2f}"])
    print(table(["direct effect on the logit", f"right {right!r}", f"wrong {wrong!r}", "difference"], rows))
    if args.plot:
        plot_direct(args.plot, *effects, right, wrong)


def useful_flop(config: Config, T: int) -> tuple[float, float, float]:
    """Floating-point operations over T tokens: a forward pass, a training step, and attention's share of the step.

    A weight matrix costs 2 per parameter and token. Causal attention has T^2 / 2 pairs, and q . k and p v cost 2 d each
    per pair and head: 2 T^2 H d per layer. Going back, frozen weights cost only the gradient of their input (as much
    as forward), attention four such products for its two. Not counted: recomputation; what is done for a few positions
    only (logits, and of the last block all but keys and values); going back, what lies below the first scale; LoRA's
    thin matrices.
    """
    D, H, G, d = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
    queries, keys, attention = 2 * T * D * H * d, 4 * T * D * G * d, 2 * T**2 * H * d  # keys: and values
    after, L = 2 * T * (D * H * d + 3 * D * config.intermediate_size), config.num_hidden_layers  # o_proj, feed-forward
    forward = (L - 1) * (queries + keys + attention + after) + keys
    back = (L - 2) * (queries + keys + 2 * attention + after) + keys + after
    return forward, forward + back, attention * (3 * L - 5) / (forward + back)


def clock(device: torch.device) -> float:
    """Seconds, once the device has done all it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def matmul_speed(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product here: what a perfect program could reach."""
    n = 8192 if device.type == "cuda" else 1024
    a, best = torch.randn(n, n, device=device).to(dtype), math.inf
    for _ in range(6):
        start = clock(device)
        a @ a
        best = min(best, clock(device) - start)
    return 2 * n**3 / best


def command_bench(args) -> None:
    """Time training, reading a prompt, and decoding, on random weights: their values change neither time nor memory."""
    device = pick_device(args.device)
    dtype = DTYPES[args.dtype] or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    config = read_config(args.shape) if args.shape not in SHAPES else Config(**SHAPES[args.shape])
    T = args.length or default_length(config)
    config = replace(config, max_position_embeddings=max(T + ANSWER_ROOM, config.max_position_embeddings))
    note(f"bench    {args.shape}: {config}")
    model = random_model(config, device, dtype, args.seed)
    model.reset_scales(args.mode)
    note(f"memory   {plan_memory(model, T, args.offload)}")
    ids = torch.randint(config.vocab_size, (T,), generator=torch.Generator().manual_seed(args.seed)).tolist()
    prompt, answer = ids[:-30], ids[-30:]
    forward, step, share = useful_flop(config, T)
    speed = matmul_speed(device, dtype)
    seconds = {}

    def timed(name, work):
        start = clock(device)
        result = work()
        seconds.setdefault(name, []).append(clock(device) - start)
        return result

    def training_step():
        answer_loss(model, prompt, answer)[0].backward()

    for _ in tqdm(range(args.steps + 1), desc="training steps", unit="step"):  # the first one warms up
        timed("train", training_step)
    memory = peak_memory(device)
    with torch.no_grad():
        for _ in range(2):
            cache = Cache(model, 1, T + 32)
            x = timed("prefill", lambda: model.logits(model(torch.tensor([ids], device=device), cache, 1)[:, -1]))
            for _ in tqdm(range(32), desc="decoding", unit="token"):
                x = timed("decode", lambda: model.logits(model(x.argmax(-1)[:, None], cache)[:, -1]))
    median = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    report = {
        "shape": args.shape, "length": T, "mode": args.mode, "offload": args.offload, "dtype": str(dtype)[6:],
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device} {platform.machine()}",
        "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"),
        "seconds": median, "peak_memory": memory, "matmul_flops": speed, "attention_share": share,
        "utilisation": {"train": step / median["train"] / speed, "prefill": forward / median["prefill"] / speed},
    }
    rows = [
        [name, f"{median[key]:.3f}", f"{T / median[key]:,.0f}", f"{report['utilisation'][key]:.0%}"]
        for name, key in (("training step", "train"), ("read a prompt", "prefill"))
    ] + [["decode a token", f"{median['decode']:.4f}", f"{1 / median['decode']:,.0f}", ""]]
    print(table([f"{args.shape}, {T:,} tokens", "seconds", "tokens/s", "of matmul speed"], rows))
    print(f"peak memory in training {memory}; matrix products reach {speed / 1e12:.2f} TFLOP/s here")
    print(f"attention is {share:.0%} of the work of a training step")
    if args.json:
        write_json(args.json, report)


def command_demo(args) -> None:
    """The paper's tables 1 and 2 on the bundled toy, in under three minutes on two cores."""
    out = Path(args.out)
    try:
        out.mkdir(exist_ok=True)
    except OSError as e:
        raise UserError(f"--out {out}: cannot be made ({e.strerror})") from e
    start, report, args.extend = time.monotonic(), {}, "none"
    model, tokenizer, _ = open_checkpoint(args)
    if args.ckpt == TOY:
        note(TOY_STORY)
    end = default_length(model.config)
    lengths = [round(end * share) for share in (0.15, 0.3, 0.5, 0.7, 0.85, 1.0)]
    report["within"] = demo(model, tokenizer, lengths, args.prompts, args.mode, args.seed)
    print(f"Share of {args.prompts} prompts answered right, within the context of {end + ANSWER_ROOM}")
    print(score_table(report["within"]), "\n")
    plot_scores(out / "within.png", report["within"])

    lengths, prompts = [end, 2 * end, 4 * end], max(1, args.prompts // 2)
    cells = [make_samples("lines", tokenizer, model.config, n, prompts, "eval", args.seed) for n in lengths]
    model.reset_scales("head")
    beyond = {"base": evaluate(model, tokenizer, cells, desc="base")}
    args.extend = "ntk:4"
    model, tokenizer, _ = open_checkpoint(args)
    extended = demo(model, tokenizer, lengths, prompts, ["channel"], args.seed)
    report["beyond"] = beyond | {"NTK 4": extended["base"], "NTK 4 + SEAL-C": extended["SEAL-C"]}
    print(f"Share of {prompts} prompts answered right, up to four times the context")
    print(score_table(report["beyond"]), "\n")
    plot_scores(out / "beyond.png", report["beyond"])
    write_json(out / "demo.json", report | {"seconds": round(time.monotonic() - start, 1)})
    print(f"{time.monotonic() - start:.0f} seconds. Pictures and numbers are in {out}. Now try:\n"
          "  python seal.py train                               learn the scales (--ckpt DIR: of your model)\n"
          "  python seal.py eval --scales scales.safetensors --compare\n"
          "  python seal.py heads --how both --plot heads.png       which heads help, which hurt\n"
          "  python export_gguf.py                                  for llama.cpp")


def command_pretrain(args) -> None:
    """Make the toy from nothing; the folder appears when it is complete."""
    with whole_folder(args.out) as partial:
        toy_vocabulary(partial / "tokenizer.model")
        names = ("vocab_size", "max_position_embeddings", "rms_norm_eps", "rope_theta", "tie_word_embeddings", *SIZES)
        write_json(partial / "config.json", {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "dtype": "bfloat16",
            "bos_token_id": 1, "eos_token_id": 2, **{name: getattr(TOY_CONFIG, name) for name in names},
        })
        model = toy_model(args.seed)
        pretrain(model, ToyData(Tokenizer(partial, TOY_CONFIG, "none")), TOY_STAGES, args.seed)
        tensors = {f"model.{n}": p.detach().bfloat16() for n, p in model.named_parameters() if not n.endswith("scale")}
        save_file(tensors, partial / "model.safetensors", {"format": "pt"})
    print(f"{args.out}: {sum(t.numel() for t in tensors.values()) / 1e6:.1f}M parameters")


def command_generate(args) -> None:
    model, tokenizer, _ = open_checkpoint(args)
    try:
        text = sys.stdin.read() if args.prompt == "-" else args.prompt
        text.encode()
    except UnicodeError as e:
        raise UserError(f"--prompt: is not UTF-8 text ({e})") from e
    ids, context = tokenizer.prompt(text), model.config.max_position_embeddings
    if not text.strip() or len(ids) >= context:
        raise UserError(f"--prompt: is empty, or its {len(ids)} tokens fill the context of {context}; see --extend")
    if len(ids) + args.max_new_tokens > context:
        note(f"warning  {len(ids)} + {args.max_new_tokens} tokens exceed the context of {context}; see --extend")
    print(tokenizer.decode(generate(model, [ids], args.max_new_tokens, tokenizer.stop)[0]))


def command_fold(args) -> None:
    """An ordinary Hugging Face folder with the scales in its weights and the extension in config.json's own terms."""
    source = Path(args.ckpt)
    config = read_config(source)
    scales, about = read_scales(args.scales, config)
    spec = resolve_extension(args.extend, about, in_file=True)
    weights = open_weights(source)
    shards, sizes, index = [[]], [0], {}
    for _, name, tensor in weights.fitting(config):  # plan: shards of 2 GB, so only so much is in memory at once
        if sizes[-1] + tensor.nbytes > 2e9 and shards[-1]:
            shards.append([])
            sizes.append(0)
        shards[-1].append(name)
        sizes[-1] += tensor.nbytes
    with whole_folder(args.out) as partial:
        for number, names in enumerate(tqdm(shards, desc="folding", unit="shard"), 1):
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
            tensors = {name: fold(name, weights[name], scales).to(weights[name].dtype).contiguous() for name in names}
            if odd := [name for name in names if not tensors[name].isfinite().all()]:
                raise UserError(f"{weights.files[odd[0]]}: {odd[0]} holds NaN or infinity, by itself or scaled")
            save_file(tensors, partial / file, {"format": "pt"})
            index |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": index}
        write_json(partial / "model.safetensors.index.json", index)
        write_json(partial / "config.json", extended_json(source, extend(config, spec) if spec != "none" else None))
        for file in source.iterdir():
            ours = file.name in ("config.json", "params.json") or file.name.endswith(".index.json")
            if not ours and (file.name == "tokenizer.model" or file.suffix in (".json", ".jinja")):
                shutil.copyfile(file, partial / file.name)
    print(f"{args.out}: {METHOD[about['mode']]} folded into {config.num_hidden_layers} layers, "
          f"extension {spec}, {sum(sizes) / 1e9:.2f} GB")


def extended_json(source: Path, extended: Config | None) -> dict:
    """A folder's config.json with the rotary settings of the extended config, in the spelling that the file has."""
    raw = read_meta_config(source) if is_meta(source) else read_json(source / "config.json")
    raw["_name_or_path"] = f"{raw.get('_name_or_path', '')} {source.resolve().name}".strip()  # for --template auto
    if extended is None:
        return raw
    raw.pop("max_sequence_length", None)
    rope = {key: value for key, value in extended.rope_scaling.items() if value}  # YaRN's 0 means: the usual factor
    raw |= {"rope_theta": extended.rope_theta, "max_position_embeddings": extended.max_position_embeddings}
    if "rope_parameters" in raw:
        return raw | {"rope_parameters": rope | {"rope_theta": extended.rope_theta}}
    plain = rope["rope_type"] == "default"  # older releases say nothing then, and `type` instead of `rope_type`
    return raw | {"rope_scaling": None if plain else rope | {"type": rope["rope_type"]}}


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are one line."""

    def error(self, message):
        raise UserError(message)


def whole_number(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 9 or not 1 <= int(text) <= LARGEST:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 to {LARGEST}, is {text!r}")
    return int(text)


def positive(text: str) -> float:
    try:
        if 0 < float(text) <= 1e6:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"must be a number above 0 and up to 1e6, is {text!r}")


def percent(text: str) -> float:
    try:
        if 0 <= float(text) <= 100:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"must be from 0 to 100, is {text!r}")


def layer_and_head(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)\.(\d+)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"must be LAYER.HEAD, like 1.18, is {text!r}")
    return int(match[1]), int(match[2])


def several(kind):
    """A flag's type: values with commas between."""
    return lambda text: [kind(part) for part in text.split(",")]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Flags mean the same in every command; those that belong together stand in a group."""
    group = lambda: Parser(add_help=False, allow_abbrev=False)
    ckpt, rope, text, device, task, result = (group() for _ in range(6))
    ckpt.add_argument("--ckpt", metavar="DIR", default=TOY, help="checkpoint folder (default: the bundled toy)")
    rope.add_argument("--extend", metavar="KIND:S",
                      help="none, ntk:4, linear:4, yarn:4, self:6,1024 (default: the scales' own)")
    text.add_argument("--template", default="auto", help=f"conversation template: auto, {', '.join(TEMPLATES)}")
    device.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    device.add_argument("--dtype", default="auto", choices=DTYPES, help="auto: the checkpoint's own, float32 on a CPU")
    model = (ckpt, rope, text, device)
    task.add_argument("--task", default="lines", metavar="TASK", help="lines, needle or FILE.jsonl")
    task.add_argument("--haystack", metavar="FILE.txt", help="text to hide needles in (default: generated)")
    task.add_argument("--depths", type=several(percent), metavar="A,B,C", help="in percent, of needle or asked line")
    task.add_argument("--seed", type=int, default=0)
    result.add_argument("--json", metavar="PATH", help="write the result for scripts")
    result.add_argument("--plot", metavar="PATH.png", help="draw the result")
    result.add_argument("--resume", action="store_true", help="go on where an interrupted run stopped (same flags)")

    parser = Parser(prog="seal.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, run, help, *groups):
        sub = commands.add_parser(name, help=help, parents=groups, allow_abbrev=False)
        sub.set_defaults(run=run)
        return sub

    p = command("demo", command_demo, "the bundled toy, before and after; no checkpoint needed", ckpt, text, device)
    p.add_argument("--mode", nargs="+", default=["head", "channel"], choices=METHOD, help="methods in the first table")
    p.add_argument("--prompts", type=whole_number, default=50, help="per length")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", default="seal-demo", metavar="DIR")

    p = command("train", command_train, "learn the scales", *model, task, result)
    p.add_argument("--mode", default="head", choices=METHOD,
                   help="one scale per head (SEAL-H), per channel (SEAL-C), or LoRA in their place (SEAL-L)")
    p.add_argument("--length", type=whole_number, metavar="TOKENS", help="(default: the context less the answer)")
    p.add_argument("--samples", type=whole_number, default=50)
    p.add_argument("--epochs", type=whole_number, default=1)
    p.add_argument("--batch", type=whole_number, help="prompts a step (default: 1; under torchrun, one per process)")
    p.add_argument("--lr", type=positive, help="learning rate (default: the paper's, by mode and task)")
    p.add_argument("--offload", action="store_true", help="keep the blocks' inputs in host memory, for a small GPU")
    p.add_argument("--shard", action="store_true", help="under torchrun: each process holds only a part of the weights")
    p.add_argument("--out", default="scales.safetensors", metavar="PATH")

    p = command("eval", command_eval, "accuracy by length", *model, task, result)
    p.add_argument("--scales", metavar="PATH")
    p.add_argument("--compare", action="store_true", help="the base beside the scaled model")
    p.add_argument("--lengths", type=several(whole_number), metavar="A,B,C", help="(default: six, up to the context)")
    p.add_argument("--prompts", type=whole_number, default=50, help="per length")
    p.add_argument("--max-new-tokens", type=whole_number, default=100)

    p = command("heads", command_heads, "which heads help, which hurt", *model, task, result)
    p.add_argument("--scales", metavar="PATH", help="show learned scales beside the effects")
    p.add_argument("--how", default="gradient", choices=["gradient", "prune", "both"],
                   help="gradient: to first order, all heads at once; prune: exact, one run per head")
    p.add_argument("--lengths", type=several(whole_number), metavar="A,B", help="(default: 0.9 of the context and all)")
    p.add_argument("--prompts", type=whole_number, default=50, help="per length")
    p.add_argument("--channels", type=layer_and_head, metavar="L.H", help="look at the channels inside one head")
    p.add_argument("--quadrants", type=several(positive), metavar="LOW,HIGH",
                   help="scale harmful heads and helpful heads so, without training, and evaluate: 0.9,1.1")
    p.add_argument("--direct", action="store_true", help="direct effect on the logits of a prompt that --scales mend")
    p.add_argument("--max-new-tokens", type=whole_number, default=100)

    p = command("bench", command_bench, "time a model's shape on this machine", device)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--json", metavar="PATH", help="write the result for scripts")
    p.add_argument("--shape", default="1b", help=f"{', '.join(SHAPES)}, or a folder with a config.json")
    p.add_argument("--length", type=whole_number, metavar="TOKENS", help="(default: the context less the answer)")
    p.add_argument("--mode", default="head", choices=METHOD)
    p.add_argument("--steps", type=whole_number, default=3, help="training steps to time")
    p.add_argument("--offload", action="store_true", help="keep the blocks' inputs in host memory")

    p = command("pretrain", command_pretrain, "how the toy was made")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", required=True, metavar="DIR")

    p = command("generate", command_generate, "answer one prompt", *model)
    p.add_argument("--scales", metavar="PATH")
    p.add_argument("--prompt", required=True, help="the text, or - to read it from standard input")
    p.add_argument("--max-new-tokens", type=whole_number, default=100)

    p = command("fold", command_fold, "write a plain checkpoint with the scales in it", ckpt, rope)
    p.add_argument("--scales", required=True, metavar="PATH")
    p.add_argument("--out", required=True, metavar="DIR")
    return parser.parse_args(arguments)


def join_ranks():
    """Under torchrun: meet the other processes; returns the small store that all of them share. Else None."""
    if not dist.is_torchelastic_launched():
        return None
    store, rank, ranks = next(dist.rendezvous("env://"))
    # Gradients go from CPU to CPU, a sharded block's weights from GPU to GPU; unasked, torch takes one for both.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks)
    return store


def run(program: str, parse, arguments: list[str] | None = None) -> int:
    """Parse, run the command, and turn every way of ending into an exit status: 2 for a user's mistake, in one line."""
    stopped = []

    def stop(number, _):  # cleans up on the way out; remembered, as a library may turn it into an error of its own
        stopped.append(number)
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:  # a job in the background may have been told to ignore Ctrl-C
            signal.signal(number, stop)
    store = join_ranks()
    silent = open(os.devnull, "w") if rank_and_count()[0] else None  # the first rank speaks for all
    try:
        with redirect_stdout(silent or sys.stdout), redirect_stderr(silent or sys.stderr):
            args = parse(arguments)
            if store and args.run != command_train:
                raise UserError("torchrun: only train uses several processes; start this command with python")
            args.run(args)
            sys.stdout.flush()
        if store:
            dist.destroy_process_group()
        return 0
    except BaseException as e:
        if store:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, once another rank has ended: this one is ending
            if store.add("failed", 1) > 1:
                return 2  # the first to fail has said why
        if stopped:
            note(f"{program}: interrupted; finished work is kept")
            return 128 + stopped[0]
        if isinstance(e, UserError):
            message = " ".join(str(e).split())
        elif isinstance(e, OSError):  # the world's fault: a disk that fills, a file that goes away
            message = first_line(e)
        elif isinstance(e, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(e):  # on a CPU
            message = f"out of memory ({first_line(e)}); try shorter prompts, --dtype bfloat16, or train --offload"
        else:
            raise
    note(f"{program}: error: {message}")
    return 2


if __name__ == "__main__":
    sys.exit(run("seal.py", parse))
