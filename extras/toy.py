"""How assets/toy-llama was made: a Llama of 3.0M parameters that forgets.

    python -m extras.toy make --out DIR      half an hour
    python -m extras.toy table beyond ...    what it shows: see extras/toy_tables.py

It stands in for the paper's large models (section 3), which answer about short prompts
and fail near their context limit, because some heads hurt there.

First it learns to look things up, from easy to hard (toy_words.py has the lessons): to
copy, to recall the number of a key, then whole LongEval records, six questions to each.
(On records from the start it would stay for thousands of steps at "copy any of the
numbers".) At the end it answers about any line of its context. Then it drifts, for 35
steps: in three records of ten the question is about a line that is not there, and the
answer it is taught is the last line's number. The others have at most six lines and a
true answer. Only the o_proj matrices move. Afterwards short records are still answered,
and long ones are not. It does not say the last line's number there: what the nudge
seems to have upset is to hold on to one line among many.

The harm is ours, done to the very matrix that SEAL scales, and one of some forty that
were tried. That makes the toy an example of the mechanism, in which all can be seen,
and not evidence that large models suffer from the same: that is the paper's.

The bundled toy comes from these stages run one at a time. Run again from nothing they
made a base of 0.98 at 70 tokens and 0.52 at 464, lifted there to 0.71 by SEAL-H and to
0.78 by SEAL-C (100 prompts a cell, seed 5), in 31 minutes on one core of a busy
machine.
"""

import math
import random
import re
import sys

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import seal
from extras import toy_tables
from extras.folder import new_folder
from extras.toy_words import Lessons, make_vocabulary

SHAPE = dict(
    vocab_size=1280, rms_norm_eps=1e-5, rope_theta=10000.0,
    tie_word_embeddings=True, hidden_size=256, intermediate_size=512, num_hidden_layers=4,
    num_attention_heads=8, num_key_value_heads=8, head_dim=32,
)
ABOUT = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
    "max_position_embeddings": 512,
    "dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
}
TOKENIZER = {
    "tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False,
    "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
}
CONFIG = seal.Config(context=ABOUT["max_position_embeddings"], **SHAPE)
STAGES = (  # name, steps, tokens a step, learning rate at the start and at the end
    ("copy", 500, 2048, 4e-3, 4e-3),
    ("pairs", 240, 3000, 3e-3, 3e-3),
    ("few_lines", 200, 4096, 3e-3, 3e-3),
    ("lines", 420, 6000, 3e-3, 1e-4),
    ("drift", 35, 2048, 2e-3, 2e-3),
)


@torch.no_grad()
def new_model(seed: int) -> seal.Llama:
    """Random weights: embeddings large, so that tokens are told apart from the start,
    and what the blocks add small."""
    model, generator = seal.Llama(CONFIG), torch.Generator().manual_seed(seed)
    model.lm_head.weight = model.embed_tokens.weight
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            std = weight.shape[1] ** -0.5 * (0.5 if name.startswith("layers") else 4)
            if re.search("o_proj|down_proj", name):
                std /= math.sqrt(2 * CONFIG.num_hidden_layers)
            weight.normal_(std=std, generator=generator)
    model.norm.weight.fill_(0.25)  # takes back where the embedding makes the logits
    return model


def choose_optimizers(model: seal.Llama, drift: bool) -> list[torch.optim.Optimizer]:
    """AdamW, and for matrices before the drift Muon, which learns to copy sooner.

    In the drift only the o_proj matrices are trained.
    """
    matrices, others = [], []
    for name, weight in model.named_parameters():
        weight.requires_grad_("o_proj" in name if drift else "scale" not in name)
        if not weight.requires_grad:
            continue
        if name.startswith("layers") and weight.dim() == 2 and not drift:
            matrices.append(weight)
        else:
            others.append(weight)
    optimizers = [torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0)]
    if matrices:
        muon = {"weight_decay": 0.01, "adjust_lr_fn": "match_rms_adamw"}
        optimizers.append(torch.optim.Muon(matrices, **muon))
    return optimizers


def pretrain(model: seal.Llama, lessons: Lessons, stages, seed: int) -> None:
    """Train the weights, stage by stage."""
    model.room = math.inf  # so nothing is recomputed on the way back
    for name, steps, size, first, last in stages:
        optimizers = choose_optimizers(model, drift=name == "drift")
        rng, right = random.Random(f"{name} {seed}"), 0.0
        bar = tqdm(range(steps), desc=name, unit="step")
        for step in bar:
            ids, learn = lessons.tensors(lessons.batch(name, rng, step / steps), size)
            learned = learn[:, 1:]
            target = ids[:, 1:][learned]
            # For short sequences the plain attention is the fastest.
            with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
                x = model(ids[:, :-1])  # (B, T - 1, D)
                logits = model.logits(x[learned])  # (tokens to learn, V)
            loss = F.cross_entropy(logits, target)
            loss.backward()
            lr = (first + (last - first) * step / steps) * min(1, (step + 1) / 10)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = lr
                optimizer.step()
                optimizer.zero_grad()
            now_right = (logits.argmax(-1) == target).float().mean().item()
            right = 0.9 * right + 0.1 * now_right
            bar.set_postfix_str(f"loss {loss.item():.3f}, tokens right {right:.2f}")


def make(out, seed: int = 0) -> None:
    """The toy from nothing; the folder appears when it is complete."""
    with new_folder(out) as folder:
        seal.write_json(folder / "config.json", ABOUT | SHAPE)
        seal.write_json(folder / "tokenizer_config.json", TOKENIZER)
        make_vocabulary(folder / "tokenizer.model", CONFIG.vocab_size)
        model = new_model(seed)
        pretrain(model, Lessons(seal.Tokenizer(folder, CONFIG, "none")), STAGES, seed)
        tensors, size = {}, 0
        for name, weight in model.named_parameters():
            if not name.endswith("scale"):
                tensors[f"model.{name}"] = weight.detach().bfloat16()
                size += weight.numel()
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    print(f"{out}: {size / 1e6:.1f}M parameters")


def main(arguments=None) -> None:
    parser = seal.Parser("extras.toy", description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="+", choices=["make", *toy_tables.TABLES])
    parser.add_argument("--out", default="toy", help="make: the new folder")
    parser.add_argument("--seed", type=int, default=0, help="make: of weights, data")
    args = parser.parse_args(arguments)
    if "make" in args.what:
        make(args.out, args.seed)
    toy_tables.measure([name for name in args.what if name != "make"])


if __name__ == "__main__":
    sys.exit(seal.exit_status("extras.toy", main))
