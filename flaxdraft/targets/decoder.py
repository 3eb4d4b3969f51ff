"""A frozen decoder-only language model around its layers: what all target families have in common.

Layers of one kind are stacked and run in a loop, so that compile time does not grow with depth; the KV cache is the
loop's carry and is updated in place. A family gives its Config, its groups of layers and its name table.

Shape letters: B batch, T time, S cache slots, L layers, E width, V vocabulary, N query heads, K key/value heads,
H query and key width, C value width.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, Protocol, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax import P, lax
from jaxtyping import Array, Float, Int

from flaxdraft.devices.mesh import check_divides
from flaxdraft.devices.per_device import on_shards
from flaxdraft.devices.sharding import Sharding, gathered, known
from flaxdraft.devices.weight_places import check_heads, place_of
from flaxdraft.errors import InputError
from flaxdraft.interfaces import Batch, Features, Placement
from flaxdraft.nn import vocabulary
from flaxdraft.nn.layers import RMSNorm
from flaxdraft.nn.precision import Precision
from flaxdraft.nn.rope import RopeConfig, turning_positions
from flaxdraft.nn.self_attention import Attend
from flaxdraft.targets.fields import check_only, check_positive
from flaxdraft.targets.kv_cache import Cache
from flaxdraft.targets.target_attention import LayerAttention, QueryRows


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """What every family has; field names are those of Hugging Face's config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    rope: RopeConfig
    tap_layers: tuple[int, ...]  # outputs of these layers, residual stream; any number

    @property
    def key_width(self) -> int:
        """Of a head's key in the cache."""
        return self.head_dim

    @property
    def value_width(self) -> int:
        """Of a head's value in the cache."""
        return self.head_dim

    @property
    def context(self) -> int:
        """Positions that the target reads, scaling of its rotary embedding considered. A config.json may name those of
        before the scaling, as vLLM takes it to (config/model.py, _get_and_verify_max_len)."""
        if self.rope.rope_type not in ("linear", "dynamic", "yarn") or self.rope.factor is None:
            return self.max_position_embeddings
        before = self.rope.original_max_position_embeddings if self.rope.rope_type == "yarn" else None
        return max(self.max_position_embeddings, int((before or self.max_position_embeddings) * self.rope.factor))

    @property
    def norm_offset(self) -> float:
        """Of the final norm, see `RMSNorm`."""
        return 0.0

    def before_layers(self, embeds_BTE: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        """What the first layer reads, given rows of the embedding; a family may scale them."""
        return embeds_BTE

    @classmethod
    def common(cls, config: dict[str, Any], tap_layers: Sequence[int]) -> dict[str, Any]:
        """These fields of a config.json, as keyword arguments.

        Raises:
            InputError: a field is missing, or the taps are not ascending layers of this model.
        """
        check_positive(
            config, "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"
        )
        check_only(config, "hidden_act", ("silu",))
        heads = config["num_attention_heads"]
        return {
            "vocab_size": config["vocab_size"],
            "hidden_size": config["hidden_size"],
            "intermediate_size": config["intermediate_size"],
            "num_hidden_layers": config["num_hidden_layers"],
            "num_attention_heads": heads,
            "num_key_value_heads": config.get("num_key_value_heads") or heads,
            "head_dim": config.get("head_dim") or config["hidden_size"] // heads,
            "rms_norm_eps": config.get("rms_norm_eps", 1e-6),
            "max_position_embeddings": config.get("max_position_embeddings", 2048),
            "tie_word_embeddings": bool(config.get("tie_word_embeddings", False)),
            "rope": RopeConfig.from_hf(config),
            "tap_layers": checked_taps(config["num_hidden_layers"], tap_layers),
        }


def checked_taps(num_layers: int, taps: Sequence[int]) -> tuple[int, ...]:
    """
    Raises:
        InputError: they are not ascending layers of the model.
    """
    taps = tuple(taps)
    if any(one >= other for one, other in pairwise(taps)) or not all(0 <= tap < num_layers for tap in taps):
        raise InputError(f"target.tap_layers: {list(taps)} are not ascending layers of a {num_layers}-layer target")
    return taps


class Layer(Protocol):
    """What a family's layer is: a module that composes itself, norms and residuals included."""

    def __call__(
        self, x_BTE: Float[Array, "B T E"], positions_BT: Int[Array, "B T"], attend: Attend, number: Int[Array, ""]
    ) -> Float[Array, "B T E"]:
        """
        Args:
            attend: hides cache, documents, trees and devices; called once.
            number: of the layer in the target, from 0, traced: for what differs among layers that are otherwise alike.
        """
        ...


class Group(NamedTuple):
    """Consecutive layers of one kind."""

    name: str  # first component of their JAX paths
    layers: range  # their numbers in the file
    make: Callable[[nnx.Rngs], nnx.Module]  # a `Layer`


class DecoderWeights(nnx.Module):
    """All weights; the layers of each group are stacked on axis 0."""

    def __init__(self, config: DecoderConfig, groups: Sequence[Group], precision: Precision, rngs: nnx.Rngs):
        init = nnx.initializers.normal(0.02)
        shape = (config.vocab_size, config.hidden_size)
        self.embed = nnx.Param(init(rngs.params(), shape, precision.param), place="weight_ve")
        for group in groups:
            keys = jax.random.split(rngs.params(), len(group.layers))
            setattr(self, group.name, nnx.vmap(partial(_make_layer, group.make))(keys))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, precision, config.norm_offset)
        if not config.tie_word_embeddings:
            self.head = nnx.Param(init(rngs.params(), shape, precision.param), place="weight_ve")


