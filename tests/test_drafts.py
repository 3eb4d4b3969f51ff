"""The EAGLE-3 surface of the draft modules: switches, the normed recurrence."""

import contracts
import jax.numpy as jnp
import numpy as np
import pytest
from closeness import assert_close
from flax import nnx
from jitted import unroll
from test_contracts import DRAFTS, T, V, W, example, make_draft, target_config

from flaxdraft.algorithms.eagle3.draft import SWITCHES
from flaxdraft.errors import InputError
from flaxdraft.nn.rope import RopeConfig, attention_factor

pytestmark = pytest.mark.numeric

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
both = pytest.mark.parametrize("name", DRAFTS)


def scaled_norms(draft, seed=0):
    """Norms that are not all ones, in place, so that a forgotten one is seen."""
    rng = np.random.default_rng(seed)
    params = nnx.state(draft, nnx.Param)
    for path, variable in nnx.to_flat_state(params):
        if path[-1] == "scale":
            variable[...] = jnp.asarray(1 + 0.3 * rng.normal(size=variable[...].shape), jnp.float32)
    nnx.update(draft, params)
    return draft


def rms_norm(x, scale, eps):
    x = np.asarray(x, np.float64)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * np.asarray(scale)


@both
def test_fc_norm_norms_each_tapped_state_by_itself(name):
    draft = scaled_norms(make_draft(DRAFTS[name], fc_norm=True))
    taps = np.asarray(example(1).features.taps_BTKE) * np.array([1.0, 10.0, 100.0])[:, None]
    norms = draft.fc_norm_low, draft.fc_norm_mid, draft.fc_norm_high
    eps = draft.config.rms_norm_eps
    normed = np.concatenate([rms_norm(taps[:, :, i], norm.scale[...], eps) for i, norm in enumerate(norms)], axis=-1)
    want = normed @ np.asarray(draft.fc.kernel[...], np.float64)
    assert_close(draft.project(jnp.asarray(taps, jnp.float32)), want, ulp=32)


@both
def test_norm_before_fc_norms_the_tapped_states_together(name):
    draft = scaled_norms(make_draft(DRAFTS[name], norm_before_fc=True))
    taps = np.asarray(example(1).features.taps_BTKE) * np.array([1.0, 10.0, 100.0])[:, None]
    normed = rms_norm(taps.reshape(1, T, -1), draft.input_norm.scale[...], draft.config.rms_norm_eps)
    want = normed @ np.asarray(draft.fc.kernel[...], np.float64)
    assert_close(draft.project(jnp.asarray(taps, jnp.float32)), want, ulp=32)
    with pytest.raises(InputError, match=r"norm_before_fc: found it true with fc_norm; .* expected one of the two"):
        make_draft(DRAFTS[name], norm_before_fc=True, fc_norm=True)


@both
def test_norm_before_residual_adds_to_the_normed_state(name):
    """Attention reads the same, so the layer differs in its residual alone."""
    plain, switched = (scaled_norms(make_draft(DRAFTS[name], norm_before_residual=on)) for on in (False, True))
    hidden, positions = example(1).features.taps_BTKE[:, :, 0], jnp.arange(T)[None]
    projections = plain.projections(plain.token_projections(hidden), hidden)
    num_heads, width = (
        plain.query(projections, positions).shape[2],
        plain.key_value(projections, positions)[1].shape[-1],
    )
    heads = jnp.asarray(np.random.default_rng(1).normal(size=(1, T, num_heads, width)), jnp.float32)
    got = switched.finish(hidden, heads)
    normed = rms_norm(hidden, plain.hidden_norm.scale[...], plain.config.rms_norm_eps)
    assert_close(got, plain.finish(jnp.asarray(normed, jnp.float32), heads), ulp=5)
    assert np.abs(np.asarray(got - plain.finish(hidden, heads))).max() > 1e-2


