"""Hidden states in speculators' layout, written as its documentation says, train to what the target's own
store does."""

import json
import re
import shutil
import sys
import types
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pyarrow
import pytest
from closeness import assert_close
from safetensors.numpy import load_file, save_file
from teaching import Teaching
from tiny import write_tiny_gguf

from flaxdraft.data.__main__ import main as data_main
from flaxdraft.data.draft_vocabulary import read_map
from flaxdraft.data.ingest import plan_of
from flaxdraft.data.speculators_folder import SpeculatorsFolder
from flaxdraft.data.store import FeatureStore
from flaxdraft.data.templates import Rendered
from flaxdraft.errors import InputError
from flaxdraft.interfaces import Batch
from flaxdraft.targets import from_pretrained, open_target

sys.path.insert(0, str(Path(__file__).parents[1] / "tools" / "convert"))
import features_from_speculators

V, LAYERS = 266, 8


def call(folder, store, target, *more):
    arguments = [str(folder), str(store), "--target", str(target), "--shard-tokens", "100", *more]
    return features_from_speculators.main(arguments)


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """Its final norm scales, so that it shows where it is applied."""
    return write_tiny_gguf(tmp_path_factory.mktemp("target") / "tiny.gguf", final_norm_noise=0.3)


def test_files_of_no_tokens(capsys):
    with pytest.raises(SystemExit):
        call("folder", "store", "target", "--shard-tokens", "0")
    assert "--shard-tokens: found '0', expected a whole number from 1 on" in capsys.readouterr().err


