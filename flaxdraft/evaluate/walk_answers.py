"""The walk over answers that the target gave itself: their features come from one forward without a cache."""

from __future__ import annotations

from collections.abc import Sequence

import jax

from flaxdraft.data.documents import Answer
from flaxdraft.data.whole_texts import batch_of
from flaxdraft.devices import host_reads
from flaxdraft.evaluate.loading import PairedDraft
from flaxdraft.evaluate.walk import TeacherForced, combine, evaluate_teacher_forced, make_accepted
from flaxdraft.interfaces import Target
from flaxdraft.ops.padding import round_up
from flaxdraft.progress import bar
from flaxdraft.targets.decoder import DecoderTarget
from flaxdraft.targets.embedding_and_head import EmbeddingAndHeadWeights

MULTIPLE = 128  # of padded lengths, each of which compiles once


def featured(target: Target, texts: Sequence[tuple[list[int], int]], num_rows: int, length: int) -> list[Answer]:
    """Texts (tokens, and how many are the prompt's) with the target's features. All processes of its mesh must call it.

    Args:
        num_rows, length: of the compiled batch.
    """
    batch = batch_of([text for text, _ in texts], num_rows, length)
    features = host_reads.read(target.features(batch))
    return [
        Answer(batch.tokens_BT[i, : len(text)], num_prompt, jax.tree.map(lambda x: x[i, : len(text)], features))  # noqa: B023
        for i, (text, num_prompt) in enumerate(texts)
    ]


def walk_answers(
    target: DecoderTarget,
    draft: PairedDraft,
    texts: Sequence[tuple[list[int], int]],
    chains: Sequence[int],
    num_rows: int,
) -> dict[int, TeacherForced]:
    """What teacher forcing says of each chain length. Every process walks all answers by itself.

    Args:
        texts: prompts with the target's own greedy answers; for others the walk is no decoding.
    """
    teacher = draft.algorithm.teacher(
        EmbeddingAndHeadWeights.of_loaded(target), draft.vocab, target.head().dtype
    )  # fmt: skip
    num_rows = round_up(num_rows, target.row_multiple)
    algorithms = {chain: draft.algorithm.drafting(chain) for chain in chains}
    calls = {
        chain: make_accepted(draft.graphdef, algorithm, draft.frozen, teacher)(draft.params)
        for chain, algorithm in algorithms.items()
    }
    found: dict[int, list[TeacherForced]] = {chain: [] for chain in chains}
    with bar("walk", len(texts)) as progress:
        for at in range(0, len(texts), num_rows):
            chunk = texts[at : at + num_rows]
            rows = featured(target, chunk, num_rows, round_up(max(len(text) for text, _ in chunk), MULTIPLE))
            for chain, algorithm in algorithms.items():
                found[chain].append(evaluate_teacher_forced(calls[chain], rows, algorithm, num_rows, MULTIPLE))
            progress.advance(len(chunk), "answers")
    return {
        chain: TeacherForced(combine(one.total for one in parts), [walk for one in parts for walk in one.yields])
        for chain, parts in found.items()
    }
