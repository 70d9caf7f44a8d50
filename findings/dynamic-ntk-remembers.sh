#!/usr/bin/env bash
# Guess: a model's logits for a prompt depend on the prompt.
#
# With rope_type "dynamic" (dynamic NTK) they depend on the prompts before it, too. The
# rotary embedding keeps the frequencies of the longest prompt so far and lets go of them
# only when a prompt comes that fits into the trained context. So of two prompts beyond that
# context the shorter one is answered with the frequencies of the longer one if it comes
# second, and with its own if it comes first: an evaluation that goes up in length measures
# another model than one that goes down, and a second run in the same process another than
# the first. Keys that are in a cache keep the frequencies of their day besides: token by
# token is not the whole prompt at once. Static NTK (rope_theta) has neither.
#
# transformers 5.24.0; 4.57.3 does the same. Source: dynamic_frequency_update in
# src/transformers/modeling_rope_utils.py; the cache: huggingface/transformers issue 25104.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
"${PYTHON:-python3}" -m venv venv
venv/bin/pip install -q torch==2.13.0 numpy==2.4.6 transformers==5.24.0 tokenizers==0.23.3

venv/bin/python - <<'EOF'
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

print("transformers", transformers.__version__, "torch", torch.__version__)
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=100, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=4, max_position_embeddings=64, initializer_range=0.3,
    rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
)
model = LlamaForCausalLM(config).eval()
prompt = torch.randint(100, (1, 100))  # tokens, of a trained context of 64
longer = torch.randint(100, (1, 200))
short = torch.randint(100, (1, 40))


@torch.no_grad()
def ask(ids):
    return model(ids).logits


def same_tokens(a, b):
    return (a.argmax(-1) == b.argmax(-1)).sum().item()


first = ask(prompt)
again = ask(prompt)
ask(longer)
after_longer = ask(prompt)
ask(short)
after_short = ask(prompt)

print("the same 100 tokens asked again, next tokens that are those of the first time:")
print("  at once:", same_tokens(first, again))
print("  after a prompt of 200 tokens:", same_tokens(first, after_longer))
print("  after one of 40, which fits into the context:", same_tokens(first, after_short))
print("logits: standard deviation %.2f," % first.std(), end=" ")
print("moved by up to %.2f after the longer prompt" % (first - after_longer).abs().max())
assert torch.equal(first, again)
assert torch.equal(first, after_short)
assert same_tokens(first, after_longer) < 90
EOF

# Seen:
# transformers 5.24.0 torch 2.13.0+cpu
# the same 100 tokens asked again, next tokens that are those of the first time:
#   at once: 100
#   after a prompt of 200 tokens: 31
#   after one of 40, which fits into the context: 100
# logits: standard deviation 2.37, moved by up to 12.53 after the longer prompt
