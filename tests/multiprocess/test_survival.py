"""Runs of several processes: equal to one, and equal to the undisturbed run whatever is done to them."""

import random
import re
import signal
import time

import pytest
from launch import finish
from worker import train

from flaxdraft.devices.watchdog import RESTART

# Every batch is taken in two parts, weights are averaged, and 3 steps make an epoch: saves fall in the middle of one.
STEPS = 20
OPTIONS = (
    "train.accumulate=2", "train.ema_decay=0.9", "train.checkpoint_every=2", "train.eval_every=10",
    f"train.num_steps={STEPS}",
)  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(runs):
    """Two processes, two devices each. The checkpoint of step 8, in the middle of the third epoch, stays."""
    assert runs.run("undisturbed", 2, *OPTIONS, "train.keep_every=8") == [0, 0], runs.said("undisturbed")
    return runs


@pytest.fixture(scope="module")
def alone(runs):
    """One process, four devices."""
    assert runs.run("alone", 1, *OPTIONS) == [0], runs.said("alone")
    return runs


def test_two_processes_equal_one(undisturbed):
    assert undisturbed.digest("undisturbed", 0) == undisturbed.digest("undisturbed", 1)
    train(undisturbed, "one-process", *OPTIONS, "mesh.data=4")
    undisturbed.assert_agree("one-process", "undisturbed")
    assert "held-out" not in undisturbed.said("undisturbed", 1)  # process 0 alone speaks
    assert "held-out" in (undisturbed.draft("undisturbed") / "logs" / "process-1.log").read_text()


@pytest.mark.slow
@pytest.mark.exhaustive  # four processes are compared with one device in test_meshes_over_processes.py
def test_four_processes_equal_one(undisturbed):
    assert undisturbed.run("four-as-one", 4, *OPTIONS) == [0] * 4, undisturbed.said("four-as-one")
    undisturbed.assert_agree("four-as-one", "undisturbed")


def test_one_process_goes_on_with_what_two_saved(undisturbed):
    """On eight devices, from the middle of an epoch, to the end that the two processes come to."""
    undisturbed.copy_until("undisturbed", "taken-over", 8)
    train(undisturbed, "taken-over", *OPTIONS, "train.keep_every=8", "mesh.data=8", "train.accumulate=1")
    undisturbed.assert_agree("taken-over", "undisturbed")


class Lives:
    """One run, started again and again."""

    def __init__(self, runs, name: str, num_processes: int, *overrides: str):
        self.runs, self.name, self.num_processes, self.overrides = runs, name, num_processes, overrides
        self.saves_hit = 0
        self._folder = runs.draft(name) / "checkpoints"
        self._complete: list[int] = []  # as the present life began
        self._stale: set = set()  # folders that an earlier life left behind
        self._said_before = 0

    def start(self):
        self._complete = self.runs.checkpoints(self.name)
        self._stale = {*self._half_written()}
        self._said_before = len(self.output(0)) if self.runs.output(self.name).exists() else 0
        return self.runs.start(self.name, self.num_processes, *OPTIONS, *self.overrides)

    def last_step(self) -> int:
        lines = self.runs.lines(self.name) if (self.runs.draft(self.name) / "metrics.jsonl").exists() else []
        return lines[-1]["step"] if lines else 0

    def is_saving(self) -> bool:
        """Whether this life has a checkpoint half written: now, or for good where the processes have ended."""
        return bool({*self._half_written()} - self._stale)

    def _half_written(self):
        return self._folder.glob("*.orbax-checkpoint-tmp*")

    def output(self, index: int) -> str:
        return self.runs.said(self.name, index)

    def has_begun(self) -> bool:
        return "documents in rows" in self.output(0)[self._said_before :]

    def ended(self) -> None:
        """Of the life that has just ended, however it did: it went on from the newest complete checkpoint."""
        begun = re.findall(r"resuming at step (\d+)", self.output(0)[self._said_before :])
        assert begun in ([], [str(self._complete[-1])] if self._complete else [])  # [] where it was ended before
        self.saves_hit += self.is_saving()

    def finish(self) -> None:
        assert finish(self.start()) == [0] * self.num_processes, self.output(0)[-3000:]
        self.ended()


def test_a_process_that_is_killed_while_it_saves(undisturbed):
    """The other one ends and says so; started again, the run ends as the undisturbed one."""
    lives = Lives(undisturbed, "killed", 2, "hosts.heartbeat_seconds=15")
    processes = lives.start()
    _wait_for_a_save(lives, processes, random.Random(0))
    processes[1].kill()
    assert finish(processes) == [RESTART, -signal.SIGKILL]
    lives.ended()
    lives.finish()
    undisturbed.assert_identical("killed", "undisturbed")


