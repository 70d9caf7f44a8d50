"""SEAL: Scaling to Emphasize Attention for Long-context retrieval, in one file.

The paper (Lee et al., ACL 2025, arXiv 2501.15225) in a page
------------------------------------------------------------
Give a language model a long prompt and ask for one fact in it. Far from its context limit
it answers, near the limit it fails. It has not forgotten how to retrieve: switch off one
attention head and accuracy moves by twenty points, up for some heads, down for others
(section 3). The balance between heads, learned on short texts, is wrong for long ones.

So learn the balance and nothing else. Freeze every weight, multiply each head's output
by one number, and train those numbers on 50 synthetic prompts (section 4):

    y = concat_h( s_h * softmax(q_h k_h^T / sqrt(d)) v_h ) W_o

  SEAL-H  --mode head     one s per layer and head      32 x 32 = 1,024 for a 7B
  SEAL-C  --mode channel  one s per layer and channel   32 x 32 x 128 = 131,072

A scale above 1 makes a head louder, below 1 quieter, and 0 prunes it. All start at 1,
which is the model you downloaded. Before W_o the heads are still apart, after it they are
one sum: it is the last place to weigh them. In the end s multiplies the columns of W_o,
and an ordinary checkpoint is left: the gain costs nothing.

The map, the method first: 1 Model, 2 Data, 3 Training, 4 Evaluation, 5 Folding; then the
plumbing: 6 Checkpoints, 7 Text, 8 Commands. SEAL itself is one line of Attention.

Letters in shapes: B sequences, T tokens, S tokens so far, D width of the residual stream,
H query heads, G key-value heads, d channels a head, L layers, V vocabulary, A tokens of
an answer.
"""

import argparse
import bisect
import hashlib
import io
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import time
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime
from functools import partial
from itertools import accumulate, product
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save, save_file
from torch import Tensor, nn
from tqdm import tqdm

METHOD = {"head": "SEAL-H", "channel": "SEAL-C"}  # --mode, and the paper's name for it
TOY = Path(__file__).resolve().parent / "assets" / "toy-llama"


class UserError(Exception):
    """A mistake the user can mend, in one line: what is wrong, where, what to do."""


# --------------------------------------------------------------------------------------
# 1. Model
# --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """The shape of a Llama, in config.json's own names."""

    vocab_size: int  # V
    hidden_size: int  # D
    intermediate_size: int  # width inside the feed-forward
    num_hidden_layers: int  # L
    num_attention_heads: int  # H: query heads, the ones that SEAL scales
    num_key_value_heads: int  # G: each serves H / G query heads
    head_dim: int  # d; H * d need not be D
    max_position_embeddings: int  # the context in tokens, extension included
    rms_norm_eps: float = 1e-6  # added under RMSNorm's root
    rope_theta: float = 10000.0  # b: base of the rotary frequencies
    rope_scaling: dict = field(default_factory=lambda: {"rope_type": "default"})
    sliding_window: int | None = None  # tokens a query may look back, if limited
    tie_word_embeddings: bool = False  # the output matrix is the embedding
    attention_bias: bool = False  # of q, k, v and, if the files have it, o
    mlp_bias: bool = False
    qk_norm: bool = False  # q and k are normalised in each head (Qwen3)


def heads_of(config: Config) -> tuple[int, int, int]:
    """(L, H, d): what scales must fit."""
    return config.num_hidden_layers, config.num_attention_heads, config.head_dim


# RoPE turns pair i of a head's channels by the angle position * freq_i, so that q . k
# depends on the distance only. The first pair turns by 1 radian per token and tells
# neighbours apart; the last turns once in 54,000 tokens (d = 128, b = 10000).


def rope_frequencies(config: Config) -> tuple[Tensor, float]:
    """Frequencies (d/2,) in radians per token, and a factor on cos and sin (YaRN's)."""
    d, b, rope = config.head_dim, config.rope_theta, config.rope_scaling
    kind, s, magnitude = rope["rope_type"], rope.get("factor", 1.0), 1.0
    original = rope.get("original_max_position_embeddings")  # context before stretching
    pairs = torch.arange(d // 2, dtype=torch.float64, device="cpu")
    freq = b ** (-2 * pairs / d)
    keep = torch.ones_like(freq)  # 1: a frequency stays, 0: it is divided by s
    if kind == "linear":
        keep = torch.zeros_like(freq)
    elif kind == "llama3":  # what turns often within the original context stays
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        keep = (original * freq / (2 * math.pi) - low) / (high - low)
    elif kind == "yarn":  # likewise, with a ramp linear in the pair, and sharper attention
        fast, slow = (  # the pairs that make so many turns within the original context
            d * math.log(original / (2 * math.pi * rope[turns])) / (2 * math.log(b))
            for turns in ("beta_fast", "beta_slow")
        )
        low, high = max(0, math.floor(fast)), min(d - 1, math.ceil(slow))
        keep = 1 - (pairs - low) / max(0.001, high - low)
        magnitude = rope["attention_factor"] or 0.1 * math.log(s) + 1
    keep = keep.clamp(0, 1)
    return (keep * freq + (1 - keep) * freq / s).float(), magnitude


YARN = {"beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": None}  # its defaults


def extend(config: Config, spec: str) -> Config:
    """The config with its context stretched, training-free: ntk:4, linear:4 or yarn:4.

    NTK replaces the base b by b * s^(d / (d - 2)) (paper, section 6). The slowest pair is
    stretched by exactly s, so that s times the distance gives an angle it knows; the
    fastest, which tells neighbours apart, stays. An extension is a changed config, no
    more: model, fold and export follow.
    """
    if spec == "none":
        return config
    if not re.fullmatch(r"(ntk|linear|yarn):[1-9]\d{0,3}(\.\d+)?", spec):
        raise UserError(f"--extend {spec}: must be none, ntk:S, linear:S or yarn:S, S >= 1")
    kind, _, factor = spec.partition(":")
    s, d, context = float(factor), config.head_dim, config.max_position_embeddings
    rope = {"rope_type": kind, "factor": s, "original_max_position_embeddings": context}
    if kind == "ntk":
        config = replace(config, rope_theta=config.rope_theta * s ** (d / (d - 2)))
    elif config.rope_scaling["rope_type"] != "default":
        raise UserError(f"--extend {spec}: the checkpoint is stretched; use ntk:{factor}")
    else:
        config = replace(config, rope_scaling=rope | YARN)
    return replace(config, max_position_embeddings=int(context * s))


def rotate(x: Tensor, rope) -> Tensor:
    """Turn the pairs (i, i + d/2) of x (B, heads, T, d) by rope: cos and sin (T, d/2)."""
    cos, sin = rope
    a, b = x.chunk(2, dim=-1)  # (B, heads, T, d/2) each
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, causal: q (B, H, T, d), k and v (B, G, S, d) -> as q.

    All tokens ask (T = S), or the last one does (T = 1).
    """
    causal = q.shape[2] > 1
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)


# Modules carry the names of Hugging Face's checkpoints.


class Attention(nn.Module):
    """Causal attention over H heads, each scaled by SEAL before the output projection."""

    def __init__(self, config: Config):
        super().__init__()
        D, d, eps = config.hidden_size, config.head_dim, config.rms_norm_eps
        H, G, bias = config.num_attention_heads, config.num_key_value_heads, config.attention_bias
        self.heads, self.head_dim = H, d
        self.q_proj = nn.Linear(D, H * d, bias=bias)
        self.k_proj = nn.Linear(D, G * d, bias=bias)
        self.v_proj = nn.Linear(D, G * d, bias=bias)
        self.o_proj = nn.Linear(H * d, D, bias=bias)
        self.q_norm = nn.RMSNorm(d, eps) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(d, eps) if config.qk_norm else nn.Identity()
        self.scale = nn.Parameter(torch.ones(H))  # s: (H,), or (H * d,) for SEAL-C

    def forward(self, x: Tensor, rope, cache=None, start: int = 0) -> Tensor:
        """x (B, T, D) -> (B, T, D). cache: this layer's k and v, filled up to start."""
        B, T, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(B, T, -1, self.head_dim))  # (B, T, H, d)
        k = self.k_norm(self.k_proj(x).view(B, T, -1, self.head_dim))  # (B, T, G, d)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, G, T, d)
        q, k = rotate(q.transpose(1, 2), rope), rotate(k.transpose(1, 2), rope)
        if cache is not None:
            cache[0][:, :, start : start + T] = k
            cache[1][:, :, start : start + T] = v
            k, v = (stored[:, :, : start + T] for stored in cache)  # (B, G, S, d)
        y = attend(q, k, v).transpose(1, 2)  # (B, T, H, d)

        # SEAL (paper, section 4): y = concat_h( s_h * head_h ) W_o. bfloat16 has 8 bits:
        # the product is made in float32, as the scales are, and rounded once.
        y = y * self.scale.view(self.heads, -1)  # (B, T, H, d) * (H, 1) or (H, d)
        return self.o_proj(y.to(x.dtype).flatten(2))  # (B, T, H * d) -> (B, T, D)


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: Config):
        super().__init__()
        D, hidden, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(D, hidden, bias=bias)
        self.up_proj = nn.Linear(D, hidden, bias=bias)
        self.down_proj = nn.Linear(hidden, D, bias=bias)

    def inside(self, x: Tensor) -> Tensor:
        return F.silu(self.gate_proj(x)) * self.up_proj(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.inside(x))


