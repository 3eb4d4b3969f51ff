"""EAGLE-3 (arXiv 2503.01840): the test-time-training unroll, its supervision and its sums.

At row p and step j (0-based) the draft reads token x_{p+1+j} and, at step 0, the projected taps of row p, later its
own output of step j-1 at row p; it sits at position p + j, sees the step-0 keys of rows 0..p and its own keys of
steps 1..j, and predicts x_{p+2+j}, whose teacher is the target's distribution at p+1+j. This is what engines do.

Shape letters: B batch, T time, R computed rows, J steps, D draft width, E target width, W draft vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from flaxdraft.algorithms.eagle3.suffix_attention import ATTENTION_OUTPUT, Backend, choose, suffix_attention
from flaxdraft.devices.mesh import spec_of, split_like, whole_in_time
from flaxdraft.errors import InputError
from flaxdraft.interfaces import Batch, Draft, Example, LossSums
from flaxdraft.ops import distillation
from flaxdraft.ops.attention import document_ranges
from flaxdraft.ops.range_attention import DEFAULT_CHUNK, Chunks
from flaxdraft.ops.rows import take_rows

Remat = Literal["none", "projections", "full"]
REMAT = {
    "projections": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(ATTENTION_OUTPUT),
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}


def supervision(assistant_BT, segments_BT, num_steps: int):
    """Bool [J, B, T]: step j of row p is supervised iff x_{p+1}..x_{p+2+j} are all the assistant's, all in row p's
    document, and inside the row. Works on numpy and JAX arrays alike, so that hosts can plan with it."""
    xp = np if isinstance(assistant_BT, np.ndarray) else jnp
    num = assistant_BT.shape[1]

    def ahead(x, k):
        return xp.pad(x[:, k:], ((0, 0), (0, min(k, num))))

    def usable(k):
        return ahead(assistant_BT.astype(bool), k) & (ahead(segments_BT, k) == segments_BT) & (segments_BT > 0)

    mask, steps = usable(1), []
    for j in range(num_steps):
        mask = mask & usable(j + 2)
        steps.append(mask)
    return xp.stack(steps)


def supervised_rows(assistant_BT: np.ndarray, segments_BT: np.ndarray) -> np.ndarray:
    """int32 [B, R]: the rows that step 0 supervises (later steps supervise a subset), padded with T."""
    mask_BT = supervision(np.asarray(assistant_BT), np.asarray(segments_BT), 1)[0]
    num = mask_BT.shape[1]
    width = max(int(mask_BT.sum(axis=1).max(initial=0)), 1)
    rows_BT = np.sort(np.where(mask_BT, np.arange(num), num), axis=1)
    return rows_BT[:, :width].astype(np.int32)


def visible_range(
    segments_BT: Int[Array, "B T"], rows_BR: Int[Array, "B R"]
) -> tuple[Int[Array, "B R"], Int[Array, "B R"]]:
    """First and last step-0 row that each row sees: its document's start and itself. Padding sees nothing."""
    first_BT, _ = document_ranges(segments_BT)
    return take_rows(first_BT, rows_BR), jnp.where(take_rows(segments_BT, rows_BR) > 0, rows_BR, -1)


