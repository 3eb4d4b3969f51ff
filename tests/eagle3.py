"""EAGLE-3 for tests: the algorithm with some settings."""

from flaxdraft.algorithms.eagle3.algorithm import Algorithm
from flaxdraft.algorithms.eagle3.settings import Settings


def algorithm(num_steps: int, packed: bool = True, **settings) -> Algorithm:
    return Algorithm(Settings(ttt_length=num_steps, **settings), packed)
