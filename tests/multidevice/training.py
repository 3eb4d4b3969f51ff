"""A tiny draft, a ragged global batch and its optimizer steps on a mesh of any shape."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from eagle3 import algorithm, target_of
from flax import nnx
from test_contracts import DRAFTS, V, W, target_config

from flaxdraft.algorithms.eagle3.objective import ChosenRows, supervised_rows
from flaxdraft.config import TrainConfig
from flaxdraft.devices.mesh import make_mesh
from flaxdraft.devices.weight_places import check_heads, on_mesh, weight_on_mesh
from flaxdraft.interfaces import Algorithm, Batch, Example, Features, VocabMap
from flaxdraft.nn.precision import Precision
from flaxdraft.train.batch_placement import SHARDING, training_example
from flaxdraft.train.optimizer import optimizer
from flaxdraft.train.state import init_state, split_draft
from flaxdraft.train.step import make_train_step

J, E = 2, 32
ALGORITHM = algorithm(J, loss_chunk=32)
CONFIG = TrainConfig(num_steps=20, learning_rate=3e-3, warmup_ratio=0.1, weight_decay=0.1)


def host_batch(num_rows: int = 16, length: int = 24, seed: int = 0) -> tuple[Example, np.ndarray]:
    """Rows of two packed documents each, supervised from different places on, one of them not at all; and a teacher
    head [W, E]."""
    rng = np.random.default_rng(seed)
    at_T, shape = np.arange(length), (num_rows, length)
    starts = np.where(np.arange(num_rows) == 3, length, rng.integers(1, length // 2, num_rows))
    second = rng.integers(length // 2, length - 2, num_rows)
    segments = np.where(at_T[None] < second[:, None], 1, 2).astype(np.int32)
    positions = np.where(segments == 1, at_T[None], at_T[None] - second[:, None]).astype(np.int32)
    assistant = (at_T[None] >= starts[:, None]) & (rng.random(shape) < 0.95)
    tokens = rng.integers(0, V, shape).astype(np.int32)
    normal = lambda *tail: rng.normal(size=(*shape, *tail)).astype(np.float32)  # noqa: E731
    argmax = rng.integers(0, V // 2, shape).astype(np.int32) * 2  # in the draft vocabulary more often than not
    argmax[rng.random(shape) < 0.2] += 1
    features = Features(normal(3, E), normal(E), argmax, np.full(shape, 5.0, np.float32))
    batch = Batch(tokens, assistant, segments, positions)
    head_WE = rng.normal(size=(W, E)).astype(np.float32)
    return Example(batch, features, ChosenRows(supervised_rows(assistant, segments))), head_WE


@dataclasses.dataclass
class Setup:
    """Everything of a run, placed."""

    mesh: jax.sharding.Mesh
    graphdef: nnx.GraphDef
    params: nnx.State
    frozen: nnx.State
    teacher_head_WE: jax.Array

    def example(self, host: Example, algorithm: Algorithm = ALGORITHM):
        return training_example(host, self.mesh, algorithm, self.teacher_head_WE)


def setup(name: str, shape: dict[str, int], head_WE: np.ndarray, compute=jnp.float32, float8=False, **fields) -> Setup:
    """A draft with eight heads on a mesh of that shape; to be used inside `jax.set_mesh`."""
    mesh, module = make_mesh(**shape), DRAFTS[name]
    heads = {"num_attention_heads": 8} | ({} if name == "mla" else {"num_key_value_heads": 8})
    config = module.Config(**module.Config.for_target(target_config(), W) | heads | fields)
    check_heads(config, SHARDING, mesh.shape)
    rng = np.random.default_rng(1)
    target = target_of(jnp.asarray(rng.normal(size=(V, E)), compute) * 0.1)
    draft = module.make(
        config, VocabMap(np.arange(W) * 2, V), target, precision=Precision(compute=compute, float8=float8),
        sharding=SHARDING, rngs=nnx.Rngs(0),
    )  # fmt: skip
    graphdef, params, frozen = split_draft(draft)
    params, frozen = (on_mesh(state, mesh, SHARDING) for state in (params, frozen))
    head = weight_on_mesh("teacher head", jnp.asarray(head_WE, compute), mesh, SHARDING.weight_ve)
    return Setup(mesh, graphdef, params, frozen, head)


@dataclasses.dataclass
class Trained:
    losses: list[float]
    sums: list  # of every step
    params: nnx.State
    text: str  # of the compiled step
    specs: dict[str, set]  # where parameters and moments live at the end


def train(name: str, shape: dict[str, int], num_microbatches: int, optimizer: str = "adamw", **fields) -> Trained:
    """Twenty steps through three global batches in turn; done once for all tests of a session."""
    return _train(name, tuple(shape.items()), num_microbatches, optimizer, tuple(fields.items()))


@functools.cache
def _train(name, shape, num_microbatches, kind, fields) -> Trained:
    batches, head_WE = zip(*(host_batch(seed=i) for i in range(3)), strict=True)
    run = setup(name, dict(shape), head_WE[0], **dict(fields))
    width = max(host.chosen.rows_BR.shape[1] for host in batches)
    with jax.set_mesh(run.mesh):
        tx = optimizer(CONFIG.model_copy(update={"optimizer": kind}))
        state = jax.jit(lambda params: init_state(params, tx, ALGORITHM))(run.params)
        examples = [run.example(_widened(host, width)) for host in batches]
        step = make_train_step(run.graphdef, ALGORITHM, tx, jnp.float32, num_microbatches)
        compiled = step.lower(state, run.frozen, examples[0]).compile()
        losses, sums = [], []
        for i in range(CONFIG.num_steps):
            state, metrics = compiled(state, run.frozen, examples[i % 3])
            losses.append(float(metrics.loss))
            sums.append(jax.device_get(metrics.sums))
    return Trained(losses, sums, jax.device_get(state.params), compiled.as_text(), _specs(state))


def _widened(host: Example, width: int) -> Example:
    length = host.batch.tokens_BT.shape[1]
    rows_BR = host.chosen.rows_BR
    rows_BR = np.pad(rows_BR, ((0, 0), (0, width - rows_BR.shape[1])), constant_values=length)
    return dataclasses.replace(host, chosen=ChosenRows(rows_BR))


def _specs(state) -> dict[str, set]:
    """{end of a path: specs of the parameter and of its moments}."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if leaf.ndim:
            name = "/".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path[-3:])
            found.setdefault(name, set()).add(leaf.sharding.spec)
    return found
