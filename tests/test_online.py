"""The target beside the draft: what it says while the draft trains is what a store of the same rows holds."""

import json

import pytest
from closeness import assert_close
from teaching import Teaching
from test_pipeline import assert_equal

from flaxdraft.config import DataConfig
from flaxdraft.data.__main__ import main
from flaxdraft.data.chat_template import ChatTemplate
from flaxdraft.data.online import one_ahead, open_conversations
from flaxdraft.data.store import FeatureStore
from flaxdraft.errors import InputError
from flaxdraft.targets import open_target


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Eight conversations of 33 to 64 tokens: one padded length, for capture and for training."""
    path = tmp_path_factory.mktemp("chat") / "chat.jsonl"
    rows = [
        [{"role": "user", "content": f"and {i}"}, {"role": "assistant", "content": "inn" * (5 + i) + "t"}]
        for i in range(8)
    ]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def store(file, tiny_gguf, tmp_path_factory):
    out = tmp_path_factory.mktemp("store") / "out"
    exact = ("--dtype", "float32", "--taps-dtype", "float32", "--last-dtype", "float32", "--batch-tokens", "256")
    assert main(["capture", str(file), str(out), "--target", str(tiny_gguf), *exact]) == 0
    return FeatureStore(out)


@pytest.fixture(scope="module")
def conversations(file, tiny_gguf):
    data = DataConfig(prompts="none", conversations=str(file))
    return open_conversations(data, open_target(str(tiny_gguf)), ChatTemplate())


@pytest.fixture(scope="module")
def teaching(tiny_gguf, store):
    return Teaching(tiny_gguf, store.token_counts)


def test_the_same_documents(store, conversations):
    assert store.lengths.min() > 32
    assert store.lengths.max() <= 64
    assert conversations.digest == store.digest
    for name in ("lengths", "supervised", "token_counts"):
        assert getattr(conversations, name).tolist() == getattr(store, name).tolist()


@pytest.mark.numeric
def test_the_same_batches_losses_and_gradients(store, conversations, teaching):
    """In float32 to the last bit, where the target reads batches of the shape that capture gave it."""
    online, stored = teaching.pipeline(conversations), teaching.pipeline(store)
    for step in range(3):
        a, b = online.batch(step), stored.batch(step)
        assert_equal(a.batch, b.batch)
        assert a.features is None
    got, want = teaching.epoch(conversations), teaching.epoch(store)
    assert len(got) == 2
    assert all(value > 0 for (value, _), _ in want)
    assert_close(got, want, ulp=0)


@pytest.mark.numeric
def test_packed_batches_too(store, conversations, teaching):
    """Of another shape than capture's, so to rounding."""
    got, want = (teaching.epoch(documents, pack_length=192, batch_size=2) for documents in (conversations, store))
    assert_close(got, want, ulp=80)


def test_one_batch_is_prepared_ahead_and_not_more():
    made, order = [], []

    def prepare(item):
        made.append(item)
        return item * 10

    for prepared in one_ahead(range(4), prepare):
        order.append((prepared, list(made)))
    assert order == [(0, [0, 1]), (10, [0, 1, 2]), (20, [0, 1, 2, 3]), (30, [0, 1, 2, 3])]
    assert list(one_ahead([], prepare)) == []
    assert list(one_ahead([7], prepare)) == [70]


def test_too_many_silent_rows_are_an_error(file, tiny_gguf, tmp_path, capsys):
    target = open_target(str(tiny_gguf))
    silent = json.dumps({"messages": [{"role": "user", "content": "hello?"}]}) + "\n"
    path = tmp_path / "c.jsonl"
    path.write_text(file.read_text() + silent * 2)
    data = DataConfig(prompts="none", conversations=str(path))
    assert len(open_conversations(data, target, ChatTemplate()).lengths) == 8
    assert "2 conversations left out that supervise nothing" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"2 of 10 conversations .* a share of 0.1 \(data.max_silent\)"):
        open_conversations(data.model_copy(update={"max_silent": 0.1}), target, ChatTemplate())


def test_rows_are_cut_at_the_targets_context(tiny_gguf, tmp_path, capsys):
    target, path = open_target(str(tiny_gguf)), tmp_path / "c.jsonl"
    messages = [{"role": "user", "content": "and"}, {"role": "assistant", "content": "inn " * 200}]
    path.write_text(json.dumps({"messages": messages}) + "\n")
    documents = open_conversations(DataConfig(prompts="none", conversations=str(path)), target, ChatTemplate())
    assert documents.lengths.tolist() == [128] == [target.config().context]
    assert "1 conversations cut at 128 tokens" in capsys.readouterr().out
