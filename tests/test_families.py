"""What target families read of a config.json, and what they refuse by name. Nothing is computed."""

import json
from types import SimpleNamespace

import contracts
import jax.numpy as jnp
import pytest
from test_contracts import TARGETS, target_hf

from flaxdraft.devices.mesh import make_mesh
from flaxdraft.errors import InputError
from flaxdraft.run.planned_target import target_figures
from flaxdraft.targets import describe_target

SOME = ["sliding_attention", "full_attention"] * 4


def config_of(family: str, **fields):
    return TARGETS[family].Config.from_hf(target_hf(family) | fields)


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step: found 2, only 1 is supported"),
        ("qwen3_moe", {"mlp_only_layers": [3]}, r"mlp_only_layers: found \[3\], only \[\] or None is supported"),
        ("qwen3_moe", {"use_sliding_window": True}, "use_sliding_window: found True, only False is supported"),
        ("qwen3_moe", {"num_experts": 0}, "num_experts: found 0, expected a positive integer"),
        ("qwen3_moe", {"moe_intermediate_size": None}, "moe_intermediate_size: found None, expected a positive"),
        ("gpt_oss", {"num_local_experts": None}, "num_local_experts: found None, expected a positive integer"),
        ("gpt_oss", {"layer_types": SOME[1:]}, "layer_types: found .*, expected .* for each of 8 layers"),
        (
            "mistral",
            {"sliding_window": None, "layer_types": SOME},
            "sliding_window: found None with layers of sliding_",
        ),
        ("mistral", {"layer_types": SOME[1:]}, "layer_types: found .*, expected .* for each of 8 layers"),
        ("mistral", {"layer_types": ["chunked_attention"] * 8}, "layer_types: found .*'chunked_attention'"),
        ("qwen3_moe", {"hidden_act": "gelu"}, "hidden_act: found 'gelu', only 'silu' is supported; take another"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(family, fields, message):
    with pytest.raises(InputError, match="target config: " + message):
        config_of(family, **fields)


def test_the_names_that_transformers_gives_the_number_of_experts():
    """Published files say num_experts; transformers 5 writes num_local_experts."""
    family, hf = TARGETS["qwen3_moe"], target_hf("qwen3_moe")
    renamed = {name: value for name, value in hf.items() if name != "num_experts"} | {"num_local_experts": 8}
    assert family.Config.from_hf(renamed) == family.Config.from_hf(hf)


@pytest.mark.parametrize(
    ("fields", "windows"),
    [
        ({"sliding_window": None}, (None,) * 8),
        ({"sliding_window": 8}, (8,) * 8),
        ({"sliding_window": 8, "layer_types": SOME}, (8, None) * 4),
        ({"layer_types": None}, (4096,) * 8),
    ],
)
def test_windows_of_mistrals_layers(fields, windows):
    hf = {name: value for name, value in target_hf("mistral").items() if name != "sliding_window"}
    assert TARGETS["mistral"].Config.from_hf(hf | fields).windows == windows


def test_gpt_oss():
    """Half of its layers slide, the first among them; a draft beside it has a rotary embedding that engines read."""
    config = config_of("gpt_oss")
    assert config.windows == (8, None) * 4
    assert (config.swiglu_alpha, config.swiglu_limit, config.attention_bias) == (1.702, 7.0, True)
    assert config.rope.truncate is False
    assert config.context == 64
    for pair in contracts.pairs().values():
        assert pair.config(config).rope.truncate is None


def test_products_of_a_token_with_experts(tmp_path):
    """Of the plan's figures: two of eight experts, without their biases."""
    hf = target_hf("gpt_oss") | {"architectures": ["GptOssForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(hf))
    described = describe_target(str(tmp_path))
    target = SimpleNamespace(described=described, config=described.config())
    figures = target_figures(target, make_mesh(), jnp.float32, 1, 8)
    attention, router, expert = 2 * 32 * (32 + 16), 32 * 8, 3 * 32 * 48
    assert figures.flops == 2 * (8 * (attention + router + 2 * expert) + 64 * 32)
