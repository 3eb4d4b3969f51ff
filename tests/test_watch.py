"""What counts as waiting for data."""

from unittest.mock import Mock

from flaxdraft.train import meters


def test_the_pipeline_s_time_counts_and_the_caller_s_does_not(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(meters.time, "monotonic", lambda: now[0])

    def batches():
        for i in range(3):
            now[0] += 2
            yield i
        now[0] += 1  # to find that there are no more

    one = meters.Watch(Mock(), Mock(), Mock(), Mock(), 0)
    found = []
    for batch in one.waiting(batches()):
        found.append(batch)
        now[0] += 100
    assert found == [0, 1, 2]
    assert one.waited == 7
