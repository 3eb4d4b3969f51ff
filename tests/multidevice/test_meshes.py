"""Training over every axis of the mesh: the loss curve, the counts and the weights of one device; and of the same
programs, that every matrix gradient crosses devices once, after the loop over micro-batches."""

import itertools
import re

import numpy as np
import pytest
from closeness import assert_close
from reductions import matrices, matrix_shapes, reduced_operands
from test_contracts import DRAFTS
from training import E, train

from flaxdraft.devices.mesh import AXES, make_mesh
from flaxdraft.errors import InputError
from flaxdraft.train import step as step_module

AXIS_NAMES = [axis for axis in AXES if axis != "expert"]
COUNTS = ("loss_count_J", "row_count_J", "hit_J", "prefix_hit_J")
SHAPES = [{axis: size} for axis in AXIS_NAMES for size in (8, 4, 2)]
# Both shapes of each pair. Which axis is written first does not matter: the mesh has its own order of axes (mesh.AXES),
# in which 2 x 4 and 4 x 2 cut arrays differently and make different groups of neighbours.
SHAPES += [{a: 2, b: 4} for a, b in itertools.permutations(AXIS_NAMES, 2)]
SHAPES += [{"fsdp": 2, "tensor": 2, "sequence": 2}]
# By default every axis, `tensor` together with another; what a draft's own projections do on an axis is much the same.
DEFAULT = {"llama": ({"data": 8}, {"fsdp": 8}, {"sequence": 8}), "mla": ({"fsdp": 4, "tensor": 2},)}
# What every change has to pass besides: each axis alone, for one draft, and three together, for all drafts. Other
# meshes are for changes of sharding.
TOGETHER = [{"fsdp": 2, "tensor": 2, "sequence": 2}]
SLOW = {"llama": [*({axis: 8} for axis in AXIS_NAMES), *TOGETHER]}


def cases():
    """A draft and a mesh each."""
    for name in DRAFTS:
        for shape in SHAPES:
            usual = shape in SLOW.get(name, TOGETHER)
            marks = (pytest.mark.slow,) if usual else (pytest.mark.slow, pytest.mark.exhaustive)
            marks = () if shape in DEFAULT.get(name, ()) else marks
            yield pytest.param(name, shape, id=f"{name}-{shape}", marks=marks)


def check(got, want):
    assert_close(got.losses, want.losses, ulp=80, dtype=np.float32)
    for a, b in zip(got.sums, want.sums, strict=True):
        for name in COUNTS:
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    assert_close(got.params, want.params, ulp=80, of="norm")
    assert got.losses[3] < got.losses[0]  # the same batch


@pytest.mark.parametrize(("name", "shape"), [*cases()])
def test_the_curve_is_that_of_one_device(name, shape):
    """In two micro-batches, and in one on one device."""
    got = train(name, shape, 2)
    check(got, train(name, {}, 1))
    # Weights and their moments lie in the same pieces.
    per_name = {path: specs for path, specs in got.specs.items() if re.search(r"(kernel|scale)", path)}
    assert per_name
    assert all(len(specs) == 1 for specs in per_name.values()), per_name


@pytest.mark.slow
@pytest.mark.parametrize("shape", [{"fsdp": 2, "tensor": 2, "sequence": 2}], ids=str)
def test_a_trained_embedding(shape):
    """A draft of another width than its target's owns an embedding, whose vocabulary and width are split."""
    fields = {"hidden_size": E // 2}
    check(train("llama", shape, 2, **fields), train("llama", {}, 1, **fields))


@pytest.mark.slow
def test_muon():
    check(train("llama", {"fsdp": 4, "tensor": 2}, 2, "muon"), train("llama", {}, 1, "muon"))


def test_more_devices_than_there_are():
    with pytest.raises(InputError, match=r"mesh.data: 16, mesh.tensor: 4 devices were asked for, 8 are visible"):
        make_mesh(data=16, tensor=4)


@pytest.mark.parametrize(
    ("shape", "fields", "message"),
    [
        ({"tensor": 8}, {"num_key_value_heads": 4}, r"mesh.tensor: 8 devices do not divide num_key_value_heads \(4,\)"),
        ({"tensor": 8}, {"intermediate_size": 44}, r"mesh.tensor: 8 .* mlp/\w+/kernel .* a divisor of 44"),
        ({"fsdp": 8}, {"hidden_size": 36}, r"mesh.fsdp: 8 devices do not divide embed_tokens \(64, 36\)"),
    ],
)
def test_a_mesh_that_does_not_divide_is_refused(shape, fields, message):
    with pytest.raises(InputError, match=message):
        train("llama", shape, 1, **fields)


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
