"""The Llama family as a frozen target: taps of the residual stream, a KV cache, scanned layers.

Shape letters: B batch, T time, S cache slots, L layers, E width, V vocabulary, K key/value heads, H head width.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from flaxdraft.errors import InputError
from flaxdraft.interfaces import Batch, Features
from flaxdraft.nn.gqa import GQA, GQAConfig
from flaxdraft.nn.layers import GatedMLP, RMSNorm
from flaxdraft.nn.rope import RopeConfig
from flaxdraft.ops.attention import attend, attend_cache, causal_visibility
from flaxdraft.precision import Precision

ARCHITECTURES = ("LlamaForCausalLM",)
MODEL_TYPES = ("llama",)

NAME_TABLE = (
    ("embed", "model.embed_tokens.weight", "copy"),
    ("layers/input_layernorm/scale", "model.layers.{i}.input_layernorm.weight", "copy"),
    ("layers/self_attn/q_proj/kernel", "model.layers.{i}.self_attn.q_proj.weight", "transpose"),
    ("layers/self_attn/k_proj/kernel", "model.layers.{i}.self_attn.k_proj.weight", "transpose"),
    ("layers/self_attn/v_proj/kernel", "model.layers.{i}.self_attn.v_proj.weight", "transpose"),
    ("layers/self_attn/o_proj/kernel", "model.layers.{i}.self_attn.o_proj.weight", "transpose"),
    ("layers/post_attention_layernorm/scale", "model.layers.{i}.post_attention_layernorm.weight", "copy"),
    ("layers/mlp/gate_proj/kernel", "model.layers.{i}.mlp.gate_proj.weight", "transpose"),
    ("layers/mlp/up_proj/kernel", "model.layers.{i}.mlp.up_proj.weight", "transpose"),
    ("layers/mlp/down_proj/kernel", "model.layers.{i}.mlp.down_proj.weight", "transpose"),
    ("norm/scale", "model.norm.weight", "copy"),
)
UNTIED_HEAD = ("head", "lm_head.weight", "copy")


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of one model; field names are those of Hugging Face's config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    rope: RopeConfig
    tap_layers: tuple[int, int, int]  # outputs of these layers, residual stream

    @classmethod
    def from_hf(cls, config: dict[str, Any], tap_layers: tuple[int, int, int] | None = None) -> Config:
        """
        Raises:
            InputError: the taps are not three ascending layers of this model.
        """
        num_layers = config["num_hidden_layers"]
        taps = tap_layers or (1, num_layers // 2 - 1, num_layers - 4)
        if not 0 <= taps[0] < taps[1] < taps[2] < num_layers:
            raise InputError(
                f"target.tap_layers: {list(taps)} are not three ascending layers of a {num_layers}-layer target; "
                f"give three, for instance {[0, num_layers // 2, num_layers - 2]}"
            )
        if config.get("attention_bias") or config.get("mlp_bias"):
            raise InputError("target config: attention_bias and mlp_bias are not supported yet")
        heads = config["num_attention_heads"]
        return cls(
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_hidden_layers=num_layers,
            num_attention_heads=heads,
            num_key_value_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            rms_norm_eps=config["rms_norm_eps"],
            max_position_embeddings=config["max_position_embeddings"],
            tie_word_embeddings=config.get("tie_word_embeddings", False),
            rope=RopeConfig.from_hf(config),
            tap_layers=taps,
        )


class Layer(nnx.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, config: Config, precision: Precision, rngs: nnx.Rngs):
        c = config
        attention = GQAConfig(c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.rope)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps, precision)
        self.self_attn = GQA(attention, c.hidden_size, c.hidden_size, precision, rngs)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps, precision)
        self.mlp = GatedMLP(c.hidden_size, c.intermediate_size, precision, rngs)


class LlamaWeights(nnx.Module):
    """All weights; layers are stacked on axis 0."""

    def __init__(self, config: Config, precision: Precision, rngs: nnx.Rngs):
        make = lambda key: Layer(config, precision, nnx.Rngs(key))  # noqa: E731
        init = nnx.initializers.normal(0.02)
        shape = (config.vocab_size, config.hidden_size)
        self.embed = nnx.Param(init(rngs.params(), shape, precision.param))
        self.layers = nnx.vmap(make)(jax.random.split(rngs.params(), config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, precision)
        if not config.tie_word_embeddings:
            self.head = nnx.Param(init(rngs.params(), shape, precision.param))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Slot s of a row holds the keys and values of its position s; what lies beyond the row's end is never seen."""

    k_LBKHS: Float[Array, "L B K H S"]
    v_LBKSH: Float[Array, "L B K S H"]


def name_table(config: Config):
    """The rows for this model: a tied head has none of its own."""
    return NAME_TABLE if config.tie_word_embeddings else (*NAME_TABLE, UNTIED_HEAD)


