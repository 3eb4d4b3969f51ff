"""The stages after training: evaluation, export, report, all of the checkpoint that `export.step` chooses.

Every stage keeps its result under the output directory and is skipped while its inputs stay the same.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from flaxdraft.errors import InputError
from flaxdraft.evaluate.held_out import decode_held_out, summary
from flaxdraft.evaluate.report import write_report
from flaxdraft.evaluate.walk import EVALUATION_ROWS, evaluate_teacher_forced, make_accepted
from flaxdraft.files.fetch import sha256_of
from flaxdraft.nn.precision import DTYPES
from flaxdraft.run.draft import draft_config
from flaxdraft.run.saying import say
from flaxdraft.run.setup import Setup
from flaxdraft.run.training import Trained, untrained_draft
from flaxdraft.serving.card import describe
from flaxdraft.serving.export import export
from flaxdraft.serving.trained_draft import Origin, TrainedDraft
from flaxdraft.stages.claims import Stage
from flaxdraft.train.checkpoint import DamagedError, load_params
from flaxdraft.train.chosen import Chosen, choose
from flaxdraft.train.metrics_log import read_metrics
from flaxdraft.train.resume import goes_back


def chosen_checkpoint(setup: Setup) -> Chosen:
    """The checkpoint that all of this is about."""
    config = setup.config
    return choose(setup.draft_dir / "checkpoints", config.export.step, config.train.num_steps)


def finished(setup: Setup) -> bool:
    """Whether all is there and stands, so that nothing has to be trained.

    Raises:
        InputError: see `goes_back`.
    """
    back = goes_back(setup.config.train.resume, setup.draft_dir / "checkpoints")
    return not back and _standing(setup, _evaluation_stage(setup)) is not None and _exported(setup)


def _standing(setup: Setup, stage: Stage) -> dict[str, Any] | None:
    """What a stage stored, where it is of the chosen checkpoint. Ones that were removed since are not missed."""
    stored, chosen = stage.load(), chosen_checkpoint(setup)
    if stored is None or (chosen.sha256 is not None and stored["checkpoint"] != chosen._asdict()):
        return None
    return stored


@functools.cache
def chosen_params(setup: Setup, trained: Trained) -> nnx.State:
    """Of the chosen checkpoint, on one device.

    Raises:
        InputError: the checkpoint is damaged.
    """
    chosen = chosen_checkpoint(setup)
    if chosen.step == chosen.last:
        return trained.params
    path = setup.draft_dir / "checkpoints" / str(chosen.step)
    try:
        return load_params(path, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), trained.params))[0]
    except DamagedError as error:
        raise InputError(
            f"{path}: the best checkpoint cannot be read ({error}); take the last one (export.step=latest)"
        ) from error


def _evaluation_stage(setup: Setup) -> Stage:
    what = setup.config.evaluate.model_dump(exclude={"decode_prompts"})  # of training
    inputs = setup.draft_inputs | {"evaluate": what, "export": {"step": setup.config.export.step}}
    return Stage(setup.draft_dir / "evaluation.json", inputs)


def evaluate_draft(setup: Setup, trained: Trained | None) -> dict[str, Any]:
    """The held-out result: walked, and decoded for real, both in float32.

    Args:
        trained: None where the result stands.
    """
    config, stage = setup.config.evaluate, _evaluation_stage(setup)
    result = _standing(setup, stage)
    if result is not None:
        say("evaluate", f"done before: {stage.path}")
        return result
    assert trained is not None
    chosen, params, material = chosen_checkpoint(setup), chosen_params(setup, trained), trained.material
    rows = material.answers.rows("held_out")
    say("evaluate", f"{describe(chosen.step, chosen.last)}: {len(rows)} held-out prompts, up to "
                    f"{config.max_new_tokens} tokens, chain of {config.chain_length}")  # fmt: skip
    draft = untrained_draft(setup, material)
    teacher = setup.evaluation.teacher(material.outer, material.vocab, DTYPES["float32"])
    accepted = make_accepted(draft.graphdef, setup.evaluation, draft.frozen, teacher)(params)
    forced = evaluate_teacher_forced(accepted, rows, setup.evaluation, EVALUATION_ROWS)
    decoded = decode_held_out(
        material.target.loaded.model, draft.ready(params), rows, max_new_tokens=config.max_new_tokens,
        chain_length=config.chain_length, end_token=material.answers.eos, num_rows=setup.config.data.rows,
    )  # fmt: skip
    category = {prompt.id: prompt.category for prompt in setup.prompts}
    ids = material.answers.order["held_out"]
    result = summary(rows, [category[id] for id in ids], forced, decoded, config.chain_length)
    best = max(range(len(decoded)), key=lambda i: (len(decoded[i].tokens), -len(decoded[i].yields)))
    pieces = [material.target.tokenizer.decode([token]) for token in decoded[best].tokens]
    sample = {"id": ids[best], "pieces": pieces, "yields": decoded[best].yields}
    result |= {"checkpoint": chosen._asdict(), "sample": sample}
    stage.store(result)
    return result


def _export_stage(setup: Setup) -> Stage:
    inputs = setup.draft_inputs | {"export": setup.config.export.model_dump()}
    return Stage(setup.draft_dir / "export.json", inputs)


def _exported(setup: Setup) -> bool:
    """Whether the serving directory is there, as it was written."""
    stored = _standing(setup, _export_stage(setup))
    return stored is not None and stored["files"] == _digests(setup.draft_dir / "export")


def _digests(directory: Path) -> dict[str, str]:
    """sha256 of every file of a directory."""
    files = sorted(directory.iterdir()) if directory.is_dir() else []
    return {path.name: sha256_of(path) for path in files}


def export_draft(setup: Setup, trained: Trained | None) -> Path:
    """The serving directory.

    Args:
        trained: None where the directory stands.
    """
    directory, stage, config = setup.draft_dir / "export", _export_stage(setup), setup.config
    if _exported(setup):
        say("export", f"done before: {directory}")
        return directory
    assert trained is not None
    params, chosen, material = chosen_params(setup, trained), chosen_checkpoint(setup), trained.material
    say("export", f"{describe(chosen.step, chosen.last)}: {directory}")
    stage.path.unlink(missing_ok=True)
    sizes = draft_config(setup, material.target)
    draft = TrainedDraft(setup.algorithm, setup.architecture, sizes, params, material.vocab)
    export(
        directory, draft, material.target.about, engine=config.export.engine, dtype=config.export.dtype,
        origin=Origin(config.target.path, setup.draft_dir, chosen.step),
    )  # fmt: skip
    stage.store({"checkpoint": chosen._asdict(), "files": _digests(directory)})
    return directory


def report_run(setup: Setup, evaluation: dict[str, Any]) -> Path:
    """report.md and its figures; drawn anew each time, since that takes seconds.

    Raises:
        InputError: the metrics of training are not there any more.
    """
    directory, config = setup.draft_dir / "report", setup.config
    say("report", str(directory))
    sample = evaluation["sample"]
    prompt = next(prompt.prompt for prompt in setup.prompts if prompt.id == sample["id"])
    facts = {
        "target": config.target.path,
        "draft": f"{config.algorithm.name}, {config.draft.architecture}",
        "training": f"{config.train.num_steps} steps of {config.train.batch_size} conversations",
        "checkpoint": describe(evaluation["checkpoint"]["step"], evaluation["checkpoint"]["last"]),
        "held out": f"{evaluation['answers']} prompts, {evaluation['generated_tokens']} tokens of greedy answers",
    }  # fmt: skip
    metrics = read_metrics(setup.draft_dir / "metrics.jsonl")
    if not any(line["kind"] == "held_out" for line in metrics):
        raise InputError(
            f"{setup.draft_dir / 'metrics.jsonl'}: holds no held-out evaluation, it was cut or removed; remove "
            f"{setup.draft_dir} to train anew"
        )
    write_report(directory, evaluation, metrics, (prompt, sample["pieces"], sample["yields"]), facts)
    return directory
