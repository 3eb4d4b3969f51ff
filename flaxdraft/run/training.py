"""The stage `train`: a run's material on its mesh, and the loop over it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from flaxdraft.data.pipeline import make_pipeline
from flaxdraft.decode.decoding import Settings
from flaxdraft.devices import host_reads, hosts
from flaxdraft.devices.sharding import Sharding, known
from flaxdraft.devices.weight_places import check_heads, on_mesh, weight_on_mesh
from flaxdraft.evaluate.during_training import UntrainedDraft, make_decoded_accept_length, make_held_out_figures
from flaxdraft.interfaces import Target
from flaxdraft.nn.precision import DTYPES, Precision, of_both
from flaxdraft.progress import CONSOLE
from flaxdraft.run.draft import check_draft, draft_config, make_draft, write_record
from flaxdraft.run.material import Material
from flaxdraft.run.saying import say
from flaxdraft.run.setup import Setup
from flaxdraft.train.batch_placement import SHARDING
from flaxdraft.train.loop import Trainer
from flaxdraft.train.resume import Resume
from flaxdraft.train.state import split_draft


@dataclasses.dataclass(frozen=True, eq=False)
class Trained:
    """A draft after its last step."""

    material: Material
    params: nnx.State  # on one device
    earlier: dict[int, nnx.State] = dataclasses.field(default_factory=dict)  # of steps that were asked for, likewise


def train_draft(setup: Setup, material: Material) -> Trained:
    """Trains in every process of the run; where training is done, the parameters come from its last checkpoint.

    Raises:
        InputError: see `check_draft`, `make_pipeline` and `Trainer.train`.
    """
    config, target = setup.config.train, material.target
    check_draft(setup, target)
    write_record(setup, target)
    part = hosts.local_part(jax.NamedSharding(setup.mesh, known(SHARDING.act_b)), config.batch_size)
    data, seed = setup.config.data, setup.config.seed
    pipeline = make_pipeline(material.documents, setup.algorithm, config, data, seed, part)
    CONSOLE.print(f"  {pipeline.layout.describe()}")
    say("train", f"{config.num_steps} steps of {config.batch_size} answers to {target.opened.path.name}")
    compute, held_out = DTYPES[config.compute_dtype], material.answers.rows("held_out")
    teacher = setup.algorithm.teacher(material.embedding_and_head, material.vocab, compute)
    decoded = _decoded_in_training(setup, material)
    precision = Precision(compute=compute, float8=config.float8)
    graphdef, params, frozen = split_draft(
        make_draft(setup, target, material.embedding_and_head, material.vocab, SHARDING, precision)
    )
    check_heads(draft_config(setup, target), SHARDING, setup.mesh.shape)
    with jax.set_mesh(setup.mesh):
        params, frozen = (on_mesh(state, setup.mesh, SHARDING) for state in (params, frozen))
        head = known(SHARDING.weight_ve)
        teacher = jax.tree.map(lambda x: weight_on_mesh("teacher", x, setup.mesh, head), teacher)
        CONSOLE.print(f"  {sum(math.prod(p.shape) for p in jax.tree.leaves(params)) / 1e6:.1f} M trained parameters")
        resume = Resume(
            config.resume, setup.draft_inputs, material.vocab, setup.allowed, _score_measure(setup, len(held_out))
        )  # fmt: skip
        trainer = Trainer(
            setup.draft_dir, config, setup.algorithm, setup.mesh, material.vocab, teacher, resume, data.prefetch,
            _reader(setup, material), material.target.loaded.model if asks_the_target(setup) else None,
        )  # fmt: skip
        evaluate = make_held_out_figures((graphdef, frozen), setup.evaluation, teacher, held_out, setup.mesh, decoded)
        params = trainer.train(graphdef, params, frozen, pipeline, evaluate)
    return Trained(material, jax.device_put(host_reads.read(params), jax.local_devices()[0]))


def untrained_draft(setup: Setup, material: Material) -> UntrainedDraft:
    """All of the draft but its parameters, in the target's dtype on one device, as evaluation wants it."""
    precision = of_both(setup.target_dtype)
    draft = make_draft(
        setup, material.target, material.embedding_and_head, material.vocab, Sharding.none(), precision
    )  # fmt: skip
    graphdef, _, frozen = split_draft(draft)
    return UntrainedDraft(graphdef, frozen, setup.evaluation.drafter(), precision.param)


def _decoded_in_training(setup: Setup, material: Material) -> Callable[[nnx.State], float] | None:
    """The accept length of `evaluate.decode_prompts` held-out prompts, by decoding in the target's dtype."""
    config = setup.config.evaluate
    if not config.decode_prompts:
        return None
    settings = Settings(config.max_new_tokens, config.chain_length, tuple(material.answers.stops))
    rows, model = material.answers.rows("held_out"), material.target.loaded.model
    return make_decoded_accept_length(model, untrained_draft(setup, material), rows, config.decode_prompts, settings)


def _score_measure(setup: Setup, num_rows: int) -> dict[str, Any]:
    """What the held-out score is of, by which the best checkpoint is chosen."""
    config = setup.config.evaluate
    num_decoded = min(config.decode_prompts, num_rows)
    return {
        "kind": "decoded" if num_decoded else "walked", "chain_length": config.chain_length,
        "prompts": num_decoded or num_rows,
    }  # fmt: skip


def _reader(setup: Setup, material: Material) -> Target | None:
    """The target, where it reads conversations while the draft trains."""
    return None if setup.config.data.conversations is None else material.target.loaded.model


def asks_the_target(setup: Setup) -> bool:
    """Whether its layers are needed while the draft trains."""
    return setup.config.data.conversations is not None or setup.config.evaluate.decode_prompts > 0
