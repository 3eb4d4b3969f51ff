"""Meshes whose axes run over processes: each holds a part of every row (`sequence`), of every weight (`fsdp`, `tensor`)
or some of the rows whole."""

import math

import numpy as np
import pytest
from closeness import assert_close
from worker import train

OPTIONS = ("train.num_steps=6", "train.eval_every=3", "train.accumulate=2", "train.ema_decay=0.9")


@pytest.fixture(scope="module")
def one_device(runs):
    train(runs, "one-device", *OPTIONS, "mesh.data=1")
    return runs


@pytest.mark.parametrize(
    ("num_processes", "mesh"),
    [
        pytest.param(4, {"data": 2, "sequence": 2}, marks=pytest.mark.slow),
        pytest.param(4, {"fsdp": 2, "tensor": 2}, marks=pytest.mark.slow),
        *(
            pytest.param(2, mesh, marks=(pytest.mark.slow, pytest.mark.exhaustive))
            for mesh in ({"sequence": 2}, {"sequence": 4}, {"data": 2, "sequence": 2}, {"tensor": 2})
        ),
    ],
    ids=str,
)
def test_they_equal_one_device(one_device, num_processes, mesh):
    """Losses, counts, held-out figures and the weights at the end."""
    runs, devices = one_device, math.prod(mesh.values())
    name = "-".join(map(str, (num_processes, *mesh, *mesh.values())))
    overrides = [f"mesh.{axis}={mesh.get(axis, 1)}" for axis in ("data", "fsdp", "tensor", "sequence")]
    codes = runs.run(name, num_processes, *OPTIONS, *overrides, devices=devices)
    assert codes == [0] * num_processes, runs.said(name)
    runs.assert_agree(name, "one-device")
    for index in range(num_processes):
        assert_close(runs.weights(name, index), runs.weights("one-device"), ulp=80, dtype=np.float32)
