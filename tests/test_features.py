"""Captured rows on disk: what was written is read, and damage is noticed."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest
from closeness import assert_close

from flaxdraft.data.answer_files import read_rows, write_rows
from flaxdraft.data.documents import Answer
from flaxdraft.errors import InputError
from flaxdraft.files.safetensors_file import load_safetensors, save_safetensors
from flaxdraft.interfaces import Features

NAMES = [field.name for field in dataclasses.fields(Features)]
STORED = ["taps_BT3E", *NAMES[1:]]  # as files call them


def make_rows(lengths=((3, 9), (1, 4), (5, 6))):
    rng = np.random.default_rng(0)
    return [
        Answer(
            rng.integers(0, 999, num).astype(np.int32),
            num_prompt,
            Features(
                rng.normal(size=(num, 3, 4)).astype(np.float32), rng.normal(size=(num, 4)).astype(np.float32),
                rng.integers(0, 999, num).astype(np.int32), rng.normal(size=num).astype(np.float32) * 100,
            ),
        )
        for num_prompt, num in lengths
    ]  # fmt: skip


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "train-00000.safetensors"
    write_rows(path, make_rows(), "float32")
    return path


def test_float32_is_exact(written):
    want = make_rows()
    got = read_rows(written)
    assert [row.num_prompt for row in got] == [3, 1, 5]
    for a, b in zip(got, want, strict=True):
        assert a.tokens.dtype == np.int32
        np.testing.assert_array_equal(a.tokens, b.tokens)
        for name in NAMES:
            x, y = getattr(a.features, name), getattr(b.features, name)
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(x, y, err_msg=name)


def test_bfloat16_rounds_the_wide_features_and_nothing_else(tmp_path):
    path = tmp_path / "a.safetensors"
    write_rows(path, make_rows(), "bfloat16")
    for a, b in zip(read_rows(path), make_rows(), strict=True):
        for name in ("taps_BTKE", "last_BTE"):
            got, exact = getattr(a.features, name), getattr(b.features, name)
            assert got.dtype == ml_dtypes.bfloat16
            assert_close(got, exact, ulp=0.5, of="each")  # rounded to the nearest
            assert not np.array_equal(got.astype(np.float32), exact)
        np.testing.assert_array_equal(a.features.argmax_BT, b.features.argmax_BT)
        np.testing.assert_array_equal(a.features.logsumexp_BT, b.features.logsumexp_BT)
        assert a.features.logsumexp_BT.dtype == np.float32


def test_no_temporary_file_stays(written):
    assert list(written.parent.iterdir()) == [written]


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_chunk_is_refused(written, share):
    whole = written.read_bytes()
    written.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(InputError, match=r"train-00000.safetensors: not a readable safetensors file"):
        read_rows(written)


def test_a_missing_chunk_is_named(tmp_path):
    with pytest.raises(InputError, match=r"train-00007.safetensors"):
        read_rows(tmp_path / "train-00007.safetensors")


@pytest.mark.parametrize("name", ["tokens", "lengths", "num_prompt", *STORED])
def test_a_missing_or_additional_array_is_refused(written, name):
    tensors = load_safetensors(written)
    for broken in ({k: v for k, v in tensors.items() if k != name}, tensors | {f"{name}_2": tensors[name]}):
        save_safetensors(written, broken)
        with pytest.raises(InputError, match=r"train-00000.safetensors: found tensors .* expected .* remove it"):
            read_rows(written)


@pytest.mark.parametrize("name", ["tokens", *STORED, "num_prompt"])
def test_arrays_that_disagree_about_their_length_are_refused(written, name):
    tensors = load_safetensors(written)
    save_safetensors(written, tensors | {name: tensors[name][:-1].copy()})
    with pytest.raises(InputError, match=f"train-00000.safetensors: {name} has .*remove it and run again"):
        read_rows(written)


@pytest.mark.parametrize("name", ["taps_BT3E", "last_BTE"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_not_finite_are_refused(written, name, value):
    tensors = load_safetensors(written)
    array = tensors[name].copy()
    array[-1, ..., 0] = value
    save_safetensors(written, tensors | {name: array})
    with pytest.raises(InputError, match=f"{name} holds values that are not finite; remove it"):
        read_rows(written)
