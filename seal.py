"""SEAL: Scaling to Emphasize Attention for Long-context retrieval, in one file.

The paper (Lee et al., ACL 2025, arXiv 2501.15225): ask a language model for one fact in
a long prompt. Far from its context limit it answers, near the limit it fails. Switch off
one attention head and accuracy moves by twenty points, up for some, down for others
(section 3). The balance of the heads, learned on short texts, is wrong for long ones.

So learn the balance and nothing else. Freeze every weight, multiply each head's output,
or each of its channels, by one number, and train these on 50 prompts (section 4):

    y = concat_h( s_h * softmax(q_h k_h^T / sqrt(d)) v_h ) W_o^T

  SEAL-H  --mode head     one s per layer and head      32 x 32 = 1,024 for a 7B
  SEAL-C  --mode channel  one s per layer and channel   32 x 32 x 128 = 131,072

A scale above 1 makes a head louder, one below 1 quieter, 0 prunes it. All start at 1,
the model as it is. In the end s multiplies the columns of W_o: the gain costs nothing.

The paper is parts 1 to 5 of this file: model, data, training, evaluation, folding. Then
come 6 checkpoints, 7 text, 8 commands. To see it work: python seal.py demo

Letters in shapes: B sequences, T tokens, S so far, R of branches, A of an answer, D
width, H query heads, G key-value heads, d channels a head, L layers, V vocabulary.
"""

import argparse
import bisect
import hashlib
import json
import math
import os
import random
import re
import sys
import time
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields, make_dataclass, replace
from decimal import Decimal
from functools import partial
from importlib import import_module
from itertools import accumulate, cycle, product
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save
from torch import OutOfMemoryError, Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute
from tqdm import tqdm

METHOD = {"head": "SEAL-H", "channel": "SEAL-C"}  # --mode, and the paper's name for it
ASSETS = Path(__file__).resolve().parent / "assets"
TOY = ASSETS / "toy-llama"

class UserError(Exception):
    """A mistake the user can mend, told in one line."""

@contextmanager
def blame(what):
    """What goes wrong inside becomes one line that begins with `what`, a file's name."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what}: {str(error) or type(error).__name__}") from error

# ---- 1. Model ------------------------------------------------------------------------
@dataclass(frozen=True)
class Config:
    """The shape of a Llama, in config.json's names but for the last three."""
    vocab_size: int  # V
    hidden_size: int  # D
    intermediate_size: int  # width inside the feed-forward
    num_hidden_layers: int  # L
    num_attention_heads: int  # H: query heads, the ones that SEAL scales
    num_key_value_heads: int  # G: each serves H / G query heads
    head_dim: int  # d; H * d need not be D
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0  # b: base of the rotary frequencies
    rope_scaling: dict = field(default_factory=lambda: {"rope_type": "default"})
    tie_word_embeddings: bool = False  # the output matrix is the embedding
    attention_bias: bool = False
    qk_norm: bool = False  # Qwen3: q and k of a head are normed before they turn
    context: int = 0  # tokens of a prompt and its answer that the model is made for
    folded: tuple[str, ...] = ()  # fingerprints of the scales that are in its weights

