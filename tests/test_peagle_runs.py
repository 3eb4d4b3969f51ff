"""P-EAGLE through all that a run is: answers, training, decoding, export; going on to the bit, beginning from a draft,
features from a store and from a target that reads while the draft trains."""

import json
import shutil

import jax
import numpy as np
import pytest
from tiny_runs import call, make_workspace, metrics

from flaxdraft.algorithms.loading import from_pretrained
from flaxdraft.data.__main__ import main as data
from flaxdraft.errors import InputError
from flaxdraft.run.draft_source import open_draft

pytestmark = pytest.mark.slow

RUN = (
    "algorithm.name=peagle", "algorithm.num_depths=3", "data.feature_dtype=float32", "draft.draft_vocab_size=64",
    "draft.fields={num_hidden_layers: 2}", "train.num_steps=6", "train.schedule=constant",
    "train.learning_rate=5.0e-3", "train.length_buckets=1", "train.eval_every=6", "train.log_every=1",
    "train.accumulate=2", "train.ema_decay=0.5", "algorithm.remat=projections",
)  # fmt: skip


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, tiny_gguf):
    return make_workspace(tmp_path_factory.mktemp("peagle"), tiny_gguf)


@pytest.fixture(scope="module")
def finished(workspace):
    assert call(workspace, *RUN) == 0
    return workspace / "out" / "llama"


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
    exported, trained = from_pretrained(finished / "export"), open_draft(finished, step="best")
    jax.tree.map(np.testing.assert_array_equal, exported.params, trained.draft.params)
    assert [*open_draft(finished / "export").target.tap_layers] == [*trained.target.tap_layers]
    assert exported.config == trained.draft.config
    assert exported.algorithm.settings.name == trained.draft.algorithm.settings.name == "peagle"


def test_a_run_that_goes_on_ends_with_the_same_bits(finished, workspace, tmp_path, monkeypatch):
    """From its third step: the elements that are drawn, the mean and the weights."""
    shutil.copytree(finished.parent, tmp_path / "out", symlinks=True)

    def enough(*args):
        raise InputError("that was enough")

    monkeypatch.setattr("flaxdraft.run.run.evaluate_draft", enough)
    assert call(workspace, *RUN, f"output_dir={tmp_path / 'out'}", "train.resume=step 3") == 2
    again = tmp_path / "out" / "llama"
    one, other = (open_draft(root, step="6").draft.params for root in (again, finished))
    jax.tree.map(np.testing.assert_array_equal, one, other)
    steps = [[(m["step"], m["loss"], m["grad_norm"]) for m in metrics(root, "train")] for root in (again, finished)]
    assert steps[0] == steps[1]


@pytest.mark.parametrize("source", ["data.store", "data.conversations"])
def test_other_sources_and_another_beginning(finished, workspace, tmp_path, tiny_gguf, source):
    """The target reads conversations while the draft trains, or has read them into a store; the draft begins from the
    finished one's export."""
    chat = [{"role": "user", "content": "and the inn"}, {"role": "assistant", "content": "then an inn in the land"}]
    given = tmp_path / "chats.jsonl"
    given.write_text(
        "".join(json.dumps({"messages": [chat[0] | {"content": f"and {i}"}, chat[1]]}) + "\n" for i in range(8))
    )
    if source == "data.store":
        store = tmp_path / "store"
        assert data(["capture", str(given), str(store), "--target", str(tiny_gguf), "--algorithm", "peagle"]) == 0
        given = store
    more = (
        f"{source}={given}",
        f"output_dir={tmp_path / 'out'}",
        f"draft.init_from={finished / 'export'}",
        "draft.fields={}",
    )
    assert call(workspace, *RUN, *more) == 0
    lines = metrics(tmp_path / "out" / "llama", "train")
    assert lines[-1]["loss"] < lines[0]["loss"]


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
    where = lambda text: text.replace("EXPORT", str(finished / "export"))  # noqa: E731
    assert call(workspace, *RUN, f"output_dir={tmp_path}", *map(where, overrides)) == 2
    assert where(message) in said(capfd)
