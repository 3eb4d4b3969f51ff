"""The feature store: what goes in comes out row by row, and nothing that was altered comes out."""

import dataclasses
import json
import re
import shutil

import ml_dtypes
import numpy as np
import pytest

from flaxdraft.data import store as module
from flaxdraft.data.documents import Document
from flaxdraft.data.store import FeatureStore, Source, finish, shard_name, write_shard
from flaxdraft.errors import InputError
from flaxdraft.files.safetensors_file import save_safetensors
from flaxdraft.interfaces import Features

E, V = 8, 50
SOURCE = Source("t" * 8, "k" * 8, "d" * 8, "bfloat16", (1, 3, 5), E, V, "bfloat16", "bfloat16")
LENGTHS = [[3, 9], [5], [2, 4, 6]]


def make_row(length, seed):
    rng = np.random.default_rng(seed)
    taps, last = (rng.normal(size=(length, *tail)).astype(ml_dtypes.bfloat16) for tail in ((3, E), (E,)))
    argmax, logsumexp = rng.integers(0, V, length).astype(np.int32), rng.normal(size=length).astype(np.float32)
    features = Features(taps, last, argmax, logsumexp)
    return Document(rng.integers(0, V, length).astype(np.int32), rng.random(length) < 0.6, features)


ROWS = [[make_row(n, 10 * i + j) for j, n in enumerate(lengths)] for i, lengths in enumerate(LENGTHS)]
FLAT = [row for rows in ROWS for row in rows]


def write_store(directory, source=SOURCE):
    directory.mkdir()
    for i, rows in enumerate(ROWS):
        write_shard(directory, i, rows, source)
    weights = {"embedding": np.ones((V, E), np.float32), "final_norm": np.ones(E, np.float32)}
    save_safetensors(directory / module.TARGET, weights)
    finish(directory, source, len(ROWS))
    return directory


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("store") / "s")


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "copy")


def same(got: Document, want: Document) -> None:
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_array_equal(got.assistant, want.assistant)
    for field in dataclasses.fields(Features):
        a, b = getattr(got.features, field.name), getattr(want.features, field.name)
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b, err_msg=field.name)


def test_rows_come_back_in_any_order(whole):
    store = FeatureStore(whole)
    assert len(store) == len(FLAT)
    assert store.lengths.tolist() == [len(row.tokens) for row in FLAT]
    for i in (5, 0, 2, 1, 4, 3):
        same(store.row(i), FLAT[i])
    assert store.supervised.tolist() == [int(row.assistant.sum()) for row in FLAT]
    want = sum(np.bincount(row.tokens[row.assistant], minlength=V) for row in FLAT)
    np.testing.assert_array_equal(store.token_counts, want)
    assert set(store.target()) == {"embedding", "final_norm"}
    assert store.tap_layers == (1, 3, 5)


def test_fp8_keeps_a_scale_for_each_state(tmp_path):
    store = FeatureStore(write_store(tmp_path / "s", dataclasses.replace(SOURCE, taps_dtype="fp8")))
    for i, row in enumerate(FLAT):
        want = row.features.taps_BTKE.astype(np.float32)
        worst = np.abs(want).max(axis=-1, keepdims=True)
        assert (np.abs(store.row(i).features.taps_BTKE - want) <= 2**-4 * np.abs(want) + 2**-9 * worst).all()


def test_what_the_caller_expects(whole):
    FeatureStore(whole, {"target": "t" * 8, "tap_layers": [1, 3, 5]})
    for name, value in {"target": "other", "tokenizer": "other", "tap_layers": [0, 3, 5]}.items():
        with pytest.raises(InputError, match=rf"manifest.json: {name} is .* expected .*capture again"):
            FeatureStore(whole, {name: value})


@pytest.mark.parametrize("field", ["schema", "taps"])
def test_another_schema_or_convention(copy, field):
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**manifest, field: 99}))
    with pytest.raises(InputError, match=rf"manifest.json: {field} is 99, expected"):
        FeatureStore(copy)


def test_a_stopped_capture_is_no_store(copy, tmp_path):
    (copy / "manifest.json").unlink()
    with pytest.raises(InputError, match="no feature store"):
        FeatureStore(copy)
    (copy / "plan.json").write_text("{}")
    with pytest.raises(InputError, match="a capture that has not finished; run it again"):
        FeatureStore(copy)


def test_a_flipped_byte_names_shard_and_row(copy):
    """Every tenth byte of a shard's data, one at a time; what lies between the rows is nobody's."""
    path = copy / shard_name(2)
    content = path.read_bytes()
    header, named = 8 + int.from_bytes(content[:8], "little"), 0
    for at in range(header, len(content), 10):
        path.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
        store = FeatureStore(copy)
        try:
            for i, row in enumerate(FLAT):
                same(store.row(i), row)
        except InputError as error:
            assert re.search(r"shard-00002.safetensors: row [0-2] \(row [3-5] of", str(error))  # noqa: PT017
            named += 1
        same(store.row(0), FLAT[0])
    assert named > 0.8 * len(range(header, len(content), 10))


@pytest.mark.parametrize("name", ["shard-00001.safetensors", "index.safetensors", "target.safetensors"])
def test_a_missing_cut_or_replaced_file(copy, name):
    path = copy / name
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(InputError, match=rf"{name}: \d+ bytes, the manifest says \d+"):
        FeatureStore(copy)
    path.unlink()
    with pytest.raises(InputError, match=rf"{name}: missing"):
        FeatureStore(copy)


def test_an_altered_index(copy):
    path = copy / "index.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(InputError, match=r"index.safetensors: altered since it was written"):
        FeatureStore(copy)


def test_a_duplicated_shard(copy):
    shutil.copy(copy / shard_name(1), copy / shard_name(7))
    with pytest.raises(InputError, match=r"shard-00007.safetensors: not in the manifest"):
        FeatureStore(copy)


def test_one_shard_in_the_place_of_another(copy):
    """Of equal size, so that only the rows' checksums can tell."""
    first, second = make_row(5, 1), make_row(5, 2)
    write_shard(copy, 1, [second], SOURCE)
    assert (copy / shard_name(1)).stat().st_size == json.loads((copy / "manifest.json").read_text())["shards"][1][
        "bytes"
    ]
    assert first.tokens.tolist() != second.tokens.tolist()
    with pytest.raises(InputError, match=r"shard-00001.safetensors: row 0 \(row 2 of the store\)"):
        FeatureStore(copy).row(2)
