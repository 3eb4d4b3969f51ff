"""DFlash2 through all that a run is: training, walking, decoding, export; going on to the bit in the middle of its
ramp; beginning from an export, features from a store."""

import json
import shutil

import jax
import numpy as np
import pytest
from test_dflash_runs import RUN as BLOCKS
from test_dflash_runs import said
from tiny_runs import call, make_workspace, metrics

from flaxdraft.algorithms.loading import from_pretrained
from flaxdraft.data.__main__ import main as data
from flaxdraft.errors import InputError
from flaxdraft.run.draft_source import open_draft

pytestmark = pytest.mark.slow

RUN = (*BLOCKS, "algorithm.name=dflash2", "algorithm.selector_warmup_ratio=0.34", "algorithm.selector_ramp_ratio=0.5")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, tiny_gguf):
    return make_workspace(tmp_path_factory.mktemp("dflash2"), tiny_gguf)


@pytest.fixture(scope="module")
def finished(workspace):
    assert call(workspace, *RUN) == 0
    return workspace / "out" / "qwen3"


def test_a_run_leaves_its_results(finished):
    result = json.loads((finished / "evaluation.json").read_text())["result"]
    assert result["decoded"]["identical_answers"] == result["answers"] == 4
    assert result["teacher_forced"]["answers_with_the_decoded_passes"] == 4
    assert result["decoded"]["accept_length"] == result["teacher_forced"]["accept_length"] > 1.0
    lines, held_out = metrics(finished, "train"), metrics(finished, "held_out")
    assert held_out[-1]["loss"] < held_out[0]["loss"]  # in which the selector's loss counts in full
    assert len(lines[-1]["accuracy"]) == 3
    for figures in (lines[-1], held_out[-1], result["teacher_forced"]):
        assert {"token_accuracy", "base_token_accuracy", "candidate_coverage"} <= set(figures)
    report = (finished / "report" / "report.md").read_text()
    assert "- draft: dflash2, qwen3" in report
    assert "candidate coverage" in report


def test_the_export_is_read_again_as_what_it_was(finished):
    exported, trained = from_pretrained(finished / "export"), open_draft(finished, step="best")
    jax.tree.map(np.testing.assert_array_equal, exported.params, trained.draft.params)
    assert exported.config == trained.draft.config
    card = (finished / "export" / "README.md").read_text()
    for text in ("DFlash2 draft for tiny.gguf", "DFLASH", '"method": "dflash"', "a choice among 16 candidates"):
        assert text in card


def test_a_run_that_goes_on_ends_with_the_same_bits(finished, workspace, tmp_path, monkeypatch):
    """From its third step, in the middle of the ramp."""
    shutil.copytree(finished.parent, tmp_path / "out", symlinks=True)

    def enough(*args):
        raise InputError("that was enough")

    monkeypatch.setattr("flaxdraft.run.run.evaluate_draft", enough)
    assert call(workspace, *RUN, f"output_dir={tmp_path / 'out'}", "train.resume=step 3") == 2
    again = tmp_path / "out" / "qwen3"
    one, other = (open_draft(root, step="6").draft.params for root in (again, finished))
    jax.tree.map(np.testing.assert_array_equal, one, other)
    steps = [[(m["step"], m["loss"], m["grad_norm"]) for m in metrics(root, "train")] for root in (again, finished)]
    assert steps[0] == steps[1]


def test_a_store_and_another_beginning(finished, workspace, tmp_path, tiny_gguf):
    chat = [{"role": "user", "content": "and the inn"}, {"role": "assistant", "content": "then an inn in the land"}]
    given, store = tmp_path / "chats.jsonl", tmp_path / "store"
    given.write_text(
        "".join(json.dumps({"messages": [chat[0] | {"content": f"and {i}"}, chat[1]]}) + "\n" for i in range(8))
    )
    assert data(["capture", str(given), str(store), "--target", str(tiny_gguf), "--algorithm", "dflash2"]) == 0
    more = (f"data.store={store}", f"output_dir={tmp_path / 'out'}", f"draft.init_from={finished / 'export'}")
    more = (*more, "algorithm.selector_warmup_ratio=0", "algorithm.selector_ramp_ratio=0")
    assert call(workspace, *RUN, *more, "draft.fields={}", "train.pack_length=64") == 0
    lines = metrics(tmp_path / "out" / "qwen3", "train")
    assert lines[-1]["loss"] < lines[0]["loss"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evaluate.chain_length=4"], "evaluate.chain_length: found 4, but such drafts of dflash2 propose at most 3"),
        (["draft.fields={conv_kernel_size: 5}"], "draft.fields.conv_kernel_size: found 5, expected at most block_size"),
        (["draft.architecture=mla"], "it serves no drafts with latent attention"),
        (["mesh.sequence=2"], "mesh.sequence: found 2, but dflash2 does not share"),
        (["algorithm.selector_alpha=0.5"], "algorithm.selector_alpha: there 1.0, here 0.5"),
        (["draft.init_from=EXPORT", "draft.fields={}", "algorithm.block_size=5"],
         "algorithm.block_size: found 5, the draft at EXPORT has 4"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(finished, workspace, tmp_path, capfd, overrides, message):
    where = lambda text: text.replace("EXPORT", str(finished / "export"))  # noqa: E731
    folder = [] if "selector_alpha" in overrides[0] else [f"output_dir={tmp_path}"]
    assert call(workspace, *RUN, *folder, *map(where, overrides)) == 2
    assert where(message) in said(capfd)