def rope_frequencies(config: Config):
    """The rotary frequencies (d/2,) in radians a token, and a factor on cos and sin.
    RoPE turns pair i of a head's channels by position * b^(-2i/d), so that q . k tells
    how far two tokens are apart, not where they are. The first pair turns fastest, by 1
    radian a token; the last may not finish one turn in the whole context.
    """
    pairs = torch.arange(config.head_dim // 2, dtype=torch.float64, device="cpu")
    freq = config.rope_theta ** (-2 * pairs / config.head_dim)
    magnitude = 1.0
    if config.rope_scaling["rope_type"] != "default":  # linear, Llama 3.1, YaRN: not here
        from extras.positions import stretched
        freq, magnitude = stretched(freq, config)
    return freq.float(), magnitude

def rotate(x: Tensor, rope) -> Tensor:
    """Turn x's pairs (i, i + d/2); x (B, heads, T, d), rope: cos and sin (T, d/2)."""
    cos, sin = rope
    a, b = x.chunk(2, dim=-1)  # (B, heads, T, d/2) each
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

def arrange(start: int, T: int, branches):
    """Positions (T,) of the tokens from `start` on, and what the last R of them see.
    A token sees itself and what stands before it, so what prompts share, the record, comes
    out the same for all: it is read once. What differs, a question and its answer, is a
    branch: it goes on where the record ends, and sees the record and itself. The last R
    tokens are branches. Three tokens with branches of 1 and 2 have positions 0 1 2 3 3 4,

        1 1 1 1 0 0
        1 1 1 0 1 0   mask (R, start + T)
        1 1 1 0 1 1
    """
    if start:  # so much is in a cache: what follows is one branch
        branches = [T]
    end = start + T - sum(branches)
    positions = torch.arange(start, end), *(end + torch.arange(n) for n in branches)
    squares = (torch.ones(n, n, dtype=torch.bool).tril() for n in branches)
    own = torch.block_diag(*squares)  # (R, R)
    return torch.cat(positions), F.pad(own, (end, 0), value=True)  # (R, start + T)

def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v. q (B, H, T, d), k and v (B, G, S, d).
    The last R queries see what mask (R, S) shows; query i before them keys 0 to i."""
    attention = partial(F.scaled_dot_product_attention, enable_gqa=True)
    P = q.shape[2] - len(mask)
    first = attention(q[..., :P, :], k[..., :P, :], v[..., :P, :], is_causal=True)
    last = attention(q[..., P:, :], k, v, attn_mask=mask)
    return torch.cat((first, last), dim=2)

class Attention(nn.Module):
    """H heads, each scaled by SEAL before the output projection."""
    def __init__(self, config: Config):
        super().__init__()
        D, d, bias = config.hidden_size, config.head_dim, config.attention_bias
        H, G = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = d
        self.q_proj = nn.Linear(D, H * d, bias=bias)
        self.k_proj = nn.Linear(D, G * d, bias=bias)
        self.v_proj = nn.Linear(D, G * d, bias=bias)
        self.o_proj = nn.Linear(H * d, D, bias=bias)
        norm = nn.RMSNorm if config.qk_norm else nn.Identity
        self.q_norm = norm(d, config.rms_norm_eps)
        self.k_norm = norm(d, config.rms_norm_eps)
        self.scale = nn.Parameter(torch.ones(H))  # s: (H,), or (H * d,) for SEAL-C

    def forward(self, x: Tensor, rope, mask, cache=None, start=0) -> Tensor:
        """x (B, T, D) -> (B, T, D). cache (2, B, G, size, d): k and v up to `start`."""
        split = (-1, self.head_dim)
        q = self.q_proj(x).unflatten(2, split).transpose(1, 2)  # (B, H, T, d)
        k = self.k_proj(x).unflatten(2, split).transpose(1, 2)  # (B, G, T, d)
        v = self.v_proj(x).unflatten(2, split).transpose(1, 2)
        q, k = rotate(self.q_norm(q), rope), rotate(self.k_norm(k), rope)
        if cache is not None:
            end = start + x.shape[1]
            cache[..., start:end, :] = torch.stack((k, v))
            k, v = cache[..., :end, :]  # (B, G, S, d)
        heads = attend(q, k, v, mask).transpose(1, 2)  # (B, T, H, d)

        # SEAL (paper, section 4): y = concat_h( s_h * head_h ) W_o^T. The scaled heads
        # are made in float32, as the scales are, and rounded once.
        heads = heads * self.scale.view(q.shape[1], -1)  # (B, T, H, d) * (H, 1) or (H, d)
        return self.o_proj(heads.to(x.dtype).flatten(2))  # (B, T, H * d) -> (B, T, D)

class FeedForward(nn.Module):
    """SwiGLU."""
    def __init__(self, config: Config):
        super().__init__()
        D, hidden = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(D, hidden, bias=False)
        self.up_proj = nn.Linear(D, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

class Block(nn.Module):
    """A layer: attention, then the feed-forward, each added to what came in."""
    def __init__(self, config: Config):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = FeedForward(config)

    def forward(self, x: Tensor, rope, mask, cache=None, start=0) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, cache, start)
        return x + self.mlp(self.post_attention_layernorm(x))

class Llama(nn.Module):
    """Embedding, L blocks, a norm, and the output matrix: Hugging Face's names."""
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        V, D, L = config.vocab_size, config.hidden_size, config.num_hidden_layers
        self.embed_tokens = nn.Embedding(V, D)
        self.layers = nn.ModuleList(Block(config) for _ in range(L))
        self.norm = nn.RMSNorm(D, config.rms_norm_eps)
        self.lm_head = nn.Linear(D, V, bias=False)
        self.frequencies, self.magnitude = rope_frequencies(config)
        self.room = 0  # bytes that all layers may keep for the way back

    def forward(self, tokens: Tensor, branches=(1,), cache=None, start=0) -> Tensor:
        """tokens (B, T) -> the residual stream after the last block (B, T, D).
        branches: lengths of the branches at the end of tokens; a single one is causal.
        cache (L, 2, B, G, any size, d): k and v of each layer, filled up to `start`.
        """
        x = self.embed_tokens(tokens)  # (B, T, D)
        with x.device:
            positions, mask = arrange(start, x.shape[1], branches)
        angles = positions[:, None] * self.frequencies.to(x.device)  # (T, d/2)
        rope = self.magnitude * torch.stack((angles.cos(), angles.sin()))
        rope = rope.to(x.dtype)  # (2, T, d/2)
        for i, layer in enumerate(self.layers):
            # A layer keeps some 13 times x for the way back, or x, and recomputes.
            if torch.is_grad_enabled() and 13 * x.nbytes * len(self.layers) > self.room:
                x = recompute(layer, x, rope, mask, use_reentrant=False)
            else:
                x = layer(x, rope, mask, None if cache is None else cache[i], start)
        return x

    def new_cache(self, size: int) -> Tensor:
        """Room for k and v of `size` tokens in every layer (L, 2, 1, G, size, d)."""
        c = self.config
        shape = c.num_hidden_layers, 2, 1, c.num_key_value_heads, size, c.head_dim
        return self.norm.weight.new_empty(shape)

    def logits(self, x: Tensor) -> Tensor:
        """x (..., D) -> (..., V), float32. For all T tokens they would be huge."""
        return self.lm_head(self.norm(x)).float()

    def scales(self) -> list[nn.Parameter]:
        return [layer.self_attn.scale for layer in self.layers]

    def set_scales(self, scales) -> None:
        """Put these scales in (float32), trainable; everything else is frozen."""
        self.requires_grad_(False)
        for layer, scale in zip(self.layers, scales, strict=True):
            scale = scale.detach().to(self.norm.weight.device, torch.float32, copy=True)
            layer.self_attn.scale = nn.Parameter(scale)

    def reset_scales(self, mode: str) -> None:
        """Scales of one: the base model, to the bit."""
        H, d = self.config.num_attention_heads, self.config.head_dim
        size = H if mode == "head" else H * d
        self.set_scales([torch.ones(size) for _ in self.layers])

def extend(config: Config, spec: str) -> Config:
    """The config with its context stretched, training-free: ntk:4, linear:4 or yarn:4.
    NTK replaces the base b by b * f^(d / (d - 2)), for a factor f (paper, section 6). The
    slowest pair turns f times slower, so that none of its angles is new; the fastest,
    which tells neighbours apart, as before. A file of scales holds the spec it needs.
    """
    if spec == "none":
        return config
    ntk = re.fullmatch(r"ntk:([1-9]\d{0,3}(?:\.\d+)?)", spec)
    if not ntk:
        from extras import positions  # for linear, YaRN, and what is none of these
        return positions.extend(config, spec)
    f, d = float(ntk[1]), config.head_dim
    base = config.rope_theta * f ** (d / (d - 2))
    return replace(config, context=int(config.context * f), rope_theta=base)

@torch.no_grad()
def generate(model, prompt, max_new_tokens, stop=(), cache=None, start=0) -> list[int]:
    """Greedy continuation of a prompt (token ids), ended before a token of `stop` and by
    the context. A cache may hold the first `start` tokens of the prompt already."""
    left = model.config.context - len(prompt)
    if not prompt or left < 1:
        raise UserError(f"a prompt has {len(prompt)} tokens, {left} are left to answer")
    new = min(max_new_tokens, left)
    if cache is None:
        cache = model.new_cache(len(prompt) + new)
    tokens, answer = prompt[start:], []
    for _ in range(new):
        tokens = torch.tensor([tokens], device=model.norm.weight.device)  # (1, T)
        x = model(tokens, cache=cache, start=start)  # (1, T, D)
        start += x.shape[1]
        logits = model.logits(x[0, -1])  # (V,)
        if not logits.max().isfinite():
            raise UserError("the logits are no numbers; see to the weights, or --dtype")
        tokens = [logits.argmax().item()]
        if tokens[0] in stop:
            break
        answer += tokens
    return answer

# ---- 2. Data -------------------------------------------------------------------------
# Random in content, exact in form (paper, section 4.1): only a balance is learned.

@dataclass
class Sample:
    """A prompt, the answer to learn, and what decides whether a text answers it."""
    prompt: str
    answer: str
    expected: int | None = None
    prefix: str = ""  # the answer's beginning: given behind the prompt, not learned

    def score(self, text: str) -> float:
        """How right a text is, 0 to 1; judge() calls what is above 0.5 correct.
        An expected number is to be the last run of digits (LongEval). Else: the share of
        the answer's words that are found (ROUGE-1 recall).
        """
        said = text.casefold()
        if self.expected is not None:
            runs = re.findall(r"\d+", said)  # of any length, which int() refuses
            return float(runs != [] and Decimal(runs[-1]) == self.expected)
        wanted = Counter(re.findall(r"\w+", self.answer.casefold()))
        found = Counter(re.findall(r"\w+", said))
        return (wanted & found).total() / max(1, wanted.total())

    def fingerprint(self):
        """Stored with scales: they are not tested on what they were trained on."""
        return digest(self.prompt.encode())

def digest(data):
    return hashlib.sha256(data).hexdigest()[:12]

def longest_prompt(owner):
    return owner.context - 48  # of a config or tokenizer; 48 tokens are left to answer

def largest_fit(make, tokenizer, length, limit) -> list[Sample]:
    """make(n), samples of n lines or sentences, with the largest n below `limit` whose
    prompts have `length` tokens at most by the tokenizer (part 7), template included."""
    def tokens(n, questions=1):
        return max(len(tokenizer.prompt(s.prompt)) for s in make(n)[:questions])
    n = bisect.bisect_right(range(1, limit + 1), length, key=tokens)  # the last fit
    while n and tokens(n, questions=None) > length:  # other keys may be longer
        n -= 1
    if not 0 < n < limit:
        raise UserError(f"{length} tokens: prompts have {tokens(1)} to {tokens(limit)}")
    return make(n)

RECORD = (ASSETS / "record.txt").read_text()  # LongEval's, with {lines} and {key}
LINE = "line {key}: REGISTER_CONTENT is <{number}>\n"
LINE_ANSWER = "The <REGISTER_CONTENT> in line {key} is {number}."
ADJECTIVES, NOUNS = map(str.split, (ASSETS / "words.txt").read_text().splitlines())
KEYS = [f"{adjective}-{noun}" for adjective in ADJECTIVES for noun in NOUNS]  # 8,010

def lines_samples(rng, tokenizer, length, split, depth, haystack, questions):
    """Lines that fill `length` tokens, and questions, each for another line: the first
    for the one at `depth` %, or any, the others at even steps from there, cyclically."""
    limit = min(length // 4 + 1, len(KEYS))  # no line is shorter than four tokens
    keys = rng.sample(KEYS, limit)
    numbers = [rng.randint(1, 50000) for _ in keys]
    share = rng.random() if depth is None else depth / 100
    def make(n):
        lines = [LINE.format(key=k, number=x) for k, x in zip(keys[:n], numbers)]
        first, count = min(n - 1, int(share * n)), min(n, questions)
        samples = []
        for i in range(count):
            asked = (first + i * n // count) % n
            key, number = keys[asked], numbers[asked]
            prompt = RECORD.format(lines="".join(lines), key=key)
            answer = LINE_ANSWER.format(key=key, number=number)
            samples.append(Sample(prompt, answer, number))
        return samples
    return largest_fit(make, tokenizer, length, limit)

# Needle in a haystack. The needles to train on are invented, as the paper's.
NEEDLE = "The best thing to do in {} is {}."
QUESTION = "What is the best thing to do in {}?"
NEEDLES = [line.split("\t") for line in (ASSETS / "needles.txt").read_text().splitlines()]
TEST_NEEDLE, *TRAINING_NEEDLES = NEEDLES  # San Francisco's sandwich, and ten

def needle_samples(rng, tokenizer, length, split, depth, haystack, questions):
    """A needle in a text that fills `length` tokens and begins at any sentence of the
    file; it goes before the sentence that holds the token at `depth` %. One question."""
    from extras.tasks import read_sentences
    sentences = read_sentences(haystack)
    place, what = rng.choice(TRAINING_NEEDLES) if split == "train" else TEST_NEEDLE
    depth = rng.uniform(0, 100) if depth is None else depth
    start = rng.randrange(len(sentences))
    limit = length // 3 + 1  # sentences have three tokens or more, on average
    sentences = [sentences[(start + i) % len(sentences)] for i in range(limit)]
    ends = list(accumulate(len(tokenizer.encode(s)) for s in sentences))  # in tokens
    fact, question = NEEDLE.format(place, what), QUESTION.format(place)
    def make(n):
        at = bisect.bisect_right(ends, ends[n - 1] * depth / 100, hi=n)
        text = "".join([*sentences[:at], fact + " ", *sentences[at:n]])
        return [Sample(f"{text.strip()}\n\n{question}", fact)]
    return largest_fit(make, tokenizer, length, limit)

TASKS = {"lines": lines_samples, "needle": needle_samples}  # with the same arguments

def make_records(task, tokenizer, lengths, count, split, seed=0, depth=None, haystack=None,
                 trained_on="", questions=1) -> list[list[Sample]]:
    """Up to `count` records of a task (lines, needle, FILE.jsonl), as lists of samples.
    They fill these lengths in turn and have up to `questions` prompts each. The fact is
    at `depth` percent or anywhere. Training and test share no prompt: the split, "train"
    or "eval", is in the seed, and a file leaves out what stands in `trained_on`.
    """
    if task in TASKS:
        make, records = TASKS[task], []
        for i, length in zip(range(count), cycle(lengths)):
            rng = random.Random(f"{task} {split} {seed} {length} {i}")
            records.append(make(rng, tokenizer, length, split, depth, haystack, questions))
    else:
        from extras.tasks import read_records  # which knows more judges
        records = read_records(task, seed, trained_on, questions)[:count]
    if not records:
        raise UserError(f"--task {task}: holds no prompt that was not trained on")
    length = max(lengths)
    for s in sum(records, []):
        prompt, answer = tokenizer.pair(s)
        if len(prompt) > length or len(prompt + answer) > tokenizer.context:
            raise UserError(f"{s.prompt[:30]!r}... has {len(prompt)} tokens, its answer "
                            f"{len(answer)}: --length {length}, context {tokenizer.context}")
    return records

def make_samples(task, tokenizer, length, count, split, *more, **others) -> list[Sample]:
    """What make_records() makes of one length, as one list."""
    return sum(make_records(task, tokenizer, [length], count, split, *more, **others), [])

# ---- 3. Training ---------------------------------------------------------------------
def paper_lr(task: str, mode: str, layers: int) -> float:
    """The paper's learning rate (section 6, appendix A)."""
    if task == "needle":  # it says 4e-2 and 5e-2, and not which is whose
        return 4e-2 if mode == "head" else 5e-2
    return 1e-2 if mode == "head" and layers < 40 else 2e-2  # 40 layers: a 13B

def answer_loss(model, record) -> Tensor:
    """Mean cross-entropy of the answers' tokens, end tokens included, in nats.
    A record is a list of pairs (prompt ids, answer ids) whose prompts begin alike. What
    they share stands once, the rests are branches (see arrange). Prompts do not count:
    thousands of random tokens would drown the thirty of an answer. So only answers get
    logits, which also saves the largest tensor.
    """
    shared = os.path.commonprefix([prompt[:-1] for prompt, _ in record])
    tokens, lengths = shared, []
    for prompt, answer in record:
        branch = (prompt + answer[:-1])[len(shared) :]
        tokens = tokens + branch
        lengths.append(len(branch))
    loss = 0.0
    with model.norm.weight.device:
        x = model(torch.tensor([tokens]), lengths)  # (1, T) -> (1, T, D)
        branches = x[0, len(shared) :].split(lengths)
        for x, (_, answer) in zip(branches, record):
            logits = model.logits(x[-len(answer) :])  # (A, V): each row foretells a token
            loss += F.cross_entropy(logits, torch.tensor(answer)) / len(record)
    return loss

def backward(model, record) -> Tensor:
    """Loss of a record; its gradient goes to the scales only."""
    loss = answer_loss(model, record)
    loss.backward()
    return loss.detach()

def train(model, records, lr, epochs=1, pull=0.0, saved=None, after_step=None) -> list[float]:
    """Learn the model's scales on records (see answer_loss); returns the losses.
    As in the paper: AdamW at a constant rate, a record a step. Weight decay would prune
    heads; `pull` moves scales that share of the way back to 1 after each step. To go on,
    give as `saved` what after_step(losses, optimizer) stored, its scales put in."""
    scales, losses = model.scales(), []
    optimizer = torch.optim.AdamW(scales, lr=lr, weight_decay=0.0)
    if saved:
        losses = saved["losses"]
        optimizer.load_state_dict(saved["optimizer"])
    bar = tqdm(range(len(losses), epochs * len(records)), "training", unit="step")
    for step in bar:
        loss = backward(model, records[step % len(records)])
        optimizer.step()
        optimizer.zero_grad()
        for scale in scales:
            scale.data += pull * (1 - scale.data)
        if not all(t.isfinite().all() for t in (loss, *scales)):
            raise UserError(f"step {step + 1}: the loss is {loss.item()}; lower --lr")
        losses.append(loss.item())
        bar.set_postfix_str(f"loss {losses[-1]:.3f}")
        if after_step:
            after_step(losses, optimizer)
    return losses

# ---- 4. Evaluation -------------------------------------------------------------------
def ask(model, tokenizer, samples, max_new_tokens=100, desc="") -> list[str]:
    """Greedy answers to the samples' prompts, as far as the context reaches. If three
    quarters of a prompt are as in the one before, these are not read again."""
    prompts = [tokenizer.prompt(s.prompt, s.prefix) for s in samples]
    longest = max(map(len, prompts)) + max_new_tokens
    cache = model.new_cache(min(longest, model.config.context))
    answers, read = [], []
    for prompt in tqdm(prompts, desc=desc, unit="prompt"):
        start = len(os.path.commonprefix([read, prompt[:-1]]))
        if 4 * start < 3 * len(prompt):
            start = 0
        ids = generate(model, prompt, max_new_tokens, tokenizer.stop, cache, start)
        answers.append(tokenizer.decode(ids))
        read = prompt
    return answers

def judge(samples, answers) -> dict:
    """{"prompts", "correct" (score > 0.5), "score" (mean, 0 to 1)}."""
    scores = [sample.score(text) for sample, text in zip(samples, answers, strict=True)]
    correct = sum(score > 0.5 for score in scores)
    return {"prompts": len(scores), "correct": correct, "score": sum(scores) / len(scores)}

def score_table(results):
    """Results as measure() returns them, as a table."""
    from tabulate import tabulate
    rows = []
    for cells in zip(*results.values()):
        first, scores = cells[0], [cell["score"] for cell in cells]
        rows.append([first["length"], first["depth"], *scores])
    return tabulate(rows, ["length", "depth", *results], floatfmt=".2f", intfmt=",")

# ---- 5. Scales: folding, and their file ----------------------------------------------
def fold(name: str, tensor: Tensor, scales) -> Tensor:
    """The tensor `name`, or some rows of it, scaled if it is an o_proj's weight.
    (s * heads) W^T = heads (W * s)^T: the scale of channel c multiplies column c. The rows of
    v_proj would do as well, were there a value head for each query head; with grouped
    queries H / G heads share one, and each has its own scale.
    """
    match = re.search(r"layers\.(\d+)\.self_attn\.o_proj\.weight$", name)
    if not match or not scales:
        return tensor
    scale = scales[int(match[1])]  # (H,) or (H * d,)
    columns = scale.repeat_interleave(tensor.shape[1] // len(scale))  # (H * d,)
    return tensor.float() * columns  # (D, H * d), to be cast by whoever stores it

@dataclass
class Facts:
    """What is stored with scales: how they were learned, so how they are to be used."""
    mode: str
    layers: int
    heads: int
    head_size: int
    checkpoint: str = ""  # the name of the model's folder
    extend: str = "none"
    template: str = "auto"
    task: str = ""
    length: str = ""  # tokens of a record; several, with commas between, in turn
    samples: int = 0  # records
    questions: int = 1  # of each record
    epochs: int = 1
    lr: float = 0.0
    pull: float = 0.0
    seed: int = 0
    steps: int = 0  # made so far: an interrupted run leaves fewer than samples * epochs
    loss: float = 0.0  # of the last step
    trained_on: str = ""  # fingerprints of prompts, with commas between
    fingerprint: str = ""  # of the scales themselves, once they are read

def save_scales(path, scales, facts: Facts):
    """layers.{i}.scale, float32, (H,) or (H * d,), and the facts as metadata."""
    tensors = {f"layers.{i}.scale": s.detach().cpu() for i, s in enumerate(scales)}
    about = {name: str(value) for name, value in asdict(facts).items()}
    with whole_file(path) as unfinished:
        unfinished.write_bytes(save(tensors, about | {"format": "seal-1"}))

def read_scales(path, config: Config):
    """The scales in a file, by layer, and their facts; they must fit the config."""
    from pydantic import TypeAdapter
    L, H, d = config.num_hidden_layers, config.num_attention_heads, config.head_dim
    with blame(path), safe_open(path, "pt") as file:
        about = file.metadata() or {}
        if about.get("format") != "seal-1" or about.get("mode") not in METHOD:
            raise ValueError("is not a scales file; `seal.py train` writes them")
        facts = TypeAdapter(Facts).validate_python(about)  # numbers from texts
        made = facts.layers, facts.heads, facts.head_size
        if made != (L, H, d):
            raise ValueError(f"made for {made} layers, heads, head size, not {(L, H, d)}")
        names = [f"layers.{i}.scale" for i in range(len(file.keys()))]
        scales = torch.stack([file.get_tensor(name) for name in names])
        size = H if facts.mode == "head" else H * d
        if scales.shape != (L, size) or not scales.isfinite().all():
            raise ValueError(f"does not hold {L} x {size} finite numbers")
        facts.fingerprint = digest(scales.float().numpy().tobytes())
        if facts.fingerprint in config.folded:
            raise ValueError("these scales are in the checkpoint's weights already")
    return list(scales), facts

# ---- 6. Checkpoints ------------------------------------------------------------------
def note(text):
    print(text, file=sys.stderr, flush=True)  # stdout is kept for results

def check_place(path):
    """The path; UserError unless a file can be written there."""
    path = Path(path)
    if not path.parent.is_dir() or (path.exists() and not path.is_file()):
        raise UserError(f"{path}: is not a file, or its folder is missing")
    return path

@contextmanager
def whole_file(path):
    """Yield a path to write to; the file gets its name when it is whole."""
    path = check_place(path).resolve()
    unfinished = path.with_name(f".{path.name}.part")
    try:
        with blame(path):
            yield unfinished
            os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)

def write_json(path, data):
    with whole_file(path) as unfinished:
        unfinished.write_text(json.dumps(data, indent=2) + "\n")

def read_json(path) -> dict:
    """The JSON object in a file, or an empty one."""
    with blame(path):
        return dict(json.loads(Path(path).read_text("utf-8"))) if Path(path).exists() else {}

def check_json(data, schema: str):
    """ValueError unless data is what assets/`schema` describes."""
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import best_match
    json.dumps(data, ensure_ascii=False, allow_nan=False).encode()
    error = best_match(Draft202012Validator(read_json(ASSETS / schema)).iter_errors(data))
    if error:
        raise ValueError(f"{error.json_path[2:]} {error.message}")  # without its $.

def from_transformers(reader: str, folder):
    """What AutoConfig or AutoTokenizer reads, offline and without running its code."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers  # slow
    transformers.logging.set_verbosity_error()
    reader = getattr(transformers, reader)
    return reader.from_pretrained(folder, local_files_only=True, trust_remote_code=False)

def read_config(folder) -> Config:
    """The Config of a Hugging Face folder."""
    raw = read_json(Path(folder) / "config.json")
    if not raw:
        raise UserError(f"{folder}: no config.json. Download a hub's model (hf download), "
                        "merge an adapter (merge_and_unload), or see extras/convert.py")
    with blame(f"{folder}/config.json"):
        c = from_transformers("AutoConfig", folder)
        found = c.to_dict()
        rope = found["rope_scaling"] = found.pop("rope_parameters", {})  # transformers 5's
        found["rope_theta"] = rope.pop("rope_theta", None)
        for key in {"original_max_position_embeddings"} & found.keys():
            rope[key] = found[key]  # outside it counts more
        found["head_dim"] = found.get("head_dim") or c.hidden_size // c.num_attention_heads
        # LongChat has max_sequence_length; YaRN may only have factor x original.
        context = found.get("max_sequence_length") or c.max_position_embeddings
        if rope.get("rope_type") == "yarn":
            context = max(context, rope["factor"] * rope["original_max_position_embeddings"])
        found["context"] = int(context)
        found["folded"] = [past["fingerprint"] for past in raw.get("seal", [])]
        found["heads per value"] = c.num_attention_heads / c.num_key_value_heads
        check_json(found, "config.schema.json")
        if raw.get("rope_scaling") and raw.get("rope_parameters"):
            raise ValueError("has rope_scaling and rope_parameters; one of them must go")
        if c.model_type != "llama":
            from extras.families import adapt  # Mistral's window, Qwen's norms and biases
            adapt(found)
        return Config(**{f.name: found[f.name] for f in fields(Config) if f.name in found})

def open_weights(path: Path):
    """keys() and get_tensor(name) of a file, memory-mapped: read where they are used."""
    if path.suffix == ".safetensors":
        return safe_open(path, "pt")
    from extras.pickled import Pickled
    return Pickled(path)

class Weights:
    """The tensors of a Hugging Face folder, by their names in the model."""
    def __init__(self, folder):
        self.folder, self.places = Path(folder), {}  # {name: (file, name there, shape)}
        wrappers = r"(_orig_mod|module|_\w+_wrapped_module|base_model\.model)\."
        for path in self.files():
            with blame(path):
                file = open_weights(path)
                for name in file.keys():
                    short = re.sub(wrappers, "", name).removeprefix("model.")
                    if short in self.places:
                        raise ValueError(f"{name} is in {self.places[short][0]}, too")
                    if "inv_freq" not in name:  # frequencies: old checkpoints hold them
                        self.places[short] = path, name, tuple(file.get_tensor(name).shape)

    def files(self):
        single = self.folder / "model.safetensors"
        index = read_json(f"{single}.index.json").get("weight_map", {})
        names = {single.name} if single.exists() else {*index.values()}
        if names:
            return [self.folder / name for name in sorted(names)]
        from extras.pickled import other_files  # .bin, or parts without an index
        return other_files(self.folder)

    def __getitem__(self, name: str) -> Tensor:
        path, stored, _ = self.places[name]
        with blame(path):
            return open_weights(path).get_tensor(stored)  # anew: freed with the tensor

    def check(self, config: Config) -> Llama:
        """The config's model, empty; UserError unless these are just its weights.
        They may lack o_proj's biases, and an output matrix that is the embedding."""
        with blame(self.folder), torch.device("meta"):  # shapes without memory
            model = Llama(config)
            given = {name: torch.empty(shape) for name, (_, _, shape) in self.places.items()}
            for name, like in model.state_dict().items():
                tied = name == "lm_head.weight" and config.tie_word_embeddings
                if tied or name.endswith((".scale", "o_proj.bias")):
                    given.setdefault(name, like)
            model.load_state_dict(given, assign=True)  # torch says what does not fit
        return model

def load_model(folder, config: Config, device="cpu", dtype=None) -> Llama:
    """Frozen, its scales at one. dtype None: float32 on a CPU, else the files' first."""
    weights, state = Weights(folder), {}
    model = weights.check(config)
    if dtype is None and torch.device(device).type == "cpu":
        dtype = torch.float32
    for name in tqdm(weights.places, "loading", leave=False):
        tensor = weights[name]
        dtype = dtype or tensor.dtype
        state[name] = tensor.to(device, dtype, copy=True)
    state.setdefault("lm_head.weight", state["embed_tokens.weight"])
    for name, like in model.state_dict().items():  # scales, and what files leave out
        state.setdefault(name, torch.zeros_like(like, device=device, dtype=dtype))
    model.load_state_dict(state, assign=True)
    model.reset_scales("head")
    return model

# ---- 7. Text -------------------------------------------------------------------------
# For checkpoints without one: [pattern of the folder's name, FastChat's words in Jinja].
TEMPLATES = read_json(ASSETS / "templates.json")
# For templates that name the date: two runs must be the same. {{ '' }} ends the line.
TODAY = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}{{ '' }}"

class Tokenizer:
    """Text to token ids and back, inside the checkpoint's chat template."""
    def __init__(self, folder, config: Config, template="auto"):
        folder, self.name = Path(folder).resolve(), template
        self.vocab_size, self.context = config.vocab_size, config.context
        with blame(f"{folder}: tokenizer and template"):
            own = (folder / "tokenizer.json").exists()  # AutoTokenizer would change it
            reader = "PreTrainedTokenizerFast" if own else "AutoTokenizer"
            self.hf = from_transformers(reader, folder)
            ids = self.hf("a").input_ids
            if not self.hf.decode(ids, skip_special_tokens=True).strip():
                raise ValueError("there is no vocabulary")
            if template == "auto":
                fit = [n for n in TEMPLATES if re.search(TEMPLATES[n][0], folder.name.lower())]
                self.name = "own" if self.hf.chat_template else fit[0]  # the last fits all
            _, self.template = TEMPLATES.get(self.name) or ("", self.hf.get_chat_template())
        # transformers 5 puts BOS in front only if a post-processor of tokenizer.json does,
        # not where tokenizer_config.json asks for it, nor for a bare tokenizer.model.
        wanted = read_json(folder / "tokenizer_config.json").get("add_bos_token")
        if wanted is None and not own:
            wanted = (folder / "tokenizer.model").exists()
        bos = self.hf.bos_token_id
        self.bos = [bos] if bos is not None and (wanted or ids[0] == bos) else []
        # An answer ends with the template's last special token, or else with eos.
        _, answer = self._chat("a", "", "b")
        added = self.hf.added_tokens_decoder
        ends = [i for i in self.encode(answer) if i in added][-1:] + [self.hf.eos_token_id]
        for file in ("config.json", "generation_config.json"):
            eos = read_json(folder / file).get("eos_token_id")
            ends += eos if isinstance(eos, list) else [eos]
        ends = [i for i in ends if i in range(self.vocab_size)]
        if not ends:
            raise UserError(f"{folder}: no token ends a text; eos_token_id is missing")
        self.end_token, self.stop = ends[0], set(ends)  # to be learned, to be heeded

    def render(self, prompt: str, answer="") -> str:
        """The conversation as text, up to where an answer begins or with the answer."""
        messages = [{"role": "user", "content": prompt}]
        if answer:
            messages.append({"role": "assistant", "content": answer})
        with blame(f"--template {self.name}"):
            return self.hf.apply_chat_template(
                messages, chat_template=TODAY + self.template, tokenize=False,
                add_generation_prompt=not answer)

    def _chat(self, prompt: str, prefix: str, answer: str) -> tuple[str, str]:
        """The conversation as two texts: what is given, and what is to be learned."""
        prefix = prefix.strip()
        content = f"{prefix} {answer}".strip()
        asked, finished = self.render(prompt), self.render(prompt, content)
        with blame(f"--template {self.name}"):
            if prompt.strip() not in asked or content not in finished:
                raise ValueError("changes the prompt or the answer, or leaves it out")
            if not finished.startswith(asked):
                # Templates of reasoning models open <think> when they ask, and leave it
                # out of a finished answer. What is trained must be what will be asked.
                shared = len(os.path.commonprefix([asked, finished]))
                start = finished.index(content, max(0, shared - len(content)))
                finished = asked + finished[start:]
            end = finished.index(prefix, len(asked)) + len(prefix)
        return finished[:end], finished[end:]

    def encode(self, text: str) -> list[int]:
        with blame(ascii(text[:40])):
            ids = self.hf(text, add_special_tokens=False).input_ids
        if max(ids, default=0) >= self.vocab_size:
            raise UserError(f"{self.hf.decode(max(ids))!r} has no row in the embedding")
        return ids

    def decode(self, ids):
        return self.hf.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _with_bos(self, text: str) -> list[int]:
        ids = self.encode(text)
        return ids if ids[:1] == self.bos else self.bos + ids  # templates may hold it

    def prompt(self, prompt: str, prefix="") -> list[int]:
        """Ids of the prompt in its template, to where the answer begins or goes on."""
        return self._with_bos(self._chat(prompt, prefix, "any answer")[0])

    def pair(self, sample: Sample) -> tuple[list[int], list[int]]:
        """(prompt ids, answer ids with the end token last), tokenised as one text."""
        given, learned = self._chat(sample.prompt, sample.prefix, sample.answer)
        prompt, both = self._with_bos(given), self._with_bos(given + learned)
        answer = both[len(prompt) :]
        if both[: len(prompt)] != prompt:  # a token across the border is cut there
            answer = self.encode(learned)
        answer.append(self.end_token)  # if it is not there; templates may write on behind it
        return prompt, answer[: answer.index(self.end_token) + 1]

# ---- 8. Commands ---------------------------------------------------------------------
def wholes(text):
    if not re.fullmatch(r"-?\d+(,-?\d+)*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not like 500,1000,2000")
    return list(map(int, text.split(",")))

# What a command can be asked: each flag with its help, its default and its limits.
ASKED = read_json(ASSETS / "flags.schema.json")
FLAGS = ASKED["properties"]
FLAGS["ckpt"]["argparse"]["default"] = str(TOY)
Flags = make_dataclass("Flags", [
    (name, object, about["argparse"]["default"]) for name, about in FLAGS.items()])

def open_checkpoint(flags: Flags) -> tuple[Llama, Tokenizer, Facts]:
    """What a command starts with. Facts: read with scales, or begun for new ones."""
    if Path(flags.ckpt).is_file():
        from extras.gguf_model import open_gguf
        return open_gguf(flags)
    config, scales = read_config(flags.ckpt), None
    facts = Facts(
        flags.mode, config.num_hidden_layers, config.num_attention_heads, config.head_dim,
        checkpoint=Path(flags.ckpt).resolve().name, extend=flags.extend or "none")
    if flags.scales:
        scales, facts = read_scales(flags.scales, config)
        if flags.extend not in (None, facts.extend):
            raise UserError(f"--extend {flags.extend}: the scales had {facts.extend}")
    if flags.template != "auto":
        facts.template = flags.template
    config, device = extend(config, facts.extend), flags.device
    tokenizer = Tokenizer(flags.ckpt, config, facts.template)
    facts.template = tokenizer.name
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    with blame(f"{flags.ckpt} on --device {device}"):
        model = load_model(flags.ckpt, config, device, getattr(torch, flags.dtype, None))
    if scales:
        model.set_scales(scales)
    note(f"{flags.ckpt} on {device}: context {config.context:,}, extension "
         f"{facts.extend}, template {facts.template}, scales {flags.scales} of {facts.checkpoint}")
    return model, tokenizer, facts

def prepare(flags: Flags):
    """What a training starts with: the model, its tokenizer, facts, and the records."""
    model, tokenizer, facts = open_checkpoint(flags)
    lengths = flags.length or [longest_prompt(tokenizer)]
    made = make_records(flags.task, tokenizer, lengths, flags.samples, "train", flags.seed,
                        haystack=flags.haystack, questions=flags.questions)
    records = [list(map(tokenizer.pair, record)) for record in made]
    facts = replace(
        facts, task=Path(flags.task).name, length=",".join(map(str, lengths)),
        samples=len(records), questions=flags.questions, epochs=flags.epochs,
        lr=flags.lr or paper_lr(flags.task, flags.mode, facts.layers), pull=flags.pull,
        seed=flags.seed, trained_on=",".join(s.fingerprint() for s in sum(made, [])))
    model.reset_scales(flags.mode)
    model.room = {"always": 0, "auto": 2**31, "never": math.inf}[flags.recompute]
    return model, tokenizer, facts, records

def train_command(flags: Flags):
    out = check_place(flags.out or "scales.safetensors")
    model, _, facts, records = prepare(flags)
    state, saved = Path(f"{out}.state"), None  # for --resume, until the run is over
    run = digest(repr((facts, records)).encode())
    if flags.resume and state.exists():
        from extras.resume import read_state
        saved = read_state(state, run)
        model.set_scales(saved["scales"])
    note(f"{METHOD[flags.mode]}: {len(records)} records, lr {facts.lr:g}, resumed: {bool(saved)}")
    def after_step(losses, optimizer):
        save_scales(out, model.scales(), replace(facts, steps=len(losses), loss=losses[-1]))
        now = {"run": run, "losses": losses, "scales": model.scales()}
        with whole_file(state) as unfinished:
            torch.save(now | {"optimizer": optimizer.state_dict()}, unfinished)
    with torch.autograd.graph.save_on_cpu() if flags.offload else nullcontext():
        losses = train(model, records, facts.lr, flags.epochs, flags.pull, saved, after_step)
    state.unlink(missing_ok=True)
    size = sum(map(Tensor.numel, model.scales()))
    print(f"{out}: {size:,} scales, loss {losses[0]:.3f} -> {losses[-1]:.3f}")

def draw_cells(flags: Flags, tokenizer, trained_on: str) -> list[tuple]:
    """(length, depth, samples) of every cell of the table."""
    longest = longest_prompt(tokenizer)
    lengths = flags.lengths or [round(longest * x) for x in (0.15, 0.3, 0.5, 0.7, 0.85, 1)]
    depths = flags.depths or ([0, 25, 50, 75, 100] if flags.task == "needle" else [None])
    if flags.task not in TASKS:
        lengths, depths = [max(lengths)], [None]  # a file's are as they are
    count, cells = math.ceil(flags.prompts / len(depths)), []
    for length, depth in product(lengths, depths):
        samples = make_samples(
            flags.task, tokenizer, length, count, "eval", flags.seed, depth,
            flags.haystack, trained_on, flags.questions)
        cells.append((length, depth, samples))
    return cells

def measure(flags: Flags):
    """{"base": cells, "SEAL-H": cells}, as asked for; --json grows cell by cell."""
    start, scales = time.monotonic(), {}
    model, tokenizer, facts = open_checkpoint(flags)
    if flags.compare or not flags.scales:
        scales["base"] = [torch.ones_like(s) for s in model.scales()]
    if flags.scales:
        scales[METHOD[facts.mode]] = model.scales()
    results = {method: [] for method in scales}
    for length, depth, samples in draw_cells(flags, tokenizer, facts.trained_on):
        for method, cells in results.items():
            model.set_scales(scales[method])
            said = ask(model, tokenizer, samples, flags.max_new_tokens, f"{method} {length}")
            cells.append({"length": length, "depth": depth} | judge(samples, said))
        if flags.json:
            from extras.report import write_report
            write_report(flags, facts, results, start)
    return results

def eval_command(flags: Flags):
    results = measure(flags)
    print(score_table(results))
    if flags.plot:
        from extras.plot import plot_scores
        plot_scores(flags.plot, results)

def generate_command(flags: Flags):
    model, tokenizer, _ = open_checkpoint(flags)
    text = sys.stdin.read() if flags.prompt == "-" else flags.prompt
    print(*ask(model, tokenizer, [Sample(text, answer="")], flags.max_new_tokens))

COMMANDS = {  # or their files
    "demo": "extras.demo",
    "train": train_command,
    "eval": eval_command,
    "generate": generate_command,
    "fold": "extras.folder",
}

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message)  # in one line

    def add_flags(self, names: str, required="") -> None:
        """Flags by name."""
        for reader in (wholes, int, float):
            self.register("type", reader.__name__, reader)
        for name in names.split():
            more = FLAGS[name]["argparse"]
            option, must = "--" + name.replace("_", "-"), name in required.split()
            self.add_argument(option, required=must, **more)

def main(arguments=None):
    parser = Parser(prog="seal.py", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    for name, call in COMMANDS.items():
        command = commands.add_parser(name, help=ASKED["help"][name])
        command.add_flags(*ASKED["commands"][name])
        command.set_defaults(call=call)
    flags = vars(parser.parse_args(arguments))
    call = flags.pop("call")
    paths = [os.path.realpath(flags[n]) for n in ASKED["paths"] if flags.get(n)]
    with blame("flags"):
        check_json(flags | {"files": paths}, "flags.schema.json")
    for name in ("json", "plot"):
        if flags.get(name):
            check_place(flags[name])  # before the work
    if isinstance(call, str):
        call = import_module(call).command
    call(Flags(**flags))

def exit_status(program: str, main, arguments=None):
    """Run main(arguments): 2, with one line, for what a user can mend."""
    sys.stdout.reconfigure(errors="backslashreplace")  # not every letter can be shown
    try:
        main(arguments)
        return 0
    except KeyboardInterrupt:
        note(f"{program}: interrupted")
        return 130
    except (UserError, OSError, ImportError, UnicodeError, MemoryError, OutOfMemoryError) as error:
        message = " ".join(f"{error}".split()) or type(error).__name__
        note(f"{program}: error: {message[:1000]}")
        return 2

if __name__ == "__main__":
    sys.modules["seal"] = sys.modules["__main__"]  # what extras import by that name
    sys.exit(exit_status("seal.py", main))
