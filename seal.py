"""SEAL: Scaling to Emphasize Attention for Long-context retrieval, in one file you can read in an evening.

The paper (Lee et al., ACL 2025, arXiv 2501.15225) in a page
------------------------------------------------------------
Give a language model a long prompt and ask for one fact in it. Far from its context limit it answers; near the
limit it fails. The knowledge of *how* to retrieve is still there: switch off single attention heads and accuracy
jumps by twenty points, up for some heads and down for others (section 3). A few heads hurt, a few help, and the
balance between them, learned on short texts, is wrong for long ones.

So learn the balance and nothing else. Freeze every weight, multiply each head's output by one number, and train
those numbers on 50 synthetic prompts (section 4):

        y = concat_h( s_h * softmax(q_h k_h^T / sqrt(d)) v_h ) W_o                                          (SEAL)

  SEAL-H  (--mode head)     one s per layer and head:     32 x 32         =   1,024 numbers for a 7B
  SEAL-C  (--mode channel)  one s per layer and channel:  32 x (32 x 128) = 131,072 numbers for a 7B

A scale above 1 makes a head speak louder into the residual stream, below 1 quieter, 0 prunes it. All start at 1,
where the model is exactly the one you downloaded. When training ends, s multiplies columns of W_o, and what is
left is an ordinary checkpoint of the ordinary size: the gain costs nothing at inference.

The map of this file, bottom-up: each part uses only what stands above it
--------------------------------------------------------------------------
  1. Errors and files      one-line messages, writes that are whole or absent
  2. Config                config.json, checked at the door
  3. Rotary positions      plain, linear, YaRN, Llama-3; --extend ntk / linear / yarn
  4. Model                 RMSNorm, Attention (SEAL is one line of it), FeedForward, Block, Llama, generation
  5. Checkpoints           safetensors and .bin in, tensor by tensor; scales in and out; folding
  6. Text                  tokenizers and conversation templates
  7. Data                  line retrieval, needle in a haystack, your own JSONL
  8. Training              the loop: 50 prompts, loss on the answer
  9. Evaluation            greedy answers, judged, as table, picture and JSON
 10. Heads                 which heads help and which hurt
 11. The toy               how assets/toy-llama was made, and the demo
 12. Command line

Three commands to start with
----------------------------
    python seal.py demo                               no checkpoint needed: the bundled toy, before and after
    python seal.py train --ckpt llama-7b              writes scales.safetensors
    python export_gguf.py --ckpt llama-7b --scales scales.safetensors --outfile llama-7b-seal.gguf

Shapes are written with the same letters everywhere: B prompts in a batch, T tokens, S tokens in the cache, D width
of the residual stream (hidden_size), H query heads, G key-value heads, d channels per head (head_dim), L layers,
V vocabulary.
"""

import argparse
import bisect
import hashlib
import json
import math
import os
import pickle
import random
import re
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
TOY = HERE / "assets" / "toy-llama"


# ---------------------------------------------------------------------------------------------------------------------
# 1. Errors and files
# ---------------------------------------------------------------------------------------------------------------------


class UserError(Exception):
    """A mistake the user can mend. The message is one line: what is wrong, where, what to do. Exit status 2."""


def note(*words) -> None:
    """Tell the person at the terminal; stdout is kept for results."""
    print(*words, file=sys.stderr, flush=True)


@contextmanager
def whole_file(path):
    """Yield a name beside `path` to write to, renamed to `path` once complete: no reader ever meets half a file."""
    path = Path(path)
    if not path.parent.is_dir():
        raise UserError(f"{path}: the folder {path.parent} does not exist; create it first")
    if path.is_dir():
        raise UserError(f"{path}: is a folder; give a file name")
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield partial
        os.replace(partial, path)
    except OSError as e:
        raise UserError(f"{path}: cannot be written ({e.strerror or e})") from e
    finally:
        partial.unlink(missing_ok=True)


