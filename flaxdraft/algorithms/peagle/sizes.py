"""Sizes and switches that every draft has, whatever its attention; names as in config.json."""

from __future__ import annotations

import dataclasses
from typing import Any, NewType

from flaxdraft.algorithms.eagle3.draft import COMMON_NAMES, Eagle3Sizes, extra_names
from flaxdraft.algorithms.peagle.mask_fields import MASK_FIELDS, mask_token_of
from flaxdraft.errors import InputError

MARK = "parallel_drafting"

Token = NewType("Token", int)  # unlike a size, it may be 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelSizes(Eagle3Sizes):
    """Those of a sequential draft, and the token that is read at places whose own is not known yet."""

    num_hidden_layers: int
    mask_token_id: Token

    @property
    def owns_embedding(self) -> bool:
        """The embedding of the mask token has to be learned, so that all of it is trained."""
        return True

    def __post_init__(self):
        super().__post_init__()
        mask = self.mask_token_id
        if type(mask) is not int or not 0 <= mask < self.vocab_size:
            raise InputError(
                f"draft.fields.mask_token_id: found {mask!r}, expected a token of the target, "
                f"0..{self.vocab_size - 1}; best one that no text holds"
            )
        if self.norm_output:
            raise InputError(
                "draft.fields.norm_output: found true; it says which state the next step reads, and a draft that "
                "proposes in one pass has no next step; leave it out"
            )

    @classmethod
    def from_hf_sizes(cls, config: dict[str, Any]) -> dict[str, Any]:
        """The common sizes of a config.json, as keyword arguments.

        Raises:
            InputError: it has something that no draft of this project has, or names no mask token.
        """
        mask = mask_token_of(config)
        if mask is None:
            raise InputError(
                f"draft config: no mask_token_id (nor {', '.join(MASK_FIELDS[1:])}), the token that the draft was "
                "trained to read at places whose own is not known; write it"
            )
        sizes = super().from_hf_sizes({**config, "num_hidden_layers": 1})
        return sizes | {"num_hidden_layers": config["num_hidden_layers"], "mask_token_id": mask}

    @classmethod
    def sizes_for_target(cls, target: Any, draft_vocab_size: int) -> dict[str, Any]:
        """The common fields of a draft next to a target, before overrides. The mask token is the last row of the
        embedding, which in padded vocabularies no text holds."""
        sizes = super().sizes_for_target(target, draft_vocab_size)
        return sizes | {"num_hidden_layers": 2, "mask_token_id": target.vocab_size - 1}

    def to_hf_sizes(self, architecture: str, model_type: str) -> dict[str, Any]:
        """The common fields of config.json."""
        own = {"num_hidden_layers": self.num_hidden_layers, "mask_token_id": self.mask_token_id, MARK: True}
        return super().to_hf_sizes(architecture, model_type) | own


def parallel_names(config: ParallelSizes) -> list[tuple[str, str, str]]:
    """(JAX path, PyTorch key, transform) of what every draft trains, but for its attention."""
    first = [(path, key.replace("midlayer.", "layers.0."), how) for path, key, how in COMMON_NAMES]
    rows = [*first, *extra_names(config), ("mask_hidden", "mask_hidden", "copy")]
    for i in range(1, config.num_hidden_layers):
        for name in ("input_layernorm", "post_attention_layernorm"):
            rows.append((f"layer_{i}/{name}/scale", f"layers.{i}.{name}.weight", "copy"))
        for name in ("gate", "up", "down"):
            rows.append((f"layer_{i}/mlp/{name}_proj/kernel", f"layers.{i}.mlp.{name}_proj.weight", "transpose"))
    return rows
