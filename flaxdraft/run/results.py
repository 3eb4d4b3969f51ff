"""The stages after training: evaluation, export, report, all of the checkpoint that `export.step` chooses.

Every stage keeps its result under the output directory and is skipped while its inputs stay the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
from flax import nnx

from flaxdraft.decode.decoding import Settings
from flaxdraft.devices import hosts
from flaxdraft.errors import InputError
from flaxdraft.evaluate.loading import PairedDraft
from flaxdraft.evaluate.measure import Guess, Session, measure
from flaxdraft.evaluate.report import Sample, write_report
from flaxdraft.evaluate.results import guess_results, sample_of
from flaxdraft.files.fetch import sha256_of
from flaxdraft.run.draft import draft_config
from flaxdraft.run.saying import say
from flaxdraft.run.setup import Setup
from flaxdraft.run.training import Trained, untrained_draft
from flaxdraft.serving.card import describe_checkpoint
from flaxdraft.serving.export import export
from flaxdraft.serving.trained_draft import Origin, TrainedDraft
from flaxdraft.stages.claims import Stage
from flaxdraft.train.checkpoint import DamagedError, load_params
from flaxdraft.train.chosen import Chosen, choose
from flaxdraft.train.metrics_log import read_metrics
from flaxdraft.train.resume import goes_back


def chosen_checkpoint(setup: Setup) -> Chosen:
    """The checkpoint that all of this is about, as one process sees it; the records of all are read for it."""
    config = setup.config
    return choose(setup.draft_dir / "checkpoints", config.export.step, config.train.num_steps)


def finished(setup: Setup) -> bool:
    """Whether all is there and stands, so that nothing has to be trained.

    Raises:
        InputError: see `goes_back`.
    """
    if goes_back(setup.config.train.resume, setup.draft_dir / "checkpoints"):
        return False
    chosen = chosen_checkpoint(setup)
    return _standing(_evaluation_stage(setup), chosen) is not None and _exported(setup, chosen)


def _standing(stage: Stage, chosen: Chosen) -> dict[str, Any] | None:
    """What a stage stored, where it is of the chosen checkpoint; also where the checkpoints were removed since."""
    stored = stage.load()
    if stored is None or (chosen.sha256 is not None and stored["checkpoint"] != chosen._asdict()):
        return None
    return stored


def chosen_params(setup: Setup, trained: Trained, chosen: Chosen) -> nnx.State:
    """Of a checkpoint, which is read once, on one device.

    Raises:
        InputError: the checkpoint is damaged.
    """
    if chosen.step == chosen.last:
        return trained.params
    if chosen.step in trained.earlier:
        return trained.earlier[chosen.step]
    path = setup.draft_dir / "checkpoints" / str(chosen.step)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), trained.params)
    try:
        trained.earlier[chosen.step], _ = load_params(path, like)
    except DamagedError as error:
        raise InputError(
            f"{path}: the best checkpoint cannot be read ({error}); take the last one (export.step=latest)"
        ) from error
    return trained.earlier[chosen.step]


RESULT = 2  # what an evaluation holds; one of before, which was without the target alone, is made anew


def _evaluation_inputs(setup: Setup) -> dict[str, Any]:
    what = setup.config.evaluate.model_dump(exclude={"decode_prompts"})  # of training
    return setup.draft_inputs | {"evaluate": what, "export": {"step": setup.config.export.step}, "result": RESULT}


def _evaluation_stage(setup: Setup) -> Stage:
    return Stage(setup.draft_dir / "evaluation.json", _evaluation_inputs(setup))


def evaluate_draft(setup: Setup, chosen: Chosen, trained: Trained | None) -> dict[str, Any]:
    """The held-out result, in the target's dtype: what the evaluate command finds for one chain, of the run's own
    held-out prompts. Batches that were decoded before a stop are not decoded again. All processes of the run decode,
    and the first one keeps the result.

    Args:
        trained: None where the result stands.
    """
    config, stage = setup.config.evaluate, _evaluation_stage(setup)
    result = hosts.agree(_standing(stage, chosen))
    if result is not None:
        say("evaluate", f"done before: {stage.path}")
        return result
    assert trained is not None
    material = trained.material
    prompts = [prompt for prompt in setup.prompts if prompt.split == "held_out"]
    say("evaluate", f"{describe_checkpoint(chosen.step, chosen.last)}: {len(prompts)} held-out prompts, up to "
                    f"{config.max_new_tokens} tokens, chain of {config.chain_length}")  # fmt: skip
    untrained, target = untrained_draft(setup, material), material.target
    params = untrained.trained(chosen_params(setup, trained, chosen))
    draft = PairedDraft(setup.evaluation, untrained.graphdef, params, untrained.frozen, material.vocab)
    session = Session(
        target.loaded.model, draft, target.tokenizer, Settings(config.max_new_tokens, 0, tuple(material.answers.stops)),
        "evaluate.max_new_tokens", min(setup.config.data.rows, len(prompts)), template=target.template,
    )  # fmt: skip
    # Batches that a stopped run decoded on other devices were timed there.
    where = {name: size for name, size in (setup.target_mesh.shape if setup.target_mesh else {}).items() if size > 1}
    inputs = _evaluation_inputs(setup) | {"checkpoint": chosen._asdict(), "target_mesh": where}
    guess = Guess(config.chain_length)
    runs = measure(session, prompts, [guess], [0], setup.draft_dir / "evaluation", inputs)
    (result,) = guess_results(session, prompts, [guess], runs)
    result |= {"checkpoint": chosen._asdict(), "sample": sample_of(session, runs[-1]), "dtype": setup.target_dtype}
    if hosts.is_main():
        stage.store(result)
    return result


def _export_stage(setup: Setup) -> Stage:
    inputs = _evaluation_inputs(setup) | {"export": setup.config.export.model_dump()}  # its card shows the evaluation
    return Stage(setup.draft_dir / "export.json", inputs)


def _exported(setup: Setup, chosen: Chosen) -> bool:
    """Whether the serving directory is there, as it was written."""
    stored = _standing(_export_stage(setup), chosen)
    return stored is not None and stored["files"] == _digests(setup.draft_dir / "export")


def _digests(directory: Path) -> dict[str, str]:
    """sha256 of every file of a directory."""
    files = sorted(directory.iterdir()) if directory.is_dir() else []
    return {path.name: sha256_of(path) for path in files}


def export_draft(setup: Setup, chosen: Chosen, trained: Trained | None) -> Path:
    """The serving directory.

    Args:
        trained: None where the directory stands.
    """
    directory, stage, config = setup.draft_dir / "export", _export_stage(setup), setup.config
    if _exported(setup, chosen):
        say("export", f"done before: {directory}")
        return directory
    assert trained is not None
    material = trained.material
    params = chosen_params(setup, trained, chosen)
    say("export", f"{describe_checkpoint(chosen.step, chosen.last)}: {directory}")
    stage.path.unlink(missing_ok=True)
    target = material.target
    draft = TrainedDraft(setup.algorithm, setup.architecture, draft_config(setup, target), params, material.vocab)
    origin = Origin(config.target.path, setup.draft_dir, chosen.step)
    export(directory, draft, target.about, dtype=config.export.dtype, engine=config.engine, origin=origin)
    stage.store({"checkpoint": chosen._asdict(), "files": _digests(directory)})
    return directory


def report_run(setup: Setup, evaluation: dict[str, Any]) -> Path:
    """report.md and its figures; drawn anew each time, since that takes seconds.

    Raises:
        InputError: the metrics of training are not there any more.
    """
    directory, config = setup.draft_dir / "report", setup.config
    say("report", str(directory))
    metrics = read_metrics(setup.draft_dir / "metrics.jsonl")
    untrained = next((line for line in metrics if line["kind"] == "held_out"), None)
    if untrained is None:
        raise InputError(
            f"{setup.draft_dir / 'metrics.jsonl'}: holds no held-out evaluation, it was cut or removed; remove "
            f"{setup.draft_dir} to train anew"
        )
    facts = {
        "target": config.target.path,
        "draft": f"{config.algorithm.name}, {config.draft.architecture}",
        "training": f"{config.train.num_steps} steps of {config.train.batch_size} conversations",
        "checkpoint": describe_checkpoint(evaluation["checkpoint"]["step"], evaluation["checkpoint"]["last"]),
        "held out": f"{evaluation['answers']} prompts, {evaluation['generated_tokens']} tokens of greedy answers",
        "before training": f"accept length {untrained['accept_length']:.3f} (walked)",
    }  # fmt: skip
    sample = evaluation["sample"]
    prompt = next(prompt.turns[0] for prompt in setup.prompts if prompt.id == sample["id"])
    write_report(directory, facts, [evaluation], metrics, Sample(prompt, sample["pieces"], sample["yields"]))
    return directory
