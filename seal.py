"""SEAL: Scaling to Emphasize Attention for Long-context retrieval, in one file.

The paper (Lee et al., ACL 2025, arXiv 2501.15225): ask a language model for one fact in a
long prompt. Far from its context limit it answers, near the limit it fails. But switch
off one attention head and accuracy moves by twenty points, up for some heads, down for
others (section 3). The balance between heads, learned on short texts, is wrong for long
ones.

So learn the balance and nothing else. Freeze every weight, multiply each head's output
by one number, and train those numbers on 50 synthetic prompts (section 4):

    y = concat_h( s_h * softmax(q_h k_h^T / sqrt(d)) v_h ) W_o^T

  SEAL-H  --mode head     one s per layer and head      32 x 32 = 1,024 for a 7B
  SEAL-C  --mode channel  one s per layer and channel   32 x 32 x 128 = 131,072

A scale above 1 makes a head louder, below 1 quieter, and 0 prunes it. All start at 1,
the model as it is. In the end s multiplies the columns of W_o: the gain costs nothing.

The method is parts 1 to 5, the plumbing 6 to 8. To see it work: python seal.py demo

Letters in shapes: B sequences, T tokens, S tokens so far, A tokens of an answer, D width,
H query heads, G key-value heads, d channels a head, L layers, V vocabulary.
"""

import argparse
import bisect
import hashlib
import json
import math
import os
import random
import re
import shutil
import sys
import time
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import accumulate, product
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

METHOD = {"head": "SEAL-H", "channel": "SEAL-C"}  # --mode, and the paper's name for it
ASSETS = Path(__file__).resolve().parent / "assets"
TOY = ASSETS / "toy-llama"

class UserError(Exception):
    """A mistake the user can mend, told in one line."""

# ---- 1. Model ----

@dataclass(frozen=True)
class Config:
    """The shape of a Llama, in config.json's names but for the context."""

    vocab_size: int  # V
    hidden_size: int  # D
    intermediate_size: int  # width inside the feed-forward
    num_hidden_layers: int  # L
    num_attention_heads: int  # H: query heads, the ones that SEAL scales
    num_key_value_heads: int  # G: each serves H / G query heads
    head_dim: int  # d; H * d need not be D
    context: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0  # b: base of the rotary frequencies
    rope_scaling: dict = field(default_factory=lambda: {"rope_type": "default"})
    tie_word_embeddings: bool = False  # the output matrix is the embedding
    attention_bias: bool = False