def read_json(path: Path):
    """Parsed JSON of a file; every way in which that fails is a UserError."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from e
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path}: is not JSON ({e})") from e


def write_json(path, data) -> None:
    with whole_file(path) as partial:
        partial.write_text(json.dumps(data, indent=2) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# 2. Config
# ---------------------------------------------------------------------------------------------------------------------

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")  # the same network; Mistral's v0.1 adds a sliding window


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
    sliding_window: int | None = None   # tokens a query may look back, if limited
    tie_word_embeddings: bool = False   # the output matrix is the embedding
    attention_bias: bool = False        # q, k, v and o carry biases
    mlp_bias: bool = False              # gate, up and down carry biases

    def channels(self) -> int:
        """H * d: the width of the concatenated heads, which is what o_proj reads."""
        return self.num_attention_heads * self.head_dim


def read_config(folder) -> Config:
    """The Config in folder/config.json, in the spelling of any transformers release; UserError where it does not hold."""
    path = Path(folder) / "config.json"
    if not Path(folder).is_dir():
        raise UserError(f"{folder}: no such checkpoint folder")
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise UserError(f"{path}: must hold a JSON object, holds a {type(raw).__name__}")

    def number(key, default=None, kind=int, low=1, source=raw):
        value = default if source.get(key) is None else source[key]
        if value is None:
            raise UserError(f"{path}: {key} is missing")
        if isinstance(value, bool) or not isinstance(value, (int, kind)) or not low <= value <= 1e9:
            raise UserError(f"{path}: {key} must be {'a whole number' if kind is int else 'a number'} from {low} to 1e9, is {value!r}")
        return kind(value)

    def flag(key):
        if not isinstance(raw.get(key, False), bool):
            raise UserError(f"{path}: {key} must be true or false, is {raw[key]!r}")
        return raw.get(key, False)

    architectures = raw.get("architectures")
    architecture = architectures[0] if isinstance(architectures, list) and architectures else architectures
    if architecture not in ARCHITECTURES:
        raise UserError(f"{path}: architecture {architecture} is not supported; supported are {', '.join(ARCHITECTURES)}")
    if raw.get("hidden_act", "silu") != "silu":
        raise UserError(f"{path}: hidden_act {raw['hidden_act']!r} is not supported; a Llama's is 'silu'")

    heads, width = number("num_attention_heads"), number("hidden_size")
    groups = number("num_key_value_heads", default=heads)
    head_dim = number("head_dim", default=width // heads)
    if heads % groups:
        raise UserError(f"{path}: num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}")
    if raw.get("head_dim") is None and width % heads:
        raise UserError(f"{path}: hidden_size {width} is not a multiple of num_attention_heads {heads}, and no head_dim is given")
    if head_dim % 2 or head_dim < 4:
        raise UserError(f"{path}: head_dim {head_dim} must be even and at least 4; rotary positions turn pairs of channels")

    # LongChat and Vicuna 16K leave 4096 in max_position_embeddings and say the context in max_sequence_length.
    context = number("max_sequence_length", default=number("max_position_embeddings", default=2048))
    # Older files write rope_scaling, type and rope_theta; newer ones put all three into rope_parameters.
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{path}: rope_scaling must be an object, is {rope!r}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPE_KINDS:
        raise UserError(f"{path}: rope type {kind!r} is not supported; supported are {', '.join(ROPE_KINDS)}")
    if unknown := set(rope) - set(ROPE_KINDS[kind]) - {"rope_type", "type", "rope_theta"}:
        raise UserError(f"{path}: rope type {kind} with {', '.join(sorted(unknown))} is not supported")
    scaling = {"rope_type": kind}
    for key, default in ROPE_KINDS[kind].items():
        if key == "original_max_position_embeddings":
            scaling[key] = number(key, default=number("max_position_embeddings", default=2048), source=rope)
        else:
            scaling[key] = number(key, default=default, kind=float, low=1 if key == "factor" else 0, source=rope)
    if kind == "llama3" and not scaling["low_freq_factor"] < scaling["high_freq_factor"]:
        raise UserError(f"{path}: low_freq_factor {scaling['low_freq_factor']} must be below high_freq_factor {scaling['high_freq_factor']}")
    if kind == "yarn":  # some files keep the short context in max_position_embeddings
        context = max(context, int(scaling["factor"] * scaling["original_max_position_embeddings"]))

    # A Mistral that does not mention its window has transformers' default; an explicit null means none.
    window = raw.get("sliding_window", 4096 if architecture == "MistralForCausalLM" else None)
    return Config(
        vocab_size=number("vocab_size"),
        hidden_size=width,
        intermediate_size=number("intermediate_size"),
        num_hidden_layers=number("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=head_dim,
        max_position_embeddings=context,
        rms_norm_eps=number("rms_norm_eps", default=1e-6, kind=float, low=0),
        rope_theta=number("rope_theta", default=number("rope_theta", default=10000.0, kind=float), kind=float, source=rope),
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
# freq_0 = 1 radian per token tells neighbours apart; the last pair turns once in 60,000 tokens. Every context
# extension is a table of other frequencies: nothing is trained.

# Kinds of rope_scaling in config.json, with their parameters and defaults (None: must be given).
ROPE_KINDS = {
    "default": {},
    "linear": {"factor": None},
    "llama3": {"factor": None, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
    "yarn": {"factor": None, "original_max_position_embeddings": None, "beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": 0.0},
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
        def pair(turns):  # the (fractional) pair that makes so many turns within the original context
            return d * math.log(scaling["original_max_position_embeddings"] / (2 * math.pi * turns)) / (2 * math.log(base))
        low, high = max(0, math.floor(pair(scaling["beta_fast"]))), min(d - 1, math.ceil(pair(scaling["beta_slow"])))
        keep = 1 - ((torch.arange(d // 2, device="cpu") - low) / max(0.001, high - low)).clamp(0, 1)
        freq = keep * freq + (1 - keep) * freq / s
        magnitude = scaling["attention_factor"] or 0.1 * math.log(s) + 1
    return freq.float(), magnitude


def extend(config: Config, spec: str) -> Config:
    """The config with its context stretched by a training-free method: "none", "ntk:4", "linear:2", "yarn:4", ...

    NTK replaces the base b by b * S^(d / (d - 2)) (paper, section 6): the slowest pair is stretched by exactly S, so
    that S times the distance gives the angle it knows, and the fastest pair, which tells neighbours apart, stays as
    it is. An extension is a change of config and nothing more, so model, fold and export follow without being told.
    """
    if spec == "none":
        return config
    kind, _, factor = spec.partition(":")
    try:
        s = float(factor)
    except ValueError:
        s = 0.0
    if kind not in ("ntk", "linear", "yarn") or not 1 <= s <= 1e4:
        raise UserError(f"--extend {spec}: must be none, ntk:S, linear:S or yarn:S with a factor S from 1 to 10000")
    d, own, context = config.head_dim, config.rope_scaling, config.max_position_embeddings
    if kind == "ntk":
        rope = {"rope_theta": config.rope_theta * s ** (d / (d - 2))}
    elif kind == "linear" and own["rope_type"] in ("default", "linear"):
        rope = {"rope_scaling": {"rope_type": "linear", "factor": s * own.get("factor", 1.0)}}
    elif kind == "yarn" and own["rope_type"] == "default":
        rope = {"rope_scaling": ROPE_KINDS["yarn"] | {"rope_type": "yarn", "factor": s, "original_max_position_embeddings": context}}
    else:
        raise UserError(f"--extend {spec}: the checkpoint already has rope type {own['rope_type']}; use ntk:S, which goes with any")
    return replace(config, max_position_embeddings=int(context * s), **rope)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Turn channel pairs (i, i + d/2) of x (B, heads, T, d) by the angles whose cos and sin (B or 1, 1, T, d/2) are given."""
    cos, sin = rope
    a, b = x.chunk(2, dim=-1)  # (B, heads, T, d/2) each
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


