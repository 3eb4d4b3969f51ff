"""Processes that share every row of a batch (mesh axis `sequence`): each holds a part of its rows."""

import numpy as np
import pytest
from worker import train

OPTIONS = ("train.num_steps=6", "train.eval_every=3", "train.accumulate=2", "train.ema_decay=0.9")


@pytest.fixture(scope="module")
def one_device(runs):
    train(runs, "one-device", *OPTIONS, "mesh.data=1")
    return runs


@pytest.mark.parametrize(
    ("num_processes", "data", "sequence"),
    [
        (2, 1, 2),
        pytest.param(4, 2, 2, marks=pytest.mark.slow),
        pytest.param(2, 1, 4, marks=pytest.mark.slow),  # two parts of every row in each
        pytest.param(2, 2, 2, marks=pytest.mark.slow),  # half of the rows in each, whole
    ],
)
def test_they_equal_one_device(one_device, num_processes, data, sequence):
    """Losses, counts, held-out figures and the weights at the end."""
    runs, name = one_device, f"{num_processes}-share-{data}-{sequence}"
    mesh = (f"mesh.data={data}", f"mesh.sequence={sequence}")
    codes = runs.run(name, num_processes, *OPTIONS, *mesh, devices=data * sequence)
    assert codes == [0] * num_processes, runs.said(name)
    runs.assert_agree(name, "one-device")
    for index in range(num_processes):
        np.testing.assert_allclose(runs.weights(name, index), runs.weights("one-device"), rtol=1e-5)
