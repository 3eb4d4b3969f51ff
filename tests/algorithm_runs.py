"""Whole runs of one algorithm, and what each of them must show. A test file takes the fixtures and says in RUN what its
runs are started with, `algorithm.name` among it."""

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


def name_of(run) -> str:
    """The algorithm's."""
    return [one.split("=")[1] for one in run if one.startswith("algorithm.name=")][-1]


@pytest.fixture(scope="module")
def workspace(request, tmp_path_factory, tiny_gguf):
    return make_workspace(tmp_path_factory.mktemp(name_of(request.module.RUN)), tiny_gguf)


@pytest.fixture(scope="module")
def finished(request, workspace):
    """The folder of the run's draft."""
    assert call(workspace, *request.module.RUN) == 0
    (result,) = (workspace / "out").glob("*/evaluation.json")
    return result.parent


def said(capfd) -> str:
    """What the command wrote as its error, on one line."""
    return " ".join(capfd.readouterr().err.split())


def learns(lines) -> bool:
    return lines[-1]["loss"] < lines[0]["loss"]


def result_of(finished):
    """What evaluation says, whose decoded answers are the target's and whose walk took the same passes."""
    result = json.loads((finished / "evaluation.json").read_text())["result"]
    assert result["decoded"]["identical_answers"] == result["answers"] == 4
    assert result["teacher_forced"]["answers_with_the_decoded_passes"] == 4
    assert result["decoded"]["accept_length"] == result["teacher_forced"]["accept_length"] > 1.0
    return result


def assert_read_again(finished):
    """The export is what was trained; both, as they were read."""
    exported, trained = from_pretrained(finished / "export"), open_draft(finished, step="best")
    jax.tree.map(np.testing.assert_array_equal, exported.params, trained.draft.params)
    assert exported.config == trained.draft.config
    assert exported.algorithm.settings.name == trained.draft.algorithm.settings.name
    assert [*open_draft(finished / "export").target.tap_layers] == [*trained.target.tap_layers]
    return exported, trained.draft


def assert_goes_on_to_the_bit(run, finished, workspace, tmp_path, monkeypatch, capfd) -> None:
    """A run that goes on from its third step ends with the same weights, by way of the same losses."""
    shutil.copytree(finished.parent, tmp_path / "out", symlinks=True)
    again = tmp_path / "out" / finished.name
    (again / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in metrics(again) if line["step"] <= 3)
    )

    def enough(*args):
        raise InputError("that was enough")

    monkeypatch.setattr("flaxdraft.run.run.evaluate_draft", enough)
    assert call(workspace, *run, f"output_dir={tmp_path / 'out'}", "train.resume=step 3") == 2
    assert "that was enough" in said(capfd)
    one, other = (open_draft(root, step="6").draft.params for root in (again, finished))
    jax.tree.map(np.testing.assert_array_equal, one, other)
    steps = [[(m["step"], m["loss"], m["grad_norm"]) for m in metrics(root, "train")] for root in (again, finished)]
    assert steps[0] == steps[1]


def write_conversations(path):
    chat = [{"role": "user", "content": "and the inn"}, {"role": "assistant", "content": "then an inn in the land"}]
    path.write_text(
        "".join(json.dumps({"messages": [chat[0] | {"content": f"and {i}"}, chat[1]]}) + "\n" for i in range(8))
    )
    return path


def captured(chats, store, target, run, *more):
    """A store of the features that the algorithm needs."""
    assert data(["capture", str(chats), str(store), "--target", str(target), "--algorithm", name_of(run), *more]) == 0
    return store


def assert_begins_elsewhere(run, source: str, finished, workspace, tmp_path, target) -> None:
    """A draft begins as the finished one's export and learns from conversations.

    Args:
        source: `data.conversations`, which the target reads while the draft trains, or `data.store`.
    """
    given = write_conversations(tmp_path / "chats.jsonl")
    if source == "data.store":
        given = captured(given, tmp_path / "store", target, run)
    begun = (f"draft.init_from={finished / 'export'}", "draft.fields={}")
    assert call(workspace, *run, f"{source}={given}", f"output_dir={tmp_path / 'out'}", *begun) == 0
    assert learns(metrics(tmp_path / "out" / finished.name, "train"))


def assert_refused(run, overrides, message: str, finished, workspace, capfd) -> None:
    """
    Args:
        overrides: there, as in the message, EXPORT stands for the finished run's export.
    """
    where = lambda text: text.replace("EXPORT", str(finished / "export"))  # noqa: E731
    assert call(workspace, *run, *map(where, overrides)) == 2
    assert where(message) in said(capfd)
