"""Models that are nearly a Llama: Mistral, and Qwen 2 and 3.

Opened by seal.py where config.json is not a Llama's. They differ in a few facts, which
this file adds to those that transformers has read.
"""


def adapt(found: dict) -> None:
    """Add what seal.Config needs to know of another family. ValueError for a window.

    found: config.json as transformers has filled it in, and "context", in tokens.
    """
    kind, context = found["model_type"], found["context"]
    found.setdefault("attention_bias", kind == "qwen2")  # of q, k and v; o_proj's is zero
    found["qk_norm"] = kind == "qwen3"
    kinds = found.get("layer_types") or [kind]
    window = found.get("sliding_window") or context
    if {"mistral", "sliding_attention"} & {*kinds} and window < context:
        raise ValueError("sliding_window: null it, lower max_position_embeddings to it")
