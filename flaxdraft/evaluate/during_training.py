"""The held-out figures at evaluation steps of training: the walk on the training's mesh, and real decoding of a few
prompts, whatever that mesh is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flaxdraft.data.documents import Answer
from flaxdraft.decode.decoding import Decoding, ReadyDraft, Settings, beside
from flaxdraft.evaluate.walk import EVALUATION_ROWS, evaluate_teacher_forced, make_accepted
from flaxdraft.evaluate.walk import accept_length as pooled
from flaxdraft.interfaces import Algorithm, Drafter, Target
from flaxdraft.ops.padding import round_up
from flaxdraft.train.batch_placement import own_rows, placed_rows, rows_multiple

_NO_MESH = jax.sharding.Mesh(np.empty((), object), ())


class UntrainedDraft(NamedTuple):
    """All of a draft but its parameters, on this process's first device, with `Sharding.none()`; its precision is that
    of decoding."""

    graphdef: nnx.GraphDef
    frozen: nnx.State
    drafter: Drafter
    dtype: Any = jnp.float32  # of its parameters

    def trained(self, params: nnx.State) -> nnx.State:
        """Trained parameters as it takes them."""
        return jax.tree.map(lambda x: x.astype(self.dtype), params)

    def ready(self, params: nnx.State) -> ReadyDraft:
        return ReadyDraft(*nnx.split(nnx.merge(self.graphdef, self.trained(params), self.frozen)), self.drafter)


def whole_on_one_device(tree: Any) -> Any:
    """Arrays of the training mesh, each whole on the first device of this process. All processes must call it."""

    def whole(x: jax.Array) -> jax.Array:
        if not x.is_fully_replicated:
            assert isinstance(x.sharding, jax.NamedSharding), "on a mesh"
            x = jax.device_put(x, jax.NamedSharding(x.sharding.mesh, jax.P()))
        return jax.device_put(x.addressable_data(0), jax.local_devices()[0])

    return jax.tree.map(whole, tree)


def spread(rows: Sequence[Answer], num: int) -> list[Answer]:
    """So many rows, evenly from all of them (they are ordered by length)."""
    at = np.linspace(0, len(rows) - 1, min(num, len(rows))).round().astype(int)
    return [rows[i] for i in at]


def make_decoded_accept_length(
    target: Target, draft: UntrainedDraft, rows: Sequence[Answer], num_prompts: int, settings: Settings
) -> Callable[[nnx.State], float]:
    """accept_length(params): tokens a target pass when `num_prompts` of the rows' prompts are decoded greedily, to
    choose the best checkpoint by.

    All processes must call it, and all get the same figure. It is compiled at the first call.
    """
    prompts = [row.tokens[: row.num_prompt].tolist() for row in spread(rows, num_prompts)]

    def accept_length(params: nnx.State) -> float:
        params = whole_on_one_device(params)
        with jax.set_mesh(_NO_MESH):  # the caller's mesh is the training's
            ready = beside(target, draft.ready(params))
            yields = [one.yields for one in Decoding(target, ready, prompts, settings).finish()]
        return pooled(yields)

    return accept_length


def make_held_out_figures(
    draft: tuple[nnx.GraphDef, nnx.State], algorithm: Algorithm, teacher: Any, rows: list[Answer],
    mesh: jax.sharding.Mesh, decoded: Callable[[nnx.State], float] | None,
) -> Callable[[nnx.State], dict[str, Any]]:  # fmt: skip
    """figures(params) of held-out answers. All processes must call it.

    Args:
        draft: its graphdef and its frozen arrays, on the mesh.
        algorithm: with as many draft tokens as evaluation drafts.
        teacher: see `Algorithm.teacher`; on the mesh.
        decoded: gives `accept_length_decoded` among the figures.
    """
    graphdef, frozen = draft
    place = lambda host: placed_rows(own_rows(host, mesh), mesh)  # noqa: E731
    accepted = make_accepted(graphdef, algorithm, frozen, teacher, place)
    num_rows = round_up(EVALUATION_ROWS, rows_multiple(mesh))

    def figures(params: nnx.State) -> dict[str, Any]:
        forced = evaluate_teacher_forced(accepted(params), rows, algorithm, num_rows)
        return forced.figures() | ({} if decoded is None else {"accept_length_decoded": decoded(params)})

    return figures
