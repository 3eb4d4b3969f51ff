"""Rotary embeddings: both config dialects, every type's formula, and the relative property."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from closeness import assert_close

from flaxdraft.errors import InputError
from flaxdraft.nn.rope import (
    ROPE_TYPES,
    RopeConfig,
    attention_factor,
    cos_sin,
    get_mscale,
    inverse_frequencies,
    rotate_half,
    rotate_interleaved,
)

pytestmark = pytest.mark.numeric

WIDTH = 16
EXTRA = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.0},
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
    },
    "yarn": {
        "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 16.0, "beta_slow": 2.0, "mscale": 0.7,
        "mscale_all_dim": 1.3,
    },
}  # fmt: skip


def make(rope_type, **fields):
    return RopeConfig(rope_type, **{"max_position_embeddings": 128} | EXTRA[rope_type] | fields)


def span(*positions):
    return jnp.asarray([positions], jnp.int32)


def frequencies(rope, *positions):
    return np.asarray(inverse_frequencies(rope, WIDTH, span(*(positions or (0,)))))


def plain(theta):
    return theta ** -(np.arange(0, WIDTH, 2) / WIDTH)


def test_every_type_is_tested():
    assert set(EXTRA) == set(ROPE_TYPES)


@pytest.mark.parametrize("rope_type", ROPE_TYPES)
def test_both_dialects_mean_the_same(rope_type):
    new = {"rope_parameters": {"rope_type": rope_type, "rope_theta": 5e5, **EXTRA[rope_type]}}
    old = {"rope_theta": 5e5, "rope_scaling": {"rope_type": rope_type, **EXTRA[rope_type]}}
    oldest = {"rope_theta": 5e5, "rope_scaling": {"type": rope_type, **EXTRA[rope_type]}}
    for dialect in (new, old, oldest):
        got = RopeConfig.from_hf(dialect | {"max_position_embeddings": 128})
        assert got == make(rope_type, rope_theta=5e5)


def test_no_dialect_at_all_is_the_default():
    assert RopeConfig.from_hf({}) == RopeConfig("default", 10000.0, 2048)
    assert RopeConfig.from_hf({"rope_scaling": None, "rope_theta": 7.0}) == RopeConfig("default", 7.0, 2048)


@pytest.mark.parametrize("rope_type", ROPE_TYPES)
def test_a_written_config_is_read_back_by_readers_of_either_dialect(rope_type):
    rope = make(rope_type, rope_theta=1e6)
    written = rope.to_hf() | {"max_position_embeddings": 128}
    assert RopeConfig.from_hf(written) == rope
    assert RopeConfig.from_hf({k: v for k, v in written.items() if k != "rope_parameters"}) == rope
    only_new = {k: written[k] for k in ("rope_parameters", "max_position_embeddings")}
    assert RopeConfig.from_hf(only_new) == rope
    assert RopeConfig.from_hf(make(rope_type, truncate=False).to_hf()).truncate is False
    assert None not in [*written.values(), *written["rope_parameters"].values()]


@pytest.mark.parametrize("rope_type", ROPE_TYPES)
def test_theta_is_honoured_by_every_type(rope_type):
    # The fastest pair turns by one radian a position whatever theta is, save for the stretch; slower ones follow it.
    low, high = (frequencies(make(rope_type, rope_theta=theta)) for theta in (100.0, 1e6))
    assert_close(low[0], high[0], ulp=4)
    assert (low[1:] > high[1:]).all()


def test_default_is_the_geometric_series():
    assert_close(frequencies(make("default", rope_theta=500.0)), plain(500.0), ulp=8, of="each")


def test_linear_is_position_over_factor():
    got = cos_sin(make("linear"), WIDTH, span(0, 4, 20, 400))
    want = cos_sin(make("default"), WIDTH, span(0, 1, 5, 100))
    for scaled, plain_angles in zip(got, want, strict=True):
        np.testing.assert_array_equal(scaled, plain_angles)  # the factor is a power of two


def test_dynamic_is_the_default_inside_the_window_and_stretches_beyond():
    rope = make("dynamic")
    assert_close(frequencies(rope, 0, 127), plain(10000.0), ulp=16, of="each")
    for position in (128, 255, 1000):
        length = position + 1
        theta = 10000.0 * (2.0 * length / 128 - 1.0) ** (WIDTH / (WIDTH - 2))
        assert_close(frequencies(rope, position), plain(theta), ulp=16, of="each")
    assert (frequencies(rope, 200)[1:] < frequencies(rope, 127)[1:]).all()
    unread = make("dynamic", original_max_position_embeddings=32)
    np.testing.assert_array_equal(frequencies(unread, 100), frequencies(rope, 100))


def test_llama3_keeps_fast_pairs_slows_slow_ones_and_blends_between():
    rope = make("llama3")
    base, got = plain(10000.0), frequencies(rope)
    turns = 64 * base / (2 * math.pi)  # of each pair within the original window
    fast, slow = turns > 4, turns < 1
    between = ~fast & ~slow
    assert fast.any()
    assert slow.any()
    assert between.any()
    assert_close(got[fast], base[fast], ulp=8, of="each")
    assert_close(got[slow], base[slow] / 8, ulp=8, of="each")
    share = (turns[between] - 1) / 3
    assert_close(got[between], base[between] * (share + (1 - share) / 8), ulp=8, of="each")


def test_yarn_interpolates_only_pairs_that_turn_seldom():
    """arXiv 2309.00071, section 3.2, with transformers' rounding of the ramp's ends."""
    rope = make("yarn")
    base, got = plain(10000.0), frequencies(rope)
    low, high = (WIDTH * math.log(64 / (b * 2 * math.pi)) / (2 * math.log(10000.0)) for b in (16.0, 2.0))
    low, high = max(math.floor(low), 0), math.ceil(high)
    ramp = [min(max((i - low) / (high - low), 0.0), 1.0) for i in range(WIDTH // 2)]
    want = np.asarray([b / 4 * r + b * (1 - r) for b, r in zip(base, ramp, strict=True)])
    assert_close(got, want, ulp=8, of="each")
    assert got[0] == base[0]
    assert_close(got[-1], base[-1] / 4, ulp=8)


def test_yarn_that_does_not_round_the_ramps_ends():
    """As gpt-oss has it; a draft beside it learns with rounded ends, which every engine gives it."""
    rope = make("yarn", truncate=False)
    low, high = (WIDTH * math.log(64 / (b * 2 * math.pi)) / (2 * math.log(10000.0)) for b in (16.0, 2.0))
    ramp = np.clip((np.arange(WIDTH // 2) - max(low, 0)) / (high - max(low, 0)), 0, 1)
    assert_close(frequencies(rope), plain(10000.0) * (ramp / 4 + 1 - ramp), ulp=8, of="each")
    assert not np.array_equal(frequencies(rope), frequencies(make("yarn")))
    assert rope.for_draft() == make("yarn")


def test_yarns_usual_betas_are_32_and_1():
    given = make("yarn", beta_fast=32.0, beta_slow=1.0)
    np.testing.assert_array_equal(frequencies(make("yarn", beta_fast=None, beta_slow=None)), frequencies(given))
    assert not np.array_equal(frequencies(given), frequencies(make("yarn")))


@pytest.mark.parametrize(
    ("fields", "want"),
    [
        ({"mscale": None, "mscale_all_dim": None}, 0.1 * math.log(4) + 1),
        ({"mscale": 0.7, "mscale_all_dim": None}, 0.1 * math.log(4) + 1),
        ({"mscale": 1.0, "mscale_all_dim": 0.0}, 0.1 * math.log(4) + 1),
        ({"mscale": 1.0, "mscale_all_dim": 1.0}, 1.0),
        ({}, (0.07 * math.log(4) + 1) / (0.13 * math.log(4) + 1)),
        ({"attention_factor": 1.25}, 1.25),
        ({"factor": 1.0, "mscale": None, "mscale_all_dim": None}, 1.0),
    ],
)
def test_yarn_attention_factor(fields, want):
    rope = make("yarn", **fields)
    assert_close(attention_factor(rope), want, ulp=4)
    cos, sin = cos_sin(rope, WIDTH, span(0, 9))
    assert_close(np.hypot(cos, sin), np.full(cos.shape, want), ulp=8)


@pytest.mark.parametrize("rope_type", sorted(set(ROPE_TYPES) - {"yarn"}))
def test_other_types_do_not_scale_cos_and_sin(rope_type):
    assert attention_factor(make(rope_type, attention_factor=3.0)) == 1.0


def test_get_mscale():
    assert get_mscale(0.5) == get_mscale(1.0, 9.0) == 1.0
    assert_close(get_mscale(40.0, 0.707), 0.1 * 0.707 * math.log(40) + 1, ulp=4)


@pytest.mark.parametrize(
    ("rope", "want"),
    [
        (make("yarn"), (0.13 * math.log(4) + 1) ** 2),
        (make("yarn", mscale_all_dim=0.0), 1.0),
        (make("yarn", mscale_all_dim=None), 1.0),
        (make("default", mscale_all_dim=1.0), 1.0),
    ],
)
def test_softmax_scale_grows_with_mscale_all_dim_alone(rope, want):
    assert_close(rope.softmax_mscale(), want, ulp=4)


@pytest.mark.parametrize(
    ("rope_type", "name"),
    [(rope_type, name) for rope_type in ("linear", "dynamic", "yarn") for name in ("factor",)]
    + [("llama3", name) for name in EXTRA["llama3"]],
)
def test_a_missing_parameter_is_named(rope_type, name):
    fields = {key: value for key, value in EXTRA[rope_type].items() if key != name}
    with pytest.raises(InputError, match=f"rope_type '{rope_type}' needs '{name}'"):
        RopeConfig.from_hf({"rope_scaling": {"rope_type": rope_type, **fields}})


def test_an_unknown_type_lists_the_known_ones():
    with pytest.raises(InputError, match=r"rope_type: found 'longrope', expected one of default, linear"):
        RopeConfig.from_hf({"rope_scaling": {"type": "longrope", "factor": 2.0}})


def normal(seed):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(1, 1, 1, WIDTH)), jnp.float32)


def product(rotate, rope, query_at, key_at):
    """q . k of one query and one key at two positions."""
    q, k = (rotate(normal(i), *cos_sin(rope, WIDTH, span(at))) for i, at in enumerate((query_at, key_at)))
    return float(jnp.sum(q * k))


@pytest.mark.parametrize("rotate", [rotate_half, rotate_interleaved])
@pytest.mark.parametrize("rope_type", ROPE_TYPES)
def test_products_depend_on_the_distance_alone(rotate, rope_type):
    rope = make(rope_type)
    want = product(rotate, rope, 7, 3)
    size = np.abs(normal(0) * normal(1)).sum()  # the summands cancel out, so rounding is counted of their sizes
    for offset in (1, 20, 90):  # all inside dynamic's window
        got = product(rotate, rope, 7 + offset, 3 + offset)
        assert_close(np.asarray([got, size]), np.asarray([want, size]), ulp=16, dtype=np.float32)
    assert abs(product(rotate, rope, 8, 3) - want) > 1e-2
    assert abs(product(rotate, rope, 3, 7) - want) > 1e-2


@pytest.mark.parametrize("rotate", [rotate_half, rotate_interleaved])
def test_rotation_keeps_lengths_and_dtype(rotate):
    x = jnp.tile(normal(0), (1, 3, 2, 1))
    out = rotate(x, *cos_sin(make("default"), WIDTH, span(0, 5, 100)))
    assert_close(jnp.linalg.norm(out, axis=-1), jnp.linalg.norm(x, axis=-1), ulp=8, of="each")
    assert rotate(x.astype(jnp.bfloat16), *cos_sin(make("default"), WIDTH, span(0, 5, 100))).dtype == jnp.bfloat16


def test_the_two_layouts_differ_by_the_order_of_pairs_only():
    x, angles = normal(3), cos_sin(make("default"), WIDTH, span(11))
    halves = jnp.concatenate([x[..., 0::2], x[..., 1::2]], axis=-1)
    np.testing.assert_array_equal(rotate_interleaved(x, *angles), rotate_half(halves, *angles))


def test_pair_i_of_each_layout():
    unit = jnp.zeros((1, 1, 1, WIDTH)).at[..., 1].set(1.0)
    cos, sin = (np.asarray(a)[0, 0] for a in cos_sin(make("default"), WIDTH, span(2)))
    half = np.zeros(WIDTH)
    half[1], half[1 + WIDTH // 2] = cos[1], sin[1]  # (x_1, x_9)
    np.testing.assert_array_equal(rotate_half(unit, *cos_sin(make("default"), WIDTH, span(2)))[0, 0, 0], half)
    pair = np.zeros(WIDTH)
    pair[0], pair[WIDTH // 2] = -sin[0], cos[0]  # (x_0, x_1), written de-interleaved
    got = rotate_interleaved(unit, *cos_sin(make("default"), WIDTH, span(2)))[0, 0, 0]
    np.testing.assert_array_equal(got, pair)


def test_angles_stay_exact_at_far_positions():
    position = 100_003
    cos, _ = cos_sin(make("default"), WIDTH, span(position))
    exact = np.cos(np.float32(position) * frequencies(make("default")).astype(np.float64))
    # float32 angles of 1e5 are right to 4e-3; a bfloat16 angle would be off by hundreds.
    assert_close(cos[0, 0], exact, rtol=4e-3)


@pytest.mark.parametrize(
    "config",
    [
        {"partial_rotary_factor": 0.5},
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}},
    ],
)
def test_parameters_that_would_change_the_angles_are_not_dropped(config):
    with pytest.raises(InputError, match=r"rope parameters: partial_rotary_factor is .* is not supported"):
        RopeConfig.from_hf(config)
