"""How far export_gguf.py is from the speed of the disk: export, and copy.

    python -m extras.speed_export                    a random 1.1B Llama, 2.2 GB of bf16
    python -m extras.speed_export --ckpt DIR --outtypes q8_0

Folding multiplies one matrix per layer (paper, section 4), so that an export is reading
and writing. For each output type: the export's seconds, on the clock and of the
processor, its peak memory, the seconds of plainly copying as many bytes as it reads,
and the ratio. Both end on a sync; they take turns, and the best of each is given, as
other work on the machine only adds. The files are in the page cache for both. Some
seconds are the same for any size: imports, and the tokenizer.
"""

import os
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path

import torch
from tabulate import tabulate

import seal
from extras import shapes, speed


def seconds(work, *inputs):
    """(seconds, what it gives)"""
    os.sync()
    start = time.perf_counter()
    result = work(*inputs)
    os.sync()
    return time.perf_counter() - start, result


def export(arguments: list[str]) -> tuple[float, float]:
    """Run export_gguf.py: the processor's seconds and the peak GB of this process."""
    import export_gguf

    with redirect_stdout(sys.stderr):
        export_gguf.main(arguments)
    return time.process_time(), speed.peak_memory("cpu")


def copy(sources: list[Path], target: Path) -> None:
    """Plain reading and writing: `cp` may let two files share their blocks."""
    with open(target, "wb") as out:
        for source in sources:
            with open(source, "rb") as file:
                while block := file.read(2**24):
                    out.write(block)


def main(arguments=None) -> None:
    parser = seal.Parser("extras.speed_export", description=__doc__.splitlines()[0])
    parser.add_argument("--ckpt", help="a Hugging Face folder (default: a random one)")
    parser.add_argument("--outtypes", default="auto,f16,q8_0", help="A,B,C")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tmp", help="where to write; needs room for two copies")
    args = parser.parse_args(arguments)
    rows = []
    with tempfile.TemporaryDirectory(dir=args.tmp) as temporary:
        folder, target = Path(temporary, "1b"), Path(temporary, "out.gguf")
        scales = Path(temporary, "scales.safetensors")
        if args.ckpt:
            folder = Path(args.ckpt)
        else:
            folder.mkdir()
            shapes.make(folder, "1b", torch.bfloat16)
        config = seal.read_config(folder)
        layers, heads = config.num_hidden_layers, config.num_attention_heads
        drawn = torch.rand(layers, heads) + 0.5
        facts = seal.Facts("head", layers, heads, config.head_dim)
        seal.save_scales(scales, list(drawn), facts)
        sources = sorted({file for file, _, _ in seal.Weights(folder).places.values()})
        read = sum(source.stat().st_size for source in sources)
        for outtype in args.outtypes.split(","):
            flags = ["--ckpt", folder, "--scales", scales, "--outfile", target]
            flags = [str(flag) for flag in [*flags, "--outtype", outtype]]
            exports, copies, used = [], [], []
            for _ in range(args.repeats):
                took, result = seconds(speed.in_a_fresh_process, export, flags)
                exports.append(took)
                used.append(result)
                written = target.stat().st_size
                target.unlink()
                copies.append(seconds(copy, sources, target)[0])
                target.unlink()
            rows.append({
                "type": outtype,
                "export s": min(exports),
                "processor s": min(processor for processor, _ in used),
                "peak GB": max(peak for _, peak in used),
                "copy s": min(copies),
                "ratio": min(exports) / min(copies),
                "GB read": read / 2**30,
                "GB written": written / 2**30,
            })
    print(tabulate(rows, headers="keys", floatfmt=".2f"))


if __name__ == "__main__":
    sys.exit(seal.exit_status("extras.speed_export", main))
