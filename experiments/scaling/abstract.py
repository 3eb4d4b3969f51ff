"""One optimizer step of a named draft on a mesh, lowered from shapes alone."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from bench_cases import CASES, count_flops, make_algorithm
from flax import nnx

from flaxdraft.algorithms.eagle3.objective import ChosenRows, SharedRows
from flaxdraft.config import TrainConfig
from flaxdraft.devices.mesh import make_mesh
from flaxdraft.devices.weight_places import place_of
from flaxdraft.interfaces import Batch, Example, Features, VocabMap
from flaxdraft.nn.precision import Precision
from flaxdraft.train.batch_placement import SHARDING
from flaxdraft.train.optimizer import optimizer
from flaxdraft.train.state import init_state, split_draft
from flaxdraft.train.step import make_train_step

COMPUTE = jnp.bfloat16


def abstract_step(
    case: str, shape: dict[str, int], tokens: int, length: int, num_steps: int, chunk: int
) -> tuple[Any, int, float]:
    """The lowered step, the rows that one device walks in its loss, and the operations of one device.

    Args:
        tokens: of one device and step, all of them supervised.
        length: of a row; with `sequence` a row is that many times longer.
    """
    module, config = CASES[case]
    mesh = make_mesh(**shape)
    ways = mesh.shape["sequence"]
    length = length * ways
    num_rows = tokens * math.prod(shape.values()) // length
    spread = config.vocab_size // config.draft_vocab_size

    def make():
        vocab = VocabMap(np.arange(config.draft_vocab_size) * spread, config.vocab_size)
        embedding = jnp.zeros((config.vocab_size, config.hidden_size), COMPUTE)
        target = SimpleNamespace(embedding=lambda: embedding)
        return module.make(
            config, vocab, target, precision=Precision(compute=COMPUTE), sharding=SHARDING, rngs=nnx.Rngs(0)
        )

    def at(spec, *dims, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=jax.NamedSharding(mesh, spec))

    def placed(state):
        flat = nnx.to_flat_state(state)
        return nnx.from_flat_state(
            [(path, x.replace(at(place_of(x, SHARDING), *x.shape, dtype=x.dtype))) for path, x in flat]
        )

    graphdef, params, frozen = split_draft(nnx.eval_shape(make))
    width, ids = config.target_hidden_size, (num_rows, length)
    algorithm = make_algorithm(num_steps, True, attention="chunked", loss_chunk=chunk)
    rows = length if ways == 1 else ways * 2 * (-(-length // (2 * ways)) + num_steps - 1)
    b, split = SHARDING.act_b, SHARDING.split_bt if ways > 1 else SHARDING.act_b
    integers = at(b, *ids, dtype=jnp.int32)
    batch = Batch(integers, at(b, *ids, dtype=jnp.bool), integers, integers)
    last = at(b, *ids, width, dtype=COMPUTE) if ways == 1 else None
    features = Features(at(split, *ids, 3, width, dtype=COMPUTE), last, integers, at(b, *ids))
    own = None if ways == 1 else SharedRows(
        at(split, num_rows, rows, 3, width, dtype=COMPUTE), at(split, num_rows, rows, width, dtype=COMPUTE),
        at(split, num_rows, rows, dtype=jnp.bool),
    )  # fmt: skip
    head = at(SHARDING.weight_ve, config.draft_vocab_size, width, dtype=COMPUTE)
    example = Example(batch, features, ChosenRows(at(split, num_rows, rows, dtype=jnp.int32), own), head)
    with jax.set_mesh(mesh):
        params, frozen = placed(params), placed(frozen)
        tx = optimizer(TrainConfig(num_steps=1000))
        state = jax.eval_shape(lambda p: init_state(p, tx, algorithm), params)
        state = jax.tree.map(lambda x: at(x.sharding.spec if x.sharding else jax.P(), *x.shape, dtype=x.dtype), state)
        lowered = make_train_step(graphdef, algorithm, tx, COMPUTE).lower(state, frozen, example)
    replicas = mesh.shape["data"] * mesh.shape["fsdp"]
    return lowered, num_rows // replicas * length // ways, _flops(case, length, num_steps) * num_rows / mesh.size


def _flops(case: str, length: int, num_steps: int) -> float:
    """Of one row whose tokens are all supervised."""
    at_T = np.arange(length)[None].astype(np.int32)
    batch = Batch(at_T, at_T >= 0, np.ones_like(at_T), at_T)
    return count_flops(case, Example(batch, None, ChosenRows(at_T)), num_steps).total
