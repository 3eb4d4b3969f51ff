"""Name tables: every tensor is accounted for, and weights cross the border bitwise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flaxdraft.errors import InputError
from flaxdraft.files.json_files import write_json
from flaxdraft.files.name_tables import ArraySource, load_state, state_from_torch, state_to_torch
from flaxdraft.files.safetensors_file import load_safetensors, save_safetensors

STACKED = (
    ("norm", "norm.weight", "copy"),
    ("layers/kernel", "layers.{i}.proj.weight", "transpose"),
    ("layers/scale", "layers.{i}.norm.weight", "copy"),
)
FLAT = (("proj/kernel", "a.b.weight", "transpose"), ("scale", "scale", "copy"))
LAYERS = 3


def stacked_abstract():
    def leaf(*shape):
        return nnx.Param(jax.ShapeDtypeStruct(shape, jnp.float32))

    return nnx.State({"norm": leaf(4), "layers": {"kernel": leaf(LAYERS, 5, 4), "scale": leaf(LAYERS, 4)}})


def stacked_tensors():
    rng = np.random.default_rng(0)
    out = {"norm.weight": rng.normal(size=4).astype(np.float32)}
    for i in range(LAYERS):
        out[f"layers.{i}.proj.weight"] = rng.normal(size=(4, 5)).astype(np.float32)
        out[f"layers.{i}.norm.weight"] = rng.normal(size=4).astype(np.float32)
    return out


def fill(tensors):
    return state_from_torch(stacked_abstract(), STACKED, tensors, "model.gguf", LAYERS)


def test_layers_are_stacked_and_projections_transposed():
    tensors = stacked_tensors()
    state = fill(tensors)
    np.testing.assert_array_equal(state["norm"][...], tensors["norm.weight"])
    for i in range(LAYERS):
        np.testing.assert_array_equal(state["layers"]["kernel"][...][i], tensors[f"layers.{i}.proj.weight"].T)
        np.testing.assert_array_equal(state["layers"]["scale"][...][i], tensors[f"layers.{i}.norm.weight"])


def test_missing_extra_and_misshapen_tensors_are_all_listed():
    tensors = stacked_tensors()
    del tensors["norm.weight"], tensors["layers.1.norm.weight"]
    tensors |= {"layers.3.norm.weight": np.ones(4, np.float32), "lm_head.weight": np.ones((2, 2), np.float32)}
    tensors["layers.0.proj.weight"] = tensors["layers.0.proj.weight"].T
    tensors["layers.2.norm.weight"] = np.ones(7, np.float32)
    with pytest.raises(InputError) as caught:
        fill(tensors)
    assert str(caught.value) == (
        "model.gguf: the weights do not fit the configuration. "
        "missing: norm.weight, layers.1.norm.weight | unexpected: layers.3.norm.weight, lm_head.weight | "
        "wrong shape: layers.0.proj.weight: found (5, 4), expected (4, 5); "
        "layers.2.norm.weight: found (7,), expected (4,)"
    )


@pytest.mark.parametrize("name", list(stacked_tensors()))
def test_any_one_missing_tensor_is_enough_to_refuse(name):
    tensors = stacked_tensors()
    del tensors[name]
    with pytest.raises(InputError, match=f"configuration. missing: {name}$"):
        fill(tensors)


def test_long_lists_are_cut_and_say_so():
    extra = {f"extra.{i}": np.ones(1, np.float32) for i in range(9)}
    with pytest.raises(InputError, match=r"unexpected: extra.0, .*, extra.7 and 1 more$"):
        fill(stacked_tensors() | extra)


def test_a_round_trip_is_bitwise(tmp_path):
    rng = np.random.default_rng(1)
    # Every bit pattern but NaN payloads matters: negative zero, subnormals, extremes.
    odd = np.array([-0.0, 1e-45, 3.4e38, -1e-38, 0.1, 1 / 3], np.float32)
    state = nnx.State(
        {
            "proj": {"kernel": nnx.Param(jnp.asarray(rng.normal(size=(3, 6)), jnp.float32).at[1].set(odd))},
            "scale": nnx.Param(jnp.asarray(odd)),
        }
    )
    save_safetensors(tmp_path / "w.safetensors", state_to_torch(state, FLAT, np.float32), {"format": "pt"})
    tensors = load_safetensors(tmp_path / "w.safetensors")
    assert {name: array.shape for name, array in tensors.items()} == {"a.b.weight": (6, 3), "scale": (6,)}
    back = state_from_torch(state, FLAT, tensors, "w")
    for (path, want), (_, got) in zip(nnx.to_flat_state(state), nnx.to_flat_state(back), strict=True):
        assert np.asarray(got[...]).tobytes() == np.asarray(want[...]).tobytes(), path


def test_stacked_layers_and_experts_come_back_under_their_own_names():
    """Two groups of layers, of which the second begins where the first ends and has experts."""
    table = (
        ("dense/kernel", "layers.{i}.proj.weight", "transpose"),
        ("moe/experts", "layers.{i}.experts.{e}.weight", "transpose"),
    )
    rng, groups = np.random.default_rng(2), {"dense": range(2), "moe": range(2, 5)}
    leaf = lambda *shape: nnx.Param(jnp.asarray(rng.normal(size=shape), jnp.float32))  # noqa: E731
    state = nnx.State({"dense": {"kernel": leaf(2, 5, 4)}, "moe": {"experts": leaf(3, 2, 5, 4)}})
    tensors = state_to_torch(state, table, np.float32, groups)
    experts = [f"layers.{i}.experts.{e}.weight" for i in groups["moe"] for e in range(2)]
    assert list(tensors) == ["layers.0.proj.weight", "layers.1.proj.weight", *experts]
    np.testing.assert_array_equal(tensors["layers.3.experts.1.weight"], state["moe"]["experts"][...][1, 1].T)
    back = load_state(state, table, ArraySource(tensors, "w"), groups, num_experts=2)
    for want, got in zip(jax.tree.leaves(state), jax.tree.leaves(back), strict=True):
        np.testing.assert_array_equal(got, want)
    assert set(state_to_torch(fill(stacked_tensors()), STACKED, np.float32)) == set(stacked_tensors())  # from 0


def test_writing_leaves_no_temporary_file(tmp_path):
    save_safetensors(tmp_path / "w.safetensors", {"x": np.ones(2, np.float32)})
    write_json(tmp_path / "w.json", {"text": "é"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["w.json", "w.safetensors"]
    assert (tmp_path / "w.json").read_text(encoding="utf-8") == '{\n  "text": "é"\n}\n'


def test_a_failed_write_keeps_the_old_file(tmp_path):
    write_json(tmp_path / "w.json", 1)
    with pytest.raises(TypeError):
        write_json(tmp_path / "w.json", object())
    assert (tmp_path / "w.json").read_text() == "1\n"


@pytest.mark.parametrize("num", [0, 7, 8, 20, -1])
def test_truncated_safetensors_are_refused(tmp_path, num):
    path = tmp_path / "w.safetensors"
    save_safetensors(path, {"x": np.ones(8, np.float32)})
    path.write_bytes(path.read_bytes()[:num])
    with pytest.raises(InputError, match=r"w.safetensors: not a readable safetensors file"):
        load_safetensors(path)


def test_an_altered_header_or_no_file_is_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    save_safetensors(path, {"x": np.ones(8, np.float32)})
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"F99"'))
    for broken in (path, tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(InputError, match=f"{broken.name}: not a readable safetensors file"):
            load_safetensors(broken)


def test_files_have_the_usual_permissions(tmp_path):
    save_safetensors(tmp_path / "a.safetensors", {"x": np.ones(2, np.float32)})
    (tmp_path / "b").write_text("")
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "b").stat().st_mode
