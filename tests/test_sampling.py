"""Sampling draws from the distribution that it says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxdraft.ops.sampling import nucleus, sample

P = np.array([0.4, 0.3, 0.2, 0.1])


def draws(temperature, top_p, num=20_000):
    logits = jnp.tile(jnp.log(jnp.asarray(P)), (num, 1))
    keys = jax.vmap(jax.random.key)(jnp.arange(num))
    return np.bincount(sample(logits, keys, temperature, top_p), minlength=4) / num


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature(temperature):
    want = P ** (1 / temperature) / (P ** (1 / temperature)).sum()
    # Four deviations of a share of 20,000 draws.
    assert (np.abs(draws(temperature, 1.0) - want) < 4 * np.sqrt(want * (1 - want) / 20_000)).all()


@pytest.mark.parametrize(("top_p", "kept"), [(0.05, 1), (0.4, 1), (0.41, 2), (0.75, 3), (1.0, 4)])
def test_nucleus_keeps_the_fewest_tokens(top_p, kept):
    order = np.array([2, 0, 3, 1])
    mask = nucleus(jnp.log(jnp.asarray(P[order]))[None], top_p)[0]
    assert sorted(np.asarray(P[order])[np.asarray(mask)], reverse=True) == P[:kept].tolist()


def test_nucleus_is_renormalised():
    want = np.array([4 / 7, 3 / 7, 0, 0])
    found = draws(1.0, 0.6)
    assert (np.abs(found - want) < 4 * np.sqrt(0.25 / 20_000)).all()
    assert found[2:].tolist() == [0, 0]


def test_temperature_zero_is_greedy():
    assert draws(0.0, 1.0, num=10).tolist() == [1, 0, 0, 0]
