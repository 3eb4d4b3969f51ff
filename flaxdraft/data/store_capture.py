"""The target reads conversations and its features go into a store. Rows of a shard run by length, which pads them
little."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from flaxdraft.data.documents import Document
from flaxdraft.data.store_writer import StorePlan, fill
from flaxdraft.data.templates import Rendered
from flaxdraft.data.whole_texts import batch_of
from flaxdraft.devices import host_reads
from flaxdraft.errors import InputError
from flaxdraft.interfaces import Target
from flaxdraft.ops.padding import round_up


def capture(
    directory: Path,
    plan: StorePlan,
    rows: Sequence[Rendered],
    target: Target,
    *,
    batch_tokens: int,
    part: tuple[int, int],
) -> bool:
    """Makes a store of what the target says about the rows; see `store_writer.fill`.

    Args:
        batch_tokens: padded tokens of one forward pass.

    Raises:
        InputError: see `store_writer.start`; a feature is not finite.
    """

    def read(span: range, advance: Callable[[int], None]) -> list[Document]:
        stored = {}
        for members in _batches([(i, len(rows[i].tokens)) for i in span], batch_tokens):
            stored |= _read(target, rows, members)
            advance(len(members))
        return [stored[i] for i in span]

    def weights() -> dict[str, np.ndarray]:
        tensors = {"embedding": target.embedding(), "final_norm": target.final_norm()}
        tensors |= {} if plan.tied else {"head": target.head()}
        return host_reads.read(tensors)

    return fill(directory, plan, read, weights, part)


def _padded(length: int) -> int:
    """Few distinct lengths, so that few programs are compiled: eighths of the next power of two."""
    step = max(1 << max(length.bit_length() - 3, 0), 32)
    return round_up(length, step)


def _batches(sizes: list[tuple[int, int]], batch_tokens: int) -> list[list[int]]:
    """Rows by padded length; each batch holds rows of one padded length, at most batch_tokens of them together."""
    by_length: dict[int, list[int]] = {}
    for row, length in sizes:
        by_length.setdefault(_padded(length), []).append(row)
    batches = []
    for length, members in sorted(by_length.items()):
        count = max(batch_tokens // length, 1)
        batches += [members[at : at + count] for at in range(0, len(members), count)]
    return batches


def _read(target: Target, rows: Sequence[Rendered], members: list[int]) -> dict[int, Document]:
    """One forward pass; the batch is filled up to a power of two rows, or to as many as the devices share."""
    length = max(_padded(len(rows[i].tokens)) for i in members)
    num_rows = round_up(1 << (len(members) - 1).bit_length(), target.row_multiple)
    batch = batch_of([rows[i].tokens for i in members], num_rows, length)
    features = host_reads.read(target.features(batch))
    out = {}
    for at, i in enumerate(members):
        inside = (at, slice(len(rows[i].tokens)))
        cut = jax.tree.map(lambda x, inside=inside: x[inside], features)
        if not (np.isfinite(cut.taps_BTKE).all() and np.isfinite(cut.last_BTE).all()):
            raise InputError(
                f"row {i}: the target's features are not finite; its weights or its dtype do not hold them"
            )
        out[i] = Document(rows[i].tokens, rows[i].assistant, cut)
    return out
