"""README.md of a serving directory: what the draft is, what its run measured, how it is served."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from flaxdraft.algorithms.eagle3.serving import layer_ids
from flaxdraft.algorithms.eagle3.serving.contract import SWITCHES, engines, kind_of
from flaxdraft.serving import lint
from flaxdraft.serving.view import DraftView


class Origin(NamedTuple):
    """Where a draft is from."""

    target: str  # the target's address
    run: Path | None  # the folder of its run; what that recorded of data, training and evaluation is shown
    step: int | None  # of the run's checkpoint; figures of another one are left out


def describe(step: int, last: int) -> str:
    """Which checkpoint was chosen, for people."""
    return f"step {step}" if step == last else f"step {step} of {last}, the best held-out score"


def model_card(view: DraftView, origin: Origin) -> str:
    """
    Args:
        view: of the directory, which is about to be written.
    """
    config, (target, run, step) = view.config, origin
    kind = {"llama": "Llama", "mla": "DeepSeek-MLA"}[kind_of(config)]
    switched = [name for name in SWITCHES if config.get(name)]
    facts = {
        # A path of this machine says nothing elsewhere.
        "target": f"`{Path(target).name if Path(target).is_absolute() else target}`",
        "draft": f"EAGLE-3, one {kind} layer of width {config['hidden_size']}"
                 + (f", {' and '.join(switched)}" if switched else ""),
        "draft vocabulary": f"{config['draft_vocab_size']:,} of {config['vocab_size']:,} tokens",
        "reads the outputs of layers": ", ".join(str(layer - 1) for layer in config[layer_ids.NAME]) + " (0-based)",
        "context": f"{config['max_position_embeddings']:,} tokens",
        "weights": config["torch_dtype"],
    }  # fmt: skip
    inputs, evaluation = _recorded(run, "inputs.json"), _recorded(run, "evaluation.json").get("result", {})
    if train := inputs.get("train"):
        facts["training"] = (
            f"{train['num_steps']:,} steps of {train['batch_size']} conversations, learning rate "
            f"{train['learning_rate']:g}, {inputs['algorithm']['ttt_length']} unroll steps, "
            f"{inputs['algorithm']['objective']}"
        )
    measured = evaluation.get("checkpoint", {"step": step, "last": step})
    if step is not None:
        facts["checkpoint"] = describe(step, measured["last"] if measured["step"] == step else step)
    lines = ["---", "tags: [eagle3, speculative-decoding]", "---", "", f"# EAGLE-3 draft for {Path(target).name}", ""]
    lines += ["| | |", "|---|---|", *(f"| {name} | {fact} |" for name, fact in facts.items())]
    lines += _figures(evaluation) if measured["step"] == step else []
    lines += _commands(view, evaluation.get("chain_length", 3))
    return "\n".join([*lines, ""])


def _commands(view: DraftView, chain_length: int) -> list[str]:
    """Of each engine that serves the directory as it is."""
    takers = [engine for engine in engines().values() if engine.serves
              and all(finding.level == "note" for finding in lint.of_engine(engine, view))]  # fmt: skip
    lines = []
    for engine in takers:
        lines += ["", f"{engine.title}, TARGET being the target's Hugging Face directory:", "", "```"]
        lines += [engine.command(".", chain_length), "```"]
    return lines or ["", "No engine that flaxdraft knows serves this directory as it is."]


def _figures(evaluation: Mapping[str, Any]) -> list[str]:
    decoded = evaluation.get("decoded")
    if not decoded:
        return []
    lines = ["", f"Real greedy decoding of {evaluation['answers']} held-out prompts in float32, "
             f"{evaluation['chain_length']} draft tokens a pass: **accept length {decoded['accept_length']:.2f}** "
             "((generated tokens - 1) / target passes; 1 without a draft).", ""]  # fmt: skip
    positions = decoded["acceptance_by_position"]
    lines += ["| draft position | " + " | ".join(str(j + 1) for j in range(len(positions))) + " |"]
    lines += ["|---|" + "---|" * len(positions)]
    lines += ["| accepted | " + " | ".join(f"{value:.3f}" for value in positions) + " |"]
    lines += ["", "| category | accept length |", "|---|---|"]
    return lines + [f"| {name} | {value:.2f} |" for name, value in decoded["accept_length_by_category"].items()]


def _recorded(run: Path | None, name: str) -> dict[str, Any]:
    """Nothing where the run holds no such file yet."""
    if run is None or not (run / name).exists():
        return {}
    return json.loads((run / name).read_text(encoding="utf-8"))