class Block(nn.Module):
    """One layer: attention, then feed-forward, each added to the residual stream."""

    def __init__(self, config: Config):
        super().__init__()
        D, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = nn.RMSNorm(D, eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(D, eps)
        self.mlp = FeedForward(config)

    def attend(self, x: Tensor, rope, cache=None, start: int = 0) -> Tensor:
        return x + self.self_attn(self.input_layernorm(x), rope, cache, start)

    def forward(self, x: Tensor, rope, cache=None, start: int = 0) -> Tensor:
        x = self.attend(x, rope, cache, start)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """Embedding, L blocks, a norm, and the output matrix."""

    def __init__(self, config: Config):
        super().__init__()
        self.config, D = config, config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, D)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(D, config.rms_norm_eps)
        self.lm_head = nn.Linear(D, config.vocab_size, bias=False)
        self.frequencies, self.magnitude = rope_frequencies(config)

    def forward(self, tokens: Tensor, cache=None, start: int = 0) -> Tensor:
        """tokens (B, T) -> the residual stream after the last block (B, T, D).

        cache: per layer, room for k and v (B, G, any size, d), filled up to `start`.
        """
        end, window = start + tokens.shape[1], self.config.sliding_window
        if window and end > window:
            raise UserError(f"{end} tokens exceed the model's sliding window of {window}")
        x = self.embed_tokens(tokens)  # (B, T, D)
        positions = torch.arange(start, end, device=x.device)
        angles = positions[:, None] * self.frequencies.to(x.device)  # (T, d/2)
        rope = [(self.magnitude * f(angles)).to(x.dtype) for f in (torch.cos, torch.sin)]
        for i, layer in enumerate(self.layers):
            if torch.is_grad_enabled() and cache is None:
                x = Recompute.apply(x, layer.self_attn.scale, layer, rope)
            else:
                x = layer(x, rope, cache and cache[i], start)
        return x

    def logits(self, x: Tensor) -> Tensor:
        """Residual stream (..., D) -> logits (..., V), float32. Of all positions they would
        be the largest tensor there is; training needs them at some thirty."""
        return self.lm_head(self.norm(x)).float()

    def scales(self) -> list[nn.Parameter]:
        """The learned numbers, a tensor per layer: (H,) or (H * d,)."""
        return [layer.self_attn.scale for layer in self.layers]

    def set_scales(self, scales: list[Tensor]) -> None:
        """Put these scales in (float32), trainable; everything else is frozen."""
        self.requires_grad_(False)
        for layer, scale in zip(self.layers, scales, strict=True):
            scale = scale.detach().to(self.norm.weight.device, torch.float32, copy=True)
            layer.self_attn.scale = nn.Parameter(scale)

    def reset_scales(self, mode: str) -> None:
        """Scales of one: the base model, to the bit."""
        H, d = self.config.num_attention_heads, self.config.head_dim
        self.set_scales([torch.ones(H if mode == "head" else H * d) for _ in self.layers])


