"""Random checkpoints of known shapes, to measure speed and memory with.

    python -m extras.shapes 7b --out DIR --dtype bfloat16

An ordinary Hugging Face folder that every command takes, with the toy's tokenizer,
which knows 1,280 of the rows. What it answers is noise; what it costs is what a real
one costs.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

import seal
from extras.folder import new_folder

SHAPES = {  # D, width inside the feed-forward, L, H, G, V, whether the output is tied
    "toy": (256, 512, 4, 8, 8, 1280, True),
    "8x512": (512, 1376, 8, 8, 8, 32000, False),
    "smol": (576, 1536, 30, 9, 3, 49152, True),
    "1b": (2048, 5632, 22, 32, 4, 32000, False),
    "7b": (4096, 11008, 32, 32, 32, 32000, False),
}
NAMES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "vocab_size", "tie_word_embeddings",
)
ABOUT = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
    "max_position_embeddings": 65536, "rope_theta": 1e6, "bos_token_id": 1,
    "eos_token_id": 2,
}


def make(folder: Path, shape: str, dtype: torch.dtype) -> None:
    """Fill an empty folder: a file for each weight, so that memory holds one."""
    about = ABOUT | dict(zip(NAMES, SHAPES[shape])) | {"dtype": str(dtype)[6:]}
    seal.write_json(folder / "config.json", about)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (folder / name).write_bytes((seal.TOY / name).read_bytes())
    with torch.device("meta"):  # shapes without memory
        model = seal.Llama(seal.read_config(folder))
    generator, index = torch.Generator().manual_seed(0), {}
    for number, (name, weight) in enumerate(model.named_parameters()):
        tied = name == "lm_head.weight" and model.config.tie_word_embeddings
        if tied or name.endswith("scale"):
            continue
        tensor = torch.ones(weight.shape)
        if weight.dim() == 2:
            tensor.normal_(std=weight.shape[1] ** -0.5, generator=generator)
        name = name if name == "lm_head.weight" else f"model.{name}"
        index[name] = f"model-{number}.safetensors"
        save_file({name: tensor.to(dtype)}, folder / index[name], {"format": "pt"})
    index = {"metadata": {}, "weight_map": index}
    seal.write_json(folder / "model.safetensors.index.json", index)


def main(arguments=None) -> None:
    parser = seal.Parser("extras.shapes", description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--out", required=True, help="the new folder")
    types = ["float32", "bfloat16", "float16"]
    parser.add_argument("--dtype", choices=types, default="bfloat16")
    args = parser.parse_args(arguments)
    with new_folder(args.out) as folder:
        make(folder, args.shape, getattr(torch, args.dtype))
    print(f"{args.out}: random weights in the shape {args.shape}")


if __name__ == "__main__":
    sys.exit(seal.exit_status("extras.shapes", main))
