"""A run has one copy of its target: in pieces on its mesh, with the same results, and nothing of it beside a training
that does not ask it."""

import gc
import json
import weakref

import jax
import numpy as np
import pytest
from closeness import assert_close
from tiny import write_prompts
from tiny_runs import call, make_workspace, metrics

from flaxdraft import targets
from flaxdraft.data.documents import Answer
from flaxdraft.files.safetensors_file import load_safetensors
from flaxdraft.interfaces import Features
from flaxdraft.run import run as run_module

SHORT = (
    "train.num_steps=2", "train.eval_every=2", "train.batch_size=2", "train.length_buckets=1",
    "data.feature_dtype=float32",  # one rounding more would be seen in the losses
)  # fmt: skip


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, tiny_gguf):
    root = make_workspace(tmp_path_factory.mktemp("run"), tiny_gguf)
    write_prompts(root / "prompts.jsonl", num_train=4, num_held_out=2)
    return root


@pytest.fixture
def loaded(monkeypatch):
    """Every loading of a target: all bytes of its weights, those of each device, and whether they are still there."""
    found, load = [], targets.load_target

    def spy(*args, **how):
        target = load(*args, **how)
        weights, held = jax.tree.leaves(target.model.state), {}
        for x in weights:
            for shard in x.addressable_shards:
                held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
        found.append((sum(x.nbytes for x in weights), held, [weakref.ref(x) for x in weights]))
        return target

    monkeypatch.setattr(targets, "load_target", spy)
    return found


@pytest.mark.slow
def test_an_eighth_on_each_device_and_the_same_results(workspace, loaded):
    """Loaded for answers and again for the final evaluation, since training does not ask it."""
    for name, more in (("whole", ()), ("split", ("target.mesh.fsdp=8",))):
        assert call(workspace, f"output_dir={workspace / name}", *SHORT, *more) == 0
    assert len(loaded) == 4
    for total, whole, _ in loaded[:2]:
        assert list(whole.values()) == [total]
    for total, split, _ in loaded[2:]:
        assert len(split) == 8
        # Norms are whole on each device.
        assert total / 8 < min(split.values()) <= max(split.values()) < total / 8 * 1.06
    one, other = workspace / "whole", workspace / "split"
    for split_name in ("train", "held_out"):
        assert json.loads((other / f"data/{split_name}.json").read_text()) == json.loads(
            (one / f"data/{split_name}.json").read_text()
        )
        got, want = (load_safetensors(root / f"data/{split_name}-00000.safetensors") for root in (other, one))
        for name in got.keys() - {"argmax_BT", "logsumexp_BT"}:  # which are known of answers alone
            assert_close(got[name], want[name], ulp=80, path=name)
    for got, want in zip(metrics(other / "llama"), metrics(one / "llama"), strict=True):
        assert_close(got["loss"], want["loss"], ulp=80, dtype=np.float32)
    got, want = (json.loads((root / "llama/evaluation.json").read_text())["result"] for root in (other, one))
    assert got["decoded"] == want["decoded"]
    assert got["decoded"]["identical_answers"] == got["answers"] == 2
    assert_close(got["teacher_forced"]["loss"], want["teacher_forced"]["loss"], ulp=80, dtype=np.float32)
    assert got["teacher_forced"]["accept_length"] == want["teacher_forced"]["accept_length"]


class _EnoughError(Exception):
    """What was to be seen is seen."""


def answer(target, prompts, max_new_tokens, stop_tokens, num_rows, on_step):
    """Answers of two tokens, of no computing."""

    def row(prompt):
        zeros = lambda *shape: np.zeros((len(prompt) + 2, *shape), np.float32)  # noqa: E731
        features = Features(zeros(3, 32), zeros(32), zeros().astype(np.int32), zeros())
        return Answer(np.array([*prompt, 5, 6], np.int32), len(prompt), features)

    return [row(prompt) for prompt in prompts]


@pytest.mark.parametrize(
    ("more", "stays"),
    [((), False), (("evaluate.decode_prompts=1",), True), (("data.conversations={chats}",), True)],
    ids=["answers", "decoding", "online"],
)
def test_weights_that_training_does_not_ask_are_gone(workspace, loaded, tmp_path, monkeypatch, more, stays):
    chats = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "and"}, {"role": "assistant", "content": "the inn"}]
    chats.write_text(json.dumps({"messages": turns}) + "\n")

    def train(setup, material):
        gc.collect()
        ((_, _, weights),) = loaded
        assert [weight() is not None for weight in weights] == [stays] * len(weights)
        assert np.isfinite(material.embedding_and_head.head()).all()
        raise _EnoughError

    monkeypatch.setattr("flaxdraft.data.answers.answer_greedily", answer)
    monkeypatch.setattr(run_module, "train_draft", train)
    with pytest.raises(_EnoughError):
        call(workspace, f"output_dir={tmp_path / 'out'}", *(text.format(chats=chats) for text in more))
    assert len(loaded) == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("target.mesh.data=2",), "target.mesh: 2 devices, mesh has 1; a target that reads batches"),
        (
            ("mesh.tensor=8", "target.mesh.data=8"),
            r"train.batch_size: 4 rows cannot be split over target.mesh.data=8 x",
        ),
    ],
)
def test_a_target_that_reads_batches_lies_on_their_devices(workspace, tmp_path, capfd, more, message):
    (tmp_path / "chats.jsonl").write_text("{}\n")
    chats = f"data.conversations={tmp_path / 'chats.jsonl'}"
    assert call(workspace, f"output_dir={tmp_path / 'out'}", chats, *more) == 2
    assert message in " ".join(capfd.readouterr().err.split())
