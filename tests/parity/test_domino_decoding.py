"""Domino decodes as the PyTorch reference does, round by round: proposals, what the target accepts, outputs.

See golden/decode_domino_a.json. Needs no PyTorch.
"""

import jax
import numpy as np
import pytest
from block_golden import golden, models_of
from flax import nnx

from flaxdraft.algorithms.dflash.layout import layout_of
from flaxdraft.algorithms.domino.drafter import DominoDrafter
from flaxdraft.algorithms.domino.drafts import qwen3
from flaxdraft.decode.decoding import Decoding, ReadyDraft, Settings


class Noting(DominoDrafter):
    """Keeps what it proposes."""

    def propose(self, draft, state, newest_B, token_B, num_tokens, choose):
        state, proposal = super().propose(draft, state, newest_B, token_B, num_tokens, choose)
        jax.debug.callback(lambda *told: NOTED.append(told), newest_B, token_B, proposal.ids_BQ, ordered=True)
        return state, proposal


NOTED = []  # of each target pass: positions and tokens of the newest tokens, and what was proposed


@pytest.fixture(scope="module")
def decoded():
    """All prompts in one batch, each some tokens further than the reference went."""
    of = golden("decode_domino_a")
    target, draft = models_of(qwen3, of)
    drafter = Noting(layout_of(draft.config.block_size, draft.config.shift_label))
    prompts = [one["prompt"] for one in of.meta["results"]["prompts"]]
    settings = Settings(32, drafter.most_tokens, (-1,))
    answers = Decoding(target, ReadyDraft(*nnx.split(draft), drafter), prompts, settings).finish()
    jax.effects_barrier()
    return of.meta["results"]["prompts"], answers


@pytest.mark.parametrize("number", range(3))
def test_every_round_is_the_references(number, decoded):
    want, answer = decoded[0][number], decoded[1][number]
    assert (want["prompt"] + answer.tokens)[: len(want["output"])] == want["output"]
    for i, one in enumerate(want["rounds"]):
        newest_B, token_B, ids_BQ = NOTED[i]
        assert (int(newest_B[number]), int(token_B[number])) == (one["start"], one["block_in"][0])
        assert np.asarray(ids_BQ)[number].tolist() == one["proposal"]
        assert answer.yields[i] == one["accepted_drafts"] + 1
        assert answer.tokens[sum(answer.yields[: i + 1])] == one["bonus"]
