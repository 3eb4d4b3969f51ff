"""The tensors of a draft's directory: names and PyTorch shapes [out, in], from config.json.

Written down from what the engines load, not from this project's name tables: the two are compared with each other.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from flaxdraft.algorithms.dflash.serving.terms import CONFIG, TAPS

# Buffers that some writers keep, and what engines put the target's in place of.
PASSED_OVER = re.compile(r"(^|\.)rotary_emb\.|(^|\.)inv_freq$|^embed_tokens\.weight$|^lm_head\.weight$")

Shapes = dict[str, tuple[int, ...]]


def flat_name(key: str) -> str:
    return key.removeprefix("model.")


def weights(config: Mapping[str, Any]) -> Shapes:
    """What every draft holds.

    Raises:
        KeyError: config.json lacks a size.
    """
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    width = config.get("head_dim") or hidden // heads
    kv_heads = config.get("num_key_value_heads") or heads
    target_hidden = config.get("target_hidden_size") or hidden
    layer = {
        "input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (heads * width, hidden), "self_attn.k_proj.weight": (kv_heads * width, hidden),
        "self_attn.v_proj.weight": (kv_heads * width, hidden), "self_attn.o_proj.weight": (hidden, heads * width),
        "self_attn.q_norm.weight": (width,), "self_attn.k_norm.weight": (width,),
        "mlp.gate_proj.weight": (inner, hidden), "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }  # fmt: skip
    if config.get("attention_bias"):
        layer |= {
            f"self_attn.{name}_proj.bias": (size,)
            for name, size in zip("qkvo", (heads * width, kv_heads * width, kv_heads * width, hidden), strict=True)
        }
    return {
        "fc.weight": (hidden, len(config[CONFIG][TAPS]) * target_hidden), "hidden_norm.weight": (hidden,),
        "norm.weight": (hidden,),
        **{f"layers.{i}.{name}": shape for i in range(config["num_hidden_layers"]) for name, shape in layer.items()},
    }  # fmt: skip