class Recompute(torch.autograd.Function):
    """A block that keeps only x for the way back, and computes its inside, some twenty
    times as large, again there: all but down_proj's product, whose gradient is grad @ W."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, block: Block, rope) -> Tensor:
        ctx.block, ctx.rope = block, rope
        ctx.save_for_backward(x)
        return block(x, rope)

    @staticmethod
    def backward(ctx, grad: Tensor):
        block, (x,), below = ctx.block, ctx.saved_tensors, ctx.needs_input_grad[0]
        with torch.enable_grad():
            x = x.detach().requires_grad_(below)
            middle = block.attend(x, ctx.rope)  # (B, T, D)
            inside = block.mlp.inside(block.post_attention_layernorm(middle))
        wanted = [block.self_attn.scale] + [x] * below  # nothing trains below block 0
        grads = grad, grad @ block.mlp.down_proj.weight
        scale_grad, *x_grad = torch.autograd.grad((middle, inside), wanted, grads)
        return (*x_grad, None)[0], scale_grad, None, None


@torch.no_grad()
def generate(model: Llama, prompt: list[int], max_new_tokens: int, stop=()) -> list[int]:
    """Greedy continuation of a prompt (token ids), ended before a token of `stop`."""
    c, like = model.config, model.norm.weight
    shape = 1, c.num_key_value_heads, len(prompt) + max_new_tokens, c.head_dim
    cache = [(like.new_empty(shape), like.new_empty(shape)) for _ in model.layers]
    tokens, start, answer = prompt, 0, []
    for _ in range(max_new_tokens):
        x = model(torch.tensor([tokens], device=like.device), cache, start)  # (1, T, D)
        start += len(tokens)
        token = model.logits(x[0, -1]).argmax().item()
        if token in stop:
            break
        answer.append(token)
        tokens = [token]
    return answer


# --------------------------------------------------------------------------------------
# 2. Data
# --------------------------------------------------------------------------------------
# Random in content and exact in form (paper, section 4.1). 50 samples are enough because
# nothing new is to be learned, only a balance.

ANSWER_ROOM = 48  # tokens kept free for the answer when a prompt is to fill the context


@dataclass
class Sample:
    """A prompt, the answer to learn, and what decides whether a text answers it."""

    prompt: str
    answer: str
    expected: int | str | list[str] | None = None
    prefix: str = ""  # the answer's beginning, given and not learned

    def score(self, text: str) -> float:
        """How right a generated text is, 0 to 1; above 0.5 counts as correct.

        expected is a number: LongEval's rule, the last whole number of the text is it.
        Texts: RULER's, the share of them that it contains, ignoring case. None (needles):
        ROUGE-1 recall, the share of the answer's words that occur in it.
        """
        if isinstance(self.expected, int):
            numbers = re.findall(r"-?\d+" if self.expected < 0 else r"\d+", text)
            return float(numbers != [] and int(numbers[-1][:4000]) == self.expected)
        if self.expected is not None:
            wanted = [self.expected] if isinstance(self.expected, str) else self.expected
            return sum(w.casefold() in text.casefold() for w in wanted) / len(wanted)
        wanted = Counter(re.findall(r"\w+", self.answer.casefold()))
        found = Counter(re.findall(r"\w+", text.casefold()))
        return (wanted & found).total() / max(1, wanted.total())

    def fingerprint(self) -> str:
        """Scales remember the prompts that they were trained on."""
        return hashlib.sha256(self.prompt.encode()).hexdigest()[:12]


def largest_fit(make, tokenizer, length: int, limit: int) -> Sample:
    """make(n) with the largest n <= limit whose prompt fits `length` tokens, templated."""

    def size(n):
        return len(tokenizer.prompt(make(n).prompt))

    n = bisect.bisect_right(range(1, limit + 1), length, key=size)
    if not 0 < n < limit:
        raise UserError(f"--length {length}: not within {size(1)} to {size(limit)} tokens")
    return make(n)


# Line retrieval, in LongEval's wording to the letter.
RECORD = (
    "Below is a record of lines I want you to remember. Each line begins with "
    "'line <line index>' and contains a '<REGISTER_CONTENT>' at the end of the line as a "
    "numerical value. For each line index, memorize its corresponding <REGISTER_CONTENT>. "
    "At the end of the record, I will ask you to retrieve the corresponding "
    "<REGISTER_CONTENT> of a certain line index. Now the record start:\n\n{lines}\n"
    "Now the record is over. Tell me what is the <REGISTER_CONTENT> in line {key}? "
    "I need the number."
)
LINE = "line {key}: REGISTER_CONTENT is <{number}>\n"
LINE_ANSWER = "The <REGISTER_CONTENT> in line {key} is {number}."
ADJECTIVES = """
    able bold brave brief bright brisk broad busy calm cheap clean clear clever close cold
    cool crisp curly damp dark deep dry dusty eager early easy empty fair famous fancy fast
    fine firm flat fond free fresh full funny gentle glad golden grand great green grim
    happy hard heavy hollow honest huge humble icy jolly keen kind large late lazy light
    little lively lonely long loud lucky mild modest narrow neat new nice noble odd old open
    plain polite proud quick quiet rapid rare ready rich ripe rough round royal
""".split()
NOUNS = """
    acorn anchor apple arrow badge banjo barrel basket beacon beaver bell bench berry bottle
    bridge bucket button cabin camel candle canoe carpet castle cedar cherry clock cloud
    coin comet coral cradle crown desk dolphin donkey drum eagle engine falcon feather fence
    ferry fiddle flute forest fountain garden garlic glove goose grape guitar hammer harbor
    hazel helmet heron island jacket jungle kettle ladder lantern lemon lizard magnet maple
    marble meadow melon mirror monkey needle onion orchid otter paddle parrot pebble pencil
    piano pigeon pillow planet pocket puzzle rabbit ribbon river
""".split()
KEYS = [f"{adjective}-{noun}" for adjective in ADJECTIVES for noun in NOUNS]  # 8,010


def lines_sample(rng, tokenizer, length: int, depth: float | None = None) -> Sample:
    """A record of lines that fills `length` tokens, and a question for one of them.

    Keys are unique, numbers uniform in 1..50000, the asked line anywhere or at `depth` %.
    """
    limit = min(length // 4 + 1, len(KEYS))  # no line is shorter than four tokens
    keys = rng.sample(KEYS, limit)
    numbers = [rng.randint(1, 50000) for _ in keys]
    share = rng.random() if depth is None else depth / 100

    def make(n: int) -> Sample:
        pairs = list(zip(keys[:n], numbers))
        lines = "".join(LINE.format(key=key, number=number) for key, number in pairs)
        key, number = pairs[min(n - 1, int(share * n))]
        answer = LINE_ANSWER.format(key=key, number=number)
        return Sample(RECORD.format(lines=lines, key=key), answer, expected=number)

    return largest_fit(make, tokenizer, length, limit)


# Needle in a haystack. As the paper's ten, each training needle begins as its question,
# and no model could know it.
NEEDLE, QUESTION = "The best thing to do in {} is {}.", "What is the best thing to do in {}?"
TEST_NEEDLE = "San Francisco", "eat a sandwich and sit in Dolores Park on a sunny day"
CITIES = "Paris London Rome Vienna Oslo Madrid Lisbon Dublin Athens Prague".split()
TRAINING_NEEDLES = [
    (city, f"find a {ADJECTIVES[6 * i]} {NOUNS[6 * i]} and feed the {NOUNS[6 * i + 3]}")
    for i, city in enumerate(CITIES)
]


def needle_sample(rng, tokenizer, length, needle, depth: float, haystack) -> Sample:
    """A needle at `depth` percent of a text that fills `length` tokens, and its question.

    The text is the file's, from anywhere in it and round again. The needle goes in front of
    the sentence that the depth, counted in tokens, falls into. (A search for a full stop's
    token would miss: it has several.)
    """
    with reading(f"--haystack {haystack}"):
        text = Path(haystack).read_text(encoding="utf-8")
        # A sentence ends at . ! ? before a space, and at the full-width ones.
        sentences = re.findall(r"(?s)\S.*?(?:[.!?](?=\s)|[。！？]|$)\s*", text)
        start = rng.randrange(len(sentences))
    limit = length // 3 + 1  # no sentence is shorter than three tokens
    sentences = [sentences[(start + i) % len(sentences)] for i in range(limit)]
    ends = list(accumulate(len(tokenizer.encode(s)) for s in sentences))
    fact, question = NEEDLE.format(*needle), QUESTION.format(needle[0])

    def make(n: int) -> Sample:
        at = bisect.bisect_right(ends, ends[n - 1] * depth / 100, hi=n)
        text = "".join([*sentences[:at], fact + " ", *sentences[at:n]])
        return Sample(f"{text.strip()}\n\n{question}", fact)

    return largest_fit(make, tokenizer, length, limit)


def read_jsonl(path) -> list[Sample]:
    """A sample per line: {"prompt", "answer"} and, optionally, "expected" and "prefix"."""
    samples = []
    with reading(f"--task {path}"):
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    for number, line in enumerate(lines, 1):
        if line.strip():
            with reading(f"{path}, line {number}"):
                samples.append(to_sample(json.loads(line)))
    return samples


def to_sample(case: dict) -> Sample:
    """A line of a JSONL file, also LongEval's (prompt, expected_number, random_idx) or
    RULER's (input, outputs, answer_prefix); raises whatever it meets if it is none."""
    answer = case.get("answer")
    expected = case.get("expected", case.get("expected_number", case.get("outputs")))
    if answer is None and "random_idx" in case:
        answer = LINE_ANSWER.format(key=case["random_idx"][0], number=expected)
    elif answer is None:
        answer = ", ".join(expected) if isinstance(expected, list) else str(expected or "")
    prefix = case.get("prefix") or case.get("answer_prefix") or ""
    sample = Sample(case.get("prompt") or case["input"], answer, expected, prefix)
    if not sample.prompt.strip() or not answer.strip() or expected in ("", []):
        raise ValueError("prompt, answer and expected must not be empty")
    sample.score((answer + prefix).encode().decode())  # fails if one is of another kind
    return sample


