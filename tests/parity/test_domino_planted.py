"""A trained Domino draft that is served in another convention than it was trained in loses accept length; the answers
stay the target's. The draft is the reference's (golden/decode_domino_a)."""

import dataclasses

import dflash
import pytest
from block_golden import golden, models_of
from flax import nnx

from flaxdraft.algorithms.dflash.layout import layout_of
from flaxdraft.algorithms.domino.drafter import DominoDrafter
from flaxdraft.algorithms.domino.drafts import qwen3
from flaxdraft.algorithms.domino.head import PrefixGRU
from flaxdraft.decode import speculative
from flaxdraft.decode.decoding import Decoding, ReadyDraft, Settings
from flaxdraft.evaluate.walk import accept_length

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def models():
    return models_of(qwen3, golden("decode_domino_a"))


def gained(target, draft):
    """On the two prompts that the draft has seen in training."""
    speculative.begin.clear_cache()
    speculative.advance.clear_cache()
    wanted = golden("decode_domino_a").meta["results"]["prompts"][:2]
    drafter = DominoDrafter(layout_of(draft.config.block_size, draft.config.shift_label))
    ready, prompts = ReadyDraft(*nnx.split(draft), drafter), [one["prompt"] for one in wanted]
    answers = Decoding(target, ready, prompts, Settings(24, drafter.most_tokens, (-1,))).finish()
    for one, answer in zip(wanted, answers, strict=True):
        assert (one["prompt"] + answer.tokens)[: len(one["output"])] == one["output"]
    return accept_length([one.yields for one in answers])


def changed(draft, target, **fields):
    """The same weights under another configuration."""
    other = dflash.make_draft(dataclasses.replace(draft.config, **fields), target)
    nnx.update(other, nnx.state(draft, nnx.Param))
    return other


def label_not_shifted(target, draft, monkeypatch):
    return changed(draft, target, shift_label=False)


def longer_prefix(target, draft, monkeypatch):
    return changed(draft, target, pure_draft_prefix_len=2)


def without_the_head(target, draft, monkeypatch):
    """As an engine drafts that knows DFlash alone."""
    return changed(draft, target, pure_draft_prefix_len=draft.config.block_size - 1)


def one_token_behind(target, draft, monkeypatch):
    """The head reads the tokens up to the one before the last."""
    step = PrefixGRU.step
    behind = []

    def late(self, state_BG, token_BD):
        behind.append(token_BD)
        return state_BG if len(behind) % 4 == 1 else step(self, state_BG, behind[-2])

    monkeypatch.setattr(PrefixGRU, "step", late)
    return draft


@pytest.mark.parametrize("plant", [label_not_shifted, longer_prefix, without_the_head, one_token_behind])
def test_a_wrong_convention_loses_accept_length(plant, models, monkeypatch):
    target, draft = models
    right = gained(target, draft)
    assert right > 2
    assert gained(target, plant(target, draft, monkeypatch)) - 1 < 0.95 * (right - 1)
