"""Whole runs of the training command on a tiny target: what they are started with, how, and what they log."""

import json
from pathlib import Path

import yaml
from tiny import write_prompts

from flaxdraft.train.__main__ import main


def make_workspace(root: Path, target: Path) -> Path:
    """Prompts and `run.yaml` of a run that takes seconds; a target answers the prompts in a first stage."""
    write_prompts(root / "prompts.jsonl", num_train=10, num_held_out=4)
    config = {
        "output_dir": str(root / "out"),
        "target": {"path": str(target)},
        "data": {"prompts": str(root / "prompts.jsonl"), "max_answer_tokens": 12, "rows": 4},
        "draft": {"draft_vocab_size": 64},
        "algorithm": {"ttt_length": 3},
        "train": {
            "num_steps": 8, "batch_size": 4, "learning_rate": 2e-3, "compute_dtype": "float32", "log_every": 2,
            "eval_every": 4, "checkpoint_every": 3,
        },
        "evaluate": {"max_new_tokens": 10, "chain_length": 3},
        "export": {"dtype": "float32"},
    }  # fmt: skip
    (root / "run.yaml").write_text(yaml.safe_dump(config))
    return root


def call(root: Path, *overrides: str) -> int:
    """The command's exit code."""
    return main(["--config", str(root / "run.yaml"), *overrides])


def metrics(draft_dir: Path, kind: str | None = None) -> list[dict]:
    """The lines of metrics.jsonl, or those of one kind."""
    lines = map(json.loads, (draft_dir / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if kind in (None, line["kind"])]