def make_samples(
    task, tokenizer, length, count, split, seed=0, depth=None, haystack=None, avoid=()
) -> list[Sample]:
    """Up to `count` samples of a task (lines, needle, FILE.jsonl) of up to `length` tokens.

    split ("train", "eval") is part of the seed. depth: where the answer stands, in percent;
    None: anywhere. What is in `avoid` (fingerprints) is left out: nothing is measured on a
    prompt that its scales were trained on.
    """
    samples = []
    for i in range(count):
        rng = random.Random(f"{task} {split} {seed} {length} {i}")
        if task == "lines":
            samples.append(lines_sample(rng, tokenizer, length, depth))
        elif task == "needle":
            needle = rng.choice(TRAINING_NEEDLES) if split == "train" else TEST_NEEDLE
            at = rng.uniform(0, 100) if depth is None else depth
            samples.append(needle_sample(rng, tokenizer, length, needle, at, haystack))
    if not samples:
        samples = read_jsonl(task)
        random.Random(seed).shuffle(samples)
    samples = [s for s in samples if s.fingerprint() not in avoid][:count]
    if not samples:
        raise UserError(f"--task {task}: holds no prompt that was not trained on")
    for s in samples:
        if len(tokenizer.prompt(s.prompt, s.prefix)) > length:
            raise UserError(f"{task}: {s.prompt[:40]!r}... has more than {length} tokens")
    return samples


# --------------------------------------------------------------------------------------
# 3. Training
# --------------------------------------------------------------------------------------


def paper_lr(task: str, mode: str, layers: int) -> float:
    """The paper's learning rate (section 6, appendix A)."""
    if task == "needle":  # the paper gives 4e-2 and 5e-2, and not which is whose
        return 4e-2 if mode == "head" else 5e-2
    return 1e-2 if mode == "head" and layers < 40 else 2e-2  # 40 layers: a 13B


def answer_logits(model: Llama, prompt: list[int], answer: list[int]) -> Tensor:
    """The logits (A, V) that predict the answer, each from the token before."""
    tokens = torch.tensor([prompt + answer[:-1]], device=model.norm.weight.device)
    return model.logits(model(tokens)[0, -len(answer) :])  # (1, T, D) -> (A, D) -> (A, V)


def answer_loss(model: Llama, prompt: list[int], answer: list[int]) -> Tensor:
    """Mean cross-entropy of the answer's tokens, in nats. The prompt does not count: it is
    random, and its thousands of tokens would drown the thirty that matter."""
    logits = answer_logits(model, prompt, answer)
    return F.cross_entropy(logits, torch.tensor(answer, device=logits.device))


def train(model: Llama, pairs, lr, epochs=1, pull=0.0, saved=None, keep=None) -> list[float]:
    """Learn the model's scales on pairs (prompt ids, answer ids); returns every loss.

    The paper's recipe: AdamW at a constant rate, one prompt a step. Weight decay would pull
    scales to 0, which prunes heads; `pull` moves them that share of the way back to 1, which
    is to do nothing (the paper: 0). A run goes on from what `keep` stored as `saved`.
    """
    scales = model.scales()
    optimizer = torch.optim.AdamW(scales, lr=lr, weight_decay=0.0)
    losses = []
    if saved:
        losses = saved["losses"]
        optimizer.load_state_dict(saved["optimizer"])
    bar = tqdm(range(len(losses), epochs * len(pairs)), desc="training", unit="step")
    for step in bar:
        loss = answer_loss(model, *pairs[step % len(pairs)])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for scale in scales:
                scale += pull * (1 - scale)
        if not all(t.isfinite().all() for t in (loss, *scales)):
            raise UserError(f"step {step + 1}: the loss is {loss.item()}; lower --lr {lr:g}")
        losses.append(loss.item())
        bar.set_postfix_str(f"loss {losses[-1]:.3f}")
        if keep:
            keep(losses, optimizer)
    return losses


# --------------------------------------------------------------------------------------
# 4. Evaluation
# --------------------------------------------------------------------------------------


def evaluate(model, tokenizer, samples, max_new_tokens=100, desc="") -> dict:
    """Greedy answers, judged: {"prompts", "correct", "score"}, score the mean of all."""
    scores = []
    for sample in tqdm(samples, desc=desc, unit="prompt"):
        prompt = tokenizer.prompt(sample.prompt, sample.prefix)
        ids = generate(model, prompt, max_new_tokens, tokenizer.stop)
        scores.append(sample.score(tokenizer.decode(ids)))
    correct = sum(score > 0.5 for score in scores)
    return {"prompts": len(scores), "correct": correct, "score": sum(scores) / len(scores)}


def score_table(results: dict[str, list[dict]]) -> str:
    """{method: cells} as a table: the mean score (for lines: the share answered right)."""
    from tabulate import tabulate

    rows = []
    for cells in zip(*results.values()):
        where = {key: cells[0][key] for key in ("length", "depth")}
        rows.append(where | {name: cell["score"] for name, cell in zip(results, cells)})
    return tabulate(rows, headers="keys", floatfmt=".2f", intfmt=",")


