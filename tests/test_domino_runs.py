"""Domino through all that a run is: training, walking, decoding, export; going on to the bit in the middle of its
schedule; beginning from an export, features from a store."""

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

RUN = (*BLOCKS, "algorithm.name=domino")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, tiny_gguf):
    return make_workspace(tmp_path_factory.mktemp("domino"), tiny_gguf)


@pytest.fixture(scope="module")
def finished(workspace):
    assert call(workspace, *RUN) == 0
    return workspace / "out" / "qwen3"


def test_a_run_leaves_its_results(finished):
    result = json.loads((finished / "evaluation.json").read_text())["result"]
    assert result["decoded"]["identical_answers"] == result["answers"] == 4
    assert result["teacher_forced"]["answers_with_the_decoded_passes"] == 4
    assert result["decoded"]["accept_length"] == result["teacher_forced"]["accept_length"] > 1.0
    lines = metrics(finished, "train")
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert len(lines[-1]["accuracy"]) == 4  # shifted labels train one slot more than decoding proposes
    for figures in (lines[-1], metrics(finished, "held_out")[-1], result["teacher_forced"]):
        assert {"token_accuracy", "base_token_accuracy", "teacher_forced_length"} <= set(figures)
    report = (finished / "report" / "report.md").read_text()
    assert "- draft: domino, qwen3" in report
    assert "teacher forced length" in report


def test_the_export_is_read_again_as_what_it_was(finished):
    exported, trained = from_pretrained(finished / "export"), open_draft(finished, step="best")
    jax.tree.map(np.testing.assert_array_equal, exported.params, trained.draft.params)
    assert exported.config == trained.draft.config
    card = (finished / "export" / "README.md").read_text()
    for text in ("Domino draft for tiny.gguf", "DFLASH", "a recurrent state of 64"):
        assert text in card
    assert "vllm serve" not in card


def test_a_run_that_goes_on_ends_with_the_same_bits(finished, workspace, tmp_path, monkeypatch):
    """From its third step, where the base loss has half of its share left."""
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
    assert data(["capture", str(given), str(store), "--target", str(tiny_gguf), "--algorithm", "domino"]) == 0
    more = (f"data.store={store}", f"output_dir={tmp_path / 'out'}", f"draft.init_from={finished / 'export'}")
    assert call(workspace, *RUN, *more, "draft.fields={}", "train.pack_length=64") == 0
    lines = metrics(tmp_path / "out" / "qwen3", "train")
    assert lines[-1]["loss"] < lines[0]["loss"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evaluate.chain_length=4"], "evaluate.chain_length: found 4, but such drafts of domino propose at most 3"),
        (["draft.fields={shift_label: true}"], "draft.fields.shift_label: algorithm.shift_label says it; leave it out"),
        (["draft.fields={emb_dim: 0}"], "draft.fields.emb_dim: found 0, expected a positive integer"),
        (["algorithm.pure_draft_prefix_len=2"], "export for SGLang 0.5.23: pure_draft_prefix_len is 2"),
        (["export.engine=vllm"], "export for vLLM 0.33.0: it has no Domino"),
        (["mesh.sequence=2"], "mesh.sequence: found 2, but domino does not share"),
        (["train.num_steps=9"], "algorithm.base_steps: there 6, here 9"),
        (["draft.init_from=EXPORT", "draft.fields={}", "algorithm.shift_label=false"],
         "algorithm.shift_label: found False, the draft at EXPORT has True"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(finished, workspace, tmp_path, capfd, overrides, message):
    where = lambda text: text.replace("EXPORT", str(finished / "export"))  # noqa: E731
    folder = [] if "num_steps" in overrides[0] else [f"output_dir={tmp_path}"]
    assert call(workspace, *RUN, *folder, *map(where, overrides)) == 2
    assert where(message) in said(capfd)
