"""Documents: what is trained on, with random access, wherever it lies.

A `FeatureStore` is a set of documents on disk, `AnsweredPrompts` are in memory, `Conversations` have no features: there
the target reads every batch while the draft trains.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from flaxdraft.data.templates import Rendered, rows_digest
from flaxdraft.interfaces import Features


@dataclasses.dataclass(frozen=True)
class Document:
    """One document, unpadded, on the host."""

    tokens: np.ndarray  # int32 [L]
    assistant: np.ndarray  # bool [L], true where the assistant produced the token
    features: Features | None  # leading axis L; None where the target has yet to read it


class Documents(Protocol):
    """Random access to documents. Every host sees all of them, so that counts are the same everywhere."""

    @property
    def digest(self) -> str:
        """Of their tokens and masks."""
        ...

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each."""
        ...

    @property
    def supervised(self) -> np.ndarray:
        """Tokens of each that the assistant produced."""
        ...

    @property
    def token_counts(self) -> np.ndarray:
        """int64 [V], how often the assistant produced each token."""
        ...

    def row(self, index: int) -> Document: ...


@dataclasses.dataclass(frozen=True)
class Answer:
    """A prompt that the target answered, with its features, unpadded. Arrays are on the host.

    The features of the last token are zero: nothing comes after it, so the target never reads it.
    """

    tokens: np.ndarray  # int32 [L]
    num_prompt: int  # tokens before the answer
    features: Features  # leading axis L

    @property
    def num_answer(self) -> int:
        return len(self.tokens) - self.num_prompt


def as_document(row: Answer) -> Document:
    """An answered prompt."""
    return Document(row.tokens, np.arange(len(row.tokens)) >= row.num_prompt, row.features)


class _InMemory:
    """Documents in a list, measured."""

    def __init__(self, documents: Sequence[Document], vocab_size: int):
        self._documents = documents
        self.lengths = np.array([len(document.tokens) for document in documents])
        self.supervised = np.array([int(document.assistant.sum()) for document in documents])
        self.token_counts, self.digest = np.zeros(vocab_size, np.int64), rows_digest(documents)
        for document in documents:
            self.token_counts += np.bincount(document.tokens[document.assistant], minlength=vocab_size)

    def row(self, index: int) -> Document:
        return self._documents[index]


class AnsweredPrompts(_InMemory):
    """Prompts that the target answered, with the features that fell out of it."""

    def __init__(self, rows: Sequence[Answer], vocab_size: int):
        super().__init__([as_document(row) for row in rows], vocab_size)


class Conversations(_InMemory):
    """Rendered conversations without features."""

    def __init__(self, rows: Sequence[Rendered], vocab_size: int):
        super().__init__([Document(row.tokens, row.assistant, None) for row in rows], vocab_size)