def plot_scores(path, results: dict[str, list[dict]]) -> None:
    """A PNG of the score against length, with Wilson's 95% intervals of the share right."""
    import matplotlib.pyplot as plt
    from scipy.stats import binomtest

    figure, ax = plt.subplots(figsize=(5.0, 3.6), layout="constrained")  # inches
    for method, cells in results.items():
        x, shares, errors = [], [], []
        for c in cells:
            test = binomtest(c["correct"], c["prompts"])
            low, high = test.proportion_ci(method="wilson")
            x.append(c["length"])
            shares.append(test.statistic)
            errors.append((test.statistic - low, high - test.statistic))
        ax.errorbar(x, shares, list(zip(*errors)), label=method, fmt="o-", capsize=2)
    ax.set(xlabel="prompt length (tokens)", ylabel="share answered right", ylim=(-0.03, 1.05))
    ax.legend()
    with whole_file(path) as unfinished:
        figure.savefig(unfinished, format="png", dpi=110)


# --------------------------------------------------------------------------------------
# 5. Folding
# --------------------------------------------------------------------------------------


def fold(name: str, tensor: Tensor, scales, rows=slice(None)) -> Tensor:
    """These rows of the checkpoint's tensor `name`, scaled if it is an o_proj weight.

    (s * y) W^T = y (W * s)^T: the scale of input channel c multiplies column c of o_proj
    (paper, section 4), exactly, for any attention. The rows of v_proj would do only where
    every query head has a value head of its own. Biases come after the product and stay.
    """
    match = re.search(r"layers\.(\d+)\.self_attn\.o_proj\.weight$", name)
    if not match or not scales:
        return tensor[rows]
    scale = scales[int(match[1])]  # (H,) or (H * d,)
    columns = scale.repeat_interleave(tensor.shape[1] // len(scale))  # (H * d,)
    return tensor[rows].float() * columns  # (D, H * d), to be cast by whoever stores it


def save_scales(path, scales: list[Tensor], run: "Run") -> None:
    """Write scales.safetensors: layers.{i}.scale, float32, (H,) or (H * d,), and as
    metadata the run that trained them."""
    tensors = {f"layers.{i}.scale": s.detach().float().cpu() for i, s in enumerate(scales)}
    facts = {key: str(v) for key, v in asdict(run).items() if type(v) in (str, int, float)}
    with whole_file(path) as unfinished:
        unfinished.write_bytes(save(tensors, facts | {"format": "seal-1"}))


def read_scales(path, config: Config | None = None) -> tuple[list[Tensor], "Run"]:
    """The scales in a file, by layer, and their run. UserError unless they fit the config."""
    with reading(path), safe_open(path, framework="pt") as file:
        about = file.metadata() or {}
        if about.get("format") != "seal-1" or about.get("mode") not in METHOD:
            raise UserError(f"{path}: is not a scales file; `seal.py train` writes them")
        run = Run(**{f.name: f.type(about[f.name]) for f in fields(Run) if f.name in about})
        scales = [file.get_tensor(f"layers.{i}.scale") for i in range(run.layers)]
    size = run.heads * (run.head_size if run.mode == "channel" else 1)
    if not scales or not all(s.shape == (size,) and s.isfinite().all() for s in scales):
        raise UserError(f"{path}: holds no {run.layers} x {size} finite numbers; train again")
    made = run.layers, run.heads, run.head_size
    if config and made != heads_of(config):
        raise UserError(f"{path}: for {made} layers, heads, head size, not {heads_of(config)}")
    return scales, run


# --------------------------------------------------------------------------------------
# 6. Checkpoints
# --------------------------------------------------------------------------------------


def note(*words) -> None:
    """Tell the person at the terminal; stdout is kept for results."""
    print(*words, file=sys.stderr, flush=True)


@contextmanager
def reading(what):
    """Whatever goes wrong while a stranger's file is read is the user's, with its name."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:
        raise UserError(f"{what}: {e or type(e).__name__}") from e


@contextmanager
def whole_file(path, folder=False):
    """Yield a path to write to, renamed when complete: nobody ever meets half a file.
    What a killed run leaves there is replaced by the next. A folder must be new."""
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.part")
    if path.exists() and (folder or not path.is_file()):
        raise UserError(f"{path}: is there already; give a new name")
    try:
        if folder:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
        yield unfinished
        os.replace(unfinished, path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.unlink(missing_ok=True)


whole_folder = partial(whole_file, folder=True)


def write_json(path, data) -> None:
    with whole_file(path) as unfinished:
        unfinished.write_text(json.dumps(data, indent=2) + "\n")


def read_json(path) -> dict:
    """The JSON object in a file; empty where there is no such file."""
    with reading(path):
        return dict(json.loads(Path(path).read_text("utf-8"))) if Path(path).exists() else {}


def from_transformers(reader: str, folder):
    """What AutoConfig or AutoTokenizer reads; nothing is downloaded, no code is run."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers  # slow to import: only where a checkpoint is opened

    transformers.logging.set_verbosity_error()
    reader = getattr(transformers, reader)
    return reader.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def read_config(folder) -> Config:
    """The Config of a Hugging Face folder, from what transformers makes of config.json."""
    raw = read_json(Path(folder) / "config.json")
    if not raw:
        raise UserError(f"{folder}: has no config.json; see python -m extras.convert --help")
    with reading(f"{folder}/config.json"):
        c = from_transformers("AutoConfig", folder)
        rope = {key: value for key, value in c.rope_parameters.items() if value is not None}
        # LongChat and Vicuna 16K say their context elsewhere.
        context = getattr(c, "max_sequence_length", None) or c.max_position_embeddings
        if rope["rope_type"] == "yarn":  # some say the context before stretching
            stretched = rope["factor"] * rope["original_max_position_embeddings"]
            context, rope = max(context, int(stretched)), YARN | rope
        H, G = c.num_attention_heads, c.num_key_value_heads
        d = getattr(c, "head_dim", None) or c.hidden_size // H
        sizes = c.vocab_size, c.hidden_size, c.intermediate_size, c.num_hidden_layers, context
        unlike = {"mscale", "mscale_all_dim", "truncate", "partial_rotary_factor"} & set(rope)
        if (
            c.model_type not in ("llama", "mistral", "qwen2", "qwen3")
            or c.hidden_act != "silu"
            or rope["rope_type"] not in ("default", "linear", "llama3", "yarn")
            or unlike
            or (raw.get("rope_scaling") and raw.get("rope_parameters"))
            or raw.get("quantization_config")
            or H % G or d % 2 or not all(0 < n <= 2**24 for n in (*sizes, d))
        ):
            raise ValueError(f"not a Llama, Mistral or Qwen that is supported: {raw}")
        return Config(
            *sizes[:4], H, G, d, context, c.rms_norm_eps, rope["rope_theta"], rope,
            getattr(c, "sliding_window", None), c.tie_word_embeddings,
            attention_bias=bool(getattr(c, "attention_bias", c.model_type == "qwen2")),
            mlp_bias=getattr(c, "mlp_bias", False),
            qk_norm=c.model_type == "qwen3",
        )


class Checkpoint:
    """The tensors of a Hugging Face folder: safetensors or .bin, one file or shards."""

    def __init__(self, folder):
        self.folder, self.files = Path(folder), {}  # {tensor name: file}
        paths = sorted(self.folder.glob("model*.safetensors"))
        for path in paths or sorted(self.folder.glob("pytorch_model*.bin")):
            with self._open(path) as tensors:
                self.files |= dict.fromkeys(tensors, path)
        if not self.files:
            raise UserError(f"{folder}: has no model*.safetensors and no pytorch_model*.bin")

    @contextmanager
    def _open(self, path: Path):
        """{name: function that reads it} of a file; memory-mapped, its memory goes with it."""
        with reading(path):
            if path.suffix == ".bin":
                tensors = torch.load(path, "cpu", weights_only=True, mmap=True)
                yield {name: partial(tensors.get, name) for name in tensors}
            else:
                with safe_open(path, framework="pt") as file:
                    yield {name: partial(file.get_tensor, name) for name in file.keys()}

    def __getitem__(self, name: str) -> Tensor:
        with self._open(self.files[name]) as tensors:
            return tensors[name]()

    def fitting(self, config: Config):
        """(name in the model, in the files, tensor) of every weight. UserError unless both
        hold the same; o_proj's biases may be left out, and the output matrix if tied."""
        names = {n.removeprefix("model."): n for n in self.files if "inv_freq" not in n}
        with torch.device("meta"), reading(self.folder):  # shapes without memory
            model = Llama(config)
            found = {short: torch.empty_like(self[n], device="meta") for short, n in names.items()}
            for key, value in model.state_dict().items():
                tied = key == "lm_head.weight" and config.tie_word_embeddings
                if tied or key.endswith(("scale", "o_proj.bias")):
                    found.setdefault(key, value)
            model.load_state_dict(found)  # says what is missing, unknown or of another shape
        for short, name in names.items():
            yield short, name, self[name]


def load_model(folder, config: Config, device="cpu", dtype=None) -> Llama:
    """The frozen model, its scales at one. dtype None: float32 on a CPU, else the files'."""
    weights, on_cpu = Checkpoint(folder), torch.device(device).type == "cpu"
    with torch.device("meta"):
        model = Llama(config)
    state = model.state_dict()
    for short, name, tensor in tqdm(weights.fitting(config), desc="loading", leave=False):
        own = torch.float32 if on_cpu else tensor.dtype
        state[short] = tensor.to(device, dtype or own, copy=True)
        if not state[short].abs().max().isfinite():
            raise UserError(f"{weights.files[name]}: {name} holds NaN or infinity")
    if state["lm_head.weight"].is_meta:
        state["lm_head.weight"] = state["embed_tokens.weight"]
    like = state["norm.weight"]
    state = {key: like.new_zeros(v.shape) if v.is_meta else v for key, v in state.items()}
    model.load_state_dict(state, assign=True)
    model.reset_scales("head")
    return model


# --------------------------------------------------------------------------------------
# 7. Text
# --------------------------------------------------------------------------------------


def turns(user: str, answer: str) -> str:
    """A chat template in Jinja, from how it writes a user's message and an answer."""
    user, answer = (text.replace("TEXT", "{{ m.content }}") for text in (user, answer))
    turn = "{% if m.role == 'user' %}" + user + "{% else %}" + answer + "{% endif %}"
    return "{% for m in messages %}" + turn + "{% endfor %}"


VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant "
    "gives helpful, detailed, and polite answers to the user's questions. "
)
TEMPLATES = {  # for checkpoints that carry none, as FastChat writes them
    "none": turns("TEXT", " TEXT{{ eos_token }}"),
    "vicuna": VICUNA + turns("USER: TEXT ASSISTANT:", " TEXT</s>"),
    "llama-2": turns("[INST] TEXT [/INST]", " TEXT </s>"),
    "mistral": turns("[INST] TEXT [/INST]", " TEXT</s>"),
}
NAMES = {"vicuna|longchat": "vicuna", "llama-2.*chat": "llama-2", "mistral.*inst": "mistral"}


