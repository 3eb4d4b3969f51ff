"""Mixture of experts (DeepSeek-V2, arXiv 2405.04434; DeepSeek-V3, arXiv 2412.19437): routing, grouped experts.

Every (token, expert) pair is sorted by its expert, one grouped product serves all experts of a device, and the results
go back to their tokens. Experts are split over the expert axis: a device computes the pairs of its own experts for the
tokens of its part of the batch, and one sum over devices puts a token's experts together.

Shape letters: B batch, T time, D width, X experts, F feed-forward of one expert, M = B T tokens, K experts of a token,
G groups of experts, Y = X / G experts of a group.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import P, lax
from jaxtyping import Array, Float, Int

from flaxdraft.devices.mesh import EXPERT_AXIS, TENSOR_AXIS
from flaxdraft.devices.per_device import on_shards
from flaxdraft.devices.sharding import Sharding, gathered
from flaxdraft.nn.layers import WHOLE, GatedMLP
from flaxdraft.nn.precision import Precision


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """Names as in config.json. `routing` is how scores become choices: see `route`."""

    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    routing: Literal["greedy", "group_limited_greedy", "noaux_tc"]
    norm_topk_prob: bool  # whether a token's weights are made to sum to 1
    n_shared_experts: int = 0
    n_group: int = 1
    topk_group: int = 1
    routed_scaling_factor: float = 1.0


def route(
    config: MoEConfig, logits_BTX: Float[Array, "B T X"], bias_X: Float[Array, " X"] | None
) -> tuple[Float[Array, "B T K"], Int[Array, "B T K"]]:
    """Weights and experts of every token.

    - greedy (DeepSeek-V2, Qwen3), group_limited_greedy (V2): softmax scores; the latter keeps the `topk_group` groups
      whose best expert scores highest.
    - noaux_tc (V3): sigmoid scores; a bias is added for choosing only, and a group counts by its two best experts.
    """
    wide = logits_BTX.astype(jnp.float32)
    if config.routing == "noaux_tc":
        scores = jax.nn.sigmoid(wide)
        assert bias_X is not None, "noaux_tc chooses with a bias"
        choice = scores + bias_X.astype(jnp.float32)[None, None]
        choice = jnp.where(_in_best_groups(config, choice, best=2), choice, -jnp.inf)
    else:
        scores = jax.nn.softmax(wide, axis=-1)
        if config.routing == "group_limited_greedy":
            scores = jnp.where(_in_best_groups(config, scores, best=1), scores, 0.0)
        choice = scores
    _, experts = lax.top_k(choice, config.num_experts_per_tok)
    weights = jnp.take_along_axis(scores, experts, axis=-1)
    if config.norm_topk_prob:
        weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-20)
    return weights * config.routed_scaling_factor, experts


def _in_best_groups(config: MoEConfig, choice_BTX, best: int):
    """Whether each expert is in one of the groups that score highest by the sum of their `best` best experts."""
    choice_BTGY = choice_BTX.reshape(*choice_BTX.shape[:-1], config.n_group, -1)
    score_BTG = lax.top_k(choice_BTGY, best)[0].sum(axis=-1)
    _, kept = lax.top_k(score_BTG, config.topk_group)
    chosen_BTG = jax.nn.one_hot(kept, config.n_group, dtype=jnp.int32).sum(axis=-2) > 0
    return jnp.repeat(chosen_BTG, choice_BTGY.shape[-1], axis=-1)


def grouped_experts(
    x_MD: Float[Array, "M D"],
    weights_MK: Float[Array, "M K"],
    experts_MK: Int[Array, "M K"],
    gate_XDF: Float[Array, "X D F"],
    up_XDF: Float[Array, "X D F"],
    down_XFD: Float[Array, "X F D"],
) -> Float[Array, "M D"]:
    """sum_k weight_k down(silu(gate(x)) * up(x)) over a token's experts in 0..X-1; experts beyond count nothing."""
    num_experts, per_token = gate_XDF.shape[0], experts_MK.shape[1]
    mine_MK = (experts_MK >= 0) & (experts_MK < num_experts)
    expert = jnp.where(mine_MK, experts_MK, num_experts).reshape(-1)
    order = jnp.argsort(expert, stable=True)  # foreign pairs last, in no group
    sizes = jnp.bincount(expert, length=num_experts + 1)[:num_experts].astype(jnp.int32)
    token = order // per_token
    x = x_MD[token]
    inner = jax.nn.silu(lax.ragged_dot(x, gate_XDF, sizes)) * lax.ragged_dot(x, up_XDF, sizes)
    out = lax.ragged_dot(inner, down_XFD, sizes).astype(jnp.float32)
    weight = weights_MK.reshape(-1)[order][:, None]
    out = jnp.where(mine_MK.reshape(-1)[order][:, None], out * weight, 0.0)
    return jnp.zeros(x_MD.shape, jnp.float32).at[token].add(out)


