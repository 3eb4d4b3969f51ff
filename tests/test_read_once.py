"""What a run reads once stays as long as the run is wanted, and no longer."""

import gc
import weakref

import jax.numpy as jnp
import pytest

from flaxdraft.run import answers, results
from flaxdraft.run.answers import Answers
from flaxdraft.run.training import Trained
from flaxdraft.train.chosen import Chosen


class Run:
    """A `Setup`, as far as it names folders."""

    def __init__(self, draft_dir):
        self.draft_dir = draft_dir


def test_the_chosen_checkpoint(tmp_path, monkeypatch):
    read = []

    def load(path, like):
        read.append(path)
        return {"weight": jnp.ones(2)}, None

    monkeypatch.setattr(results, "load_params", load)
    setup, trained = Run(tmp_path), Trained(None, {"weight": jnp.zeros(2)})
    assert results.chosen_params(setup, trained, Chosen(8, 8, None)) is trained.params
    one, two = (results.chosen_params(setup, trained, Chosen(4, 8, None)) for _ in range(2))
    assert one is two
    assert read == [tmp_path / "checkpoints" / "4"]
    gone = weakref.ref(trained)
    del trained
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_the_answers(split, tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(answers, "load_split", lambda directory, split, *_: read.append(split) or [split])
    found = Answers(tmp_path, {"train": ["a"], "held_out": ["b"]}, [2], [2], 4)
    assert found.rows(split) == [split]
    assert found.rows(split) is found.rows(split)
    assert read == [split]
    gone = weakref.ref(found)
    del found
    gc.collect()
    assert gone() is None
