"""Mixture of experts (DeepSeek-V2, arXiv 2405.04434; DeepSeek-V3, arXiv 2412.19437): routing, grouped experts.

Every (token, expert) pair is sorted by its expert, one grouped product serves all experts of a device, and the results
go back to their tokens. Experts are split over the expert axis: a device computes the pairs of its own experts for the
tokens of its part of the batch, and one sum over devices puts a token's experts together.

Shape letters: B batch, T time, D width, X experts, F feed-forward of one expert, M = B T tokens, K experts of a token,
P = M K pairs of a token and an expert, G groups of experts, Y = X / G experts of a group.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from flaxdraft.devices.mesh import EXPERT_AXIS, TENSOR_AXIS
from flaxdraft.devices.per_device import on_shards
from flaxdraft.devices.sharding import Sharding, gathered, used
from flaxdraft.nn.layers import WHOLE, GatedMLP
from flaxdraft.nn.precision import Precision


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """Names as in config.json. `routing` is how scores become choices: see `route`."""

    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    routing: Literal["greedy", "group_limited_greedy", "noaux_tc", "softmax_of_chosen"]
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
    - softmax_of_chosen (gpt-oss): the highest logits, which have a bias; weights are the softmax over those alone.
    """
    wide = logits_BTX.astype(jnp.float32)
    if config.routing == "softmax_of_chosen":
        assert bias_X is not None, "its logits have a bias"
        chosen, experts = lax.top_k(wide + bias_X.astype(jnp.float32)[None, None], config.num_experts_per_tok)
        return jax.nn.softmax(chosen, axis=-1), experts
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


class SortedPairs(NamedTuple):
    """(token, expert) pairs in the order of their experts; those of experts that another device has come last."""

    expert_P: Int[Array, " P"]  # X and beyond: another device's
    sizes_X: Int[Array, " X"]  # how many pairs each expert has


Weights = dict[str, jax.Array]


class Feed(Protocol):
    """The feed-forward of all routed experts of a layer: an nnx.Module of weights that lead with the expert, each in
    its place."""

    def apply(
        self, weights: Weights, x_PD: Float[Array, "P D"], pairs: SortedPairs, adds_bias: bool | Bool[Array, ""]
    ) -> Float[Array, "P D"]:
        """
        Args:
            weights: these, by their names, as far as this device has them.
            adds_bias: whether what is added behind the last product is added here: on one of the devices that share
                a product.
        """
        ...


def through_experts(
    x_MD: Float[Array, "M D"], weights_MK: Float[Array, "M K"], experts_MK: Int[Array, "M K"], num_experts: int,
    apply: Callable[[jax.Array, SortedPairs], jax.Array],
) -> Float[Array, "M D"]:  # fmt: skip
    """sum_k weight_k expert_k(x) over a token's experts in 0..X-1; experts beyond count nothing."""
    per_token = experts_MK.shape[1]
    mine_MK = (experts_MK >= 0) & (experts_MK < num_experts)
    expert = jnp.where(mine_MK, experts_MK, num_experts).reshape(-1)
    order = jnp.argsort(expert, stable=True)  # foreign pairs last, in no group
    sizes = jnp.bincount(expert, length=num_experts + 1)[:num_experts].astype(jnp.int32)
    token = order // per_token
    out = apply(x_MD[token], SortedPairs(expert[order], sizes)).astype(jnp.float32)
    weight = weights_MK.reshape(-1)[order][:, None]
    out = jnp.where(mine_MK.reshape(-1)[order][:, None], out * weight, 0.0)
    return jnp.zeros(x_MD.shape, jnp.float32).at[token].add(out)


