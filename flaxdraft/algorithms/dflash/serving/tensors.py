"""The tensors of a draft's directory: names and PyTorch shapes [out, in], from config.json.

Written down from what the engines load, not from this project's name tables: the two are compared with each other.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from flaxdraft.algorithms.dflash.serving.terms import CONFIG, TAPS
from flaxdraft.algorithms.dflash.sizes import switch
from flaxdraft.serving.vocabulary_tables import TABLES

# Buffers that some writers keep; config.json says the same.
BUFFERS = re.compile(r"(^|\.)rotary_emb\.|(^|\.)inv_freq$")
EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"

Shapes = dict[str, tuple[int, ...]]


def flat_name(key: str) -> str:
    return key.removeprefix("model.")


def is_reduced(config: Mapping[str, Any]) -> bool:
    """Whether the draft knows only some of the target's tokens; it then has a head of its own."""
    return (config.get("draft_vocab_size") or config["vocab_size"]) != config["vocab_size"]


def passed_over(config: Mapping[str, Any], name: str) -> bool:
    """Whether a tensor is a buffer, a table, or what engines put the target's in place of."""
    own = is_reduced(config) and name == HEAD
    return bool(BUFFERS.search(name)) or (name in (EMBEDDING, HEAD, *TABLES) and not own)


def is_latent(config: Mapping[str, Any]) -> bool:
    """Whether the draft has multi-head latent attention."""
    return bool(config.get("kv_lora_rank"))


def block_size(config: Mapping[str, Any]) -> int:
    """It stands in one of two places."""
    return config.get("block_size") or config[CONFIG]["block_size"]


def _grouped(config: Mapping[str, Any]) -> Shapes:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    width = config.get("head_dim") or hidden // heads
    kv_heads = config.get("num_key_value_heads") or heads
    rows = dict(zip("qkvo", (heads * width, kv_heads * width, kv_heads * width, hidden), strict=True))
    shapes: Shapes = {f"{name}_proj.weight": (size, hidden) for name, size in rows.items()}
    shapes |= {"o_proj.weight": (hidden, heads * width), "q_norm.weight": (width,), "k_norm.weight": (width,)}
    return shapes | (
        {f"{name}_proj.bias": (size,) for name, size in rows.items()} if config.get("attention_bias") else {}
    )


def _latent(config: Mapping[str, Any]) -> Shapes:
    hidden, heads, rank = config["hidden_size"], config["num_attention_heads"], config["kv_lora_rank"]
    nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    shapes = {
        "kv_a_proj_with_mqa.weight": (rank + rope, hidden), "kv_a_layernorm.weight": (rank,),
        "kv_b_proj.weight": (heads * (nope + value), rank), "o_proj.weight": (hidden, heads * value),
    }  # fmt: skip
    if (q_rank := config.get("q_lora_rank")) is None:
        return shapes | {"q_proj.weight": (heads * (nope + rope), hidden)}
    return shapes | {
        "q_a_proj.weight": (q_rank, hidden), "q_a_layernorm.weight": (q_rank,),
        "q_b_proj.weight": (heads * (nope + rope), q_rank),
    }  # fmt: skip


def weights(config: Mapping[str, Any]) -> Shapes:
    """The weights that a draft of such a config.json holds.

    Raises:
        KeyError: config.json lacks a size.
    """
    hidden, inner, target_hidden = config["hidden_size"], config["intermediate_size"], config.get("target_hidden_size")
    attention = _latent(config) if is_latent(config) else _grouped(config)
    if switch(config, "attention_sink_bias"):
        attention["attention_sink_bias"] = (config["num_attention_heads"],)
    layer = {
        "input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (inner, hidden), "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner), **{f"self_attn.{name}": shape for name, shape in attention.items()},
    }  # fmt: skip
    head = {HEAD: (config["draft_vocab_size"], hidden)} if is_reduced(config) else {}
    return head | {
        "fc.weight": (hidden, len(config[CONFIG][TAPS]) * (target_hidden or hidden)), "hidden_norm.weight": (hidden,),
        "norm.weight": (hidden,),
        **{f"layers.{i}.{name}": shape for i in range(config["num_hidden_layers"]) for name, shape in layer.items()},
    }  # fmt: skip
