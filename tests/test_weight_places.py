"""Who makes a variable says where it lives; nothing else does."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import P
from test_contracts import DEEPSEEK_FIELDS, TARGET_HF, TARGETS

from flaxdraft.devices.sharding import Sharding
from flaxdraft.devices.weight_places import place_of
from flaxdraft.nn.layers import Frozen
from flaxdraft.nn.precision import Precision
from flaxdraft.targets import decoder

DEEPSEEK = TARGET_HF | DEEPSEEK_FIELDS | {
    "architectures": ["DeepseekV3ForCausalLM"], "tie_word_embeddings": False, "attention_bias": True,
}  # fmt: skip
# By the end of a path, of a family that has every kind; layers are stacked on an axis before.
WANTED = {
    "embed": P("tensor", "fsdp"), "head": P("tensor", "fsdp"), "norm/scale": P(),
    "q_b_proj/kernel": P(None, "fsdp", "tensor"), "q_a_proj/kernel": P(None, "fsdp", None),
    "o_proj/kernel": P(None, "tensor", "fsdp"), "o_proj/bias": P(), "kv_a_layernorm/scale": P(),
    "dense/mlp/up_proj/kernel": P(None, "fsdp", "tensor"), "shared_experts/down_proj/kernel": P(None, "tensor", "fsdp"),
    "experts/up_proj": P(None, "expert", "fsdp", "tensor"), "experts/down_proj": P(None, "expert", "tensor", "fsdp"),
    "gate/kernel": P(), "gate/bias": P(),
}  # fmt: skip


def abstract(sharding):
    config = TARGETS["deepseek"].Config.from_hf(DEEPSEEK)
    return decoder.abstract_state(config, TARGETS["deepseek"].groups(config, Precision(), sharding), Precision())[1]


@pytest.mark.parametrize("sharding", [Sharding.none(), Sharding.parallel()], ids=["no mesh", "mesh"])
def test_places_of_a_target(sharding):
    """Whatever mesh the state was made for: its structure is the same."""
    state = abstract(sharding)
    assert jax.tree.structure(state) == jax.tree.structure(abstract(Sharding.none()))
    places = {"/".join(map(str, path)): place_of(v, Sharding.parallel()) for path, v in nnx.to_flat_state(state)}
    axes = lambda spec: tuple(spec) if any(spec) else ()  # noqa: E731 (every way to say whole is the same)
    for end, want in WANTED.items():
        assert {axes(spec) for path, spec in places.items() if path.endswith(end)} == {axes(want)}, end


def test_what_nobody_placed_is_whole_and_all_survives_what_nnx_does():
    class Module(nnx.Module):
        def __init__(self, key):
            self.placed = Frozen(jax.random.normal(key, (4, 6)), place="weight_df")
            self.unplaced = nnx.Param(jnp.ones(4))

    def three():
        return nnx.vmap(Module)(jax.random.split(jax.random.key(0), 3))

    for module in (three(), nnx.eval_shape(three), nnx.merge(*nnx.split(three()))):
        state = nnx.split(module)[1]
        assert place_of(state["placed"], Sharding.parallel()) == P(None, "fsdp", "tensor")
        assert place_of(state["unplaced"], Sharding.parallel()) == P()
    assert place_of(jax.tree.map(lambda x: x[0], state)["placed"], Sharding.parallel()) == P("fsdp", "tensor")
