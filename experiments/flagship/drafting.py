"""What a draft multiplies for one proposal of a conversation, counted in the traced program."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx


class Cost(NamedTuple):
    """Of one target pass."""

    flops: float  # of products with weights and of attention
    weights: float  # numbers of weights that are read, once for each time that they are used


def _add(one: Cost, two: Cost, times: int = 1) -> Cost:
    return Cost(one.flops + times * two.flops, one.weights + times * two.weights)


def of_jaxpr(jaxpr: Any) -> Cost:
    """Of every product in a program; a loop's, as often as it runs."""
    total = Cost(0.0, 0.0)
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), (batched, _) = equation.params["dimension_numbers"]
            left, right = (x.aval for x in equation.invars)
            width = math.prod(left.shape[i] for i in contracted)
            # One conversation's states are small: of two factors the larger one is the weight.
            read = 0.0 if batched else float(max(left.size, right.size))
            total = _add(total, Cost(2.0 * width * equation.outvars[0].aval.size, read))
        for value in jax.tree.leaves([*equation.params.values()], is_leaf=lambda x: hasattr(x, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                assert equation.primitive.name != "while" or not of_jaxpr(inner).flops, "nobody knows how often it runs"
                total = _add(total, of_jaxpr(inner), equation.params.get("length", 1))
    return total


def of_pass(draft: Any, drafter: Any, num_taps: int, width: int, num_tokens: int, num_slots: int = 256) -> Cost:
    """One conversation: the target's states of a pass are read, then `num_tokens` are proposed.

    Args:
        num_taps, width: of the target's states.
        num_slots: of the draft's cache, all of which attention reads.
    """
    graphdef, weights = nnx.split(draft)

    def proposed(weights, taps_BTKE):
        draft = nnx.merge(graphdef, weights)
        batch, length = taps_BTKE.shape[:2]
        ids_BT = jnp.zeros((batch, length), jnp.int32)
        newest_B = jnp.full((batch,), length, jnp.int32)
        state = drafter.start(draft, batch, num_slots)
        positions_BT = jnp.broadcast_to(jnp.arange(length), (batch, length))
        state = drafter.read(draft, state, taps_BTKE, ids_BT, positions_BT, newest_B - 1)
        choose = lambda logits_BW, j: (jnp.argmax(logits_BW, axis=-1), None)  # noqa: E731
        return drafter.propose(draft, state, newest_B, ids_BT[:, 0], num_tokens, choose)[1]

    taps_BTKE = jax.ShapeDtypeStruct((1, num_tokens + 1, num_taps, width), jnp.float32)
    return of_jaxpr(jax.make_jaxpr(proposed)(weights, taps_BTKE).jaxpr)
