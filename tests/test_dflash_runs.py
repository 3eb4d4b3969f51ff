"""DFlash through all that a run is: answers, training, decoding, export; going on to the bit, beginning from a draft,
features from a store and from a target that reads while the draft trains."""

import json
import shutil

import jax
import numpy as np
import pytest
from closeness import assert_close
from tiny_runs import call, make_workspace, metrics

from flaxdraft.algorithms.loading import from_pretrained
from flaxdraft.data.__main__ import main as data
from flaxdraft.errors import InputError
from flaxdraft.run.draft_source import open_draft

pytestmark = pytest.mark.slow

RUN = (
    "algorithm.name=dflash", "algorithm.block_size=4", "algorithm.num_anchors=6", "data.feature_dtype=float32",
    "draft.fields={num_hidden_layers: 1}", "train.num_steps=6", "train.schedule=constant",
    "train.learning_rate=2.0e-2", "train.length_buckets=1", "train.eval_every=6", "train.log_every=1",
    "train.accumulate=2", "train.ema_decay=0.5", "algorithm.remat=projections",
)  # fmt: skip


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, tiny_gguf):
    return make_workspace(tmp_path_factory.mktemp("dflash"), tiny_gguf)


@pytest.fixture(scope="module")
def finished(workspace):
    assert call(workspace, *RUN) == 0
    return workspace / "out" / "qwen3"


def said(capfd) -> str:
    return " ".join(capfd.readouterr().err.split())


def test_a_run_leaves_its_results(finished):
    result = json.loads((finished / "evaluation.json").read_text())["result"]
    assert result["decoded"]["identical_answers"] == result["answers"] == 4
    assert result["teacher_forced"]["answers_with_the_decoded_passes"] == 4
    assert result["decoded"]["accept_length"] == result["teacher_forced"]["accept_length"] > 1.0
    lines = metrics(finished, "train")
    assert lines[-1]["loss"] < lines[0]["loss"]
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
    exported, trained = from_pretrained(finished / "export"), open_draft(finished, step="best")
    jax.tree.map(np.testing.assert_array_equal, exported.params, trained.draft.params)
    assert [*open_draft(finished / "export").target.tap_layers] == [*trained.target.tap_layers]
    assert exported.config == trained.draft.config
    assert exported.algorithm.settings.block_size == trained.draft.algorithm.settings.block_size == 4


def test_a_run_that_goes_on_ends_with_the_same_bits(finished, workspace, tmp_path, monkeypatch):
    """From its third step: the anchors that are drawn, the mean and the weights."""
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


def test_other_sources_and_another_beginning(finished, workspace, tmp_path, tiny_gguf):
    """The target reads conversations while the draft trains, or has read them into a store: the same losses. The draft
    begins from the finished one's export, and from nothing."""
    chat = [{"role": "user", "content": "and the inn"}, {"role": "assistant", "content": "then an inn in the land"}]
    chats, store = tmp_path / "chats.jsonl", tmp_path / "store"
    chats.write_text(
        "".join(json.dumps({"messages": [chat[0] | {"content": f"and {i}"}, chat[1]]}) + "\n" for i in range(8))
    )
    capture = ["capture", str(chats), str(store), "--target", str(tiny_gguf), "--algorithm", "dflash"]
    assert data([*capture, "--taps-dtype", "float32"]) == 0
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
    where = lambda text: text.replace("EXPORT", str(finished / "export"))  # noqa: E731
    assert call(workspace, *RUN, f"output_dir={tmp_path}", *map(where, overrides)) == 2
    assert where(message) in said(capfd)
