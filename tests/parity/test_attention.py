"""Both attentions against transformers' PyTorch modules with the same weights, in float32.

The input is twice as wide as the output, as in an EAGLE-3 layer.
"""

import jax.numpy as jnp
import numpy as np
import pytest
from cases import (
    HIDDEN,
    LLAMA,
    MLA,
    PARITY,
    B,
    T,
    every_layout,
    every_rope,
    layout_arrays,
    normal,
    randomize,
    with_rope,
)
from closeness import assert_close
from flax import nnx

from flaxdraft.algorithms.eagle3.drafts import llama, mla
from flaxdraft.devices.sharding import Sharding
from flaxdraft.files.name_tables import state_to_torch
from flaxdraft.nn.precision import Precision
from flaxdraft.ops.attention import attend

pytestmark = pytest.mark.parity
DRAFTS = {"llama": llama, "mla": mla}


@nnx.jit
def forward(attention, x_BTX, positions_BT, visible_BTT):
    projected = attention.project(x_BTX)
    q, (k, v) = attention.query(projected, positions_BT), attention.key_value(projected, positions_BT)
    return attention.output(attend(q, k, v, visible_BTT, attention.softmax_scale))


def assert_computes_the_same(oracle, name: str, hf: dict, layout: str, scale: float = 1.0, **fields) -> None:
    """Our attention, configured by hf and `fields`, against transformers', configured by hf."""
    module = DRAFTS[name]
    attention = module.attention(module.Config.from_hf(hf | fields), Precision(), nnx.Rngs(0), Sharding.none())
    randomize(attention, seed=1)
    params = nnx.state(attention, nnx.Param)
    leaf = {"kernel": ("weight", "transpose"), "scale": ("weight", "copy")}
    table = [
        ("/".join(path), f"{path[0]}.{leaf[path[-1]][0]}", leaf[path[-1]][1]) for path, _ in nnx.to_flat_state(params)
    ]
    theirs = oracle.Attention(name, hf, 2 * HIDDEN)
    oracle.load(theirs.inner, state_to_torch(params, table, np.float32))
    x, (positions, visible) = normal(2, B, T, 2 * HIDDEN, scale=scale), layout_arrays(layout)
    want = oracle.run(theirs, x, positions, oracle.additive_mask(visible).numpy())
    assert_close(forward(attention, jnp.asarray(x), positions, visible), want, rtol=PARITY)


@every_layout
@every_rope
def test_gqa_equals_transformers_llama(oracle, rope, layout):
    assert_computes_the_same(oracle, "llama", with_rope(LLAMA, rope), layout)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 2, 16), (4, 1, 6), (2, 2, 8)])
def test_gqa_with_explicit_head_width(oracle, heads, kv_heads, head_dim):
    sizes = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim}
    assert_computes_the_same(oracle, "llama", with_rope(LLAMA | sizes, "yarn_mscale"), "packed")


@every_layout
@every_rope
def test_mla_equals_transformers_deepseek_v3(oracle, rope, layout):
    assert_computes_the_same(oracle, "mla", with_rope(MLA, rope), layout)


@pytest.mark.parametrize("rope", ["default", "yarn", "yarn_mscale"])
def test_mla_with_a_plain_query_projection(oracle, rope):
    assert_computes_the_same(oracle, "mla", with_rope(MLA | {"q_lora_rank": None}, rope), "packed")


@pytest.mark.parametrize("q_lora_rank", [None, 24])
def test_mla_with_another_epsilon_in_the_latent_norms(oracle, q_lora_rank):
    """transformers hard-codes 1e-6 in q_a and kv_a norms, whatever rms_norm_eps says. Latents are small here, so
    that the wrong epsilon is seen."""
    hf = with_rope(MLA | {"rms_norm_eps": 1e-5, "q_lora_rank": q_lora_rank}, "yarn_mscale")
    assert_computes_the_same(oracle, "mla", hf, "plain", scale=3e-3, latent_norm_eps=1e-6)
    with pytest.raises(AssertionError, match="of largest as float32"):
        assert_computes_the_same(oracle, "mla", hf, "plain", scale=3e-3)