@pytest.fixture(scope="module")
def native(tmp_path_factory, target):
    """The target's own store of six conversations, float32."""
    root = tmp_path_factory.mktemp("native")
    rows = [
        {"messages": [{"role": "user", "content": f"and {i}"}, {"role": "assistant", "content": "the inn" * (2 + i)}]}
        for i in range(6)
    ]
    (root / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    exact = ("--dtype", "float32", "--taps-dtype", "float32", "--last-dtype", "float32")
    more = ("--target", str(target), *exact)
    assert data_main(["capture", str(root / "chat.jsonl"), str(root / "store"), *more]) == 0
    return FeatureStore(root / "store")


def write_dataset(directory: Path, rows: list[tuple[np.ndarray, np.ndarray]]) -> None:
    """As datasets.Dataset.save_to_disk: Arrow streams, two here, named by state.json."""
    directory.mkdir(parents=True)
    names = []
    for part, chunk in enumerate((rows[:4], rows[4:])):
        names.append(f"data-{part:05d}-of-00002.arrow")
        columns = [[tokens.tolist() for tokens, _ in chunk], [mask.astype(int).tolist() for _, mask in chunk]]
        table = pyarrow.table({"input_ids": columns[0], "loss_mask": columns[1], "seq_len": [*map(len, columns[0])]})
        with (
            pyarrow.OSFile(str(directory / names[-1]), "wb") as file,
            pyarrow.ipc.new_stream(file, table.schema) as out,
        ):
            out.write_table(table)
    files = [{"filename": name} for name in names]
    (directory / "state.json").write_text(json.dumps({"_data_files": files, "_fingerprint": "x", "_split": None}))
    (directory / "dataset_info.json").write_text("{}")


@pytest.fixture(scope="module")
def folder(native, target, tmp_path_factory):
    """The engine: the same target, tapped after its last layer too, before its final norm. Row 2 has not been run,
    row 6 supervises nothing."""
    directory = tmp_path_factory.mktemp("speculators") / "data"
    rows = [(native.row(i).tokens, native.row(i).assistant) for i in range(6)]
    rows.append((rows[0][0], np.zeros_like(rows[0][1])))
    write_dataset(directory, rows)
    (directory / "hidden_states").mkdir()
    with_last = from_pretrained(str(target), tap_layers=[0, 1, LAYERS - 1]).model
    for number, (tokens, _) in enumerate(rows):
        if number == 2:
            continue
        num = len(tokens)
        padded, ones = np.zeros((1, 96), np.int32), np.zeros((1, 96), np.int32)
        padded[0, :num], ones[0, :num] = tokens, 1
        found = with_last.features(Batch(padded, ones > 0, ones, jnp.arange(96)[None]))
        before_norm = np.asarray(found.taps_BTKE)[0, :num, 2:]
        taps = native.row(min(number, 5)).features.taps_BTKE if number < 6 else native.row(0).features.taps_BTKE
        hidden = np.concatenate([taps, before_norm], axis=1)
        path = directory / "hidden_states" / f"hs_{number}.safetensors"
        save_file({"hidden_states": hidden, "token_ids": tokens.astype(np.int64)}, path)
    return directory


@pytest.fixture(scope="module")
def ingested(folder, target, tmp_path_factory):
    out = tmp_path_factory.mktemp("ingested") / "store"
    assert call(folder, out, target) == 0
    return FeatureStore(out)


class Without:
    """Documents without one of them."""

    def __init__(self, documents, left_out):
        self._documents = documents
        self._at = np.delete(np.arange(len(documents.lengths)), left_out)
        self.lengths, self.supervised = documents.lengths[self._at], documents.supervised[self._at]
        self.token_counts, self.digest = documents.token_counts, documents.digest

    def row(self, index):
        return self._documents.row(int(self._at[index]))


@pytest.mark.numeric
def test_the_folder_trains_to_the_same_loss(native, ingested, target, capsys):
    assert len(ingested) == 5
    assert ingested.tap_layers == native.tap_layers
    for name in ("target", "tokenizer", "hidden_size", "vocab_size", "compute_dtype"):
        assert ingested.manifest[name] == native.manifest[name]
    for number, want in enumerate([0, 1, 3, 4, 5]):
        got, row = ingested.row(number), native.row(want)
        np.testing.assert_array_equal(got.tokens, row.tokens)
        np.testing.assert_array_equal(got.assistant, row.assistant)
        np.testing.assert_array_equal(got.features.argmax_BT, row.features.argmax_BT)
        assert_close(got.features.last_BTE, row.features.last_BTE, ulp=40)
        assert_close(got.features.logsumexp_BT, row.features.logsumexp_BT, rtol=1e-6, of="each")
    weights, own = ingested.target(), native.target()
    assert set(weights) == set(own)
    for name, array in own.items():
        np.testing.assert_array_equal(weights[name], array)
    teaching = Teaching(target, native.token_counts)
    got, want = teaching.epoch(ingested), teaching.epoch(Without(native, 2))
    assert all(value > 0 for (value, _), _ in want)
    assert_close(got, want, ulp=160)


def test_what_was_read_and_left_out_is_said(folder, target, tmp_path, capsys):
    assert call(folder, tmp_path / "s", target) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "5 rows, " in text
    assert "taps of layers [1, 3, 4], 2 rows left out" in text
    assert "% of the supervised tokens are the target's argmax" in text
    assert call(folder, tmp_path / "s", target) == 0  # done before


def test_narrow_states_stay_as_they_are(folder, native, target, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "narrow")
    for path in (copy / "hidden_states").iterdir():
        tensors = load_file(path)
        save_file(tensors | {"hidden_states": tensors["hidden_states"].astype(ml_dtypes.bfloat16)}, path)
    assert call(copy, tmp_path / "s", target) == 0
    store = FeatureStore(tmp_path / "s")
    assert store.manifest["taps_dtype"] == store.manifest["last_dtype"] == "bfloat16"
    want = native.row(0).features.taps_BTKE.astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(store.row(0).features.taps_BTKE, want)


def test_a_row_beyond_the_targets_context_is_refused(target):
    long = Rendered(np.ones(129, np.int32), np.ones(129, bool))
    folder = types.SimpleNamespace(rows=[long], name=lambda index: f"hs_{index}")
    with pytest.raises(InputError, match="hs_0: 129 tokens, the target's context is 128; leave the file out"):
        plan_of(folder, open_target(str(target)), [0, 1, 2], 100)


def test_which_head_is_used_is_said(folder, target, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("flaxdraft.data.ingest.say_which_head", asked.append)
    assert call(folder, tmp_path / "s", target) == 0
    assert [opened.path for opened in asked] == [target]


def rewrite(number, **changes):
    def damage(directory):
        path = directory / "hidden_states" / f"hs_{number}.safetensors"
        tensors = load_file(path)
        for name, change in changes.items():
            tensors[name] = np.ascontiguousarray(change(tensors[name]))
        save_file(tensors, path)

    return damage


def cut(directory):
    path = directory / "hidden_states" / "hs_3.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


def without_a_state(directory):
    (directory / "state.json").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (rewrite(1, token_ids=lambda x: x + 1), r"hs_1.safetensors: its token_ids are not the input_ids of row 1"),
        (rewrite(4, hidden_states=lambda x: x[:, :3]), r"hs_4.safetensors: hidden_states has shape .* \[L, 4, E\]"),
        (rewrite(1, hidden_states=lambda x: x[..., :16]), r"hs_1.safetensors: taps has shape .* is of another one"),
        (rewrite(0, hidden_states=lambda x: x * np.nan), r"hs_0.safetensors: taps holds values that are not finite"),
        (rewrite(0, hidden_states=lambda x: x.astype(np.float64)), r"hs_0.safetensors: taps is float64; expected"),
        (cut, r"hs_3.safetensors: not a readable safetensors file"),
        (without_a_state, r"not a data set of save_to_disk .* the folder that prepare_data.py wrote"),
    ],
)
def test_a_damaged_folder_is_named(folder, target, tmp_path, capsys, damage, message):
    copy = shutil.copytree(folder, tmp_path / "copy")
    damage(copy)
    assert call(copy, tmp_path / "s", target) == 2
    assert re.search(message, capsys.readouterr().err.replace("\n", " "))
    with pytest.raises(InputError):
        FeatureStore(tmp_path / "s")


