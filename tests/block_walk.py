"""What is asked of every algorithm whose drafts fill blocks: the walk is decoding, samples are the target's, documents
that are packed count as they do apart."""

import numpy as np
from flax import nnx
from test_rejection import PROMPT, TOKENS, V, exact, excess

from flaxdraft.algorithms.dflash import algorithm as blocks_module
from flaxdraft.algorithms.dflash import anchors
from flaxdraft.decode.decoding import Decoded, Decoding, ReadyDraft, Settings
from flaxdraft.evaluate.walk import evaluate_teacher_forced, make_accepted
from flaxdraft.evaluate.walk_answers import featured
from flaxdraft.interfaces import Batch, Example, Features
from flaxdraft.train.state import split_draft


def prompts() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, V, rng.integers(1, 9)).tolist() for _ in range(48)]


def decode(target, draft=None, algorithm=None) -> list[Decoded]:
    """Answers to the prompts, with chains as long as the draft can make them, or of the target alone."""
    if draft is None:
        return Decoding(target, None, prompts(), Settings(20, 0, (-1,))).finish()
    ready = ReadyDraft(*nnx.split(draft), algorithm.drafter())
    return Decoding(target, ready, prompts(), Settings(20, ready.drafter.most_tokens, (-1,))).finish()


def walk(target, draft, algorithm, decoded, changed=lambda row: row):
    """What teacher forcing says of decoded answers.

    Args:
        changed: a fault in an answer's row.
    """
    texts = [([*prompt, *one.tokens], len(prompt)) for prompt, one in zip(prompts(), decoded, strict=True)]
    rows = [changed(row) for row in featured(target, texts, len(texts), 32)]
    graphdef, params, frozen = split_draft(draft)
    evaluation = algorithm.drafting(algorithm.drafter().most_tokens)
    accepted = make_accepted(graphdef, evaluation, frozen, ())(params)
    return evaluate_teacher_forced(accepted, rows, evaluation, len(rows))


def assert_the_walk_is_decoding(target, draft, algorithm, monkeypatch):
    """Pass by pass, over runs of every length up to three tokens.

    Returns:
        what teacher forcing says.
    """
    monkeypatch.setattr(blocks_module, "SLOTS_AT_ONCE", 6 * 48 * draft.config.block_size)  # six blocks of a row
    assert algorithm.drafter().most_tokens == 3
    decoded = decode(target, draft, algorithm)
    assert [one.tokens for one in decoded] == [one.tokens for one in decode(target)]
    assert {gained for one in decoded for gained in one.yields} == {1, 2, 3, 4}
    forced = walk(target, draft, algorithm, decoded)
    assert forced.yields == [one.yields for one in decoded]
    return forced


def assert_samples_are_the_targets(target, draft, algorithm, rarest: float = 0.02) -> None:
    """
    Args:
        rarest: passes that are refused at once, after one token, and accepted whole are each more than that share of
            the answers.
    """
    ready, num = ReadyDraft(*nnx.split(draft), algorithm.drafter()), 12_000
    decoded = Decoding(target, ready, [PROMPT] * num, Settings(TOKENS, 2, (-1,), temperature=1.0)).finish()
    yields = np.bincount([gained for one in decoded for gained in one.yields], minlength=4)
    assert len(yields) == 4
    assert (yields[1:] > rarest * num).all()
    assert excess([one.tokens for one in decoded], exact(target, 1.0)) < 4


def packed_and_apart() -> list[Example]:
    """Two documents in one row, and in a row each, with a block behind every possible anchor: 5 and 3."""
    rng, length = np.random.default_rng(0), 9
    tokens, taps = rng.integers(0, V, (2, length)), rng.normal(size=(2, length, 3, 8)).astype(np.float32)
    assistant = np.arange(length)[None] >= np.array([[3], [5]])
    positions = np.tile(np.arange(length), (2, 1))
    apart = Batch(tokens, assistant, np.ones_like(tokens), positions)
    packed = Batch(*(x.reshape(1, -1) for x in (tokens, assistant, [[1], [2]] * np.ones_like(tokens), positions)))
    examples = []
    for batch in (packed, apart):
        shaped = taps.reshape(*batch.tokens_BT.shape, 3, 8)
        examples.append(Example(batch, Features(shaped, shaped[:, :, 0]), anchors.every(batch, 16)))
    return examples
