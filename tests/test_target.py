"""The Llama target: cache, taps, packing, generation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closeness import assert_close
from flax import nnx

from flaxdraft import targets
from flaxdraft.data.answers import answer_greedily
from flaxdraft.decode.generation import common_prefix
from flaxdraft.devices.sharding import Sharding
from flaxdraft.errors import InputError
from flaxdraft.interfaces import Batch
from flaxdraft.nn.precision import Precision
from flaxdraft.targets import decoder, llama

TAPS = (1, 3, 4)
pytestmark = pytest.mark.numeric


@pytest.fixture(scope="module")
def loaded(tiny_gguf):
    return targets.from_pretrained(str(tiny_gguf), tap_layers=TAPS)


@pytest.fixture(scope="module")
def tokens(loaded):
    vocab = loaded.model.config.vocab_size
    return jnp.asarray(np.random.default_rng(0).integers(3, vocab, (2, 12)), jnp.int32)


def whole(target, tokens, segments=None, positions=None):
    num = tokens.shape
    segments = jnp.ones(num, jnp.int32) if segments is None else segments
    positions = jnp.tile(jnp.arange(num[1]), (num[0], 1)) if positions is None else positions
    return target.features(Batch(tokens, jnp.zeros(num, bool), segments, positions))


@pytest.mark.parametrize("splits", [(12,), (5, 7), (1, 4, 7), (1,) * 12])
def test_cached_forward_equals_uncached_wherever_it_is_split(loaded, tokens, splits):
    want = whole(loaded.model, tokens)
    cache, start = loaded.model.new_cache(2, 16), 0
    for size in splits:
        positions = jnp.tile(jnp.arange(start, start + size), (2, 1))
        cache, got = loaded.model.extend(cache, tokens[:, start : start + size], positions, "all")
        span = slice(start, start + size)
        np.testing.assert_array_equal(got.argmax_BT, want.argmax_BT[:, span])
        assert_close(got, jax.tree.map(lambda x, span=span: x[:, span], want), ulp=50)
        start += size


def test_statistics_are_those_of_the_head(loaded, tokens):
    got = whole(loaded.model, tokens)
    logits = np.asarray(got.last_BTE, np.float64) @ np.asarray(loaded.model.head(), np.float64).T
    np.testing.assert_array_equal(got.argmax_BT, logits.argmax(-1))
    assert_close(got.logsumexp_BT, np.log(np.exp(logits).sum(-1)), ulp=32, of="each")


def test_packed_documents_equal_separate_ones(loaded, tokens):
    apart = whole(loaded.model, tokens)
    segments = jnp.repeat(jnp.arange(1, 3), 12)[None]
    packed = whole(loaded.model, tokens.reshape(1, -1), segments, jnp.tile(jnp.arange(12), 2)[None])
    assert_close(packed.last_BTE.reshape(2, 12, -1), apart.last_BTE, ulp=40)
    assert_close(packed.taps_BTKE.reshape(2, 12, 3, -1), apart.taps_BTKE, ulp=11)


def test_end_head_gives_the_last_real_position_of_each_row(loaded, tokens):
    positions = np.tile(np.arange(12), (2, 1))
    positions[1, 8:] = 16  # padding
    _, got = loaded.model.extend(loaded.model.new_cache(2, 16), tokens, jnp.asarray(positions), "end")
    want = whole(loaded.model, tokens)
    for row, end in ((0, 11), (1, 7)):
        assert got.argmax_BT[row, end] == want.argmax_BT[row, end]
        assert_close(got.logsumexp_BT[row, end], want.logsumexp_BT[row, end], ulp=32)


def test_rows_of_another_cache_are_put_where_they_belong(loaded):
    """Into rows 3 and 0 of four; the numbers of padding, at either end, touch nothing."""
    number = lambda x: jnp.arange(x.size, dtype=x.dtype).reshape(x.shape)  # noqa: E731
    big = jax.tree.map(lambda x: -1 - number(x), loaded.model.new_cache(4, 16))
    small = jax.tree.map(number, loaded.model.new_cache(4, 8))
    got = loaded.model.put_rows(big, jnp.asarray([3, 4, 0, -1]), small)
    for name, slots in (("k_LBKHS", (..., slice(0, 8))), ("v_LBKSC", (..., slice(0, 8), slice(None)))):
        want, new = np.array(getattr(big, name)), np.asarray(getattr(small, name))
        for row, source in ((3, 0), (0, 2)):
            want[:, row][slots] = new[:, source]
        np.testing.assert_array_equal(getattr(got, name), want)


def padded(text):
    """One length for all, so that the forward compiles once; what follows a position does not reach it."""
    return jnp.asarray([text + [0] * (24 - len(text))])


def test_greedy_answers_and_features_equal_the_uncached_ones(loaded):
    """Ragged prompts with a shared beginning, padded batch rows, against one full forward a token."""
    rng = np.random.default_rng(1)
    vocab = loaded.model.config.vocab_size
    prompts = [[5] * 9 + rng.integers(3, vocab, n).tolist() for n in (2, 5, 3)]
    assert common_prefix(prompts) == 8
    steps = []
    rows = answer_greedily(loaded.model, prompts, 6, [2], 4, steps.append)
    assert len(rows) == 3
    assert sum(steps) == sum(row.num_answer for row in rows)
    for prompt, row in zip(prompts, rows, strict=True):
        text = list(prompt)
        while len(text) < len(prompt) + 6 and (len(text) == len(prompt) or text[-1] != 2):
            text.append(int(whole(loaded.model, padded(text)).argmax_BT[0, len(text) - 1]))
        assert row.tokens.tolist() == text
        assert row.num_prompt == len(prompt)
        want, inside = whole(loaded.model, padded(text)), slice(len(text) - 1)
        assert_close(row.features.taps_BTKE[:-1], want.taps_BTKE[0, inside], ulp=50)
        assert_close(row.features.last_BTE[:-1], want.last_BTE[0, inside], ulp=50)
        answer = slice(len(prompt) - 1, len(text) - 1)
        np.testing.assert_array_equal(row.features.argmax_BT[answer], text[len(prompt) :])


def test_taps_are_outputs_of_their_layers(loaded, tokens, tiny_gguf):
    """The tap after the last layer, normed, is the last hidden state; an earlier model's taps are a later one's."""
    one = targets.from_pretrained(str(tiny_gguf), tap_layers=(0, 2, 7)).model
    features = whole(one, tokens)
    x = np.asarray(features.taps_BTKE[:, :, 2], np.float64)
    eps = one.config.rms_norm_eps
    normed = x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * np.asarray(one.final_norm())
    assert_close(features.last_BTE, normed, ulp=40)
    assert whole(targets.from_pretrained(str(tiny_gguf)).model, tokens).taps_BTKE.shape == (2, 12, 0, x.shape[-1])
    assert_close(features.taps_BTKE[:, :, 1], reference_tap(loaded.model, tokens, 2), ulp=20)


def reference_tap(target, tokens, layer):
    """The output of one layer, by a model cut off after it: its last layer's tap."""
    config = dataclasses.replace(target.config, num_hidden_layers=layer + 1, tap_layers=(0, layer - 1, layer))
    layers = jax.tree.map(lambda w: w[: layer + 1], target.state["layers"])
    state = nnx.State({**target.state, "layers": layers})
    cut = decoder.build(config, llama.groups(config, Precision(), Sharding.none()), state, Precision())
    return whole(cut, tokens).taps_BTKE[:, :, 2]


@pytest.mark.parametrize("taps", [(2, 1, 3), (0, 1, 8), (1, 1, 2)])
def test_taps_must_be_ascending_layers(tiny_gguf, taps):
    with pytest.raises(InputError, match=r"target.tap_layers: .* are not ascending layers of a 8-layer target"):
        targets.from_pretrained(str(tiny_gguf), tap_layers=taps)
