"""Draft architectures, one a file: `Config`, `make`, `name_table`, and the names that it answers to.

A new architecture is a new file; nothing else is edited. `from_pretrained` finds it from what a directory says it is.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from flaxdraft.algorithms import algorithm_of, draft_packages
from flaxdraft.algorithms.eagle3.serving.tensors import BUFFERS, flat_name
from flaxdraft.devices.sharding import Sharding
from flaxdraft.errors import InputError
from flaxdraft.files.json_files import read_json_object
from flaxdraft.files.name_tables import state_from_torch
from flaxdraft.files.safetensors_file import load_safetensors
from flaxdraft.interfaces import Algorithm, VocabMap
from flaxdraft.nn.layers import Frozen
from flaxdraft.nn.precision import Precision
from flaxdraft.plugins import find_by_architecture


class LoadedDraft(NamedTuple):
    """A draft from a serving directory; the vocabulary map is part of it."""

    algorithm: Algorithm
    module: ModuleType
    config: Any
    params: nnx.State
    vocab: VocabMap


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


def _read_tensors(paths: list[Path]) -> dict[str, np.ndarray]:
    """Every tensor under its name in the servers' flat layout.

    Raises:
        InputError: two tensors of one name.
    """
    tensors = {}
    for path in paths:
        for key, array in load_safetensors(path).items():
            name = flat_name(key)
            if BUFFERS.search(name):
                continue
            if name in tensors:
                raise InputError(f"{path}: {key} is the second tensor that means {name}; remove one of them")
            tensors[name] = array
    return tensors


def _read_vocab(tensors: dict[str, np.ndarray], num_draft: int, num_target: int, origin: str) -> VocabMap:
    """Takes d2t and t2d out of the tensors.

    Raises:
        InputError: d2t is missing where the draft's vocabulary is smaller, is of another size, or differs from t2d.
    """
    d2t, t2d = tensors.pop("d2t", None), tensors.pop("t2d", None)
    if d2t is None:
        if num_draft < num_target:
            raise InputError(
                f"{origin}: no d2t, but draft_vocab_size is {num_draft} of {num_target} target tokens; without it "
                "nobody knows what a draft token means. Export the draft again with its vocabulary map"
            )
        d2t = np.zeros(num_draft, np.int64)
    if d2t.shape != (num_draft,):
        raise InputError(f"{origin}: d2t has shape {d2t.shape}, expected ({num_draft},) from draft_vocab_size")
    try:
        vocab = VocabMap.from_d2t(d2t, num_target)
    except InputError as error:
        raise InputError(f"{origin}: d2t holds no offsets (target id = i + d2t[i]): {error}") from error
    if t2d is not None and not np.array_equal(t2d.astype(bool), vocab.t2d()):
        raise InputError(f"{origin}: t2d is not the membership mask of d2t; export the draft again")
    return vocab


def from_pretrained(directory: str | Path, vocab: VocabMap | None = None) -> LoadedDraft:
    """Reads a draft that was exported here, or one in SGLang's, vLLM's or SpecForge's layout.

    An `embed_tokens.weight` is read only where the draft owns its embedding; elsewhere the target's stands in its
    place, as in SGLang.

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
        config = module.Config.from_hf(hf)
    except InputError:
        raise
    except KeyError as error:
        raise InputError(f"{config_path}: no field {error}, which every {module.__name__} draft needs") from error
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise InputError(f"{config_path}: a field has a type or value that no draft can have ({error})") from error
    origin = str(Path(directory))
    tensors = _read_tensors(paths)
    found = _read_vocab(tensors, config.draft_vocab_size, config.vocab_size, origin)
    if vocab is not None and not (
        vocab.vocab_size == found.vocab_size and np.array_equal(vocab.target_ids_W, found.target_ids_W)
    ):
        raise InputError(
            f"{origin}: its vocabulary map ({found.draft_vocab_size} of {found.vocab_size} tokens) is not the one "
            f"given ({vocab.draft_vocab_size} of {vocab.vocab_size}); a draft's head has meaning only with its own map"
        )
    if not config.owns_embedding:
        tensors.pop("embed_tokens.weight", None)
    params = state_from_torch(abstract_params(module, config), module.name_table(config), tensors, origin)
    return LoadedDraft(algorithm_of(module, config), module, config, params, found)


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
