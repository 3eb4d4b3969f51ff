"""EAGLE-3 for tests: the algorithm with some settings, the target that a draft asks for its arrays."""

from types import SimpleNamespace

from flaxdraft.algorithms.eagle3.algorithm import Algorithm
from flaxdraft.algorithms.eagle3.settings import Settings


def algorithm(num_steps: int, packed: bool = True, **settings) -> Algorithm:
    return Algorithm(Settings(ttt_length=num_steps, **settings), packed)


def target_of(embedding_VE, head_VE=None):
    """What stands before and behind a target's layers, from given arrays."""
    return SimpleNamespace(embedding=lambda: embedding_VE, head=lambda: head_VE)
