"""A target of which config.json is enough: what it would take, and what its passes would."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from flaxdraft import targets
from flaxdraft.devices.sharding import known
from flaxdraft.interfaces import Batch
from flaxdraft.nn.precision import Precision
from flaxdraft.run.init_from import check_target
from flaxdraft.run.setup import Setup
from flaxdraft.serving.trained_draft import AboutTarget
from flaxdraft.targets import decoder
from flaxdraft.targets.decoder import DecoderConfig
from flaxdraft.train.batch_placement import SHARDING


def tapped_config(setup: Setup, target: targets.DescribedTarget) -> DecoderConfig:
    """A target's configuration with the layers that the run taps.

    Raises:
        InputError: these are none of the algorithm's, or the draft to begin from is of another target.
    """
    given, begun = setup.config.target.tap_layers, setup.config.draft.init_from
    num_layers = target.config().num_hidden_layers
    config = target.config(setup.algorithm.tap_layers(num_layers, None if given is None else tuple(given)))
    if setup.start is not None:
        assert begun is not None, "what a run begins from has an address"
        check_target(setup.start, begun, config, target.hf_config)
    return config


class PlannedTarget:
    """As a `RunTarget`, as far as sizes go."""

    def __init__(self, setup: Setup):
        self._setup, wanted = setup, setup.config.target
        self.described = targets.describe_target(wanted.path, wanted.sha256)

    @functools.cached_property
    def config(self) -> DecoderConfig:
        """
        Raises:
            InputError: see `tapped_config`.
        """
        return tapped_config(self._setup, self.described)

    @property
    def about(self) -> AboutTarget:
        return AboutTarget(self.described.hf_config, self.config.tap_layers)


class TargetFigures(NamedTuple):
    """Bytes are those of one device."""

    weight_bytes: int
    cache_bytes: int
    flops: float  # of a token's products with weights, the head's included
    abstract: decoder.DecoderTarget  # shapes in their places


def target_figures(target: PlannedTarget, mesh: jax.sharding.Mesh, dtype: Any, rows: int, slots: int) -> TargetFigures:
    """
    Args:
        dtype: of weights and products.
        rows: that are answered at a time.
        slots: tokens of a prompt and its answer.

    Raises:
        InputError: the mesh does not divide a weight.
    """
    config, family, precision = target.config, target.described.family, Precision(dtype, dtype)
    groups = family.groups(config, precision, SHARDING)
    _, state = decoder.abstract_state(config, groups, precision)
    places = decoder.weight_shardings(config, state, mesh, SHARDING)
    flat = [(tuple(map(str, path)), variable) for path, variable in nnx.to_flat_state(state)]
    placed = [(path, v.replace(jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=places[path]))) for path, v in flat]
    abstract = decoder.build(config, groups, nnx.from_flat_state(placed), precision, mesh, SHARDING)
    return TargetFigures(
        decoder.bytes_per_device(config, state, mesh.shape), _cache_bytes(config, mesh.shape, dtype, rows * slots),
        2.0 * sum(_products(path, v, target) for path, v in flat), abstract,
    )  # fmt: skip


def _cache_bytes(config: DecoderConfig, mesh_shape: Mapping[str, int], dtype: Any, num_tokens: int) -> int:
    heads = math.ceil(config.num_key_value_heads / mesh_shape["tensor"])
    token = config.num_hidden_layers * heads * (config.key_width + config.value_width) * jnp.dtype(dtype).itemsize
    return math.ceil(num_tokens / (mesh_shape["data"] * mesh_shape["fsdp"])) * token


def _products(path: tuple, variable: nnx.Variable, target: PlannedTarget) -> float:
    """Weights that a token is multiplied with; of experts those that it goes to."""
    config, shape = target.config, variable.shape
    stacked = path[0] not in ("embed", "norm", "head")
    if len(shape) - stacked < 2 or (path[0] == "embed" and not config.tie_word_embeddings):
        return 0.0
    experts = target.described.family.num_experts(config)
    if experts and str(variable.get_metadata().get("place", "")).startswith("weight_x"):
        if len(shape) - stacked < 3:  # a bias of each expert
            return 0.0
        return math.prod(shape) * target.described.hf_config.get("num_experts_per_tok", experts) / experts
    return math.prod(shape)


def pass_work(target: decoder.DecoderTarget, batch: Batch) -> int:
    """Bytes that a device takes at most within one pass over a batch of described arrays, laid out for this target."""
    assert target.mesh is not None, "described with its places"
    rows = jax.NamedSharding(target.mesh, known(SHARDING.act_b))
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), batch)
    with jax.set_mesh(target.mesh):
        compiled = jax.jit(decoder.DecoderTarget.features).lower(target, batch).compile()
    memory = compiled.memory_analysis()
    assert memory is not None, "XLA says it of every backend that trains"
    return memory.temp_size_in_bytes
