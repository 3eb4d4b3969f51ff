"""EAGLE-3 (arXiv 2503.01840): the test-time-training unroll, its supervision and its sums.

At row p and step j (0-based) the draft reads token x_{p+1+j} and, at step 0, the projected taps of row p, later its
own output of step j-1 at row p; it sits at position p + j, sees the step-0 keys of rows 0..p and its own keys of
steps 1..j, and predicts x_{p+2+j}, whose teacher is the target's distribution at p+1+j. This is what engines do.

Shape letters: B batch, T time, R computed rows, J steps, D draft width, E target width, W draft vocabulary.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from flaxdraft.errors import InputError
from flaxdraft.interfaces import Batch, Draft, Example, LossSums
from flaxdraft.ops import distillation, suffix_attention


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


def take_rows(x: Float[Array, "B T *tail"], rows_BR: Int[Array, "B R"]):
    """x at the rows of each batch entry; rows past the end read 0."""
    return jax.vmap(lambda row, at: row.at[at].get(mode="fill", fill_value=0))(x, rows_BR)


def unroll(
    draft: Draft,
    batch: Batch,
    taps_BT3E: Float[Array, "B T 3 E"],
    rows_BR: Int[Array, "B R"],
    num_steps: int,
) -> list[Float[Array, "B R D"]]:
    """The draft layer's output of each step at the given rows, before the final norm.

    Step-0 keys are made for every row of the batch; all else is computed for `rows_BR` alone.
    """
    # Past the end the reader finds token 0, like an engine's empty slot; no supervised row ever sees it.
    embeds_BTD = draft.embed(jnp.pad(batch.tokens_BT, ((0, 0), (0, num_steps))))
    num_rows = batch.tokens_BT.shape[1]
    hidden_BTD = draft.project(taps_BT3E)
    x_BTX = draft.attention_input(embeds_BTD[:, 1 : num_rows + 1], hidden_BTD)
    k0, v0 = draft.key_value(x_BTX, batch.positions_BT)
    segments_BR = take_rows(batch.segments_BT, rows_BR)
    visible_BRT = (
        (jnp.arange(num_rows)[None, None, :] <= rows_BR[:, :, None])
        & (batch.segments_BT[:, None, :] == segments_BR[:, :, None])
        & (segments_BR > 0)[:, :, None]
    )
    positions_BR = take_rows(batch.positions_BT, rows_BR)
    hidden, suffix_k, suffix_v, outputs = take_rows(hidden_BTD, rows_BR), [], [], []
    for j in range(num_steps):
        x_BRX = draft.attention_input(take_rows(embeds_BTD, rows_BR + 1 + j), hidden)
        if j > 0:
            k_j, v_j = draft.key_value(x_BRX, positions_BR + j)
            suffix_k.append(k_j)
            suffix_v.append(v_j)
        q_BRNH = draft.query(x_BRX, positions_BR + j)
        heads = suffix_attention.dense(q_BRNH, k0, v0, suffix_k, suffix_v, visible_BRT, draft.softmax_scale)
        hidden = draft.finish(hidden, heads)
        outputs.append(hidden)
    return outputs


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """EAGLE-3 with `num_steps` unroll steps, step j weighted step_decay^j."""

    num_steps: int = 7
    step_decay: float = 0.8

    def __post_init__(self):
        if self.num_steps < 1:
            raise InputError(f"algorithm.ttt_length: found {self.num_steps}, expected at least 1")

    def rows(self, assistant_BT: np.ndarray, segments_BT: np.ndarray) -> np.ndarray:
        """The rows that must be computed for this batch; see `Example.rows_BR`."""
        return supervised_rows(assistant_BT, segments_BT)

    def step_weights(self) -> Float[Array, " J"]:
        return self.step_decay ** jnp.arange(self.num_steps)

    def mean_loss(self, sums: LossSums) -> Float[Array, ""]:
        return sums.mean_loss(self.step_weights())

    def _signals(self, draft: Draft, example: Example):
        batch, rows = example.batch, example.rows_BR
        compute = example.teacher_head_WE.dtype
        outputs = unroll(draft, batch, example.features.taps_BT3E.astype(compute), rows, self.num_steps)
        # The teacher of row p at step 0 is the target's distribution at p + 1.
        last_BRE = take_rows(example.features.last_BTE, rows + 1).astype(compute)
        argmax_BR = take_rows(example.features.argmax_BT, rows + 1)
        teacher = distillation.Teacher(
            logits_BRW=jnp.einsum("bre,we->brw", last_BRE, example.teacher_head_WE),
            logsumexp_BR=take_rows(example.features.logsumexp_BT, rows + 1),
            draft_argmax_BR=draft.draft_ids[...].at[argmax_BR].get(out_sharding=draft.sharding.act_b),
        )
        supervised_JBT = supervision(batch.assistant_BT, batch.segments_BT, self.num_steps)
        supervised_JBR = jnp.stack([take_rows(mask_BT, rows) for mask_BT in supervised_JBT])
        steps = [distillation.step_signals(draft.logits(h), teacher, j) for j, h in enumerate(outputs)]
        return steps, supervised_JBR, teacher

    def loss_sums(self, draft: Draft, example: Example) -> LossSums:
        """All that a trainer or evaluator calls."""
        return distillation.sum_signals(*self._signals(draft, example))

    def accepted(self, draft: Draft, example: Example) -> tuple[LossSums, Int[Array, "B T"]]:
        """The sums, and for each row of the batch how many draft tokens greedy verification would accept there.

        Exact where the row's tokens are the target's own greedy answer: then teacher forcing feeds the draft what
        it would have proposed, up to its first miss.
        """
        steps, supervised_JBR, teacher = self._signals(draft, example)
        prefix_BR, count_BR = jnp.ones(example.rows_BR.shape, bool), jnp.zeros(example.rows_BR.shape, jnp.int32)
        for step, supervised_BR in zip(steps, supervised_JBR, strict=True):
            prefix_BR = prefix_BR & step.hit_BR & supervised_BR
            count_BR = count_BR + prefix_BR
        empty_BT = jnp.zeros_like(example.batch.tokens_BT)
        scatter = jax.vmap(lambda row, at, value: row.at[at].set(value, mode="drop"))
        return distillation.sum_signals(steps, supervised_JBR, teacher), scatter(empty_BT, example.rows_BR, count_BR)
