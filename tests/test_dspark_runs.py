"""DSpark through all that a run is: training, walking, decoding, export with its temperatures; going on to the bit;
features from a store and from a target that reads while the draft trains."""

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

RUN = (*BLOCKS, "algorithm.name=dspark", "draft.fields={num_hidden_layers: 1, markov_head_type: rnn}")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, tiny_gguf):
    return make_workspace(tmp_path_factory.mktemp("dspark"), tiny_gguf)


@pytest.fixture(scope="module")
def finished(workspace):
    assert call(workspace, *RUN) == 0
    return workspace / "out" / "qwen3"


def test_a_run_leaves_its_results(finished):
    result = json.loads((finished / "evaluation.json").read_text())["result"]
    forced = result["teacher_forced"]
    assert result["decoded"]["identical_answers"] == result["answers"] == 4
    assert forced["answers_with_the_decoded_passes"] == 4
    assert result["decoded"]["accept_length"] == forced["accept_length"] > 1.0
    lines = metrics(finished, "train")
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert forced["teacher_accuracy"] == 1  # the answers are the target's own
    assert len(forced["confidence_temperatures"]) == 3
    written = json.loads((finished / "export" / "confidence_temperatures.json").read_text())
    assert written["temperatures"] == [*forced["confidence_temperatures"], 1.0]
    assert "- draft: dspark, qwen3" in (finished / "report" / "report.md").read_text()


def test_the_export_is_read_again_as_what_it_was(finished):
    exported, trained = from_pretrained(finished / "export"), open_draft(finished, step="best")
    jax.tree.map(np.testing.assert_array_equal, exported.params, trained.draft.params)
    assert exported.config == trained.draft.config
    card = (finished / "export" / "README.md").read_text()
    for text in ("DSpark draft for tiny.gguf", "DSPARK", "a rnn Markov head of rank 32 and a confidence"):
        assert text in card
    assert "vllm serve" not in card  # it has no such head


def test_a_run_that_goes_on_ends_with_the_same_bits(finished, workspace, tmp_path, monkeypatch):
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


@pytest.mark.parametrize("source", ["data.store", "data.conversations"])
def test_other_sources_and_another_beginning(source, finished, workspace, tmp_path, tiny_gguf):
    """The teacher's states come with them."""
    chat = [{"role": "user", "content": "and the inn"}, {"role": "assistant", "content": "then an inn in the land"}]
    given = tmp_path / "chats.jsonl"
    given.write_text(
        "".join(json.dumps({"messages": [chat[0] | {"content": f"and {i}"}, chat[1]]}) + "\n" for i in range(8))
    )
    if source == "data.store":
        store = tmp_path / "store"
        assert data(["capture", str(given), str(store), "--target", str(tiny_gguf), "--algorithm", "dspark"]) == 0
        given = store
    more = (f"{source}={given}", f"output_dir={tmp_path / 'out'}", f"draft.init_from={finished / 'export'}")
    assert call(workspace, *RUN, *more, "draft.fields={}", "train.pack_length=64") == 0
    lines = metrics(tmp_path / "out" / "qwen3", "train")
    assert lines[-1]["loss"] < lines[0]["loss"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evaluate.chain_length=5"], "evaluate.chain_length: found 5, but such drafts of dspark propose at most 4"),
        (["draft.fields={markov_head_type: lstm}"], "draft.fields.markov_head_type: found 'lstm', expected one of"),
        (["export.engine=vllm"], "export for vLLM 0.33.0: markov_head_type is rnn, it has vanilla alone"),
        (["draft.architecture=mla"], "export for SGLang 0.5.23: it serves no drafts with latent attention"),
        (["draft.fields={enable_confidence_head: false}", "algorithm.confidence_threshold=0.5"],
         "algorithm.confidence_threshold: found 0.5, but the draft has no confidence head"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(workspace, tmp_path, capfd, overrides, message):
    assert call(workspace, *RUN, f"output_dir={tmp_path}", *overrides) == 2
    assert message in said(capfd)
