"""The whole draft at its first step against the same layer put together from transformers' PyTorch blocks."""

import jax.numpy as jnp
import numpy as np
import pytest
from cases import HIDDEN, LAYOUTS, LLAMA, MLA, PARITY, B, T, every_rope, normal, randomize, with_rope
from closeness import assert_close
from eagle3 import target_of
from flax import nnx
from jitted import unroll

from flaxdraft.algorithms.eagle3.drafts import llama, mla
from flaxdraft.devices.sharding import Sharding
from flaxdraft.files.name_tables import state_to_torch
from flaxdraft.interfaces import Batch, VocabMap
from flaxdraft.nn.precision import Precision
from flaxdraft.ops.attention import causal_visibility
from flaxdraft.train.state import split_draft

pytestmark = pytest.mark.parity
CASES = {"llama": (llama, LLAMA), "mla": (mla, MLA)}


@pytest.mark.parametrize("name", CASES)
@every_rope
def test_first_step(oracle, name, rope):
    module, hf = CASES[name]
    hf = with_rope(hf, rope)
    # transformers hard-codes the latent norms' epsilon.
    config = module.Config.from_hf(hf | {"latent_norm_eps": 1e-6})
    vocab = VocabMap(np.arange(config.draft_vocab_size) * 2, config.vocab_size)
    embedding = jnp.asarray(normal(1, config.vocab_size, HIDDEN))
    draft = module.make(
        config, vocab, target_of(embedding), precision=Precision(), sharding=Sharding.none(), rngs=nnx.Rngs(0)
    )  # fmt: skip
    randomize(draft, seed=2)
    weights = state_to_torch(split_draft(draft)[1], module.name_table(config), np.float32)
    theirs = oracle.load(oracle.DraftLayer(name, hf), weights)

    segments, positions = LAYOUTS["packed"]
    tokens, taps = np.random.default_rng(3).integers(0, config.vocab_size, (B, T)), normal(4, B, T, 3, HIDDEN)
    batch = Batch(jnp.asarray(tokens), jnp.ones((B, T), bool), jnp.asarray(segments), jnp.asarray(positions))
    hidden = unroll(draft, batch, jnp.asarray(taps), jnp.tile(jnp.arange(T), (B, 1)), 1)[0]
    next_tokens = np.pad(tokens[:, 1:], ((0, 0), (0, 1)))
    want_hidden, want_logits = oracle.run(
        theirs, np.asarray(embedding)[next_tokens], taps, positions,
        oracle.additive_mask(causal_visibility(batch.segments_BT)).numpy(),
    )  # fmt: skip
    assert_close(hidden, want_hidden, rtol=PARITY)
    assert_close(draft.logits(hidden), want_logits, rtol=PARITY)
