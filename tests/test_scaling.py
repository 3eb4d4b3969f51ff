"""The scaling study: its table is what its rows say, and its rows are what a program moves."""

import importlib
import json
from pathlib import Path

import jax
import pytest
from flax import nnx

FOLDER = Path(__file__).parents[1] / "experiments" / "scaling"


@pytest.fixture
def scaling(monkeypatch):
    for folder in (FOLDER, FOLDER.parent):
        monkeypatch.syspath_prepend(folder)
    return importlib.import_module("scaling")


def test_the_table_is_that_of_the_measured_rows(scaling):
    rows = [json.loads(line) for line in (FOLDER / "results.json").read_text().splitlines()]
    assert (FOLDER / "results.md").read_text().endswith(f"<!-- table -->\n\n{scaling.table(rows)}\n")
    found = {(row["case"], row["devices"], str(row["layout"])) for row in rows}
    wanted = [(case, n, str(shape)) for case in scaling.CASES for n in scaling.SIZES for shape in scaling.layouts(n)]
    assert found == set(wanted)


@pytest.mark.slow
def test_what_fsdp_moves_for_its_weights(scaling):
    """Each matrix gradient is reduced and scattered once, in float32."""
    measured = scaling.measure("tiny", {"fsdp": 8})
    draft = importlib.import_module("bench_cases").make_draft("tiny", jax.numpy.bfloat16)
    matrices = [x for x in jax.tree.leaves(nnx.state(draft, nnx.Param)) if x.ndim == 2]
    assert measured["kinds"]["reduce-scatter"] == (len(matrices), sum(4 * x.size for x in matrices))
