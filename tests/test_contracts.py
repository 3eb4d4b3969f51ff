"""Every algorithm, draft architecture and target family keeps its contract (contracts.py), engines among them; a new
one is covered the day that it lands, in whatever package it lies."""

import contracts
import jax.numpy as jnp
import numpy as np
import pytest
from contracts import T, V, W
from eagle3 import target_of
from flax import nnx

from flaxdraft import algorithms
from flaxdraft.algorithms.eagle3.objective import ChosenRows
from flaxdraft.devices.sharding import Sharding
from flaxdraft.errors import InputError
from flaxdraft.interfaces import Batch, Example, Features, VocabMap
from flaxdraft.nn.precision import Precision
from flaxdraft.plugins import find_by_architecture, find_by_name, parts_of

DRAFTS = dict(parts_of("flaxdraft.algorithms.eagle3.drafts"))
ALGORITHMS = dict(parts_of("flaxdraft.algorithms"))
PAIRS = contracts.pairs()
TARGETS = dict(parts_of("flaxdraft.targets"))

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
# What a config.json of each family has besides.
FAMILY_FIELDS = {
    "deepseek": DEEPSEEK_FIELDS,
    "gemma3": {
        "sliding_window": 8, "sliding_window_pattern": 3, "query_pre_attn_scalar": 12, "rope_local_base_freq": 1e2,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "gpt_oss": {
        "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": 8,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16,
                         "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False},
    },
    "mistral": {"sliding_window": 8},
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True},
}  # fmt: skip


def target_hf(family: str):
    """A config.json of a family, but for its architecture."""
    return TARGET_HF | FAMILY_FIELDS.get(family, {})


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


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_algorithm_says_what_it_wants(name):
    algorithm = algorithms.make(algorithms.settings_of(name)(), packed=True)
    contracts.assert_settings(name)
    contracts.assert_asks_well(algorithm)
    contracts.assert_chooses_alike(algorithm)


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_every_draft_trains_and_drafts_with_its_algorithm(pair):
    contracts.assert_trains(pair, target_config())
    contracts.assert_drafts(pair, target_config())
    contracts.assert_shares_or_says_so(pair.algorithm, pair.config(target_config()))


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_every_draft_names_its_weights_and_sizes(pair):
    for name, family in TARGETS.items():
        pair.config(family.Config.from_hf(target_hf(name)))
    contracts.assert_named(pair, target_config())
    contracts.assert_refuses_another_map(pair, target_config())


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_every_draft_is_exported_and_read_again(pair, tmp_path):
    contracts.assert_exports(pair, target_config(), TARGET_HF, tmp_path)


@pytest.mark.parametrize("name", TARGETS)
def test_a_family_has_its_weights_named(name):
    contracts.assert_family(TARGETS[name], target_hf(name))


def test_unknown_names_list_what_there_is():
    with pytest.raises(
        InputError, match=r"draft.architecture: no 'mamba'.*llama, mla.*eagle3.drafts, see CONTRIBUTING"
    ):
        find_by_name("flaxdraft.algorithms.eagle3.drafts", "mamba", "draft.architecture")
    with pytest.raises(InputError, match=r"MambaForCausalLM.*supported are.*LlamaForCausalLM"):
        find_by_architecture(["flaxdraft.targets"], {"architectures": ["MambaForCausalLM"]}, "config.json")
