"""Suffix attention: the attention of the test-time-training unroll (EAGLE-3, arXiv 2503.01840).

At step j a row attends to a range of step-0 keys (causal, one document) and, of its own row only, to the keys of steps
1..j:   softmax over [q.k_0 visible | q.k_1 | ... | q.k_j], the last j terms diagonal.

Shape letters: B batch, R query rows, T key rows of step 0, N query heads, K key/value heads (G = N / K share one),
H query/key width, C value width, I suffix steps.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from flaxdraft.devices.per_device import added_up, per_device
from flaxdraft.devices.sharding import axes_of, gradient_spec, spec_of
from flaxdraft.errors import InputError
from flaxdraft.ops import cudnn_attention, range_attention
from flaxdraft.ops.attention import MASKED, KeyRange, grouped_scores
from flaxdraft.ops.cudnn_attention import Shaped
from flaxdraft.ops.range_attention import Chunks, Joint
from flaxdraft.ops.remat import ATTENTION_OUTPUT

Backend = Literal["auto", "dense", "chunked", "cudnn"]
# Scores of one step up to which building them whole is as fast (experiments/bench_step.py --attention dense chunked).
DENSE_SCORES = 2**22


class Suffix(NamedTuple):
    """A row's own keys and values of the steps 1..j."""

    k: tuple[Float[Array, "B R K H"], ...] = ()
    v: tuple[Float[Array, "B R K C"], ...] = ()

    def longer(self, k_BRKH: Float[Array, "B R K H"], v_BRKC: Float[Array, "B R K C"]) -> Suffix:
        """With those of one step more."""
        return Suffix((*self.k, k_BRKH), (*self.v, v_BRKC))


class Way(NamedTuple):
    """How the attention is computed; none of it changes the result beyond rounding.

    backend: "dense" builds the [R, T] scores; "chunked" and "cudnn" never do: memory is linear in length.
    packed: False promises that every row holds one document, from its beginning, which saves cuDNN's kernels the
        columns that tell documents apart; see ops/cudnn_attention.py.
    """

    backend: Backend = "auto"
    chunks: Chunks = Chunks()
    packed: bool = True


def choose(backend: Backend, q_BRNH: Shaped, k0_BTKH: Shaped, v0_BTKC: Shaped) -> Backend:
    """What `backend` means for these arrays (their shapes and types suffice) on this machine.

    "auto" takes whole scores where they are few, else cuDNN where it can run, else chunks. A JAX whose private names
    have moved warns and works in chunks.

    Raises:
        InputError: cuDNN was asked for and cannot run.
    """
    if backend in ("dense", "chunked"):
        return backend
    num_scores = q_BRNH.shape[0] * q_BRNH.shape[1] * q_BRNH.shape[2] * k0_BTKH.shape[1]
    if backend == "auto" and num_scores <= DENSE_SCORES:
        return "dense"
    why = cudnn_attention.unavailable(q_BRNH, v0_BTKC)
    if why is None:
        return "cudnn"
    if why == cudnn_attention.moved():
        warnings.warn(f"attention in chunks instead of cuDNN, which is several times faster: {why}", stacklevel=2)
    elif backend == "cudnn":
        raise InputError(f"algorithm.attention: cudnn cannot run here: {why}; use auto, or chunked")
    return "chunked"


def suffix_attention(
    q_BRNH: Float[Array, "B R N H"],
    k0_BTKH: Float[Array, "B T K H"],
    v0_BTKC: Float[Array, "B T K C"],
    suffix: Suffix,
    seen: KeyRange,
    scale: float,
    way: Way = Way(),  # noqa: B008 (immutable)
) -> Float[Array, "B R N C"]:
    """One step of the unroll.

    Args:
        seen: the step-0 rows that each query sees. No two queries of a batch row have the same last.

    Raises:
        InputError: see `choose`.
    """
    arrays = q_BRNH, k0_BTKH, v0_BTKC
    backend = choose(way.backend, *arrays)
    if backend == "dense":
        return per_device(partial(dense, scale=scale), spec_of(q_BRNH), *arrays, suffix, seen)
    kernel = Cudnn(way.packed) if backend == "cudnn" else way.chunks
    return merged(*arrays, suffix, seen, scale, kernel)


def dense(
    q_BRNH: Float[Array, "B R N H"],
    k0_BTKH: Float[Array, "B T K H"],
    v0_BTKC: Float[Array, "B T K C"],
    suffix: Suffix,
    seen: KeyRange,
    scale: float,
) -> Float[Array, "B R N C"]:
    """The reference: builds the [R, T + I] scores. Softmax and sums are at least float32."""
    num_keys = k0_BTKH.shape[1]
    at_T = jnp.arange(num_keys)[None, None]
    visible_BRT = (seen.first_BR[:, :, None] <= at_T) & (at_T <= seen.last_BR[:, :, None])
    scores = jnp.where(visible_BRT[:, None, None], grouped_scores(q_BRNH, k0_BTKH, scale), MASKED)
    q_BRKGH = q_BRNH.reshape(*q_BRNH.shape[:2], k0_BTKH.shape[2], -1, q_BRNH.shape[-1])
    own = [jnp.einsum("brkgh,brkh->bkgr", q_BRKGH, k, preferred_element_type=scores.dtype) * scale for k in suffix.k]
    weights = jax.nn.softmax(jnp.concatenate([scores, *(s[..., None] for s in own)], axis=-1), axis=-1)
    weights = weights.astype(v0_BTKC.dtype)
    out = jnp.einsum("bkgrt,btkc->brkgc", weights[..., :num_keys], v0_BTKC)
    for i, v in enumerate(suffix.v):
        out = out + jnp.einsum("bkgr,brkc->brkgc", weights[..., num_keys + i], v)
    return out.reshape(*q_BRNH.shape[:3], v0_BTKC.shape[-1])


