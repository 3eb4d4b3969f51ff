"""A trained draft that is served in another convention than it was trained in loses accept length; and what training
alone gets wrong makes the walk differ from decoding. The draft is the reference's (golden/decode_dflash_a): it knows
its two prompts by heart, so what it sees matters little to it, and some of the losses are small."""

import dataclasses

import dflash
import jax.numpy as jnp
import pytest
from flax import nnx
from test_dflash_decoding import meta as meta
from test_dflash_decoding import models as models

from flaxdraft.algorithms.dflash import draft as draft_module
from flaxdraft.algorithms.dflash.block_attention import Sight
from flaxdraft.algorithms.dflash.drafter import BlockDrafter
from flaxdraft.algorithms.dflash.layout import Layout, layout_of
from flaxdraft.decode import speculative
from flaxdraft.decode.decoding import Decoding, ReadyDraft, Settings
from flaxdraft.evaluate.walk import accept_length, evaluate_teacher_forced, make_accepted
from flaxdraft.evaluate.walk_answers import featured
from flaxdraft.ops.attention import KeyRange
from flaxdraft.train.state import split_draft

pytestmark = pytest.mark.slow
LIMIT, CHAIN = 24, 4


def decode(target, draft, layout, meta):
    """On the two prompts that the draft has seen in training."""
    speculative.begin.clear_cache()
    speculative.advance.clear_cache()
    prompts = [one["prompt"] for one in meta["results"]["prompts"]][:2]
    return prompts, Decoding(
        target, ReadyDraft(*nnx.split(draft), BlockDrafter(layout)), prompts, Settings(LIMIT, CHAIN, (-1,))
    ).finish()


def gained(target, draft, layout, meta):
    prompts, answers = decode(target, draft, layout, meta)
    for one, answer in zip(meta["results"]["prompts"], answers, strict=False):
        assert (one["prompt"] + answer.tokens)[: len(one["output"])] == one["output"]  # the target's own, always
    return accept_length([one.yields for one in answers]), prompts, answers


def changed(draft, target, **fields):
    """The same weights under another configuration."""
    other = dflash.make_draft(dataclasses.replace(draft.config, **fields), target)
    nnx.update(other, nnx.state(draft, nnx.Param))
    return other


OWN = layout_of(CHAIN + 1, sample_from_anchor=False)


def slots_shifted(target, draft, monkeypatch):
    return target, draft, Layout(CHAIN + 1, shift=1, first=0)


def taps_one_layer_on(target, draft, monkeypatch):
    layers = tuple(layer + 1 for layer in target.config.tap_layers)
    return dataclasses.replace(target, config=dataclasses.replace(target.config, tap_layers=layers)), draft, OWN


def input_norm_on_the_context(target, draft, monkeypatch):
    read = draft_module.Layer.read
    monkeypatch.setattr(
        draft_module.Layer,
        "read",
        lambda self, context, positions: read(self, self.input_layernorm(context), positions),
    )
    return target, draft, OWN


def causal(target, draft, monkeypatch):
    return target, changed(draft, target, is_causal=True), OWN


def another_rope_base(target, draft, monkeypatch):
    rope = dataclasses.replace(draft.config.rope, rope_theta=100.0)
    return target, changed(draft, target, rope=rope), OWN


def context_one_row_short(target, draft, monkeypatch):
    """As a draft finds it that was trained on the anchor's own state."""
    text = Sight.text

    def short(self, anchor_BA, first_BA):
        seen = text(self, anchor_BA, first_BA)
        return KeyRange(seen.first_BR, seen.last_BR - 1)

    monkeypatch.setattr(Sight, "text", short)
    return target, draft, OWN


# What is left at most of the tokens that a pass gains.
PLANTS = {
    slots_shifted: 0.1, taps_one_layer_on: 0.2, another_rope_base: 0.15, input_norm_on_the_context: 0.8,
    context_one_row_short: 0.8, causal: 0.95,
}  # fmt: skip


@pytest.mark.parametrize("plant", PLANTS)
def test_a_wrong_convention_loses_accept_length(plant, models, meta, monkeypatch):
    right = gained(*models, OWN, meta)[0]
    assert right > 3
    target, draft, layout = plant(*models, monkeypatch)
    assert gained(target, draft, layout, meta)[0] - 1 < PLANTS[plant] * (right - 1)


def anchor_seen(text):
    def wrong(self, anchor_BA, first_BA):
        seen = text(self, anchor_BA, first_BA)
        return KeyRange(seen.first_BR, seen.last_BR + 1)

    return wrong


def window_from_the_anchor(text):
    def wrong(self, anchor_BA, first_BA):
        oldest = jnp.maximum(first_BA, anchor_BA - (self.window or 1000))
        seen = text(self, anchor_BA, first_BA)
        return KeyRange(jnp.repeat(oldest, self.size, axis=1), seen.last_BR)

    return wrong


@pytest.mark.parametrize(
    ("plant", "fields"),
    [
        (anchor_seen, {}),
        (window_from_the_anchor, {"layer_types": ["sliding_attention"] * 2, "sliding_window": 3, "is_causal": False}),
    ],
)
def test_what_training_sees_and_decoding_does_not_shows_in_the_walk(plant, fields, models, meta, monkeypatch):
    target, draft = models[0], changed(models[1], models[0], **fields)
    _, prompts, answers = gained(target, draft, OWN, meta)
    texts = [([*prompt, *one.tokens], len(prompt)) for prompt, one in zip(prompts, answers, strict=True)]
    rows = featured(target, texts, len(texts), 32)
    evaluation, (graphdef, params, frozen) = dflash.algorithm(block_size=CHAIN + 1).drafting(CHAIN), split_draft(draft)

    def walked():
        accepted = make_accepted(graphdef, evaluation, frozen, ())(params)
        return evaluate_teacher_forced(accepted, rows, evaluation, len(rows)).yields

    decoded = [one.yields for one in answers]
    assert walked() == decoded
    monkeypatch.setattr(Sight, "text", plant(Sight.text))
    assert walked() != decoded
