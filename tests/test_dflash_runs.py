"""DFlash through all that a run is: answers, training, decoding, export; going on to the bit, beginning from a draft,
features from a store and from a target that reads while the draft trains."""

import json

import pytest
from algorithm_runs import (
    assert_goes_on_to_the_bit,
    assert_read_again,
    assert_refused,
    captured,
    learns,
    result_of,
    write_conversations,
)
from algorithm_runs import finished as finished
from algorithm_runs import workspace as workspace
from closeness import assert_close
from tiny_runs import call, metrics

pytestmark = pytest.mark.slow

RUN = (
    "algorithm.name=dflash", "algorithm.block_size=4", "algorithm.num_anchors=6", "data.feature_dtype=float32",
    "draft.fields={num_hidden_layers: 1}", "train.num_steps=6", "train.schedule=constant",
    "train.learning_rate=2.0e-2", "train.length_buckets=1", "train.eval_every=6", "train.log_every=1",
    "train.accumulate=2", "train.ema_decay=0.5", "algorithm.remat=projections",
)  # fmt: skip


def test_a_run_leaves_its_results(finished):
    result_of(finished)
    lines = metrics(finished, "train")
    assert learns(lines)
    assert len(lines[-1]["accuracy"]) == 3
    assert "- draft: dflash, qwen3" in (finished / "report" / "report.md").read_text()


def test_the_export_says_what_engines_read(finished):
    config = json.loads((finished / "export" / "config.json").read_text())
    assert config["dflash_config"] == {"mask_token_id": config["vocab_size"] - 1, "target_layer_ids": [1, 2, 3, 4, 5]}
    assert (config["architectures"], config["model_type"]) == (["DFlashDraftModel"], "qwen3")
    assert (config["block_size"], config["num_target_layers"], "auto_map" in config) == (4, 8, False)
    card = (finished / "export" / "README.md").read_text()
    for text in ("DFlash draft for tiny.gguf", "DFLASH", '"method": "dflash"', "blocks of 4"):
        assert text in card


def test_an_export_is_read_again_as_what_it_was(finished):
    exported, trained = assert_read_again(finished)
    assert exported.algorithm.settings.block_size == trained.algorithm.settings.block_size == 4


def test_a_run_that_goes_on_ends_with_the_same_bits(finished, workspace, tmp_path, monkeypatch, capfd):
    """From its third step: the anchors that are drawn, the mean and the weights."""
    assert_goes_on_to_the_bit(RUN, finished, workspace, tmp_path, monkeypatch, capfd)


def test_other_sources_and_another_beginning(finished, workspace, tmp_path, tiny_gguf):
    """The target reads conversations while the draft trains, or has read them into a store: the same losses. The draft
    begins from the finished one's export, and from nothing."""
    chats = write_conversations(tmp_path / "chats.jsonl")
    store = captured(chats, tmp_path / "store", tiny_gguf, RUN, "--taps-dtype", "float32")
    begun = (f"draft.init_from={finished / 'export'}", "draft.fields={}")
    losses = {}
    for name, more in {
        "store": (f"data.store={store}", *begun), "conversations": (f"data.conversations={chats}", *begun),
        "anew": (f"data.store={store}", "draft.architecture=qwen3"),
    }.items():  # fmt: skip
        assert call(workspace, *RUN, *more, f"output_dir={tmp_path / name}") == 0
        losses[name] = [line["loss"] for line in metrics(tmp_path / name / "qwen3", "train")]
        assert losses[name][-1] < losses[name][0]
    assert_close(losses["store"], losses["conversations"], rtol=1e-5)
    assert losses["store"][0] < 0.9 * losses["anew"][0]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evaluate.chain_length=4"], "evaluate.chain_length: found 4, but such drafts of dflash propose at most 3"),
        (["draft.draft_vocab_size=64"], "draft.draft_vocab_size: drafts of dflash know the target's whole vocabulary"),
        (["draft.fields={block_size: 4}"], "draft.fields.block_size: algorithm.block_size says it; leave it out"),
        (["draft.fields={mask_token_id: 4000}"], "draft.fields.mask_token_id: found 4000, expected a token of the"),
        (["draft.fields={sliding_window: 4}"], "draft.fields.sliding_window: found 4 with layer_types []"),
        (["target.tap_layers=[3, 1]"], "target.tap_layers: [3, 1] are not ascending layers of a 8-layer target"),
        (["algorithm.sample_from_anchor=true"], "export for SGLang 0.5.23: sample_from_anchor is true"),
        (["target.tap_layers=[1, 7]"], "export for SGLang 0.5.23: layer 7 is the target's last"),
        (["draft.init_from=EXPORT", "draft.fields={}", "algorithm.block_size=5"],
         "algorithm.block_size: found 5, the draft at EXPORT has 4"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(finished, workspace, tmp_path, capfd, overrides, message):
    assert_refused((*RUN, f"output_dir={tmp_path}"), overrides, message, finished, workspace, capfd)
