"""Sampled speculative decoding draws from the target's distribution: chi-square against its exact probabilities."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreeing import ready
from flax import nnx
from test_contracts import TARGET_HF

from flaxdraft.algorithms.eagle3.drafts import llama
from flaxdraft.decode.decoding import Decoding, Settings
from flaxdraft.decode.generation import generate
from flaxdraft.decode.speculative import advance
from flaxdraft.devices.sharding import Sharding
from flaxdraft.interfaces import Batch, VocabMap
from flaxdraft.nn.precision import Precision
from flaxdraft.ops import rejection
from flaxdraft.targets import decoder
from flaxdraft.targets import llama as llama_target

V, NUM, TOKENS, CHAIN = 6, 52_000, 4, 2
PROMPT = [3, 1, 4]
VOCAB = VocabMap(np.array([0, 1, 3, 4]), V)  # two tokens can never be drafted


def fill(state, seed, gain):
    """Random weights whose logits tell tokens apart without being sure."""
    rng = np.random.default_rng(seed)

    def weight(path, leaf):
        noise = rng.normal(size=leaf.shape)
        if path[-1] == "scale":
            return leaf.replace(jnp.ones(leaf.shape, jnp.float32))
        return leaf.replace(jnp.asarray(gain * noise / np.sqrt(leaf.shape[-2:][0]), jnp.float32))

    return nnx.from_flat_state([(path, weight(path, leaf)) for path, leaf in nnx.to_flat_state(state)])


@pytest.fixture(scope="module")
def models():
    sizes = {
        "vocab_size": V, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 3, "num_attention_heads": 1,
        "num_key_value_heads": 1, "head_dim": 8, "tie_word_embeddings": False,
    }  # fmt: skip
    config = llama_target.Config.from_hf(TARGET_HF | sizes, (0, 1, 2))
    groups = llama_target.groups(config, Precision(), Sharding.none())
    target = decoder.build(config, groups, fill(decoder.abstract_state(config, groups, Precision())[1], 0, 1.5),
                           Precision())  # fmt: skip
    draft = llama.make(
        llama.Config(**llama.Config.for_target(config, VOCAB.draft_vocab_size)), VOCAB, target,
        precision=Precision(), sharding=Sharding.none(), rngs=nnx.Rngs(0),
    )  # fmt: skip
    nnx.update(draft, fill(nnx.state(draft, nnx.Param), 1, 0.5))
    return target, ready(draft)


@functools.cache
def prefixes():
    """Every answer of up to TOKENS - 1 tokens after the prompt, as one padded batch."""
    rows = [()]
    for _ in range(TOKENS - 1):
        rows += [(*row, token) for row in rows if len(row) == max(map(len, rows)) for token in range(V)]
    return sorted(set(rows), key=lambda row: (len(row), row))


def exact(target, temperature):
    """Probability of each of the V**TOKENS answers, from forwards without a cache."""
    rows = prefixes()
    tokens = np.zeros((len(rows), len(PROMPT) + TOKENS), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(PROMPT) + len(row)] = [*PROMPT, *row]
    ones, at = np.ones_like(tokens), np.tile(np.arange(tokens.shape[1]), (len(rows), 1))
    last = target.features(Batch(tokens, ones > 0, ones, at)).last_BTE
    ends = last[np.arange(len(rows)), [len(PROMPT) + len(row) - 1 for row in rows]]
    following = np.asarray(jax.nn.softmax(target.logits(ends) / temperature, axis=-1), np.float64)
    probability = {(): 1.0}
    for row, next_V in zip(rows, following, strict=True):
        probability |= {(*row, token): probability[row] * next_V[token] for token in range(V)}
    whole = [p for row, p in sorted(probability.items()) if len(row) == TOKENS]
    return np.array(whole) / np.sum(whole)


def excess(answers, probabilities):
    """Chi-square's distance from its expectation, in standard deviations; rare answers are counted as one."""
    index = np.array(answers) @ V ** np.arange(TOKENS)[::-1]
    counts, expected = np.bincount(index, minlength=V**TOKENS), len(answers) * probabilities
    rare = expected < 8
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    chi_square, freedom = ((counts - expected) ** 2 / expected).sum(), len(counts) - 1
    return (chi_square - freedom) / np.sqrt(2 * freedom)