class Experts(nnx.Module):
    """down(silu(gate(x)) * up(x)) of each expert."""

    def __init__(self, config: MoEConfig, width: int, precision: Precision, rngs: nnx.Rngs):
        init, intermediate = nnx.initializers.normal(0.02), config.moe_intermediate_size
        make = lambda place, *shape: nnx.Param(  # noqa: E731
            init(rngs.params(), (config.num_experts, *shape), precision.param), place=place
        )
        self.gate_proj = make("weight_xdf", width, intermediate)
        self.up_proj = make("weight_xdf", width, intermediate)
        self.down_proj = make("weight_xfd", intermediate, width)

    def apply(self, weights: Weights, x_PD, pairs: SortedPairs, adds_bias):
        """See `Feed`."""
        product = lambda x, name: lax.ragged_dot(x, weights[name], pairs.sizes_X)  # noqa: E731
        return product(jax.nn.silu(product(x_PD, "gate_proj")) * product(x_PD, "up_proj"), "down_proj")


class Router(nnx.Module):
    """Scores in float32, whatever the model computes in."""

    def __init__(self, config: MoEConfig, width: int, precision: Precision, rngs: nnx.Rngs):
        init = nnx.initializers.normal(0.02)
        kernel = init(rngs.params(), (width, config.num_experts), precision.param)
        self.kernel = nnx.Param(kernel, place="whole")
        biased = config.routing in ("noaux_tc", "softmax_of_chosen")
        self.bias = nnx.Param(jnp.zeros((config.num_experts,)), place="whole") if biased else None

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T X"]:
        kernel = self.kernel[...].astype(jnp.float32)
        return jnp.einsum("btd,dx->btx", x_BTD.astype(jnp.float32), kernel, precision=lax.Precision.HIGHEST)


class MoE(nnx.Module):
    """Routed experts plus the shared ones that every token goes through."""

    def __init__(
        self, config: MoEConfig, width: int, precision: Precision, rngs: nnx.Rngs, sharding: Sharding = WHOLE,
        feed: Callable[..., Feed] = Experts,
    ):  # fmt: skip
        """
        Args:
            feed: makes the routed experts, as `Experts` is made.
        """
        self.config, self.precision, self.sharding = config, precision, sharding
        self.gate = Router(config, width, precision, rngs)
        self.experts = feed(config, width, precision, rngs)
        if config.n_shared_experts:
            shared = config.n_shared_experts * config.moe_intermediate_size
            self.shared_experts = GatedMLP(width, shared, precision, rngs, sharding)

    def routing(self, x_BTD: Float[Array, "B T D"]) -> tuple[Float[Array, "B T K"], Int[Array, "B T K"]]:
        bias = None if self.gate.bias is None else self.gate.bias[...]
        return route(self.config, self.gate(x_BTD), bias)

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        s = self.sharding
        split = s.cache_lbn is not None
        variables = {name: value for name, value in vars(self.experts).items() if isinstance(value, nnx.Param)}
        places = {name: getattr(s, variable.get_metadata()["place"]) for name, variable in variables.items()}
        weights = {
            name: gathered(variable[...], places[name]).astype(self.precision.compute)
            for name, variable in variables.items()
        }

        def local(x_BTD, weights_BTK, experts_BTK, weights):
            here = next(iter(weights.values())).shape[0]
            if split:
                experts_BTK = experts_BTK - lax.axis_index(EXPERT_AXIS) * here
            adds_bias = lax.axis_index(TENSOR_AXIS) == 0 if split else True
            apply = lambda x_PD, pairs: self.experts.apply(weights, x_PD, pairs, adds_bias)  # noqa: E731
            flat = lambda x: x.reshape(-1, x.shape[-1])  # noqa: E731
            out = through_experts(flat(x_BTD), flat(weights_BTK), flat(experts_BTK), here, apply)
            out = lax.psum(out, (EXPERT_AXIS, TENSOR_AXIS)) if split else out
            return out.reshape(x_BTD.shape).astype(x_BTD.dtype)

        in_specs = (s.act_btd, s.act_btd, s.act_btd, {name: used(place) for name, place in places.items()})
        out = on_shards(s, local, in_specs, s.act_btd)(x_BTD, *self.routing(x_BTD), weights)
        return out + self.shared_experts(x_BTD) if self.config.n_shared_experts else out
