"""Serving directories: exact keys, shapes and dtypes, and a config.json that servers read."""

import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from small_drafts import write_export
from test_contracts import DRAFTS, TARGET_HF, V, W, make_draft

from flaxdraft.errors import InputError
from flaxdraft.files.name_tables import state_from_torch
from flaxdraft.files.safetensors_file import load_safetensors
from flaxdraft.interfaces import VocabMap
from flaxdraft.nn.rope import RopeConfig
from flaxdraft.train.state import split_draft

D = E = 32  # draft and target width
FFN, HEADS, KV_HEADS, WIDTH = 48, 4, 2, 8
Q_RANK, KV_RANK, NOPE, ROPE, VALUE = 64, 64, 8, 4, 8
TAPS = (1, 3, 4)


def common(hidden=D):
    return {
        "fc.weight": (hidden, 3 * E),
        "midlayer.input_layernorm.weight": (hidden,),
        "midlayer.hidden_norm.weight": (hidden,),
        "midlayer.post_attention_layernorm.weight": (hidden,),
        "midlayer.mlp.gate_proj.weight": (FFN, hidden),
        "midlayer.mlp.up_proj.weight": (FFN, hidden),
        "midlayer.mlp.down_proj.weight": (hidden, FFN),
        "norm.weight": (hidden,),
        "lm_head.weight": (W, hidden),
    }


def llama_attention(hidden=D):
    return {
        "midlayer.self_attn.q_proj.weight": (HEADS * WIDTH, 2 * hidden),
        "midlayer.self_attn.k_proj.weight": (KV_HEADS * WIDTH, 2 * hidden),
        "midlayer.self_attn.v_proj.weight": (KV_HEADS * WIDTH, 2 * hidden),
        "midlayer.self_attn.o_proj.weight": (hidden, HEADS * WIDTH),
    }


def mla_attention(hidden=D):
    return {
        "midlayer.self_attn.q_a_proj.weight": (Q_RANK, 2 * hidden),
        "midlayer.self_attn.q_a_layernorm.weight": (Q_RANK,),
        "midlayer.self_attn.q_b_proj.weight": (HEADS * (NOPE + ROPE), Q_RANK),
        "midlayer.self_attn.kv_a_proj_with_mqa.weight": (KV_RANK + ROPE, 2 * hidden),
        "midlayer.self_attn.kv_a_layernorm.weight": (KV_RANK,),
        "midlayer.self_attn.kv_b_proj.weight": (HEADS * (NOPE + VALUE), KV_RANK),
        "midlayer.self_attn.o_proj.weight": (hidden, HEADS * VALUE),
    }


def qwen3_attention(hidden=D):
    return llama_attention(hidden) | {f"midlayer.self_attn.{p}_norm.weight": (8,) for p in "qk"}


ATTENTION = {"llama": llama_attention, "mla": mla_attention, "qwen3": qwen3_attention}
ARCHITECTURE = {
    "llama": "LlamaForCausalLMEagle3", "mla": "Eagle3DeepseekV2ForCausalLM", "qwen3": "Eagle3Qwen3ForCausalLM",
}  # fmt: skip
MODEL_TYPE = {"llama": "llama", "mla": "deepseek_v3", "qwen3": "qwen3"}
ENGINE = {"llama": "sglang", "mla": "sglang", "qwen3": "vllm"}
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}

both = pytest.mark.parametrize("name", ATTENTION)


def params_of(draft):
    return split_draft(draft)[1]


def write(directory, name, draft, *, dtype="float32", tap_layers=TAPS, params=None, **target):
    ids = np.arange(draft.config.draft_vocab_size) * (2 if draft.config.draft_vocab_size < V else 1)
    write_export(
        directory / "export", DRAFTS[name], draft.config, params_of(draft) if params is None else params,
        VocabMap(ids, V), tap_layers=tap_layers, target=TARGET_HF | target, dtype=dtype, engine=ENGINE[name],
    )  # fmt: skip
    config = json.loads((directory / "export" / "config.json").read_text())
    return load_safetensors(directory / "export" / "model.safetensors"), config


def test_every_draft_has_its_table():
    assert set(ATTENTION) == set(DRAFTS)