# ---------------------------------------------------------------------------------------------------------------------
# 4. Model
# ---------------------------------------------------------------------------------------------------------------------
# Modules carry the names of Hugging Face's checkpoints (less the leading "model."), so loading is a dictionary walk.


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


class Attention(nn.Module):
    """Causal attention over H query heads, each scaled by SEAL before the output projection."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        D, H, G, d = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.layer, self.heads, self.head_dim = layer, H, d
        self.q_proj = nn.Linear(D, H * d, bias=config.attention_bias)
        self.k_proj = nn.Linear(D, G * d, bias=config.attention_bias)
        self.v_proj = nn.Linear(D, G * d, bias=config.attention_bias)
        self.o_proj = nn.Linear(H * d, D, bias=config.attention_bias)
        self.scale = nn.Parameter(torch.ones(H))  # (H,) for SEAL-H, (H * d,) for SEAL-C

    def forward(self, x: Tensor, rope, mask: Tensor | None = None, cache: "Cache | None" = None) -> Tensor:
        """x (B, T, D) -> (B, T, D). mask (B, 1, T, S): who may look at whom; None means causal."""
        B, T, _ = x.shape
        q = rotate(self.q_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2), rope)  # (B, H, T, d)
        k = rotate(self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2), rope)  # (B, G, T, d)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)                # (B, G, T, d)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)                                       # (B, G, S, d)

        # softmax(q_h k_h^T / sqrt(d)) v_h, with every key-value head serving H / G query heads.
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True)  # (B, H, T, d)

        # SEAL: y = concat_h( s_h * head_h ) W_o, the paper's section 4. In float32, because bf16 has only 8 bits.
        y = y.transpose(1, 2) * self.scale.view(self.heads, -1)  # (B, T, H, d) * (H, 1) or (H, d)
        return self.o_proj(y.to(x.dtype).reshape(B, T, -1))      # (B, T, H * d) -> (B, T, D)


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: Config):
        super().__init__()
        D, hidden = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(D, hidden, bias=config.mlp_bias)
        self.up_proj = nn.Linear(D, hidden, bias=config.mlp_bias)
        self.down_proj = nn.Linear(hidden, D, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One layer: attention, then feed-forward, each added to the residual stream."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = FeedForward(config)

    def forward(self, x: Tensor, rope, mask=None, cache=None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """Embedding, L blocks, a norm, and the output matrix. `frozen` after loading: only the scales can be trained."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.frequencies, self.magnitude = rope_frequencies(config)  # (d/2,) radians per token

    def forward(self, tokens: Tensor, cache: "Cache | None" = None) -> Tensor:
        """tokens (B, T) -> the normalised residual stream (B, T, D); apply lm_head to the positions you need.

        Logits of all positions would be the largest tensor of the whole computation (T x V), and training needs
        them at some thirty positions, generation at one.
        """
        T, config = tokens.shape[1], self.config
        S = T if cache is None else cache.width + T
        if config.sliding_window and S > config.sliding_window:
            raise UserError(f"{S} tokens exceed the model's sliding window of {config.sliding_window}; beyond it full attention is not the model")
        positions = torch.arange(T, device=tokens.device)[None]  # (1, T)
        mask = None
        if cache is not None:
            positions = cache.place(positions)                   # (B, T)
            if cache.width:                                      # rows may differ in length: look only at what is there
                mask = (torch.arange(S, device=tokens.device) <= positions[..., None])[:, None]  # (B, 1, T, S)
        x = self.embed_tokens(tokens)                            # (B, T, D)
        angles = positions[:, None, :, None] * self.frequencies.to(x.device)  # (B or 1, 1, T, d/2)
        rope = ((angles.cos() * self.magnitude).to(x.dtype), (angles.sin() * self.magnitude).to(x.dtype))
        for layer in self.layers:
            if torch.is_grad_enabled():  # keep one (B, T, D) input per block and recompute the rest going back
                x = checkpoint(layer, x, rope, use_reentrant=False)
            else:
                x = layer(x, rope, mask, cache)
        if cache is not None:
            cache.width = S
            cache.lengths = cache.lengths + T
        return self.norm(x)

    def scales(self) -> list[nn.Parameter]:
        """The learned numbers, one tensor per layer, (H,) or (H * d,)."""
        return [layer.self_attn.scale for layer in self.layers]

    def set_scales(self, scales: list[Tensor]) -> None:
        """Put these scales (float32, one per layer) in, trainable; everything else is frozen."""
        self.requires_grad_(False)
        for layer, scale in zip(self.layers, scales, strict=True):
            device = layer.self_attn.o_proj.weight.device
            layer.self_attn.scale = nn.Parameter(scale.detach().to(device, torch.float32, copy=True))

    def reset_scales(self, mode: str) -> None:
        """Scales of one: the base model, to the bit. mode is "head" (H per layer) or "channel" (H * d per layer)."""
        size = self.config.num_attention_heads if mode == "head" else self.config.channels()
        self.set_scales([torch.ones(size)] * self.config.num_hidden_layers)


