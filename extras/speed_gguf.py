"""--ckpt FILE.gguf beside the folder that extras.convert makes of it: time and memory.

    python -m extras.speed_gguf FILE.gguf --ckpt FOLDER --json extras/speed_gguf.json
    python -m extras.speed_gguf FILE.gguf --ckpt FOLDER --parts big,count

  equal  scales after five steps from the file, against those from the folder
  step   memory after loading, above that of a process which has opened the toy; then the
         seconds and the memory of a step, the sides in turns, and ratios turn by turn
  big    a step of a 7B, random blocks in the types of Q4_K_M; beside it transformers +
         peft, which reads the same file into bfloat16
  count  memory of the 7B at 31,000 tokens, by counting tensors that hold nothing, and the
         file's beside its real peak, to show what such a count is worth

GB are 2^30 bytes. Anonymous ones are a process's own; the others are pages of files,
which the machine can drop and read again. A count adds up the storages that live at once,
but not what kernels take for themselves: on a GPU, flash attention sums the gradient of
the queries in float32, half a GB for the 7B at 31,000 tokens.
"""

import multiprocessing
import os
import re
import resource
import signal
import statistics
import sys
import tempfile
import time
import weakref
from concurrent.futures import ProcessPoolExecutor, wait
from contextlib import nullcontext
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

import export_gguf
import seal
from extras import gguf_model, shapes, speed
from extras.gguf_file import File

LENGTHS = 700, 2000  # tokens
TURNS = 4  # the first warms up
MEMORY = {"VmRSS": "GB", "RssAnon": "GB anonymous"}  # in /proc, and here
opened = {}  # a process's model


def prepare(threads: int) -> int:
    torch.set_num_threads(threads)
    seal.open_checkpoint(seal.Flags())  # the toy: some modules are imported late
    return os.getpid()


def load(ckpt) -> None:
    opened["model"], *_ = seal.open_checkpoint(seal.Flags(ckpt=str(ckpt)))


def random_record(length: int, vocabulary: int) -> list[tuple]:
    ids = torch.randint(vocabulary, (length,), generator=torch.manual_seed(1)).tolist()
    return [(ids[: -speed.ANSWER], ids[-speed.ANSWER :])]


def step(length: int) -> dict:
    """A step on random tokens: the loss, seconds by the clock, and of the processor."""
    model = opened["model"]
    model.reset_scales("channel")
    start, used = time.perf_counter(), time.process_time()
    loss = seal.backward(model, random_record(length, model.config.vocab_size)).item()
    took = time.perf_counter() - start
    return {"loss": loss, "s": took, "processor s": time.process_time() - used}


def peft_step(path: Path, length: int) -> dict:
    """Load and make a step in 20 GB and ten minutes: the machine is to live."""
    from transformers import AutoModelForCausalLM as reader

    resource.setrlimit(resource.RLIMIT_DATA, (20 * 2**30, 20 * 2**30))
    Path("/proc/self/oom_score_adj").write_text("1000")  # the first to be ended
    signal.alarm(600)
    reader.from_pretrained = partial(reader.from_pretrained, gguf_file=path.name)
    side = speed.Peft(path.parent, SimpleNamespace(dtype="bfloat16", device="cpu", what="train"))
    start = time.perf_counter()
    loss, _ = side.step(*random_record(length, side.model.config.vocab_size)[0])
    return {"loss": loss, "s": time.perf_counter() - start}


class Process(ProcessPoolExecutor):
    """A fresh process that runs functions, and whose memory is watched meanwhile."""

    def __init__(self, threads: int):
        super().__init__(1, multiprocessing.get_context("spawn"))
        self.status = Path(f"/proc/{self.submit(prepare, threads).result()}/status")

    def memory(self) -> dict[str, float]:
        """GB that it holds; nothing if it has ended."""
        found = re.findall(r"(VmRSS|RssAnon):\s+(\d+)", self.status.read_text())
        return {MEMORY[name]: int(size) / 2**20 for name, size in found}

    def run(self, function, *inputs):
        """What the function gives. peak: the most memory, asked 100 times a second."""
        future, self.peak = self.submit(function, *inputs), self.memory()
        while not wait([future], 0.01).done:
            for name, size in self.memory().items():
                self.peak[name] = max(self.peak[name], size)
        return future.result()


