"""seal.py beside transformers + peft: the same work, its seconds, memory, operations.

    python -m extras.speed                       8 layers of 512, 2,048 tokens, on a CPU
    python -m extras.speed --ckpt DIR --lengths 1024,2048 --json extras/speed.json
    python -m extras.speed --what answer         reading a prompt, and decoding
    python -m extras.speed_export                export_gguf.py beside a plain copy

peft's IA3 on o_proj is exactly SEAL-C (paper, section 4): one number for each input
channel. Both sides get the same checkpoint, prompt and answer, fused attention and
recomputation of blocks; peft's logits are limited to the answer. Losses and gradients
must agree, or there is no result. `answer` continues a prompt greedily, by
seal.generate and by transformers' generate, and in float32 must find the same tokens.

Each run is a fresh process; the sides take turns, and medians of the pairs are given.
The tokens are random, and so are the weights of a named shape: that changes neither
time nor memory. Memory is the peak of the process, or of the GPU, and, as imports and
weights make most of a small model's, also what stands before the first step.

SmolLM2-135M, float32, two cores: a step takes 1.01 (700 tokens) and 0.97 (2,000) of peft's
seconds, in 0.95 and 0.93 of its memory; 33 of 33 decoded tokens are the same. In bfloat16
only losses must agree: on random tokens the gradients differ by .78 of their norm.

Unattended on a GPU (13.5 GB of disk for the random 7B, in --tmp):

    python -m extras.speed --shape 7b --lengths 4096,8192,16384,31000 --device cuda \\
        --dtype bfloat16 --offload --pairs 1 --tmp /tmp --json extras/speed.json
"""

import math
import multiprocessing
import re
import statistics
import sys
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch.autograd.graph import save_on_cpu
from torch.utils.flop_counter import FlopCounterMode

import seal
from extras import shapes

ANSWER = 30  # tokens that the loss looks at
DECODED = 32  # tokens decoded after the first one

# --------------------------------------------------------------------------------------
# The two sides
# --------------------------------------------------------------------------------------


class Seal:
    def __init__(self, folder, args):
        config, dtype = seal.read_config(folder), getattr(torch, args.dtype)
        self.model = seal.load_model(folder, config, args.device, dtype)
        self.keep = save_on_cpu if args.offload else nullcontext

    def step(self, prompt, answer):
        """Forward and backward: the loss, and the gradient of every scale."""
        self.model.reset_scales("channel")
        with self.keep():
            loss = seal.backward(self.model, [(prompt, answer)])
        return loss.item(), [scale.grad for scale in self.model.scales()]

    def answer(self, prompt, count):
        return seal.generate(self.model, prompt, count)


class Peft:
    def __init__(self, folder, args):
        import peft
        import transformers

        warnings.filterwarnings("ignore", message=".*gradient_checkpointing")  # renamed
        transformers.logging.set_verbosity_error()
        reader, dtype = transformers.AutoModelForCausalLM, getattr(torch, args.dtype)
        self.model = reader.from_pretrained(folder, dtype=dtype).to(args.device)
        if args.what == "answer":
            return
        ia3 = peft.IA3Config(target_modules=["o_proj"], feedforward_modules=["o_proj"])
        self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.model.enable_input_require_grads()
        self.model = peft.get_peft_model(self.model, ia3)
        self.model.config.use_cache = False
        self.model.train()

    def step(self, prompt, answer):
        scales = [p for p in self.model.parameters() if p.requires_grad]
        for scale in scales:
            scale.grad = None
        ids = torch.tensor([prompt + answer[:-1]], device=self.model.device)
        logits = self.model(input_ids=ids, logits_to_keep=len(answer)).logits[0].float()
        loss = F.cross_entropy(logits, torch.tensor(answer, device=logits.device))
        loss.backward()
        return loss.item(), [scale.grad.flatten() for scale in scales]

    def answer(self, prompt, count):
        ids = torch.tensor([prompt], device=self.model.device)
        greedy = {"max_new_tokens": count, "do_sample": False, "eos_token_id": None}
        found = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **greedy
        )
        return found[0, len(prompt) :].tolist()


SIDES = {"seal": Seal, "peft": Peft}


def peak_memory(device: str) -> float:
    """GB, the most so far, of the GPU or of this process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 2**30
    kilobytes = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]
    return int(kilobytes) / 2**20


def timed(work, inputs, args):
    """What work(*inputs) gives, and the median of its seconds."""
    times = []
    for _ in range(args.steps + 1):  # the first warms up
        start = time.perf_counter()
        result = work(*inputs)
        if args.device.startswith("cuda"):
            torch.cuda.synchronize(args.device)
        times.append(time.perf_counter() - start)
    return result, statistics.median(times[1:])


def figures(side: str, folder: Path, length: int, args) -> dict:
    """What one side computes and what that takes; runs in a process of its own."""
    model = SIDES[side](folder, args)
    with torch.no_grad():
        for weight in model.model.parameters():
            weight.sum()  # a mapped file counts once it is read
    loaded, vocabulary = peak_memory(args.device), seal.read_config(folder).vocab_size
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(vocabulary, (length,), generator=generator).tolist()
    if args.what == "train":
        (loss, grads), step = timed(model.step, (ids[:-ANSWER], ids[-ANSWER:]), args)
        computed = torch.cat([grad.float().cpu() for grad in grads]).tolist()
        result = {"loss": loss, "seconds a step": step}
    else:
        _, prefill = timed(model.answer, (ids, 1), args)
        computed, whole = timed(model.answer, (ids, 1 + DECODED), args)
        decode = (whole - prefill) / DECODED
        result = {"seconds to read the prompt": prefill, "seconds a token": decode}
    memory = {"GB after loading": loaded, "GB at the peak": peak_memory(args.device)}
    return {"computed": computed} | result | memory


def in_a_fresh_process(function, *inputs):
    """What function(*inputs) gives; no memory of this process counts as its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *inputs).result()


