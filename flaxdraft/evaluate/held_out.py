"""The held-out result of a draft: the walk, real decoding, and whether the two agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flaxdraft.decode.decoding import Decoded, Decoding, ReadyDraft, Settings
from flaxdraft.decode.greedy import Row
from flaxdraft.evaluate.results import acceptance, by_category, teacher_forced_figures
from flaxdraft.evaluate.walk import TeacherForced
from flaxdraft.interfaces import Target
from flaxdraft.progress import bar


def decode_held_out(
    target: Target,
    draft: ReadyDraft,
    rows: Sequence[Row],
    *,
    max_new_tokens: int,
    chain_length: int,
    end_token: int,
    num_rows: int,
) -> list[Decoded]:
    """Speculative decoding of the rows' prompts, `num_rows` at a time."""
    prompts = [row.tokens[: row.num_prompt].tolist() for row in rows]
    settings = Settings(max_new_tokens, chain_length, (end_token,))
    expected = sum(row.num_answer - 1 for row in rows)
    decoded, passes = [], 0
    with bar("decode", expected) as progress:

        def on_passes(num_passes, num_tokens):
            nonlocal passes
            passes += num_passes
            progress.advance(num_tokens, f"tokens in {passes} target passes")

        for at in range(0, len(prompts), num_rows):
            chunk = prompts[at : at + num_rows]
            decoded += Decoding(target, draft, chunk, settings).finish(on_passes)
    return decoded


def summary(
    rows: Sequence[Row],
    categories: Sequence[str],
    teacher_forced: TeacherForced,
    decoded: Sequence[Decoded],
    chain_length: int,
) -> dict[str, Any]:
    """Every figure of the evaluation, ready for JSON."""
    yields = [one.yields for one in decoded]
    identical = [one.tokens == row.tokens[row.num_prompt :].tolist() for one, row in zip(decoded, rows, strict=True)]
    return {
        "answers": len(rows),
        "generated_tokens": int(sum(row.num_answer for row in rows)),
        "chain_length": chain_length,
        "decoded": acceptance(yields, chain_length)
        | {
            "target_passes_alone": int(sum(row.num_answer - 1 for row in rows)),
            "identical_answers": int(sum(identical)),
            "accept_length_by_category": by_category(yields, categories),
        },
        "teacher_forced": teacher_forced_figures(teacher_forced, yields),
        "yields": yields,
    }
