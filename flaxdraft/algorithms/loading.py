"""Drafts from directories, of whichever algorithm: an architecture's file is found from what config.json says."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from flaxdraft.algorithms import DEFAULT, algorithm_of, draft_packages, make
from flaxdraft.devices.sharding import Sharding
from flaxdraft.errors import InputError
from flaxdraft.files.json_files import read_json_object
from flaxdraft.files.name_tables import state_from_torch
from flaxdraft.files.safetensors_file import load_safetensors
from flaxdraft.interfaces import VocabMap
from flaxdraft.nn.layers import Frozen
from flaxdraft.nn.precision import Precision
from flaxdraft.plugins import find_by_architecture, settings_of
from flaxdraft.serving.contract import Contract
from flaxdraft.serving.trained_draft import TrainedDraft


def serving_files(directory: str | Path) -> list[Path]:
    """config.json and the safetensors files of a draft's directory.

    Raises:
        InputError: one of them is not there.
    """
    directory = Path(directory)
    config, weights = directory / "config.json", sorted(directory.glob("*.safetensors"))
    for found, wanted in ((config.exists(), "config.json"), (bool(weights), "*.safetensors")):
        if not found:
            raise InputError(
                f"draft directory {directory}: no {wanted}; expected what `export` writes or a server loads"
            )
    return [config, *weights]


def contract_of(config: Mapping[str, Any]) -> Contract:
    """The contract of the algorithm whose draft a config.json describes, whatever may stand in it; the default
    algorithm's where no draft of that name is known, whose rules then say what is wrong."""
    try:
        return algorithm_of(find_by_architecture(draft_packages(), dict(config), "config.json")).serving()
    except (InputError, TypeError, LookupError):
        return make(settings_of(DEFAULT)(name=DEFAULT), packed=True).serving()


def tapped_layers(directory: Path, target: Mapping[str, Any]) -> list[int] | None:
    """The layers that a draft's config.json names, by output; None where it leaves them to the default.

    Args:
        target: the target's config.json; where it is not known, {}.

    Raises:
        InputError: config.json cannot be read, or has something else in these fields.
    """
    path = directory / "config.json"
    config = read_json_object(path, "expected a draft's config.json", "write it again")
    try:
        return contract_of(config).tap_layers_of(config, target)
    except (ValueError, AttributeError, TypeError, LookupError) as error:
        raise InputError(f"{path}: its layer ids cannot be read ({error})") from error


def _read_tensors(paths: list[Path], contract: Contract) -> dict[str, np.ndarray]:
    """Every tensor under its name in the algorithm's name tables.

    Raises:
        InputError: two tensors of one name.
    """
    tensors = {}
    for path in paths:
        for key, array in load_safetensors(path).items():
            name = contract.flat_name(key)
            if name is None:
                continue
            if name in tensors:
                raise InputError(f"{path}: {key} is the second tensor that means {name}; remove one of them")
            tensors[name] = array
    return tensors


def from_pretrained(directory: str | Path, vocab: VocabMap | None = None) -> TrainedDraft:
    """Reads a draft that was exported here, or one in another layout that its algorithm's contract understands.

    Args:
        vocab: the map that the caller's data was made for, if it has one.

    Raises:
        InputError: the directory holds no draft of a known architecture, a field or weight is missing or misshapen,
            or its vocabulary map is missing or not the caller's.
    """
    config_path, *paths = serving_files(directory)
    hf = read_json_object(config_path, "expected a draft's config.json", "write it again")
    try:
        module = find_by_architecture(draft_packages(), hf, str(config_path))
        try:
            config = module.Config.from_hf(hf)
        except KeyError as error:
            raise InputError(f"{config_path}: no field {error}, which every {module.__name__} draft needs") from error
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise InputError(f"{config_path}: a field has a type or value that no draft can have ({error})") from error
    origin = str(Path(directory))
    algorithm = algorithm_of(module, config)
    contract: Contract = algorithm.serving()
    tensors = _read_tensors(paths, contract)
    found = contract.take_vocab(tensors, config, origin)
    if vocab is not None and not (
        vocab.vocab_size == found.vocab_size and np.array_equal(vocab.target_ids_W, found.target_ids_W)
    ):
        raise InputError(
            f"{origin}: its vocabulary map ({found.draft_vocab_size} of {found.vocab_size} tokens) is not the one "
            f"given ({vocab.draft_vocab_size} of {vocab.vocab_size}); a draft's head has meaning only with its own map"
        )
    params = state_from_torch(abstract_params(module, config), module.name_table(config), tensors, origin)
    return TrainedDraft(algorithm, module, config, params, found)


@dataclasses.dataclass(frozen=True)
class ZeroTarget:
    """A target's embedding, head and norm of zeros, for shapes."""

    config: Any  # of the draft

    def embedding(self) -> Float[Array, "V E"]:
        return jnp.zeros((self.config.vocab_size, self.config.target_hidden_size))

    def head(self) -> Float[Array, "V E"]:
        return self.embedding()

    def final_norm(self) -> Float[Array, " E"]:
        return jnp.zeros(self.config.target_hidden_size)


def abstract_params(module: ModuleType, config: Any) -> nnx.State:
    """Shapes and dtypes of a draft's trained parameters."""

    def empty() -> nnx.Module:
        vocab = VocabMap(np.arange(config.draft_vocab_size), config.vocab_size)
        return module.make(
            config, vocab, ZeroTarget(config), precision=Precision(), sharding=Sharding.none(), rngs=nnx.Rngs(0)
        )  # fmt: skip

    return nnx.split(nnx.eval_shape(empty), nnx.Param, Frozen)[1]
