"""The tensors of a draft's directory: flat names and PyTorch shapes [out, in], from config.json and the kind.

Written down from what the engines load, not from this project's name tables: the two are compared with each other.
"""

from __future__ import annotations

import re

from flaxdraft.algorithms.eagle3.serving.terms import Config, Kind, Shapes, switch

NUM_TAPS = 3
LAYER = "midlayer."
ATTENTION = LAYER + "self_attn."
# Buffers that some writers keep; config.json says the same.
BUFFERS = re.compile(r"(^|\.)rotary_emb\.|(^|\.)inv_freq$")
OLD_NAMES = {"aux_norm_low.": "fc_norm.0.", "aux_norm_mid.": "fc_norm.1.", "aux_norm_high.": "fc_norm.2."}


def flat_name(key: str) -> str:
    """The name in this layout of what another writer calls `key`: without `model.`, the layer as `midlayer.`, the
    norms of the tapped states by number."""
    name = key.removeprefix("model.")
    if name.startswith("layers.0."):
        name = LAYER + name.removeprefix("layers.0.")
    for old, new in OLD_NAMES.items():
        if name.startswith(old):
            name = new + name.removeprefix(old)
    return name


def sizes(config: Config) -> tuple[int, int, int, int]:
    """Draft width, target width, target vocabulary, draft vocabulary."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    return hidden, config.get("target_hidden_size") or hidden, vocab, config.get("draft_vocab_size") or vocab


def weights(config: Config, kind: Kind) -> Shapes:
    """What every draft of that kind holds; the embedding only where the target's does not fit.

    Raises:
        KeyError: config.json lacks a size.
    """
    hidden, target_hidden, vocab, draft_vocab = sizes(config)
    inner = config["intermediate_size"]
    shapes = {
        "fc.weight": (hidden, NUM_TAPS * target_hidden),
        LAYER + "input_layernorm.weight": (hidden,),
        LAYER + "hidden_norm.weight": (hidden,),
        LAYER + "post_attention_layernorm.weight": (hidden,),
        LAYER + "mlp.gate_proj.weight": (inner, hidden),
        LAYER + "mlp.up_proj.weight": (inner, hidden),
        LAYER + "mlp.down_proj.weight": (hidden, inner),
        "norm.weight": (hidden,),
        "lm_head.weight": (draft_vocab, hidden),
        **{ATTENTION + name: shape for name, shape in kind.attention(config).items()},
    }
    if switch(config, "fc_norm"):
        shapes |= {f"fc_norm.{i}.weight": (target_hidden,) for i in range(NUM_TAPS)}
    if switch(config, "norm_before_fc"):
        shapes["input_norm.weight"] = (NUM_TAPS * target_hidden,)
    if hidden != target_hidden:
        shapes["embed_tokens.weight"] = (vocab, hidden)
    return shapes


def extras(config: Config) -> Shapes:
    """What a draft may hold besides: the vocabulary tables, and an embedding that engines may pass over."""
    hidden, _, vocab, draft_vocab = sizes(config)
    return {"d2t": (draft_vocab,), "t2d": (vocab,), "embed_tokens.weight": (vocab, hidden)}
