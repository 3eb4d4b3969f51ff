"""Domino through all that a run is: training, walking, decoding, export; going on to the bit in the middle of its
schedule; beginning from an export, features from a store."""

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

RUN = (*BLOCKS, "algorithm.name=domino")


def test_a_run_leaves_its_results(finished):
    result = result_of(finished)
    lines = metrics(finished, "train")
    assert learns(lines)
    assert len(lines[-1]["accuracy"]) == 4  # shifted labels train one slot more than decoding proposes
    for figures in (lines[-1], metrics(finished, "held_out")[-1], result["teacher_forced"]):
        assert {"token_accuracy", "base_token_accuracy", "teacher_forced_length"} <= set(figures)
    report = (finished / "report" / "report.md").read_text()
    assert "- draft: domino, qwen3" in report
    assert "teacher forced length" in report


def test_the_export_is_read_again_as_what_it_was(finished):
    assert_read_again(finished)
    card = (finished / "export" / "README.md").read_text()
    for text in ("Domino draft for tiny.gguf", "DFLASH", "a recurrent state of 64"):
        assert text in card
    assert "vllm serve" not in card


def test_a_run_that_goes_on_ends_with_the_same_bits(finished, workspace, tmp_path, monkeypatch, capfd):
    """From its third step, where the base loss has half of its share left."""
    assert_goes_on_to_the_bit(RUN, finished, workspace, tmp_path, monkeypatch, capfd)


def test_a_store_and_another_beginning(finished, workspace, tmp_path, tiny_gguf):
    run = (*RUN, "train.pack_length=64")
    assert_begins_elsewhere(run, "data.store", finished, workspace, tmp_path, tiny_gguf)


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
    folder = [] if "num_steps" in overrides[0] else [f"output_dir={tmp_path}"]
    assert_refused((*RUN, *folder), overrides, message, finished, workspace, capfd)