# RoPE turns pair i of a head's channels by position * freq_i, so that q . k depends on
# the distance only. The first pair turns fastest, by 1 radian a token.
def rope_frequencies(config: Config) -> tuple[Tensor, float]:
    """Frequencies (d/2,) in radians a token, and a factor on cos and sin (YaRN's)."""
    yarn = {"beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": None}  # its defaults
    d, b, rope = config.head_dim, config.rope_theta, yarn | config.rope_scaling
    kind, s, magnitude = rope["rope_type"], rope.get("factor", 1.0), 1.0
    pairs = torch.arange(d // 2, dtype=torch.float64, device="cpu")
    freq = b ** (-2 * pairs / d)
    keep = torch.ones_like(freq)  # 1: a frequency stays, 0: it is divided by s
    if kind == "linear":
        keep *= 0
    elif kind != "default":  # what turns often within the original context stays
        turns = rope["original_max_position_embeddings"] * freq / (2 * math.pi)
        if kind == "llama3":
            low, high = rope["low_freq_factor"], rope["high_freq_factor"]
            keep = (turns - low) / (high - low)
        else:  # yarn: a ramp linear in the pair, and sharper attention
            reach = d / (2 * math.log(b))  # pairs over which the frequency falls by e
            low = max(0, math.floor(reach * math.log(turns[0] / rope["beta_fast"])))
            high = min(d - 1, math.ceil(reach * math.log(turns[0] / rope["beta_slow"])))
            keep = 1 - (pairs - low) / max(0.001, high - low)
            magnitude = rope["attention_factor"] or 0.1 * math.log(s) + 1
    keep = keep.clamp(0, 1)
    return (keep * freq + (1 - keep) * freq / s).float(), magnitude

def extend(config: Config, spec: str) -> Config:
    """The config with its context stretched, training-free: ntk:4, linear:4 or yarn:4.

    NTK replaces the base b by b * s^(d / (d - 2)) (paper, section 6): the slowest pair
    turns s times slower, and the fastest, which tells neighbours apart, as before.
    """
    if spec == "none":
        return config
    match = re.fullmatch(r"(ntk|linear|yarn):([1-9]\d{0,3}(?:\.\d+)?)", spec)
    stretched = config.rope_scaling["rope_type"] != "default"
    if not match or (stretched and match[1] != "ntk"):
        raise UserError(f"--extend {spec}: must be none, ntk:S or, on a model not stretched yet, "
                        "linear:S or yarn:S")
    s, d, context = float(match[2]), config.head_dim, config.context
    rope = {"rope_type": match[1], "factor": s, "original_max_position_embeddings": context}
    changes = {"rope_scaling": rope}
    if match[1] == "ntk":
        changes = {"rope_theta": config.rope_theta * s ** (d / (d - 2))}
    return replace(config, context=int(context * s), **changes)

def rotate(x: Tensor, rope) -> Tensor:
    """Turn x's pairs (i, i + d/2), x (B, heads, T, d), by rope: cos and sin (T, d/2)."""
    cos, sin = rope
    a, b = x.chunk(2, dim=-1)  # (B, heads, T, d/2) each
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, causal. q (B, H, T, d), k and v (B, G, S, d)."""
    causal = q.shape[2] > 1  # all tokens are queries (T = S), or only the newest
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

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
        self.scale = nn.Parameter(torch.ones(H))  # s: (H,), or (H * d,) for SEAL-C

    def forward(self, x: Tensor, rope, cache=None, start=0) -> Tensor:
        """x (B, T, D) -> (B, T, D). cache: k and v, filled up to `start`."""
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H, T, d)
        k = self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, G, T, d)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)
        q, k = rotate(q, rope), rotate(k, rope)
        if cache is not None:
            cache[0][:, :, start : start + T] = k
            cache[1][:, :, start : start + T] = v
            k, v = (stored[:, :, : start + T] for stored in cache)  # (B, G, S, d)
        y = attend(q, k, v).transpose(1, 2)  # (B, T, H, d)

        # SEAL (paper, section 4): y = concat_h( s_h * head_h ) W_o^T, made in float32,
        # as the scales are, and rounded once.
        y = y * self.scale.view(q.shape[1], -1)  # (B, T, H, d) * (H, 1) or (H, d)
        return self.o_proj(y.to(x.dtype).flatten(2))  # (B, T, H * d) -> (B, T, D)

class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, config: Config):
        super().__init__()
        D, hidden = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(D, hidden, bias=False)
        self.up_proj = nn.Linear(D, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, D, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

class Block(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        D, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = nn.RMSNorm(D, eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(D, eps)
        self.mlp = FeedForward(config)

    def forward(self, x, rope, cache=None, start=0):
        x = x + self.self_attn(self.input_layernorm(x), rope, cache, start)
        return x + self.mlp(self.post_attention_layernorm(x))

class Llama(nn.Module):
    """Embedding, L blocks, a norm, and the output matrix: Hugging Face's names."""

    def __init__(self, config: Config):
        super().__init__()
        self.config, D = config, config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, D)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(D, config.rms_norm_eps)
        self.lm_head = nn.Linear(D, config.vocab_size, bias=False)
        self.frequencies, self.magnitude = rope_frequencies(config)

    def forward(self, tokens: Tensor, cache=None, start=0) -> Tensor:
        """tokens (B, T) -> the residual stream after the last block (B, T, D).
        cache: per layer, room for k and v (B, G, any size, d), filled up to `start`."""
        x = self.embed_tokens(tokens)  # (B, T, D)
        positions = torch.arange(start, start + tokens.shape[1], device=x.device)
        angles = positions[:, None] * self.frequencies.to(x.device)  # (T, d/2)
        rope = [(self.magnitude * f(angles)).to(x.dtype) for f in (torch.cos, torch.sin)]
        for i, layer in enumerate(self.layers):
            if torch.is_grad_enabled() and cache is None:
                # Keeps x, and computes the rest again on the way back
                x = checkpoint(layer, x, rope, use_reentrant=False)
            else:
                x = layer(x, rope, cache[i] if cache else None, start)
        return x

    def logits(self, x: Tensor) -> Tensor:
        """x (..., D) -> (..., V), float32. Over all T it would be the largest tensor."""
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
        self.set_scales([torch.ones(H if mode == "head" else H * d) for _ in self.layers])

@torch.no_grad()
def generate(model, prompt, max_new_tokens, stop=()) -> list[int]:
    """Greedy continuation of a prompt (token ids), ended before a token of `stop`."""
    c, like = model.config, model.norm.weight
    shape = 1, c.num_key_value_heads, len(prompt) + max_new_tokens, c.head_dim
    cache = [(like.new_empty(shape), like.new_empty(shape)) for _ in model.layers]
    tokens, start, answer = prompt, 0, []
    for _ in range(max_new_tokens):
        x = model(torch.tensor([tokens], device=like.device), cache, start)  # (1, T, D)
        start += len(tokens)
        tokens = [model.logits(x[0, -1]).argmax().item()]
        if tokens[0] in stop:
            break
        answer += tokens
    return answer

# ---- 2. Data ----
# Random in content, exact in form (paper, section 4.1): only a balance is learned.

def full_length(config: Config) -> int:
    """Tokens of a prompt that fills the context, but for room to answer."""
    return config.context - 48

@dataclass
class Sample:
    """A prompt, the answer to learn, and what decides whether a text answers it."""

    prompt: str
    answer: str
    expected: int | str | list[str] | None = None
    prefix: str = ""  # given behind the prompt, not learned: how `answer` is begun

    def score(self, text: str) -> float:
        """How right a text is, 0 to 1. A number: it is the text's last one (LongEval).
        Texts: the share that it contains, ignoring case (RULER). None: the share of the
        answer's words that it contains (ROUGE-1 recall; the question alone gets near 0.5)."""
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
        """Stored with scales: none is tested on what it was trained on."""
        return hashlib.sha256(self.prompt.encode()).hexdigest()[:12]

def largest_fit(make, tokenizer, length, limit) -> Sample:
    """make(n) with the largest n < limit whose prompt has `length` tokens at most."""

    def size(n):
        return len(tokenizer.prompt(make(n).prompt))

    n = bisect.bisect_right(range(1, limit + 1), length, key=size)
    if not 0 < n < limit:
        raise UserError(f"--length {length}: not within {size(1)} to {size(limit)} tokens")
    return make(n)

