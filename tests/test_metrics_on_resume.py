"""The figures of steps that are trained again are written once."""

import pytest

from flaxdraft.train.metrics_log import MetricsLog, read_metrics


@pytest.mark.parametrize(("start", "kept"), [(4, [0, 2, 4]), (6, [0, 2, 4, 6]), (0, [])])
def test_lines_behind_the_step_from_which_a_run_goes_on_are_left_out(tmp_path, start, kept):
    """It was killed behind its last checkpoint, of step 4; or begins anew."""
    with MetricsLog(tmp_path, 0) as log:
        for step in (0, 2, 4, 6):
            log.write(step, "train", {"loss": 2.5})
    with MetricsLog(tmp_path, start) as log:
        log.write(8, "train", {"loss": 2.0})
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [*kept, 8]