class Cache:
    """Keys and values of the tokens read so far, for a batch of prompts that may differ in length.

    Prompts are padded on the right. While a prompt is read, causality keeps its tokens from seeing the padding; after
    that `lengths` says where each row ends, new tokens overwrite the padding, and the mask hides what is left of it.
    """

    def __init__(self, model: Llama, batch: int, size: int):
        c, like = model.config, model.embed_tokens.weight
        shape = (c.num_hidden_layers, batch, c.num_key_value_heads, size, c.head_dim)
        self.k, self.v = like.new_zeros(shape), like.new_zeros(shape)  # (L, B, G, size, d)
        self.rows = torch.arange(batch, device=like.device)[:, None]   # (B, 1)
        self.lengths = torch.zeros(batch, dtype=torch.long, device=like.device)
        self.width = 0  # columns in use, the longest row's

    def place(self, offsets: Tensor) -> Tensor:
        """Positions (B, T) of the next tokens of each row."""
        self.positions = self.lengths[:, None] + offsets
        return self.positions

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v (B, G, T, d) of the new tokens; return all there are, (B, G, S, d)."""
        self.k[layer][self.rows, :, self.positions] = k.transpose(1, 2)
        self.v[layer][self.rows, :, self.positions] = v.transpose(1, 2)
        S = self.width + k.shape[2]
        return self.k[layer, :, :, :S], self.v[layer, :, :, :S]


@torch.no_grad()
def generate(model: Llama, prompts: list[list[int]], max_new_tokens: int, stop: set[int] = frozenset()):
    """Greedy continuation of each prompt (token ids): a list of lists, each ended before its first `stop` token."""
    device = model.embed_tokens.weight.device
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    width = int(lengths.max())
    tokens = torch.tensor([p + [0] * (width - len(p)) for p in prompts], device=device)  # (B, T), padded on the right
    cache = Cache(model, len(prompts), width + max_new_tokens)
    last = model(tokens, cache)[cache.rows[:, 0], lengths - 1]  # (B, D): the last real token of each row
    cache.lengths = lengths
    answers, running = [[] for _ in prompts], set(range(len(prompts)))
    for _ in range(max_new_tokens):
        token = model.lm_head(last).argmax(-1)  # (B,)
        for row, t in enumerate(token.tolist()):
            if row in running and t in stop:
                running.remove(row)
            elif row in running:
                answers[row].append(t)
        if not running:
            break
        last = model(token[:, None], cache)[:, -1]
    return answers


# ---------------------------------------------------------------------------------------------------------------------
# 5. Checkpoints
# ---------------------------------------------------------------------------------------------------------------------
# A checkpoint is read one tensor at a time from memory-mapped files, so a 7B never needs two copies in memory.


class Checkpoint:
    """The tensors of a Hugging Face folder by name, whatever its files: safetensors or .bin, one file or shards.

    Files are opened again for each tensor: a mapping dropped is memory given back, and opening is cheap.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        for name in ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"):
            path = self.folder / name
            if path.is_file():
                break
        else:
            raise UserError(f"{folder}: no weights; expected model.safetensors, pytorch_model.bin or an .index.json of shards")
        if path.suffix == ".json":
            index = read_json(path)
            files = index.get("weight_map") if isinstance(index, dict) else None
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
            if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
                raise UserError(f"{path}: must hold a dictionary of tensors")
            return use({name: tensors.get for name in tensors})
        except (SafetensorError, OSError, RuntimeError, ValueError, EOFError, KeyError, AttributeError, pickle.UnpicklingError) as e:
            raise UserError(f"{path}: cannot be read as weights ({str(e).splitlines()[0][:200]}); download it again") from e

    def _names(self, path: Path) -> set[str]:
        return self._open(path, set)

    def __getitem__(self, name: str) -> Tensor:
        """One tensor, on the CPU, memory-mapped where the file allows it."""
        tensor = self._open(self.files[name], lambda tensors: tensors[name](name))
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            raise UserError(f"{self.files[name]}: {name} is {str(tensor.dtype)[6:]}; quantised checkpoints are not supported, use the original")
        return tensor

    def __iter__(self):
        return iter(sorted(self.files))