class Experts(nnx.Module):
    """The weights of all routed experts."""

    def __init__(self, num_experts: int, width: int, intermediate: int, precision: Precision, rngs: nnx.Rngs):
        init = nnx.initializers.normal(0.02)
        make = lambda place, *shape: nnx.Param(  # noqa: E731
            init(rngs.params(), (num_experts, *shape), precision.param), place=place
        )
        self.gate_proj = make("weight_xdf", width, intermediate)
        self.up_proj = make("weight_xdf", width, intermediate)
        self.down_proj = make("weight_xfd", intermediate, width)


class Router(nnx.Module):
    """Scores in float32, whatever the model computes in."""

    def __init__(self, config: MoEConfig, width: int, precision: Precision, rngs: nnx.Rngs):
        init = nnx.initializers.normal(0.02)
        kernel = init(rngs.params(), (width, config.num_experts), precision.param)
        self.kernel = nnx.Param(kernel, place="whole")
        biased = config.routing == "noaux_tc"
        self.bias = nnx.Param(jnp.zeros((config.num_experts,)), place="whole") if biased else None

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T X"]:
        kernel = self.kernel[...].astype(jnp.float32)
        return jnp.einsum("btd,dx->btx", x_BTD.astype(jnp.float32), kernel, precision=lax.Precision.HIGHEST)


class MoE(nnx.Module):
    """Routed experts plus the shared ones that every token goes through."""

    def __init__(
        self, config: MoEConfig, width: int, precision: Precision, rngs: nnx.Rngs, sharding: Sharding = WHOLE
    ):  # fmt: skip
        self.config, self.precision, self.sharding = config, precision, sharding
        self.gate = Router(config, width, precision, rngs)
        self.experts = Experts(config.num_experts, width, config.moe_intermediate_size, precision, rngs)
        if config.n_shared_experts:
            shared = config.n_shared_experts * config.moe_intermediate_size
            self.shared_experts = GatedMLP(width, shared, precision, rngs, sharding)

    def routing(self, x_BTD: Float[Array, "B T D"]) -> tuple[Float[Array, "B T K"], Int[Array, "B T K"]]:
        bias = None if self.gate.bias is None else self.gate.bias[...]
        return route(self.config, self.gate(x_BTD), bias)

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        s, compute = self.sharding, self.precision.compute
        split = s.cache_lbn is not None

        def local(x_BTD, weights_BTK, experts_BTK, gate_XDF, up_XDF, down_XFD):
            if split:
                experts_BTK = experts_BTK - lax.axis_index(EXPERT_AXIS) * gate_XDF.shape[0]
            flat = lambda x: x.reshape(-1, x.shape[-1])  # noqa: E731
            out = grouped_experts(flat(x_BTD), flat(weights_BTK), flat(experts_BTK), gate_XDF, up_XDF, down_XFD)
            out = lax.psum(out, (EXPERT_AXIS, TENSOR_AXIS)) if split else out
            return out.reshape(x_BTD.shape).astype(x_BTD.dtype)

        column, row = P(EXPERT_AXIS, None, TENSOR_AXIS), P(EXPERT_AXIS, TENSOR_AXIS, None)
        in_specs = (s.act_btd, s.act_btd, s.act_btd, column, column, row)
        e = self.experts
        weights = [(e.gate_proj, s.weight_xdf), (e.up_proj, s.weight_xdf), (e.down_proj, s.weight_xfd)]
        weights = [gathered(weight[...], spec).astype(compute) for weight, spec in weights]
        out = on_shards(s, local, in_specs, s.act_btd)(x_BTD, *self.routing(x_BTD), *weights)
        return out + self.shared_experts(x_BTD) if self.config.n_shared_experts else out
