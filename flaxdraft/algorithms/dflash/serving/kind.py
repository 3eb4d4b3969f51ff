"""How directories of the family's algorithms differ: each has fields and weights of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from flaxdraft.algorithms.dflash.serving import tensors
from flaxdraft.serving.fields import Expected
from flaxdraft.serving.finding import Finding
from flaxdraft.serving.view import DraftView

Id = Annotated[int, Field(ge=0, lt=2**31)]
Ids = Annotated[list[Id], Field(min_length=1)]


class Section(BaseModel):
    """dflash_config of config.json."""

    model_config = ConfigDict(strict=True)

    mask_token_id: Id
    target_layer_ids: Ids
    block_size: Annotated[int, Field(gt=1)] | None = None
    causal: bool | None = None
    sample_from_anchor: bool | None = None


class Kind(NamedTuple):
    """What the directories of one algorithm's drafts hold."""

    section: type[Section]
    required: str  # fields of it, for messages
    projector: str  # see `foreign_fields.unknown_fields`
    own_fields: tuple[str, ...] = ()
    head: Callable[[Mapping[str, Any]], tensors.Shapes] = lambda config: {}  # weights besides the layers'
    rules: tuple[Callable[[DraftView], Iterator[Finding]], ...] = ()  # of config.json, besides those of all
    top: Mapping[str, Expected] = {}  # those of its fields that may stand at the top level as well
    either: tuple[str, ...] = ()  # of these, the ones that must stand in one of both places
    from_anchor: bool = False  # whether the newest token's slot predicts, where dflash_config does not say it

    def weights(self, config: Mapping[str, Any]) -> tensors.Shapes:
        """What every draft holds.

        Raises:
            KeyError: config.json lacks a size.
        """
        return tensors.weights(config) | self.head(config)


DFLASH = Kind(Section, "mask_token_id and target_layer_ids", "dflash")