def load_model(folder, config: Config, device: torch.device, dtype: torch.dtype | None = None) -> Llama:
    """The frozen model, its scales at one. dtype None: the checkpoint's own on an accelerator, float32 on a CPU.

    Every tensor of the files is used and every parameter of the model filled, or it is a UserError.
    """
    weights = Checkpoint(folder)
    with torch.device("meta"):  # shapes without memory
        model = Llama(config)
    missing = dict(model.named_parameters())
    for name in tqdm(weights, desc="loading", unit=" tensors", leave=False, delay=1):
        short = name.removeprefix("model.")
        if short.endswith("rotary_emb.inv_freq") or (config.tie_word_embeddings and short == "lm_head.weight"):
            continue  # the frequencies come from config.json; a tied output matrix is the embedding
        if short not in missing or short.endswith("scale"):
            raise UserError(f"{weights.files[name]}: holds {name}, which the model in config.json does not have")
        tensor, expected = weights[name], missing.pop(short).shape
        if tensor.shape != expected:
            raise UserError(f"{weights.files[name]}: {name} has shape {list(tensor.shape)}, config.json says {list(expected)}")
        tensor = tensor.to(device, dtype or (torch.float32 if device.type == "cpu" else tensor.dtype), copy=True)
        if not tensor.isfinite().all():
            raise UserError(f"{weights.files[name]}: {name} holds NaN or infinity; download it again or use another dtype")
        owner, _, leaf = short.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))
    missing = [name for name in missing if not name.endswith("scale")]
    if missing:
        raise UserError(f"{folder}: the weights lack {missing[0]}" + (f" and {len(missing) - 1} more" if missing[1:] else ""))
    if config.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    model.reset_scales("head")
    return model.eval()