@both
@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_shapes_and_dtypes(tmp_path, name, dtype):
    tensors, config = write(tmp_path, name, make_draft(DRAFTS[name]), dtype=dtype)
    want = {key: (shape, np.dtype(DTYPES[dtype])) for key, shape in (common() | ATTENTION[name]()).items()}
    want |= {"d2t": ((W,), np.dtype(np.int64)), "t2d": ((V,), np.dtype(bool))}
    assert {key: (array.shape, array.dtype) for key, array in tensors.items()} == want
    assert config["torch_dtype"] == dtype


@both
def test_the_vocabulary_tables_are_the_drafts(tmp_path, name):
    tensors, _ = write(tmp_path, name, make_draft(DRAFTS[name]))
    np.testing.assert_array_equal(tensors["d2t"] + np.arange(W), np.arange(W) * 2)  # offsets, not ids
    np.testing.assert_array_equal(np.flatnonzero(tensors["t2d"]), np.arange(W) * 2)


@both
@pytest.mark.parametrize("fields", [{}, {"fc_norm": True, "norm_output": True}, {"hidden_size": 40, "fc_norm": True}])
def test_exported_weights_are_read_back_bitwise(tmp_path, name, fields):
    draft = make_draft(DRAFTS[name], **fields)
    params = params_of(draft)
    tensors, _ = write(tmp_path, name, draft, params=params)
    weights = {key: array for key, array in tensors.items() if key not in ("d2t", "t2d")}
    table = DRAFTS[name].name_table(draft.config)
    back = state_from_torch(params, table, weights, "export")
    for (path, want), (_, got) in zip(nnx.to_flat_state(params), nnx.to_flat_state(back), strict=True):
        np.testing.assert_array_equal(got[...], want[...], err_msg="/".join(map(str, path)))


@both
def test_bfloat16_weights_are_the_rounded_ones(tmp_path, name):
    draft = make_draft(DRAFTS[name])
    tensors, _ = write(tmp_path, name, draft, dtype="bfloat16")
    want = np.asarray(draft.fc.kernel[...]).T.astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(tensors["fc.weight"], want)


@both
def test_a_full_vocabulary_has_no_tables(tmp_path, name):
    tensors, config = write(tmp_path, name, make_draft(DRAFTS[name], vocab_size=V))
    assert set(tensors) == set(common() | ATTENTION[name]())
    assert tensors["lm_head.weight"].shape == (V, D)
    assert config["draft_vocab_size"] == config["vocab_size"] == V


@both
def test_a_draft_of_its_own_width_brings_its_embedding(tmp_path, name):
    draft = make_draft(DRAFTS[name], hidden_size=40)
    params = params_of(draft)
    tensors, config = write(tmp_path, name, draft, params=params)
    want = common(40) | ATTENTION[name](40) | {"embed_tokens.weight": (V, 40), "d2t": (W,), "t2d": (V,)}
    assert {key: array.shape for key, array in tensors.items()} == want
    np.testing.assert_array_equal(tensors["embed_tokens.weight"], params["embed_tokens"][...])
    assert (config["hidden_size"], config["target_hidden_size"]) == (40, E)


@both
def test_the_3_1_switches_are_written_where_they_are_on(tmp_path, name):
    tensors, config = write(tmp_path, name, make_draft(DRAFTS[name], fc_norm=True, norm_output=True))
    assert (config["fc_norm"], config["norm_output"]) == (True, True)
    assert {key: array.shape for key, array in tensors.items() if "fc_norm" in key} == {
        f"fc_norm.{i}.weight": (E,) for i in range(3)
    }  # one for each tapped state, low to high
    _, plain = write(tmp_path, name, make_draft(DRAFTS[name]))
    assert not {"fc_norm", "norm_output"} & plain.keys()


