"""Runs of several processes: equal to one, and equal to the undisturbed run whatever is done to them."""

import random
import signal
import time

import numpy as np
import pytest
from launch import finish

from flaxdraft.peers import RESTART

# Every batch is taken in two parts, weights are averaged, and 3 steps make an epoch: saves fall in the middle of one.
OPTIONS = ("train.accumulate=2", "train.ema_decay=0.9", "train.checkpoint_every=2", "train.batch_size=8")
STEPS = 20


@pytest.fixture(scope="module")
def undisturbed(runs):
    """Two processes, two devices each."""
    assert runs.run("undisturbed", 2, *OPTIONS, f"train.num_steps={STEPS}") == [0, 0]
    return runs


@pytest.fixture(scope="module")
def alone(runs):
    """One process, four devices."""
    assert runs.run("alone", 1, *OPTIONS, f"train.num_steps={STEPS}") == [0]
    return runs


def assert_same_run(runs, name, like):
    """Bit by bit: every logged loss and gradient norm, every held-out figure, and the averaged weights at the end."""
    for kind, names in (("train", ("step", "loss", "grad_norm", "tokens")), ("held_out", ("step", "loss", "accuracy"))):
        want, got = ([[line[n] for n in names] for line in runs.lines(run, kind)] for run in (like, name))
        assert got == want
    assert runs.digest(name) == runs.digest(like)


def test_two_processes_equal_one(undisturbed, alone):
    assert undisturbed.digest("undisturbed", 0) == undisturbed.digest("undisturbed", 1)
    np.testing.assert_allclose(undisturbed.losses("alone"), undisturbed.losses("undisturbed"), rtol=1e-5)
    assert [line["tokens"] for line in undisturbed.lines("alone")] == [
        line["tokens"] for line in undisturbed.lines("undisturbed")
    ]
    output = undisturbed.output("undisturbed", 1).read_text()
    assert "held-out" not in output  # process 0 alone speaks
    assert "held-out" in (undisturbed.draft("undisturbed") / "logs" / "process-1.log").read_text()


@pytest.mark.slow
def test_four_processes_equal_one(undisturbed):
    assert undisturbed.run("four", 4, *OPTIONS, f"train.num_steps={STEPS}") == [0] * 4
    np.testing.assert_allclose(undisturbed.losses("four"), undisturbed.losses("undisturbed"), rtol=1e-5)


class Lives:
    """One run, started again and again."""

    def __init__(self, runs, name: str, num_processes: int):
        self.runs, self.name, self.num_processes, self.saves_hit = runs, name, num_processes, 0

    def start(self):
        return self.runs.start(self.name, self.num_processes, *OPTIONS, f"train.num_steps={STEPS}")

    def last_step(self) -> int:
        lines = self.runs.lines(self.name) if (self.runs.draft(self.name) / "metrics.jsonl").exists() else []
        return lines[-1]["step"] if lines else 0

    def note_saves(self) -> None:
        """Whether what was just ended was writing a checkpoint."""
        folder = self.runs.draft(self.name) / "checkpoints"
        self.saves_hit += any(folder.glob("*.orbax-checkpoint-tmp*"))

    def output(self, index: int) -> str:
        return self.runs.output(self.name, index).read_text()

    def finish(self) -> None:
        assert finish(self.start()) == [0] * self.num_processes, self.output(0)[-3000:]


def test_a_lost_peer_a_stopped_one_and_a_request_to_stop(undisturbed):
    """Each in turn befalls one run, which ends as the undisturbed one did."""
    lives = Lives(undisturbed, "disturbed", 2)
    processes = lives.start()  # process 0 is killed: the other one says so, at once
    undisturbed.wait_for_step("disturbed", 4, processes)
    processes[0].kill()
    start = time.monotonic()
    assert processes[1].wait(60) == RESTART
    assert time.monotonic() - start < 20
    processes[0].wait()
    assert "process 0 on" in lives.output(1)
    assert "is gone: it was killed" in lives.output(1)

    processes = lives.start()  # process 1 is stopped: noticed by its silence
    undisturbed.wait_for_step("disturbed", lives.last_step() + 3, processes)
    processes[1].send_signal(signal.SIGSTOP)
    try:
        assert processes[0].wait(60) == RESTART
    finally:
        processes[1].kill()
        processes[1].wait()
    assert "has given no sign of life for 3 s" in lives.output(0)

    processes = lives.start()  # process 1 is asked to stop: both save the same step and end
    undisturbed.wait_for_step("disturbed", lives.last_step() + 3, processes)
    processes[1].send_signal(signal.SIGTERM)
    assert finish(processes) == [RESTART, RESTART]
    assert f"asked to stop: step {lives.last_step()} of {STEPS} is saved" in lives.output(0)
    assert undisturbed.checkpoints("disturbed")[-1] == lives.last_step()
    lives.finish()
    assert_same_run(undisturbed, "disturbed", "undisturbed")


@pytest.mark.parametrize(("num_processes", "num_kills"), [(1, 4), pytest.param(2, 10, marks=pytest.mark.slow)])
def test_kills_at_random_moments(request, num_processes, num_kills, record_property):
    """kill -9 of one process or of all; every restart goes on from a complete checkpoint. A run that is through is
    compared and begun anew."""
    like = {1: "alone", 2: "undisturbed"}[num_processes]
    runs, rng = request.getfixturevalue(like), random.Random(num_kills)
    lives, through = [Lives(runs, "killed-0", num_processes)], 0
    kills = 0
    while kills < num_kills:
        processes = lives[-1].start()
        _wait_at_random(rng, lives[-1], processes)
        if any(process.poll() is not None for process in processes):
            assert finish(processes) == [0] * num_processes, lives[-1].output(0)[-2000:]
            assert_same_run(runs, lives[-1].name, like)
            through += 1
            lives.append(Lives(runs, f"killed-{through}", num_processes))
            continue
        for process in processes if rng.random() < 0.5 else [rng.choice(processes)]:
            process.kill()
        codes = finish(processes)
        assert all(code in (-signal.SIGKILL, RESTART) for code in codes), (codes, lives[-1].output(0)[-2000:])
        lives[-1].note_saves()
        kills += 1
    lives[-1].finish()
    assert_same_run(runs, lives[-1].name, like)
    saves_hit = sum(one.saves_hit for one in lives)
    record_property("note", f"{kills} kills of {num_processes} processes, {saves_hit} during a save")


def _wait_at_random(rng: random.Random, lives: Lives, processes) -> None:
    """Up to a moment in the seconds of steps and saves, mostly; now and then to one while the run begins."""
    if rng.random() < 0.2:
        time.sleep(6 * rng.random())
        return
    goal = lives.last_step() + rng.randint(1, 6)
    while lives.last_step() < goal and all(process.poll() is None for process in processes):
        time.sleep(0.01)
    time.sleep(0.2 * rng.random())
