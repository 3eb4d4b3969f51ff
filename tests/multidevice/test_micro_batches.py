"""Accumulation: micro-batches are one big batch. (How often gradients cross devices: test_meshes.py)"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closeness import assert_close
from flax import nnx
from training import ALGORITHM, host_batch, setup

from flaxdraft.train.step import summed_gradients

pytestmark = pytest.mark.numeric


def gradients(num_microbatches: int):
    """Loss and gradients of one global batch on one device."""
    host, head_WE = host_batch()
    run = setup("llama", {}, head_WE)

    def of_sums(params, frozen, example):
        def terms(params, part):
            sums = ALGORITHM.sums(nnx.merge(run.graphdef, params, frozen), part, ALGORITHM.first_carry())
            return sums.terms()[0], sums

        sums, grads = summed_gradients(terms, params, example, num_microbatches, jnp.float32)
        numerator, count = sums.terms()
        return numerator / count, sums, grads

    with jax.set_mesh(run.mesh):
        return jax.device_get(jax.jit(of_sums)(run.params, run.frozen, run.example(host)))


def test_micro_batches_equal_one_big_batch():
    """Rows are supervised from different places on, one not at all: means of means would differ."""
    loss, sums, grads = gradients(1)
    split_loss, split_sums, split_grads = gradients(4)
    assert_close(split_loss, loss, ulp=8)
    for name in ("loss_count_J", "row_count_J", "hit_J", "prefix_hit_J"):
        np.testing.assert_array_equal(getattr(split_sums, name), getattr(sums, name))
    assert_close(split_grads, grads, ulp=8, of="norm")
