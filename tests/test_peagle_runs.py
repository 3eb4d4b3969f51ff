"""P-EAGLE through all that a run is: answers, training, decoding, export; going on to the bit, beginning from a draft,
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
from tiny_runs import metrics

pytestmark = pytest.mark.slow

RUN = (
    "algorithm.name=peagle", "algorithm.num_depths=3", "data.feature_dtype=float32", "draft.draft_vocab_size=64",
    "draft.fields={num_hidden_layers: 2}", "train.num_steps=6", "train.schedule=constant",
    "train.learning_rate=5.0e-3", "train.length_buckets=1", "train.eval_every=6", "train.log_every=1",
    "train.accumulate=2", "train.ema_decay=0.5", "algorithm.remat=projections",
)  # fmt: skip


def test_a_run_leaves_its_results(finished):
    result_of(finished)
    lines = metrics(finished, "train")
    assert learns(lines)
    assert len(lines[-1]["accuracy"]) == 3
    assert "- draft: peagle, llama" in (finished / "report" / "report.md").read_text()


def test_the_export_says_what_engines_read(finished):
    config = json.loads((finished / "export" / "config.json").read_text())
    assert (config["architectures"], config["parallel_drafting"]) == (["LlamaForCausalLMEagle3"], True)
    assert (config["mask_token_id"], config["num_hidden_layers"]) == (config["vocab_size"] - 1, 2)
    card = (finished / "export" / "README.md").read_text()
    for text in ("P-EAGLE draft for tiny.gguf", '"parallel_drafting": true', "2 Llama layers", "3 depths"):
        assert text in card
    assert "sglang" not in card


def test_an_export_is_read_again_as_what_it_was(finished):
    exported, _ = assert_read_again(finished)
    assert exported.algorithm.settings.name == "peagle"


def test_a_run_that_goes_on_ends_with_the_same_bits(finished, workspace, tmp_path, monkeypatch, capfd):
    """From its third step: the elements that are drawn, the mean and the weights."""
    assert_goes_on_to_the_bit(RUN, finished, workspace, tmp_path, monkeypatch, capfd)


@pytest.mark.parametrize("source", ["data.store", "data.conversations"])
def test_other_sources_and_another_beginning(finished, workspace, tmp_path, tiny_gguf, source):
    """The target reads conversations while the draft trains, or has read them into a store; the draft begins from the
    finished one's export."""
    assert_begins_elsewhere(RUN, source, finished, workspace, tmp_path, tiny_gguf)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["draft.fields={mask_token_id: 4000}"], "draft.fields.mask_token_id: found 4000, expected a token of the"),
        (["target.tap_layers=[3, 1]"], "target.tap_layers: [3, 1] are not three ascending layers of a 8-layer"),
        (["algorithm.num_depths=12"], "algorithm.num_depths: found 12, but the longest answer has 12 tokens"),
        (["mesh.sequence=2"], "mesh.sequence: found 2, but peagle does not share the rows of a batch row"),
        (["export.engine=sglang"], "export for SGLang 0.5.23: it drafts one token after another"),
        (["draft.init_from=EXPORT", "draft.fields={num_hidden_layers: 1}"], "a loaded draft keeps its sizes"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(finished, workspace, tmp_path, capfd, overrides, message):
    assert_refused((*RUN, f"output_dir={tmp_path}"), overrides, message, finished, workspace, capfd)