def sampled(models, temperature, chain=CHAIN, seed=0, num=NUM):
    """So many answers in one batch, and the tokens that each target pass gave."""
    target, draft = models
    settings = Settings(TOKENS, chain, (-1,), temperature)
    decoded = Decoding(target, draft, [PROMPT] * num, settings, seeds=seed + np.arange(num)).finish()
    return [one.tokens for one in decoded], np.bincount([y for one in decoded for y in one.yields])


@pytest.mark.parametrize("temperature", [0.6, *(pytest.param(t, marks=pytest.mark.slow) for t in (1.0, 1.7))])
def test_answers_are_distributed_as_the_targets(models, temperature):
    answers, yields = sampled(models, temperature)
    assert len(answers) > 50_000
    assert (yields[1:] > NUM // 20).all()  # refused at once, after one token, and accepted whole
    assert excess(answers, exact(models[0], temperature)) < 4


@pytest.mark.slow
def test_the_target_alone_samples_what_generate_does(models):
    """So it is judged by the same test."""
    answers, _ = sampled(models, 1.0, chain=0)
    assert excess(answers, exact(models[0], 1.0)) < 4
    some = generate(models[0], [PROMPT] * 64, max_new_tokens=TOKENS, stop_tokens=(), temperature=1.0)
    assert answers[:64] == some


@pytest.mark.parametrize("broken", ["residual is p", pytest.param("too much is accepted", marks=pytest.mark.slow)])
def test_a_broken_scheme_is_seen(models, monkeypatch, broken):
    if broken == "residual is p":
        monkeypatch.setattr(rejection, "residual", lambda p_BV, q_BV: p_BV)
    else:
        uniform = jax.random.uniform
        monkeypatch.setattr(jax.random, "uniform", lambda *args: 0.5 * uniform(*args))
    advance.clear_cache()
    answers, _ = sampled(models, 1.0, num=NUM // 4)  # a quarter is enough to see it
    advance.clear_cache()
    assert excess(answers, exact(models[0], 1.0)) > 20


def test_verify_one_step():
    """Accepted with min(1, p / q), replaced by the residual: on numbers small enough to see."""
    num = 40_000
    p, q = np.array([0.5, 0.2, 0.3]), np.array([0.25, 0.75])  # the draft knows tokens 0 and 1
    tile = lambda x: jnp.tile(jnp.asarray(x, jnp.float32), (num, 1))  # noqa: E731
    keys = jax.vmap(jax.random.key)(jnp.arange(num))
    for draft, rate, residual in ((0, 1.0, None), (1, 0.2 / 0.75, np.array([0.25, 0, 0.3]) / 0.55)):
        accepted, following = rejection.verify(
            jnp.stack([tile(p), tile([1.0, 0.0, 0.0])], 1), tile(q)[:, None], jnp.full((num, 1), draft),
            jnp.array([0, 1]), keys,
        )  # fmt: skip
        assert abs(float(jnp.mean(accepted)) - rate) <= 4 * np.sqrt(rate * (1 - rate) / num)
        assert not following[accepted == 1].any()  # after a whole chain comes the target's next distribution
        if residual is not None:
            refused = np.asarray(following)[np.asarray(accepted) == 0]
            share = np.bincount(refused, minlength=3) / len(refused)
            assert (np.abs(share - residual) <= 4 * np.sqrt(residual * (1 - residual) / len(refused))).all()
    same = rejection.residual(tile(p), tile(p))
    np.testing.assert_array_equal(same, tile(p))
