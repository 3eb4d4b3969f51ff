"""Real decoding of a few held-out prompts at evaluation steps of training, whatever mesh the training runs on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from flaxdraft.data.documents import Answer
from flaxdraft.decode.decoding import Decoding, ReadyDraft, Settings
from flaxdraft.interfaces import Drafter, Target

_NO_MESH = jax.sharding.Mesh(np.empty((), object), ())


class UntrainedDraft(NamedTuple):
    """All of a draft but its parameters, on this process's first device, with `Sharding.none()`; its precision is that
    of decoding."""

    graphdef: nnx.GraphDef
    frozen: nnx.State
    drafter: Drafter

    def ready(self, params: nnx.State) -> ReadyDraft:
        return ReadyDraft(*nnx.split(nnx.merge(self.graphdef, params, self.frozen)), self.drafter)


def whole_on_one_device(tree: Any) -> Any:
    """Arrays of the training mesh, each whole on the first device of this process. All processes must call it."""

    def whole(x: jax.Array) -> jax.Array:
        if not x.is_fully_replicated:
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
    """accept_length(params): tokens a target pass when `num_prompts` of the rows' prompts are decoded greedily.

    The processes share the prompts out and all get the same figure, to choose the best checkpoint by. All of them must
    call it. It is compiled at the first call.

    Args:
        target: on this process's first device.
    """
    index, count = jax.process_index(), jax.process_count()
    prompts = [row.tokens[: row.num_prompt].tolist() for row in spread(rows, num_prompts)]
    own = prompts[index::count]

    def accept_length(params: nnx.State) -> float:
        params = whole_on_one_device(params)
        counts = np.zeros(2, np.int32)
        with jax.set_mesh(_NO_MESH):  # the caller's mesh is the training's
            if own:
                ready = draft.ready(params)
                yields = [one.yields for one in Decoding(target, ready, own, settings).finish()]
                counts[:] = sum(map(sum, yields)), sum(map(len, yields))
        gained, passes = np.asarray(multihost_utils.process_allgather(counts)).reshape(count, 2).sum(axis=0)
        return float(gained / passes) if passes else 1.0

    return accept_length
