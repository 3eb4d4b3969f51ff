"""DFlash for tests: the algorithm with some settings, drafts from PyTorch weights."""

import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flaxdraft.algorithms.dflash.algorithm import Algorithm
from flaxdraft.algorithms.dflash.settings import Settings
from flaxdraft.devices.sharding import Sharding
from flaxdraft.files.name_tables import state_from_torch
from flaxdraft.interfaces import Batch, Example, Features, VocabMap
from flaxdraft.nn.precision import Precision


def algorithm(packed: bool = True, **settings) -> Algorithm:
    return Algorithm(Settings(**settings), packed)


def example_of(config, num_rows: int = 2, length: int = 12) -> Example:
    """Rows of one document, whose features are random; without anchors."""
    rng, shape = np.random.default_rng(0), (num_rows, length)
    positions = np.tile(np.arange(length, dtype=np.int32), (num_rows, 1))
    tokens = rng.integers(0, config.vocab_size, shape).astype(np.int32)
    taps = rng.normal(size=(*shape, config.num_taps, config.target_hidden_size)).astype(np.float32)
    batch = Batch(tokens, positions > 2, np.ones_like(tokens), positions)
    return jax.tree.map(jnp.asarray, Example(batch, Features(taps), None, ()))


def target_of(embedding_VE, head_VE):
    """What stands before and behind a target's layers, from given arrays."""
    return SimpleNamespace(
        embedding=lambda: jnp.asarray(embedding_VE), head=lambda: jnp.asarray(head_VE),
        final_norm=lambda: jnp.ones(embedding_VE.shape[1]),
    )  # fmt: skip


def vocab_of(config) -> VocabMap:
    """The last tokens, or all of them."""
    return VocabMap(np.arange(config.vocab_size - config.draft_vocab_size, config.vocab_size), config.vocab_size)


def make_draft(config, target, weights=None):
    """With fresh weights, or with those of PyTorch names."""
    module = sys.modules[type(config).__module__]
    draft = module.make(
        config, vocab_of(config), target, precision=Precision(), sharding=Sharding.none(), rngs=nnx.Rngs(0)
    )  # fmt: skip
    if weights is not None:
        params = nnx.state(draft, nnx.Param)
        nnx.update(draft, state_from_torch(params, module.name_table(config), weights, "weights"))
    return draft
