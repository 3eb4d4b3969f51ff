"""Whether arrays agree to rounding, on any CPU.

A CPU's instructions decide in which order a sum is taken and whether a product is rounded before it is added, so the
last digits of a result differ from one CPU to the next. How many of them differ does not depend on how large the values
are. Bounds are therefore counted in units in the last place (ulp): one is the gap between a float and the next one.
"""

import jax
import jax.numpy as jnp
import numpy as np


def assert_close(got, want, *, ulp=None, summands=None, rtol=None, of="largest", dtype=None, path=""):
    """Two pytrees have the same structure, shapes and kinds of number, and the same values: integers and booleans
    exactly, floats within a bound, which one of `ulp`, `summands` and `rtol` gives. NaN is close to nothing.

    Args:
        ulp: how many units in the last place two values may be apart, counted in the narrower type of the two.
        summands: how many numbers n each value is the sum of; those of sums that follow upon each other add up.
            2 * sqrt(n) * eps * (the largest value) is allowed. Rounding gives a sum an error of at most
            c * sqrt(n) * u * sum(|x|), u = eps / 2, with a small c (Higham and Mary, A New Approach to Probabilistic
            Rounding Error Analysis, 2019), and two orders of a sum twice that; c is taken as 2. Where nothing cancels,
            sum(|x|) is the value itself. Where signs are random it is sqrt(n) times as much, but then the error loses
            the same factor (the same, Sharper Probabilistic Backward Error Analysis for Basic Linear Algebra Kernels
            with Random Data, 2020). 2 * sqrt(n) is at most n, the bound that always holds, from n = 4 on.
        rtol: a share of the values, for bounds that are stated so.
        of: what the bound is counted of: the "largest" wanted value of each array; or "each" value itself, where those
            of one array differ by magnitudes; or the "norm" of an array, which limits the norm of the difference, where
            an array has a few large values and many small ones.
        dtype: the type that the values were computed in, where they are kept in a wider one.
        path: what is compared; failures begin with it.

    Raises:
        AssertionError: names the place in the tree, the worst value there, what was wanted and how far apart they are.
    """
    assert (ulp is None) + (summands is None) + (rtol is None) == 2, "give one of ulp, summands and rtol"
    found, wanted = jax.tree.structure(got), jax.tree.structure(want)
    assert found == wanted, f"{path}: found the structure {found}, expected {wanted}"
    for (keys, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        where = path + jax.tree_util.keystr(keys)
        a, b = np.asarray(a), np.asarray(b)
        assert a.shape == b.shape, f"{where}: found the shape {a.shape}, expected {b.shape}"
        assert _is_float(a) == _is_float(b), f"{where}: found {a.dtype}, expected {b.dtype}"
        if not _is_float(b):
            assert a.dtype.kind == b.dtype.kind, f"{where}: found {a.dtype}, expected {b.dtype}"
            np.testing.assert_array_equal(a, b, err_msg=where)
            continue
        info = jnp.finfo(dtype or max(a.dtype, b.dtype, key=lambda one: jnp.finfo(one).eps))
        a, b = a.astype(np.float64), b.astype(np.float64)
        off, size = _distance(a, b, of)
        unit = unit_in_last_place(size, info)
        share = rtol if summands is None else 2 * np.sqrt(summands) * float(info.eps)
        bound = share * size if ulp is None else ulp * unit
        _check(a, b, off, bound, unit, f"{where or 'value'}: ", f"of {of} as {info.dtype}")


def unit_in_last_place(value, info) -> np.ndarray:
    """The gap between a magnitude and the next larger float (`numpy.spacing`, but of bfloat16 too)."""
    _, exponent = np.frexp(np.maximum(value, float(info.smallest_normal)))
    return np.ldexp(float(info.eps), exponent - 1)


def _is_float(array) -> bool:
    return jnp.issubdtype(array.dtype, jnp.floating)


def _distance(a, b, of):
    """How far two arrays are apart, and of how much; both have the shape of the arrays, but for norms."""
    if of == "norm":
        return np.linalg.norm(a - b), np.linalg.norm(b)
    with np.errstate(invalid="ignore"):
        off = np.where(a == b, 0.0, np.abs(a - b))  # equal infinities are 0 apart
    magnitude = np.where(np.isfinite(b), np.abs(b), 0.0)
    if of == "each":
        return off, magnitude
    assert of == "largest", of
    return off, np.broadcast_to(magnitude.max(initial=0.0), b.shape)


def _check(a, b, off, bound, unit, where, what):
    within = off <= bound  # false of NaN
    if np.all(within):
        return
    in_units = off / unit
    far = f"units in the last place ({what}) apart, {np.max(bound / unit):.4g} allowed"
    if np.ndim(off) == 0 < a.ndim:
        raise AssertionError(f"{where}all together {in_units:.4g} {far}")
    worst = np.unravel_index(np.argmax(np.where(np.isnan(in_units), np.inf, np.where(within, 0, in_units))), a.shape)
    place = f"at {list(map(int, worst))} " if a.ndim else ""
    raise AssertionError(
        f"{where}{place}found {float(a[worst])!r}, expected {float(b[worst])!r}: {in_units[worst]:.4g} {far}; "
        f"{np.sum(~within)} of {a.size} values are too far off"
    )
