"""DSpark decodes as its authors' own loop does, round by round: whole blocks are proposed, the newest token's slot too;
confidences, what the target accepts, outputs.

See golden/decode_dspark_a.json. Needs no PyTorch.
"""

import jax
import numpy as np
import pytest
from block_golden import golden, models_of
from closeness import assert_close
from flax import nnx

from flaxdraft.algorithms.dflash.layout import layout_of
from flaxdraft.algorithms.dspark.drafter import DSparkDrafter
from flaxdraft.algorithms.dspark.drafts import qwen3
from flaxdraft.decode.decoding import Decoding, ReadyDraft, Settings


class Noting(DSparkDrafter):
    """Keeps what it proposes, and how far it trusts that."""

    def propose(self, draft, state, newest_B, token_B, num_tokens, choose):
        state, proposal = super().propose(draft, state, newest_B, token_B, num_tokens, choose)
        jax.debug.callback(lambda *told: NOTED.append(told), newest_B, token_B, proposal.ids_BQ, ordered=True)
        return state, proposal

    def standing(self, draft, hidden_BQD, before_BQ):
        logit_BQ = draft.confidence(hidden_BQD, draft.markov.embed(before_BQ))
        jax.debug.callback(lambda told: TRUSTED.append(told), logit_BQ, ordered=True)
        return super().standing(draft, hidden_BQD, before_BQ)


NOTED, TRUSTED = [], []  # of each target pass


@pytest.fixture(scope="module")
def decoded():
    """All prompts in one batch, each some tokens further than the reference went."""
    of = golden("decode_dspark_a")
    target, draft = models_of(qwen3, of)
    drafter = Noting(layout_of(draft.config.block_size, sample_from_anchor=True))
    assert drafter.most_tokens == draft.config.block_size
    prompts = [one["prompt"] for one in of.meta["results"]["prompts"]]
    settings = Settings(32, drafter.most_tokens, (-1,))
    answers = Decoding(target, ReadyDraft(*nnx.split(draft), drafter), prompts, settings).finish()
    jax.effects_barrier()
    return of, answers


@pytest.mark.parametrize("number", range(3))
def test_every_round_is_the_references(number, decoded):
    of, answers = decoded
    want, answer = of.meta["results"]["prompts"][number], answers[number]
    assert (want["prompt"] + answer.tokens)[: len(want["output"])] == want["output"]
    logits = of.tensors[f"confidence_logit.p{number}"]
    for i, one in enumerate(want["rounds"]):
        newest_B, token_B, ids_BQ = NOTED[i]
        assert (int(newest_B[number]), int(token_B[number])) == (one["start"], one["block_in"][0])
        assert np.asarray(ids_BQ)[number].tolist() == one["full_proposal"]
        assert_close(np.asarray(TRUSTED[i])[number], logits[i], rtol=1e-4)
        assert answer.yields[i] == one["accepted_drafts"] + 1
        assert answer.tokens[sum(answer.yields[: i + 1])] == one["bonus"]