def unroll(
    draft: Draft,
    batch: Batch,
    taps_BT3E: Float[Array, "B T 3 E"],
    rows_BR: Int[Array, "B R"],
    num_steps: int,
    attention: Backend = "auto",
    remat: Remat = "none",
    attention_chunk: int = DEFAULT_CHUNK,
    packed: bool = True,
    taps_BR3E: Float[Array, "B R 3 E"] | None = None,
) -> list[Float[Array, "B R D"]]:
    """The draft layer's output of each step at the given rows, before the final norm.

    Step-0 keys are made for every row of the batch; all else is computed for `rows_BR` alone. Where devices share a
    batch row, each makes the step-0 keys of its taps and then reads all of them; tokens and positions it holds whole.

    Args:
        taps_BR3E: of `rows_BR`; None where `taps_BT3E` are whole along time, and rows take theirs from there.
        remat: what the backward pass computes anew: what the draft's layer leaves to it, all but the outputs of
            projections and attention, or the whole step.
        packed: whether a row may hold several documents; see `suffix_attention`.
    """
    # Past the end the reader finds token 0, like an engine's empty slot; no supervised row ever sees it.
    tokens_BT, num_rows = jnp.pad(batch.tokens_BT, ((0, 0), (0, num_steps))), batch.tokens_BT.shape[1]
    hidden_BTD = draft.project(taps_BT3E)
    if taps_BR3E is None:
        every = draft.token_projections(draft.embed(tokens_BT))
        after = jax.tree.map(lambda x: x[:, 1 : num_rows + 1], every)
        read = lambda j: jax.tree.map(lambda x: take_rows(x, rows_BR + 1 + j), every)  # noqa: E731
    else:  # no device projects the tokens of another's rows
        of_tokens = lambda tokens: draft.token_projections(draft.embed(tokens))  # noqa: E731
        after = of_tokens(split_like(taps_BT3E, tokens_BT[:, 1 : num_rows + 1]))
        read = lambda j: of_tokens(take_rows(tokens_BT, rows_BR + 1 + j))  # noqa: E731
    positions_BT = split_like(taps_BT3E, batch.positions_BT)
    k0, v0 = map(whole_in_time, draft.key_value(draft.projections(after, hidden_BTD), positions_BT))
    first_BR, last_BR = visible_range(batch.segments_BT, rows_BR)
    positions_BR = take_rows(batch.positions_BT, rows_BR)

    def step(hidden, tokens, suffix_k, suffix_v, j):
        """One pass of the layer; from step 1 on it brings a key of its own."""
        projections, positions = draft.projections(tokens, hidden), positions_BR + j
        if j > 0:
            k, v = draft.key_value(projections, positions)
            suffix_k, suffix_v = (*suffix_k, k), (*suffix_v, v)
        heads = suffix_attention(
            draft.query(projections, positions), k0, v0, suffix_k, suffix_v, first_BR, last_BR, draft.softmax_scale,
            backend=attention, chunks=Chunks(attention_chunk, attention_chunk), packed=packed,
        )  # fmt: skip
        return draft.finish(hidden, heads), suffix_k, suffix_v

    if remat != "none":
        step = jax.checkpoint(step, policy=REMAT[remat], static_argnums=4)
    hidden = take_rows(hidden_BTD, rows_BR) if taps_BR3E is None else draft.project(taps_BR3E)
    suffix_k, suffix_v, outputs = (), (), []
    for j in range(num_steps):
        hidden, suffix_k, suffix_v = step(hidden, read(j), suffix_k, suffix_v, j)
        outputs.append(hidden)
    return outputs


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """EAGLE-3 with `num_steps` unroll steps, step j weighted step_decay^j."""

    num_steps: int = 7
    step_decay: float = 0.8
    objective: str = "soft_cross_entropy"  # a name of ops/objectives.py
    attention: Backend = "auto"
    remat: Remat = "none"
    loss_chunk: int = distillation.DEFAULT_CHUNK  # rows whose logits exist at a time
    attention_chunk: int = DEFAULT_CHUNK  # queries and keys whose scores exist at a time, where attention is chunked
    packed: bool = True  # whether a row may hold several documents; False is a little faster with cuDNN

    def __post_init__(self):
        if self.num_steps < 1:
            raise InputError(f"algorithm.ttt_length: found {self.num_steps}, expected at least 1")

    def rows(self, assistant_BT: np.ndarray, segments_BT: np.ndarray) -> np.ndarray:
        """The rows that must be computed for this batch; see `Example.rows_BR`."""
        assert self.packed or np.max(segments_BT, initial=0) <= 1, "several documents in a row, without `packed`"
        return supervised_rows(assistant_BT, segments_BT)

    def step_weights(self) -> tuple[float, ...]:
        return tuple(self.step_decay**j for j in range(self.num_steps))

    def loss_terms(self, sums: LossSums) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """The loss as numerator and denominator; see `LossSums.terms`."""
        return sums.terms(jnp.asarray(self.step_weights()))

    def mean_loss(self, sums: LossSums) -> Float[Array, ""]:
        numerator, denominator = self.loss_terms(sums)
        return numerator / denominator

    def _distill(self, draft: Draft, example: Example) -> tuple[LossSums, Bool[Array, "B R J"]]:
        batch, rows = example.batch, example.rows_BR
        compute = example.teacher_head_WE.dtype
        taps, split = example.features.taps_BT3E.astype(compute), example.split
        outputs = unroll(
            draft, batch, taps, rows, self.num_steps, self.attention, self.remat, self.attention_chunk, self.packed,
            None if split is None else split.taps_BR3E.astype(compute),
        )  # fmt: skip
        # The teacher of row p at step 0 is the target's distribution at p + 1.
        ahead = lambda x: None if x is None else take_rows(x, rows + 1)  # noqa: E731
        last_BRE = ahead(example.features.last_BTE) if split is None else split.last_BRE
        argmax_BR, logsumexp_BR = ahead(example.features.argmax_BT), ahead(example.features.logsumexp_BT)
        draft_ids_V, head = draft.draft_ids[...], distillation.TeacherHead(example.teacher_head_WE)
        if argmax_BR is None or logsumexp_BR is None:
            if example.full_head_VE is None:
                raise InputError(
                    "features: they hold no argmax and logsumexp over the full vocabulary, and the target's whole head "
                    "is not given either (Example.full_head_VE); capture them again, or give the head"
                )
            head = distillation.TeacherHead(example.teacher_head_WE, example.full_head_VE, draft_ids_V)
            argmax_BR = logsumexp_BR = None
        else:
            argmax_BR = draft_ids_V.at[argmax_BR].get(out_sharding=draft.sharding.act_b and spec_of(argmax_BR))
        teacher = distillation.TeacherStates(last_BRE.astype(compute), logsumexp_BR, argmax_BR)
        supervised_JBT = supervision(batch.assistant_BT, batch.segments_BT, self.num_steps)
        supervised_JBR = jnp.stack([take_rows(mask_BT, rows) for mask_BT in supervised_JBT])
        if split is not None:
            supervised_JBR = supervised_JBR & split.owned_BR[None]
        before_J = jnp.zeros(self.num_steps) if example.accepted_J is None else example.accepted_J
        return distillation.distill(
            distillation.Plan(self.step_weights(), self.objective, self.loss_chunk),
            tuple(draft.head_input(hidden) for hidden in outputs), draft.head(), teacher, head,
            supervised_JBR, before_J,
        )  # fmt: skip

    def describe(self, draft: Draft, example: Example) -> str:
        """How sums of such an example are computed on this machine, for the log.

        Raises:
            InputError: in a way that cannot run here; see `suffix_attention.choose`.
        """

        def heads(batch, taps_BT3E):
            tokens_BT, positions_BT = (split_like(taps_BT3E, x) for x in (batch.tokens_BT, batch.positions_BT))
            tokens = draft.token_projections(draft.embed(tokens_BT))
            projections = draft.projections(tokens, draft.project(taps_BT3E))
            return draft.query(projections, positions_BT), *draft.key_value(projections, positions_BT)

        compute = example.teacher_head_WE.dtype
        q, k, v = jax.eval_shape(heads, example.batch, example.features.taps_BT3E.astype(compute))
        q = jax.ShapeDtypeStruct((*example.rows_BR.shape, *q.shape[2:]), q.dtype)
        attention = choose(self.attention, q, k, v)
        chunks = f" ({self.attention_chunk} x {self.attention_chunk})" if attention == "chunked" else ""
        return (
            f"attention {attention}{chunks}, loss in chunks of {self.loss_chunk} rows, rematerialisation {self.remat}"
        )

    def loss_sums(self, draft: Draft, example: Example) -> LossSums:
        """All that a trainer calls."""
        return self._distill(draft, example)[0]

    def accepted(self, draft: Draft, example: Example) -> tuple[LossSums, Int[Array, "B T"]]:
        """The sums, and for each row of the batch how many draft tokens greedy verification would accept there.

        Exact where the row's tokens are the target's own greedy answer: then teacher forcing feeds the draft what
        it would have proposed, up to its first miss. The batch must be whole along time (no `Example.split`).
        """
        sums, hit_BRJ = self._distill(draft, example)
        count_BR = jnp.sum(jnp.cumprod(hit_BRJ, axis=-1, dtype=jnp.int32), axis=-1, dtype=jnp.int32)
        empty_BT = jnp.zeros_like(example.batch.tokens_BT)
        scatter = jax.vmap(lambda row, at, value: row.at[at].set(value, mode="drop"))
        return sums, scatter(empty_BT, example.rows_BR, count_BR)
