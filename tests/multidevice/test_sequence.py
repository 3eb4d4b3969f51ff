"""Long rows shared by four devices: loss and every gradient are those of one device."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closeness import assert_close
from eagle3 import algorithm as make_algorithm
from flax import nnx
from training import host_batch, setup

from flaxdraft.algorithms.eagle3.objective import ChosenRows, supervised_rows
from flaxdraft.interfaces import Batch
from flaxdraft.train.step import summed_gradients

LENGTH = 4096


def loss_and_gradients(name: str, shape: dict[str, int], remat: str = "none"):
    """Of one row of three documents, the first of which ends shortly behind a device's border."""
    algorithm = make_algorithm(3, attention="chunked", loss_chunk=256, attention_chunk=256, remat=remat)
    host, head_WE = host_batch(num_rows=1, length=LENGTH)
    segments = np.repeat([1, 2, 3], [1025, 2000, LENGTH - 3025])[None].astype(np.int32)
    positions = np.concatenate([np.arange(n) for n in (1025, 2000, LENGTH - 3025)])[None].astype(np.int32)
    assistant = np.random.default_rng(0).random((1, LENGTH)) < 0.97
    assistant[:, :40], assistant[:, 1000:1040] = False, True
    batch = Batch(host.batch.tokens_BT, assistant, segments, positions)
    rows_BR = supervised_rows(batch.assistant_BT, batch.segments_BT)
    assert {1021, 1022} <= set(rows_BR[0].tolist())  # supervised up to the first document's end
    host = dataclasses.replace(host, batch=batch, chosen=ChosenRows(rows_BR))
    heads = {"num_attention_heads": 2} | ({"num_key_value_heads": 2} if name == "llama" else {})
    run = setup(name, shape, head_WE, **heads)

    def of_sums(params, frozen, example):
        def terms(params, part):
            sums = algorithm.sums(nnx.merge(run.graphdef, params, frozen), part, algorithm.first_carry())
            return sums.terms()[0], sums

        sums, grads = summed_gradients(terms, params, example, 1, jnp.float32)
        numerator, count = sums.terms()
        return numerator / count, sums, grads

    with jax.set_mesh(run.mesh):
        example = run.example(host, algorithm)
        compiled = jax.jit(of_sums).lower(run.params, run.frozen, example).compile()
        return jax.device_get(compiled(run.params, run.frozen, example)), compiled.as_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "shape", "remat"),
    [
        ("llama", {"sequence": 4}, "none"),
        ("mla", {"sequence": 4}, "none"),
        ("mla", {"sequence": 4, "tensor": 2}, "projections"),
    ],
)
def test_four_devices_equal_one(name, shape, remat):
    (loss, sums, grads), _ = loss_and_gradients(name, {})
    (got_loss, got_sums, got_grads), text = loss_and_gradients(name, shape, remat)
    assert sums.row_count_J[0] > 3000
    assert_close(got_loss, loss, ulp=8)
    for field in ("loss_count_J", "row_count_J", "hit_J", "prefix_hit_J"):
        np.testing.assert_array_equal(getattr(got_sums, field), getattr(sums, field))
    assert_close(got_grads, grads, ulp=16, of="norm")
    # Of all that has a place in time, only the step-0 keys and values are ever put together.
    gathered = [tuple(map(int, dims.split(","))) for dims in re.findall(r"= f32\[([\d,]+)\][^=]* all-gather\(", text)]
    assert len([dims for dims in gathered if LENGTH in dims]) == 2, gathered
