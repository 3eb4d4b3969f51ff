"""A trained DSpark draft that is served in another convention than it was trained in loses accept length; the answers
stay the target's. The draft is the reference's (golden/decode_dspark_a)."""

import dataclasses

import dflash
import pytest
from block_golden import golden, models_of
from flax import nnx

from flaxdraft.algorithms.dflash.layout import layout_of
from flaxdraft.algorithms.dspark.drafter import DSparkDrafter
from flaxdraft.algorithms.dspark.drafts import qwen3
from flaxdraft.decode import speculative
from flaxdraft.decode.decoding import Decoding, ReadyDraft, Settings
from flaxdraft.evaluate.walk import accept_length

pytestmark = pytest.mark.slow
SIZE = 5
OWN = DSparkDrafter(layout_of(SIZE, sample_from_anchor=True))


@pytest.fixture(scope="module")
def models():
    return models_of(qwen3, golden("decode_dspark_a"))


def gained(target, draft, drafter, chain=SIZE - 1):
    """On the two prompts that the draft has seen in training."""
    speculative.begin.clear_cache()
    speculative.advance.clear_cache()
    wanted = golden("decode_dspark_a").meta["results"]["prompts"][:2]
    ready, prompts = ReadyDraft(*nnx.split(draft), drafter), [one["prompt"] for one in wanted]
    answers = Decoding(target, ready, prompts, Settings(24, chain, (-1,))).finish()
    for one, answer in zip(wanted, answers, strict=True):
        assert (one["prompt"] + answer.tokens)[: len(one["output"])] == one["output"]
    return accept_length([one.yields for one in answers])


def slots_as_dflash_has_them(target, draft):
    """Also what SpecForge's own generation does, one slot on from what it trains."""
    return target, draft, DSparkDrafter(layout_of(SIZE, sample_from_anchor=False))


def without_the_head(target, draft):
    silent = nnx.clone(draft)
    silent.markov.lm_head[...] *= 0
    return target, silent, OWN


def causal(target, draft):
    other = dflash.make_draft(dataclasses.replace(draft.config, is_causal=True), target)
    nnx.update(other, nnx.state(draft, nnx.Param))
    return target, other, OWN


def taps_one_layer_on(target, draft):
    layers = tuple(layer + 1 for layer in target.config.tap_layers)
    return dataclasses.replace(target, config=dataclasses.replace(target.config, tap_layers=layers)), draft, OWN


@pytest.mark.parametrize("plant", [slots_as_dflash_has_them, without_the_head, causal, taps_one_layer_on])
def test_a_wrong_convention_loses_accept_length(plant, models):
    right = gained(*models, OWN)
    assert right > 2.5
    assert gained(*plant(*models)) - 1 < 0.95 * (right - 1)


def test_the_more_confidence_is_asked_for_the_less_is_proposed(models):
    """And accepted."""
    lengths = [gained(*models, DSparkDrafter(OWN.layout, threshold), SIZE) for threshold in (0.0, 0.5, 0.9)]
    assert lengths[0] > lengths[1] > lengths[2] >= 1
