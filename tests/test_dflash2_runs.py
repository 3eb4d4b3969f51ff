"""DFlash2 through all that a run is: training, walking, decoding, export; going on to the bit in the middle of its
ramp; beginning from an export, features from a store."""

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

RUN = (*BLOCKS, "algorithm.name=dflash2", "algorithm.selector_warmup_ratio=0.34", "algorithm.selector_ramp_ratio=0.5")


def test_a_run_leaves_its_results(finished):
    result = result_of(finished)
    lines, held_out = metrics(finished, "train"), metrics(finished, "held_out")
    assert learns(held_out)  # in which the selector's loss counts in full
    assert len(lines[-1]["accuracy"]) == 3
    for figures in (lines[-1], held_out[-1], result["teacher_forced"]):
        assert {"token_accuracy", "base_token_accuracy", "candidate_coverage"} <= set(figures)
    report = (finished / "report" / "report.md").read_text()
    assert "- draft: dflash2, qwen3" in report
    assert "candidate coverage" in report


def test_the_export_is_read_again_as_what_it_was(finished):
    assert_read_again(finished)
    card = (finished / "export" / "README.md").read_text()
    for text in ("DFlash2 draft for tiny.gguf", "DFLASH", '"method": "dflash"', "a choice among 16 candidates"):
        assert text in card


def test_a_run_that_goes_on_ends_with_the_same_bits(finished, workspace, tmp_path, monkeypatch, capfd):
    """From its third step, in the middle of the ramp."""
    assert_goes_on_to_the_bit(RUN, finished, workspace, tmp_path, monkeypatch, capfd)


def test_a_store_and_another_beginning(finished, workspace, tmp_path, tiny_gguf):
    run = (*RUN, "train.pack_length=64", "algorithm.selector_warmup_ratio=0", "algorithm.selector_ramp_ratio=0")
    assert_begins_elsewhere(run, "data.store", finished, workspace, tmp_path, tiny_gguf)


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
    folder = [] if "selector_alpha" in overrides[0] else [f"output_dir={tmp_path}"]
    assert_refused((*RUN, *folder), overrides, message, finished, workspace, capfd)
