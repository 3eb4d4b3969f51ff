"""The chunked loss against its plain reference: sums, hits, gradients, for every objective."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closeness import assert_close

from flaxdraft.algorithms.eagle3.objective import supervision
from flaxdraft.ops import distillation_reference as reference
from flaxdraft.ops.distillation import DistillOptions, TeacherStates, distill
from flaxdraft.ops.objectives import LK_ETA, OBJECTIVES, TeacherRows, acceptance
from flaxdraft.ops.row_signals import row_signals

pytestmark = pytest.mark.numeric

B, R, J, D, E, W = 3, 14, 3, 8, 6, 12
WEIGHTS = tuple(0.8**j for j in range(J))
ACCEPTED = jnp.asarray([0.6, 0.3, 0.1])


def make(seed=0, batch=B):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    states, head = tuple(normal(batch, R, D) for _ in range(J)), normal(D, W)
    logsumexp, argmax = jnp.full((batch, R), 4.0), jnp.asarray(rng.integers(-1, W, (batch, R)), jnp.int32)
    teacher = TeacherStates(normal(batch, R, E), logsumexp, argmax)
    supervised = jnp.asarray(supervision(rng.random((batch, R)) < 0.9, np.ones((batch, R), int), J))
    return states, head, teacher, normal(W, E), supervised


def weighted(sums):
    return jnp.sum(jnp.asarray(WEIGHTS) * sums.loss_J)


def by_reference(objective, teacher, teacher_head, supervised):
    def loss(states, head):
        logits = jnp.einsum("bre,we->brw", teacher.last_BRE, teacher_head)
        rows = reference.Teacher(logits, teacher.logsumexp_BR, teacher.draft_argmax_BR)
        steps = [
            reference.step_signals(jnp.einsum("brd,dw->brw", x, head), rows, j, objective, ACCEPTED[j])
            for j, x in enumerate(states)
        ]
        sums = reference.sum_signals(steps, supervised, rows, WEIGHTS)
        return weighted(sums), sums

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


def by_chunks(objective, chunk, teacher, teacher_head, supervised):
    def loss(states, head):
        plan = DistillOptions(WEIGHTS, objective, chunk)
        sums, _ = distill(plan, states, head, teacher, teacher_head, supervised, ACCEPTED)
        return weighted(sums), sums

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("chunk", [4, 100])
def test_sums_and_gradients_are_the_references(objective, chunk):
    states, head, *rest = make()
    (_, want), want_grads = by_reference(objective, *rest)(states, head)
    (_, got), got_grads = by_chunks(objective, chunk, *rest)(states, head)
    for name in ("loss_count_J", "row_count_J", "hit_J", "prefix_hit_J"):
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name), err_msg=name)
    assert 0 < got.loss_count_J[0] < got.row_count_J[0]
    assert_close(got.loss_J, want.loss_J, ulp=16, of="each")
    assert_close(got.expected_accept_J, want.expected_accept_J, ulp=16, of="each")
    # A state's gradient goes through both logits, the softmax and the head; the head's adds up rows and steps. Chunks
    # add them up in another order.
    assert_close(got_grads[0], want_grads[0], summands=D + E + W + W, path="states")
    assert_close(got_grads[1], want_grads[1], summands=J * B * R, path="head")


def test_a_hit_is_what_argmax_says_with_equal_logits_too():
    logits = jnp.asarray(np.random.default_rng(0).integers(0, 3, (400, 5)), jnp.float32)
    token = jnp.asarray(np.random.default_rng(1).integers(-1, 5, 400), jnp.int32)
    rows = TeacherRows(logits, jnp.zeros(400), jnp.zeros(400), token)
    hit = row_signals("soft_cross_entropy", logits, rows, jnp.zeros(400), None).hit_Q
    assert 0 < hit.sum() < 400
    np.testing.assert_array_equal(hit, np.argmax(logits, axis=-1) == token)


def test_value_without_gradient_is_the_same():
    states, head, teacher, teacher_head, supervised = make()
    sums, hit = jax.jit(distill, static_argnums=0)(
        DistillOptions(WEIGHTS, chunk=4), states, head, teacher, teacher_head, supervised, ACCEPTED
    )
    (_, want), _ = by_chunks("soft_cross_entropy", 4, teacher, teacher_head, supervised)(states, head)
    assert_close(sums.loss_J, want.loss_J, ulp=8, of="each")
    np.testing.assert_array_equal(np.asarray(hit).sum(axis=(0, 1)), want.hit_J)


def test_any_other_use_of_the_loss_gives_nan_instead_of_a_wrong_gradient():
    states, head, teacher, teacher_head, supervised = make()
    plan = DistillOptions(WEIGHTS, chunk=64)

    def second_step(head):
        return distill(plan, states, head, teacher, teacher_head, supervised, ACCEPTED)[0].loss_J[1]

    assert np.isnan(jax.jit(jax.grad(second_step))(head)).all()


def test_nothing_supervised_gives_zero():
    states, head, teacher, teacher_head, supervised = make()
    (loss, sums), grads = by_chunks("lk_alpha", 4, teacher, teacher_head, jnp.zeros_like(supervised))(states, head)
    assert float(loss) == 0.0
    assert sums.row_count_J.tolist() == [0] * J
    assert all(not np.any(grad) for grad in jax.tree.leaves(grads))


def test_unsupervised_rows_may_hold_nan():
    states, head, teacher, teacher_head, supervised = make()
    idle = ~np.asarray(supervised).any(axis=0)
    assert idle.any()
    broken = tuple(jnp.where(idle[..., None], jnp.nan, x) for x in states)
    _, want = by_chunks("soft_cross_entropy", 4, teacher, teacher_head, supervised)(states, head)
    _, got = by_chunks("soft_cross_entropy", 4, teacher, teacher_head, supervised)(broken, head)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradients_stay_finite_where_the_teacher_gives_nothing(objective):
    """Teacher probabilities of exactly 0, and a row that accepts nothing at all."""
    logits = jnp.asarray([[0.0, 1.0, -200.0, 3.0], [300.0, 0.0, 0.0, 0.0], [1.0, 2.0, 3.0, 4.0]])
    known = jnp.asarray([[0.0, -jnp.inf, 0.0, -1e4], [-1e4, 0.0, 0.0, 0.0], [-1e4] * 4])
    teacher = TeacherRows(
        known, jax.nn.logsumexp(known, axis=-1), jnp.asarray([1.0, 2.0, 500.0]), jnp.asarray([0, 1, -1], jnp.int32)
    )
    value, grad = jax.value_and_grad(lambda logits: jnp.sum(OBJECTIVES[objective](logits, teacher, 0.5)))(logits)
    assert np.isfinite(value)
    assert np.isfinite(grad).all()


def test_objectives_on_numbers_by_hand():
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.2, 0.6])
    teacher = TeacherRows(jnp.log(jnp.asarray([p])), jnp.zeros(1), jnp.zeros(1), jnp.asarray([1]))
    value = {name: float(f(jnp.log(jnp.asarray([q])), teacher, 0.25)[0]) for name, f in OBJECTIVES.items()}
    alpha, share = 0.2 + 0.2 + 0.2, np.exp(-LK_ETA * 0.25)
    want = {
        "soft_cross_entropy": -(p * np.log(q)).sum(),
        "hard_label": -np.log(q[1]),
        "lk_alpha": -np.log(alpha),
        "lk_lambda": share * (p * np.log(p / q)).sum() + (1 - share) * (1 - alpha),
    }
    assert_close(value, {name: want[name] for name in OBJECTIVES}, ulp=16, dtype=np.float32)
    assert_close(acceptance(jnp.log(jnp.asarray([q])), teacher)[0], alpha, ulp=8)