def write_7b(path: Path) -> None:
    """Random blocks, and the toy's tokens."""
    sizes = dict(zip(shapes.NAMES, shapes.SHAPES["7b"]))
    config = seal.Config(**sizes, head_dim=128, context=32768)
    keys = {"general.architecture": "llama", "llama.rope.freq_base": 1e6}
    for key, size in export_gguf.SIZES.items():
        keys[f"llama.{key}"] = getattr(config, size)
    keys |= export_gguf.vocabulary(seal.Tokenizer(seal.TOY, config))
    entries = [export_gguf.entry(key, value) for key, value in keys.items()]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    tensors = []
    with torch.device("meta"):  # shapes without memory
        model = seal.Llama(config)
    for name, weight in model.named_parameters():
        if not name.endswith("scale"):
            name = names.get_name(f"model.{name}", (".weight",)) or "output.weight"
            kind, shape = type_of(name), tuple(weight.shape)
            rows = partial(blocks, kind, shape, np.random.default_rng(len(tensors)))
            tensors.append(export_gguf.Stored(name, shape, kind, rows))
    export_gguf.write(path, entries, tensors)


def type_of(name: str) -> GGMLQuantizationType:
    """Q4_K_M's: more bits for the output, and for v and down in 16 of 32 layers."""
    layer = int(re.sub(r"\D", "", name) or 0)
    more = layer < 4 or layer >= 28 or layer % 3 == 0
    if "norm" in name:
        return GGMLQuantizationType.F32
    if name == "output.weight" or more and re.search("attn_v|ffn_down", name):
        return GGMLQuantizationType.Q6_K
    return GGMLQuantizationType.Q4_K


def blocks(kind: GGMLQuantizationType, shape, generator, rows: slice) -> np.ndarray:
    """The bytes of some rows, with scales that make values of about .016, D^-.5."""
    count = len(range(*rows.indices(shape[0])))
    if kind == GGMLQuantizationType.F32:
        return np.ones(count, np.float32)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    data = generator.integers(0, 256, (count, shape[1] // block, size), np.uint8)
    if kind == GGMLQuantizationType.Q4_K:  # scale * (0 to 945) - minimum * (0 to 63)
        data[:, :, :4] = np.array([6e-5, 4.5e-4], np.float16).view(np.uint8)
    else:  # Q6_K: scale * (-128 to 127) * (-32 to 31)
        data[:, :, -2:] = np.array([1.1e-5], np.float16).view(np.uint8)
    return data


class Counter(TorchDispatchMode):
    """Adds up the bytes of all storages that operations make, as long as they live."""

    def __init__(self):
        super().__init__()
        self.live, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, inputs=(), options=None):
        result = function(*inputs, **(options or {}))
        for leaf in torch.utils._pytree.tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf.untyped_storage())
        return result

    def add(self, storage) -> None:
        key = storage._cdata
        if key not in self.live:
            self.live[key] = storage.nbytes()
            weakref.finalize(storage, self.live.pop, key)
            self.peak = max(self.peak, sum(self.live.values()))


def counted(path: Path, length: int, dtype: torch.dtype, keep=nullcontext()) -> dict:
    """GB of a step's tensors: the packed matrices, and the most at a time."""
    file = File(path)
    model = gguf_model.load_packed(file, None, file.config, "cpu", dtype)
    record = random_record(length, file.config.vocab_size)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, Counter() as counter:
        for module in model.modules():
            if isinstance(module, gguf_model.Packed):
                module.data = fake.from_tensor(module.data)
                counter.add(module.data.untyped_storage())
        packed = counter.peak
        model.reset_scales("channel")
        with keep:
            seal.backward(model, record)
    return {"GB of the file": packed / 2**30, "GB at the peak": counter.peak / 2**30}


