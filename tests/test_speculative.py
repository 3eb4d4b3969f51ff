"""Real decoding: lossless, and equal to the walk over the target's own answers."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flaxdraft import targets
from flaxdraft.algorithms.eagle3 import Algorithm
from flaxdraft.data.generation import answer_greedily
from flaxdraft.evaluate.acceptance import accept_length, evaluate_teacher_forced, make_accepted
from flaxdraft.evaluate.speculative import decode
from flaxdraft.interfaces import VocabMap, find_by_name
from flaxdraft.mesh import Sharding
from flaxdraft.precision import Precision
from flaxdraft.train.state import split_draft, warm_start

CHAIN, LIMIT, END = 3, 20, 2


@pytest.fixture(scope="module")
def setup(tiny_gguf):
    target = targets.from_pretrained(str(tiny_gguf)).model
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, target.config.vocab_size, n).tolist() for n in (3, 9, 5, 4, 7)]
    return target, prompts, answer_greedily(target, prompts, LIMIT, END, len(prompts), lambda num: None)


def make(target, name, *, helpful):
    """A draft with some hits: warm-started with a vocabulary that leaves target tokens out."""
    module = find_by_name("flaxdraft.drafts", name, "x")
    size = target.config.vocab_size
    vocab = VocabMap(np.delete(np.arange(size), np.arange(5, size, 7)), size)
    config = module.Config(**module.Config.for_target(target.config, vocab.draft_vocab_size))
    draft = module.make(
        config, vocab, target.embedding(), precision=Precision(), sharding=Sharding.none(), rngs=nnx.Rngs(1)
    )
    if helpful:
        warm_start(draft, target, vocab)
    return draft, target.head()[vocab.target_ids_W]


@pytest.mark.parametrize("helpful", [False, True])
@pytest.mark.parametrize("name", ["llama", "mla"])
def test_output_is_the_targets_own_and_the_walk_counts_the_same_passes(setup, name, helpful):
    target, prompts, rows = setup
    draft, head = make(target, name, helpful=helpful)
    graphdef, params, frozen = split_draft(draft)
    decoded = decode(target, *nnx.split(draft), prompts, max_new_tokens=LIMIT, chain_length=CHAIN, end_token=END)
    for one, row in zip(decoded, rows, strict=True):
        assert one.tokens == row.tokens[row.num_prompt :].tolist()
        assert sum(one.yields) == row.num_answer - 1
    algorithm = Algorithm(CHAIN)
    for batch in (2, 5):
        accepted = make_accepted(graphdef, algorithm, frozen, head)(params)
        forced = evaluate_teacher_forced(accepted, rows, algorithm, batch)
        assert forced.yields == [one.yields for one in decoded]
        assert forced.sums.row_count_J[0] == sum(row.num_answer - 1 for row in rows)
    assert accept_length(forced.yields) >= 1.0


def test_a_draft_that_knows_the_answers_is_accepted_whole(setup, monkeypatch):
    """An oracle in the draft's place: every pass takes the chain and one token more; stops mid-chain are cut."""
    target, prompts, rows = setup
    answers = {tuple(row.tokens[: row.num_prompt].tolist()): row.tokens.tolist() for row in rows}
    texts = [answers[tuple(prompt)] + [7] * CHAIN for prompt in prompts]

    def oracle(graphdef, state, cache, hidden, position_B, chain_length):
        at = np.minimum(np.asarray(position_B), max(map(len, texts)))
        rows = [[*text, *[7] * 99][a + 2 : a + 2 + chain_length] for text, a in zip(texts, at, strict=True)]
        return cache, jnp.asarray(rows, jnp.int32)

    monkeypatch.setattr("flaxdraft.evaluate.speculative.propose", oracle)
    draft, _ = make(target, "llama", helpful=False)
    decoded = decode(target, *nnx.split(draft), prompts, max_new_tokens=LIMIT, chain_length=CHAIN, end_token=END)
    for one, row in zip(decoded, rows, strict=True):
        assert one.tokens == row.tokens[row.num_prompt :].tolist()
        assert one.yields[:-1] == [CHAIN + 1] * (len(one.yields) - 1)