def test_their_draft_vocabulary(tmp_path):
    ids = np.array([0, 3, 4, 17])
    np.save(tmp_path / "d2t.npy", ids - np.arange(4))
    assert read_map(str(tmp_path / "d2t.npy"), V, 4).target_ids_W.tolist() == ids.tolist()
    with pytest.raises(InputError, match=r"holds 4 tokens, draft.draft_vocab_size says 5"):
        read_map(str(tmp_path / "d2t.npy"), V, 5)
    np.save(tmp_path / "ids.npy", ids)
    with pytest.raises(InputError, match=r"ids.npy holds no offsets of this target"):
        read_map(str(tmp_path / "ids.npy"), 18, 4)
    np.save(tmp_path / "pickled.npy", np.array([print]), allow_pickle=True)
    with pytest.raises(InputError, match=r"cannot read .*pickled.npy"):
        read_map(str(tmp_path / "pickled.npy"), V, 1)
    np.save(tmp_path / "wide.npy", np.zeros((2, 2)))
    with pytest.raises(InputError, match=r"wide.npy holds no vector of integers"):
        read_map(str(tmp_path / "wide.npy"), V, 2)


def as_float8(directory, with_scales=True):
    """As hs-connectors keeps the states of row 0: a scale for each token."""
    path = directory / "hidden_states" / "hs_0.safetensors"
    tensors = load_file(path)
    hidden = tensors["hidden_states"]
    scales = np.abs(hidden).max(axis=(1, 2), keepdims=True) / float(ml_dtypes.finfo(ml_dtypes.float8_e4m3fn).max)
    stored = (hidden / scales).astype(ml_dtypes.float8_e4m3fn)
    tensors |= {"hidden_states": stored.view(np.uint8), "hidden_states_scales": scales.astype(np.float32)}
    if not with_scales:
        del tensors["hidden_states_scales"]
    save_file(tensors, path)
    raw = path.read_bytes()  # the safetensors package writes no float8 of numpy's
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header["hidden_states"]["dtype"] = "F8_E4M3"
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    return hidden, scales


def test_float8_states_are_widened(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    hidden, scales = as_float8(copy)
    found = SpeculatorsFolder(copy).states(0)
    assert found.last_LE.dtype == found.taps_LKE.dtype == ml_dtypes.bfloat16
    rounding = np.abs(hidden) * 2**-4 + scales * 2**-9  # of float8, and of bfloat16 behind it
    got = np.concatenate([found.taps_LKE, found.last_LE[:, None]], axis=1).astype(np.float32)
    assert (np.abs(got - hidden) <= rounding).all()
    as_float8(shutil.copytree(folder, tmp_path / "other"), with_scales=False)
    with pytest.raises(InputError, match=r"hs_0.safetensors: hidden_states are float8 and their scales .* not there"):
        SpeculatorsFolder(tmp_path / "other").states(0)
