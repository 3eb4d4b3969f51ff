"""Attention of blocks: chunked as dense as one plain softmax, for every sight; what each slot sees."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closeness import assert_close

from flaxdraft.algorithms.dflash.block_attention import Keys, Sight, Way, block_attention
from flaxdraft.ops.range_attention import Chunks

pytestmark = pytest.mark.numeric
B, T, S, N, K, H = 2, 14, 4, 4, 2, 6
# Two documents in the first row; a block at the very beginning, which sees no text, and padding in the second.
ANCHOR, FIRST = np.array([[3, 5, 9, 13], [0, 2, 11, T]]), np.array([[0, 0, 6, 6], [0, 0, 0, T]])
SIGHTS = {
    "full": Sight(S, causal=False, window=None),
    "causal": Sight(S, causal=True, window=None),
    "sliding": Sight(S, causal=True, window=3),
    "sliding both ways": Sight(S, causal=False, window=6),
}
SIGHTS["sliding, with sinks"] = SIGHTS["sliding"]
REST = ("causal", "sliding", "sliding both ways")


def visible(sight: Sight, b: int, a: int, k: int) -> tuple[list[int], list[int]]:
    """Rows of the text and slots of the block that a slot sees, by the rule's own words."""
    anchor, window = int(ANCHOR[b, a]), sight.window or 100
    text = [] if anchor == T else [j for j in range(int(FIRST[b, a]), anchor) if j >= anchor + k - (window - 1)]
    return text, [i for i in range(S) if (i <= k or not sight.causal) and i >= k - (window - 1)]


def make():
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    rows = ANCHOR.shape[1] * S
    return (
        normal(B, rows, N, H),
        Keys(normal(B, T, K, H), normal(B, T, K, H)),
        Keys(normal(B, rows, K, H), normal(B, rows, K, H)),
        2 + normal(N),
    )


def plain(q, text, own, sink, sight):
    """One softmax over all that is visible, masks and all; a sink is one more score, of a value of zeros."""
    rows = q.shape[1]
    mask = np.zeros((B, rows, T + rows), bool)
    for b, a, k in np.ndindex(B, rows // S, S):
        seen, inside = visible(sight, b, a, k)
        mask[b, a * S + k, seen] = True
        mask[b, a * S + k, [T + a * S + i for i in inside]] = True
    k, v = (jnp.repeat(jnp.concatenate(pair, axis=1), N // K, axis=2) for pair in zip(text, own, strict=True))
    scores = jnp.where(mask[:, None], jnp.einsum("brnh,btnh->bnrt", q, k) * 0.4, -jnp.inf)
    if sink is not None:
        column = jnp.broadcast_to(sink[None, :, None, None], (*scores.shape[:3], 1))
        scores, v = jnp.concatenate([scores, column], axis=-1), jnp.pad(v, ((0, 0), (0, 1), (0, 0), (0, 0)))
    return jnp.einsum("bnrt,btnh->brnh", jax.nn.softmax(scores, axis=-1), v)


@pytest.mark.parametrize(
    "name", ["full", "sliding, with sinks", *(pytest.param(x, marks=pytest.mark.slow) for x in REST)]
)
def test_value_and_gradients_are_those_of_one_softmax(name):
    sight, arrays = SIGHTS[name], make()
    arrays = arrays if "sinks" in name else (*arrays[:3], None)
    seen = sight.text(jnp.asarray(ANCHOR), jnp.asarray(FIRST))

    def loss_of(attention):
        def loss(arrays):
            out = attention(*arrays)
            return jnp.sum(jnp.sin(out) * jnp.arange(out.size).reshape(out.shape) / out.size), out

        return jax.jit(jax.value_and_grad(loss, has_aux=True))

    (_, want), want_grads = loss_of(lambda *arrays: plain(*arrays, sight))(arrays)
    for way in (Way("dense"), Way("chunked", Chunks(5, 4))):
        attention = lambda q, text, own, sink: block_attention(q, text, own, seen, sight, 0.4, way, sink)  # noqa: B023, E731
        (_, got), grads = loss_of(attention)(arrays)
        assert_close(got, want, summands=T)
        assert_close(grads, want_grads, summands=4 * T)


def test_no_scores_of_all_slots_by_the_whole_text_exist_in_chunks():
    """Of the 16 slots of a row by 70 keys, or by what these are filled up to."""
    sight, (q, text, own, _) = SIGHTS["full"], make()
    text = Keys(*(jnp.tile(x, (1, 5, 1, 1)) for x in text))
    seen = sight.text(jnp.asarray(ANCHOR), jnp.asarray(FIRST))

    def sizes(way):
        total = lambda q, text, own: jnp.sum(block_attention(q, text, own, seen, sight, 0.4, way))  # noqa: E731
        program = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(q, text, own).as_text()
        shapes = re.findall(r"tensor<([0-9x]+)xf32>", program)
        return [math.prod(map(int, shape.split("x"))) for shape in shapes]

    whole = B * N * 16 * 70
    assert max(sizes(Way("dense"))) >= whole
    assert max(sizes(Way("chunked", Chunks(4, 4)))) < whole / 2