class Tokenizer:
    """Text to token ids and back, inside the checkpoint's chat template.

    What the template makes is tokenised once, special tokens written in it are one id each,
    and BOS stands in front where the tokenizer itself puts one.
    """

    def __init__(self, folder, config: Config, template: str = "auto"):
        with reading(f"{folder}: tokenizer"):
            self.hf = from_transformers("AutoTokenizer", folder)
            self.bos = [i for i in self.hf("a").input_ids[:1] if i == self.hf.bos_token_id]
        self.rows, self.name = config.vocab_size, template
        if template == "auto":
            stem = Path(folder).resolve().name.lower()
            known = [NAMES[key] for key in NAMES if re.search(key, stem)]
            self.name = "own" if self.hf.chat_template else (known + ["none"])[0]
        if self.name not in ("own", *TEMPLATES):
            raise UserError(f"--template {template}: must be auto, {', '.join(TEMPLATES)}")
        self.template = TEMPLATES.get(self.name) or self.hf.get_chat_template()
        # An answer ends with the last special token that the template adds, or with eos;
        # generation stops there, and at every eos that the checkpoint names.
        answer = self.encode(self.render("a", "b"))[len(self.encode(self.render("a"))) :]
        ends = [i for i in answer if i in self.hf.added_tokens_decoder][-1:]
        ends.append(self.hf.eos_token_id)
        for file in ("config.json", "generation_config.json"):
            eos = read_json(Path(folder) / file).get("eos_token_id")
            ends += eos if isinstance(eos, list) else [eos]
        ends = [i for i in ends if i is not None]
        if not ends:
            raise UserError(f"{folder}: no token ends a text; set eos_token_id in config.json")
        self.end, self.stop = ends[0], set(ends)

    def render(self, prompt: str, answer: str | None = None, unfinished=False) -> str:
        """The conversation as text: the user's message and, if given, an answer."""
        messages = [{"role": "user", "content": prompt}]
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
        today = datetime(2024, 7, 26)  # for templates that ask: two runs must be the same
        with reading(f"--template {self.name}"):
            return self.hf.apply_chat_template(
                messages, chat_template=self.template, tokenize=False,
                add_generation_prompt=answer is None, continue_final_message=unfinished,
                strftime_now=today.strftime,
            )

    def encode(self, text: str) -> list[int]:
        ids = self.hf(text, add_special_tokens=False).input_ids
        if max(ids, default=0) >= self.rows:
            raise UserError(f"token {self.hf.decode(max(ids))!r} has no row in the embedding")
        return ids

    def decode(self, ids: list[int]) -> str:
        return self.hf.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _with_bos(self, text: str) -> list[int]:
        ids = self.encode(text)
        return ids if ids[:1] == self.bos else self.bos + ids

    def prompt(self, prompt: str, prefix: str = "") -> list[int]:
        """Ids of the conversation up to where the answer begins, or behind its prefix."""
        prefix = prefix.strip() or None
        return self._with_bos(self.render(prompt, prefix, unfinished=prefix is not None))

    def pair(self, sample: Sample) -> tuple[list[int], list[int]]:
        """(prompt ids, answer ids), the whole conversation tokenised at once."""
        answer = f"{sample.prefix} {sample.answer}".strip()
        ids = self._with_bos(self.render(sample.prompt, answer))
        prompt = self.prompt(sample.prompt, sample.prefix)
        n = len(os.path.commonprefix([prompt, ids]))  # a token may reach across the border
        if self.end not in ids[n:]:
            ids.append(self.end)
        last = len(ids) - ids[::-1].index(self.end)  # a template may write on behind the end
        return ids[:n], ids[n:last]