@both
def test_config_says_what_servers_need(tmp_path, name):
    _, config = write(tmp_path, name, make_draft(DRAFTS[name]))
    want = {
        "architectures": [ARCHITECTURE[name]], "model_type": MODEL_TYPE[name], "hidden_size": D,
        "intermediate_size": FFN, "num_hidden_layers": 1, "num_attention_heads": HEADS, "vocab_size": V,
        "draft_vocab_size": W, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "max_position_embeddings": 64,
        "rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    }  # fmt: skip
    grouped = {"num_key_value_heads": KV_HEADS, "head_dim": WIDTH}
    own = {
        "llama": grouped, "qwen3": grouped,
        "mla": {"q_lora_rank": Q_RANK, "kv_lora_rank": KV_RANK, "qk_nope_head_dim": NOPE, "qk_rope_head_dim": ROPE,
                "v_head_dim": VALUE},
    }[name]  # fmt: skip
    assert {key: config.get(key) for key in want | own} == want | own
    assert "target_hidden_size" not in config
    assert "rope_scaling" not in config
    assert DRAFTS[name].Config.from_hf(config) == make_draft(DRAFTS[name]).config


@both
@pytest.mark.parametrize("hidden", [D, 40])
def test_config_holds_no_null(tmp_path, name, hidden):
    write(tmp_path, name, make_draft(DRAFTS[name], hidden_size=hidden), bos_token_id=1, eos_token_id=None)
    text = (tmp_path / "export" / "config.json").read_text()
    assert "null" not in text
    assert "NaN" not in text


@both
@pytest.mark.parametrize("taps", [TAPS, (0, 2, 6)])
def test_layer_ids_stand_in_both_conventions(tmp_path, name, taps):
    _, config = write(tmp_path, name, make_draft(DRAFTS[name]), tap_layers=taps)
    assert config["eagle_config"] == {
        "use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": list(taps),
    }  # fmt: skip
    assert config["eagle_aux_hidden_state_layer_ids"] == [layer + 1 for layer in taps]


@both
def test_token_ids_follow_the_target(tmp_path, name):
    _, config = write(tmp_path, name, make_draft(DRAFTS[name]), bos_token_id=0, eos_token_id=[2, 3], pad_token_id=None)
    assert (config["bos_token_id"], config["eos_token_id"]) == (0, [2, 3])
    assert "pad_token_id" not in config


@both
def test_a_scaled_rope_stands_in_both_dialects(tmp_path, name):
    rope = RopeConfig("yarn", 1e6, 128, factor=4.0, original_max_position_embeddings=32)
    _, config = write(tmp_path, name, make_draft(DRAFTS[name], rope=rope))
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 1e6
    new = {key: value for key, value in config["rope_parameters"].items() if key != "rope_theta"}
    assert new == config["rope_scaling"]
    # Readers disagree about absent values, so these stand there; they are the formula's own.
    extra = {"mscale": 1.0, "mscale_all_dim": 0.0}
    assert new == {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, **extra}


@both
@pytest.mark.parametrize(
    ("path", "value", "dtype"),
    [
        ("lm_head/kernel", np.nan, "float32"),
        ("norm/scale", np.inf, "bfloat16"),
        ("self_attn/o_proj/kernel", -np.inf, "float32"),
        ("fc/kernel", 1e6, "float16"),
        ("embed_tokens", np.nan, "float32"),
    ],
)
def test_a_weight_that_is_not_finite_is_refused_and_nothing_is_written(tmp_path, name, path, value, dtype):
    draft = make_draft(DRAFTS[name], hidden_size=40)
    flat = {"/".join(map(str, key)): variable for key, variable in nnx.to_flat_state(params_of(draft))}
    variable = flat[path]
    flat[path] = variable.replace(jnp.asarray(variable[...]).at[(0,) * variable[...].ndim].set(value))
    params = nnx.from_flat_state([(tuple(key.split("/")), variable) for key, variable in flat.items()])
    with pytest.raises(InputError, match=f"export: .* holds values that are not finite in {dtype}"):
        write(tmp_path, name, draft, params=params, dtype=dtype)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"q_lora_rank": None}, "an MLA draft without q_lora_rank cannot be served"),
        ({"latent_norm_eps": 1e-6}, "latent_norm_eps 1e-06 differs from rms_norm_eps 1e-05"),
    ],
)
def test_an_mla_draft_that_no_server_loads_is_refused(tmp_path, fields, message):
    with pytest.raises(InputError, match=f"export for SGLang 0.5.23: {message}"):
        write(tmp_path, "mla", make_draft(DRAFTS["mla"], **fields))
    assert not list(tmp_path.iterdir())


def test_an_export_replaces_the_former_one_whole(tmp_path):
    write(tmp_path, "llama", make_draft(DRAFTS["llama"]))
    (tmp_path / "export" / "stale.txt").write_text("old")
    (tmp_path / "export.tmp").mkdir()
    (tmp_path / "export.tmp" / "half.txt").write_text("left by a killed run")
    write(tmp_path, "mla", make_draft(DRAFTS["mla"]))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["config.json", "export", "model.safetensors"]
