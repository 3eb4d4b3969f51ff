"""A draft run as engines run it (prefill in pieces, draft steps against a KV cache, the rows of accepted tokens
written again) gives the unroll's logits."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closeness import assert_close
from flax import nnx
from jitted import unroll
from test_contracts import DRAFTS, V, make_draft

from flaxdraft.algorithms.eagle3.drafter import ChainDrafter, cached_layer
from flaxdraft.interfaces import Batch

B, T, CHAIN = 2, 20, 4
WIDTH = 8  # rows of one extension, padded: one compile
SLOTS = T + CHAIN
DRAFTER = ChainDrafter()
VARIANTS = {"3.0": {}, "3.1": {"fc_norm": True, "norm_output": True}}
QUICK = {("3.0", "llama"), ("3.1", "mla")}
CASES = [
    pytest.param(name, fields, marks=[] if (version, name) in QUICK else pytest.mark.slow, id=f"{version}-{name}")
    for version, fields in VARIANTS.items() for name in DRAFTS
]  # fmt: skip


@partial(jax.jit, static_argnames="graphdef")
def draft_step(graphdef, state, cache, tokens_B1, hidden_B1D, positions_B1):
    draft = nnx.merge(graphdef, state)
    return cached_layer(draft, cache, draft.embed(tokens_B1), hidden_B1D, positions_B1)


@partial(jax.jit, static_argnames="graphdef")
def extend(graphdef, state, *rest):
    return DRAFTER.read(nnx.merge(graphdef, state), *rest)


@partial(jax.jit, static_argnames="graphdef")
def propose(graphdef, state, drafting, row_B):
    def highest(logits_BW, j):
        return jnp.argmax(logits_BW, axis=-1).astype(jnp.int32), None

    draft = nnx.merge(graphdef, state)
    # The newest token, which the row has read already, is not looked at again.
    _, proposal = DRAFTER.propose(draft, drafting, row_B + 1, row_B, CHAIN, highest)
    return draft.target_ids[...][proposal.ids_BQ]


@nnx.jit
def logits_of(draft, hidden):
    return draft.logits(hidden)


def randomize(draft):
    """Weights of unit gain and norms that are not all ones, in place: logits are of order one."""
    rng = np.random.default_rng(0)
    params = nnx.state(draft, nnx.Param)
    for path, variable in nnx.to_flat_state(params):
        noise = rng.normal(size=variable[...].shape)
        scaled = 1 + 0.3 * noise if path[-1] == "scale" else noise / np.sqrt(noise.shape[0])
        variable[...] = jnp.asarray(scaled, jnp.float32)
    nnx.update(draft, params)
    draft.embed_tokens[...] = jnp.asarray(rng.normal(size=draft.embed_tokens[...].shape), jnp.float32)
    return draft


class Engine:
    """A draft with its cache on teacher-forced rows: row p holds the tapped states of p and the token p + 1."""

    def __init__(self, draft, tokens_BT, taps_BTKE):
        self.parts = nnx.split(draft)
        self.tokens_BT, self.taps_BTKE = tokens_BT, taps_BTKE
        self.drafting = DRAFTER.start(draft, B, SLOTS)

    def extend(self, start_B, end_B):
        """Rows start..end (inclusive) of each batch entry from real states; what is left over is padding."""
        at = start_B[:, None] + np.arange(WIDTH)
        positions = np.where(at <= end_B[:, None], at, SLOTS)
        at = np.minimum(at, T - 2)
        taps = jnp.asarray(np.take_along_axis(self.taps_BTKE, at[:, :, None, None], axis=1))
        tokens = jnp.asarray(np.take_along_axis(self.tokens_BT, at + 1, axis=1))
        self.drafting = extend(*self.parts, self.drafting, taps, tokens, jnp.asarray(positions), end_B - start_B)

    def chain(self, row_B):
        """[CHAIN, B, D]: the states of a chain that begins at `row_B`, whose own state `extend` has left."""
        cache, hidden_BD = self.drafting.cache, self.drafting.hidden_BD
        hidden, out = hidden_BD[:, None], [hidden_BD]
        for j in range(1, CHAIN):
            tokens = jnp.asarray(np.take_along_axis(self.tokens_BT, row_B[:, None] + 1 + j, axis=1))
            cache, hidden = draft_step(*self.parts, cache, tokens, hidden, jnp.asarray(row_B[:, None] + j))
            out.append(hidden[:, 0])
        self.drafting = dataclasses.replace(self.drafting, cache=cache)
        return jnp.stack(out)


def unrolled(draft, tokens_BT, taps_BTKE, row_B):
    """[CHAIN, B, D]: the unroll's states at the same rows."""
    positions = jnp.tile(jnp.arange(T), (B, 1))
    batch = Batch(jnp.asarray(tokens_BT), jnp.ones((B, T), bool), jnp.ones((B, T), jnp.int32), positions)
    return jnp.stack(unroll(draft, batch, jnp.asarray(taps_BTKE), jnp.asarray(row_B[:, None]), CHAIN))[:, :, 0]


@pytest.mark.numeric
@pytest.mark.parametrize(("name", "fields"), CASES)
def test_an_engine_gives_the_unrolls_logits(name, fields):
    draft = randomize(make_draft(DRAFTS[name], **fields))
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, V, (B, T)).astype(np.int32)
    taps = rng.normal(size=(B, T, 3, 32)).astype(np.float32)
    engine = Engine(draft, tokens, taps)
    row = np.array([5, 8])  # the last row of each prompt
    engine.extend(np.zeros(B, int), np.array([3, 6]))  # a prefill in two pieces, ragged
    engine.extend(np.array([4, 7]), row)
    for accepted in (np.array([3, 1]), np.array([1, 4])):
        want = logits_of(draft, unrolled(draft, tokens, taps, row))
        got = logits_of(draft, engine.chain(row))
        assert 0.5 < float(jnp.std(want)) < 5
        assert_close(got, want, ulp=80)
        # Verified rows replace what the chain wrote; the rest of the chain is stale and must not be seen.
        engine.extend(row + 1, row + accepted)
        row = row + accepted

    # The chain that real decoding proposes is the unroll's greedy choice on the row that it has written itself.
    proposed = propose(*engine.parts, engine.drafting, jnp.asarray(row))
    for b in range(B):
        tokens[b, row[b] + 2 : row[b] + 2 + CHAIN] = np.asarray(proposed)[b]
    choice = jnp.argmax(logits_of(draft, unrolled(draft, tokens, taps, row)), axis=-1)
    np.testing.assert_array_equal(draft.target_ids[...][choice].T, proposed)