def _make_layer(make, key):
    return make(nnx.Rngs(key))


def abstract_state(
    config: DecoderConfig, groups: Sequence[Group], precision: Precision
) -> tuple[nnx.GraphDef, nnx.State]:
    """Structure and shapes without allocating a weight."""
    return nnx.split(nnx.eval_shape(lambda: DecoderWeights(config, groups, precision, nnx.Rngs(0))))


def weight_shardings(
    config: DecoderConfig, abstract: nnx.State, mesh: jax.sharding.Mesh, sharding: Sharding
) -> dict[tuple[str, ...], jax.NamedSharding]:
    """Where each weight lives, by its JAX path.

    Raises:
        InputError: see `_checked_specs`.
    """
    specs = _checked_specs(config, abstract, mesh.shape, sharding)
    return {path: jax.NamedSharding(mesh, spec) for path, _, spec in specs}


def _checked_specs(config, abstract, mesh_shape: Mapping[str, int], sharding: Sharding) -> list:
    """(path, variable, spec) of every weight.

    Raises:
        InputError: the mesh does not divide a weight, or the heads; the message names it and the axis.
    """
    check_heads(config, sharding, mesh_shape)
    specs = [(path, variable, place_of(variable, sharding)) for path, variable in nnx.to_flat_state(abstract)]
    for path, variable, spec in specs:
        check_divides("/".join(map(str, path)), variable.shape, spec, mesh_shape)
    return specs


def bytes_per_device(config: DecoderConfig, abstract: nnx.State, mesh_shape: Mapping[str, int]) -> int:
    """Of weights alone, on a mesh of that shape, which need not be there.

    Raises:
        InputError: see `_checked_specs`.
    """
    total = 0
    for _, variable, spec in _checked_specs(config, abstract, mesh_shape, Sharding.parallel()):
        parts = math.prod(mesh_shape[axis] for axis in spec if axis is not None)
        total += math.prod(variable.shape) * variable.dtype.itemsize // parts
    return total


def _run_layers(model, spans, config: DecoderConfig, x_BTE, rows: QueryRows, cache, sharding: Sharding):
    """The residual stream through all layers, and the tapped ones' outputs [B, T, K, E].

    One loop for each group: a tap writes its output to a place of its own, every other layer to one that nobody reads.
    """
    num_taps = len(config.tap_layers)
    turning_BT = rows.positions_BT if cache is None else turning_positions(rows.positions_BT, cache.num_slots)
    places = [
        config.tap_layers.index(i) if i in config.tap_layers else num_taps for i in range(config.num_hidden_layers)
    ]

    def run(graphdef, layers, span: range, carry):
        def body(i, carry):
            x, taps_KBTE, cache = carry
            at_layer = jax.tree.map(lambda w: lax.dynamic_index_in_dim(w, i - span.start, keepdims=False), layers)
            attend = LayerAttention(rows, cache, i, sharding)
            x = nnx.merge(graphdef, at_layer)(x, turning_BT, attend, i)
            return x, lax.dynamic_update_index_in_dim(taps_KBTE, x, jnp.asarray(places)[i], 0), attend.cache

        return lax.fori_loop(span.start, span.stop, body, carry)

    carry = x_BTE, jnp.stack([x_BTE] * (num_taps + 1)), cache
    for name, span in spans:
        carry = run(*nnx.split(getattr(model, name)), span, carry)
    x_BTE, taps_KBTE, cache = carry
    return jnp.moveaxis(taps_KBTE[:num_taps], 0, 2), x_BTE, cache