def save_scales(path, scales: list[Tensor], config: Config, **facts) -> None:
    """Write scales.safetensors: `layers.{i}.scale`, float32, and how they came about as metadata (strings)."""
    mode = "head" if len(scales[0]) == config.num_attention_heads else "channel"
    about = dict(format="seal-1", mode=mode, heads=config.num_attention_heads, head_size=config.head_dim, layers=len(scales)) | facts
    tensors = {f"layers.{i}.scale": s.detach().float().cpu().contiguous() for i, s in enumerate(scales)}
    with whole_file(path) as partial:
        partial.write_bytes(to_safetensors(tensors, {key: str(value) for key, value in about.items()}))


def read_scales(path, config: Config | None = None) -> tuple[list[Tensor], dict]:
    """The scales in a file, one tensor per layer, and its metadata. With a config: UserError unless they fit it."""
    try:
        with safe_open(path, framework="pt") as file:
            about, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path}: cannot be read as scales ({e})") from e
    if about.get("format") != "seal-1":
        raise UserError(f"{path}: is not a scales file; `seal.py train` writes them")
    scales = [tensors.pop(f"layers.{i}.scale", None) for i in range(len(tensors))]
    if tensors or not scales:
        raise UserError(f"{path}: layers are missing or unknown ({sorted(tensors)[:1]})")
    if config is not None:
        heads, width, layers = config.num_attention_heads, config.channels(), config.num_hidden_layers
        size = heads if about.get("mode") == "head" else width
        if len(scales) != layers or any(s.shape != (size,) for s in scales):
            raise UserError(f"{path}: made for {len(scales)} layers of {list(scales[0].shape)} scales, the model has {layers} of [{size}]")
    if not all(s.dtype == torch.float32 and s.isfinite().all() for s in scales):
        raise UserError(f"{path}: scales must be finite float32 numbers; train again")
    return scales, about


def fold(name: str, tensor: Tensor, scales: list[Tensor] | None) -> Tensor:
    """The checkpoint's tensor `name` with its layer's scales multiplied in, if it is an o_proj weight; float32 then.

    (s * y) W^T = y (W * s)^T: the scale of input channel c multiplies column c of o_proj (paper, section 4). This is
    exact for any attention. The rows of v_proj would do for multi-head attention only: with grouped queries one value
    head feeds several query heads, which may have different scales. Biases come after the product and stay.
    """
    match = re.fullmatch(r"(?:model\.)?layers\.(\d+)\.self_attn\.o_proj\.weight", name)
    if not scales or not match:
        return tensor
    scale = scales[int(match[1])]                                       # (H,) or (H * d,)
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
    "none": ("{}", "{}", None),
    "vicuna": (VICUNA, "{}", "</s>"),
    "llama-2": ("[INST] {} [/INST]", "{} ", "</s>"),
    "mistral": ("[INST] {} [/INST]", "{}", "</s>"),
    "llama-3": (LLAMA3, "{}", "<|eot_id|>"),
}


