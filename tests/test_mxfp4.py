"""gpt-oss's published layout: blocks and scales of MXFP4, widened slice by slice."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from test_contracts import target_hf
from tiny import random_weights

from flaxdraft.devices.mesh import make_mesh
from flaxdraft.devices.sharding import Sharding
from flaxdraft.errors import InputError
from flaxdraft.files.hugging_face import HFDirectory
from flaxdraft.nn.precision import Precision
from flaxdraft.targets import from_pretrained, gpt_oss

# The format's numbers, by their four bits.
NUMBERS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
HF = target_hf("gpt_oss") | {
    "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 2, "num_local_experts": 4,
}  # fmt: skip
PACKED = ("gate_up_proj", "down_proj")


def widened(blocks, scales):
    """A number at a time: [experts, in, out] in float64."""
    experts, outputs, groups, _ = blocks.shape
    out = np.zeros((experts, groups * 32, outputs))
    for e, o, g, b in np.ndindex(blocks.shape):
        byte, scale = int(blocks[e, o, g, b]), 2.0 ** (int(scales[e, o, g]) - 127)
        out[e, g * 32 + 2 * b, o] = NUMBERS[byte % 16] * scale
        out[e, g * 32 + 2 * b + 1, o] = NUMBERS[byte // 16] * scale
    return out


def packed_weights():
    """(as published, as they are widened), by the files' names."""
    config, rng = gpt_oss.Config.from_hf(HF), np.random.default_rng(0)
    plain = random_weights(gpt_oss, config, gpt_oss.groups(config, Precision(), Sharding.none()))
    stored, want = {}, {}
    for name, weight in plain.items():
        if not name.endswith(PACKED):
            stored[name] = want[name] = weight
            continue
        experts, inputs, outputs = weight.shape
        blocks = rng.integers(0, 256, (experts, outputs, inputs // 32, 16)).astype(np.uint8)
        scales = rng.integers(122, 126, blocks.shape[:3]).astype(np.uint8)
        stored |= {name + "_blocks": blocks, name + "_scales": scales}
        want[name] = widened(blocks, scales)
    return stored, want


STORED, WANT = packed_weights()


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("mxfp4")
    (path / "config.json").write_text(json.dumps(HF | {"quantization_config": {"quant_method": "mxfp4"}}))
    save_file(STORED, path / "model.safetensors")
    return path


def test_slices_are_widened(directory):
    source, rng = HFDirectory(directory), np.random.default_rng(1)
    assert set(source.names()) == set(WANT)
    for name in (name for name in WANT if name.endswith(PACKED)):
        assert source.shape(name) == WANT[name].shape
        for _ in range(20):
            bounds = [sorted(rng.choice(size + 1, 2, replace=False)) for size in WANT[name].shape]
            index = tuple(slice(int(a), int(b)) for a, b in bounds)
            found = source.read(name, index)
            assert found.dtype == ml_dtypes.bfloat16
            np.testing.assert_array_equal(found.astype(np.float64), WANT[name][index])


@pytest.mark.parametrize("scale", [0, 1, 127, 254, 255])
def test_every_number_and_the_outermost_scales(tmp_path, scale):
    """What bfloat16 cannot hold is infinite; the last scale makes no number."""
    blocks = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    stored = {"w_blocks": blocks, "w_scales": np.full((1, 1, 16), scale, np.uint8)}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "mxfp4"}}))
    save_file(stored, tmp_path / "model.safetensors")
    found = HFDirectory(tmp_path).read("w", (slice(0, 1), slice(0, 512), slice(0, 1)))[0, :, 0]
    want = widened(blocks, stored["w_scales"])[0, :, 0]
    want = np.where(np.abs(want) < 2.0**128, want, np.copysign(np.inf, want))
    np.testing.assert_array_equal(found.astype(np.float64), want if scale < 255 else np.full(512, np.nan))


@pytest.mark.parametrize("mesh", [None, (1, 2, 2, 2)])
def test_each_device_gets_its_part(directory, mesh):
    target = from_pretrained(str(directory), mesh=None if mesh is None else make_mesh(*mesh)).model
    experts = target.state["layers"]["mlp"]["experts"]
    for name in PACKED:
        want = np.stack([WANT[f"model.layers.{i}.mlp.experts.{name}"] for i in range(2)])
        np.testing.assert_array_equal(jax.device_get(experts[name][...]), want.astype(np.float32))


def without_scales(blocks, scales):
    return {"_blocks": blocks}


def scales_of_fewer(blocks, scales):
    return {"_blocks": blocks, "_scales": scales[:, :-1].copy()}


def half_blocks(blocks, scales):
    return {"_blocks": blocks[..., :8].copy(), "_scales": scales}


def no_bytes(blocks, scales):
    return {"_blocks": blocks.astype(np.int8), "_scales": scales}


@pytest.mark.parametrize(
    ("damaged", "message"),
    [
        (without_scales, "_blocks is there and .*_scales is not; fetch"),
        (scales_of_fewer, r"its scales \(4, 191, 2\); expected experts"),
        (half_blocks, r"\(4, 192, 2, 8\) and its scales"),
        (no_bytes, "_blocks is stored as I8, expected U8"),
    ],
)
def test_damage_is_named(tmp_path, damaged, message):
    tensors, name = dict(STORED), "model.layers.1.mlp.experts.gate_up_proj"
    parts = damaged(tensors.pop(name + "_blocks"), tensors.pop(name + "_scales"))
    save_file(tensors | {name + end: part for end, part in parts.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(HF | {"quantization_config": {"quant_method": "mxfp4"}}))
    with pytest.raises(InputError, match=message):
        from_pretrained(str(tmp_path))
