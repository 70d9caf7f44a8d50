"""The same training by seal.py and by transformers + PEFT, side by side.

PEFT's IA3 on o_proj's input is exactly SEAL-C: one number per input channel of o_proj. Both sides get the same random
checkpoint, the same prompt and answer, sdpa attention, and gradient checkpointing; PEFT's logits are limited to the
answer. First the script asserts that loss and scale gradients agree, then it times both: a fresh process for each
run, in turn, several pairs, and prints the ratio of medians of seconds per step and of peak memory.

    python bench/vs_peft.py                                                   small shape, 2K tokens, CPU: two minutes
    python bench/vs_peft.py --shape 7b --lengths 4096,8192,16384,31000 --dtype bfloat16 --offload --json bench/results.json

The second is for a GPU; it needs disk for the random checkpoint (13.5 GB) in the temporary folder (--tmp).
"""

import argparse
import json
import math
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


def open_seal(folder, device, dtype, offload):
    """A function that runs forward and backward on (prompt, answer) and returns (loss, gradients by layer)."""
    model = seal.load_model(folder, seal.read_config(folder), device, dtype)
    model.reset_scales("channel")
    model.offload = offload

    def step(prompt, answer):
        for scale in model.scales():
            scale.grad = None
        loss, _ = seal.answer_loss(model, prompt, answer)
        loss.backward()
        return loss.item(), [s.grad for s in model.scales()]

    return step


def open_peft(folder, device, dtype, offload):
    """The same with transformers and PEFT."""
    import peft
    import transformers

    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").to(
        device
    )
    model = peft.get_peft_model(
        model, peft.IA3Config(target_modules=["o_proj"], feedforward_modules=["o_proj"], task_type="CAUSAL_LM")
    )
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    model.config.use_cache = False
    model.train()
    scales = [p for n, p in model.named_parameters() if p.requires_grad]

    def step(prompt, answer):
        for scale in scales:
            scale.grad = None
        ids = torch.tensor([prompt + answer[:-1]], device=device)
        logits = model(input_ids=ids, logits_to_keep=len(answer)).logits[0].float()
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(answer, device=device))
        loss.backward()
        return loss.item(), [s.grad.flatten() for s in scales]

    return step


def worker(args) -> None:
    """One side, in this process: prints loss, a gradient sample, seconds per step and peak memory as JSON."""
    device, dtype = seal.pick_device(args.device), seal.DTYPES[args.dtype]
    length = int(args.lengths)
    ids = torch.randint(
        SHAPES[args.shape]["vocab_size"], (length,), generator=torch.Generator().manual_seed(1)
    ).tolist()
    step = (open_seal if args.worker == "seal" else open_peft)(args.folder, device, dtype, args.offload)
    seconds = []
    for _ in range(args.steps + 1):  # the first warms up
        start = seal.clock(device)
        loss, gradients = step(ids[:-ANSWER], ids[-ANSWER:])
        seconds.append(seal.clock(device) - start)
    flat = torch.cat([g.float().cpu() for g in gradients])
    torch.save(flat, args.gradients)
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_rss()
    print(json.dumps({"loss": loss, "seconds": statistics.median(seconds[1:]), "memory": memory}))


def peak_rss() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run(side: str, length: int, folder: Path, args) -> tuple[dict, torch.Tensor]:
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
    ] + (["--offload"] if args.offload and side == "seal" else [])
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        message = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"error": message}, None
    return json.loads(done.stdout.strip().splitlines()[-1]), torch.load(gradients)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="small", choices=SHAPES)
    parser.add_argument("--lengths", default="2048", help="tokens, with commas between")
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
                gradients = {}
                for side in ("seal", "peft") if pair % 2 else ("peft", "seal"):
                    result, gradients[side] = run(side, length, folder, args)
                    results[side].append(result)
                    print(f"{length} tokens, pair {pair + 1}, {side}: {result}", file=sys.stderr)
                if pair == 0 and None not in gradients.values():
                    a, b = gradients["seal"], gradients["peft"]
                    error = ((a - b).norm() / b.norm()).item()
                    gap = abs(results["seal"][0]["loss"] - results["peft"][0]["loss"])
                    bound = 1e-3 if args.dtype == "float32" else 0.1  # bf16 has 8 bits, and both round differently
                    assert gap < bound and error < bound, (
                        f"not the same work: loss differs by {gap}, gradients by {error:.1%}"
                    )
                    print(
                        f"{length} tokens: losses differ by {gap:.1e}, scale gradients by {error:.1e} of their norm",
                        file=sys.stderr,
                    )
            record = {
                "shape": args.shape,
                "length": length,
                "dtype": args.dtype,
                "offload": args.offload,
                "pairs": args.pairs,
                "runs": results,
            }
            if not any("error" in r for side in results.values() for r in side):
                median = {
                    side: {k: statistics.median(r[k] for r in runs) for k in ("seconds", "memory")}
                    for side, runs in results.items()
                }
                record |= {
                    "median": median,
                    "speedup": median["peft"]["seconds"] / median["seal"]["seconds"],
                    "memory_ratio": median["seal"]["memory"] / median["peft"]["memory"],
                }
                rows.append(
                    [
                        f"{length:,}",
                        *(f"{median[s]['seconds']:.2f}" for s in ("seal", "peft")),
                        f"{record['speedup']:.2f}",
                        *(f"{median[s]['memory'] / 2**30:.2f}" for s in ("seal", "peft")),
                        f"{record['memory_ratio']:.2f}",
                    ]
                )
            records.append(record)
    print(seal.table(["tokens", "seal s/step", "PEFT s/step", "times as fast", "seal GB", "PEFT GB", "ratio"], rows))
    if args.json:
        old = json.loads(Path(args.json).read_text()) if Path(args.json).exists() else []
        name = (
            torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
        )
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
