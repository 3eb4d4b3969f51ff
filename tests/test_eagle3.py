"""Supervision, unroll and sums of EAGLE-3."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closeness import assert_close
from eagle3 import algorithm as make_algorithm
from flax import nnx
from jitted import loss_sums, unroll
from test_contracts import DRAFTS, T, example, make_draft

from flaxdraft.algorithms.eagle3.objective import ChosenRows, supervised_rows, supervision
from flaxdraft.algorithms.eagle3.objective import unroll as algorithm_unroll
from flaxdraft.errors import InputError
from flaxdraft.interfaces import Batch
from flaxdraft.train.state import split_draft


def brute_force_supervision(assistant, segments, num_steps):
    num_batch, num = assistant.shape
    mask = np.zeros((num_steps, num_batch, num), bool)
    for j in range(num_steps):
        for b in range(num_batch):
            for p in range(num):
                rows = range(p + 1, p + 3 + j)
                mask[j, b, p] = segments[b, p] > 0 and all(
                    t < num and assistant[b, t] and segments[b, t] == segments[b, p] for t in rows
                )
    return mask


# A Qwen3 draft is a Llama draft but for the norms of its heads, which these do not see.
APART = [name for name in DRAFTS if name != "qwen3"]


@pytest.mark.parametrize("num_steps", [1, 3, 20])
def test_supervision_is_the_definition(num_steps):
    rng = np.random.default_rng(num_steps)
    assistant = rng.random((6, T)) > 0.3
    segments = np.sort(rng.integers(0, 4, (6, T)), axis=1)[:, ::-1].copy()
    want = brute_force_supervision(assistant, segments, num_steps)
    np.testing.assert_array_equal(supervision(assistant, segments, num_steps), want)
    np.testing.assert_array_equal(supervision(jnp.asarray(assistant), jnp.asarray(segments), num_steps), want)


def test_the_row_before_the_answer_is_trained_and_the_last_two_are_not():
    assistant = np.zeros((1, T), bool)
    assistant[0, 4:9] = True  # first a = 4, last b = 8
    mask = supervision(assistant, np.ones((1, T), np.int32), 4)
    assert [np.flatnonzero(step[0]).tolist() for step in mask] == [[3, 4, 5, 6], [3, 4, 5], [3, 4], [3]]
    assert supervised_rows(assistant, np.ones((1, T), np.int32)).tolist() == [[3, 4, 5, 6]]


@pytest.mark.parametrize("name", APART)
@pytest.mark.numeric
def test_computing_only_supervised_rows_changes_nothing(name):
    algorithm, draft, full = make_algorithm(3), make_draft(DRAFTS[name]), example()
    all_rows = dataclasses.replace(full, chosen=ChosenRows(jnp.tile(jnp.arange(T), (2, 1))))
    some = loss_sums(algorithm, draft, full)
    assert_close(some, loss_sums(algorithm, draft, all_rows), ulp=16, of="each")
    assert int(some.row_count_J[0]) == 2 * (T - 2 - 3)


@pytest.mark.parametrize("name", ["llama", pytest.param("mla", marks=pytest.mark.slow)])
def test_of_the_feed_forward_each_step_keeps_only_what_products_gave(name):
    draft, ex, num_steps = make_draft(DRAFTS[name], intermediate_size=47), example(), 3
    graphdef, params, frozen = split_draft(draft)

    def outputs(params):
        draft = nnx.merge(graphdef, params, frozen)
        return algorithm_unroll(draft, ex.batch, ex.features.taps_BTKE, ex.chosen, num_steps)

    _, pull = jax.vjp(outputs, params)
    at_rows = [x for x in jax.tree.leaves(pull) if x.size == 47 * ex.chosen.rows_BR.size]
    # gate and up; neither their product nor the gate's slope
    assert len(at_rows) == 2 * num_steps


@pytest.mark.parametrize("name", DRAFTS)
@pytest.mark.numeric
def test_packed_documents_equal_separate_ones(name):
    draft, ex = make_draft(DRAFTS[name]), example(2)
    batch = ex.batch
    packed = Batch(
        batch.tokens_BT.reshape(1, -1), batch.assistant_BT.reshape(1, -1),
        jnp.repeat(jnp.arange(1, 3), T)[None], batch.positions_BT.reshape(1, -1),
    )  # fmt: skip
    taps = ex.features.taps_BTKE
    rows = jnp.arange(2 * T)[None]
    apart = unroll(draft, batch, taps, jnp.tile(jnp.arange(T), (2, 1)), 3)
    together = unroll(draft, packed, taps.reshape(1, 2 * T, 3, -1), rows, 3)
    mask = supervision(packed.assistant_BT, packed.segments_BT, 3)
    for j in range(3):
        keep = np.asarray(mask[j])[0]
        assert keep.any()
        assert_close(np.asarray(together[j])[0][keep], np.asarray(apart[j]).reshape(2 * T, -1)[keep], ulp=32)


@pytest.mark.parametrize("name", DRAFTS)
@pytest.mark.numeric
def test_a_row_does_not_see_its_future(name):
    draft, ex = make_draft(DRAFTS[name]), example(1)
    rows, cut = jnp.arange(T)[None], 7
    later = dataclasses.replace(ex.batch, tokens_BT=ex.batch.tokens_BT.at[:, cut + 3 :].set(0))
    taps = ex.features.taps_BTKE.at[:, cut + 1 :].add(1.0)
    before = unroll(draft, ex.batch, ex.features.taps_BTKE, rows, 2)
    after = unroll(draft, later, taps, rows, 2)
    for j in range(2):  # row p reads tokens up to p + 1 + j, taps up to p
        assert_close(before[j][:, : cut + 1], after[j][:, : cut + 1], ulp=16)
        assert np.abs(before[j][:, cut + 1] - after[j][:, cut + 1]).max() > 1e-2


@pytest.mark.numeric
def test_sums_against_a_loop():
    draft, ex, algorithm = make_draft(DRAFTS["llama"]), example(), make_algorithm(3)
    sums = loss_sums(algorithm, draft, ex)
    hidden = unroll(draft, ex.batch, ex.features.taps_BTKE, jnp.tile(jnp.arange(T), (2, 1)), 3)
    to_draft = np.asarray(draft.draft_ids[...])
    mask = brute_force_supervision(np.asarray(ex.batch.assistant_BT), np.asarray(ex.batch.segments_BT), 3)
    last, head = np.asarray(ex.features.last_BTE, np.float64), np.asarray(ex.teacher, np.float64)
    argmax, logsumexp = np.asarray(ex.features.argmax_BT), np.asarray(ex.features.logsumexp_BT, np.float64)
    prefix = np.ones((2, T), bool)
    for j in range(3):
        loss = count = rows = hits = joint = 0
        accept = 0.0
        logits = np.asarray(draft.logits(hidden[j]), np.float64)
        for b in range(2):
            for p in range(T):
                if not mask[j, b, p]:
                    prefix[b, p] = False
                    continue
                rows += 1
                teacher = head @ last[b, p + 1 + j]
                q = np.exp(logits[b, p] - logits[b, p].max())
                q /= q.sum()
                accept += np.minimum(np.exp(teacher - logsumexp[b, p + 1 + j]), q).sum()
                best = to_draft[argmax[b, p + 1 + j]]
                hit = best >= 0 and logits[b, p].argmax() == best
                prefix[b, p] &= hit
                hits, joint = hits + hit, joint + prefix[b, p]
                if best >= 0:
                    weights = np.exp(teacher - teacher.max())
                    loss += -(weights / weights.sum() * np.log(q)).sum()
                    count += 1
        assert (rows, count, hits, joint) == tuple(
            int(x[j]) for x in (sums.row_count_J, sums.loss_count_J, sums.hit_J, sums.prefix_hit_J)
        )
        assert 0 < count < rows  # the case has rows outside the draft vocabulary
        assert_close([sums.loss_J[j], sums.expected_accept_J[j]], [loss, accept], ulp=32)


def test_unsupervised_rows_may_hold_nan_features():
    draft, ex, algorithm = make_draft(DRAFTS["llama"]), example(), make_algorithm(2)
    last = ex.features.last_BTE.at[:, :3].set(jnp.nan)
    broken = dataclasses.replace(ex, features=dataclasses.replace(ex.features, last_BTE=last))
    full = lambda e: dataclasses.replace(e, chosen=ChosenRows(jnp.tile(jnp.arange(T), (2, 1))))  # noqa: E731
    np.testing.assert_array_equal(
        loss_sums(algorithm, draft, full(ex)).loss_J, loss_sums(algorithm, draft, full(broken)).loss_J
    )


def test_taps_are_three_ascending_layers():
    tap_layers = make_algorithm(2).tap_layers
    assert tap_layers(8, None) == (1, 3, 4)
    assert tap_layers(8, (0, 3, 7)) == (0, 3, 7)
    for chosen in ((0, 1), (0, 1, 2, 3), (0, 1, 8), (-1, 1, 2), (2, 1, 3), (1, 1, 2)):
        with pytest.raises(InputError, match=r"target.tap_layers: \[.*\] are not three ascending layers of a 8-layer"):
            tap_layers(8, chosen)
    with pytest.raises(InputError, match=r"the default layers .* a target needs at least 4 layers for three taps"):
        tap_layers(3, None)


@pytest.mark.numeric
def test_mean_loss_divides_once():
    algorithm, draft = make_algorithm(3), make_draft(DRAFTS["llama"])
    one, two = (loss_sums(algorithm, draft, example(b)) for b in (1, 3))
    weights = 0.8 ** np.arange(3)
    want = (weights * (one.loss_J + two.loss_J)).sum() / (weights * (one.loss_count_J + two.loss_count_J)).sum()
    numerator, count = (one + two).terms()
    assert_close(numerator / count, want, ulp=8)


@pytest.mark.parametrize(("attention", "text"), [("auto", "attention dense,"), ("chunked", r"chunked \(16 x 16\)")])
def test_the_log_names_how_sums_are_computed(attention, text):
    algorithm = make_algorithm(3, attention=attention, attention_chunk=16, remat="projections")
    described = algorithm.describe(make_draft(DRAFTS["mla"]), example())
    assert re.search(text, described)
    assert re.search("loss in chunks of 512 rows, rematerialisation projections", described)