@both
def test_norm_output_carries_the_normed_state_and_norms_it_once(name):
    """The first step's logits are the same; the second step reads the normed state."""
    plain = scaled_norms(make_draft(DRAFTS[name]))
    normed = scaled_norms(make_draft(DRAFTS[name], norm_output=True))
    ex, rows = example(1), jnp.arange(T)[None]
    taps = ex.features.taps_BTKE
    before, after = (unroll(draft, ex.batch, taps, rows, 2) for draft in (plain, normed))
    want = rms_norm(before[0], plain.norm.scale[...], plain.config.rms_norm_eps)
    assert_close(after[0], want, ulp=9)
    assert_close(normed.logits(after[0]), plain.logits(before[0]), ulp=32)
    assert normed.logits(after[0]).shape == (1, T, W)
    assert np.abs(np.asarray(normed.logits(after[1]) - plain.logits(before[1]))).max() > 1e-3


@both
@pytest.mark.parametrize(
    "extra",
    [{}, {"mscale": 1.0}, {"mscale": 0.7, "mscale_all_dim": 1.3}, {"attention_factor": 1.2}],
    ids=str,
)
def test_yarn_round_trips_through_config_json(name, extra):
    module = DRAFTS[name]
    rope = RopeConfig(max_position_embeddings=128, rope_theta=5e4, **YARN | extra)
    config = module.Config(**module.Config.for_target(target_config(), W) | {"rope": rope})
    assert module.Config.from_hf(config.to_hf()) == config
    # What stands in for absent values changes nothing.
    assert attention_factor(config.rope) == attention_factor(rope)
    assert config.rope.softmax_mscale() == rope.softmax_mscale()


@pytest.mark.parametrize("extra", [{"mscale": 0.7}, {"mscale_all_dim": 1.3}, {"mscale": 0.7, "mscale_all_dim": 0.0}])
def test_an_mscale_that_servers_and_transformers_read_differently_is_refused(extra):
    module = DRAFTS["mla"]
    fields = module.Config.for_target(target_config(), W)
    with pytest.raises(InputError, match=r"draft rope: mscale .* set both or neither"):
        module.Config(**fields | {"rope": RopeConfig(**YARN | extra)})


@pytest.mark.parametrize(
    ("name", "field", "value", "message"),
    [
        ("llama", "head_dim", 7, "found 7, expected an even width"),
        ("llama", "num_key_value_heads", 3, "3 does not divide num_attention_heads 4"),
        ("llama", "num_attention_heads", True, "found True, expected a positive integer"),
        ("mla", "qk_rope_head_dim", 5, "found 5, expected an even width"),
        ("mla", "q_lora_rank", 0, "found 0, expected a positive integer or null"),
        ("mla", "kv_lora_rank", None, "found None, expected a positive integer"),
        ("mla", "latent_norm_eps", -1.0, "found -1.0, expected a positive number"),
    ],
)
def test_sizes_of_an_architecture_are_checked(name, field, value, message):
    module = DRAFTS[name]
    with pytest.raises(InputError, match=f"draft.fields.{field}: {message}"):
        module.Config(**module.Config.for_target(target_config(), W) | {field: value})


def test_features_of_another_target_are_refused():
    draft = make_draft(DRAFTS["llama"])
    for shape in ((1, T, 3, 16), (1, T, 2, 32)):
        with pytest.raises(
            InputError, match=r"features: tapped states of shape \(\d, \d+\) a token, expected \(3, 32\)"
        ):
            draft.project(jnp.zeros(shape))


@pytest.mark.parametrize("name", DRAFTS)
def test_every_switch_goes_with_every_draft(name):
    """The contract (contracts.py) lets a config refuse what it has no weights for."""
    module = DRAFTS[name]
    config = module.Config(**module.Config.for_target(target_config(), W))
    for fields in contracts.switches(config):
        module.Config(**module.Config.for_target(target_config(), W) | fields)
    assert {name for fields in contracts.switches(config) for name in fields} == {*SWITCHES, "hidden_size"}
    assert module.SERVING_ARCHITECTURE in module.ARCHITECTURES


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