# --------------------------------------------------------------------------------------
# 8. Commands
# --------------------------------------------------------------------------------------

DTYPES = {"auto": None} | {n: getattr(torch, n) for n in ("float32", "float16", "bfloat16")}


def whole(text: str) -> int:
    if not 0 <= int(text) <= 2**24:
        raise ValueError
    return int(text)


def wholes(text: str) -> list[int]:
    return [whole(part) for part in text.split(",")]


def flag(help: str, default=None, **more):
    return field(default=default, metadata={"help": help, **more})


@dataclass
class Run:
    """What a command was asked to do, a field per flag, and what came of it. Scales carry
    the run that trained them in their file's metadata."""

    ckpt: str = flag("a Hugging Face folder (default: the bundled toy)", str(TOY))
    scales: str = flag("a file of scales (default: the base)")
    task: str = flag("lines, needle or FILE.jsonl", "lines")
    mode: str = flag("a scale per head or per channel", "head", choices=METHOD)
    extend: str = flag("none, ntk:4, yarn:4, linear:4 (default: the scales' own)")
    template: str = flag("auto (the checkpoint's own), none, vicuna, llama-2, mistral", "auto")
    haystack: str = flag("a text file to hide needles in")
    length: whole = flag("tokens of a prompt (default: the context less the answer)")
    lengths: wholes = flag("A,B,C tokens (default: six, up to the context)")
    depths: wholes = flag("A,B,C percent (default: for needles 0,25,50,75,100)")
    samples: whole = flag("prompts to train on", 50)
    prompts: whole = flag("prompts to evaluate on, per length", 50)
    epochs: whole = flag("passes over the samples", 1)
    lr: float = flag("learning rate (default: the paper's)")
    pull: float = flag("share of the way back to 1 after each step", 0.0)
    offload: bool = flag("keep the blocks' inputs in host memory, for a small GPU", False)
    resume: bool = flag("go on where the same run was interrupted", False)
    compare: bool = flag("the base beside the scaled model", False)
    prompt: str = flag("the text, or - for standard input", required=True)
    max_new_tokens: whole = flag("tokens of an answer at most", 100)
    device: str = flag("auto, cpu, cuda, cuda:1, mps", "auto")
    dtype: str = flag("auto: float32 on a CPU, else the files' own", "auto", choices=DTYPES)
    seed: int = flag("draws the prompts", 0)
    json: str = flag("a file for the result, for scripts")
    plot: str = flag("a PNG for the result")
    out: str = flag("a name for the result")
    # what came of it
    checkpoint: str = ""  # the folder's name
    layers: int = 0
    heads: int = 0
    head_size: int = 0
    trained_on: str = ""  # fingerprints of samples
    steps: int = 0
    loss: float = math.nan


def open_checkpoint(run: Run) -> tuple[Llama, Tokenizer, Run]:
    """What a command starts with. The last is the run that trained the scales."""
    config, scales, trained = read_config(run.ckpt), None, Run(extend="none")
    if run.scales:
        scales, trained = read_scales(run.scales, config)
        if run.extend not in (None, trained.extend):
            raise UserError(f"--extend {run.extend}: the scales know {trained.extend}")
    trained.extend = run.extend or trained.extend
    config = extend(config, trained.extend)
    tokenizer = Tokenizer(run.ckpt, config, run.template)
    device = run.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    with reading(f"--device {device}"):
        torch.zeros(1, device=device)
    model = load_model(run.ckpt, config, device, DTYPES[run.dtype])
    note(f"{run.ckpt}: context {config.max_position_embeddings:,}, extension {trained.extend}, "
         f"template {tokenizer.name}, on {device}")
    if scales:
        model.set_scales(scales)
        note(f"{run.scales}: {METHOD[trained.mode]} after {trained.steps} steps of "
             f"{trained.task}, {trained.length:,} tokens, template {trained.template}")
    return model, tokenizer, trained


def full_length(config: Config) -> int:
    """Tokens of a prompt that fills the context and leaves room for the answer."""
    return min(config.max_position_embeddings, config.sliding_window or 2**24) - ANSWER_ROOM


def train_command(run: Run) -> None:
    same_run = repr(replace(run, resume=False))
    model, tokenizer, opened = open_checkpoint(run)
    config, out = model.config, run.out or "scales.safetensors"
    run = replace(run, extend=opened.extend, template=tokenizer.name)
    run.length = run.length or full_length(config)
    run.lr = run.lr or paper_lr(run.task, run.mode, config.num_hidden_layers)
    run.checkpoint = Path(run.ckpt).resolve().name
    run.layers, run.heads, run.head_size = heads_of(config)
    if run.length > config.max_position_embeddings:
        raise UserError(f"--length {run.length}: beyond the context; see --extend")
    wanted = run.task, tokenizer, run.length, run.samples, "train", run.seed, None, run.haystack
    samples = make_samples(*wanted)
    run.trained_on = ",".join(s.fingerprint() for s in samples)
    model.reset_scales(run.mode)
    saved, state_file = None, Path(f"{out}.state")
    if run.resume and state_file.exists():
        with reading(state_file):
            saved = torch.load(state_file, weights_only=True)
            if saved["run"] != same_run:
                raise ValueError("is of another run; give its flags, or leave out --resume")
            model.set_scales(saved["scales"])
    size = sum(s.numel() for s in model.scales())
    note(f"{METHOD[run.mode]}: {size:,} numbers, {len(samples)} prompts, lr {run.lr:g}")

    def keep(losses, optimizer):
        state, buffer = {"run": same_run, "losses": losses}, io.BytesIO()
        state |= {"scales": model.scales(), "optimizer": optimizer.state_dict()}
        torch.save(state, buffer)  # not to the disk: torch does not survive a full one
        with whole_file(state_file) as unfinished:
            unfinished.write_bytes(buffer.getbuffer())
        save_scales(out, model.scales(), replace(run, steps=len(losses), loss=losses[-1]))

    pairs = [tokenizer.pair(s) for s in samples]
    in_host_memory = torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available())
    with in_host_memory if run.offload else nullcontext():  # what Recompute keeps
        losses = train(model, pairs, run.lr, run.epochs, run.pull, saved, keep)
    state_file.unlink(missing_ok=True)
    print(f"{out}: {size:,} scales, loss {losses[0]:.3f} at first, {losses[-1]:.3f} at last")


