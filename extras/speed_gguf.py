"""--ckpt FILE.gguf beside the folder that extras.convert makes of it: time and memory.

    python -m extras.speed_gguf FILE.gguf --ckpt FOLDER --json extras/speed_gguf.json
    python -m extras.speed_gguf --parts big,count --threads 2 --tmp /tmp

  equal    scales after five steps from the file, against those from the folder
  memory   what a process holds after loading, and at most during a step
  seconds  a step; the sides take turns step by step, and a ratio is that of a turn
  big      a step of a 7B (random blocks in the types of Q4_K_M, written to --tmp), beside
           transformers + peft, which reads the same file into bfloat16
  count    memory of the 7B at 31,000 tokens by counting tensors that hold nothing, and
           SmolLM2's beside its real peak, to show what such a count is worth

Each side is a process of its own, which has opened the toy before: what is imported does
not count. Memory is told in two parts. Anonymous memory is the process's own; the rest
are pages of the file, which the machine can drop and read again. The prompts of `equal`
and `big` are those of --task lines; elsewhere tokens are random. GB are 2^30 bytes.

`count` runs a step on fake tensors and adds up the bytes of all storages that live at the
same time. What a GPU's kernels take for themselves is not in it: flash attention sums the
queries' gradient in float32, half a GB for the 7B at 31,000 tokens.
"""

import gc
import json
import multiprocessing
import os
import platform
import re
import resource
import signal
import statistics
import sys
import tempfile
import threading
import time
import weakref
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib.metadata import version
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

import export_gguf
import seal
from extras import gguf_model, shapes, speed
from extras.gguf_file import File

GB = 2**30
ROOM = 20 * GB  # what transformers + peft may take, and what must be free for it
PATIENCE = 600  # seconds that it may take

# --------------------------------------------------------------------------------------
# What a process of one side does
# --------------------------------------------------------------------------------------

opened = {}  # by a process: its model and its tokenizer


def prepare(threads: int) -> None:
    """Import what either side needs, and be one of two."""
    torch.set_num_threads(threads)
    seal.open_checkpoint(seal.Flags())  # the toy: some modules are imported late
    gc.collect()


def load(ckpt) -> None:
    opened["model"], opened["tokenizer"], _ = seal.open_checkpoint(seal.Flags(ckpt=str(ckpt)))


def train(length: int, steps: int) -> tuple[float, list[float], Tensor]:
    """Seconds a step, the losses, and the scales (L, H * d), as the command trains them."""
    model, tokenizer = opened["model"], opened["tokenizer"]
    samples = seal.make_samples("lines", tokenizer, length, steps, "train")
    model.reset_scales("channel")
    lr = seal.paper_lr("lines", "channel", model.config.num_hidden_layers)
    pairs = [tokenizer.pair(sample) for sample in samples]
    start = time.perf_counter()
    losses = seal.train(model, pairs, lr)
    seconds = (time.perf_counter() - start) / steps
    return seconds, losses, torch.stack(model.scales()).detach()


def random_pair(config: seal.Config, length: int) -> tuple[list[int], list[int]]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(config.vocab_size, (length,), generator=generator).tolist()
    return ids[: -speed.ANSWER], ids[-speed.ANSWER :]


def step(length: int) -> dict:
    """One step on random tokens: seconds on the clock, and of the processor."""
    model = opened["model"]
    model.reset_scales("channel")
    pair = random_pair(model.config, length)
    start, used = time.perf_counter(), time.process_time()
    seal.backward(model, pair)
    return {
        "seconds": time.perf_counter() - start,
        "processor seconds": time.process_time() - used,
    }


class Peft(speed.Peft):
    """transformers + peft from a GGUF file, in bfloat16."""

    def __init__(self, path: Path):
        import peft
        import transformers

        reader = transformers.AutoModelForCausalLM
        model = reader.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.bfloat16)
        ia3 = peft.IA3Config(target_modules=["o_proj"], feedforward_modules=["o_proj"])
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
        self.model = peft.get_peft_model(model, ia3)
        self.model.config.use_cache = False
        self.model.train()


