"""The same training by seal.py and by transformers + PEFT, side by side; with --eval, the same greedy answer.

PEFT's IA3 on o_proj's input is exactly SEAL-C: one number per input channel of o_proj. Both sides get the same random
checkpoint, the same prompt and answer, sdpa attention, and gradient checkpointing; PEFT's logits are limited to the
answer. First the script asserts that loss and scale gradients agree, then it times both: a fresh process for each
run, in turn, several pairs, and prints the ratio of medians of seconds per step and of peak memory. Memory is also
given as it stands before the first step, every weight touched once (transformers maps files, and what is mapped counts
when it is touched): imports and weights make most of a small shape's peak.

With --eval both continue the prompt greedily (seal.generate, transformers' generate with its usual cache), and it is
asserted that they find the same tokens. Reading the prompt is timed as an answer of one token, decoding as what each of
32 more tokens adds.

    python bench/vs_peft.py                                                   small shape, 2K tokens, CPU: two minutes
    python bench/vs_peft.py --eval                                            the same for evaluation: one minute
    python bench/vs_peft.py --lengths 1024,2048,4096 --pairs 1                how cost grows with the length
    python bench/vs_peft.py --shape 7b --lengths 4096,8192,16384,31000 --dtype bfloat16 --offload --json results.json

The last is for a GPU; it needs disk for the random checkpoint (13.5 GB) in the temporary folder (--tmp).
"""

import argparse
import json
import math
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import seal

ANSWER = 30  # tokens that the loss looks at
DECODED = 32  # tokens after the first one, with --eval
NAMES = {"seconds": "seconds a step", "prefill": "seconds to read the prompt", "decode": "seconds a token",
         "loaded": "GB after loading", "memory": "GB at the peak"}
SHAPES = seal.SHAPES | {
    "small": dict(
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=64,
        vocab_size=32000,
        max_position_embeddings=4096,
    )
}


