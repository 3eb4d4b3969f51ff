"""What a training step takes: it is compiled for the shapes of the run, every array of which is only described (one
batch of zeros is built to see its shapes); XLA then says what it holds."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from flaxdraft.algorithms.loading import ZeroTarget
from flaxdraft.config import RunConfig
from flaxdraft.devices.sharding import known
from flaxdraft.devices.weight_places import place_of
from flaxdraft.interfaces import Batch, Draw, Example, Features, VocabMap
from flaxdraft.nn.precision import DTYPES, Precision
from flaxdraft.ops.padding import round_up
from flaxdraft.run.setup import Setup
from flaxdraft.train.batch_placement import SHARDING, row_place, shared_rows
from flaxdraft.train.optimizer import optimizer
from flaxdraft.train.state import init_state, split_draft
from flaxdraft.train.step import make_train_step


class Estimate(NamedTuple):
    """Figures of a training step; bytes are those of one device."""

    trained: int  # parameters
    rows: int  # of a global batch
    length: int  # tokens of a row, the longest that is known before the data are
    held: dict[str, int]  # bytes of parts that a step needs beside the target: draft, moments, batch, features
    work: int  # bytes at most, within a step
    flops: float  # of a step's products with weights, on all devices, if every row were supervised
    batch: Batch  # described


def row_length(config: RunConfig) -> int:
    """Tokens of the longest row that the configuration allows."""
    if config.train.pack_length is not None:
        return config.train.pack_length
    if config.data.conversations is not None:
        return round_up(config.data.max_length, 32)
    return round_up(config.data.max_prompt_tokens + config.data.max_answer_tokens, 32)


def estimate(setup: Setup, draft_config: Any, num_taps: int) -> Estimate:
    """Compiles the step of a configuration for the devices of its mesh.

    Args:
        draft_config: the draft's sizes; vocabulary and widths of the target are among them.
        num_taps: layers of the target that the draft reads.
    """
    mesh, algorithm, train = setup.mesh, setup.algorithm, setup.config.train
    compute, length = DTYPES[train.compute_dtype], row_length(setup.config)
    precision = Precision(compute=compute, float8=train.float8)
    graphdef, params, frozen = _abstract_draft(setup.architecture, draft_config, precision, mesh)
    example = _example(setup, draft_config, num_taps, length)
    with jax.set_mesh(mesh):
        tx = optimizer(train)
        init = jax.jit(lambda p: init_state(p, tx, algorithm, ema=train.ema_decay is not None))
        state = _described(init.eval_shape(params), mesh)
        step = make_train_step(graphdef, algorithm, tx, compute, train.accumulate, train.ema_decay)
        compiled = step.lower(state, frozen, example).compile()
    memory = compiled.memory_analysis()
    assert memory is not None, "XLA says it of every backend that trains"
    held = {
        "draft": _bytes_a_device((state.params, frozen, example.teacher)),
        "moments": _bytes_a_device((state.opt_state, state.ema)),
        "batch": _bytes_a_device((example.batch, example.chosen)), "features": _bytes_a_device(example.features),
    }  # fmt: skip
    flops = algorithm.flops(params, frozen, example)
    trained = sum(math.prod(p.shape) for p in jax.tree.leaves(params))
    return Estimate(
        trained, train.batch_size, length, held, memory.temp_size_in_bytes, flops, example.batch
    )  # fmt: skip


def _described(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """Shapes with places on devices that exist."""

    def place(x):
        spec = x.sharding.spec if x.sharding is not None else jax.P()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, spec))

    return jax.tree.map(place, tree)


def _bytes_a_device(tree: Any) -> int:
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _abstract_draft(module: Any, config: Any, precision: Precision, mesh: jax.sharding.Mesh):
    """Structure, parameters and frozen arrays of a draft, each described in its place."""
    vocab = VocabMap(np.arange(config.draft_vocab_size), config.vocab_size)

    def make():
        return module.make(
            config, vocab, ZeroTarget(config), precision=precision, sharding=SHARDING, rngs=nnx.Rngs(0)
        )  # fmt: skip

    graphdef, *states = split_draft(nnx.eval_shape(make))

    def place(path, variable):
        value, where = variable.get_value(), jax.NamedSharding(mesh, place_of(variable, SHARDING))
        return variable.replace(jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=where))

    placed = [[(path, place(path, value)) for path, value in nnx.to_flat_state(state)] for state in states]
    return graphdef, *map(nnx.from_flat_state, placed)


def _example(setup: Setup, draft_config: Any, num_taps: int, length: int) -> Example:
    """A global batch of full rows, described."""
    config, mesh, algorithm = setup.config, setup.mesh, setup.algorithm
    rows, width, compute = config.train.batch_size, draft_config.target_hidden_size, DTYPES[config.train.compute_dtype]
    shape = (rows, length)
    # The target gives them in its own dtype where it reads while the draft trains.
    dtype = DTYPES[config.data.feature_dtype] if config.data.conversations is None else DTYPES[setup.target_dtype]
    zeros = np.zeros(shape, np.int32)
    counted = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    batch = Batch(zeros, np.ones(shape, bool), zeros + 1, counted)
    told = {
        "taps_BTKE": np.zeros((*shape, num_taps, width), dtype), "last_BTE": np.zeros((*shape, width), dtype),
        "argmax_BT": zeros, "logsumexp_BT": np.zeros(shape, np.float32),
    }  # fmt: skip
    features = Features(**{name: told[name] for name in algorithm.needs})
    chosen = algorithm.choose(batch, length, Draw(0, 0, 0))
    host, cut = shared_rows(Example(batch, features, chosen), mesh, algorithm)

    def describe(x, spec):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, spec))

    rows = jax.tree.map(lambda x, is_cut: describe(np.asarray(x), row_place(is_cut)), host, cut)
    vocab = VocabMap(np.arange(draft_config.draft_vocab_size), draft_config.vocab_size)
    teacher = jax.eval_shape(lambda: algorithm.teacher(ZeroTarget(draft_config), vocab, compute))
    head = known(SHARDING.weight_ve)
    return dataclasses.replace(rows, teacher=jax.tree.map(lambda x: describe(x, head), teacher))