class Cudnn(NamedTuple):
    """cuDNN's kernels as a choice of block attention."""

    packed: bool


Kernel = Chunks | Cudnn


def _block_attention(kernel: Kernel) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Forward and backward of the attention to the step-0 keys; see ops/range_attention.py."""
    if isinstance(kernel, Cudnn):
        packed = kernel.packed
        return partial(cudnn_attention.forward, packed=packed), partial(cudnn_attention.backward, packed=packed)
    return partial(range_attention.forward, chunks=kernel), partial(range_attention.backward, chunks=kernel)


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def merged(q_BRNH, k0_BTKH, v0_BTKC, suffix: Suffix, seen: KeyRange, scale: float, kernel: Kernel):
    """Block attention to the step-0 keys, merged in log space with the diagonal terms:
    L = logaddexp(L_0, s_1..s_j), O = exp(L_0 - L) O_0 + sum_i exp(s_i - L) v_i. Arguments as in `suffix_attention`."""
    return _merged(q_BRNH, k0_BTKH, v0_BTKC, suffix, seen, scale, kernel)[0]


def _merged(q, k0, v0, suffix, seen, scale, kernel):
    attend, _ = _block_attention(kernel)

    def local(q, k0, v0, suffix, seen):
        out, logsumexp = attend(q, k0, v0, seen, scale)
        own = [_own_scores(q, k, scale) for k in suffix.k]
        joint = jax.nn.logsumexp(jnp.stack([logsumexp, *own]), axis=0)
        out = out * jnp.exp(logsumexp - joint)[..., None]
        for s, v in zip(own, suffix.v, strict=True):
            out = out + jnp.exp(s - joint)[..., None] * _per_query_head(v, q.shape[2]).astype(out.dtype)
        return out.astype(v0.dtype), joint

    out_specs = spec_of(q), jax.P(*spec_of(q).partitions[:3])
    return per_device(local, out_specs, q, k0, v0, suffix, seen)


def _forward(q, k0, v0, suffix, seen, scale, kernel):
    out, logsumexp = _merged(q, k0, v0, suffix, seen, scale, kernel)
    out, logsumexp = checkpoint_name(out, ATTENTION_OUTPUT), checkpoint_name(logsumexp, ATTENTION_OUTPUT)
    return out, (q, k0, v0, suffix, seen, Joint(out, logsumexp))


def _backward(scale, kernel, residuals, grad):
    """The block kernel's backward with the merged O and L gives dq, dk_0, dv_0 of the joint softmax. Of the diagonal
    terms, with p_i = exp(s_i - L):  ds_i = p_i (dO.v_i - dO.O), dq += c ds_i k_i, dk_i = c ds_i q, dv_i = p_i dO."""

    _, attend_backward = _block_attention(kernel)
    keys_spec, rows_axes = spec_of(residuals[1]), axes_of(spec_of(residuals[0]).partitions)

    def local(q, k0, v0, suffix, seen, joint, grad):
        wide = joint.logsumexp_BRN.dtype
        delta = jnp.sum(grad.astype(wide) * joint.out_BRNC.astype(wide), axis=-1)
        dq, dk0, dv0 = attend_backward(q, k0, v0, seen, joint, grad, scale)
        num_heads, dks, dvs = q.shape[2], [], []
        for k, v in zip(*suffix, strict=True):
            weight = jnp.exp(_own_scores(q, k, scale) - joint.logsumexp_BRN)
            toward = jnp.sum(grad.astype(wide) * _per_query_head(v, num_heads).astype(wide), axis=-1)
            dscore = (weight * (toward - delta) * scale)[..., None]
            dq = dq + dscore * _per_query_head(k, num_heads).astype(wide)
            dks.append(_sum_group(dscore * q.astype(wide), k.shape[2]).astype(k.dtype))
            dvs.append(_sum_group(weight[..., None] * grad.astype(wide), v.shape[2]).astype(v.dtype))
        dk0, dv0 = (added_up(x.astype(k0.dtype), keys_spec, rows_axes) for x in (dk0, dv0))
        return dq.astype(q.dtype), dk0, dv0, Suffix(tuple(dks), tuple(dvs))

    out_specs = jax.tree.map(gradient_spec, residuals[:4])
    return *per_device(local, out_specs, *residuals, grad), None


merged.defvjp(_forward, _backward)


def _own_scores(q_BRNH, k_BRKH, scale: float):
    """[B, R, N]: each row's query with its own key of one step."""
    wide = jnp.promote_types(q_BRNH.dtype, jnp.float32)
    q_BRKGH = q_BRNH.reshape(*q_BRNH.shape[:2], k_BRKH.shape[2], -1, q_BRNH.shape[-1])
    scores = jnp.einsum("brkgh,brkh->brkg", q_BRKGH, k_BRKH, preferred_element_type=wide) * scale
    return scores.reshape(q_BRNH.shape[:3])


def _per_query_head(x_BRKH, num_heads: int):
    return jnp.repeat(x_BRKH, num_heads // x_BRKH.shape[2], axis=2)


def _sum_group(x_BRNH, kv_heads: int):
    return x_BRNH.reshape(*x_BRNH.shape[:2], kv_heads, -1, x_BRNH.shape[-1]).sum(axis=3)
