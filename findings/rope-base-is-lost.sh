#!/usr/bin/env bash
# Guess: the two recipes for a longer context do in transformers 5 what they did in 4: set
# config.rope_theta (static NTK), or add "rope_scaling" to config.json, as model cards say
# (YaRN); and a folder that 5 has saved is the same model in 4.
#
# transformers 5 keeps the base of RoPE in rope_parameters["rope_theta"]. So, without a word:
# - config.rope_theta = 4e6 sets a field that nothing reads. The model is not extended.
# - rope_scaling beside the rope_parameters that 5 saves replaces them whole, base included:
#   what was 1,000,000 (Qwen2, Mistral) or 500,000 (Llama 3) falls to 10,000, and YaRN is
#   computed from that: all frequencies but the first are wrong, at any length.
# - transformers 4.57 does not know rope_parameters: a folder saved by 5 has the base 10,000.
# It is met by whoever extends a context before training scales, or folds scales with one
# release and serves the folder with another. Right in 5: change rope_parameters itself.
#
# transformers 5.24.0 and 4.57.3. Source: convert_rope_params_to_dict in
# src/transformers/modeling_rope_utils.py of 5, LlamaConfig of 4.57.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
"${PYTHON:-python3}" -m venv venv
venv/bin/pip install -q torch==2.13.0 numpy==2.4.6 transformers==5.24.0 tokenizers==0.23.3
venv/bin/pip install -q --target four transformers==4.57.3 tokenizers==0.22.2 numpy==2.4.6
export HF_HUB_DISABLE_PROGRESS_BARS=1 TQDM_DISABLE=1

cat > ask.py <<'EOF'
import json
import sys
from pathlib import Path

import transformers
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

DIM = 32  # of a head: frequency i of DIM / 2 is base ** (-2 i / DIM)


def base(folder, factor=1, **changes):
    """The base that the loaded model's lowest frequency was made with."""
    config = AutoConfig.from_pretrained(folder)
    for name, value in changes.items():
        setattr(config, name, value)
    model = LlamaForCausalLM.from_pretrained(folder, config=config)
    lowest = model.model.rotary_emb.inv_freq[-1].item() * factor
    return round(lowest ** (-DIM / (DIM - 2)), -2)


def say(expected, found, what):
    print(f"  {what}: {found:,.0f}")
    assert found == expected, (expected, found)


major = transformers.__version__[0]
print("transformers", transformers.__version__)
sizes = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 64}
config = LlamaConfig(
    num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=4096,
    rope_theta=1e6, **sizes
)
LlamaForCausalLM(config).save_pretrained(f"saved-by-{major}")
say(1e6, base(f"saved-by-{major}"), "base of the folder that it has saved")
if major == "4":
    say(4e6, base("saved-by-4", rope_theta=4e6), "after config.rope_theta = 4e6")
    say(1e4, base("saved-by-5"), "base of the folder that 5 has saved")
    sys.exit()
say(1e6, base("saved-by-5", rope_theta=4e6), "after config.rope_theta = 4e6")
file = Path("saved-by-5/config.json")
before = file.read_text()
fields = json.loads(before)
print("  its config.json:", fields["rope_parameters"])
yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
file.write_text(json.dumps(fields | {"rope_scaling": yarn}))
say(1e4, base("saved-by-5", factor=4), "after adding rope_scaling (YaRN) to config.json")
file.write_text(before)
EOF
venv/bin/python ask.py
PYTHONPATH=four venv/bin/python ask.py

# Seen:
# transformers 5.24.0
#   base of the folder that it has saved: 1,000,000
#   after config.rope_theta = 4e6: 1,000,000
#   its config.json: {'rope_theta': 1000000.0, 'rope_type': 'default'}
#   after adding rope_scaling (YaRN) to config.json: 10,000
# transformers 4.57.3
#   base of the folder that it has saved: 1,000,000
#   after config.rope_theta = 4e6: 4,000,000
#   base of the folder that 5 has saved: 10,000
