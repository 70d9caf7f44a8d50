#!/usr/bin/env bash
# Guess: weights that are exact in bf16 and in f16 give the same logits from a bf16 and from
# an f16 file of llama.cpp.
#
# llama.cpp's CPU code multiplies a matrix by activations that it has first rounded to the
# matrix's partner type: f16 for f16, but bf16, with three bits fewer, for bf16. So of two
# files of one size that hold the very same numbers, the bf16 one has about 8 times the error
# in its logits. Most models are published in bf16, and an exporter that keeps their type
# writes bf16: where f16 holds every weight, it is the better file on a CPU. Only an f32 file
# can be held against a float32 reference. The table of partner types is one for all
# processors, with bf16 instructions or without.
#
# cyllama 0.2.18 (llama.cpp in a wheel). Source: vec_dot_type in type_traits_cpu of
# llama.cpp's ggml/src/ggml-cpu/ggml-cpu.c.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
"${PYTHON:-python3}" -m venv venv  # Python 3.10 or 3.11: cyllama 0.2.18 has no other wheels
venv/bin/pip install -q numpy==2.4.6 gguf==0.19.0 cyllama==0.2.18

venv/bin/python - <<'EOF'
from importlib.metadata import version

import gguf
import numpy as np
from cyllama.llama import llama_cpp
from gguf import GGMLQuantizationType

WIDTH, HEADS, BLOCKS, FEED, VOCAB, CONTEXT = 256, 4, 4, 512, 512, 256


def write_model(path, kind):
    """A Llama of random weights that bf16 and f16 both hold exactly, in the type `kind`."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(BLOCKS)
    writer.add_feed_forward_length(FEED)
    writer.add_head_count(HEADS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("no_vocab")
    shapes = {
        "attn_q": (WIDTH, WIDTH), "attn_k": (WIDTH, WIDTH), "attn_v": (WIDTH, WIDTH),
        "attn_output": (WIDTH, WIDTH), "ffn_gate": (FEED, WIDTH), "ffn_up": (FEED, WIDTH),
        "ffn_down": (WIDTH, FEED), "attn_norm": (WIDTH,), "ffn_norm": (WIDTH,),
    }
    tensors = {"token_embd": (VOCAB, WIDTH), "output": (VOCAB, WIDTH), "output_norm": (WIDTH,)}
    for block in range(BLOCKS):
        for name, shape in shapes.items():
            tensors[f"blk.{block}.{name}"] = shape
    random = np.random.default_rng(0)
    for name, shape in tensors.items():
        if "norm" in name:
            writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
            continue
        weight = random.integers(-100, 101, shape).astype(np.float32) / 1024  # 7 bits each
        data = gguf.quantize(weight, kind)
        assert np.array_equal(gguf.dequantize(data, kind), weight)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Model(llama_cpp.LlamaModel):
    n_vocab = VOCAB  # this release asks a model for it without giving it


def logits(path, tokens):
    model = Model(path, llama_cpp.LlamaModelParams())
    settings = llama_cpp.LlamaContextParams()
    settings.n_ctx = CONTEXT
    settings.type_k = settings.type_v = 0  # a cache in f32 and no flash attention: what is
    settings.flash_attn_type = 0           # left is what the matrices do
    context = llama_cpp.LlamaContext(model, settings)
    batch = llama_cpp.LlamaBatch(n_tokens=len(tokens), embd=0, n_seq_max=1)
    for position, token in enumerate(tokens):
        batch.add(token, position, [0], True)
    context.decode(batch)
    return np.array([context.get_logits_ith(i) for i in range(len(tokens))])


print("cyllama", version("cyllama"), "gguf", version("gguf"))
llama_cpp.disable_logging()
tokens = [int(token) for token in np.random.default_rng(1).integers(VOCAB, size=64)]
found = {}
for kind in (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16):
    write_model(f"{kind.name}.gguf", kind)
    found[kind.name] = logits(f"{kind.name}.gguf", tokens)
error = {}
for name in ("F16", "BF16"):
    error[name] = ((found[name] - found["F32"]) ** 2).mean() ** 0.5
    print(f"{name} file: logits are {error[name]:.1e} (rms) from the F32 file's")
ratio = error["BF16"] / error["F16"]
print("bf16 by f16: %.1f; deviation of the logits: %.2f" % (ratio, found["F32"].std()))
assert 4 < ratio < 16
EOF

# Seen:
# cyllama 0.2.18 gguf 0.19.0
# F16 file: logits are 8.0e-04 (rms) from the F32 file's
# BF16 file: logits are 6.3e-03 (rms) from the F32 file's
# bf16 by f16: 7.9; deviation of the logits: 0.90