def equal(args) -> dict:
    scales, flags = [], "--mode channel --length 700 --samples 5 --out".split()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "scales.safetensors")
        for ckpt in (args.file, args.ckpt):
            with Process(args.threads) as process:
                process.run(seal.main, ["train", "--ckpt", ckpt, *flags, str(out)])
            scales.append(torch.cat(list(load_file(out).values())))
    gap, moved = (scales[0] - scales[1]).abs(), (scales[1] - 1).abs()
    return {"largest difference": gap.max().item(), "largest move": moved.max().item()}


def steps(args) -> dict:
    found = {}
    with Process(args.threads) as file, Process(args.threads) as folder:
        sides = {"file": (file, args.file), "folder": (folder, args.ckpt)}
        for side, (process, ckpt) in sides.items():
            idle = process.memory()
            process.run(load, ckpt)
            now = process.memory()
            found[f"{side} loaded"] = {name: now[name] - idle[name] for name in idle}
        for length in LENGTHS:
            turns = found[f"turns at {length}"] = []
            for _ in range(TURNS):
                turns.append({})
                for side, (process, _) in sides.items():
                    turns[-1][side] = process.run(step, length) | process.peak
            for name in ("s", "processor s"):
                ratios = [turn["file"][name] / turn["folder"][name] for turn in turns[1:]]
                found[f"ratio of {name} at {length}"] = statistics.median(ratios)
    return found


def big(args) -> dict:
    with Process(args.threads) as process:
        process.run(load, args.big)
        found = {"file": process.run(step, 512) | process.peak}
    with Process(args.threads) as process:
        start = time.perf_counter()
        try:
            result = process.run(peft_step, args.big, 512)
        except Exception as error:  # of whatever kind: it is what is recorded
            result = {"failure": f"{type(error).__name__}: {error}"[:300]}
        result["s in all"] = time.perf_counter() - start
    return found | {"transformers + peft": result | process.peak}


def count(args) -> dict:
    found = {"7B": counted(args.big, 31000, torch.bfloat16)}
    # A tensor that is saved leaves the device, and another one comes back.
    offload = saved_tensors_hooks(
        lambda x: (x.shape, x.dtype), lambda about: torch.empty(about[0], dtype=about[1])
    )
    found["7B, --offload"] = counted(args.big, 31000, torch.bfloat16, offload)
    # Or malloc keeps what was freed, for later: then more is held than tensors need.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    with Process(args.threads) as process:
        process.run(load, args.file)
        for length in LENGTHS:
            before = process.memory()["GB anonymous"]
            process.run(step, length)
            result = counted(args.file, length, torch.float32)
            result["real GB, anonymous"] = process.peak["GB anonymous"] - before
            found[f"the file, {length}"] = result
    return found


PARTS = {"equal": equal, "step": steps, "big": big, "count": count}


def main(arguments=None) -> None:
    parser = seal.Parser("extras.speed_gguf", description=__doc__.splitlines()[0])
    parser.add_argument("file", help="a GGUF file")
    parser.add_argument("--ckpt", required=True, help="the folder that is made of it")
    parser.add_argument("--parts", default="equal,step", help=",".join(PARTS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--big", type=Path, default="7b.gguf", help="4 GB, made if missing")
    parser.add_argument("--json", help="a file for the records, by part")
    args = parser.parse_args(arguments)
    machine = {"threads": args.threads, "cores": os.cpu_count()}
    machine["processor"] = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())[1]
    for package in ("torch", "transformers", "peft", "gguf"):
        machine[package] = version(package)
    parts = args.parts.split(",")
    if not set(parts) <= set(PARTS) or args.threads < 1:
        raise seal.UserError(f"--parts: of {', '.join(PARTS)}; --threads: 1 or more")
    seal.check_place(args.json or __file__)  # before the work
    if not args.big.exists() and {"big", "count"} & set(parts):
        write_7b(args.big)
    for part in parts:
        record = {"date": time.strftime("%Y-%m-%d")} | machine | PARTS[part](args)
        print(f"{part}: {record}")
        if args.json:
            seal.write_json(args.json, seal.read_json(args.json) | {part: record})


if __name__ == "__main__":
    sys.exit(seal.exit_status("extras.speed_gguf", main))
