"""What a run would take, from its compiled step: nothing is loaded, trained or written.

The step is compiled for the shapes of the run on the devices that are visible, with every array only described (one
batch of zeros is built to see its shapes); XLA then says what it holds and computes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
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
from flaxdraft.train.batch_placement import SHARDING, training_example
from flaxdraft.train.optimizer import optimizer
from flaxdraft.train.state import init_state, split_draft
from flaxdraft.train.step import make_train_step


class Estimate(NamedTuple):
    """Figures of a configuration; bytes are those of one device."""

    mesh: Mapping[str, int]
    device: str
    trained: int  # parameters
    rows: int  # of a global batch
    length: int  # tokens of a row, the longest that is known before the data are
    state_bytes: int  # parameters, moments, averages: held all the time
    batch_bytes: int  # and the target's embedding and head
    work_bytes: int  # at most, within a step
    flops: float  # of a step's products with weights, on all devices, if every row were supervised
    steps: int

    def lines(self) -> list[str]:
        axes = " x ".join(f"{name} {size}" for name, size in self.mesh.items() if size > 1) or "one device"
        total = self.state_bytes + self.batch_bytes + self.work_bytes
        return [
            f"mesh       {axes} ({math.prod(self.mesh.values())} of {jax.device_count()} visible, {self.device})",
            f"draft      {self.trained / 1e6:.1f} M trained parameters",
            f"batch      {self.rows} rows of up to {self.length} tokens, {self.rows * self.length} tokens a step",
            f"memory     {_size(total)} a device: {_size(self.state_bytes)} weights and moments, "
            f"{_size(self.batch_bytes)} batch and frozen arrays, {_size(self.work_bytes)} at most within a step",
            f"compute    {self.flops:.3g} FLOP a step, {self.flops * self.steps:.3g} in all (products with weights, "
            "every row supervised)",
            f"steps      {self.steps}",
        ]


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.2f} MB"


def row_length(config: RunConfig) -> int:
    """Tokens of the longest row that the configuration allows."""
    if config.train.pack_length is not None:
        return config.train.pack_length
    if config.data.conversations is not None:
        return round_up(config.data.max_length, 32)
    return round_up(config.data.max_prompt_tokens + config.data.max_answer_tokens, 32)


def estimate(setup: Setup, draft_config: Any, num_taps: int) -> Estimate:
    """Compiles the step of a configuration.

    Args:
        draft_config: the draft's sizes; vocabulary and widths of the target are among them.
        num_taps: layers of the target that the draft reads.
    """
    config, mesh, algorithm, train = setup.config, setup.mesh, setup.algorithm, setup.config.train
    compute, length = DTYPES[train.compute_dtype], row_length(config)
    precision = Precision(compute=compute, float8=train.float8)
    graphdef, params, frozen = _abstract_draft(setup.architecture, draft_config, precision, mesh)
    with jax.set_mesh(mesh):
        example = _described(_zeros(setup, draft_config, num_taps, length), mesh)
        tx = optimizer(train)
        init = jax.jit(lambda p: init_state(p, tx, algorithm, ema=train.ema_decay is not None))
        state = _described(init.eval_shape(params), mesh)
        step = make_train_step(graphdef, algorithm, tx, compute, train.accumulate, train.ema_decay)
        compiled = step.lower(state, frozen, example).compile()
    memory = compiled.memory_analysis()
    assert memory is not None, "XLA says it of every backend that trains"
    held, work = _bytes_a_device(state), memory.temp_size_in_bytes
    flops = algorithm.flops(params, frozen, example.teacher, train.batch_size * length)
    trained = sum(math.prod(p.shape) for p in jax.tree.leaves(params))
    return Estimate(
        dict(mesh.shape), mesh.devices.flat[0].device_kind, trained, train.batch_size, length, held,
        _bytes_a_device((frozen, example)), work, flops, train.num_steps,
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


def _zeros(setup: Setup, draft_config: Any, num_taps: int, length: int) -> Example:
    """A global batch of full rows."""
    config, mesh, algorithm = setup.config, setup.mesh, setup.algorithm
    rows, width, compute = config.train.batch_size, draft_config.target_hidden_size, DTYPES[config.train.compute_dtype]
    shape = (rows, length)
    dtype, zeros = DTYPES[config.data.feature_dtype], np.zeros(shape, np.int32)
    counted = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    batch = Batch(zeros, np.ones(shape, bool), zeros + 1, counted)
    told = {
        "taps_BTKE": np.zeros((*shape, num_taps, width), dtype), "last_BTE": np.zeros((*shape, width), dtype),
        "argmax_BT": zeros, "logsumexp_BT": np.zeros(shape, np.float32),
    }  # fmt: skip
    features = Features(**{name: told[name] for name in algorithm.needs})
    vocab = VocabMap(np.arange(draft_config.draft_vocab_size), draft_config.vocab_size)
    teacher = jax.eval_shape(lambda: algorithm.teacher(ZeroTarget(draft_config), vocab, compute))
    place = jax.NamedSharding(mesh, known(SHARDING.weight_ve))
    teacher = jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), place), teacher)
    chosen = algorithm.choose(batch, length, Draw(0, 0, 0))
    return training_example(Example(batch, features, chosen), mesh, algorithm, teacher)
