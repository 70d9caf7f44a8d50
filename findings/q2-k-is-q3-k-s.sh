#!/usr/bin/env bash
# Guess: Q2_K makes a smaller file than Q3_K_S, and Q4_K_M one about as large as Q4_1.
#
# Blocks of k-quants are 256 weights of one row. Where a row is not a multiple of that,
# llama.cpp's quantiser takes another type in its place: q4_0 for q2_k and q3_k, q5_0 for
# q4_k, q5_1 for q5_k, q8_0 for q6_k. In a model as wide as SmolLM2-135M (576) or
# Qwen2.5-0.5B (896) that is every matrix but ffn_down. So at 576 Q2_K and Q3_K_S hold the
# same tensors to the last byte, over 4 bits a weight, though general.file_type says
# otherwise; at 896, where seven heads share a key, Q2_K is the larger of the two; and Q4_K_M
# is larger than Q4_1. Only the log tells. Whoever folds scales into a small model and
# compares "2 bits" with "3 bits" has compared a file with itself; look at the type of
# attn_output.weight, where the scales went.
#
# cyllama 0.2.18 (llama.cpp in a wheel). Source: the fallback types in llama.cpp's
# src/llama-quant.cpp.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
"${PYTHON:-python3}" -m venv venv  # Python 3.10 or 3.11: cyllama 0.2.18 has no other wheels
venv/bin/pip install -q numpy==2.4.6 gguf==0.19.0 cyllama==0.2.18

venv/bin/python - <<'EOF'
from collections import Counter
from importlib.metadata import version

import gguf
import numpy as np
from cyllama.llama import llama_cpp

BLOCKS, FEED, HEAD, VOCAB = 4, 1536, 64, 512
MODELS = {576: 3, 896: 2, 768: 4}  # width: heads for keys; the last is a multiple of 256
FILE_TYPES = {"Q4_1": 3, "Q2_K": 10, "Q3_K_S": 11, "Q4_K_M": 15}  # llama.h: LLAMA_FTYPE_...


def write_model(path, width, kv_heads):
    """A Llama of random weights, without a tokenizer."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(width)
    writer.add_block_count(BLOCKS)
    writer.add_feed_forward_length(FEED)
    writer.add_head_count(width // HEAD)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(HEAD)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("no_vocab")
    keys = HEAD * kv_heads
    shapes = {
        "attn_q": (width, width), "attn_k": (keys, width), "attn_v": (keys, width),
        "attn_output": (width, width), "ffn_gate": (FEED, width), "ffn_up": (FEED, width),
        "ffn_down": (width, FEED), "attn_norm": (width,), "ffn_norm": (width,),
    }
    tensors = {"token_embd": (VOCAB, width), "output_norm": (width,)}
    for block in range(BLOCKS):
        for name, shape in shapes.items():
            tensors[f"blk.{block}.{name}"] = shape
    random = np.random.default_rng(0)
    for name, shape in tensors.items():
        weight = np.ones(shape, np.float32)
        if "norm" not in name:
            weight = random.standard_normal(shape, np.float32) / shape[1] ** 0.5
        writer.add_tensor(f"{name}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantised(path, name):
    """The tensors of the model in `path`, in a file of the type `name`."""
    settings = llama_cpp.LlamaModelQuantizeParams()
    settings.ftype = FILE_TYPES[name]
    llama_cpp.model_quantize(path, f"{name}-{path}", settings)
    return gguf.GGUFReader(f"{name}-{path}").tensors


def equal(some, others):
    for a, b in zip(some, others, strict=True):
        if a.tensor_type != b.tensor_type or not np.array_equal(a.data, b.data):
            return False
    return True


print("cyllama", version("cyllama"), "gguf", version("gguf"))
llama_cpp.disable_logging()
bits = {}
same = {}
for width, kv_heads in MODELS.items():
    path = f"{width}.gguf"
    write_model(path, width, kv_heads)
    print(f"{width} wide, bits a weight and types in the blocks:")
    found = {}
    for name in FILE_TYPES:
        found[name] = quantised(path, name)
        blocks = [t for t in found[name] if "blk" in t.name and "norm" not in t.name]
        weights = sum(int(t.n_elements) for t in blocks)
        bits[name, width] = 8 * sum(int(t.n_bytes) for t in blocks) / weights
        types = Counter(t.tensor_type.name for t in blocks)
        print(f"  {name:6} {bits[name, width]:.2f}", dict(types))
    same[width] = equal(found["Q2_K"], found["Q3_K_S"])
    print("  Q2_K and Q3_K_S hold the same tensors:", same[width])
assert same == {576: True, 896: False, 768: False}
assert bits["Q2_K", 576] > 4
assert bits["Q2_K", 896] > bits["Q3_K_S", 896]
assert bits["Q2_K", 768] < bits["Q3_K_S", 768] < 4
for width in MODELS:
    larger = bits["Q4_K_M", width] > bits["Q4_1", width]
    assert larger == (width % 256 != 0)
EOF

# Seen:
# cyllama 0.2.18 gguf 0.19.0
# 576 wide, bits a weight and types in the blocks:
#   Q4_1   5.00 {'Q4_1': 28}
#   Q2_K   4.23 {'Q4_0': 24, 'Q3_K': 4}
#   Q3_K_S 4.23 {'Q4_0': 24, 'Q3_K': 4}
#   Q4_K_M 5.55 {'Q5_0': 22, 'Q4_K': 2, 'Q8_0': 2, 'Q6_K': 2}
#   Q2_K and Q3_K_S hold the same tensors: True
# 896 wide, bits a weight and types in the blocks:
#   Q4_1   5.00 {'Q4_1': 28}
#   Q2_K   4.27 {'Q4_0': 20, 'Q5_0': 4, 'Q3_K': 4}
#   Q3_K_S 4.25 {'Q4_0': 24, 'Q3_K': 4}
#   Q4_K_M 5.54 {'Q5_0': 22, 'Q4_K': 2, 'Q8_0': 2, 'Q6_K': 2}
#   Q2_K and Q3_K_S hold the same tensors: False
# 768 wide, bits a weight and types in the blocks:
#   Q4_1   5.00 {'Q4_1': 28}
#   Q2_K   2.94 {'Q2_K': 16, 'Q3_K': 12}
#   Q3_K_S 3.44 {'Q3_K': 28}
#   Q4_K_M 4.78 {'Q4_K': 24, 'Q6_K': 4}
#   Q2_K and Q3_K_S hold the same tensors: False
