"""Where the figures of a run go besides JSON lines and TensorBoard: to Weights & Biases, which a fake stands for."""

import math
import sys
import types
from importlib.machinery import ModuleSpec
from unittest.mock import Mock

import pytest

from flaxdraft.errors import InputError
from flaxdraft.train.metrics_log import MetricsLog, check_wandb, read_metrics


@pytest.fixture
def wandb(monkeypatch):
    """The package as it is seen from here; `started` are the runs that were begun."""
    module = types.ModuleType("wandb")
    module.__spec__ = ModuleSpec("wandb", None)
    module.started = []
    module.init = Mock(side_effect=lambda **settings: module.started.append(Mock()) or module.started[-1])
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_wandb_gets_every_finite_figure_under_one_run(wandb, tmp_path):
    """Also where the command is started again."""
    check_wandb("drafts")
    with MetricsLog(tmp_path, 0, "drafts") as log:
        log.write(1, "train", {"loss": 2.5, "accuracy": [0.5, math.nan]})
    with MetricsLog(tmp_path, 1, "drafts") as log:
        log.write(2, "held_out", {"accept_length": 1.5})
    first, second = (call.kwargs for call in wandb.init.call_args_list)
    assert first == second
    assert (first["project"], first["name"], first["resume"]) == ("drafts", tmp_path.name, "allow")
    assert first["id"]
    before, after = wandb.started
    before.log.assert_called_once_with({"train/loss": 2.5, "train/accuracy/1": 0.5}, step=1)
    after.log.assert_called_once_with({"held_out/accept_length": 1.5}, step=2)
    for run in wandb.started:
        run.finish.assert_called_once_with()
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_wandb_hears_nothing_that_it_was_not_asked_for(wandb, tmp_path):
    with MetricsLog(tmp_path, 0) as log:
        log.write(1, "train", {"loss": 2.5})
    wandb.init.assert_not_called()


def test_wandb_that_is_not_installed_is_refused_where_it_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match=r"train.wandb: the package is not installed; `pip install wandb`"):
        check_wandb("drafts")
    check_wandb(None)