# --------------------------------------------------------------------------------------
# The comparison
# --------------------------------------------------------------------------------------


def agree(ours: dict, theirs: dict, args) -> str:
    """In words, how two results agree; UserError if that was not the same work."""
    exact = args.dtype == "float32"  # 16 bits are rounded differently by the two
    a, b = (torch.tensor(side["computed"]) for side in (ours, theirs))
    if args.what == "answer":
        words = f"{(a == b).sum()} of {len(a)} tokens are the same"
        good = torch.equal(a, b) or not exact
    else:
        gap = abs(ours["loss"] - theirs["loss"])
        error = ((a - b).norm() / b.norm()).item()
        words = f"losses differ by {gap:.1e}, gradients by {error:.1e} of their norm"
        good = max(gap, error) < 1e-3 if exact else gap < 0.1
    if not good:
        raise seal.UserError(f"seal.py and peft did not do the same work: {words}")
    return words


def operations(config: seal.Config, length: int) -> tuple[float, float]:
    """Useful FLOP of a training step, and attention's share of them, as torch counts a
    plain step: nothing is computed twice. bmm is attention's; half of it is masked."""
    with torch.device("meta"):  # shapes without memory
        model = seal.Llama(config)
    model.reset_scales("channel")
    model.room = math.inf  # so nothing is computed twice
    with FlopCounterMode(display=False) as counter:
        x = model(torch.zeros(1, length, dtype=torch.long, device="meta"))
        model.logits(x[0, -ANSWER:]).sum().backward()
    attention = counter.get_flop_counts()["Global"][torch.ops.aten.bmm] / 2
    total = counter.get_total_flops() - attention
    return total, attention / total


def compare(folder: Path, length: int, args) -> dict:
    """The record of one length: every run, and the medians."""
    runs, medians = {"seal": [], "peft": []}, {}
    for pair in range(args.pairs):
        found = {}
        for side in ("seal", "peft") if pair % 2 else ("peft", "seal"):
            try:
                found[side] = in_a_fresh_process(figures, side, folder, length, args)
            except Exception as e:  # one side may not fit where the other does
                words = f"{type(e).__name__}: {e}".split()
                found[side] = {"error": " ".join(words)[:200]}
        if not any("error" in result for result in found.values()):
            seal.note(f"pair {pair + 1}: {agree(found['seal'], found['peft'], args)}")
        for side, result in found.items():
            result.pop("computed", None)
            runs[side].append(result)
            seal.note(f"{length:,} tokens, {side}: {result}")
    for side, results in runs.items():
        whole = [result for result in results if "error" not in result]
        medians[side] = {}
        for name in whole[0] if whole else ():
            medians[side][name] = statistics.median(result[name] for result in whole)
    if not any(medians.values()):
        error = runs["seal"][0]["error"]
        raise seal.UserError(f"{length} tokens: neither side could run; {error}")
    checkpoint = args.ckpt or args.shape
    record = {"what": args.what, "checkpoint": checkpoint, "length": length}
    if args.what == "train":
        record["flop"], share = operations(seal.read_config(folder), length)
        record["attention_share"] = share
        for side in medians.values():
            if side:
                side["useful TFLOP/s"] = record["flop"] / side["seconds a step"] / 1e12
    record |= {"dtype": args.dtype, "offload": args.offload}
    return record | {"median": medians, "runs": runs}


def main(arguments=None) -> None:
    parser = seal.Parser("extras.speed", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--what", choices=["train", "answer"], default="train")
    add("--shape", choices=shapes.SHAPES, default="8x512", help="random weights so")
    add("--ckpt", help="or a Hugging Face folder")
    add("--lengths", type=seal.wholes, default=[2048], help="A,B,C tokens")
    add("--pairs", type=int, default=3, help="processes of each side")
    add("--steps", type=int, default=3, help="timed in each process")
    add("--device", default="cpu", help="cpu, cuda, cuda:1")
    add("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    add("--offload", action="store_true", help="seal.py's (peft has none)")
    add("--tmp", help="where to make the random checkpoint")
    add("--json", help="a file to add the records to")
    args = parser.parse_args(arguments)
    if min(args.pairs, args.steps) < 1 or min(args.lengths) <= ANSWER:
        raise seal.UserError(f"--pairs, --steps: 1 or more; --lengths: above {ANSWER}")
    if args.json:
        seal.check_place(args.json)
    device = f"CPU, {torch.get_num_threads()} threads"
    if args.device.startswith("cuda"):
        device = torch.cuda.get_device_name(args.device)
    about, rows = {"date": time.strftime("%Y-%m-%d"), "device": device}, []
    for package in ("torch", "transformers", "peft"):
        about[package] = version(package)
    with tempfile.TemporaryDirectory(dir=args.tmp) as made:
        if not args.ckpt:
            shapes.make(Path(made), args.shape, getattr(torch, args.dtype))
        for length in args.lengths:
            record = compare(Path(args.ckpt or made), length, args)
            ours, theirs = record["median"].values()
            for name in ours | theirs:
                a, b = ours.get(name), theirs.get(name)
                rows.append([length, name, a, b, a and b and a / b])
            if args.json:
                records = seal.read_json(args.json).get("records", [])
                seal.write_json(args.json, {"records": [*records, about | record]})
    print(tabulate(rows, ["tokens", "", "seal.py", "peft", "ratio"], floatfmt=".3g"))


if __name__ == "__main__":
    sys.exit(seal.exit_status("extras.speed", main))
