"""The held-out result of a draft: the walk, real decoding, and whether the two agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from flax import nnx

from flaxdraft.data.generation import Row
from flaxdraft.evaluate.acceptance import TeacherForced, accept_length, histogram
from flaxdraft.evaluate.decoding import Decoded, Settings, decode
from flaxdraft.interfaces import Target
from flaxdraft.progress import bar


def decode_held_out(
    target: Target,
    graphdef: nnx.GraphDef,
    state: nnx.State,
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
            decoded += decode(target, (graphdef, state), chunk, settings, on_passes=on_passes)
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
    counts = histogram(yields, chain_length)
    at_least = counts[::-1].cumsum()[::-1]
    identical = [one.tokens == row.tokens[row.num_prompt :].tolist() for one, row in zip(decoded, rows, strict=True)]
    by_category = {
        name: accept_length([y for y, category in zip(yields, categories, strict=True) if category == name])
        for name in sorted(set(categories))
    }
    return {
        "answers": len(rows),
        "generated_tokens": int(sum(row.num_answer for row in rows)),
        "chain_length": chain_length,
        "decoded": {
            "accept_length": accept_length(yields),
            "target_passes": int(sum(map(len, yields))),
            "target_passes_alone": int(sum(row.num_answer - 1 for row in rows)),
            "identical_answers": int(sum(identical)),
            "accepted_histogram": counts.tolist(),
            "acceptance_by_position": (at_least[1:] / max(at_least[0], 1)).tolist(),
            "accept_length_by_category": by_category,
        },
        "teacher_forced": {
            "accept_length": teacher_forced.accept_length,
            "target_passes": int(teacher_forced.total.passes),
            "answers_with_the_decoded_passes": int(
                sum(one == two for one, two in zip(teacher_forced.yields, yields, strict=True))
            ),
            "mean_over_rows": teacher_forced.mean_over_rows(),
            "product_of_marginals": teacher_forced.product_of_marginals(),
            "loss": teacher_forced.mean_loss,
            "accuracy": np.asarray(teacher_forced.accuracy()).tolist(),
            "expected_accept": np.asarray(teacher_forced.expected_accept()).tolist(),
        },
        "yields": yields,
    }
