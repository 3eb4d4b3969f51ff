"""P-EAGLE for tests: the algorithm with some settings, drafts from PyTorch weights."""

import jax.numpy as jnp
import numpy as np
from dflash import target_of as target_of
from flax import nnx

from flaxdraft.algorithms.peagle.algorithm import Algorithm
from flaxdraft.algorithms.peagle.drafts import llama
from flaxdraft.algorithms.peagle.settings import Settings
from flaxdraft.devices.sharding import Sharding
from flaxdraft.files.name_tables import state_from_torch
from flaxdraft.interfaces import VocabMap
from flaxdraft.nn.precision import Precision


def algorithm(packed: bool = True, **settings) -> Algorithm:
    return Algorithm(Settings(**settings), packed)


def make_draft(config, vocab: VocabMap, target=None, weights=None):
    """With fresh weights, or with those of PyTorch names."""
    target = target or target_of(np.zeros((config.vocab_size, config.hidden_size)), jnp.zeros(()))
    draft = llama.make(
        config, vocab, target, precision=Precision(), sharding=Sharding.none(), rngs=nnx.Rngs(0)
    )  # fmt: skip
    if weights is not None:
        params = nnx.state(draft, nnx.Param)
        nnx.update(draft, state_from_torch(params, llama.name_table(config), weights, "weights"))
    return draft
