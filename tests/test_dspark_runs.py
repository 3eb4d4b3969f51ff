"""DSpark through all that a run is: training, walking, decoding, export with its temperatures; going on to the bit;
features from a store and from a target that reads while the draft trains."""

import json

import pytest
from algorithm_runs import (
    assert_begins_elsewhere,
    assert_goes_on_to_the_bit,
    assert_read_again,
    assert_refused,
    learns,
    result_of,
)
from algorithm_runs import finished as finished
from algorithm_runs import workspace as workspace
from test_dflash_runs import RUN as BLOCKS
from tiny_runs import metrics

pytestmark = pytest.mark.slow

RUN = (*BLOCKS, "algorithm.name=dspark", "draft.fields={num_hidden_layers: 1, markov_head_type: rnn}")


def test_a_run_leaves_its_results(finished):
    result = result_of(finished)
    forced = result["teacher_forced"]
    assert learns(metrics(finished, "train"))
    assert forced["teacher_accuracy"] == 1  # the answers are the target's own
    assert len(forced["confidence_temperatures"]) == 3
    written = json.loads((finished / "export" / "confidence_temperatures.json").read_text())
    assert written["temperatures"] == [*forced["confidence_temperatures"], 1.0]
    assert "- draft: dspark, qwen3" in (finished / "report" / "report.md").read_text()


def test_the_export_is_read_again_as_what_it_was(finished):
    assert_read_again(finished)
    card = (finished / "export" / "README.md").read_text()
    for text in ("DSpark draft for tiny.gguf", "DSPARK", "a rnn Markov head of rank 32 and a confidence"):
        assert text in card
    assert "vllm serve" not in card  # it has no such head


def test_a_run_that_goes_on_ends_with_the_same_bits(finished, workspace, tmp_path, monkeypatch, capfd):
    assert_goes_on_to_the_bit(RUN, finished, workspace, tmp_path, monkeypatch, capfd)


@pytest.mark.parametrize("source", ["data.store", "data.conversations"])
def test_other_sources_and_another_beginning(source, finished, workspace, tmp_path, tiny_gguf):
    """The teacher's states come with them."""
    assert_begins_elsewhere((*RUN, "train.pack_length=64"), source, finished, workspace, tmp_path, tiny_gguf)


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
def test_what_does_not_go_together_is_refused(finished, workspace, tmp_path, capfd, overrides, message):
    assert_refused((*RUN, f"output_dir={tmp_path}"), overrides, message, finished, workspace, capfd)
