"""How far is export_gguf.py from the speed of the disk? Exports a random 1.1B Llama and copies the same bytes.

    python bench/export_speed.py [--dir FOLDER] [--layers 16] [--outtypes auto,f16,q8_0] [--repeats 3]

Makes a bfloat16 checkpoint in four shards in a temporary folder (2.3 GB; as much again for each result), then prints
for each out type the seconds of the export (on the clock, and of processor), its peak memory, the seconds of plainly
copying as many bytes as it reads, and the ratio of the clocks. Both end on a sync. Run it on an idle machine; the
checkpoint is in the page cache for both. Some two seconds are the same for any size: importing torch, and the reading
back of the vocabulary by gguf.
"""

import argparse
import io
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import sentencepiece
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import seal  # noqa: E402

SHARDS = 4


def make_checkpoint(folder: Path, layers: int) -> None:
    """A random Llama with random scales beside it."""
    folder.mkdir()
    config = dict(
        architectures=["LlamaForCausalLM"],
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
    )
    (folder / "config.json").write_text(json.dumps(config))
    config = seal.read_config(folder)
    with torch.device("meta"):
        model = seal.Llama(config)
    names = {name: f"model.{name}".replace("model.lm_head", "lm_head") for name, _ in model.named_parameters()}
    shapes = {names[name]: p.shape for name, p in model.named_parameters() if not name.endswith(".scale")}
    shard = len(shapes) // SHARDS + 1
    files = {name: f"model-{i // shard + 1:05}-of-{SHARDS:05}.safetensors" for i, name in enumerate(shapes)}
    torch.manual_seed(0)
    for file in sorted(set(files.values())):
        here = [name for name in files if files[name] == file]
        save_file({name: torch.randn(shapes[name], dtype=torch.bfloat16) * 0.02 for name in here}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    tokenizer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a line of text to count pairs of letters in"] * 100),
        model_writer=tokenizer,
        model_type="bpe",
        vocab_size=320,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(tokenizer.getvalue())
    scales = [torch.rand(config.channels()) + 0.5 for _ in range(layers)]
    seal.save_scales(folder.parent / "scales.safetensors", scales, config)


def seconds(work) -> float:
    os.sync()
    start = time.perf_counter()
    work()
    os.sync()
    return time.perf_counter() - start


def copy(sources: list[Path], target: Path) -> None:
    """Plain reading and writing; the shortcuts of `cp` (sharing blocks on disk) would not be a fair peer."""
    with open(target, "wb") as out:
        for source in sources:
            with open(source, "rb") as file:
                while block := file.read(16 << 20):
                    out.write(block)


def run(command: list) -> tuple[float, float]:
    """Run a command to its end: its largest resident memory in MB, and the seconds of processor it took."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, process.returncode, usage = os.wait4(process.pid, 0)
    assert process.returncode == 0, "the export failed"
    return usage.ru_maxrss / 1024, usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", help="where to put the temporary folder (default: the system's)")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--outtypes", default="auto,f16,q8_0")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.dir) as temporary:
        folder, target = Path(temporary) / "llama", Path(temporary) / "out.gguf"
        # In a process of its own: a child's peak memory counts what its parent held when it was started.
        maker = multiprocessing.get_context("spawn").Process(target=make_checkpoint, args=(folder, args.layers))
        maker.start()
        maker.join()
        shards = sorted(folder.glob("*.safetensors"))
        size = sum(f.stat().st_size for f in shards)
        print(f"{size / 2e9:.2f}B parameters, {size / 1e9:.2f} GB in {len(shards)} shards, {os.cpu_count()} cores")
        print(f"{'out type':10}{'export s':>10}{'CPU s':>8}{'peak MB':>10}{'copy s':>10}{'ratio':>8}{'out GB':>8}")
        for outtype in args.outtypes.split(","):
            command = [sys.executable, ROOT / "export_gguf.py", "--ckpt", folder, "--outtype", outtype]
            command += ["--outfile", target, "--scales", folder.parent / "scales.safetensors"]
            exporting, copying, usage = [], [], []
            for _ in range(args.repeats):  # in turns; the best of each, as other work on the machine only adds
                exporting.append(seconds(lambda: usage.append(run(command))))
                written = target.stat().st_size
                target.unlink()
                copying.append(seconds(lambda: copy(shards, target)))
                target.unlink()
            best, plain = min(exporting), min(copying)
            peak, processor = max(usage)[0], min(u[1] for u in usage)
            times = f"{best:10.1f}{processor:8.1f}{peak:10.0f}{plain:10.1f}{best / plain:8.2f}"
            print(f"{outtype:10}{times}{written / 1e9:8.2f}", flush=True)


if __name__ == "__main__":
    main()
