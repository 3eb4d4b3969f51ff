"""The whole command on a mesh."""

import json
import shutil

import pytest
from test_end_to_end import call, finished, workspace  # noqa: F401 (fixtures)


@pytest.mark.parametrize(
    "mesh",
    [("mesh.fsdp=2", "mesh.tensor=2"), pytest.param(("mesh.data=2", "mesh.sequence=4"), marks=pytest.mark.slow)],
)
def test_the_whole_command(finished, workspace, tmp_path, mesh):  # noqa: F811 (fixtures)
    """Two micro-batches a step; held-out losses are those of the run on one device."""
    shutil.copytree(finished / "data", tmp_path / "data")
    assert call(workspace, f"output_dir={tmp_path}", *mesh, "train.accumulate=2") == 0
    lines = [
        [json.loads(line) for line in (out / "llama" / "metrics.jsonl").read_text().splitlines()]
        for out in (finished, tmp_path)
    ]
    want, got = ([line["loss"] for line in each if line["kind"] == "held_out"] for each in lines)
    assert got == pytest.approx(want, rel=1e-5)
    result = json.loads((tmp_path / "llama" / "evaluation.json").read_text())["result"]
    assert result["decoded"]["identical_answers"] == result["answers"] == 4
