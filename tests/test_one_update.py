"""One optimizer update is the formula that the configuration's fields stand for, and the step divides once."""

import jax.numpy as jnp
import numpy as np
import pytest
from eagle3 import algorithm as make_algorithm

from flaxdraft.config import TrainConfig
from flaxdraft.interfaces import Example
from flaxdraft.ops.step_sums import StepSums
from flaxdraft.train import step as step_module
from flaxdraft.train.optimizer import optimizer
from flaxdraft.train.state import init_state

RATE, BETAS, EPS, DECAY, CLIP = 0.5, (0.6, 0.9), 0.05, 0.3, 0.7
CONFIG = TrainConfig(
    num_steps=10, learning_rate=RATE, schedule="constant", warmup_ratio=0.1, betas=list(BETAS), eps=EPS,
    weight_decay=DECAY, clip_norm=CLIP,
)  # fmt: skip


def adamw_updates(gradients: list[np.ndarray], weight: np.ndarray, rates: list[float]) -> list[np.ndarray]:
    """arXiv 1711.05101, algorithm 2, of gradients that are clipped by their norm."""
    mean, square, updates = np.zeros_like(weight), np.zeros_like(weight), []
    for t, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), 1):
        gradient = gradient * min(1, CLIP / np.linalg.norm(gradient))
        mean = BETAS[0] * mean + (1 - BETAS[0]) * gradient
        square = BETAS[1] * square + (1 - BETAS[1]) * gradient**2
        unbiased = mean / (1 - BETAS[0] ** t), square / (1 - BETAS[1] ** t)
        updates.append(-rate * (unbiased[0] / (np.sqrt(unbiased[1]) + EPS) + DECAY * weight))
    return updates


def test_updates_are_those_of_adamw_after_clipping():
    """One gradient is clipped, one is not; the rate is 0 at first and then at its peak."""
    rng = np.random.default_rng(0)
    weight, gradients = rng.normal(size=(3, 4)), [rng.normal(size=(3, 4)) * scale for scale in (1, 0.1, 1)]
    tx = optimizer(CONFIG)
    state, got = tx.init({"w": jnp.asarray(weight, jnp.float32)}), []
    for gradient in gradients:
        updates, state = tx.update({"w": jnp.asarray(gradient, jnp.float32)}, state, {"w": jnp.asarray(weight)})
        got.append(updates["w"])
    for one, other in zip(got, adamw_updates(gradients, weight, [0, RATE, RATE]), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("num_microbatches", [1, 2])
def test_summed_gradients_are_divided_by_the_count_alone(num_microbatches, monkeypatch):
    """However many micro-batches they were summed over."""
    gradient, counts, algorithm = np.array([[3.0, 4.0]]), np.array([4, 2]), make_algorithm(2, step_decay=0.5)
    none_J = jnp.zeros(2, jnp.int32)
    parts = jnp.array([8.0, 2.0]), jnp.asarray(counts), none_J, none_J, none_J, jnp.zeros(2)
    sums = StepSums(*parts, algorithm.step_weights)
    monkeypatch.setattr(step_module, "summed_gradients", lambda *args: (sums, {"w": jnp.asarray(gradient)}))
    params, tx = {"w": jnp.ones((1, 2))}, optimizer(CONFIG)
    step = step_module.make_train_step(None, algorithm, tx, jnp.float32, num_microbatches)
    _, metrics = step(init_state(params, tx, algorithm), None, Example(None, None, None))
    total = counts @ np.array(algorithm.step_weights)
    assert float(metrics.grad_norm) == pytest.approx(5 / total)
    assert float(metrics.loss) == pytest.approx((8 + 0.5 * 2) / total)