def _run_layers(graphdef, layers, config: Config, x_BTE, positions_BT, visible, cache: Cache | None):
    """The residual stream through all layers; stops at each tap without keeping the other layers' outputs."""
    batch_rows_B1 = jnp.arange(x_BTE.shape[0])[:, None]

    def body(i, carry):
        x, cache = carry
        layer = nnx.merge(graphdef, jax.tree.map(lambda w: lax.dynamic_index_in_dim(w, i, keepdims=False), layers))
        normed = layer.input_layernorm(x)
        q = layer.self_attn.query(normed, positions_BT)
        k, v = layer.self_attn.key_value(normed, positions_BT)
        if cache is not None:
            # Out-of-range positions mark padding: their writes are dropped.
            cache = Cache(
                cache.k_LBKHS.at[i, batch_rows_B1, :, :, positions_BT].set(k, mode="drop"),
                cache.v_LBKSH.at[i, batch_rows_B1, :, positions_BT].set(v, mode="drop"),
            )
            heads = attend_cache(q, cache.k_LBKHS[i], cache.v_LBKSH[i], visible, layer.self_attn.softmax_scale)
        else:
            heads = attend(q, k, v, visible, layer.self_attn.softmax_scale)
        x = x + layer.self_attn.output(heads)
        return x + layer.mlp(layer.post_attention_layernorm(x)), cache

    taps, start, carry = [], 0, (x_BTE, cache)
    for tap in config.tap_layers:
        carry = lax.fori_loop(start, tap + 1, body, carry)
        taps.append(carry[0])
        start = tap + 1
    x_BTE, cache = lax.fori_loop(start, config.num_hidden_layers, body, carry)
    return jnp.stack(taps, axis=2), x_BTE, cache


@partial(jax.jit, static_argnames=("graphdef", "config", "head"), donate_argnames=("cache",))
def _forward(graphdef, state, config: Config, tokens_BT, positions_BT, segments_BT, cache: Cache | None, head: str):
    model = nnx.merge(graphdef, state)
    layer_graph, layer_state = nnx.split(model.layers)
    if cache is None:
        visible = causal_visibility(segments_BT)
    else:
        visible = jnp.arange(cache.k_LBKHS.shape[-1])[None, None, :] <= positions_BT[:, :, None]
    embeds = model.embed[...][tokens_BT]
    taps, x, cache = _run_layers(layer_graph, layer_state, config, embeds, positions_BT, visible, cache)
    last = model.norm(x)
    head_VE = model.embed[...] if config.tie_word_embeddings else model.head[...]
    if head == "all":
        logits = jnp.einsum("bte,ve->btv", last, head_VE, preferred_element_type=jnp.float32)
        return cache, Features(taps, last, jnp.argmax(logits, -1).astype(jnp.int32), jax.nn.logsumexp(logits, -1))
    end_B = jnp.sum(positions_BT < cache.k_LBKHS.shape[-1], axis=1) - 1
    rows_B = jnp.arange(tokens_BT.shape[0])
    logits = jnp.einsum("be,ve->bv", last[rows_B, end_B], head_VE, preferred_element_type=jnp.float32)
    argmax = jnp.zeros(tokens_BT.shape, jnp.int32).at[rows_B, end_B].set(jnp.argmax(logits, -1).astype(jnp.int32))
    logsumexp = jnp.zeros(tokens_BT.shape, jnp.float32).at[rows_B, end_B].set(jax.nn.logsumexp(logits, -1))
    return cache, Features(taps, last, argmax, logsumexp)


@dataclasses.dataclass(frozen=True)
class LlamaTarget:
    """A loaded model; see the Protocol `Target`."""

    config: Config
    graphdef: nnx.GraphDef
    state: nnx.State
    precision: Precision

    def features(self, batch: Batch) -> Features:
        """One forward over packed or padded rows, no cache."""
        arrays = batch.tokens_BT, batch.positions_BT, batch.segments_BT
        return _forward(self.graphdef, self.state, self.config, *arrays, cache=None, head="all")[1]

    def new_cache(self, num_rows: int, num_slots: int) -> Cache:
        """An empty cache of `num_slots` positions a row."""
        c = self.config
        lead = (c.num_hidden_layers, num_rows, c.num_key_value_heads)
        zeros = lambda *tail: jnp.zeros((*lead, *tail), self.precision.compute)  # noqa: E731
        return Cache(zeros(c.head_dim, num_slots), zeros(num_slots, c.head_dim))

    def fork_cache(self, cache: Cache, num_rows: int) -> Cache:
        """The cache of one row, copied to many rows that begin alike."""
        return jax.tree.map(lambda x: jnp.repeat(x, num_rows, axis=1), cache)

    def extend(
        self, cache: Cache, tokens_BT: Int[Array, "B T"], positions_BT: Int[Array, "B T"], head: str = "all"
    ) -> tuple[Cache, Features]:
        """New tokens at given positions (>= the number of slots marks padding). The cache is donated.

        head: "all" gives argmax and logsumexp of every position; "end" of each row's last real position alone, and
            zeros before it (prefill: the head is the dearest part and nobody asks what follows a prompt's middle).
        """
        return _forward(self.graphdef, self.state, self.config, tokens_BT, positions_BT, None, cache, head)

    def embedding(self) -> Float[Array, "V E"]:
        return self.state["embed"][...]

    def head(self) -> Float[Array, "V E"]:
        return self.state["embed" if self.config.tie_word_embeddings else "head"][...]

    def final_norm(self) -> Float[Array, " E"]:
        return self.state["norm"]["scale"][...]


def abstract_state(config: Config, precision: Precision) -> tuple[nnx.GraphDef, nnx.State]:
    """Structure and shapes without allocating a weight."""
    return nnx.split(nnx.eval_shape(lambda: LlamaWeights(config, precision, nnx.Rngs(0))))


def build(config: Config, state: nnx.State, precision: Precision) -> LlamaTarget:
    """A target around loaded weights."""
    return LlamaTarget(config, abstract_state(config, precision)[0], state, precision)
