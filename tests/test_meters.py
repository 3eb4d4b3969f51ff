"""What counts as waiting for data, and what a step's figures say."""

from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest

from flaxdraft.ops.step_sums import StepSums
from flaxdraft.train import meters
from flaxdraft.train.loop import _Run


def test_the_pipeline_s_time_counts_and_the_caller_s_does_not(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(meters.time, "monotonic", lambda: now[0])

    def batches():
        for i in range(3):
            now[0] += 2
            yield i
        now[0] += 1  # to find that there are no more

    one = meters.Meters(Mock(), Mock(), Mock(), Mock(), 0)
    found = []
    for batch in one.waiting(batches()):
        found.append(batch)
        now[0] += 100
    assert found == [0, 1, 2]
    assert one.waited == 7


METRICS = SimpleNamespace(
    loss=2.0, grad_norm=1.0,
    sums=StepSums(np.ones(2), np.full(2, 10), np.full(2, 10), np.array([5, 4]), np.array([5, 2]), np.ones(2), (1, 1)),
)  # fmt: skip


@pytest.mark.parametrize(("eval_every", "checkpoint_every"), [(3, 5), (12, 1), (2, 12), (5, 4)])
def test_tokens_a_second_are_those_of_training_whatever_comes_between_two_logs(
    monkeypatch, eval_every, checkpoint_every
):
    """Of 12 steps every second one logs. A step takes a second for 100 tokens, half of it waiting for data, the other
    half on the device, which nobody waits for before a log, an evaluation or a save."""
    now, unfinished = [0.0], [0.0]

    class Arrays:
        params = ema = None

        def block_until_ready(self):
            now[0] += unfinished[0]
            unfinished[0] = 0.0

    def away(seconds):
        Arrays().block_until_ready()  # whatever is read comes after the steps
        now[0] += seconds

    def evaluate(state):
        away(1000)
        return {"accept_length": 1.0, "loss": 1.0, "accuracy": [0.5]}

    def batches():
        while True:
            now[0] += 0.5
            yield "a batch"

    monkeypatch.setattr(meters.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(meters.host_reads, "read", lambda tree: (away(0), tree)[1])
    every = {"eval_every": eval_every, "checkpoint_every": checkpoint_every, "num_steps": 12}
    trainer = SimpleNamespace(config=SimpleNamespace(**every), vocab=None, record=lambda score: {}, resume=Mock())
    checkpoints = Mock()
    checkpoints.best_score.return_value = 9.0
    checkpoints.save = lambda *_: away(70)
    log = Mock()
    run = _Run(trainer, None, evaluate, checkpoints, log, None, Mock())
    one = meters.Meters(log, Mock(done=0), Mock(), Mock(), 0)
    for done, _ in zip(range(1, 13), one.waiting(batches()), strict=False):
        unfinished[0] += 0.5
        one.note(done - 1, METRICS)
        if done % 2 == 0:
            one.log({"tokens": (100 * done, 0)})
        run._evaluate_and_save(done, {"state": Arrays()}, one, done == 12)
    figures = [call.args[2] for call in log.write.call_args_list if call.args[1] == "train"]
    assert [figure["tokens"] for figure in figures] == [200, 400, 600, 800, 1000, 1200]
    assert [figure["tokens_per_second"] for figure in figures] == pytest.approx([100.0] * 6)
    assert [figure["data_wait"] for figure in figures] == pytest.approx([0.5] * 6)


def test_the_mean_over_rows_is_not_called_an_accept_length(monkeypatch):
    monkeypatch.setattr(meters.host_reads, "read", lambda tree: tree)
    progress = Mock(done=0)
    one = meters.Meters(Mock(), progress, Mock(), Mock(), 0)
    one.note(0, METRICS)
    one.log({"tokens": (100, 0)})
    line = progress.advance.call_args.args[1]
    assert "1 + mean accepted 1.70" in line
    assert "accept length" not in line
