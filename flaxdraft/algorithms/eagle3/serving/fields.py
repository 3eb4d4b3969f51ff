"""Types of config.json's fields, so that what reads them later can take them as they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from flaxdraft.algorithms.eagle3.serving import layer_ids


def _int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _positive(value: Any) -> bool:
    return _number(value) and value > 0


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _ids(value: Any) -> bool:
    whole = isinstance(value, list) and all(isinstance(item, int) and not isinstance(item, bool) for item in value)
    return whole and value != [] and all(0 <= item < 2**31 for item in value)


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _rope(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    texts, positive = ("rope_type", "type"), ("rope_theta", "factor", "original_max_position_embeddings")
    others = ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
    kinds = dict.fromkeys(texts, _text) | dict.fromkeys(positive, _positive) | dict.fromkeys(others, _number)
    return all(kinds.get(name, lambda _: True)(item) for name, item in value.items() if item is not None)


def _eagle(value: Any) -> bool:
    ids = (value.get(name) for name in (layer_ids.NAME, "layer_ids")) if isinstance(value, dict) else [""]
    return all(one is None or _ids(one) for one in ids)


_SIZES = ("hidden_size", "intermediate_size", "vocab_size", "num_attention_heads")
_LATENT = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_OPTIONAL: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(
        ("draft_vocab_size", "target_hidden_size", "head_dim", "num_key_value_heads", "num_hidden_layers",
         "max_position_embeddings", "q_lora_rank", "kv_lora_rank", "num_aux_hidden_states"),
        (_int, "a positive integer"),
    ),
    **dict.fromkeys(("rope_theta", "latent_norm_eps"), (_positive, "a positive number")),
    **dict.fromkeys(("model_type", "torch_dtype", "dtype"), (_text, "a text")),
    **dict.fromkeys(
        ("tie_word_embeddings", "attention_bias", "fc_norm", "use_aux_norm", "norm_output", "norm_before_fc",
         "norm_before_residual", "rope_interleave"), (_flag, "true or false"),
    ),
    "architectures": (_texts, "a list of names"),
    layer_ids.NAME: (_ids, "a list of layer ids"),
    "eagle_config": (_eagle, "an object with lists of layer ids"),
    "rope_parameters": (_rope, "an object of RoPE parameters"),
    "rope_scaling": (_rope, "an object of RoPE parameters"),
}  # fmt: skip


def malformed(config: Mapping[str, Any]) -> list[str]:
    """Fields that hold what no such field can; absent and null ones are somebody else's question."""
    return [
        f"{name} is {value!r}, expected {kind}"
        for name, (fits, kind) in _OPTIONAL.items()
        if (value := config.get(name)) is not None and not fits(value)
    ]


def sizeless(config: Mapping[str, Any]) -> list[str]:
    """Sizes without which there is no draft, where they are missing or no sizes."""
    names = (*_SIZES, *(_LATENT if config.get("kv_lora_rank") else ()))
    wrong = [f"{name} is {config.get(name)!r}, expected a positive integer" for name in names
             if not _int(config.get(name))]  # fmt: skip
    if not _positive(config.get("rms_norm_eps")):
        wrong.append(f"rms_norm_eps is {config.get('rms_norm_eps')!r}, expected a positive number")
    return wrong
