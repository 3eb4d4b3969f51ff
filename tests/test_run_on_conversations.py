"""Runs that train on conversations, from a store or read by the target while the draft trains."""

import json
import re

import numpy as np
import pytest
from closeness import assert_close
from tiny_runs import call, make_workspace, metrics

from flaxdraft.config import load_config
from flaxdraft.data.__main__ import main as data_main
from flaxdraft.run.answers import answer_prompts
from flaxdraft.run.material import gather
from flaxdraft.run.setup import claim_folders, prepare
from flaxdraft.run.target import RunTarget
from flaxdraft.run.training import train_draft


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, tiny_gguf):
    return make_workspace(tmp_path_factory.mktemp("run"), tiny_gguf)


@pytest.fixture(scope="module")
def store(workspace, tiny_gguf):
    """A store of conversations that the tiny target answered."""
    rows = [json.loads(line) for line in (workspace / "prompts.jsonl").read_text().splitlines()]
    chats = [{"id": row["id"], "messages": [{"role": "user", "content": row["prompt"]}]} for row in rows]
    (workspace / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    target = ("--target", str(tiny_gguf), "--dtype", "float32")
    limits = ("--max-new-tokens", "20", "--max-prompt-tokens", "100")
    answers, out = workspace / "answers", workspace / "store"
    assert data_main(["regenerate", str(workspace / "chats.jsonl"), str(answers), *target, *limits]) == 0
    assert data_main(["capture", str(answers / "conversations.jsonl"), str(out), *target]) == 0
    return out


@pytest.fixture(scope="module")
def trained_on_the_store(workspace, store):
    """Metrics of a run on the store's rows, in buckets by length."""
    out = workspace / "on-store"
    assert call(workspace, f"data.store={store}", "train.num_steps=6", f"output_dir={out}") == 0
    return out


def test_a_store_trains(trained_on_the_store):
    held_out = metrics(trained_on_the_store / "llama", "held_out")
    assert held_out[-1]["loss"] < held_out[0]["loss"]
    assert not list((trained_on_the_store / "data").glob("train-*"))  # the held-out prompts alone were answered
    evaluation = json.loads((trained_on_the_store / "llama" / "evaluation.json").read_text())["result"]
    assert evaluation["decoded"]["identical_answers"] == evaluation["answers"] == 4


def test_conversations_train_to_what_their_store_gives(workspace, trained_on_the_store, tmp_path, capfd):
    """The target reads each batch on the training's devices, along axes of its own. The store holds bfloat16, the
    target is asked in float32."""
    chats = f"data.conversations={workspace / 'answers' / 'conversations.jsonl'}"
    more = ("train.num_steps=6", f"output_dir={tmp_path}", "mesh.data=2", "target.mesh.tensor=2")
    assert call(workspace, chats, *more) == 0
    assert "14 documents in rows of" in capfd.readouterr().out
    for got, want in zip(metrics(tmp_path / "llama"), metrics(trained_on_the_store / "llama"), strict=True):
        assert (got["kind"], got["step"]) == (want["kind"], want["step"])
        assert_close(got["loss"], want["loss"], rtol=2e-3)
        assert 0 <= got.get("data_wait", 0) <= 1


def test_a_store_trains_without_the_target(workspace, trained_on_the_store, store, monkeypatch, capfd):
    """Its files are there, its layers are never loaded, once the held-out prompts are answered; packed this time, and
    with a draft vocabulary from a file."""
    ids = np.arange(0, 256, 4)
    np.save(workspace / "d2t.npy", ids - np.arange(64))
    more = ("name=packed", "train.pack_length=128", "train.num_steps=6", f"draft.vocab_map={workspace / 'd2t.npy'}")
    config = load_config(
        str(workspace / "run.yaml"), [f"data.store={store}", f"output_dir={trained_on_the_store}", *more]
    )
    monkeypatch.setattr("flaxdraft.targets.load_state", None)
    setup = prepare(config)
    claim_folders(setup)
    target = RunTarget(setup)
    train_draft(setup, gather(setup, target, answer_prompts(setup, target)))
    text = " ".join(capfd.readouterr().out.split())
    assert re.search(r"14 documents packed into \d+ rows of 128 tokens", text), text
    assert "the draft vocabulary of 64 holds" in text
    assert re.search(r"coverage by draft_vocab_size: 256 \d+.\d%", text), text


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("target.tap_layers=[0,2,4]",), r"tap_layers is \[1, 3, 4\], expected \[0, 2, 4\]"),
        (("data.store=/nowhere",), "/nowhere: no feature store"),
        (
            ("data.store=null", "data.conversations=/nowhere.jsonl", "mesh.sequence=2"),
            "mesh.sequence: features that the target makes while the draft trains",
        ),
        (("data.conversations=/nowhere.jsonl",), "data.store, data.conversations: both are given"),
        (("data.store=null", "data.conversations=/nowhere.jsonl"), "cannot read /nowhere.jsonl"),
    ],
)
def test_a_store_that_does_not_fit_is_refused(workspace, store, tmp_path, capfd, more, message):
    assert call(workspace, f"data.store={store}", f"output_dir={tmp_path}", "train.num_steps=6", *more) == 2
    assert re.search(message, " ".join(capfd.readouterr().err.split()))