def peft_step(path: Path, length: int) -> dict:
    """Load and make a step, within limits that leave the machine alive."""
    resource.setrlimit(resource.RLIMIT_DATA, (ROOM, ROOM))
    Path("/proc/self/oom_score_adj").write_text("1000")
    signal.alarm(PATIENCE)
    start = time.perf_counter()
    side = Peft(path)
    loaded = time.perf_counter()
    loss, _ = side.step(*random_pair(side.model.config, length))
    seconds = time.perf_counter() - loaded
    return {"loss": loss, "seconds to load": loaded - start, "seconds a step": seconds}


# --------------------------------------------------------------------------------------
# Processes, and their memory as the kernel counts it
# --------------------------------------------------------------------------------------


@contextmanager
def process(threads: int):
    """A function that runs others in one fresh process, and the process's id."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:

        def run(function, *inputs):
            return pool.submit(function, *inputs).result()

        run(prepare, threads)
        yield run, run(os.getpid)


def memory(pid: int) -> dict:
    """GB that a process holds: all of it, the anonymous part, and the most so far."""
    status = Path(f"/proc/{pid}/status").read_text()
    names = {"GB": "VmRSS", "GB anonymous": "RssAnon", "GB at the peak": "VmHWM"}
    found = {}
    for name, key in names.items():
        found[name] = int(re.search(rf"{key}:\s+(\d+)", status)[1]) / 2**20
    return found


class Watch:
    """The most memory that a process holds while this is open; asked 200 times a second."""

    def __init__(self, pid: int):
        self.pid, self.over, self.peak = pid, threading.Event(), {}
        self.thread = threading.Thread(target=self.look)

    def look(self) -> None:
        while not self.over.wait(0.005):
            try:
                now = memory(self.pid)
            except (OSError, TypeError):  # it has ended
                return
            for name in ("GB", "GB anonymous"):
                self.peak[name] = max(self.peak.get(name, 0), now[name])

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        self.thread.join()


# --------------------------------------------------------------------------------------
# A random 7B, and counting
# --------------------------------------------------------------------------------------


def blocks(kind: GGMLQuantizationType, shape, generator, rows: slice) -> np.ndarray:
    """Random bytes of some rows, with scales that make values of about D^-.5."""
    count = len(range(*rows.indices(shape[0])))
    block, size = gguf.GGML_QUANT_SIZES[kind]
    if kind == GGMLQuantizationType.F32:
        return np.ones((count, *shape[1:]), np.float32)
    data = generator.integers(0, 256, (count, shape[1] // block, size), np.uint8)
    if kind == GGMLQuantizationType.Q4_K:  # scale * (0 to 945) - minimum * (0 to 63)
        data[:, :, :4] = np.array([6e-5, 4.5e-4], np.float16).view(np.uint8)
    else:  # Q6_K: scale * (-128 to 127) * (-32 to 31)
        data[:, :, -2:] = np.array([1.1e-5], np.float16).view(np.uint8)
    return data


def write_7b(path: Path) -> None:
    """Blocks in the types that llama.cpp's Q4_K_M gives to a 7B, with the toy's tokens."""
    values = dict(zip(shapes.NAMES, shapes.SHAPES["7b"])) | {"context": 32768}
    config = seal.Config(**values, head_dim=128)
    tokenizer = seal.Tokenizer(seal.TOY, config)
    keys = {"general.architecture": "llama", "llama.rope.freq_base": 1e6}
    for key, size in export_gguf.SIZES.items():
        keys[f"llama.{key}"] = getattr(config, size)
    keys |= export_gguf.vocabulary(tokenizer) | export_gguf.templates(tokenizer)
    entries = [export_gguf.entry(key, value) for key, value in keys.items()]
    with torch.device("meta"):  # shapes without memory
        model = seal.Llama(config)
    layers, tensors = config.num_hidden_layers, []
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    for name, weight in model.named_parameters():
        if name.endswith(".scale"):
            continue
        stored = names.get_name(name if name.startswith("lm_head") else f"model.{name}", (".weight",))
        kind = type_of(stored, len(weight.shape), layers)
        shape, generator = tuple(weight.shape), np.random.default_rng(len(tensors))
        rows = partial(blocks, kind, shape, generator)
        tensors.append(export_gguf.Stored(stored, shape, kind, rows))
    export_gguf.write(path, entries, tensors)


def type_of(name: str, dimensions: int, layers: int) -> GGMLQuantizationType:
    """As Q4_K_M has it: more bits at the output, and in half of the layers for v and down."""
    layer, part = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", name).groups("0")
    if dimensions == 1:
        return GGMLQuantizationType.F32
    i, eighth = int(layer), layers // 8
    more = i < eighth or i >= 7 * eighth or (i - eighth) % 3 == 2
    if part == "output" or (part in ("attn_v", "ffn_down") and more):
        return GGMLQuantizationType.Q6_K
    return GGMLQuantizationType.Q4_K


class Counter(TorchDispatchMode):
    """Adds up the bytes of all storages that operations make, as long as they live."""

    def __init__(self):
        super().__init__()
        self.known, self.live, self.peak, self.paused = {}, 0, 0, False

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self.known or self.paused:
            return
        size = self.known[storage._cdata] = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self.drop, storage._cdata)

    def drop(self, key: int) -> None:
        self.live -= self.known.pop(key)

    def __torch_dispatch__(self, function, types, inputs=(), options=None):
        result = function(*inputs, **(options or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.add(tensor)
        return result

    def to_host(self, tensor: Tensor) -> Tensor:
        """What --offload does with a tensor that is saved: a copy that is not counted."""
        self.paused = True
        copy = tensor.clone()
        self.paused = False
        return copy


def counted(path: Path, length: int, dtype: str, offload: bool) -> dict:
    """GB of a step's tensors: the packed matrices, and the most at a time."""
    file = File(path)
    model = gguf_model.load_packed(file, None, file.config, "cpu", getattr(torch, dtype))
    keep = nullcontext()
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, Counter() as counter:
        for module in model.modules():
            if isinstance(module, gguf_model.Packed):
                module.data = fake.from_tensor(module.data)
                counter.add(module.data)
        packed = counter.live
        model.reset_scales("channel")
        if offload:
            keep = saved_tensors_hooks(counter.to_host, Tensor.clone)
        with keep:
            seal.backward(model, random_pair(file.config, length))
    return {"GB of packed matrices": packed / GB, "GB at the peak": counter.peak / GB}