# Line retrieval, in LongEval's wording.
RECORD = (ASSETS / "record.txt").read_text()  # with {lines} and {key}
LINE = "line {key}: REGISTER_CONTENT is <{number}>\n"
LINE_ANSWER = "The <REGISTER_CONTENT> in line {key} is {number}."
ADJECTIVES, NOUNS = map(str.split, (ASSETS / "words.txt").read_text().splitlines())
KEYS = [f"{adjective}-{noun}" for adjective in ADJECTIVES for noun in NOUNS]  # 8,010

def lines_sample(rng, tokenizer, length, depth=None):
    """Lines that fill `length` tokens, and a question for one, anywhere or at `depth` %."""
    limit = min(length // 4 + 1, len(KEYS))  # no line is shorter than four tokens
    keys = rng.sample(KEYS, limit)
    numbers = [rng.randint(1, 50000) for _ in keys]
    share = rng.random() if depth is None else depth / 100

    def make(n):
        pairs = list(zip(keys[:n], numbers))
        lines = "".join(LINE.format(key=key, number=number) for key, number in pairs)
        key, number = pairs[min(n - 1, int(share * n))]
        answer = LINE_ANSWER.format(key=key, number=number)
        return Sample(RECORD.format(lines=lines, key=key), answer, expected=number)

    return largest_fit(make, tokenizer, length, limit)

# Needle in a haystack. The needles to train on are invented, as the paper's: none is known.
NEEDLE, QUESTION = "The best thing to do in {} is {}.", "What is the best thing to do in {}?"
NEEDLES = [line.split("\t") for line in (ASSETS / "needles.txt").read_text().splitlines()]
TEST_NEEDLE, *TRAINING_NEEDLES = NEEDLES  # San Francisco's sandwich, and ten

def needle_sample(rng, tokenizer, length, split, depth, haystack):
    """A needle in a text that fills `length` tokens, from anywhere in the file and round
    again, before the sentence that `depth` %, counted in tokens, falls into."""
    place, what = rng.choice(TRAINING_NEEDLES) if split == "train" else TEST_NEEDLE
    depth = rng.uniform(0, 100) if depth is None else depth
    with reading(f"--haystack {haystack}"):
        text = Path(haystack).read_text(encoding="utf-8")
        # A sentence ends at . ! ? before a space, and at the full-width ones.
        sentences = re.findall(r"(?s)\S.*?(?:[.!?](?=\s)|[。！？]|$)\s*", text)
        start = rng.randrange(len(sentences))
    limit = length // 3 + 1  # sentences have three tokens or more, on average
    sentences = [sentences[(start + i) % len(sentences)] for i in range(limit)]
    ends = list(accumulate(len(tokenizer.encode(s)) for s in sentences))
    fact, question = NEEDLE.format(place, what), QUESTION.format(place)

    def make(n):
        at = bisect.bisect_right(ends, ends[n - 1] * depth / 100, hi=n)
        text = "".join([*sentences[:at], fact + " ", *sentences[at:n]])
        return Sample(f"{text.strip()}\n\n{question}", fact)

    return largest_fit(make, tokenizer, length, limit)

# What LongEval's and RULER's files call them.
ALIASES = {"input": "prompt", "answer_prefix": "prefix"}
ALIASES |= {"outputs": "expected", "expected_number": "expected"}

def read_jsonl(path):
    """A sample per line: {"prompt", "answer"} and, optionally, "expected" and "prefix"."""
    samples = []
    with reading(f"--task {path}"):
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        with reading(f"{path}, line {number}"):
            case = {ALIASES.get(key, key): value for key, value in json.loads(line).items()}
            expected = case.get("expected")
            if "random_idx" in case:
                case["answer"] = LINE_ANSWER.format(key=case["random_idx"][0], number=expected)
            elif isinstance(expected, list):
                case.setdefault("answer", ", ".join(expected))
            sample = Sample(case["prompt"], case["answer"], expected, case.get("prefix", ""))
            text = sample.prompt + sample.prefix + sample.answer
            sample.score(text.encode().decode())  # fails where one of them is no text
            samples.append(sample)
    return samples

def make_samples(run: "Run", tokenizer, length, count, split, depth=None):
    """Up to `count` samples of run.task (lines, needle, FILE.jsonl) of up to `length` tokens.
    The answer stands at `depth` percent or anywhere. split ("train", "eval") is part of
    the seed. What the run's scales were trained on is left out."""
    samples = []
    if run.task in ("lines", "needle"):
        for i in range(count):
            rng = random.Random(f"{run.task} {split} {run.seed} {length} {i}")
            if run.task == "lines":
                sample = lines_sample(rng, tokenizer, length, depth)
            else:
                sample = needle_sample(rng, tokenizer, length, split, depth, run.haystack)
            samples.append(sample)
    else:
        samples = read_jsonl(run.task)
        random.Random(run.seed).shuffle(samples)
    samples = [s for s in samples if s.fingerprint() not in run.trained_on][:count]
    if not samples:
        raise UserError(f"--task {run.task}: holds no prompt that was not trained on")
    for s in samples:
        if len(tokenizer.prompt(s.prompt, s.prefix)) > length:
            raise UserError(f"{run.task}: {s.prompt[:30]!r}... has more than {length} tokens")
    return samples

# ---- 3. Training ----

def paper_lr(task, mode, layers):
    """The paper's learning rate (section 6, appendix A)."""
    if task == "needle":  # it says 4e-2 and 5e-2, and not which is whose
        return 4e-2 if mode == "head" else 5e-2
    return 1e-2 if mode == "head" and layers < 40 else 2e-2  # 40 layers: a 13B

def answer_loss(model, prompt, answer):
    """Mean cross-entropy of the answer's tokens, in nats. The prompt does not count: its
    thousands of random tokens would drown the thirty that matter."""
    tokens = torch.tensor([prompt + answer], device=model.norm.weight.device)  # (1, T + 1)
    x = model(tokens[:, :-1])[0, -len(answer) :]  # (1, T, D) -> (A, D), a token ahead each
    return F.cross_entropy(model.logits(x), tokens[0, -len(answer) :])

def train(model, pairs, lr, epochs=1, pull=0.0, saved=None, keep=None):
    """Learn the model's scales on pairs (prompt ids, answer ids) as the paper does: AdamW at
    a constant rate, a prompt a step. Weight decay would prune heads; `pull` moves scales
    that share of the way back to 1 each step. keep(losses, optimizer) is called after each;
    with what it stored as `saved`, and its scales in the model, a run goes on."""
    if not 0 < lr < 1 or not 0 <= pull < 1:
        raise UserError(f"--lr {lr}, --pull {pull}: must be between 0 and 1")
    scales, losses = model.scales(), []
    optimizer = torch.optim.AdamW(scales, lr=lr, weight_decay=0.0)
    if saved:
        losses = saved["losses"]
        optimizer.load_state_dict(saved["optimizer"])
    bar = tqdm(range(len(losses), epochs * len(pairs)), "training", unit="step")
    for step in bar:
        loss = answer_loss(model, *pairs[step % len(pairs)])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for scale in scales:
                scale += pull * (1 - scale)
        if not all(t.isfinite().all() for t in (loss, *scales)):
            raise UserError(f"step {step + 1}: the loss is {loss.item()}; lower --lr")
        losses.append(loss.item())
        bar.set_postfix_str(f"loss {losses[-1]:.3f}")
        if keep:
            keep(losses, optimizer)
    return losses

# ---- 4. Evaluation ----

def evaluate(model, tokenizer, samples, max_new_tokens=100, desc=""):
    """Greedy answers, judged: {"prompts", "correct" (score > 0.5), "score" (mean)}."""
    scores = []
    for sample in tqdm(samples, desc=desc, unit="prompt"):
        prompt = tokenizer.prompt(sample.prompt, sample.prefix)
        ids = generate(model, prompt, max_new_tokens, tokenizer.stop)
        scores.append(sample.score(tokenizer.decode(ids)))
    n, correct = len(scores), sum(score > 0.5 for score in scores)
    return {"prompts": n, "correct": correct, "score": sum(scores) / n}

def score_table(results):
    """{method: cells with their length and depth}, as a table."""
    from tabulate import tabulate

    rows = []
    for cells in zip(*results.values()):
        first, scores = cells[0], [cell["score"] for cell in cells]
        rows.append([first["length"], first["depth"], *scores])
    return tabulate(rows, ["length", "depth", *results], floatfmt=".2f", intfmt=",")

def plot_scores(path, results):
    """A PNG of the share right by length, with Wilson's 95% intervals."""
    import matplotlib.pyplot as plt
    from scipy.stats import binomtest

    figure, ax = plt.subplots(layout="constrained")
    for method, cells in results.items():
        right, asked = Counter(), Counter()  # by length, all depths together
        for cell in cells:
            right[cell["length"]] += cell["correct"]
            asked[cell["length"]] += cell["prompts"]
        tests = [binomtest(right[n], asked[n]) for n in asked]
        bands = [test.proportion_ci(method="wilson") for test in tests]
        ax.plot(list(asked), [test.statistic for test in tests], "o-", label=method)
        ax.fill_between(list(asked), *zip(*bands), alpha=0.2)
    ax.set(xlabel="tokens of the prompt", ylabel="share answered right", ylim=(0, 1.02))
    ax.legend()
    with whole_file(path) as unfinished:
        figure.savefig(unfinished, format="png")

# ---- 5. Folding ----

def fold(name, tensor, scales, rows=slice(None)):
    """These rows of the checkpoint's tensor `name`, scaled if it is an o_proj weight.
    (s * y) W^T = y (W * s)^T: channel c's scale multiplies column c."""
    match = re.search(r"layers\.(\d+)\.self_attn\.o_proj\.weight$", name)
    if not match or not scales:
        return tensor[rows]
    scale = scales[int(match[1])]  # (H,) or (H * d,)
    columns = scale.repeat_interleave(tensor.shape[1] // len(scale))  # (H * d,)
    return tensor[rows].float() * columns  # (D, H * d), to be cast by whoever stores it

def save_scales(path, scales, run: "Run"):
    """layers.{i}.scale, float32, (H,) or (H * d,), and as metadata their run."""
    tensors = {f"layers.{i}.scale": s.detach().float().cpu() for i, s in enumerate(scales)}
    run = replace(run, task=Path(run.task).name, ckpt=None, out=None, haystack=None)  # no paths
    facts = {key: str(v) for key, v in asdict(run).items() if type(v) in (str, int, float)}
    with whole_file(path) as unfinished:
        unfinished.write_bytes(save(tensors, facts | {"format": "seal-1"}))

def read_scales(path, config: Config) -> tuple[list[Tensor], "Run"]:
    """The scales in a file, by layer, and their run; they must fit the config."""
    own = config.num_hidden_layers, config.num_attention_heads, config.head_dim
    with reading(path), safe_open(path, "pt") as file:
        about = file.metadata() or {}
        if about.get("format") != "seal-1" or about.get("mode") not in METHOD:
            raise ValueError("is not a scales file; `seal.py train` writes them")
        run = Run(**{f.name: f.type(about[f.name]) for f in fields(Run) if f.name in about})
        made = run.layers, run.heads, run.head_size
        if made != own:
            raise ValueError(f"made for {made} layers, heads, head size, not {own}")
        scales = [file.get_tensor(f"layers.{i}.scale") for i in range(run.layers)]
        size = run.heads * (run.head_size if run.mode == "channel" else 1)
        if not all(s.shape == (size,) and s.isfinite().all() for s in scales):
            raise ValueError(f"holds no {run.layers} x {size} finite numbers")
    return scales, run

# ---- 6. Checkpoints ----

def note(text):
    print(text, file=sys.stderr, flush=True)  # stdout is kept for results

@contextmanager
def reading(what):
    """Whatever goes wrong while a file is read becomes one line with its name."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:
        raise UserError(f"{what}: {str(e)[:900] or type(e).__name__}") from e

@contextmanager
def whole_file(path, folder=False):
    """Yield a path to write to, or an empty folder, renamed when whole."""
    path = Path(path)
    if path.exists() and (folder or not path.is_file()):
        raise UserError(f"{path}: is there already; give a new name")
    unfinished = path.with_name(f".{path.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)  # left by a killed run
    try:
        if folder:
            unfinished.mkdir()
        yield unfinished
        os.replace(unfinished, path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.unlink(missing_ok=True)

def write_json(path, data):
    with whole_file(path) as unfinished:
        unfinished.write_text(json.dumps(data, indent=2) + "\n")

def read_json(path):
    """The JSON object in a file, or an empty one."""
    with reading(path):
        return dict(json.loads(Path(path).read_text("utf-8"))) if Path(path).exists() else {}

def from_transformers(reader: str, folder):
    """What AutoConfig or AutoTokenizer reads, offline and without running its code."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers  # slow

    transformers.logging.set_verbosity_error()
    reader = getattr(transformers, reader)
    return reader.from_pretrained(folder, local_files_only=True, trust_remote_code=False)

def read_config(folder):
    """The Config of a Hugging Face folder."""
    raw = read_json(Path(folder) / "config.json")
    if not raw:
        raise UserError(f"{folder}: has no config.json; see python -m extras.convert")
    with reading(f"{folder}/config.json"):
        c = from_transformers("AutoConfig", folder)
        rope = {key: value for key, value in c.rope_parameters.items() if value is not None}
        # LongChat says its context elsewhere, and some with YaRN nowhere.
        context = getattr(c, "max_sequence_length", None) or c.max_position_embeddings
        if rope["rope_type"] == "yarn":
            context = max(context, rope["factor"] * rope["original_max_position_embeddings"])
        if (getattr(c, "sliding_window", None) or context) < context:
            raise ValueError("has a sliding_window; to use that many tokens, write "
                             "null there and their number as max_position_embeddings")
        own = {f.name: getattr(c, f.name) for f in fields(Config) if hasattr(c, f.name)}
        own.setdefault("attention_bias", c.model_type == "qwen2")
        own["head_dim"] = own.get("head_dim") or c.hidden_size // c.num_attention_heads
        own["context"] = int(context)
        own["rope_theta"], own["rope_scaling"] = rope.pop("rope_theta"), rope
        if (
            c.model_type not in ("llama", "mistral", "qwen2")
            or c.hidden_act != "silu"
            or rope["rope_type"] not in ("default", "linear", "llama3", "yarn")
            or {"mscale", "truncate", "partial_rotary_factor"} & set(rope)
            or (raw.get("rope_scaling") and raw.get("rope_parameters"))
            or not all(0 < own[f.name] <= 2**24 for f in fields(Config)[:8])
            or c.num_attention_heads % c.num_key_value_heads
            or own["head_dim"] % 2
            or not (0 < c.rms_norm_eps < 1 < own["rope_theta"] and c.num_hidden_layers < 1000)
        ):
            raise ValueError(f"is no supported Llama, Mistral or Qwen2: {raw}")
        return Config(**own)

def open_weights(path):
    """{name: tensor} of a file, memory-mapped."""
    with reading(path):
        if path.suffix == ".bin":
            return torch.load(path, "cpu", weights_only=True, mmap=True)
        return load_file(path)

class Checkpoint:
    """The tensors of a Hugging Face folder: safetensors or .bin, one or many."""

    def __init__(self, folder):
        self.folder, self.files = Path(folder), {}  # {tensor name: file}
        paths = sorted(self.folder.glob("model*.safetensors"))
        for path in paths or sorted(self.folder.glob("pytorch_model*.bin")):
            self.files |= dict.fromkeys(open_weights(path), path)
        if not self.files:
            raise UserError(f"{folder}: has no model*.safetensors or pytorch_model*.bin")

    def __getitem__(self, name):
        path = self.files[name]  # opened anew: its memory goes with the tensor
        if path.suffix == ".bin":
            return open_weights(path)[name]
        with reading(path), safe_open(path, "pt") as file:
            return file.get_tensor(name)

    def fitting(self, config: Config):
        """(name in the model, in the files, tensor) of every weight. Files may leave out
        o_proj's biases and a tied output matrix, nothing else."""
        names = {n.removeprefix("model."): n for n in self.files if "inv_freq" not in n}
        with reading(self.folder), torch.device("meta"):  # shapes without memory
            wanted = Llama(config).state_dict()
            for short in wanted | names:
                found = self[names[short]].shape if short in names else None
                own = wanted[short].shape if short in wanted else None
                tied = short == "lm_head.weight" and config.tie_word_embeddings
                optional = tied or short.endswith((".scale", "o_proj.bias"))
                if found != own and not (found is None and optional):
                    raise ValueError(f"{short} is {found}, by config.json {own}")
        for short, name in names.items():
            yield short, name, self[name]

def load_model(folder, config: Config, device="cpu", dtype=None):
    """Frozen, its scales at one. dtype None: float32 on a CPU, else the files' own."""
    state = {}
    if dtype is None and torch.device(device).type == "cpu":
        dtype = torch.float32
    with torch.device("meta"):
        model = Llama(config)
    for short, _, tensor in tqdm(Checkpoint(folder).fitting(config), "loading", leave=False):
        state[short] = tensor.to(device, dtype or tensor.dtype, copy=True)
    state.setdefault("lm_head.weight", state["embed_tokens.weight"])
    for name, value in model.state_dict().items():
        if name not in state:  # scales, and biases of o_proj that the files leave out
            state[name] = state["norm.weight"].new_zeros(value.shape)
    model.load_state_dict(state, assign=True)
    model.reset_scales("head")
    return model

# ---- 7. Text ----

# For checkpoints that carry none: [pattern of the folder's name, FastChat's words in Jinja].
TEMPLATES = read_json(ASSETS / "templates.json")
# For templates that name the date: two runs must be the same.
TODAY = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}{{ '' }}"

class Tokenizer:
    """Text to token ids and back, inside the checkpoint's chat template, tokenised at
    once, with BOS in front where the tokenizer itself puts it."""

    def __init__(self, folder, config: Config, template="auto"):
        self.rows, self.name = config.vocab_size, template
        with reading(f"{folder}: tokenizer and template"):
            self.hf = from_transformers("AutoTokenizer", folder)
            ids = self.hf("a").input_ids
            if not self.hf.decode(ids, skip_special_tokens=True).strip():
                raise ValueError("there is no vocabulary")
            if template == "auto":
                name = Path(folder).resolve().name.lower()
                known = [key for key in TEMPLATES if re.search(TEMPLATES[key][0], name)]
                self.name = "own" if self.hf.chat_template else known[0]
            _, self.template = TEMPLATES.get(self.name) or ("", self.hf.get_chat_template())
        self.bos = [i for i in ids[:1] if i == self.hf.bos_token_id]
        # An answer ends with the template's last special token, or else with eos.
        answer = self.encode(self.render("a", "b"))[len(self.encode(self.render("a"))) :]
        ends = [i for i in answer if i in self.hf.added_tokens_decoder][-1:]
        ends.append(self.hf.eos_token_id)
        for file in ("config.json", "generation_config.json"):
            eos = read_json(Path(folder) / file).get("eos_token_id")
            ends += eos if isinstance(eos, list) else [eos]
        ends = [i for i in ends if i is not None]
        if not ends:
            raise UserError(f"{folder}: no token ends a text; config.json needs eos_token_id")
        self.end, self.stop = ends[0], set(ends)

    def render(self, prompt, answer="", unfinished=False):
        messages = [{"role": "user", "content": prompt}]
        if answer:
            messages.append({"role": "assistant", "content": answer})
        with reading(f"--template {self.name}"):
            return self.hf.apply_chat_template(
                messages, chat_template=TODAY + self.template, tokenize=False,
                add_generation_prompt=not answer, continue_final_message=unfinished,
            )

    def encode(self, text):
        with reading(ascii(text[:40])):
            ids = self.hf(text, add_special_tokens=False).input_ids
        if max(ids, default=0) >= self.rows:
            raise UserError(f"token {self.hf.decode(max(ids))!r} has no row in the embedding")
        return ids

    def decode(self, ids):
        return self.hf.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _with_bos(self, text):
        ids = self.encode(text)
        return ids if ids[:1] == self.bos else self.bos + ids

    def prompt(self, prompt, prefix=""):
        """Ids up to where the answer begins, or behind its prefix."""
        prefix = prefix.strip()
        return self._with_bos(self.render(prompt, prefix, unfinished=prefix != ""))

    def pair(self, sample: Sample):
        """(prompt ids, answer ids), the whole conversation tokenised at once."""
        answer = f"{sample.prefix} {sample.answer}".strip()
        ids = self._with_bos(self.render(sample.prompt, answer))
        prompt = self.prompt(sample.prompt, sample.prefix)
        n = len(os.path.commonprefix([prompt, ids]))  # a token may cross the border
        if self.end not in ids[n:]:
            ids.append(self.end)
        last = len(ids) - ids[::-1].index(self.end)  # templates may write on behind it
        return ids[:n], ids[n:last]

# ---- 8. Commands ----

DTYPES = {"auto": None} | {n: getattr(torch, n) for n in ("float32", "float16", "bfloat16")}

def whole(text, least=1):
    if not least <= int(text) <= 2**24:
        raise ValueError
    return int(text)

def wholes(text):
    return [whole(part, least=0) for part in text.split(",")]

def flag(help, default=None, **more):
    return field(default=default, metadata={"help": help, **more})

@dataclass
class Run:
    """What a command was asked to do, a field per flag, and what came of it."""

    ckpt: str = flag("a Hugging Face folder", str(TOY))
    scales: str = flag("a file of scales")
    task: str = flag("lines, needle or FILE.jsonl", "lines")
    mode: str = flag("a scale per head or per channel", "head", choices=METHOD)
    extend: str = flag("none, ntk:4, yarn:4, linear:4 (default: the scales')")
    template: str = flag("auto: the scales' or checkpoint's", "auto", choices=["auto", *TEMPLATES])
    haystack: str = flag("a text file to hide needles in")
    length: whole = flag("tokens of a prompt (default: all that fit)")
    lengths: wholes = flag("A,B,C tokens (default: six)")
    depths: wholes = flag("A,B,C percent")
    samples: whole = flag("prompts to train on", 50)
    prompts: whole = flag("prompts per length", 50)
    epochs: whole = flag("passes over the samples", 1)
    lr: float = flag("learning rate (default: the paper's)")
    pull: float = flag("share of the way back to 1 after each step", 0.0)
    offload: bool = flag("keep what training saves in host memory", False)
    resume: bool = flag("go on where this run was interrupted", False)
    compare: bool = flag("the base beside it", False)
    prompt: str = flag("the text, or - for standard input")
    max_new_tokens: whole = flag("tokens of an answer", 100)
    device: str = flag("auto, cpu, cuda, cuda:1, mps", "auto")
    dtype: str = flag("auto: float32 on a CPU, else the files'", "auto", choices=DTYPES)
    seed: int = flag("draws the prompts", 0)
    json: str = flag("a file for the result")
    plot: str = flag("a PNG for the result")
    out: str = flag("a name for the result")
    checkpoint: str = ""  # the folder's name
    layers: int = 0
    heads: int = 0
    head_size: int = 0
    trained_on: str = ""  # fingerprints of samples
    steps: int = 0
    loss: float = math.nan

def open_checkpoint(run: Run) -> tuple[Llama, Tokenizer, Run]:
    """What a command starts with, and the run with what its files say."""
    config, scales = read_config(run.ckpt), None
    if run.scales:
        scales, trained = read_scales(run.scales, config)
        if run.extend not in (None, trained.extend):
            raise UserError(f"--extend {run.extend}: the scales had {trained.extend}")
        if run.template == "auto":
            run.template = trained.template
        run = replace(run, mode=trained.mode, extend=trained.extend, trained_on=trained.trained_on)
    run = replace(
        run, extend=run.extend or "none", checkpoint=Path(run.ckpt).resolve().name,
        layers=config.num_hidden_layers, heads=config.num_attention_heads, head_size=config.head_dim,
    )
    config = extend(config, run.extend)
    tokenizer = Tokenizer(run.ckpt, config, run.template)
    if run.device == "auto":
        run.device = "cuda" if torch.cuda.is_available() else "cpu"
    with reading(f"{run.ckpt} on --device {run.device}"):
        model = load_model(run.ckpt, config, run.device, DTYPES[run.dtype])
    if scales:
        model.set_scales(scales)
    note(f"{run.ckpt} on {run.device}: context {config.context:,}, extension "
         f"{run.extend}, template {tokenizer.name}, scales {run.scales}")
    return model, tokenizer, replace(run, template=tokenizer.name)

def train_command(run: Run):
    out, flags = run.out or "scales.safetensors", repr(replace(run, resume=False))
    model, tokenizer, run = open_checkpoint(run)
    saved, state_file = None, Path(f"{out}.state")
    end = full_length(model.config)
    run.length = run.length or end
    if run.lr is None:
        run.lr = paper_lr(run.task, run.mode, run.layers)
    if run.length > end:
        raise UserError(f"--length {run.length}: the context has room for {end}; try --extend")
    samples = make_samples(run, tokenizer, run.length, run.samples, "train")
    run.trained_on = ",".join(s.fingerprint() for s in samples)
    model.reset_scales(run.mode)
    if run.resume and state_file.exists():
        with reading(state_file):
            saved = torch.load(state_file, weights_only=True)
            if saved["flags"] != flags:
                raise ValueError("is of a run with other flags")
            model.set_scales(saved["scales"])
    note(f"{METHOD[run.mode]}: {len(samples)} prompts of {run.length:,} tokens, lr {run.lr:g}")

    def keep(losses, optimizer):
        save_scales(out, model.scales(), replace(run, steps=len(losses), loss=losses[-1]))
        state = {"flags": flags, "losses": losses, "scales": model.scales()}
        state["optimizer"] = optimizer.state_dict()
        with reading(state_file), whole_file(state_file) as unfinished:
            torch.save(state, unfinished)

    pairs = [tokenizer.pair(s) for s in samples]
    with save_on_cpu() if run.offload else nullcontext():
        losses = train(model, pairs, run.lr, run.epochs, run.pull, saved, keep)
    state_file.unlink(missing_ok=True)
    size = sum(s.numel() for s in model.scales())
    print(f"{out}: {size:,} scales, loss {losses[0]:.3f} -> {losses[-1]:.3f}")

def draw_cells(run: Run, tokenizer, config):
    """(length, depth, samples) of every cell."""
    end = full_length(config)
    lengths = run.lengths or [round(end * x) for x in (0.15, 0.3, 0.5, 0.7, 0.85, 1)]
    depths = run.depths or ([0, 25, 50, 75, 100] if run.task == "needle" else [None])
    if run.task not in ("lines", "needle"):
        lengths, depths = [max(lengths)], [None]  # a file's are as they are
    count, cells = math.ceil(run.prompts / len(depths)), []
    for length, depth in product(lengths, depths):
        cells.append((length, depth, make_samples(run, tokenizer, length, count, "eval", depth)))
    return cells

def compare(run: Run):
    """{method: cells} of the base, the scales or both; --json grows cell by cell."""
    if run.compare and not run.scales:
        raise UserError("--compare: needs --scales")
    model, tokenizer, run = open_checkpoint(run)
    cells, scales, start = draw_cells(run, tokenizer, model.config), model.scales(), time.monotonic()
    results = {}
    if run.compare or not run.scales:
        results["base"] = []
    if run.scales:
        results[METHOD[run.mode]] = []
    for length, depth, samples in cells:
        for method, done in results.items():
            if method == "base":
                model.reset_scales("head")
            else:
                model.set_scales(scales)
            cell = evaluate(model, tokenizer, samples, run.max_new_tokens, f"{method} {length}")
            done.append({"length": length, "depth": depth} | cell)
        report = {name: getattr(run, name) for name in ("ckpt", "scales", "task", "extend")}
        report |= {"cells": done, "seconds": round(time.monotonic() - start, 1)}
        if run.compare:
            report["base"] = results["base"]
        if run.json:
            write_json(run.json, report)
    return results

def eval_command(run: Run):
    results = compare(run)
    print(score_table(results))
    if run.plot:
        plot_scores(run.plot, results)

def demo_command(run: Run):
    folder, results = Path(run.out or "seal-demo"), {}
    folder.mkdir(exist_ok=True)
    for mode in METHOD:
        scales = f"{folder}/{mode}.safetensors"
        train_command(replace(run, mode=mode, out=scales))
        results |= compare(replace(run, scales=scales, compare=not results))
    print(f"share of {run.prompts} prompts answered right\n{score_table(results)}")
    plot_scores(folder / "accuracy.png", results)

def generate_command(run: Run):
    model, tokenizer, _ = open_checkpoint(run)
    ids = tokenizer.prompt(sys.stdin.read() if run.prompt == "-" else run.prompt)
    context = model.config.context
    if not 0 < len(ids) < context:
        raise UserError(f"--prompt: has {len(ids)} tokens, must have 1 to {context - 1}")
    new = min(run.max_new_tokens, context - len(ids))
    print(tokenizer.decode(generate(model, ids, new, tokenizer.stop)))

def fold_command(run: Run):
    """Write an ordinary Hugging Face folder, the scales in its weights."""
    from huggingface_hub import save_torch_state_dict

    source, config, weights = Path(run.ckpt), read_config(run.ckpt), {}
    scales, trained = read_scales(run.scales, config)
    stretched = extend(config, trained.extend)
    for _, name, tensor in tqdm(Checkpoint(source).fitting(config), "folding", leave=False):
        weights[name] = fold(name, tensor, scales).to(tensor.dtype)
    raw = read_json(source / "config.json")
    raw["tie_word_embeddings"] = "lm_head.weight" not in weights
    if stretched != config:  # in the spelling that transformers 4 and 5 read
        raw |= {"rope_theta": stretched.rope_theta, "rope_scaling": stretched.rope_scaling}
        raw["max_position_embeddings"] = stretched.context
        for key in ("rope_parameters", "max_sequence_length"):
            raw.pop(key, None)
    with whole_file(run.out, folder=True) as out:
        for file in source.iterdir():
            if file.suffix in (".json", ".jinja", ".model", ".txt") and "index" not in file.name:
                shutil.copyfile(file, out / file.name)
        save_torch_state_dict(weights, out)  # in shards of 5 GB
        write_json(out / "config.json", raw)
    print(f"{run.out}: {METHOD[trained.mode]} folded into {len(scales)} layers")

MODEL = "ckpt template device dtype"
TASK = f"{MODEL} extend task haystack seed"
COMMANDS = {  # and their flags, ! behind those that must be given
    "demo": (demo_command, f"{MODEL} prompts samples seed out"),
    "train": (train_command, f"{TASK} mode length samples epochs lr pull offload resume out"),
    "eval": (eval_command, f"{TASK} scales compare lengths depths prompts max_new_tokens json plot"),
    "generate": (generate_command, f"{MODEL} extend scales prompt! max_new_tokens"),
    "fold": (fold_command, "ckpt scales! out!"),
}

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message)

    def add_flags(self, names):
        known = {f.name: f for f in fields(Run)}
        for name in names:
            f, option = known[name.strip("!")], "--" + name.strip("!").replace("_", "-")
            kind = {"action": "store_true"} if f.type is bool else {"type": f.type}
            self.add_argument(option, default=f.default, required="!" in name, **kind, **f.metadata)

def main(arguments=None):
    parser = Parser(prog="seal.py", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (_, flags) in COMMANDS.items():
        commands.add_parser(name).add_flags(flags.split())
    chosen = vars(parser.parse_args(arguments))
    COMMANDS[chosen.pop("command")][0](Run(**chosen))

def run(program, main, arguments=None):
    """The exit status of main(arguments): 2, with one line, for what a user can mend."""
    try:
        main(arguments)
        return 0
    except KeyboardInterrupt:
        note(f"{program}: interrupted")
        return 130
    except (UserError, OSError, torch.OutOfMemoryError, MemoryError) as e:
        message = " ".join(f"{e or type(e).__name__}".split())
        note(f"{program}: error: {message[:1000]}")
        return 2

if __name__ == "__main__":
    sys.exit(run("seal.py", main))
