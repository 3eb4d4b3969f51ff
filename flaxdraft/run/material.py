"""What a draft is trained on and beside: documents, its vocabulary, and the target's embedding and head."""

from __future__ import annotations

import dataclasses

import numpy as np

from flaxdraft.data.documents import AnsweredPrompts, Documents
from flaxdraft.data.draft_vocabulary import choose_vocab, coverage, describe_sizes, read_map, source_of
from flaxdraft.data.store import FeatureStore
from flaxdraft.data.templates import tokenizer_digest
from flaxdraft.interfaces import EmbeddingAndHead, VocabMap
from flaxdraft.progress import CONSOLE
from flaxdraft.run.answers import Answers
from flaxdraft.run.setup import Setup
from flaxdraft.run.target import RunTarget
from flaxdraft.targets.embedding_and_head import EmbeddingAndHeadWeights


@dataclasses.dataclass(frozen=True)
class Material:
    """Of one run, in memory."""

    target: RunTarget
    answers: Answers
    documents: Documents  # that are trained on
    vocab: VocabMap
    embedding_and_head: EmbeddingAndHead  # of the target, on the host


def gather(setup: Setup, target: RunTarget, answers: Answers) -> Material:
    """
    Raises:
        InputError: the store is of another target or tokenizer; conversations cannot be read or rendered; the draft
            vocabulary cannot be chosen or read.
    """
    documents = _documents(target, answers)
    vocab = _vocabulary(setup, target, answers, documents)
    return Material(target, answers, documents, vocab, _outer(setup, target, documents))


def _documents(target: RunTarget, answers: Answers) -> Documents:
    if target.given is not None:
        return target.given
    return AnsweredPrompts(answers.rows("train"), target.config.vocab_size)


def _vocabulary(setup: Setup, target: RunTarget, answers: Answers, documents: Documents) -> VocabMap:
    """That of draft.init_from or draft.vocab_map, or chosen from the training answers; all of the target's where the
    algorithm wants that."""
    counts, wanted = documents.token_counts, setup.config.draft
    if setup.start is not None:
        vocab = setup.start.vocab
    elif setup.algorithm.full_vocabulary:
        vocab = VocabMap(np.arange(len(counts)), len(counts))
    elif wanted.vocab_map is not None:
        vocab = read_map(wanted.vocab_map, len(counts), wanted.draft_vocab_size)
    else:
        source = source_of(tokenizer_digest(target.tokenizer), documents.digest)
        vocab = choose_vocab(counts, answers.special, wanted.draft_vocab_size, source)
    CONSOLE.print(
        f"  {len(documents.lengths)} answers, {counts.sum()} tokens, {np.count_nonzero(counts)} distinct; the draft "
        f"vocabulary of {vocab.draft_vocab_size} holds {coverage(counts, vocab):.1%} of them"
    )
    if not setup.algorithm.full_vocabulary:
        CONSOLE.print(f"  {describe_sizes(counts, answers.special)}")
    return vocab


def _outer(setup: Setup, target: RunTarget, documents: Documents) -> EmbeddingAndHead:
    """Training holds no layer of the target that it does not ask."""
    if setup.config.data.store is not None:
        assert isinstance(documents, FeatureStore), "data.store is trained on where it is given"
        return EmbeddingAndHeadWeights(target.config, documents.target())
    return EmbeddingAndHeadWeights.of_target(target.opened, target.config)
