"""What the configuration of a run decides, and all that can be refused before the first minute is spent on it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import jax

from flaxdraft import algorithms
from flaxdraft.config import RunConfig, nearest
from flaxdraft.data.prompts import SPLITS, Prompt, read_prompts
from flaxdraft.data.store import MANIFEST, FeatureStore
from flaxdraft.devices import hosts
from flaxdraft.devices.mesh import make_mesh
from flaxdraft.errors import InputError
from flaxdraft.files.fetch import content_of, digest_of, sha256_of
from flaxdraft.interfaces import Algorithm
from flaxdraft.run.dates import dated
from flaxdraft.run.init_from import load_start, start_files
from flaxdraft.run.target_options import dtype_or_default, target_mesh
from flaxdraft.serving.contract import find_engine
from flaxdraft.serving.trained_draft import TrainedDraft
from flaxdraft.stages.claims import check_claimed, claim
from flaxdraft.stages.directory_lock import directory_lock
from flaxdraft.stages.same_inputs import NOT_OF_ANSWERS, flatten
from flaxdraft.train.batch_placement import check_batch, rows_multiple
from flaxdraft.train.metrics_log import check_wandb
from flaxdraft.train.resume import check_request


@dataclasses.dataclass(frozen=True, eq=False)
class Setup:
    """A configuration with the parts that it names."""

    config: RunConfig
    algorithm: Algorithm  # of training
    evaluation: Algorithm  # drafts as evaluation does
    architecture: ModuleType  # of the draft
    mesh: jax.sharding.Mesh
    target_mesh: jax.sharding.Mesh | None  # None: one device
    target_dtype: str  # of the target's weights and products
    splits: tuple[str, ...]  # that the target answers
    prompts: list[Prompt]
    start: TrainedDraft | None  # the draft that training begins from, if not from nothing
    # Of the stored answers, which any draft of this target may use, and of the trained draft; a plan has none.
    answer_inputs: dict[str, Any] = dataclasses.field(default_factory=dict)
    draft_inputs: dict[str, Any] = dataclasses.field(default_factory=dict)
    allowed: Sequence[str] = ()  # fields that may differ from what the folders were made with

    @property
    def data_dir(self) -> Path:
        return Path(self.config.output_dir) / "data"

    @property
    def draft_dir(self) -> Path:
        return self.config.draft_dir


def prepare(config: RunConfig, allowed: Sequence[str] = ()) -> Setup:
    """
    Args:
        allowed: fields of the configuration that may differ from what the output directory was made with.

    Raises:
        InputError: the configuration names something that does not exist, or its parts do not go together.
    """
    setup = parts(config)
    check_wandb(config.train.wandb)
    check_request(config.train.resume, config.draft_dir / "checkpoints")
    config = dated(config)
    answer_inputs, draft_inputs = _inputs(config, setup.target_dtype)
    known = [*flatten(draft_inputs)]
    for field in allowed:
        if field not in known:
            raise InputError(f"--allow-change: no field {field!r}; {nearest(field, known)}")
    return dataclasses.replace(
        setup, config=config, answer_inputs=answer_inputs, draft_inputs=draft_inputs, allowed=allowed
    )


def parts(config: RunConfig, devices: Sequence[Any] | None = None) -> Setup:
    """What a configuration names, without the digests that identify a run. Of the target nothing is read.

    Args:
        devices: those of the mesh, which need not be there; None takes the visible ones.

    Raises:
        InputError: as `prepare`.
    """
    algorithm = algorithms.make(config.algorithm, packed=config.train.pack_length is not None)
    architecture = algorithms.architecture(config.algorithm, config.architecture)
    find_engine(algorithm.serving(), config.engine, "export.engine")
    if algorithm.full_vocabulary:
        for field in ("draft_vocab_size", "vocab_map"):
            if field in config.draft.model_fields_set:
                raise InputError(
                    f"draft.{field}: drafts of {config.algorithm.name} know the target's whole vocabulary; leave it out"
                )
    given = [name for name in ("store", "conversations") if getattr(config.data, name) is not None]
    if len(given) == 2:
        raise InputError("data.store, data.conversations: both are given; training reads one of them")
    if given == ["conversations"] and config.mesh.sequence > 1:
        raise InputError(
            "mesh.sequence: features that the target makes while the draft trains (data.conversations) are not "
            "split along rows; capture a store (python -m flaxdraft.data capture) and give data.store, or leave "
            "mesh.sequence at 1"
        )
    splits = ("held_out",) if given else SPLITS
    prompts = read_prompts(config.data.prompts, splits)
    check_batch(config)
    mesh = make_mesh(**config.mesh.model_dump(), devices=devices)
    if devices is None and jax.process_count() > 1 and mesh.size != jax.device_count():
        raise InputError(
            f"mesh: {mesh.size} devices of {jax.device_count()}; a run of {jax.process_count()} processes uses all of "
            "them"
        )
    of_target = _target_mesh(config, mesh, devices)
    most = algorithm.drafter().most_tokens
    if most is not None and config.evaluate.chain_length > most:
        raise InputError(
            f"evaluate.chain_length: found {config.evaluate.chain_length}, but such drafts of {config.algorithm.name} "
            f"propose at most {most} tokens at a time"
        )
    start = None if config.draft.init_from is None else load_start(config.draft, architecture)
    dtype = dtype_or_default(config.target.dtype)
    evaluation = algorithm.drafting(config.evaluate.chain_length)
    return Setup(
        config, algorithm, evaluation, architecture, mesh, of_target, dtype, splits, prompts, start
    )  # fmt: skip


def _target_mesh(
    config: RunConfig, mesh: jax.sharding.Mesh, devices: Sequence[Any] | None
) -> jax.sharding.Mesh | None:  # fmt: skip
    """
    Raises:
        InputError: its devices are not there; or the target reads batches of the draft's mesh, and lies on other
            devices or has no even share of their rows for each.
    """
    online, given = config.data.conversations is not None, config.target.mesh.model_dump(exclude_none=True)
    own = config.mesh
    shape = given or {"data": own.data, "fsdp": own.fsdp * own.sequence, "tensor": own.tensor}
    found = target_mesh(shape, "target.mesh", devices)
    if not online:
        return found
    found = make_mesh(devices=devices) if found is None else found  # one device, that of the batches
    if found.size != mesh.size:
        raise InputError(
            f"target.mesh: {found.size} devices, mesh has {mesh.size}; a target that reads batches while the draft "
            "trains (data.conversations) takes the same ones, along whichever axes"
        )
    if config.train.batch_size % rows_multiple(found):
        raise InputError(
            f"train.batch_size: {config.train.batch_size} rows cannot be split over target.mesh.data="
            f"{found.shape['data']} x target.mesh.fsdp={found.shape['fsdp']}; give a multiple of their product"
        )
    return found


def _inputs(config: RunConfig, dtype: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the stored answers and what the trained draft are made from: the configuration, with digests of the files
    that it names. The target's mesh is not among them.

    Args:
        dtype: of the target.
    """
    data = config.data.model_dump(exclude={"prefetch"}) | {"prompts": sha256_of(Path(config.data.prompts))}
    if config.data.date is None:  # folders of earlier versions do not name it
        del data["date"]
    if config.data.conversations is not None:
        data["conversations"] = digest_of(config.data.conversations, "data.conversations")
    if config.data.store is not None:
        data["store"] = sha256_of(FeatureStore(config.data.store).directory / MANIFEST)
    target = config.target.model_dump(exclude={"mesh"}) | {
        "dtype": dtype, "content": content_of(config.target.path, config.target.sha256),
    }  # fmt: skip
    if config.target.tap_layers is None and config.algorithm.name != algorithms.DEFAULT:
        target["tap_layers"] = f"those of {config.algorithm.name}"  # features are of its layers
    answers = {
        "target": target,
        "data": {name: value for name, value in data.items() if f"data.{name}" not in NOT_OF_ANSWERS},
        "evaluate": {"max_new_tokens": config.evaluate.max_new_tokens},
    }  # fmt: skip
    draft = config.draft.model_dump()
    if config.draft.vocab_map is not None:
        draft["vocab_map"] = digest_of(config.draft.vocab_map, "draft.vocab_map")
    if config.draft.init_from is not None:
        draft["init_from"] = {path.name: sha256_of(path) for path in start_files(config.draft.init_from)}
    return answers, answers | {
        "data": data, "seed": config.seed, "draft": draft, "algorithm": config.algorithm.model_dump(),
        "train": config.train.model_dump(),
    }  # fmt: skip


