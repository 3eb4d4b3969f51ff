"""Drafts of named sizes with synthetic features, for benchmarks; and the floating-point operations of one step.

Shape letters: B batch, T time, E target width, V target vocabulary, W draft vocabulary.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flaxdraft.algorithms.eagle3.algorithm import Algorithm
from flaxdraft.algorithms.eagle3.drafts import llama, mla
from flaxdraft.algorithms.eagle3.objective import ChosenRows, supervised_rows
from flaxdraft.algorithms.eagle3.settings import Settings
from flaxdraft.devices.sharding import Sharding
from flaxdraft.interfaces import Batch, Example, Features, VocabMap
from flaxdraft.nn.layers import WHOLE
from flaxdraft.nn.precision import Precision
from flaxdraft.nn.rope import RopeConfig
from flaxdraft.ops.padding import round_up

_ROPE = RopeConfig(rope_theta=1e6, max_position_embeddings=32768)
_COMMON = {"rms_norm_eps": 1e-5, "rope": _ROPE}


def _llama(width, ffn, heads, kv_heads, head_dim, vocab, draft_vocab):
    return llama.Config(
        hidden_size=width, target_hidden_size=width, intermediate_size=ffn, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=head_dim, vocab_size=vocab, draft_vocab_size=draft_vocab, **_COMMON,
    )  # fmt: skip


def _mla(width, ffn, heads, q_rank, kv_rank, nope, rotary, value, vocab, draft_vocab):
    return mla.Config(
        hidden_size=width, target_hidden_size=width, intermediate_size=ffn, num_attention_heads=heads,
        q_lora_rank=q_rank, kv_lora_rank=kv_rank, qk_nope_head_dim=nope, qk_rope_head_dim=rotary, v_head_dim=value,
        latent_norm_eps=1e-5, vocab_size=vocab, draft_vocab_size=draft_vocab, **_COMMON,
    )  # fmt: skip


CASES = {
    "tiny": (llama, _llama(256, 512, 4, 2, 64, 8192, 2048)),
    "tiny-mla": (mla, _mla(256, 512, 4, 96, 64, 32, 32, 32, 8192, 2048)),
    "llama3-8b": (llama, _llama(4096, 14336, 32, 8, 128, 128256, 32000)),
    "qwen3-8b-mla": (mla, _mla(4096, 12288, 32, 1536, 512, 128, 64, 128, 151936, 32000)),
    "deepseek-v3-mla": (mla, _mla(7168, 18432, 128, 1536, 512, 128, 64, 128, 129280, 32000)),
}


def make_algorithm(num_steps: int, packed: bool, **settings: Any) -> Algorithm:
    """EAGLE-3 with an unroll of so many steps."""
    return Algorithm(Settings(ttt_length=num_steps, **settings), packed)


def make_draft(case: str, compute: Any, float8: bool = False, sharding: Sharding = WHOLE) -> nnx.Module:
    """A random draft of that size; the target's frozen embedding is in the precision of the products."""
    module, config = CASES[case]
    vocab = VocabMap(np.arange(config.draft_vocab_size) * (config.vocab_size // config.draft_vocab_size),
                     config.vocab_size)  # fmt: skip
    key = jax.random.key(1)
    embedding = jax.random.normal(key, (config.vocab_size, config.hidden_size), compute)
    target = SimpleNamespace(embedding=lambda: embedding)
    return module.make(
        config, vocab, target, precision=Precision(compute=compute, float8=float8), sharding=sharding,
        rngs=nnx.Rngs(0),
    )  # fmt: skip


def make_example(
    case: str, batch: int, length: int, supervised: float, compute: Any, seed: int = 0, documents: int = 1
) -> Example:
    """Random features; the last `supervised` share of every row is the assistant's, a row holds that many documents of
    equal length."""
    _, config = CASES[case]
    keys = jax.random.split(jax.random.key(seed), 4)
    shape, width = (batch, length), config.target_hidden_size
    tokens = jax.random.randint(keys[0], shape, 0, config.vocab_size)
    assistant = np.tile(np.arange(length) >= round(length * (1 - supervised)), (batch, 1))
    document, place = np.divmod(np.arange(length), -(-length // documents))
    segments, positions = (np.tile(x, (batch, 1)).astype(np.int32) for x in (document + 1, place))
    kept = supervised_rows(assistant, segments)
    rows = np.full((batch, min(round_up(kept.shape[1], 32), length)), length, np.int32)  # as the pipeline has them
    rows[:, : kept.shape[1]] = kept
    taps = jax.random.normal(keys[1], (*shape, 3, width), compute)
    last = jax.random.normal(keys[2], (*shape, width), compute)
    head_WE = 0.05 * jax.random.normal(keys[3], (config.draft_vocab_size, width), compute)
    spread = config.vocab_size // config.draft_vocab_size
    features = Features(taps, last, tokens // spread * spread, jnp.full(shape, 12.0))
    return Example(
        Batch(tokens, jnp.asarray(assistant), jnp.asarray(segments), jnp.asarray(positions)), features,
        ChosenRows(jnp.asarray(rows)), head_WE,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Flops:
    """Operations of one optimizer step by part; a multiply and an add count as two. The optimizer's own, norms and
    rotations are left out, and so is whatever is computed twice to save memory."""

    fc: float
    attention_projections: float
    attention: float
    feed_forward: float
    head: float
    teacher: float

    @property
    def total(self) -> float:
        return sum(dataclasses.astuple(self))


def count_flops(case: str, example: Example, num_steps: int) -> Flops:
    """Forward and backward: a product counts three times, the fc twice (nobody needs the gradient of the taps), the
    teacher once."""
    module, c = CASES[case]
    batch, length = example.batch.tokens_BT.shape
    rows = np.asarray(example.chosen.rows_BR)
    num_rows = int((rows < length).sum())
    # Step-0 keys that one step's queries see, all rows together.
    seen = float((np.asarray(example.batch.positions_BT) + 1)[np.nonzero(rows < length)[0], rows[rows < length]].sum())
    width, heads = c.hidden_size, c.num_attention_heads
    # Of the first projections, one half of the input (the token's) is projected once, the other at every step.
    if module is llama:
        query, query_up = width * heads * c.head_dim, 0
        key_value, key_value_up = width * c.num_key_value_heads * 2 * c.head_dim, 0
        out, per_key = heads * c.head_dim * width, heads * 2 * c.head_dim
    else:
        qk = c.qk_nope_head_dim + c.qk_rope_head_dim
        query, query_up = width * c.q_lora_rank, c.q_lora_rank * heads * qk
        key_value = width * (c.kv_lora_rank + c.qk_rope_head_dim)
        key_value_up = c.kv_lora_rank * heads * (c.qk_nope_head_dim + c.v_head_dim)
        out, per_key = heads * c.v_head_dim * width, heads * (qk + c.v_head_dim)
    at_rows, keys_at = num_rows * num_steps, batch * length + num_rows * (num_steps - 1)
    projections = batch * (length + num_steps) * (query + key_value)
    projections += at_rows * (query + query_up + out) + keys_at * (key_value + key_value_up)
    return Flops(
        fc=2 * 2 * batch * length * 3 * c.target_hidden_size * width,
        attention_projections=3 * 2 * projections,
        attention=3 * 2 * num_steps * seen * per_key,
        feed_forward=3 * 2 * at_rows * 3 * width * c.intermediate_size,
        head=3 * 2 * at_rows * width * c.draft_vocab_size,
        teacher=2 * num_rows * c.target_hidden_size * c.draft_vocab_size,
    )
