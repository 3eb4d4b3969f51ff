"""Padding lies beyond the cache's last slot, and turns nobody: dynamic NTK stretches by real positions alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_contracts import DRAFTS, V, make_draft

from flaxdraft import targets
from flaxdraft.algorithms.eagle3.drafter import ChainDrafter
from flaxdraft.data import store_capture
from flaxdraft.data.templates import Rendered
from flaxdraft.devices.sharding import Sharding
from flaxdraft.evaluate import differences, walk_answers
from flaxdraft.nn.precision import Precision
from flaxdraft.nn.rope import RopeConfig, cos_sin, turning_positions
from flaxdraft.targets import decoder, llama

WINDOW, SLOTS = 16, 64
PLAIN = RopeConfig("default", 10.0, WINDOW)
DYNAMIC = RopeConfig("dynamic", 10.0, WINDOW, factor=4.0)  # the same within its window
PROMPTS = [[5, 9, 30, 7, 8], [40, 41, 6, 50, 51, 52, 53, 9, 9, 4, 3, 8], []]
TOKENS = np.array([prompt + [0] * (12 - len(prompt)) for prompt in PROMPTS], np.int32)
REAL = np.arange(12)[None] < np.array([[len(prompt)] for prompt in PROMPTS])
POSITIONS = np.where(REAL, np.arange(12, dtype=np.int32)[None], SLOTS)


def test_the_farthest_real_position_stretches_the_angles_of_all():
    alone, padded = (jnp.asarray([[0, 7, end]]) for end in (3, SLOTS))
    for real, want in ((10, PLAIN), (40, DYNAMIC)):
        given, others = (jnp.concatenate([x, jnp.full((1, 3), real)]) for x in (padded, alone))
        got = np.stack(cos_sin(DYNAMIC, 8, turning_positions(given, SLOTS)))
        np.testing.assert_array_equal(got[:, :, :2], np.stack(cos_sin(want, 8, others))[:, :, :2])
    assert not np.array_equal(cos_sin(DYNAMIC, 8, others), cos_sin(PLAIN, 8, others))


def test_a_target_reads_padded_prompts_as_if_nothing_stood_behind_them(tiny_gguf):
    model = targets.from_pretrained(str(tiny_gguf)).model

    def taps(rope):
        config = dataclasses.replace(model.config, rope=rope)
        groups = llama.groups(config, Precision(), Sharding.none())
        other = decoder.build(config, groups, model.state, Precision())
        return np.asarray(other.extend(other.new_cache(3, SLOTS), TOKENS, POSITIONS, "end")[1].taps_BTKE)[REAL]

    np.testing.assert_allclose(taps(DYNAMIC), taps(PLAIN), atol=1e-5)


class _ReadError(Exception):
    """Holds the batch that a target is to read."""


class Reader:
    """A target, as far as it is asked to read."""

    row_multiple = 1

    def features(self, batch):
        raise _ReadError(batch)


TEXTS = PROMPTS[:2]
ROWS = [Rendered(np.array(text), np.ones(len(text), bool)) for text in TEXTS]


@pytest.mark.parametrize("read", [
    lambda target: store_capture._read(target, ROWS, [0, 1]),
    lambda target: walk_answers.featured(target, [(text, 1) for text in TEXTS], 4, 32),
    lambda target: differences._logits_of(target, TEXTS, 4),
], ids=["captures", "walks", "differences"])  # fmt: skip
def test_whole_texts_are_read_as_if_nothing_stood_behind_them(read):
    """Without a cache: no position is farther than those of the texts."""
    with pytest.raises(_ReadError) as found:
        read(Reader())
    (batch,) = found.value.args
    assert batch.tokens_BT.shape[1] > 12
    for i, text in enumerate(TEXTS):
        assert batch.tokens_BT[i, : len(text)].tolist() == text
        assert batch.positions_BT[i, : len(text)].tolist() == [*range(len(text))]
        assert batch.segments_BT[i].sum() == len(text)
    assert batch.positions_BT.max() == 11
    assert not batch.segments_BT[2:].any()


@pytest.mark.parametrize("name", DRAFTS)
def test_a_draft_does_too(name):
    """A chain drafts at real positions beside rows that are done, which lie beyond the last slot."""
    states = np.random.default_rng(0).normal(size=(3, 12, 3, 32)).astype(np.float32)
    last_B = jnp.asarray([4, 11, 0])

    @jax.jit
    def drafted(graphdef, state):
        draft = nnx.merge(graphdef, state)
        drafter, tokens_BT = ChainDrafter(), jnp.asarray(TOKENS % V)
        state = drafter.start(draft, 3, SLOTS)
        state = drafter.read(draft, state, states, tokens_BT, jnp.asarray(POSITIONS), last_B)
        newest_B = jnp.where(last_B > 0, last_B + 1, SLOTS)
        greedy = lambda logits_BW, j: (jnp.argmax(logits_BW, axis=-1).astype(jnp.int32), logits_BW)  # noqa: E731
        _, proposal = drafter.propose(draft, state, newest_B, jnp.zeros(3, jnp.int32), 4, greedy)
        return state.hidden_BD, proposal.q_BQW

    (hidden, logits), (plain_hidden, plain_logits) = (
        drafted(*nnx.split(make_draft(DRAFTS[name], rope=rope))) for rope in (DYNAMIC, PLAIN)
    )
    np.testing.assert_allclose(hidden[:2], plain_hidden[:2], atol=1e-5)
    np.testing.assert_allclose(logits[:2], plain_logits[:2], atol=1e-5)