def lock(directory: Path) -> AbstractContextManager:
    """One run at a time in a folder, whose first process holds it.

    Raises:
        InputError: see `directory_lock`.
    """
    return directory_lock(directory) if hosts.is_main() else nullcontext()


def claim_folders(setup: Setup) -> None:
    """Refuses a run that does not belong into its folders, before anything is done for it.

    Raises:
        InputError: see `claim`, `check_claimed` and `lock`.
    """
    with hosts.main_first("claim"):
        with lock(setup.data_dir):
            claim_data(setup)
        with lock(setup.draft_dir):
            claim_draft(setup)


def claim_data(setup: Setup) -> None:
    """To be called by the holder of the folder's lock, in the first process before the others: another run may claim a
    folder that holds no result yet.

    Raises:
        InputError: see `claim` and `check_claimed`.
    """
    own = claim if hosts.is_main() else check_claimed
    own(setup.data_dir, setup.answer_inputs, "Give another output_dir, or remove it to start anew.")


def claim_draft(setup: Setup) -> None:
    """See `claim_data`."""
    own = claim if hosts.is_main() else check_claimed
    own(
        setup.draft_dir, setup.draft_inputs, "Give another name= or output_dir=, or remove it to start anew.",
        setup.allowed,
    )  # fmt: skip
