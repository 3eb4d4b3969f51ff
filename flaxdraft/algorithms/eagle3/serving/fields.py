"""Types of config.json's fields, so that what reads them later can take them as they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from flaxdraft.algorithms.eagle3.serving import layer_ids
from flaxdraft.algorithms.eagle3.serving.kinds import kind_of, kinds
from flaxdraft.serving import fields
from flaxdraft.serving.fields import FLAG, NAMES, POSITIVE, ROPE, SIZE, TEXT, Expected

_Ids = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]


class _EagleConfig(BaseModel):
    model_config = ConfigDict(strict=True)

    eagle_aux_hidden_state_layer_ids: _Ids | None = None
    layer_ids: _Ids | None = None


_SIZES = ("hidden_size", "intermediate_size", "vocab_size", "num_attention_heads")
_FIELDS = {
    **dict.fromkeys(
        ("draft_vocab_size", "target_hidden_size", "head_dim", "num_key_value_heads", "num_hidden_layers",
         "max_position_embeddings", "num_aux_hidden_states"), SIZE,
    ),
    "rope_theta": POSITIVE,
    **dict.fromkeys(("model_type", "torch_dtype", "dtype"), TEXT),
    **dict.fromkeys(
        ("tie_word_embeddings", "attention_bias", "fc_norm", "use_aux_norm", "norm_output", "norm_before_fc",
         "norm_before_residual"), FLAG,
    ),
    "architectures": NAMES,
    layer_ids.NAME: Expected("a list of layer ids", _Ids),
    "eagle_config": Expected("an object with lists of layer ids", _EagleConfig),
    "rope_parameters": ROPE,
    "rope_scaling": ROPE,
}  # fmt: skip


def malformed(config: Mapping[str, Any]) -> list[str]:
    """Fields, those of every kind among them, that hold what no such field can; absent and null ones are somebody
    else's question."""
    own = {name: expected for kind in kinds() for name, expected in kind.fields.items()}
    return fields.malformed(config, _FIELDS | own)


def sizeless(config: Mapping[str, Any]) -> list[str]:
    """Sizes without which there is no draft, where they are missing or no sizes."""
    sizes = dict.fromkeys((*_SIZES, *kind_of(config).sizes), SIZE)
    return fields.wrong(config, {**sizes, "rms_norm_eps": POSITIVE})
