"""The stages of a run after training: evaluation, export, report.

Every stage keeps its result under the output directory and is skipped while its inputs stay the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flaxdraft.devices.mesh import Sharding
from flaxdraft.errors import InputError
from flaxdraft.evaluate.during_training import UntrainedDraft
from flaxdraft.evaluate.held_out import decode_held_out, summary
from flaxdraft.evaluate.report import write_report
from flaxdraft.evaluate.walk import EVALUATION_ROWS, evaluate_teacher_forced, make_accepted
from flaxdraft.files.fetch import sha256_of
from flaxdraft.run.run_draft import Run, say
from flaxdraft.serving.export import export
from flaxdraft.serving.trained_draft import AboutTarget, Origin, TrainedDraft
from flaxdraft.stages.claims import Stage
from flaxdraft.train.metrics_log import read_metrics
from flaxdraft.train.state import split_draft


def _digests(directory: Path) -> dict[str, str]:
    """sha256 of every file of a directory."""
    files = sorted(directory.iterdir()) if directory.is_dir() else []
    return {path.name: sha256_of(path) for path in files}


class Results:
    """What a trained draft is worth, and what is left of its run."""

    def __init__(self, run: Run):
        self.run = run

    @property
    def _evaluate_stage(self) -> Stage:
        what = self.run.config.evaluate.model_dump(exclude={"decode_prompts"})  # of training
        inputs = self.run.draft_inputs | {"evaluate": what}
        return Stage(self.run.draft_dir / "evaluation.json", inputs)

    def evaluated(self) -> bool:
        return self._evaluate_stage.load() is not None

    def evaluate(self) -> dict[str, Any]:
        """The held-out result: walked, and decoded for real, both in float32."""
        config, stage = self.run.config.evaluate, self._evaluate_stage
        result = stage.load()
        if result is not None:
            say("evaluate", f"done before: {stage.path}")
            return result
        params, rows = self.run.params, self.run.data_rows["held_out"]
        say("evaluate", f"{len(rows)} held-out prompts, up to {config.max_new_tokens} tokens, chain of "
                         f"{config.chain_length}")  # fmt: skip
        graphdef, _, frozen = split_draft(self.run.make_draft(Sharding.none(), "float32"))
        teacher = self.run.teacher("float32")
        forced = evaluate_teacher_forced(make_accepted(graphdef, self.run.evaluation, frozen, teacher)(params), rows,
                                         self.run.evaluation, EVALUATION_ROWS)  # fmt: skip
        ready = UntrainedDraft(graphdef, frozen, self.run.algorithm.drafter()).ready(params)
        decoded = decode_held_out(
            self.run.target.loaded.model, ready, rows,
            max_new_tokens=config.max_new_tokens, chain_length=config.chain_length,
            end_token=self.run.data()["eos"], num_rows=self.run.config.data.rows,
        )  # fmt: skip
        category = {prompt.id: prompt.category for prompt in self.run.prompts}
        categories = [category[id] for id in self.run.data()["order"]["held_out"]]
        result = summary(rows, categories, forced, decoded, config.chain_length)
        best = max(range(len(decoded)), key=lambda i: (len(decoded[i].tokens), -len(decoded[i].yields)))
        texts = [self.run.target.tokenizer.decode([token]) for token in decoded[best].tokens]
        result["sample"] = {
            "id": self.run.data()["order"]["held_out"][best],
            "pieces": texts,
            "yields": decoded[best].yields,
        }
        stage.store(result)
        return result

    @property
    def _export_stage(self) -> Stage:
        inputs = self.run.draft_inputs | {"export": self.run.config.export.model_dump()}
        return Stage(self.run.draft_dir / "export.json", inputs)

    def exported(self) -> bool:
        """Whether the serving directory is there, as it was written."""
        stored = self._export_stage.load()
        return stored is not None and stored == _digests(self.run.draft_dir / "export")

    def export(self) -> Path:
        """The serving directory."""
        directory, stage = self.run.draft_dir / "export", self._export_stage
        if self.exported():
            say("export", f"done before: {directory}")
            return directory
        params = self.run.params
        say("export", str(directory))
        stage.path.unlink(missing_ok=True)
        run, how = self.run, self.run.config.export
        draft = TrainedDraft(run.algorithm, run.draft_module, run.draft_config(), params, run.vocab)
        about = AboutTarget(run.target.opened.source.config, run.target.config.tap_layers)
        origin = Origin(run.config.target.path, run.draft_dir, None)
        export(directory, draft, about, engine=how.engine, dtype=how.dtype, origin=origin)
        stage.store(_digests(directory))
        return directory

    def report(self, evaluation: dict[str, Any]) -> Path:
        """report.md and its figures; drawn anew each time, since that takes seconds."""
        directory = self.run.draft_dir / "report"
        say("report", str(directory))
        sample = evaluation["sample"]
        prompt = next(prompt.prompt for prompt in self.run.prompts if prompt.id == sample["id"])
        size = self.run.start.vocab.draft_vocab_size if self.run.start else self.run.config.draft.draft_vocab_size
        facts = {
            "target": self.run.config.target.path,
            "draft": f"{self.run.config.draft.architecture}, vocabulary {size}",
            "training": f"{self.run.config.train.num_steps} steps of {self.run.config.train.batch_size} conversations, "
                        f"{self.run.config.algorithm.name}",
            "held out": f"{evaluation['answers']} prompts, {evaluation['generated_tokens']} tokens of greedy answers",
        }  # fmt: skip
        metrics = read_metrics(self.run.draft_dir / "metrics.jsonl")
        if not any(line["kind"] == "held_out" for line in metrics):
            raise InputError(
                f"{self.run.draft_dir / 'metrics.jsonl'}: holds no held-out evaluation, it was cut or removed; remove "
                f"{self.run.draft_dir} to train anew"
            )
        write_report(directory, evaluation, metrics, (prompt, sample["pieces"], sample["yields"]), facts)
        return directory
