"""What target families read of a config.json, and what they refuse by name."""

import json
import math
from types import SimpleNamespace

import contracts
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file
from test_contracts import TARGETS, target_hf
from tiny import random_weights

from flaxdraft.devices.mesh import make_mesh
from flaxdraft.devices.sharding import Sharding
from flaxdraft.errors import InputError
from flaxdraft.nn.precision import Precision
from flaxdraft.run.planned_target import target_figures
from flaxdraft.serving import rope_fields
from flaxdraft.targets import decoder, describe_target, load_target, open_target
from flaxdraft.targets.embedding_and_head import EmbeddingAndHeadWeights

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
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping: found 50.0, only None is supported"),
        ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping: found 30.0, only None is supported"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention: found True, only False or"),
        ("gemma3", {"hidden_activation": "silu"}, "hidden_activation: found 'silu', only 'gelu_pytorch_tanh' is"),
        ("gemma3", {"rope_parameters": {"rope_type": "default"}}, "rope_parameters: found .*, expected one object for"),
        ("gpt_oss", {"num_local_experts": None}, "num_local_experts: found None, expected a positive integer"),
        ("gpt_oss", {"layer_types": SOME[1:]}, "layer_types: found .*, expected .* for each of 8 layers"),
        (
            "mistral",
            {"sliding_window": None, "layer_types": SOME},
            "sliding_window: found None with layers of sliding_",
        ),
        ("mistral", {"layer_types": SOME[1:]}, "layer_types: found .*, expected .* for each of 8 layers"),
        ("mistral", {"layer_types": 1}, "layer_types: found 1, expected .* for each of 8 layers"),
        (
            "mistral",
            {"layer_types": ["chunked_attention"] * 8},
            "layer_types: found 'chunked_attention', only .* An engine",
        ),
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


def test_both_dialects_of_gemmas_rotary_embeddings():
    """Older files have two bases and a scaling, which layers with a window do without; and its usual pattern."""
    config = config_of("gemma3", sliding_window_pattern=4)
    assert (config.rope.rope_type, config.rope.rope_theta, config.rope.factor) == ("linear", 1e4, 8.0)
    assert (config.local_rope.rope_type, config.local_rope.rope_theta) == ("default", 1e2)
    assert config.windows == (8, 8, 8, None) * 2
    assert config.context == 64  # the scaling is counted in already
    kinds = {
        "full_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e2},
    }
    hf = {name: value for name, value in target_hf("gemma3").items() if not name.startswith("rope")}
    new = TARGETS["gemma3"].Config.from_hf(hf | {"rope_parameters": kinds, "sliding_window_pattern": 4})
    assert new == config
    assert rope_fields.parameters({"rope_parameters": kinds}) == kinds["full_attention"]
    bases = TARGETS["gemma3"].Config.from_hf(hf)
    assert (bases.rope.rope_theta, bases.local_rope.rope_theta) == (1e6, 1e4)


def test_what_gemmas_files_leave_out():
    left_out = ("tie_word_embeddings", "head_dim")
    hf = {name: value for name, value in target_hf("gemma3").items() if name not in left_out}
    config = TARGETS["gemma3"].Config.from_hf(hf)
    assert (config.tie_word_embeddings, config.head_dim) == (True, 256)


def test_norms_that_are_stored_less_one(tmp_path):
    """A draft takes the final norm as it is computed, wherever it gets it."""
    family, hf = TARGETS["gemma3"], target_hf("gemma3") | {"architectures": ["Gemma3ForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(hf))
    config = family.Config.from_hf(hf)
    weights = random_weights(family, config, family.groups(config, Precision(), Sharding.none()))
    save_file(weights, tmp_path / "model.safetensors")
    opened = open_target(str(tmp_path))
    for outer in (EmbeddingAndHeadWeights.of_target(opened, config), load_target(opened).model):
        np.testing.assert_array_equal(outer.final_norm(), 1 + weights["model.norm.weight"])


# Fields of published files, and how many weights those hold.
PUBLISHED = {
    "mistralai/Mistral-7B-v0.1": (7_241_732_096, "mistral", {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "sliding_window": 4096,
    }),
    "Qwen/Qwen3-30B-A3B": (30_532_122_624, "qwen3_moe", {
        "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
        "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True, "mlp_only_layers": [],
        "decoder_sparse_step": 1, "use_sliding_window": False, "sliding_window": None,
    }),
    "openai/gpt-oss-20b": (20_914_757_184, "gpt_oss", {
        "vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 24,
        "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 32,
        "num_experts_per_tok": 4, "sliding_window": 128, "attention_bias": True,
    }),
    "google/gemma-3-1b-it": (999_885_952, "gemma3", {
        "vocab_size": 262144, "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26,
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "sliding_window": 512,
        "sliding_window_pattern": 6, "rope_scaling": None, "hidden_activation": "gelu_pytorch_tanh",
    }),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    count, family, hf = PUBLISHED[name]
    config = TARGETS[family].Config.from_hf(hf)
    groups = TARGETS[family].groups(config, Precision(), Sharding.none())
    _, state = decoder.abstract_state(config, groups, Precision())
    assert sum(math.prod(variable.shape) for _, variable in nnx.to_flat_state(state)) == count
