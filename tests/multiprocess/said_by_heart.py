"""A Domino draft whose head says one token wherever it may, so that how often it is right differs from answer to answer
and from slot to slot."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from flaxdraft.algorithms.domino.algorithm import Algorithm
from flaxdraft.algorithms.domino.drafts import qwen3
from flaxdraft.algorithms.domino.settings import Settings
from flaxdraft.devices.sharding import Sharding
from flaxdraft.interfaces import VocabMap
from flaxdraft.nn.precision import Precision

BLOCK = 4


def make_algorithm() -> Algorithm:
    """As it is evaluated."""
    return Algorithm(Settings(block_size=BLOCK)).drafting(BLOCK - 1)


def make_draft(target, token: int, sharding=Sharding.none()):  # noqa: B008 (immutable)
    """Next to a target whose embeddings begin with 1. Without its head it says token 0 always."""
    num_tokens = target.config.vocab_size
    sizes = qwen3.Config.for_target(target.config, num_tokens) | {"block_size": BLOCK, "num_hidden_layers": 1}
    vocab = VocabMap(np.arange(num_tokens), num_tokens)
    draft = qwen3.make(
        qwen3.Config(**sizes), vocab, target, precision=Precision(), sharding=sharding, rngs=nnx.Rngs(0)
    )  # fmt: skip
    draft.norm.scale[...] = jnp.zeros_like(draft.norm.scale[...])
    head, of_token = draft.correction, draft.correction.prefix_gru.input_proj.kernel
    of_token[...] = jnp.zeros_like(of_token[...]).at[0].set(1.0)
    state = head.prefix_gru.state_proj.kernel
    state[...] = jnp.zeros_like(state[...])
    head.projection.kernel[...] = jnp.ones_like(head.projection.kernel[...])
    head.lm_head[...] = jnp.zeros_like(head.lm_head[...]).at[token].set(1.0)
    return draft
