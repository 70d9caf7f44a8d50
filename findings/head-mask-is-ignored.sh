#!/usr/bin/env bash
# Guess: a GPT-2 or BERT called with head_mask=zeros has its attention heads switched off.
#
# It had, for years; studies of which heads matter are written that way. transformers 5 took
# head masking out, but forward() still takes any keyword, so the mask is swallowed: no error,
# no warning, and logits that are those of the whole model to the last bit. A pruning study
# that is run again finds that no head matters. (prune_heads, removed too, is an
# AttributeError.) Who wants to scale or silence heads multiplies what goes into the output
# projection, by a forward pre-hook or in a model of their own.
#
# transformers 5.24.0 beside 4.57.3. Source: huggingface/transformers pull request 41076, and
# **kwargs in forward() of models/gpt2/modeling_gpt2.py and models/bert/modeling_bert.py.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
"${PYTHON:-python3}" -m venv venv
venv/bin/pip install -q torch==2.13.0 numpy==2.4.6 transformers==5.24.0 tokenizers==0.23.3
venv/bin/pip install -q --target four transformers==4.57.3 tokenizers==0.22.2 numpy==2.4.6

cat > ask.py <<'EOF'
import torch
import transformers
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

heads = 4
common = {"vocab_size": 100, "num_hidden_layers": 2, "num_attention_heads": heads}
bert = BertConfig(hidden_size=64, intermediate_size=128, **common)
gpt2 = GPT2Config(hidden_size=64, bos_token_id=0, eos_token_id=0, **common)
ids = torch.arange(1, 21)[None]
mask = torch.zeros(2, heads)  # (layers, heads): every head off
print("transformers", transformers.__version__, "torch", torch.__version__)

moved = {}
for kind, config in ((GPT2LMHeadModel, gpt2), (BertModel, bert)):
    torch.manual_seed(0)
    model = kind._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        change = model(ids, head_mask=mask)[0] - model(ids)[0]
    moved[kind.__name__] = change.abs().max().item()
    print(f"  {kind.__name__}: all heads masked, output moves by {moved[kind.__name__]:.4f}")

if transformers.__version__.startswith("4."):
    assert min(moved.values()) > 0.01, moved
else:
    assert max(moved.values()) == 0, moved
EOF
PYTHONPATH=four venv/bin/python ask.py
venv/bin/python ask.py

# Seen:
# transformers 4.57.3 torch 2.13.0+cpu
#   GPT2LMHeadModel: all heads masked, output moves by 0.1994
#   BertModel: all heads masked, output moves by 0.0495
# transformers 5.24.0 torch 2.13.0+cpu
#   GPT2LMHeadModel: all heads masked, output moves by 0.0000
#   BertModel: all heads masked, output moves by 0.0000
