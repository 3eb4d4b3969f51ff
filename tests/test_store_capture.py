"""Conversations into a feature store: the target's own numbers, whoever was stopped or helped."""

import contextlib
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closeness import assert_close

from flaxdraft.data import store_capture, store_writer
from flaxdraft.data.__main__ import main
from flaxdraft.data.conversations import read_conversations
from flaxdraft.data.store import MANIFEST, TARGET, FeatureStore, Source, shard_name
from flaxdraft.data.templates import ChatOptions, render, render_all
from flaxdraft.errors import InputError
from flaxdraft.interfaces import Batch
from flaxdraft.targets import from_pretrained


def chat(number: int) -> dict:
    turns = [{"role": "user", "content": f"and {number}"}, {"role": "assistant", "content": "the inn " * (number % 5)}]
    return {"id": str(number), "messages": turns * (1 + number % 2)}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Ten conversations, two of which supervise nothing."""
    path = tmp_path_factory.mktemp("chat") / "chat.jsonl"
    silent = {"messages": [{"role": "user", "content": "hello?"}]}
    rows = [*map(chat, range(8)), silent | {"id": "s"}, silent | {"id": "t"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


EXACT = (
    "--dtype", "float32", "--taps-dtype", "float32", "--last-dtype", "float32", "--shard-tokens", "100",
    "--batch-tokens", "160",
)  # fmt: skip


def call(file, out, target, *more):
    return main(["capture", str(file), str(out), "--target", str(target), *EXACT, *more])


@pytest.fixture(scope="module")
def store(file, tiny_gguf, tmp_path_factory):
    out = tmp_path_factory.mktemp("store") / "out"
    assert call(file, out, tiny_gguf) == 0
    return out


def contents(directory) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


@pytest.mark.numeric
def test_rows_hold_what_the_target_says(store, file, tiny_gguf):
    opened = FeatureStore(store)
    loaded = from_pretrained(str(tiny_gguf), tap_layers=opened.tap_layers)
    assert opened.tap_layers == (1, 3, 4)
    rows = [render(loaded.tokenizer, row, ChatOptions(4096)) for row in read_conversations(file)]
    rows = [row for row in rows if row.assistant.any()]
    assert len(opened) == len(rows) == 8
    assert len(opened.manifest["shards"]) > 2
    for number, want in enumerate(rows):
        got, num = opened.row(number), len(want.tokens)
        np.testing.assert_array_equal(got.tokens, want.tokens)
        np.testing.assert_array_equal(got.assistant, want.assistant)
        tokens, ones = jnp.asarray(want.tokens[None]), jnp.ones((1, num), jnp.int32)
        alone = loaded.model.features(Batch(tokens, ones > 0, ones, jnp.arange(num)[None]))
        assert_close(got.features, jax.tree.map(lambda x: x[0], alone), ulp=80)
    weights = opened.target()
    np.testing.assert_array_equal(weights["embedding"], loaded.model.embedding())
    assert set(weights) == {"embedding", "final_norm"}  # the tiny target's head is tied
    counts = np.bincount(np.concatenate([row.tokens[row.assistant] for row in rows]), minlength=266)
    np.testing.assert_array_equal(opened.token_counts, counts)


def test_a_stopped_capture_ends_with_the_same_store(store, file, tiny_gguf, tmp_path, monkeypatch):
    out, written = tmp_path / "out", []
    write = store_writer.write_shard

    def stop_at_the_second(directory, index, *rest):
        if written:
            (directory / f"{shard_name(index)}.tmp").write_bytes(b"half")
            raise KeyboardInterrupt
        written.append(index)
        write(directory, index, *rest)

    monkeypatch.setattr(store_writer, "write_shard", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        call(file, out, tiny_gguf)
    with pytest.raises(InputError, match="a capture that has not finished; run it again"):
        FeatureStore(out)
    before = (out / shard_name(0)).stat().st_mtime_ns
    monkeypatch.setattr(store_writer, "write_shard", write)
    assert call(file, out, tiny_gguf) == 0
    assert (out / shard_name(0)).stat().st_mtime_ns == before
    assert contents(out) == contents(store)


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_capture_killed_at_random_points_ends_with_the_same_store(tmp_path, kills):
    command = [sys.executable, str(Path(__file__).with_name("kill_capture.py")), str(tmp_path), str(kills), "7"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    stopped = re.search(rf"(\d+) of {kills} were stopped before their end", done.stdout)
    assert int(stopped[1]) > kills // 2


@pytest.mark.slow
def test_the_command_killed_at_random_points_ends_with_the_same_store(store, file, tiny_gguf, tmp_path):
    """Twenty times, each going on behind the last; with the real target."""
    out = tmp_path / "out"
    arguments = [sys.executable, "-m", "flaxdraft.data", "capture", str(file), str(out), "--target", str(tiny_gguf)]
    rng = np.random.default_rng(3)
    for _ in range(20):
        process = subprocess.Popen([*arguments, *EXACT], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(rng.uniform(2, 12))
        process.kill()
        process.wait()
    assert call(file, out, tiny_gguf) == 0
    assert contents(out) == contents(store)


def test_parts_make_the_same_store(store, file, tiny_gguf, tmp_path, capsys):
    out = tmp_path / "out"
    assert call(file, out, tiny_gguf, "--part", "0/2") == 0
    assert "run part 0 again" in capsys.readouterr().out
    assert (out / TARGET).exists()
    assert not (out / MANIFEST).exists()
    assert call(file, out, tiny_gguf, "--part", "1/2") == 0
    assert call(file, out, tiny_gguf, "--part", "0/2") == 0
    assert f"{out}: complete" in capsys.readouterr().out
    assert contents(out) == contents(store)


def test_the_plan_says_what_the_store_takes(store, file, tiny_gguf, tmp_path, capsys):
    assert call(file, tmp_path / "none", tiny_gguf, "--plan") == 0
    text = " ".join(capsys.readouterr().out.split())
    opened = FeatureStore(store)
    assert f"8 rows, {opened.lengths.sum()} tokens, {opened.supervised.sum()} supervised, 2 rows left out" in text
    assert "coverage by draft_vocab_size: 256 100.0%" in text
    assert not (tmp_path / "none").exists()
    config = from_pretrained(str(tiny_gguf), tap_layers=(1, 3, 4)).model.config
    documents = render_all(read_conversations(file), from_pretrained(str(tiny_gguf)).tokenizer, ChatOptions(4096), 0.5)
    manifest = opened.manifest
    fields = ("target", "tokenizer", "data", "compute_dtype", "hidden_size", "vocab_size", "taps_dtype", "last_dtype")
    source = Source(**{name: manifest[name] for name in fields}, tap_layers=config.tap_layers)
    plan = store_writer.make_plan(source, [len(row.tokens) for row in documents.rows], 100, tied=True)
    real = sum(path.stat().st_size for path in store.iterdir())
    assert abs(plan.num_bytes - real) < 0.1 * real


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--max-length", "30"), "holds a capture of something else (data: there"),
        (("--taps-dtype", "fp8"), "taps_dtype: there 'float32', here 'fp8'"),
        (("--max-silent", "0.1"), "2 of 10 conversations supervise nothing, more than a share of 0.1"),
    ],
)
def test_another_capture_is_refused(store, file, tiny_gguf, capsys, more, message):
    assert call(file, store, tiny_gguf, *more) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")


def test_a_full_disk_and_features_that_are_not_finite(file, tiny_gguf, tmp_path, capsys, monkeypatch):
    usage = store_writer.shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(store_writer.shutil, "disk_usage", lambda path: usage._replace(free=1000))
        assert call(file, tmp_path / "full", tiny_gguf) == 2
    assert "are still to be written, 0.0 GB are free" in capsys.readouterr().err
    get = jax.device_get
    broken = lambda x: jax.tree.map(lambda leaf: leaf * np.nan if leaf.dtype == np.float32 else leaf, get(x))  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(store_capture.jax, "device_get", broken)
        assert call(file, tmp_path / "nan", tiny_gguf) == 2
    assert "the target's features are not finite" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        call(file, tmp_path / "part", tiny_gguf, "--part", "2/2")
    assert "expected I/N with I from 0 to N - 1" in capsys.readouterr().err


@pytest.mark.numeric
def test_a_mesh_gives_the_same_store(store, file, tiny_gguf, tmp_path):
    """To rounding; its weights, too, which lie in pieces."""
    assert call(file, tmp_path / "out", tiny_gguf, "--mesh", "fsdp=4,tensor=2") == 0
    whole, split = FeatureStore(store), FeatureStore(tmp_path / "out")
    assert len(whole) == len(split) == 8
    for number in range(8):
        got, want = split.row(number), whole.row(number)
        np.testing.assert_array_equal(got.tokens, want.tokens)
        assert_close(got.features, want.features, ulp=80)
    assert_close(split.target(), whole.target(), ulp=0)