def make_checkpoint(shape: str, folder: Path, dtype: torch.dtype) -> None:
    """Random weights in Hugging Face's layout, one shard per layer."""
    from safetensors.torch import save_file

    config = seal.Config(**SHAPES[shape])
    names = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "vocab_size",
    )
    about = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "torch_dtype": str(dtype)[6:],
        "max_position_embeddings": 65536,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
        **{n: getattr(config, n) for n in names},
    }
    (folder / "config.json").write_text(json.dumps(about))
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in seal.Llama(config).named_parameters() if not n.endswith("scale")}
    index, generator = {}, torch.Generator().manual_seed(0)
    for layer in [None, *range(config.num_hidden_layers)]:
        file = f"model-{layer if layer is not None else 'rest'}.safetensors"
        mine = [
            n
            for n in shapes
            if (n.startswith(f"layers.{layer}.") if layer is not None else not n.startswith("layers."))
        ]
        tensors = {}
        for name in mine:
            full = name if name == "lm_head.weight" else f"model.{name}"
            size = shapes[name]
            noise = torch.randn(size, generator=generator) / math.sqrt(size[-1]) if len(size) == 2 else torch.ones(size)
            tensors[full] = noise.to(dtype)
            index[full] = file
        save_file(tensors, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def open_seal(folder, device, dtype, tokens, offload):
    """A function that runs forward and backward on (prompt, answer) and returns (loss, gradients by layer)."""
    model = seal.load_model(folder, seal.read_config(folder), device, dtype)
    model.reset_scales("channel")
    seal.plan_memory(model, tokens, offload)
    touch(model)

    def step(prompt, answer):
        for scale in model.scales():
            scale.grad = None
        loss, _ = seal.answer_loss(model, prompt, answer)
        loss.backward()
        return loss.item(), [s.grad for s in model.scales()]

    return step


def open_peft(folder, device, dtype, tokens, offload):
    """The same with transformers and PEFT."""
    import peft

    ia3 = peft.IA3Config(target_modules=["o_proj"], feedforward_modules=["o_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(open_transformers(folder, device, dtype), ia3)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    model.config.use_cache = False
    model.train()
    scales = [p for n, p in model.named_parameters() if p.requires_grad]
    touch(model)

    def step(prompt, answer):
        for scale in scales:
            scale.grad = None
        ids = torch.tensor([prompt + answer[:-1]], device=device)
        logits = model(input_ids=ids, logits_to_keep=len(answer)).logits[0].float()
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(answer, device=device))
        loss.backward()
        return loss.item(), [s.grad.flatten() for s in scales]

    return step


def open_transformers(folder, device, dtype):
    import transformers

    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    return model.to(device)


def answer_seal(folder, device, dtype):
    """A function that continues a prompt greedily by so many tokens."""
    model = seal.load_model(folder, seal.read_config(folder), device, dtype)
    touch(model)
    return lambda prompt, count: seal.generate(model, [prompt], count)[0]


def answer_transformers(folder, device, dtype):
    """The same with transformers."""
    model = open_transformers(folder, device, dtype)
    touch(model)

    def answer(prompt, count):
        ids = torch.tensor([prompt], device=device)
        greedy = dict(max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0)
        return model.generate(ids, attention_mask=torch.ones_like(ids), **greedy)[0, len(prompt) :].tolist()

    return answer


def touch(model) -> None:
    """Read every weight, so that memory after loading holds them, mapped or not."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.sum()


def worker(args) -> None:
    """One side, in this process: prints what it computed, its times, and its memory as JSON."""
    device, dtype = seal.pick_device(args.device), seal.DTYPES[args.dtype]
    length = int(args.lengths)
    ids = torch.randint(
        SHAPES[args.shape]["vocab_size"], (length,), generator=torch.Generator().manual_seed(1)
    ).tolist()
    seconds = {}

    def timed(name, work, *inputs):
        start = seal.clock(device)
        result = work(*inputs)
        seconds.setdefault(name, []).append(seal.clock(device) - start)
        return result

    if args.eval:
        answer = (answer_seal if args.worker == "seal" else answer_transformers)(args.folder, device, dtype)
        loaded = peak_memory(device)
        for _ in range(args.steps + 1):  # the first warms up
            timed("prefill", answer, ids, 1)
            tokens = timed("whole", answer, ids, 1 + DECODED)
        median = {name: statistics.median(times[1:]) for name, times in seconds.items()}
        decode = (median["whole"] - median["prefill"]) / DECODED
        result = {"tokens": tokens, "prefill": median["prefill"], "decode": decode}
    else:
        step = (open_seal if args.worker == "seal" else open_peft)(args.folder, device, dtype, length, args.offload)
        loaded = peak_memory(device)
        for _ in range(args.steps + 1):  # the first warms up
            loss, gradients = timed("step", step, ids[:-ANSWER], ids[-ANSWER:])
        torch.save(torch.cat([g.float().cpu() for g in gradients]), args.gradients)
        result = {"loss": loss, "seconds": statistics.median(seconds["step"][1:])}
    print(json.dumps(result | {"loaded": loaded, "memory": peak_memory(device)}))


def peak_memory(device) -> int:
    """Bytes: the most so far, of the GPU or of this process (getrusage would count what its parent held)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def check_training(gradients: dict, losses: list[float], dtype: str) -> str:
    a, b = gradients["seal"], gradients["peft"]
    error, gap = ((a - b).norm() / b.norm()).item(), abs(losses[0] - losses[1])
    bound = 1e-3 if dtype == "float32" else 0.1  # bf16 has 8 bits, and both round differently
    assert gap < bound and error < bound, f"not the same work: loss differs by {gap}, gradients by {error:.1%}"
    return f"losses differ by {gap:.1e}, scale gradients by {error:.1e} of their norm"


def check_answers(tokens: dict, dtype: str) -> str:
    a, b = tokens["seal"], tokens["peft"]
    same = [x == y for x, y in zip(a, b, strict=True)].index(False) if a != b else len(a)
    assert a == b or dtype != "float32", f"not the same answer: {a} and {b}"  # in 16 bits, rounding may part them
    return f"the first {same} of {len(a)} tokens agree"


def run(side: str, length: int, folder: Path, args) -> tuple[dict, torch.Tensor | list]:
    """One side in a fresh process: its figures, and the gradients or tokens to compare."""
    gradients = folder / f"{side}.pt"
    command = [
        sys.executable,
        __file__,
        "--worker",
        side,
        "--folder",
        folder,
        "--lengths",
        length,
        "--shape",
        args.shape,
        "--steps",
        args.steps,
        "--device",
        args.device,
        "--dtype",
        args.dtype,
        "--gradients",
        gradients,
    ]
    command += ["--offload"] * (args.offload and side == "seal") + ["--eval"] * args.eval
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        message = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"error": message}, None
    result = json.loads(done.stdout.strip().splitlines()[-1])
    return result, result.pop("tokens") if args.eval else torch.load(gradients)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="small", choices=SHAPES)
    parser.add_argument("--lengths", default="2048", help="tokens, with commas between")
    parser.add_argument("--eval", action="store_true", help="compare evaluation, with transformers' generate")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="timed steps per run")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--offload", action="store_true", help="seal.py's --offload (PEFT has none)")
    parser.add_argument("--tmp", help="where to make the checkpoint")
    parser.add_argument("--json", help="add the result to this file")
    for hidden in ("--worker", "--folder", "--gradients"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args)

    import peft
    import transformers

    device, rows, records = seal.pick_device(args.device), [], []
    with tempfile.TemporaryDirectory(dir=args.tmp) as folder:
        folder = Path(folder)
        make_checkpoint(args.shape, folder, seal.DTYPES[args.dtype])
        for length in map(int, args.lengths.split(",")):
            results = {"seal": [], "peft": []}
            for pair in range(args.pairs):
                found = {}
                for side in ("seal", "peft") if pair % 2 else ("peft", "seal"):
                    result, found[side] = run(side, length, folder, args)
                    results[side].append(result)
                    print(f"{length} tokens, pair {pair + 1}, {side}: {result}", file=sys.stderr)
                if pair == 0 and None not in found.values():
                    losses = [results[side][0].get("loss") for side in found]
                    same = check_answers(found, args.dtype) if args.eval else check_training(found, losses, args.dtype)
                    print(f"{length} tokens: {same}", file=sys.stderr)
            share = seal.useful_flop(seal.Config(**SHAPES[args.shape]), length)[2]
            record = {
                "what": "eval" if args.eval else "train",
                "shape": args.shape,
                "length": length,
                "dtype": args.dtype,
                "offload": args.offload,
                "pairs": args.pairs,
                "runs": results,
            }
            if not any("error" in r for side in results.values() for r in side):
                keys = ("prefill", "decode") if args.eval else ("seconds",)
                keys += ("loaded", "memory")
                median = {s: {k: statistics.median(r[k] for r in results[s]) for k in keys} for s in results}
                ratio = {k: median["seal"][k] / median["peft"][k] for k in keys}
                record |= {"median": median, "seal_to_peft": ratio, "attention_share": share}
                for k in keys:
                    unit, digits = (2**30, 2) if k in keys[-2:] else (1, 2 if k == "seconds" else 4)
                    values = (f"{median[s][k] / unit:.{digits}f}" for s in ("seal", "peft"))
                    rows.append([f"{length:,}", NAMES[k], *values, f"{ratio[k]:.2f}"])
            records.append(record)
    print(seal.table(["tokens", "", "seal.py", "transformers" if args.eval else "PEFT", "ratio"], rows))
    if args.json:
        old = json.loads(Path(args.json).read_text()) if Path(args.json).exists() else []
        threads = torch.get_num_threads()
        name = f"CPU, {threads} thread{'s' * (threads > 1)}"
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else name
        versions = {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
        seal.write_json(
            args.json,
            old
            + [
                {"bench": "vs_peft", "date": time.strftime("%Y-%m-%d"), "device": name, "versions": versions, **r}
                for r in records
            ],
        )


if __name__ == "__main__":
    main()