def compare(run: Run) -> dict[str, list[dict]]:
    """{method: cells} of the base, the scales or both; --json is written cell by cell."""
    model, tokenizer, trained = open_checkpoint(run)
    scales, end, results = model.scales(), full_length(model.config), {}
    lengths = run.lengths or [round(end * part) for part in (0.15, 0.3, 0.5, 0.7, 0.85, 1)]
    depths = run.depths or ([0, 25, 50, 75, 100] if run.task == "needle" else [None])
    if run.task not in ("lines", "needle"):
        lengths, depths = [max(run.lengths or [end])], [None]  # a file's are as they are
    if run.compare or not run.scales:
        results["base"] = []
    if run.scales:
        results[METHOD[trained.mode]] = []
    report = {"ckpt": run.ckpt, "scales": run.scales, "task": run.task, "extend": trained.extend}
    start, avoid = time.monotonic(), trained.trained_on.split(",")
    for length, depth in product(lengths, depths):
        count = math.ceil(run.prompts / len(depths))
        wanted = run.task, tokenizer, length, count, "eval", run.seed, depth, run.haystack, avoid
        samples = make_samples(*wanted)
        for method, cells in results.items():
            if method == "base":
                model.reset_scales("head")
            else:
                model.set_scales(scales)
            cell = evaluate(model, tokenizer, samples, run.max_new_tokens, f"{method} {length}")
            cells.append({"length": length, "depth": depth} | cell)
            report["base" if run.compare and method == "base" else "cells"] = cells
        if run.json:
            write_json(run.json, report | {"seconds": round(time.monotonic() - start, 1)})
    return results


def eval_command(run: Run) -> None:
    if run.compare and not run.scales:
        raise UserError("--compare: needs --scales to compare with the base")
    results = compare(run)
    print(score_table(results))
    if run.plot:
        plot_scores(run.plot, results)


def demo_command(run: Run) -> None:
    folder, results = Path(run.out or "seal-demo"), {}
    folder.mkdir(exist_ok=True)
    for mode in METHOD:
        scales = f"{folder}/{mode}.safetensors"
        train_command(replace(run, mode=mode, out=scales))
        results |= compare(replace(run, scales=scales, compare=not results))
    print(f"share of {run.prompts} prompts answered right\n{score_table(results)}")
    plot_scores(folder / "accuracy.png", results)
    print(f"see {folder}; next: python export_gguf.py --scales {folder}/channel.safetensors")


def generate_command(run: Run) -> None:
    model, tokenizer, _ = open_checkpoint(run)
    ids = tokenizer.prompt(sys.stdin.read() if run.prompt == "-" else run.prompt)
    room = model.config.max_position_embeddings - len(ids)
    if room < 1:
        raise UserError(f"--prompt: its {len(ids)} tokens fill the context; see --extend")
    new = min(run.max_new_tokens, room)
    print(tokenizer.decode(generate(model, ids, new, tokenizer.stop)))


def fold_command(run: Run) -> None:
    """Write an ordinary Hugging Face folder, the scales in its weights."""
    source, config, index = Path(run.ckpt), read_config(run.ckpt), {}
    scales, trained = read_scales(run.scales, config)
    stretched, weights = extend(config, trained.extend), Checkpoint(source)
    names = [name for _, name, _ in weights.fitting(config)]
    with whole_folder(run.out) as out:
        for path in tqdm(sorted(set(weights.files.values())), desc="folding", unit=" files"):
            shard = {n: weights[n] for n in names if weights.files[n] == path}
            shard = {n: fold(n, t, scales).to(t.dtype).contiguous() for n, t in shard.items()}
            file = path.stem.replace("pytorch_", "") + ".safetensors"
            save_file(shard, out / file, {"format": "pt"})
            index |= dict.fromkeys(shard, file)
        write_json(out / "model.safetensors.index.json", {"metadata": {}, "weight_map": index})
        for file in source.iterdir():
            if file.suffix in (".json", ".jinja", ".model") and "index" not in file.name:
                shutil.copyfile(file, out / file.name)
        raw = read_json(source / "config.json")
        raw["tie_word_embeddings"] = "lm_head.weight" not in index
        if trained.extend != "none":  # in the older spelling, which all releases read
            rope = {key: value for key, value in stretched.rope_scaling.items() if value}
            plain = rope["rope_type"] == "default"
            raw["rope_scaling"] = None if plain else rope | {"type": rope["rope_type"]}
            for key in ("rope_theta", "max_position_embeddings"):
                raw[key] = getattr(stretched, key)
            for key in ("rope_parameters", "max_sequence_length"):
                raw.pop(key, None)
        write_json(out / "config.json", raw)
    print(f"{run.out}: {METHOD[trained.mode]} folded into {config.num_hidden_layers} layers")


MODEL = "ckpt template device dtype"
TASK = f"{MODEL} extend task haystack seed"
COMMANDS = {  # and their flags
    "demo": (demo_command, f"{MODEL} prompts samples seed out"),
    "train": (train_command, f"{TASK} mode length samples epochs lr pull offload resume out"),
    "eval": (eval_command, f"{TASK} scales compare lengths depths prompts max_new_tokens json plot"),
    "generate": (generate_command, f"{MODEL} extend scales prompt max_new_tokens"),
    "fold": (fold_command, "ckpt scales out"),
}


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message)


def main(arguments=None) -> None:
    parser = Parser(prog="seal.py", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (_, flags) in COMMANDS.items():
        command = commands.add_parser(name)
        for f in fields(Run):
            if f.name in flags.split():
                kind = {"action": "store_true"} if f.type is bool else {"type": f.type}
                option = "--" + f.name.replace("_", "-")
                command.add_argument(option, default=f.default, **kind, **f.metadata)
    chosen = vars(parser.parse_args(arguments))
    COMMANDS[chosen.pop("command")][0](Run(**chosen))


def run(program: str, main, arguments=None) -> int:
    """Run main(arguments); the exit status, 2 with one line for what a user can mend."""

    def stop(number, frame):
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    try:
        main(arguments)
        return 0
    except KeyboardInterrupt:
        message = "interrupted; finished work is kept"
    except (UserError, OSError, torch.OutOfMemoryError, MemoryError) as e:
        message = " ".join(f"error: {e or type(e).__name__}".split())
    note(f"{program}: {message[:1000]}")
    return 130 if message.startswith("interrupted") else 2


if __name__ == "__main__":
    sys.exit(run("seal.py", main))
