"""Accumulation: micro-batches are one big batch, and every matrix gradient crosses devices once, after the loop."""

import collections
import dataclasses
import re

import jax
import numpy as np
import pytest
from training import ALGORITHM, host_batch, setup, train

from flaxdraft.train import step as step_module
from flaxdraft.train.step import summed_gradients


def gradients(num_microbatches: int):
    """Loss and gradients of one global batch on one device."""
    host, head_WE = host_batch()
    run = setup("llama", {}, head_WE)

    def of_sums(params, frozen, example):
        def terms(params, part):
            sums = ALGORITHM.loss_sums(step_module.nnx.merge(run.graphdef, params, frozen), part)
            return ALGORITHM.loss_terms(sums)[0], sums

        sums, grads = summed_gradients(terms, params, example, num_microbatches)
        return ALGORITHM.mean_loss(sums), sums, grads

    with jax.set_mesh(run.mesh):
        accepted = jax.numpy.zeros(ALGORITHM.num_steps)
        example = dataclasses.replace(run.example(host), accepted_J=accepted)
        return jax.device_get(jax.jit(of_sums)(run.params, run.frozen, example))


def test_micro_batches_equal_one_big_batch():
    """Rows are supervised from different places on, one not at all: means of means would differ."""
    loss, sums, grads = gradients(1)
    split_loss, split_sums, split_grads = gradients(4)
    np.testing.assert_allclose(split_loss, loss, rtol=1e-6)
    for name in ("loss_count_J", "row_count_J", "hit_J", "prefix_hit_J"):
        np.testing.assert_array_equal(getattr(split_sums, name), getattr(sums, name))
    for a, b in zip(jax.tree.leaves(split_grads), jax.tree.leaves(grads), strict=True):
        assert np.linalg.norm(a - b) < 1e-6 * np.linalg.norm(b)


def computations(text: str) -> dict[str, str]:
    """The computations of an HLO module by name."""
    found = {}
    for part in re.split(r"\n\n", text):
        header = re.match(r"\s*(?:ENTRY )?%?([\w.\-]+) \(", part)
        if header:
            found[header.group(1)] = part
    return found


def inside_loops(parts: dict[str, str]) -> set[str]:
    """The computations that some while loop runs."""
    waiting = [name for text in parts.values() for name in re.findall(r"(?:body|condition)=%?([\w.\-]+)", text)]
    seen = set()
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += [other for other in re.findall(r"%?([\w.\-]+)", parts[name]) if other in parts]
    return seen


def reduced_operands(text: str) -> tuple[collections.Counter, collections.Counter]:
    """Operands of the cross-device reductions inside and outside of loops, counted by shape, turned or not."""
    parts = computations(text)
    loops = inside_loops(parts)
    counts = collections.Counter(), collections.Counter()
    for name, part in parts.items():
        for result in re.findall(r" = (.*?) (?:all-reduce|reduce-scatter)(?:-start)?\(", part):
            shapes = (tuple(sorted(map(int, dims.split(",")))) for dims in re.findall(r"f32\[([\d,]+)\]", result))
            counts[name not in loops].update(shapes)
        assert " reduce-scatter(" not in part  # XLA's CPU compiler makes none: its result would need another shape
    return counts


def matrices(counts: collections.Counter) -> int:
    """How many operands have the rank of a matrix gradient, or of a half of one; activations have more."""
    return sum(number for shape, number in counts.items() if len(shape) == 2)


def matrix_shapes(trained, tensor: int) -> collections.Counter:
    """Of each device's part of the gradients before the reduction: whole along fsdp, cut along tensor."""
    shapes = collections.Counter()
    for path, leaf in jax.tree_util.tree_leaves_with_path(trained.params):
        if leaf.ndim > 1:
            name = jax.tree_util.keystr(path)
            cut = 0 if re.search("o_proj|down_proj", name) else 1
            whole = re.search("q_a_proj|kv_a_proj", name)
            parts = (n // (tensor if axis == cut and not whole else 1) for axis, n in enumerate(leaf.shape))
            shapes[tuple(sorted(parts))] += 1
    return shapes


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("llama", {"data": 8}),
        ("llama", {"fsdp": 8}),
        ("mla", {"fsdp": 4, "tensor": 2}),
        pytest.param("llama", {"data": 2, "fsdp": 2, "sequence": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_every_matrix_gradient_is_reduced_once_after_the_loop(name, shape):
    trained = train(name, shape, 2)
    inside, outside = reduced_operands(trained.text)
    wanted = matrix_shapes(trained, shape.get("tensor", 1))
    assert sum(wanted.values()) > 8
    assert {key: outside[key] for key in wanted} == dict(wanted)
    assert not matrices(inside), inside


@pytest.mark.slow
def test_the_plain_way_would_be_seen(monkeypatch):
    """Without the types that leave gradients unreduced, every micro-batch reduces them."""
    monkeypatch.setattr(step_module, "_together", lambda x, axes, trained: x)
    trained = train("llama", {"data": 8}, 2, rms_norm_eps=1.1e-5)  # a field of its own: not the other tests' program
    inside, _ = reduced_operands(trained.text)
    assert matrices(inside) >= sum(matrix_shapes(trained, 1).values()), inside
