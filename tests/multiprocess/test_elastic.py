"""A run goes on: on the same devices to the bit, on others with the same global batches. By default two processes go
on to the bit after a kill, and one goes on with what two saved (test_survival.py)."""

import math

import pytest
from worker import train

# Every batch is taken in parts, weights are averaged. Of 24 steps three make an epoch: the checkpoint that runs go on
# from, that of step 4, lies in the middle of one, and 20 steps before the end.
FROM = 4
OPTIONS = (
    "train.num_steps=24", "train.accumulate=2", "train.ema_decay=0.9", "train.checkpoint_every=4",
    "train.keep_every=4",
)  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(runs):
    """Four devices of one process."""
    train(runs, "uninterrupted", *OPTIONS, "mesh.data=4")
    return runs


@pytest.fixture(scope="module")
def four_processes(runs):
    """Of one device each."""
    assert runs.run("four", 4, *OPTIONS) == [0] * 4, runs.said("four")
    return runs


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_same_devices_go_on_to_the_bit(uninterrupted):
    """Twenty more steps."""
    uninterrupted.copy_until("uninterrupted", "same", FROM)
    train(uninterrupted, "same", *OPTIONS, "mesh.data=4")
    uninterrupted.assert_identical("same", "uninterrupted")


@pytest.mark.slow
@pytest.mark.exhaustive
def test_other_devices_go_on(uninterrupted):
    """From the same step, with the same global batches; losses and held-out figures agree to rounding."""
    uninterrupted.copy_until("uninterrupted", "elastic", FROM)
    train(uninterrupted, "elastic", *OPTIONS, "mesh.data=2", "train.accumulate=4")
    uninterrupted.assert_agree("elastic", "uninterrupted")


@pytest.mark.slow
def test_four_processes_go_on_to_the_bit(four_processes):
    four_processes.copy_until("four", "four-again", FROM)
    assert four_processes.run("four-again", 4, *OPTIONS) == [0] * 4, four_processes.said("four-again")
    four_processes.assert_identical("four-again", "four")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_processes", "mesh"),
    [
        (2, {"data": 2}),
        (1, {"data": 2, "fsdp": 2, "tensor": 2}),
        *(
            pytest.param(*case, marks=pytest.mark.exhaustive)
            for case in ((1, {"data": 1}), (1, {"data": 8}), (8, {"data": 8}))
        ),
    ],
    ids=str,
)
def test_other_processes_go_on_with_what_four_saved(four_processes, num_processes, mesh):
    name, devices = f"four-then-{num_processes}-{'-'.join(mesh)}-{mesh['data']}", math.prod(mesh.values())
    four_processes.copy_until("four", name, FROM)
    options = [f"mesh.{axis}={size}" for axis, size in mesh.items()] + [f"train.accumulate={1 if devices == 8 else 2}"]
    codes = four_processes.run(name, num_processes, *OPTIONS, *options, devices=devices)
    assert codes == [0] * num_processes, four_processes.said(name)
    four_processes.assert_agree(name, "four")
