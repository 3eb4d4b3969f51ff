"""From decoded batches to figures: plain dictionaries, ready for JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flaxdraft.data.prompts import Prompt
from flaxdraft.errors import InputError
from flaxdraft.evaluate.differences import Difference, differences
from flaxdraft.evaluate.measure import Guess, Measured, Session, Timing, texts_of
from flaxdraft.evaluate.walk import EVALUATION_ROWS, TeacherForced, accept_length, histogram
from flaxdraft.evaluate.walk_answers import walk_answers
from flaxdraft.ops.step_sums import TITLES


def acceptance(yields: Sequence[Sequence[int]], chain_length: int) -> dict[str, Any]:
    """What target passes gave."""
    counts = histogram(yields, chain_length)
    # An answer may end with a draft token, the only one of its last pass; that pass does not say.
    telling = [one[:-1] if one and one[-1] == 1 else one for one in yields]
    at_least = counts[::-1].cumsum()[::-1]
    return {
        "accept_length": accept_length(yields),
        "target_passes": int(sum(map(len, yields))),
        "target_passes_alone": int(sum(map(sum, yields))),
        "accepted_histogram": counts.tolist(),
        "acceptance_by_position": (at_least[1:] / max(at_least[0], 1)).tolist(),
        "first_token_accepted": {
            "first_pass": _first_token([one[:1] for one in telling]),
            "later_passes": _first_token([one[1:] for one in telling]),
        },
    }


def _first_token(yields: Sequence[Sequence[int]]) -> float:
    """Share of the passes whose first draft token was accepted. The first pass of an answer is drafted from the row
    before the answer, which training reaches only where the loss mask is that of the token to predict."""
    return float(np.mean([gained > 1 for one in yields for gained in one] or [False]))


def by_category(yields: Sequence[Sequence[int]], categories: Sequence[str]) -> dict[str, float]:
    """Accept length of each."""
    return {
        name: accept_length([y for y, category in zip(yields, categories, strict=True) if category == name])
        for name in sorted(set(categories))
    }


WALKED = ("target_passes", "answers_with_the_decoded_passes", "loss", "accept_length")


def own_figures(forced: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """What an algorithm's sums show beside the walk, numbers (float) or lists (list), by what a report calls them.

    Args:
        forced: see `teacher_forced_figures`.
    """
    return {
        TITLES.get(name, name.replace("_", " ")): value
        for name, value in forced.items()
        if name not in WALKED and isinstance(value, kind)
    }


def teacher_forced_figures(forced: TeacherForced, yields: Sequence[Sequence[int]]) -> dict[str, Any]:
    """The walk beside the passes that were decoded."""
    return {
        "target_passes": int(forced.total.passes),
        "answers_with_the_decoded_passes": sum(
            list(one) == list(two) for one, two in zip(forced.yields, yields, strict=True)
        ),
        **forced.figures(),
    }


def _speed(timing: Timing) -> dict[str, float]:
    return {
        "tokens_per_second": timing.decoded_tokens / timing.decode_seconds,
        "prefill_seconds": timing.prefill_seconds,
        "decode_seconds": timing.decode_seconds,
        "decoded_tokens": timing.decoded_tokens,
    }


def _total(runs: Sequence[Measured]) -> Timing:
    return sum((run.timing for run in runs), Timing())


def _identical(run: Measured, alone: Measured) -> int:
    pairs = zip(run.turns, alone.turns, strict=True)
    return sum(one.prompt == two.prompt and one.answer.tokens == two.answer.tokens for one, two in pairs)


def guess_result(
    runs: Sequence[Measured], alone: Sequence[Measured], category: Mapping[str, str], forced: TeacherForced | None,
    parted: Sequence[Difference] | None,
) -> dict[str, Any]:  # fmt: skip
    """Every figure of one chain or tree, its seeds taken together.

    Args:
        runs, alone: with the draft and without it, by seed.
        category: of each prompt's id.
        forced: the walk over the target's own greedy answers; None where answers were sampled, and for a tree.
        parted: where answers with the draft differ from the target's own, which they should be; None where answers were
            sampled.

    Raises:
        InputError: no answer has a second token, so no target pass was made.
    """
    guess, turns = runs[0].guess, [turn for run in runs for turn in run.turns]
    yields = [turn.answer.yields for turn in turns]
    if not any(turn.answer.yields for run in alone for turn in run.turns):
        raise InputError("prompts: every answer ends with its first token, so there is nothing to measure")
    speed, before = _speed(_total(runs)), _speed(_total(alone))
    result = {
        "name": str(guess),
        "chain_length": guess.depth,
        "tree": list(guess.tree),
        "draft_tokens": guess.num_tokens,
        "answers": len(turns),
        "generated_tokens": sum(len(turn.answer.tokens) for turn in turns),
        "decoded": acceptance(yields, guess.depth)
        | {"accept_length_by_category": by_category(yields, [category[turn.question] for turn in turns])},
        "with_draft": speed,
        "alone": before,
        "speedup": speed["tokens_per_second"] / before["tokens_per_second"],
    }
    if parted is not None:
        result["decoded"] |= {
            "identical_answers": _identical(runs[0], alone[0]), "differences": [one.to_json() for one in parted],
        }  # fmt: skip
    if forced is not None:
        # The walk goes over the answers of the target alone; a turn counts where decoding gave the same one.
        result["teacher_forced"] = teacher_forced_figures(forced, yields)
    return result


def guess_results(
    session: Session, prompts: Sequence[Prompt], guesses: Sequence[Guess], runs: Sequence[Measured]
) -> list[dict[str, Any]]:
    """Every figure of each guess.

    Args:
        runs: see `measure`.
    """
    alone, greedy = [run for run in runs if run.guess == Guess()], session.settings.temperature == 0
    category = {prompt.id: prompt.category for prompt in prompts}
    chains = [guess.chain_length for guess in guesses if not guess.tree]
    forced = {}
    if greedy and chains:
        num_rows = min(session.num_rows, EVALUATION_ROWS)
        forced = walk_answers(session.target, session.draft, texts_of(alone[0]), chains, num_rows)
    own = {guess: [run for run in runs if run.guess == guess] for guess in guesses}
    parted = {guess: differences(session, own[guess][0], alone[0]) if greedy else None for guess in guesses}
    return [
        guess_result(own[guess], alone, category, forced.get(guess.chain_length), parted[guess]) for guess in guesses
    ]


def sample_of(session: Session, run: Measured) -> dict[str, Any]:
    """The answer for which the draft saved most target passes: its prompt, its text token by token, and the tokens of
    each pass."""
    best = max(run.turns, key=lambda turn: len(turn.answer.tokens) - len(turn.answer.yields))
    pieces = [session.tokenizer.decode([token]) for token in best.answer.tokens]
    return {"id": best.question, "pieces": pieces, "yields": best.answer.yields}