@pytest.mark.slow
def test_a_request_to_stop_and_a_stopped_peer(undisturbed):
    """Both befall one run, one after the other; it ends as the undisturbed one."""
    lives = Lives(undisturbed, "disturbed", 2, "hosts.heartbeat_seconds=15")
    processes = lives.start()  # process 1 is asked to stop: both save the same step and end
    undisturbed.wait_for_step("disturbed", 2, processes)
    processes[1].send_signal(signal.SIGTERM)
    assert finish(processes) == [RESTART, RESTART]
    assert f"asked to stop: step {lives.last_step()} of {STEPS} is saved" in lives.output(0)
    assert undisturbed.checkpoints("disturbed")[-1] == lives.last_step()
    lives.ended()

    processes = lives.start()  # process 1 is stopped: noticed by its silence
    undisturbed.wait_for_step("disturbed", lives.last_step() + 1, processes)
    processes[1].send_signal(signal.SIGSTOP)
    try:
        assert processes[0].wait(60) == RESTART
    finally:
        processes[1].kill()
        processes[1].wait()
    assert "has given no sign of life for 5 s" in lives.output(0)
    lives.ended()
    lives.finish()
    undisturbed.assert_identical("disturbed", "undisturbed")


MOMENTS = "begin", "save", "save", "step", "step"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_processes", "num_kills"),
    [(2, 4), *(pytest.param(*case, marks=pytest.mark.exhaustive) for case in ((1, 4), (2, 30)))],
)
def test_kills_at_random_moments(request, num_processes, num_kills, record_property):
    """kill -9 of one process or of all, in turn; every restart goes on from a complete checkpoint. A run that is
    through is compared and begun anew."""
    like = {1: "alone", 2: "undisturbed"}[num_processes]
    runs, rng = request.getfixturevalue(like), random.Random(num_kills)
    name = f"killed-{num_processes}-{num_kills}"
    lives, kills = [Lives(runs, f"{name}-0", num_processes)], 0
    while kills < num_kills:
        one, all_of_them = lives[-1], kills % 2 == 1
        processes = one.start()
        _wait_at_random(rng, MOMENTS[kills % len(MOMENTS)], one, processes)
        if any(process.poll() is not None for process in processes):
            assert finish(processes) == [0] * num_processes, one.output(0)[-2000:]
            one.ended()
            runs.assert_identical(one.name, like)
            lives.append(Lives(runs, f"{name}-{len(lives)}", num_processes))
            continue
        killed = processes if all_of_them else [rng.choice(processes)]
        for process in killed:
            process.kill()
        start = time.monotonic()
        codes = finish(processes)
        # The JAX runtime sees the end of process 0 too, and may be the first to end the others.
        others = {RESTART, -signal.SIGABRT} if processes[0] in killed else {RESTART}
        for process, code in zip(processes, codes, strict=True):
            assert code in ({-signal.SIGKILL} if process in killed else others), (codes, one.output(0)[-2000:])
        assert time.monotonic() - start < 60  # a second, on a quiet machine
        one.ended()
        kills += 1
    lives[-1].finish()
    runs.assert_identical(lives[-1].name, like)
    saves_hit = sum(one.saves_hit for one in lives)
    assert saves_hit
    record_property("note", f"{kills} kills of {num_processes} processes, {saves_hit} during a save")


def _wait_at_random(rng: random.Random, moment: str, lives: Lives, processes) -> None:
    """Up to a moment between the processes' finding each other and the first step, of the steps, or of a save."""

    if moment == "begin":
        _wait_until(lives.has_begun, processes)
        time.sleep(4 * rng.random())
    elif moment == "step":
        _wait_for_some_steps(lives, processes, rng)
        time.sleep(0.2 * rng.random())
    else:
        _wait_for_a_save(lives, processes, rng)


def _wait_until(condition, processes) -> None:
    while not condition() and all(process.poll() is None for process in processes):
        time.sleep(0.002)


def _wait_for_some_steps(lives: Lives, processes, rng: random.Random) -> None:
    goal = lives.last_step() + rng.randint(1, 3)
    _wait_until(lambda: lives.last_step() >= goal, processes)


def _wait_for_a_save(lives: Lives, processes, rng: random.Random) -> None:
    _wait_for_some_steps(lives, processes, rng)
    _wait_until(lives.is_saving, processes)
    time.sleep(0.05 * rng.random())
