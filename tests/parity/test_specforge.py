"""SpecForge's files of hidden states, built as SpecForge builds them: read, refused, and written."""

import gzip
import io
import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from closeness import assert_close
from teaching import Teaching
from tiny import write_tiny_gguf

from flaxdraft.data.__main__ import main as data_main
from flaxdraft.data.store import FeatureStore

torch = pytest.importorskip("torch", reason="PyTorch is there with the extra `parity`")
pytestmark = pytest.mark.parity

sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "convert"))
import features_from_specforge  # noqa: E402
import features_to_specforge  # noqa: E402


def call(folder, store, target):
    return features_from_specforge.main([str(folder), str(store), "--target", str(target), "--shard-tokens", "100"])


def capture(root, target, *dtypes):
    rows = [
        {"messages": [{"role": "user", "content": f"and {i}"}, {"role": "assistant", "content": "the inn" * (2 + i)}]}
        for i in range(6)
    ]
    (root / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = root / "-".join(dtypes)
    flags = [word for name, dtype in zip(("--dtype", "--taps-dtype", "--last-dtype"), dtypes, strict=True)
             for word in (name, dtype)]  # fmt: skip
    assert data_main(["capture", str(root / "chat.jsonl"), str(out), "--target", str(target), *flags]) == 0
    return FeatureStore(out)


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """Its final norm scales, so that it shows where it is applied."""
    return write_tiny_gguf(tmp_path_factory.mktemp("target") / "tiny.gguf", final_norm_noise=0.3)


@pytest.fixture(scope="module")
def native(tmp_path_factory, target):
    return capture(tmp_path_factory.mktemp("native"), target, "float32", "float32", "float32")


@pytest.fixture(scope="module")
def folder(native, tmp_path_factory):
    """Two of the files compressed, one padded as a batch of the engine is; a draft vocabulary beside them."""
    directory = tmp_path_factory.mktemp("specforge") / "out"
    for index in range(6):
        row = native.row(index)
        record = {
            "input_ids": torch.from_numpy(row.tokens.astype(np.int64)),
            "loss_mask": torch.from_numpy(row.assistant.astype(np.int64)),
            "aux_hidden_state": torch.from_numpy(row.features.taps_BTKE.reshape(1, len(row.tokens), -1).copy()),
            "hidden_state": torch.from_numpy(row.features.last_BTE[None].copy()),
        }
        if index == 3:
            pad = {"input_ids": (0, 5), "loss_mask": (0, 5)}
            record = {name: torch.nn.functional.pad(x, pad.get(name, (0, 0, 0, 5)), value=0 if name in pad else 7.0)
                      for name, x in record.items()}  # fmt: skip
        path = directory / f"rows_{index // 4 * 4}-{index // 4 * 4 + 4}" / f"data_{index}.ckpt"
        path.parent.mkdir(parents=True, exist_ok=True)
        if index in (1, 4):
            buffer = io.BytesIO()
            torch.save(record, buffer)
            with gzip.open(f"{path}.gz", "wb") as file:
                file.write(buffer.getvalue())
        else:
            torch.save(record, path)
    ids = torch.arange(0, 256, 4)
    member = torch.zeros(266, dtype=torch.bool)
    member[ids] = True
    (directory / "vocab_mapping").mkdir()
    torch.save({"d2t": ids - torch.arange(64), "t2d": member}, directory / "vocab_mapping" / "vocab_mapping.pt")
    return directory


def test_the_folder_trains_to_the_same_loss(folder, native, target, tmp_path):
    assert call(folder, tmp_path / "store", target) == 0
    store = FeatureStore(tmp_path / "store")
    for index in range(6):
        got, want = store.row(index), native.row(index)
        np.testing.assert_array_equal(got.tokens, want.tokens)
        np.testing.assert_array_equal(got.assistant, want.assistant)
        np.testing.assert_array_equal(got.features.taps_BTKE, want.features.taps_BTKE)
        np.testing.assert_array_equal(got.features.last_BTE, want.features.last_BTE)
        np.testing.assert_array_equal(got.features.argmax_BT, want.features.argmax_BT)
        assert_close(got.features.logsumexp_BT, want.features.logsumexp_BT, rtol=1e-6, of="each")
    d2t = np.load(tmp_path / "store.d2t.npy")
    np.testing.assert_array_equal(d2t + np.arange(64), np.arange(0, 256, 4))
    teaching = Teaching(target, native.token_counts)
    assert_close(teaching.epoch(store), teaching.epoch(native), ulp=80)


@pytest.mark.parametrize("dtypes", [("bfloat16", "bfloat16", "bfloat16"), ("float32", "float32", "float32")])
def test_there_and_back(target, tmp_path, dtypes):
    before = capture(tmp_path, target, *dtypes)
    assert features_to_specforge.main([str(before.directory), str(tmp_path / "out")]) == 0
    record = torch.load(tmp_path / "out" / "rows_0-2000" / "data_2.ckpt", weights_only=True)
    num = len(before.row(2).tokens)
    assert {name: (tuple(x.shape), str(x.dtype)) for name, x in record.items()} == {
        "input_ids": ((num,), "torch.int64"), "loss_mask": ((num,), "torch.int64"),
        "aux_hidden_state": ((1, num, 96), f"torch.{dtypes[1]}"), "hidden_state": ((1, num, 32), f"torch.{dtypes[2]}"),
    }  # fmt: skip
    assert call(tmp_path / "out", tmp_path / "back", target) == 0
    after = FeatureStore(tmp_path / "back")
    for index in range(6):
        got, want = after.row(index), before.row(index)
        np.testing.assert_array_equal(got.tokens, want.tokens)
        np.testing.assert_array_equal(got.features.taps_BTKE, want.features.taps_BTKE)
        np.testing.assert_array_equal(got.features.last_BTE, want.features.last_BTE)


def test_fp8_taps_are_not_written(target, tmp_path, capsys):
    store = capture(tmp_path, target, "float32", "fp8", "float32")
    assert features_to_specforge.main([str(store.directory), str(tmp_path / "out")]) == 2
    assert "taps_dtype is fp8" in capsys.readouterr().err


class Attack:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("where", ["rows_0-4/data_0.ckpt", "rows_0-4/data_1.ckpt.gz", "vocab_mapping/vocab_mapping.pt"])
def test_a_malicious_pickle_is_refused_and_not_executed(folder, target, tmp_path, capsys, where):
    copy, trace = shutil.copytree(folder, tmp_path / "copy"), tmp_path / "executed"
    buffer = io.BytesIO()
    torch.save({"input_ids": Attack(trace), "loss_mask": torch.ones(3)}, buffer)
    content = buffer.getvalue()
    (copy / where).write_bytes(gzip.compress(content) if where.endswith(".gz") else content)
    assert call(copy, tmp_path / "store", target) == 2
    error = capsys.readouterr().err
    assert re.search(rf"{Path(where).name}: holds more than tensors, and was not loaded", error), error
    assert not trace.exists()
    torch.load(io.BytesIO(content), weights_only=False)  # it would have worked
    assert trace.exists()


def save(record):
    def damage(path):
        torch.save(record, path)

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-99]), r"data_0.ckpt: not a readable torch file"),
        (lambda path: path.write_bytes(b""), r"data_0.ckpt: not a readable torch file"),
        (save({"input_ids": torch.ones(3)}), r"data_0.ckpt: .*: expected a tensor .*, found"),
        (save([1, 2]), r"data_0.ckpt: input_ids: expected a tensor \[L\], found 'NoneType'"),
        (
            save({"input_ids": torch.ones(3, dtype=torch.int64), "loss_mask": torch.ones(3, dtype=torch.int64),
                  "aux_hidden_state": torch.ones(1, 3, 95), "hidden_state": torch.ones(1, 3, 32)}),
            r"data_0.ckpt: aux_hidden_state has width 95",
        ),
        (
            save({"input_ids": torch.ones(3), "loss_mask": torch.ones(3), "aux_hidden_state": torch.ones(1, 3, 96),
                  "hidden_state": torch.ones(1, 3, 32)}),
            r"data_0.ckpt: expected token ids from 0 on and a mask of 0 and 1",
        ),
        (
            save({"input_ids": torch.ones(3, dtype=torch.bfloat16), "loss_mask": torch.ones(3, dtype=torch.bfloat16),
                  "aux_hidden_state": torch.ones(1, 3, 96), "hidden_state": torch.ones(1, 3, 32)}),
            r"data_0.ckpt: expected token ids from 0 on and a mask of 0 and 1",
        ),
        (
            save({"input_ids": torch.ones(3, dtype=torch.int64), "loss_mask": torch.ones(3, dtype=torch.int64),
                  "aux_hidden_state": torch.ones(1, 3, 96).to(torch.float8_e4m3fn),
                  "hidden_state": torch.ones(1, 3, 32)}),
            r"data_0.ckpt: taps is float8_e4m3fn; expected one of",
        ),
    ],
)  # fmt: skip
def test_a_damaged_file_is_named(folder, target, tmp_path, capsys, damage, message):
    copy = shutil.copytree(folder, tmp_path / "copy")
    damage(copy / "rows_0-4" / "data_0.ckpt")
    assert call(copy, tmp_path / "store", target) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error


def test_a_folder_of_something_else(target, tmp_path, capsys):
    assert call(tmp_path, tmp_path / "store", target) == 2
    assert "holds no .ckpt or .ckpt.gz files" in capsys.readouterr().err
