"""Accumulation: micro-batches are one big batch. (How often gradients cross devices: test_meshes.py)"""

import dataclasses

import jax
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
            sums = ALGORITHM.loss_sums(nnx.merge(run.graphdef, params, frozen), part)
            return ALGORITHM.loss_terms(sums)[0], sums

        sums, grads = summed_gradients(terms, params, example, num_microbatches)
        return ALGORITHM.mean_loss(sums), sums, grads

    with jax.set_mesh(run.mesh):
        accepted = jax.numpy.zeros(ALGORITHM.num_steps)
        example = dataclasses.replace(run.example(host), accepted_J=accepted)
        return jax.device_get(jax.jit(of_sums)(run.params, run.frozen, example))


def test_micro_batches_equal_one_big_batch():
    """Rows are supervised from different places on, one not at all: means of means would differ."""
    loss, sums, grads = gradients(1)
    split_loss, split_sums, split_grads = gradients(4)
    assert_close(split_loss, loss, ulp=8)
    for name in ("loss_count_J", "row_count_J", "hit_J", "prefix_hit_J"):
        np.testing.assert_array_equal(getattr(split_sums, name), getattr(sums, name))
    assert_close(split_grads, grads, ulp=8, of="norm")
