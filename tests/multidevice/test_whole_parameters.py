"""Parameters of the training's mesh, whole on one device, also from inside that mesh."""

import jax
import numpy as np

from flaxdraft.devices.mesh import make_mesh
from flaxdraft.evaluate.during_training import spread, whole_on_one_device


def test_split_and_replicated_arrays_come_whole():
    mesh = make_mesh(2, 2)
    want = {"split": np.arange(32.0).reshape(4, 8), "everywhere": np.arange(3)}
    specs = {"split": jax.P("fsdp", "data"), "everywhere": jax.P()}
    tree = {name: jax.device_put(x, jax.NamedSharding(mesh, specs[name])) for name, x in want.items()}
    with jax.set_mesh(mesh):
        whole = whole_on_one_device(tree)
    for name, x in whole.items():
        assert x.sharding.device_set == {jax.devices()[0]}
        np.testing.assert_array_equal(x, want[name])


def test_prompts_are_taken_evenly():
    assert spread(range(10), 4) == [0, 3, 6, 9]
    assert spread(range(2), 4) == [0, 1]