# --------------------------------------------------------------------------------------
# The parts
# --------------------------------------------------------------------------------------


def equal(args) -> dict:
    """The scales of both sides after five steps at 700 tokens."""
    scales, found = {}, {}
    for side, ckpt in args.sides.items():
        with process(args.threads) as (run, _):
            run(load, ckpt)
            _, found[f"losses from the {side}"], scales[side] = run(train, 700, 5)
    found["largest move from 1"] = (scales["folder"] - 1).abs().max().item()
    gap = (scales["file"] - scales["folder"]).abs().max().item()
    return found | {"largest difference": gap}


def held(args) -> dict:
    """The memory of both sides, in GB."""
    found = {}
    for side, ckpt in args.sides.items():
        with process(args.threads) as (run, pid):
            idle = memory(pid)
            run(load, ckpt)
            loaded = memory(pid)
            found[side] = {"idle": idle, "loaded": loaded, "loaded above idle": {}}
            for name in idle:
                found[side]["loaded above idle"][name] = loaded[name] - idle[name]
            for length in args.lengths:
                with Watch(pid) as watch:
                    run(step, length)
                found[side][f"peak of a step at {length}"] = watch.peak
    return found


def seconds(args) -> dict:
    """A step's seconds, by length: both sides in turns, and the ratio of each turn."""
    found = {}
    with process(args.threads) as (first, _), process(args.threads) as (second, _):
        sides = dict(zip(args.sides, (first, second)))
        for side, run in sides.items():
            run(load, args.sides[side])
        for length in args.lengths:
            turns = []
            for turn in range(args.turns + 1):
                times = {side: run(step, length) for side, run in sides.items()}
                seal.note(f"{length:,} tokens, turn {turn}: {times}")
                turns.append(times)
            turns = turns[1:]  # the first warms up
            found[str(length)] = {"turns": turns}
            for name in ("seconds", "processor seconds"):
                ratios = [t["file"][name] / t["folder"][name] for t in turns]
                found[str(length)][f"ratio of {name}"] = statistics.median(ratios)
    return found


