"""A run goes on with another number of devices, another layout or other micro-batches."""

import shutil

import numpy as np
import pytest
from worker import train

ELASTIC = ("train.keep_every=4", "train.checkpoint_every=4", "train.ema_decay=0.9")


@pytest.fixture(scope="module")
def uninterrupted(runs):
    """Four devices, 12 steps; the checkpoint of step 4 stays: the middle of the second epoch."""
    train(runs, "uninterrupted", *ELASTIC, "mesh.data=4")
    return runs


@pytest.mark.parametrize(
    "layout",
    [
        ("mesh.data=2", "train.accumulate=2"),
        pytest.param(("mesh.data=1",), marks=pytest.mark.slow),
        pytest.param(("mesh.data=8",), marks=pytest.mark.slow),
        pytest.param(("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"), marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_a_run_goes_on_with_other_devices(uninterrupted, layout):
    """From the same step, with the same global batches; losses and held-out figures agree to rounding."""
    name = "-".join(["elastic", *(part.partition("=")[2] for part in layout)])
    source = uninterrupted.draft("uninterrupted")
    folder = shutil.copytree(source, uninterrupted.draft(name), symlinks=True)
    for step in (8, 12):
        shutil.rmtree(folder / "checkpoints" / str(step))
    train(uninterrupted, name, *ELASTIC, *layout)
    for kind in ("train", "held_out"):
        want, got = (uninterrupted.lines(run, kind) for run in ("uninterrupted", name))
        assert [line["step"] for line in got] == [line["step"] for line in want]
        np.testing.assert_allclose([line["loss"] for line in got], [line["loss"] for line in want], rtol=1e-5)
    tokens = ([line["tokens"] for line in uninterrupted.lines(run)] for run in ("uninterrupted", name))
    assert next(tokens) == next(tokens)
