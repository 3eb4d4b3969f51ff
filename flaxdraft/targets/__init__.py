"""Frozen targets, one family a file. `load` finds the family from what the file says it is."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from flaxdraft.errors import InputError
from flaxdraft.fetch import fetch
from flaxdraft.gguf_file import GGUFCheckpoint
from flaxdraft.interfaces import Target, find_by_architecture
from flaxdraft.precision import Precision
from flaxdraft.weights import state_from_torch


@dataclasses.dataclass(frozen=True)
class LoadedTarget:
    """A target with the tokenizer and the config.json fields that came with it."""

    model: Target
    tokenizer: PreTrainedTokenizerFast
    hf_config: dict
    path: Path


def load(
    address: str, sha256: str | None, tap_layers: tuple[int, int, int] | None, precision: Precision
) -> LoadedTarget:
    """Fetches, verifies and loads a target.

    Raises:
        InputError: see `fetch`, `GGUFCheckpoint` and `state_from_torch`.
    """
    path = fetch(address, sha256)
    if path.suffix != ".gguf":
        raise InputError(f"target.path: {path} is not a .gguf file; other formats are not supported yet")
    checkpoint = GGUFCheckpoint(path)
    family = find_by_architecture("flaxdraft.targets", checkpoint.config, str(path))
    config = family.Config.from_hf(checkpoint.config, tap_layers)
    _, abstract = family.abstract_state(config, precision)
    state = state_from_torch(
        abstract, family.name_table(config), checkpoint.names(), checkpoint.get, config.num_hidden_layers, str(path)
    )
    tokenizer = checkpoint.tokenizer()
    if len(tokenizer) > config.vocab_size:
        raise InputError(f"{path}: the tokenizer has {len(tokenizer)} tokens, the embedding {config.vocab_size} rows")
    return LoadedTarget(family.build(config, state, precision), tokenizer, checkpoint.config, path)
