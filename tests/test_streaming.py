"""Weights on their way from a file to their devices: every value arrives, and few are under way at a time."""

import threading
import time
from itertools import pairwise

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from flaxdraft.devices.mesh import make_mesh
from flaxdraft.errors import InputError
from flaxdraft.files import streaming
from flaxdraft.files.leaves import Leaf
from flaxdraft.files.name_tables import ArraySource, load_state

L, X, D, F, V = 3, 4, 8, 12, 40
TABLE = (
    ("embed", "embed.weight", "copy"),
    ("layers/kernel", "layers.{i}.proj.weight", "transpose"),
    ("layers/scale", "layers.{i}.norm.weight", "copy"),
    ("layers/experts", "layers.{i}.experts.{e}.weight", "transpose"),
)
SHAPES = {"embed": (V, D), "layers/kernel": (L, D, F), "layers/scale": (L, D), "layers/experts": (L, X, D, F)}
SPECS = {
    "embed": ("tensor", "fsdp"), "layers/kernel": (None, "fsdp", "tensor"), "layers/scale": (),
    "layers/experts": (None, "expert", "fsdp", "tensor"),
}  # fmt: skip
MESHES = {"one": None, "fsdp 2, tensor 2, expert 2": {"fsdp": 2, "tensor": 2, "expert": 2}, "data 2": {"data": 2}}


@pytest.fixture(autouse=True)
def devices_with_memory_of_their_own(monkeypatch):
    monkeypatch.setattr(streaming, "_on_host", lambda place: False)


def tensors(dtype=ml_dtypes.bfloat16):
    rng, out = np.random.default_rng(0), {}
    add = lambda name, *shape: out.update({name: rng.normal(size=shape).astype(dtype)})  # noqa: E731
    for i in range(L):
        add(f"layers.{i}.proj.weight", F, D)
        add(f"layers.{i}.norm.weight", D)
        for e in range(X):
            add(f"layers.{i}.experts.{e}.weight", F, D)
    add("embed.weight", V, D)
    return out


def load(source, mesh_sizes, dtype):
    abstract = nnx.from_flat_state(
        [(tuple(name.split("/")), nnx.Param(jax.ShapeDtypeStruct(shape, dtype))) for name, shape in SHAPES.items()]
    )
    places = None
    if mesh_sizes is not None:
        mesh = make_mesh(**mesh_sizes)
        places = {tuple(name.split("/")): jax.NamedSharding(mesh, jax.P(*spec)) for name, spec in SPECS.items()}
    return load_state(abstract, TABLE, source, {"layers": range(L)}, X, places), places


def assert_all_there(state, held, dtype):
    want = {
        "embed": held["embed.weight"], "layers/scale": np.stack([held[f"layers.{i}.norm.weight"] for i in range(L)]),
        "layers/kernel": np.stack([held[f"layers.{i}.proj.weight"].T for i in range(L)]),
        "layers/experts": np.stack(
            [[held[f"layers.{i}.experts.{e}.weight"].T for e in range(X)] for i in range(L)]
        ),
    }  # fmt: skip
    for path, variable in nnx.to_flat_state(state):
        got = np.asarray(variable[...])
        assert got.dtype == dtype
        np.testing.assert_array_equal(got, want["/".join(path)].astype(dtype), "/".join(path))


@pytest.mark.parametrize("piece", [1 << 23, 100, 1], ids=["whole arrays", "some rows", "single rows"])
@pytest.mark.parametrize("mesh", MESHES)
def test_every_piece_goes_into_its_place(monkeypatch, mesh, piece):
    """Pieces of 100 values are a few rows of a tensor, and a number of rows that does not divide them."""
    monkeypatch.setattr(streaming, "PIECE", piece)
    held = tensors()
    for dtype in (jnp.bfloat16, jnp.float32):
        state, places = load(ArraySource(held, "w"), MESHES[mesh], dtype)
        assert_all_there(state, held, dtype)
        for path, variable in nnx.to_flat_state(state):
            array = variable[...]
            assert array.committed == (places is not None)
            assert places is None or array.sharding.is_equivalent_to(places[path], array.ndim)


class Watched(ArraySource):
    """A slow source that notes what is asked of it."""

    def __init__(self, held):
        super().__init__(held, "w")
        object.__setattr__(self, "asked", [])
        object.__setattr__(self, "threads", set())

    def read(self, name, index):
        part = super().read(name, index)
        self.asked.append((name, part.size))
        self.threads.add(threading.get_ident())
        time.sleep(0.002)
        return part


def test_reads_are_small_in_the_order_of_the_file_and_by_several_threads(monkeypatch):
    """Of a mesh, the parts of all devices together are a piece, and each device's part alone is read."""
    monkeypatch.setattr(streaming, "PIECE", 32)
    held = tensors()
    for mesh in (None, {"fsdp": 2, "tensor": 2, "expert": 2}):
        source = Watched(held)
        load(source, mesh, jnp.float32)
        assert max(size for _, size in source.asked) <= 32
        assert 1 < len(source.threads) <= streaming.READERS
        if mesh is None:
            asked = [list(held).index(name) for name, _ in source.asked if "norm" not in name]
            assert sum(one > other for one, other in pairwise(asked)) <= len(asked) // 10
    assert sum(size for name, size in source.asked if "experts.0" in name) < 1.5 * L * D * F


def test_what_is_read_ahead_is_bounded(monkeypatch):
    """A device that takes nothing is not read for."""
    monkeypatch.setattr(streaming, "PIECE", 1)
    source, waiting = Watched(tensors()), threading.Event()
    real = streaming._put
    seen = []

    def slow(*args):
        if not waiting.is_set():
            time.sleep(0.2)
            seen.append(len(source.asked))
            waiting.set()
        return real(*args)

    monkeypatch.setattr(streaming, "_put", slow)
    load(source, None, jnp.float32)
    assert seen[0] <= 2 * streaming.READERS < len(source.asked)


@pytest.mark.parametrize("mesh", MESHES)
def test_cpu_devices_take_over_what_the_host_has_made(monkeypatch, mesh):
    """Without a copy, in whichever dtype."""
    monkeypatch.undo()
    made, real = [], Leaf.read_all

    def read_all(*args):
        made.append(real(*args))
        return made[-1]

    monkeypatch.setattr(Leaf, "read_all", read_all)
    held = tensors()
    for dtype in (jnp.bfloat16, jnp.float32):
        made.clear()
        state, _ = load(ArraySource(held, "w"), MESHES[mesh], dtype)
        assert_all_there(state, held, dtype)
        shards = [shard.data for array in jax.tree.leaves(state) for shard in array.addressable_shards]
        assert {shard.unsafe_buffer_pointer() for shard in shards} == {array.ctypes.data for array in made}


def test_an_error_of_a_reader_ends_the_loading(monkeypatch):
    monkeypatch.setattr(streaming, "PIECE", 1)

    class Broken(ArraySource):
        def read(self, name, index):
            if name == "layers.1.proj.weight":
                raise InputError("w: cut short")
            return super().read(name, index)

    with pytest.raises(InputError, match="cut short"):
        load(Broken(tensors(), "w"), None, jnp.float32)
