"""A draft architecture of another package, one file, goes through a run beside EAGLE-3's own."""

import json
from pathlib import Path

import contracts
import jax
import numpy as np
import pytest
from test_contracts import TARGET_HF, target_config
from tiny_runs import call, make_workspace, metrics

from flaxdraft.algorithms.loading import from_pretrained
from flaxdraft.run.draft_source import open_draft
from flaxdraft.serving import lint
from flaxdraft.serving.view import view_of_directory

INSTALLED = Path(__file__).parent / "installed"  # as site-packages has it: the module, and its metadata


@pytest.fixture(scope="module")
def installed():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(INSTALLED)
        yield


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, tiny_gguf):
    return make_workspace(tmp_path_factory.mktemp("tempered"), tiny_gguf)


def run(workspace, *overrides):
    few = ("train.num_steps=2", "train.eval_every=2", "train.length_buckets=1", "draft.architecture=tempered")
    return call(workspace, *few, *overrides)


def test_it_is_not_there_unless_installed(workspace, capfd):
    assert run(workspace, "export.engine=hf") == 2
    assert "draft.architecture: no 'tempered' in flaxdraft.algorithms.eagle3.drafts; found llama, mla" in " ".join(
        capfd.readouterr().err.split()
    )


@pytest.mark.usefixtures("installed")
def test_it_keeps_the_contract(tmp_path):
    pair = contracts.pairs()["eagle3-tempered"]
    contracts.assert_named(pair, target_config())
    contracts.assert_exports(pair, target_config(), TARGET_HF, tmp_path)


@pytest.mark.usefixtures("installed")
def test_no_server_is_said_to_know_it(workspace, capfd):
    """Before anything is trained."""
    assert run(workspace) == 2
    assert "export for SGLang" in " ".join(capfd.readouterr().err.split())


@pytest.mark.usefixtures("installed")
def test_it_trains_walks_decodes_and_is_read_again(workspace):
    assert run(workspace, "export.engine=hf") == 0
    draft = workspace / "out" / "tempered"
    result = json.loads((draft / "evaluation.json").read_text())["result"]
    assert result["decoded"]["identical_answers"] == result["answers"] == 4
    assert result["teacher_forced"]["answers_with_the_decoded_passes"] == 4
    first, last = metrics(draft, "held_out")
    assert last["loss"] < first["loss"]
    exported, trained = from_pretrained(draft / "export"), open_draft(draft, step="best").draft
    jax.tree.map(np.testing.assert_array_equal, exported.params, trained.params)
    assert exported.config == trained.config
    assert exported.algorithm.settings.name == "eagle3"
    assert "one tempered multi-query layer of width 32" in (draft / "export" / "README.md").read_text()
    view = view_of_directory(draft / "export")
    directory, *engines = lint.check(view, exported.algorithm.serving())
    assert directory.faithful
    assert not any(verdict.faithful for verdict in engines)
