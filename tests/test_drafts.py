"""The EAGLE-3 surface of the draft modules: switches, the normed recurrence."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jitted import unroll
from test_contracts import DRAFTS, T, W, example, make_draft

both = pytest.mark.parametrize("name", DRAFTS)


def scaled_norms(draft, seed=0):
    """Norms that are not all ones, in place, so that a forgotten one is seen."""
    rng = np.random.default_rng(seed)
    params = nnx.state(draft, nnx.Param)
    for path, variable in nnx.to_flat_state(params):
        if path[-1] == "scale":
            variable[...] = jnp.asarray(1 + 0.3 * rng.normal(size=variable[...].shape), jnp.float32)
    nnx.update(draft, params)
    return draft


def rms_norm(x, scale, eps):
    x = np.asarray(x, np.float64)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * np.asarray(scale)


@both
def test_fc_norm_norms_each_tapped_state_by_itself(name):
    draft = scaled_norms(make_draft(DRAFTS[name], fc_norm=True))
    taps = np.asarray(example(1).features.taps_BT3E) * np.array([1.0, 10.0, 100.0])[:, None]
    norms = draft.fc_norm_low, draft.fc_norm_mid, draft.fc_norm_high
    eps = draft.config.rms_norm_eps
    normed = np.concatenate([rms_norm(taps[:, :, i], norm.scale[...], eps) for i, norm in enumerate(norms)], axis=-1)
    want = normed @ np.asarray(draft.fc.kernel[...], np.float64)
    np.testing.assert_allclose(draft.project(jnp.asarray(taps, jnp.float32)), want, atol=2e-6)


@both
def test_norm_output_carries_the_normed_state_and_norms_it_once(name):
    """The first step's logits are the same; the second step reads the normed state."""
    plain = scaled_norms(make_draft(DRAFTS[name]))
    normed = scaled_norms(make_draft(DRAFTS[name], norm_output=True))
    ex, rows = example(1), jnp.arange(T)[None]
    taps = ex.features.taps_BT3E
    before, after = (unroll(draft, ex.batch, taps, rows, 2) for draft in (plain, normed))
    want = rms_norm(before[0], plain.norm.scale[...], plain.config.rms_norm_eps)
    np.testing.assert_allclose(after[0], want, atol=2e-6)
    np.testing.assert_allclose(normed.logits(after[0]), plain.logits(before[0]), atol=2e-6)
    assert normed.logits(after[0]).shape == (1, T, W)
    assert np.abs(np.asarray(normed.logits(after[1]) - plain.logits(before[1]))).max() > 1e-3