def big(args) -> dict:
    """A step of the 7B at 512 tokens, and transformers + peft beside it."""
    found = {}
    with tempfile.TemporaryDirectory(dir=args.tmp) as folder:
        path = Path(folder, "7b.Q4_K_M.gguf")
        write_7b(path)
        found["GB of the file"] = path.stat().st_size / GB
        with process(args.threads) as (run, pid), Watch(pid) as watch:
            run(load, path)
            took, losses, _ = run(train, 512, 1)
        found["file"] = {"seconds a step": took, "loss": losses[0]} | watch.peak
        seal.note(f"{found}")
        free = int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1])
        if free * 1024 < ROOM:
            return found | {"peft": "not tried: too little memory is free"}
        start = time.perf_counter()
        with process(args.threads) as (run, pid), Watch(pid) as watch:
            try:
                result = run(peft_step, path, 512)
            except Exception as error:  # of whatever kind: it is what is recorded
                result = {"failure": f"{type(error).__name__}: {error}"[:300]}
        result["seconds in all"] = time.perf_counter() - start
        found["peft"] = result | watch.peak
    return found


def count(args) -> dict:
    """The 7B at 31,000 tokens in bfloat16; the file at hand beside its real peak."""
    found = {}
    with tempfile.TemporaryDirectory(dir=args.tmp) as folder:
        path = Path(folder, "7b.Q4_K_M.gguf")
        write_7b(path)
        for name, offload in (("7B", False), ("7B, --offload", True)):
            found[name] = counted(path, 31000, "bfloat16", offload)
            seal.note(f"{name}: {found[name]}")
    with process(args.threads) as (run, pid):
        run(load, args.file)
        for length in args.lengths:
            before = memory(pid)["GB anonymous"]
            with Watch(pid) as watch:
                run(step, length)
            result = counted(args.file, length, "float32", False)
            result["real anonymous GB above loaded"] = watch.peak["GB anonymous"] - before
            found[f"{Path(args.file).name}, {length}"] = result
    return found


PARTS = {"equal": equal, "memory": held, "seconds": seconds, "big": big, "count": count}


def main(arguments=None) -> None:
    parser = seal.Parser("extras.speed_gguf", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("file", help="a GGUF file")
    add("--ckpt", required=True, help="the folder that extras.convert makes of it")
    add("--parts", default="equal,memory,seconds", help=",".join(PARTS))
    add("--lengths", type=seal.wholes, default=[700, 2000], help="A,B,C tokens")
    add("--turns", type=int, default=5, help="of `seconds`")
    add("--threads", type=int, default=1)
    add("--tmp", help="where the 7B is written, 4 GB")
    add("--json", help="a file for the records, which keeps those of other parts")
    args = parser.parse_args(arguments)
    parts = args.parts.split(",")
    if not set(parts) <= set(PARTS) or min(args.turns, args.threads) < 1:
        raise seal.UserError(f"--parts: of {', '.join(PARTS)}; --turns, --threads: 1 or more")
    if min(args.lengths) <= speed.ANSWER:
        raise seal.UserError(f"--lengths: above {speed.ANSWER}")
    args.sides = {"file": args.file, "folder": args.ckpt}
    about = {"machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"}
    for package in ("torch", "transformers", "peft", "gguf"):
        about[package] = version(package)
    about["threads"] = args.threads
    for part in parts:
        record = {"date": time.strftime("%Y-%m-%d %H:%M")} | about | PARTS[part](args)
        print(part, json.dumps(record, indent=2))
        if args.json:
            seal.write_json(args.json, seal.read_json(args.json) | {part: record})


if __name__ == "__main__":
    sys.exit(seal.exit_status("extras.speed_gguf", main))
