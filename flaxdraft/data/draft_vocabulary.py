"""The draft vocabulary: the W most frequent target tokens, special ones always among them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from flaxdraft.errors import InputError
from flaxdraft.interfaces import VocabMap


def choose_vocab(
    counts_V: np.ndarray, forced_ids: Sequence[int], draft_vocab_size: int, source: str = ""
) -> VocabMap:  # fmt: skip
    """The map of the `draft_vocab_size` most frequent tokens.

    Ties, and places left once every counted token is in, go to the lowest ids: byte-pair merges are learnt by
    frequency, so a low id is the better guess.

    Args:
        counts_V: how often the assistant produced each token, in all of the data.
        forced_ids: are in whatever their counts are: special tokens, and those that end an answer.
        source: what the counts are of, see `source_of`.

    Raises:
        InputError: see `check_size`.
    """
    vocab_size = len(counts_V)
    check_size(draft_vocab_size, forced_ids, vocab_size)
    return VocabMap(np.sort(_ranked(counts_V, forced_ids)[:draft_vocab_size]), vocab_size, source)


def check_size(draft_vocab_size: int, forced_ids: Sequence[int], vocab_size: int) -> None:
    """
    Raises:
        InputError: the size is larger than the vocabulary or smaller than the number of forced tokens.
    """
    if not len(forced_ids) <= draft_vocab_size <= vocab_size:
        raise InputError(
            f"draft.draft_vocab_size: found {draft_vocab_size}, expected {len(forced_ids)} (special tokens) to "
            f"{vocab_size} (the target's vocabulary)"
        )


def read_map(path: str, vocab_size: int, draft_vocab_size: int) -> VocabMap:
    """The map in a file of offsets, as speculators writes it (d2t.npy).

    Raises:
        InputError: the file cannot be read or holds no offsets, or the map is of another size.
    """
    try:
        offsets = np.load(Path(path).expanduser(), allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        # numpy's own words for a file that is none of its own advise to unpickle it.
        why = getattr(error, "strerror", None) or "not a whole .npy file"
        raise InputError(f"draft.vocab_map: cannot read {path} ({why}); expected a .npy file of offsets") from error
    if not isinstance(offsets, np.ndarray) or offsets.ndim != 1 or not np.issubdtype(offsets.dtype, np.integer):
        raise InputError(f"draft.vocab_map: {path} holds no vector of integers")
    if len(offsets) != draft_vocab_size:
        raise InputError(
            f"draft.vocab_map: {path} holds {len(offsets)} tokens, draft.draft_vocab_size says {draft_vocab_size}; "
            "make them agree"
        )
    try:
        return VocabMap.from_offsets(offsets, vocab_size)
    except InputError as error:
        raise InputError(f"draft.vocab_map: {path} holds no offsets of this target ({error})") from error


def _ranked(counts_V: np.ndarray, forced_ids: Sequence[int]) -> np.ndarray:
    """All ids, the best first."""
    rank = counts_V.astype(np.int64).copy()
    rank[list(forced_ids)] = np.iinfo(np.int64).max
    return np.argsort(-rank, kind="stable")


def source_of(tokenizer: str, data: str) -> str:
    """Digest of the two: the tokenizer's own (`chat.tokenizer_digest`) and the documents'."""
    return hashlib.sha256(f"{tokenizer} {data}".encode()).hexdigest()


def coverage(counts_V: np.ndarray, vocab: VocabMap) -> float:
    """Share of the counted tokens that the draft vocabulary holds."""
    return float(counts_V[vocab.target_ids_W].sum() / max(counts_V.sum(), 1))


def coverage_by_size(counts_V: np.ndarray, forced_ids: Sequence[int]) -> dict[int, float]:
    """The coverage of other sizes: powers of two from 256 on, until nothing is left out."""
    held = np.cumsum(counts_V[_ranked(counts_V, forced_ids)]) / max(counts_V.sum(), 1)
    needed = int(np.argmax(held == held[-1])) + 1
    last = max(2 * needed - 1, 256)
    sizes = [2**k for k in range(8, 31) if len(forced_ids) <= 2**k <= min(last, len(counts_V))]
    return {size: float(held[size - 1]) for size in sizes}


def describe_sizes(counts_V: np.ndarray, forced_ids: Sequence[int]) -> str:
    """One line, for choosing draft.draft_vocab_size."""
    sizes = coverage_by_size(counts_V, forced_ids)
    return "coverage by draft_vocab_size: " + ", ".join(f"{size} {share:.1%}" for size, share in sizes.items())
