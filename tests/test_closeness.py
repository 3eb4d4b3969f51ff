"""What the tests' own comparison lets through, and what it catches and says."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from closeness import assert_close, unit_in_last_place

WANT = np.asarray([[1.5, -0.001, 100.0], [0.0, 3.0, 7.0]], np.float32)  # one ulp of 100 is 2**-17
ULP = 2.0**-17


def moved(by, at=(1, 1)):
    array = WANT.astype(np.float64)
    array[at] += by
    return array.astype(np.float32)


def test_a_unit_is_numpys():
    values = np.asarray([1e-45, 1e-38, 0.1, 1.0, 1.9999999, 2.0, 100.0, 3e38], np.float32)
    np.testing.assert_array_equal(unit_in_last_place(values, jnp.finfo(np.float32)), np.spacing(values))
    doubles = values.astype(np.float64)
    np.testing.assert_array_equal(unit_in_last_place(doubles, jnp.finfo(np.float64)), np.spacing(doubles))
    assert unit_in_last_place(1.0, jnp.finfo(jnp.bfloat16)) == 2.0**-7


def test_up_to_the_bound_passes():
    assert_close({"a": moved(4 * ULP), "b": [3]}, {"a": WANT, "b": [3]}, ulp=4)
    assert_close(moved(-4 * ULP), WANT, ulp=4)
    assert_close(WANT, WANT, ulp=0)
    assert_close(np.zeros((0, 3), np.float32), np.zeros((0, 3), np.float32), ulp=0)
    assert_close(np.asarray([np.inf, -np.inf, 1]), np.asarray([np.inf, -np.inf, 1]), ulp=0)


def test_one_value_beyond_it_is_named():
    message = (
        r"weights\['a'\]\[1\]: at \[1, 1\] found 3.0000381\d*, expected 3.0: 5 units in the last place "
        r"\(of largest as float32\) apart, 4 allowed; 1 of 6 values are too far off"
    )
    with pytest.raises(AssertionError, match=message):
        assert_close({"a": [WANT, moved(5 * ULP)]}, {"a": [WANT, WANT]}, ulp=4, path="weights")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none_are_caught(bad):
    for bound in ({"ulp": 1e9}, {"summands": 10**9}, {"rtol": 1e9}):
        for of in ("largest", "each", "norm"):
            with pytest.raises(AssertionError, match="units in the last place"):
                assert_close(moved(bad), WANT, of=of, **bound)
    with pytest.raises(AssertionError, match=r"at \[1, 1\] found nan, expected nan"):
        assert_close(moved(np.nan), moved(np.nan), ulp=8)


def test_the_bound_counts_in_the_narrower_type():
    """Which is the wider unit, whichever side has it."""
    exact = WANT / 3
    narrow = exact.astype(ml_dtypes.bfloat16)
    for got, want in ((exact, narrow), (narrow, exact), (jnp.asarray(narrow), exact)):
        assert_close(got, want, ulp=0.5, of="each")
    with pytest.raises(AssertionError, match="as float32"):
        assert_close(narrow.astype(np.float32), exact, ulp=0.5, of="each")
    wide = WANT.astype(np.float64) * (1 + 1e-7)
    with pytest.raises(AssertionError, match="as float64"):
        assert_close(wide, WANT.astype(np.float64), ulp=2)
    assert_close(wide, WANT.astype(np.float64), ulp=2, dtype=np.float32)


def test_each_value_by_its_own_size():
    tiny = moved(1e-8, (0, 1))  # a hundred thousandth of that value
    assert_close(tiny, WANT, ulp=1)
    with pytest.raises(AssertionError, match=r"at \[0, 1\] .* \(of each as float32\) apart, 1 allowed"):
        assert_close(tiny, WANT, ulp=1, of="each")
    assert_close(np.nextafter(np.nextafter(WANT + 1, 0), 0), WANT + 1, ulp=2, of="each")
    with pytest.raises(AssertionError, match=r"at \[1, 0\] found 1.0\d*e-30"):
        assert_close(moved(1e-30, (1, 0)), WANT, ulp=100, of="each")  # exactly 0 is wanted


def test_norms():
    """Of the difference, against that of what is wanted; small values may be off by more than their size."""
    assert_close(moved(3e-5), WANT, rtol=1e-6, of="norm")
    with pytest.raises(AssertionError, match=r"all together .* \(of norm as float32\) apart"):
        assert_close(WANT + np.float32(6e-5), WANT, rtol=1e-6, of="norm")


def test_summands_allow_what_the_order_of_a_sum_may_change():
    x = np.random.default_rng(0).normal(size=(50, 1000)).astype(np.float32)
    one_by_one = np.add.accumulate(x, axis=1)[:, -1]
    assert_close(one_by_one, x.astype(np.float64).sum(axis=1), summands=1000)
    with pytest.raises(AssertionError):
        assert_close(one_by_one, x.astype(np.float64).sum(axis=1), summands=1)


@pytest.mark.parametrize(
    ("got", "want", "message"),
    [
        (WANT[0], WANT, r"x\['y'\]: found the shape \(3,\), expected \(2, 3\)"),
        (np.float32(1), np.ones(3, np.float32), r"the shape \(\), expected \(3,\)"),
        (np.ones(3, np.int32), np.ones(3, np.float32), r"x\['y'\]: found int32, expected float32"),
        (np.ones(3, bool), np.ones(3, np.int32), r"x\['y'\]: found bool, expected int32"),
        (np.asarray([1, 2, 4]), np.asarray([1, 2, 3]), r"x\['y'\]\s+Mismatched elements: 1 / 3"),
        (np.asarray([True]), np.asarray([False]), "Mismatched elements"),
        ([WANT], WANT, "x: found the structure"),
    ],
)
def test_other_differences_are_named(got, want, message):
    with pytest.raises(AssertionError, match=message):
        assert_close({"y": got}, {"y": want}, ulp=1e9, path="x")


def test_one_bound_is_given():
    with pytest.raises(AssertionError, match="give one of ulp, summands and rtol"):
        assert_close(1.0, 1.0)
