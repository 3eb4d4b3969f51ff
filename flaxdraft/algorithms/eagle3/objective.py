"""EAGLE-3 (arXiv 2503.01840): which rows are supervised, and the test-time-training unroll over them.

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
from jaxtyping import Array, Bool, Float, Int

from flaxdraft.algorithms.eagle3.suffix_attention import Backend, Suffix, Way, choose, suffix_attention
from flaxdraft.algorithms.eagle3.surface import Draft
from flaxdraft.devices.sharding import split_like, whole_in_time
from flaxdraft.interfaces import AnyArray, Batch, Example
from flaxdraft.ops.attention import KeyRange, document_ranges
from flaxdraft.ops.range_attention import DEFAULT_CHUNK, Chunks
from flaxdraft.ops.remat import POLICIES, Remat
from flaxdraft.ops.rows import take_rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SharedRows:
    """What the rows of a batch row read of its features, where devices share them (shared_rows.py): no device has to
    read another's."""

    taps_BRKE: Float[AnyArray, "B R K E"]  # of each row
    last_BRE: Float[AnyArray, "B R E"]  # of the row after it, its teacher at step 0
    owned_BR: Bool[AnyArray, "B R"]  # false: listed for its teacher alone, some other device trains it


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ChosenRows:
    """The rows of a batch that some step supervises, ascending; entries >= T are padding. Rows outside are never
    computed."""

    rows_BR: Int[AnyArray, "B R"]
    shared: SharedRows | None = None


@dataclasses.dataclass(frozen=True)
class UnrollOptions:
    """How the unroll is computed; none of it changes the result beyond rounding.

    remat: what the backward pass computes anew: what the draft's layer leaves to it, all but the outputs of projections
        and attention, or the whole step.
    packed: whether a row may hold several documents; see `suffix_attention.Way`.
    """

    attention: Backend = "auto"
    remat: Remat = "none"
    attention_chunk: int = DEFAULT_CHUNK
    packed: bool = True

    @property
    def way(self) -> Way:
        """Of the attention."""
        return Way(self.attention, Chunks(self.attention_chunk, self.attention_chunk), self.packed)


def attention_of(draft: Draft, example: Example, num_queries: int, options: UnrollOptions) -> str:
    """The attention of a draft's first layer on this machine, for the log.

    Args:
        num_queries: of a batch row.

    Raises:
        InputError: the one that was asked for cannot run here; see `suffix_attention.choose`.
    """
    assert example.features is not None, "an example has the features that `needs` names"

    def heads(batch, taps_BTKE):
        tokens_BT, positions_BT = (split_like(taps_BTKE, x) for x in (batch.tokens_BT, batch.positions_BT))
        tokens = draft.token_projections(draft.embed(tokens_BT))
        projections = draft.projections(tokens, draft.project(taps_BTKE))
        return draft.query(projections, positions_BT), *draft.key_value(projections, positions_BT)

    q, k, v = jax.eval_shape(heads, example.batch, example.features.taps_BTKE.astype(example.teacher.dtype))
    q = jax.ShapeDtypeStruct((q.shape[0], num_queries, *q.shape[2:]), q.dtype)
    attention, size = choose(options.attention, q, k, v), options.attention_chunk
    return f"chunked ({size} x {size})" if attention == "chunked" else attention


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


def visible_range(segments_BT: Int[Array, "B T"], rows_BR: Int[Array, "B R"]) -> KeyRange:
    """The step-0 rows that each row sees: from its document's start to itself. Padding sees nothing."""
    first_BR = take_rows(document_ranges(segments_BT).first_BR, rows_BR)
    return KeyRange(first_BR, jnp.where(take_rows(segments_BT, rows_BR) > 0, rows_BR, -1))


def unroll(
    draft: Draft,
    batch: Batch,
    taps_BTKE: Float[Array, "B T K E"],
    chosen: ChosenRows,
    num_steps: int,
    options: UnrollOptions = UnrollOptions(),
) -> list[Float[Array, "B R D"]]:
    """The draft layer's output of each step at the chosen rows, before the final norm.

    Step-0 keys are made for every row of the batch; all else is computed for the chosen rows alone. Where devices share
    a batch row, each makes the step-0 keys of its taps and then reads all of them; tokens and positions it holds whole.

    Args:
        taps_BTKE: whole along time, and rows take theirs from there; or cut, where `chosen.shared` brings the rows'.
    """
    rows_BR, shared = chosen.rows_BR, chosen.shared
    # Past the end the reader finds token 0, like an engine's empty slot; no supervised row ever sees it.
    tokens_BT, num_rows = jnp.pad(batch.tokens_BT, ((0, 0), (0, num_steps))), batch.tokens_BT.shape[1]
    hidden_BTD = draft.project(taps_BTKE)
    if shared is None:
        every = draft.token_projections(draft.embed(tokens_BT))
        after = jax.tree.map(lambda x: x[:, 1 : num_rows + 1], every)
        read = lambda j: jax.tree.map(lambda x: take_rows(x, rows_BR + 1 + j), every)  # noqa: E731
    else:  # no device projects the tokens of another's rows
        of_tokens = lambda tokens: draft.token_projections(draft.embed(tokens))  # noqa: E731
        after = of_tokens(split_like(taps_BTKE, tokens_BT[:, 1 : num_rows + 1]))
        read = lambda j: of_tokens(take_rows(tokens_BT, rows_BR + 1 + j))  # noqa: E731
    positions_BT = split_like(taps_BTKE, batch.positions_BT)
    k0, v0 = map(whole_in_time, draft.key_value(draft.projections(after, hidden_BTD), positions_BT))
    seen = visible_range(batch.segments_BT, rows_BR)
    positions_BR = take_rows(batch.positions_BT, rows_BR)

    def step(hidden, tokens, suffix, j):
        """One pass of the layer; from step 1 on it brings a key of its own."""
        projections, positions = draft.projections(tokens, hidden), positions_BR + j
        if j > 0:
            suffix = suffix.longer(*draft.key_value(projections, positions))
        q = draft.query(projections, positions)
        heads = suffix_attention(q, k0, v0, suffix, seen, draft.softmax_scale, options.way)
        return draft.finish(hidden, heads), suffix

    if options.remat != "none":
        step = jax.checkpoint(step, policy=POLICIES[options.remat], static_argnums=3)
    hidden = take_rows(hidden_BTD, rows_BR) if shared is None else draft.project(shared.taps_BRKE)
    suffix, outputs = Suffix(), []
    for j in range(num_steps):
        hidden, suffix = step(hidden, read(j), suffix, j)
        outputs.append(hidden)
    return outputs
