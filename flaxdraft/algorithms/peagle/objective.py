"""All depths in one pass (arXiv 2602.01469), without a mask over all pairs of elements.

Element (s, d) sees the text's rows of its document up to its anchor s, and of its own chain the depths 1..d. That is
EAGLE-3's suffix attention, a range of the text and a few keys of one's own, once for each depth; products with weights
are made over all elements of a layer together. It predicts x_{s+d+2}, whose teacher is the target's distribution
at s + d + 1.

Shape letters: B batch, T rows of the text, R elements of a depth, M of all depths, K tapped layers, D draft width,
E target width, W draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from flaxdraft.algorithms.eagle3.objective import UnrollOptions, visible_range
from flaxdraft.algorithms.eagle3.suffix_attention import Suffix, Way, suffix_attention
from flaxdraft.algorithms.peagle.depths import Depths
from flaxdraft.algorithms.peagle.draft import ParallelDraft
from flaxdraft.algorithms.peagle.sums import DepthSums
from flaxdraft.devices.sharding import spec_of
from flaxdraft.interfaces import Batch, Features
from flaxdraft.nn.self_attention import Heads
from flaxdraft.ops import distillation
from flaxdraft.ops.attention import KeyRange
from flaxdraft.ops.remat import POLICIES
from flaxdraft.ops.rows import take_rows
from flaxdraft.ops.step_sums import StepSums


class Places(NamedTuple):
    """Where the elements stand, depth by depth; those of depth 0 are rows of the text."""

    text_BT: Int[Array, "B T"]  # position of every row of the text
    positions: list[Int[Array, "B R"]]
    seen: list[KeyRange]  # of the text
    parents: tuple[Int[Array, "B R"], ...]  # see `Depths`


def places_of(batch: Batch, anchors: Sequence[Int[Array, "B R"]], parents: tuple) -> Places:
    """Of the elements behind these anchors, depth by depth."""
    positions = [take_rows(batch.positions_BT, at_BR) + depth for depth, at_BR in enumerate(anchors)]
    return Places(batch.positions_BT, positions, [visible_range(batch.segments_BT, at) for at in anchors], parents)


def attended(heads: Heads, text: Any, elements: list[Any], places: Places, way: Way) -> Float[Array, "B M N C"]:
    """One layer's attention of all elements.

    Args:
        text: what the layer's projections make of every row of the text.
        elements: the same of the elements of each depth.
    """
    k0, v0 = heads.key_value(text, places.text_BT)
    suffix, out = Suffix(), []
    for depth, (projected, positions_BR, seen) in enumerate(zip(elements, places.positions, places.seen, strict=True)):
        if depth > 1:  # the keys of the chains that reach this depth
            suffix = jax.tree.map(lambda x: take_rows(x, places.parents[depth - 1]), suffix)  # noqa: B023
        if depth > 0:
            suffix = suffix.longer(*heads.key_value(projected, positions_BR))
        q = heads.query(projected, positions_BR)
        out.append(suffix_attention(q, k0, v0, suffix, seen, heads.softmax_scale, way))
    return jnp.concatenate(out, axis=1)


def cut(x: Any, sizes: Sequence[int]) -> list[Any]:
    """Arrays [B, M, ...] cut into one [B, R, ...] a depth."""
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [jax.tree.map(lambda a: a[:, end - size : end], x) for size, end in zip(sizes, ends, strict=True)]  # noqa: B023


def states(
    draft: ParallelDraft, batch: Batch, taps_BTKE: Float[Array, "B T K E"], chosen: Depths, options: UnrollOptions
) -> Float[Array, "B M D"]:
    """The last layer's output at the chosen elements, depth after depth, before the final norm.

    The last layer computes depth 0 only where its output is asked for; the layers before compute it at every row.
    """
    num_batch, length = batch.tokens_BT.shape
    after_BT = jnp.pad(batch.tokens_BT[:, 1:], ((0, 0), (0, 1)))  # row p reads the token behind it
    all_BT = jnp.broadcast_to(jnp.arange(length)[None], (num_batch, length), out_sharding=_beside(batch.tokens_BT))
    sizes = [length, *(at_BR.shape[1] for at_BR in chosen.anchors[1:])]
    everywhere = places_of(batch, [all_BT, *chosen.anchors[1:]], chosen.parents)
    asked, layers = places_of(batch, chosen.anchors, chosen.parents), draft.further

    def taken(x: Any) -> Any:
        return jax.tree.map(lambda a: take_rows(a, chosen.anchors[0]), x)

    def run(heads: Heads, projected: list[Any], hidden: list[Any], finish: Any, is_last: bool) -> Any:
        """The output of a layer at all elements, in one array."""
        text = projected[0]
        if is_last:
            projected, hidden = [taken(text), *projected[1:]], [taken(hidden[0]), *hidden[1:]]
        out = attended(heads, text, projected, asked if is_last else everywhere, options.way)
        return finish(jnp.concatenate(hidden, axis=1), out)

    def first(hidden_BTD: Float[Array, "B T D"], masked_B1D: Float[Array, "B 1 D"], of_text: Any, of_mask: Any) -> Any:
        projected = [of_text, *(jax.tree.map(lambda x: _spread(x, size), of_mask) for size in sizes[1:])]  # noqa: B023
        hidden = [hidden_BTD, *(_spread(masked_B1D, size) for size in sizes[1:])]
        return run(draft.self_attn, projected, hidden, draft.finish, not layers)

    def further(i: int, hidden_BMD: Float[Array, "B M D"]) -> Any:
        layer = layers[i]
        projected = cut(layer.project(hidden_BMD), sizes)
        return run(layer.self_attn, projected, cut(hidden_BMD, sizes), layer.finish, i == len(layers) - 1)

    if options.remat != "none":
        first = jax.checkpoint(first, policy=POLICIES[options.remat])
        further = jax.checkpoint(further, policy=POLICIES[options.remat], static_argnums=0)
    hidden_BTD = draft.project(taps_BTKE)
    of_text = draft.projections(draft.token_projections(draft.embed(after_BT)), hidden_BTD)
    masked_B1D, of_mask = draft.masked(taps_BTKE)
    hidden_BMD = first(hidden_BTD, masked_B1D, of_text, of_mask)
    for i in range(len(layers)):
        hidden_BMD = further(i, hidden_BMD)
    return hidden_BMD


def _beside(x_BT: Array) -> Any:
    """How x lies on the mesh, for an array that is to lie beside it; None without a mesh."""
    spec = spec_of(x_BT)
    return spec if any(spec.partitions) else None


def _spread(x_B1F: Array, num: int) -> Array:
    """The one row of each batch entry, repeated."""
    shape = (x_B1F.shape[0], num, *x_B1F.shape[2:])
    return jnp.broadcast_to(x_B1F, shape, out_sharding=_beside(x_B1F))


def scored(
    options: distillation.DistillOptions, draft: ParallelDraft, hidden_BMD: Float[Array, "B M D"], chosen: Depths,
    trainable_BT: Bool[Array, "B T"], features: Features, head_WE: Float[Array, "W E"],
) -> tuple[DepthSums, list[Bool[Array, "B R"]]]:  # fmt: skip
    """The sums of all elements, and by depth which of them are right together with all before them in their chain.

    Args:
        trainable_BT: the places that are trained, whatever element stands there; see `depths.trainable`.
        head_WE: the target's rows of the draft vocabulary.
    """
    assert features.last_BTE is not None, "an example has the features that `needs` names"
    assert features.argmax_BT is not None, "an example has the features that `needs` names"
    assert features.logsumexp_BT is not None, "an example has the features that `needs` names"
    sizes, num_rows = [at_BR.shape[1] for at_BR in chosen.anchors], trainable_BT.shape[1]
    places = [jnp.where(at_BR < num_rows, at_BR + d, num_rows) for d, at_BR in enumerate(chosen.anchors)]
    place_BM = jnp.concatenate(places, axis=1)
    argmax_BM, logsumexp_BM = (take_rows(x, place_BM + 1) for x in (features.argmax_BT, features.logsumexp_BT))
    argmax_BM = draft.draft_ids[...].at[argmax_BM].get(out_sharding=draft.sharding.act_b and spec_of(argmax_BM))
    last_BME = take_rows(features.last_BTE, place_BM + 1).astype(head_WE.dtype)
    asked_BM = take_rows(trainable_BT, place_BM)
    # JAX types a custom_vjp that has options as giving anything.
    sums, hit_BM1 = cast(tuple[StepSums, Array], distillation.distill(
        options, (draft.head_input(hidden_BMD),), draft.head(),
        distillation.TeacherStates(last_BME, logsumexp_BM, argmax_BM), head_WE, asked_BM[None], jnp.zeros(1),
    ))  # fmt: skip
    asked, hit = cut(asked_BM, sizes), cut(hit_BM1[:, :, 0], sizes)
    chain, prefix = [asked[0]], [hit[0]]
    for depth, parent_BR in enumerate(chosen.parents, 1):
        chain.append(asked[depth] & take_rows(chain[-1], parent_BR))
        prefix.append(hit[depth] & take_rows(prefix[-1], parent_BR))
    counted = (jnp.stack([jnp.sum(x, dtype=jnp.int32) for x in found]) for found in (asked, hit, chain, prefix))
    return DepthSums(sums.loss_J[0], sums.loss_count_J[0], *counted, expected_accept=sums.expected_accept_J[0]), prefix
