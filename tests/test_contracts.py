"""Every module of drafts/, algorithms/ and targets/ keeps its contract; a new file is covered the day it lands."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from eagle3 import target_of
from flax import nnx

from flaxdraft import algorithms
from flaxdraft.algorithms.eagle3.objective import ChosenRows
from flaxdraft.algorithms.loading import ZeroTarget
from flaxdraft.devices.sharding import Sharding
from flaxdraft.errors import InputError
from flaxdraft.interfaces import Batch, Draw, Example, Features, Target, VocabMap
from flaxdraft.nn.precision import Precision
from flaxdraft.plugins import find_by_architecture, find_by_name, parts_of
from flaxdraft.targets import decoder
from flaxdraft.train.state import split_draft

DRAFTS = dict(parts_of("flaxdraft.algorithms.eagle3.drafts"))
ALGORITHMS = dict(parts_of("flaxdraft.algorithms"))
PAIRS = {
    f"{name}-{draft}": (name, module)
    for name, folder in ALGORITHMS.items()
    for draft, module in parts_of(f"{folder.__name__}.drafts")
}
TARGETS = dict(parts_of("flaxdraft.targets"))
V, W, T = 64, 24, 12

TARGET_HF = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": V, "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}  # fmt: skip


DEEPSEEK_FIELDS = {
    "kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6,
    "first_k_dense_replace": 2, "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "n_shared_experts": 1, "n_group": 2, "topk_group": 1,
}  # fmt: skip


def target_config():
    return TARGETS["llama"].Config.from_hf(TARGET_HF)


def make_draft(module, vocab_size=W, **fields):
    config = module.Config(**module.Config.for_target(target_config(), vocab_size) | fields)
    vocab = VocabMap(np.arange(vocab_size) * 2 if vocab_size < V else np.arange(V), V)
    return module.make(
        config, vocab, target_of(jnp.ones((V, 32))), precision=Precision(), sharding=Sharding.none(), rngs=nnx.Rngs(0)
    )  # fmt: skip


def example(batch_size=2):
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, V, (batch_size, T)), jnp.int32)
    assistant = jnp.zeros((batch_size, T), bool).at[:, 4:].set(True)
    batch = Batch(tokens, assistant, jnp.ones_like(tokens), jnp.tile(jnp.arange(T), (batch_size, 1)))
    taps = jnp.asarray(rng.normal(size=(batch_size, T, 3, 32)), jnp.float32)
    last = jnp.asarray(rng.normal(size=(batch_size, T, 32)), jnp.float32)
    features = Features(taps, last, tokens, jnp.ones(tokens.shape) * 4)
    rows = jnp.tile(jnp.arange(3, T - 2), (batch_size, 1))
    return Example(batch, features, ChosenRows(rows), jnp.asarray(rng.normal(size=(W, 32)), jnp.float32))


@pytest.mark.parametrize(("name", "module"), PAIRS.values(), ids=PAIRS)
def test_every_pair_lowers_and_differentiates(name, module):
    algorithm = algorithms.make(algorithms.settings_of(name)(name=name), packed=True)
    draft = make_draft(module)
    graphdef, params, frozen = split_draft(draft)
    vocab, given = VocabMap(np.asarray(draft.target_ids[...]), V), example()
    given = dataclasses.replace(
        given, chosen=algorithm.choose(jax.tree.map(np.asarray, given.batch), T, Draw(0, 0, 0)),
        teacher=algorithm.teacher(ZeroTarget(draft.config), vocab, jnp.float32),
    )  # fmt: skip

    def loss(params, example):
        sums = algorithm.sums(nnx.merge(graphdef, params, frozen), example, algorithm.first_carry())
        numerator, count = sums.terms()
        return numerator / count, sums

    (value, sums), grads = jax.eval_shape(jax.value_and_grad(loss, has_aux=True), params, given)
    assert value.shape == ()
    assert jax.tree.leaves(sums)
    assert all(x.shape == algorithm.first_carry().shape for x in jax.tree.leaves(sums))
    assert jax.tree.map(lambda g: g.shape, grads) == jax.tree.map(lambda p: p.shape, params)


# What a config may add to the plain draft.
VARIANTS = {
    "plain": {},
    "fc_norm": {"fc_norm": True},
    "norm_output": {"norm_output": True},
    "norm_before_fc": {"norm_before_fc": True},
    "norm_before_residual": {"norm_before_residual": True},
    "narrow": {"hidden_size": 24},
}
every_variant = pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)


@pytest.mark.parametrize("name", DRAFTS)
@every_variant
def test_name_table_covers_every_trained_weight(name, fields):
    module = DRAFTS[name]
    draft = make_draft(module, **fields)
    _, params, _ = split_draft(draft)
    paths = {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(params)}
    table = module.name_table(draft.config)
    assert paths == {row[0] for row in table}
    assert len({row[1] for row in table}) == len(table)


@pytest.mark.parametrize("name", DRAFTS)
@every_variant
def test_config_round_trips_through_config_json(name, fields):
    module = DRAFTS[name]
    config = module.Config(**module.Config.for_target(target_config(), W) | fields)
    written = config.to_hf()
    assert module.Config.from_hf(written) == config
    assert find_by_architecture(algorithms.draft_packages(), written, "x") is module
    assert module.SERVING_ARCHITECTURE in module.ARCHITECTURES


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("tied", [False, True])
def test_target_abstract_state_is_covered_by_its_table(name, tied):
    module = TARGETS[name]
    for architecture in module.ARCHITECTURES:
        hf = TARGET_HF | DEEPSEEK_FIELDS | {"architectures": [architecture], "tie_word_embeddings": tied}
        config = module.Config.from_hf(hf)
        groups = module.groups(config, Precision(), Sharding.none())
        assert [i for group in groups for i in group.layers] == list(range(config.num_hidden_layers))
        _, state = decoder.abstract_state(config, groups, Precision())
        paths = {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(state)}
        assert paths == {row[0] for row in module.name_table(config)}
        assert isinstance(decoder.build(config, groups, state, Precision()), Target)
        assert not module.ignored(config, "model.layers.1.mlp.down_proj.weight")
        assert module.ignored(config, "model.layers.1.self_attn.rotary_emb.inv_freq")
        assert module.ignored(config, "lm_head.weight") == tied


def test_unknown_names_list_what_there_is():
    with pytest.raises(InputError, match=r"draft.architecture: no 'mamba'.*llama, mla.*drafts/mamba.py"):
        find_by_name("flaxdraft.algorithms.eagle3.drafts", "mamba", "draft.architecture")
    with pytest.raises(InputError, match=r"MambaForCausalLM.*supported are.*LlamaForCausalLM"):
        find_by_architecture(["flaxdraft.targets"], {"architectures": ["MambaForCausalLM"]}, "config.json")


@pytest.mark.parametrize("name", DRAFTS)
def test_a_map_of_another_size_is_refused(name):
    module = DRAFTS[name]
    config = module.Config(**module.Config.for_target(target_config(), W))
    with pytest.raises(InputError, match="24 of 64"):
        module.make(
            config, VocabMap(np.arange(8), V), ZeroTarget(config), precision=Precision(),
            sharding=Sharding.none(), rngs=nnx.Rngs(0),
        )  # fmt: skip


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [("hidden_size", 96, "3 x target_hidden_size"), ("intermediate_size", 0, "positive integer"),
     ("draft_vocab_size", V + 1, "larger than the target's vocabulary"),
     ("rms_norm_eps", "1e-6", "rms_norm_eps: found '1e-6', expected a positive number"),
     ("rms_norm_eps", 0.0, "rms_norm_eps: found 0.0, expected a positive number"),
     ("fc_norm", 1, "fc_norm: found 1, expected true or false")],
)  # fmt: skip
@pytest.mark.parametrize("name", DRAFTS)
def test_unservable_sizes_are_refused(name, field, value, message):
    module = DRAFTS[name]
    with pytest.raises(InputError, match=message):
        module.Config(**module.Config.for_target(target_config(), W) | {field: value})


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"num_hidden_layers": 2}, "num_hidden_layers is 2"), ({"tie_word_embeddings": True}, "tie_word_embeddings")],
)
@pytest.mark.parametrize("name", DRAFTS)
def test_unportable_draft_configs_are_refused(name, fields, message):
    module = DRAFTS[name]
    config = module.Config(**module.Config.for_target(target_config(), W)).to_hf()
    with pytest.raises(InputError, match=message):
        module.Config.from_hf(config | fields)