def guess_template(folder: Path) -> tuple[str, str]:
    """(template, why): from the checkpoint's own chat template, else from its name."""
    path = folder / "tokenizer_config.json"
    chat = read_json(path).get("chat_template") if path.is_file() else None
    for mark, name in (("<|start_header_id|>", "llama-3"), ("<<SYS>>", "llama-2"), ("[INST]", "mistral"), ("ASSISTANT", "vicuna")):
        if chat and mark in str(chat):
            return name, f"tokenizer_config.json's chat template has {mark}"
    name = f"{folder.resolve().name} {read_json(folder / 'config.json').get('_name_or_path', '')}".lower()
    for pattern, template in (("vicuna|longchat", "vicuna"), ("llama-2.*chat", "llama-2"), ("mistral.*instruct", "mistral"), ("llama-3.*instruct", "llama-3")):
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
            self._sentencepiece(folder)
        elif (folder / "tokenizer.json").is_file():
            self._tokenizers(folder / "tokenizer.json")
        else:
            raise UserError(f"{folder}: no tokenizer.model and no tokenizer.json; copy them from the original checkpoint")
        if self.size > config.vocab_size:
            raise UserError(f"{folder}: the tokenizer has {self.size} pieces, the model only {config.vocab_size}; they do not belong together")
        self.end = self.id(TEMPLATES[name][2]) if TEMPLATES[name][2] else self.eos
        if self.end is None:
            raise UserError(f"--template {name}: the tokenizer has no {TEMPLATES[name][2] or 'end-of-text token'}; choose another template")
        self.stop = {self.end, self.eos} - {None}
        for file in ("config.json", "generation_config.json"):
            ids = read_json(folder / file).get("eos_token_id") if (folder / file).is_file() else None
            self.stop |= {i for i in (ids if isinstance(ids, list) else [ids]) if isinstance(i, int)}

    def _sentencepiece(self, folder: Path) -> None:
        """Llama 1 and 2, Mistral: tokenizer.model, plus pieces that were added later in other files."""
        try:
            model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        except (RuntimeError, OSError) as e:
            raise UserError(f"{folder / 'tokenizer.model'}: is not a sentencepiece model; download it again") from e
        self.added = added_tokens(folder)
        pieces = {token: i for token, i in self.added.items() if i >= model.vocab_size()}
        split = re.compile("(" + "|".join(map(re.escape, pieces)) + ")") if pieces else None

        def encode(text: str) -> list[int]:
            if not split:
                return model.encode(text)
            return [i for part in split.split(text) if part for i in ([pieces[part]] if part in pieces else model.encode(part))]

        def decode(ids: list[int]) -> str:
            return model.decode([i for i in ids if i < model.vocab_size()])

        self.encode, self.decode = encode, decode
        self.id = lambda piece: self.added.get(piece, model.piece_to_id(piece) if model.piece_to_id(piece) != model.unk_id() else None)
        self.bos, self.eos = (i if i >= 0 else None for i in (model.bos_id(), model.eos_id()))
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
        hints = path.with_name("tokenizer_config.json")
        hints = read_json(hints) if hints.is_file() else {}
        token = lambda key: hints[key]["content"] if isinstance(hints.get(key), dict) else hints.get(key)
        self.encode = lambda text: model.encode(text, add_special_tokens=False).ids
        self.decode = model.decode
        self.id = model.token_to_id
        self.bos, self.eos = (model.token_to_id(token(key)) if token(key) else None for key in ("bos_token", "eos_token"))
        self.size = model.get_vocab_size()

    def prompt(self, text: str) -> list[int]:
        """Ids of the prompt inside the template, with one BOS in front."""
        ids = self.encode(TEMPLATES[self.template][0].replace("{}", text))
        return ids if self.bos is None or ids[:1] == [self.bos] else [self.bos] + ids

    def answer(self, text: str) -> list[int]:
        """Ids that should follow the prompt: the answer (sentencepiece itself puts the space in front) and its end."""
        return self.encode(TEMPLATES[self.template][1].replace("{}", text)) + [self.end]


def added_tokens(folder: Path) -> dict[str, int]:
    """Tokens outside tokenizer.model, {text: id}: added_tokens.json, else added_tokens_decoder in tokenizer_config.json."""
    added, config = folder / "added_tokens.json", folder / "tokenizer_config.json"
    tokens = {}
    if config.is_file():
        tokens = {t["content"]: int(i) for i, t in read_json(config).get("added_tokens_decoder", {}).items()}
    if added.is_file():
        tokens |= read_json(added)
    return tokens
