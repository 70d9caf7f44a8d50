#!/usr/bin/env bash
# Guess: llama.cpp with its cache of keys and values set to float32 computes attention in
# float32.
#
# Its flash attention casts keys and values of an f32 cache to f16 before it uses them, and
# flash attention is on unless it is switched off ("auto"). So an f32 cache takes twice the
# memory of an f16 one and gives the same logits to the last bit: those of an f32 file stay
# as far from a float32 reference as before. Only the cache type and flash_attn "off"
# together are float32. Whoever holds a GGUF against PyTorch meets it: an error of 1e-2 in
# the logits that no type of the cache removes, and behind which a small fault can hide.
#
# cyllama 0.2.18 (llama.cpp in a wheel, CPU). Source: the two ggml_cast in build_attn_mha,
# llama.cpp's src/llama-graph.cpp, whose comment expects them where there is no cache.
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

WIDTH, HEADS, KV_HEADS, BLOCKS, FEED, VOCAB, CONTEXT = 256, 4, 2, 4, 512, 512, 256
TYPES = {"f32": 0, "f16": 1}
FLASH = {"off": 0, "on": 1, "auto": -1}


def write_model(path):
    """A Llama of random weights in float32, without a tokenizer."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(BLOCKS)
    writer.add_feed_forward_length(FEED)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("no_vocab")
    keys = WIDTH // HEADS * KV_HEADS
    shapes = {
        "attn_q": (WIDTH, WIDTH), "attn_k": (keys, WIDTH), "attn_v": (keys, WIDTH),
        "attn_output": (WIDTH, WIDTH), "ffn_gate": (FEED, WIDTH), "ffn_up": (FEED, WIDTH),
        "ffn_down": (WIDTH, FEED), "attn_norm": (WIDTH,), "ffn_norm": (WIDTH,),
    }
    tensors = {"token_embd": (VOCAB, WIDTH), "output": (VOCAB, WIDTH), "output_norm": (WIDTH,)}
    for block in range(BLOCKS):
        for name, shape in shapes.items():
            tensors[f"blk.{block}.{name}"] = shape
    random = np.random.default_rng(0)
    for name, shape in tensors.items():
        weight = np.ones(shape, np.float32)
        if "norm" not in name:
            weight = 2 * random.standard_normal(shape, np.float32) / shape[1] ** 0.5
        writer.add_tensor(f"{name}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Model(llama_cpp.LlamaModel):
    n_vocab = VOCAB  # this release asks a model for it without giving it


def logits(model, tokens, cache, flash):
    settings = llama_cpp.LlamaContextParams()
    settings.n_ctx = CONTEXT
    settings.type_k = settings.type_v = TYPES[cache]
    settings.flash_attn_type = FLASH[flash]
    context = llama_cpp.LlamaContext(model, settings)
    batch = llama_cpp.LlamaBatch(n_tokens=len(tokens), embd=0, n_seq_max=1)
    for position, token in enumerate(tokens):
        batch.add(token, position, [0], True)
    context.decode(batch)
    return np.array([context.get_logits_ith(i) for i in range(len(tokens))])


print("cyllama", version("cyllama"), "gguf", version("gguf"))
llama_cpp.disable_logging()
write_model("f32.gguf")
model = Model("f32.gguf", llama_cpp.LlamaModelParams())
assert llama_cpp.LlamaContextParams().flash_attn_type == FLASH["auto"]
tokens = [int(token) for token in np.random.default_rng(1).integers(VOCAB, size=64)]
exact = logits(model, tokens, "f32", "off")
print("largest difference from the logits with an f32 cache and flash attention off")
print("(their standard deviation is %.1f):" % exact.std())
found = {}
for flash in FLASH:
    for cache in TYPES:
        found[cache, flash] = logits(model, tokens, cache, flash)
        error = abs(found[cache, flash] - exact).max()
        print(f"  cache {cache}, flash attention {flash}: {error:.1e}")
for flash in ("on", "auto"):
    assert np.array_equal(found["f32", flash], found["f16", flash])
    assert abs(found["f32", flash] - exact).max() > 1e-3
EOF

# Seen:
# cyllama 0.2.18 gguf 0.19.0
# largest difference from the logits with an f32 cache and flash attention off
# (their standard deviation is 2.0):
#   cache f32, flash attention off: 0.0e+00
#   cache f16, flash attention off: 4.9e-02
#   cache f32, flash attention on: 3.3e-02
#   cache f16, flash attention on: 3.3e-02
#   cache f32, flash attention auto: 3.3e-02
#   cache f16, flash attention auto: 3.3e-02