@partial(jax.jit, static_argnames=("head",), donate_argnames=("cache",))
def _forward(target: DecoderTarget, tokens_BT, positions_BT, segments_BT, cache, head: str, placement=None):
    config, sharding, model = target.config, target.sharding, nnx.merge(target.graphdef, target.state)
    if sharding.act_btd is not None:
        rows = P(*sharding.act_btd[:2])
        tokens_BT, positions_BT = jax.reshard(tokens_BT, rows), jax.reshard(positions_BT, rows)
        segments_BT, placement = jax.tree.map(lambda x: jax.reshard(x, rows), (segments_BT, placement))
    embeds = vocabulary.lookup(model.embed[...], tokens_BT, sharding).astype(model.norm.precision.compute)
    rows = QueryRows(positions_BT, segments_BT, placement)
    taps, x, cache = _run_layers(model, target.spans, config, config.before_layers(embeds), rows, cache, sharding)
    last = model.norm(x)
    head_VE = model.embed[...] if config.tie_word_embeddings else model.head[...]
    if head == "all":
        return cache, Features(taps, last, *vocabulary.statistics(last, head_VE, sharding))
    assert cache is not None, "only what goes on has an end"
    at_B1 = jnp.sum(positions_BT < cache.k_LBKHS.shape[-1], axis=1, keepdims=True) - 1
    is_end_BT = jnp.arange(tokens_BT.shape[1])[None] == at_B1
    ends_B1E = jnp.sum(jnp.where(is_end_BT[..., None], last, 0), axis=1, keepdims=True)
    found = vocabulary.statistics(ends_B1E, head_VE, sharding)
    return cache, Features(taps, last, *(jnp.where(is_end_BT, x_B1, 0) for x_B1 in found))


@partial(jax.jit, static_argnames=("sharding",))
def _logits(last_BE, head_VE, sharding: Sharding):
    wide = jnp.promote_types(last_BE.dtype, jnp.float32)
    if sharding.weight_ve is None:
        return jnp.einsum("be,ve->bv", last_BE, head_VE, preferred_element_type=wide)
    head_VE, split = gathered(head_VE, sharding.weight_ve), P(None, sharding.weight_ve[0])
    logits = jnp.einsum("be,ve->bv", last_BE, head_VE, preferred_element_type=wide, out_sharding=split)
    return jax.reshard(logits, P(None, None))


_STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecoderTarget:
    """A loaded model; see the Protocol `Target`. A pytree whose leaves are the weights: a program takes it as an
    argument."""

    config: DecoderConfig = dataclasses.field(metadata=_STATIC)
    spans: tuple[tuple[str, range], ...] = dataclasses.field(metadata=_STATIC)  # groups of layers, in their order
    graphdef: nnx.GraphDef = dataclasses.field(metadata=_STATIC)
    state: nnx.State
    precision: Precision = dataclasses.field(metadata=_STATIC)
    mesh: jax.sharding.Mesh | None = dataclasses.field(default=None, metadata=_STATIC)
    sharding: Sharding = dataclasses.field(default=Sharding.none(), metadata=_STATIC)

    @property
    def row_multiple(self) -> int:
        if self.mesh is None:
            return 1
        return math.prod(self.mesh.shape[axis] for axis in known(self.sharding.act_b)[0])

    def on_mesh(self) -> contextlib.AbstractContextManager:
        """Where programs that run the target are to be called."""
        there = self.mesh is None or jax.sharding.get_abstract_mesh() == self.mesh.abstract_mesh
        return contextlib.nullcontext() if there else jax.set_mesh(self.mesh)

    def _run(self, tokens_BT, positions_BT, segments_BT, cache, head, placement=None):
        with self.on_mesh():
            return _forward(self, tokens_BT, positions_BT, segments_BT, cache, head, placement)

    def features(self, batch: Batch) -> Features:
        """One forward over packed or padded rows, no cache."""
        return self._run(batch.tokens_BT, batch.positions_BT, batch.segments_BT, None, "all")[1]

    def new_cache(self, num_rows: int, num_slots: int) -> Cache:
        """An empty cache of `num_slots` positions a row, split by rows and heads where there is a mesh."""
        c = self.config
        lead = (c.num_hidden_layers, num_rows, c.num_key_value_heads)
        place = self.sharding.cache_lbn
        zeros = lambda *tail: jnp.zeros((*lead, *tail), self.precision.compute, out_sharding=place)  # noqa: E731
        with self.on_mesh():
            return Cache(zeros(c.key_width, num_slots), zeros(num_slots, c.value_width))

    def fork_cache(self, cache: Cache, num_rows: int) -> Cache:
        """The cache of one row, copied to many rows that begin alike."""
        place = self.sharding.cache_lbn
        with self.on_mesh():
            return jax.tree.map(lambda x: jnp.repeat(x, num_rows, axis=1, out_sharding=place), cache)

    def move_slots(self, cache: Cache, from_BT: Int[Array, "B T"], to_BT: Int[Array, "B T"]) -> Cache:
        """See `Cache.moved`; each device moves within its own rows."""
        s = self.sharding
        place = jax.tree.map(lambda _: s.cache_lbn, cache)
        if s.cache_lbn is not None:
            from_BT, to_BT = jax.reshard(from_BT, s.act_b), jax.reshard(to_BT, s.act_b)
        return on_shards(s, Cache.moved, (place, s.act_b, s.act_b), place)(cache, from_BT, to_BT)

    def put_rows(self, cache: Cache, rows_F: Int[Array, " F"], other: Cache) -> Cache:
        """The rows of another cache put into rows `rows_F` of this one; numbers that are no row's drop theirs. Layer by
        layer: every device is shown one layer of all of them, and keeps those that are its own."""
        s, row_B = self.sharding, jnp.arange(cache.k_LBKHS.shape[1])
        heads_spec = s.cache_lbn and P(None, *s.cache_lbn[2:])
        row_B = row_B if s.cache_lbn is None else jax.reshard(row_B, s.act_b)

        def local(cache, layer, row_B, rows_F, k_FKHS, v_FKSC):
            return cache.with_rows(layer, rows_F - row_B[0], k_FKHS, v_FKSC)

        def put(layer, cache):
            k_FKHS, v_FKSC = (
                lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in (other.k_LBKHS, other.v_LBKSC)
            )
            if s.cache_lbn is not None:
                k_FKHS, v_FKSC = jax.reshard(k_FKHS, heads_spec), jax.reshard(v_FKSC, heads_spec)
            place = jax.tree.map(lambda _: s.cache_lbn, cache)
            on_device = on_shards(s, local, (place, P(), s.act_b, P(), heads_spec, heads_spec), place)
            return on_device(cache, layer, row_B, rows_F, k_FKHS, v_FKSC)

        return lax.fori_loop(0, self.config.num_hidden_layers, put, cache)

    def extend(
        self, cache: Cache, tokens_BT: Int[Array, "B T"], positions_BT: Int[Array, "B T"], head: str = "all",
        placement: Placement | None = None,
    ) -> tuple[Cache, Features]:  # fmt: skip
        """New tokens at given positions (>= the number of slots marks padding). The cache is donated.

        head: "all" gives argmax and logsumexp of every position; "end" of each row's last real position alone, and
            zeros before it (prefill: the head is the dearest part and nobody asks what follows a prompt's middle).
        placement: of the nodes of a tree. Their scores are built whole, nodes times slots, so a tree is a few dozen
            nodes and not thousands.
        """
        return self._run(tokens_BT, positions_BT, None, cache, head, placement)

    def logits(self, last_BE: Float[Array, "B E"]) -> Float[Array, "B V"]:
        """Logits of post-norm last hidden states, at least float32, whole on every device."""
        with self.on_mesh():
            return _logits(last_BE, self.head(), self.sharding)

    def embedding(self) -> Float[Array, "V E"]:
        return cast(Array, self.state["embed"][...])

    def head(self) -> Float[Array, "V E"]:
        return cast(Array, self.state["embed" if self.config.tie_word_embeddings else "head"][...])

    def final_norm(self) -> Float[Array, " E"]:
        stored = cast(Array, self.state["norm"]["scale"][...])
        return stored.astype(jnp.float32) + self.config.norm_offset if self.config.norm_offset else stored


def build(
    config: DecoderConfig, groups: Sequence[Group], state: nnx.State, precision: Precision,
    mesh: jax.sharding.Mesh | None = None, sharding: Sharding = Sharding.none(),  # noqa: B008 (immutable)
) -> DecoderTarget:  # fmt: skip
    """A target around loaded weights."""
    graphdef, _ = abstract_state(config, groups, precision)
    spans = tuple((group.name, group.layers) for group in groups)
    return DecoderTarget(config, spans, graphdef, state, precision, mesh, sharding)
