"""README.md of a serving directory: what the draft is, what its run measured, how it is served."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from flaxdraft.config import BAD_YAML, template_arguments
from flaxdraft.errors import InputError
from flaxdraft.files.json_files import read_record
from flaxdraft.serving.contract import Contract, Engine
from flaxdraft.serving.trained_draft import AboutTarget, Origin, TrainedDraft

NAME = "README.md"
_OURS = "flaxdraft"  # the tag that all our cards have
TEMPLATE = "chat_template_kwargs"  # in the card's metadata, and in requests to SGLang and vLLM
TOKENS = 3  # draft tokens a pass, where nothing was measured


def describe_checkpoint(step: int, last: int) -> str:
    """Which of a run's checkpoints was chosen, for people."""
    return f"step {step}" if step == last else f"step {step} of {last}, the best held-out score"


def model_card(
    draft: TrainedDraft, config: Mapping[str, Any], target: AboutTarget, origin: Origin, takers: Sequence[Engine]
) -> str:
    """
    Args:
        config: config.json of the directory.
        takers: the engines that serve the directory as it is.
    """
    contract: Contract = draft.algorithm.serving()
    inputs = _recorded(origin.run, "inputs.json")
    evaluation = _recorded(origin.run, "evaluation.json").get("result", {})
    measured = evaluation.get("checkpoint", {"step": origin.step, "last": origin.step})
    template = origin.template or inputs.get("data", {}).get("template") or {}
    facts = {
        # A path of this machine says nothing elsewhere.
        "target": f"`{Path(origin.target).name if Path(origin.target).is_absolute() else origin.target}`",
        "draft": contract.describe(config),
        "draft vocabulary": f"{draft.vocab.draft_vocab_size:,} of {draft.vocab.vocab_size:,} tokens",
        "reads the outputs of layers": ", ".join(map(str, target.tap_layers)) + " (0-based)",
        "context": f"{config['max_position_embeddings']:,} tokens",
        "weights": config["torch_dtype"],
    }
    if train := inputs.get("train"):
        facts["training"] = (
            f"{train['num_steps']:,} steps of {train['batch_size']} conversations, learning rate "
            f"{train['learning_rate']:g}, {contract.describe_training(inputs['algorithm'])}"
        )
    if origin.step is not None:
        same = measured["step"] == origin.step
        facts["checkpoint"] = describe_checkpoint(origin.step, measured["last"] if same else origin.step)
    title = f"# {contract.title} draft for {Path(origin.target).name}"
    metadata = [f"tags: [{', '.join((_OURS, *contract.tags))}]"]
    metadata += [f"{TEMPLATE}: {json.dumps(template)}"] * bool(template)
    lines = ["---", *metadata, "---", "", title, ""]
    lines += ["| | |", "|---|---|", *(f"| {name} | {fact} |" for name, fact in facts.items())]
    lines += _figures(evaluation) if measured["step"] == origin.step else []
    for engine in takers:
        command = engine.command(".", evaluation.get("chain_length", TOKENS))
        lines += ["", f"{engine.title}, TARGET being the target's Hugging Face directory:", "", "```", command, "```"]
    if template:
        lines += ["", *advice(template)]
    if not takers:
        lines += ["", "No engine that flaxdraft knows serves this directory as it is."]
    return "\n".join([*lines, ""])


def advice(template: Mapping[str, Any]) -> list[str]:
    """How the target is to be asked where a draft was trained on what its chat template makes of arguments."""
    return ["The draft learned from conversations that the chat template renders with these arguments. Requests must "
            "give the same ones, or it is asked about other texts:", "", "```",
            f'"{TEMPLATE}": {json.dumps(template)}', "```"]  # fmt: skip


def recorded_template(path: Path) -> dict[str, Any] | None:
    """The chat template's arguments that a draft was trained with: by the card of its directory, or by its run's
    folder. None where neither says, as a card by others.

    Raises:
        InputError: the card's metadata are no YAML, or the arguments no mapping.
    """
    for run in (path, path.parent, path.parent.parent):
        data = _recorded(run, "inputs.json").get("data")
        if isinstance(data, dict) and data:
            return dict(data.get("template") or {})
    for card in (path / NAME, path / "export" / NAME):
        if card.is_file():
            return _of_card(card)
    return None


def _of_card(card: Path) -> dict[str, Any] | None:
    head = card.read_text(encoding="utf-8", errors="replace").split("\n---", 1)[0]
    if not head.startswith("---") or (TEMPLATE not in head and _OURS not in head):
        return None
    try:
        metadata = yaml.safe_load(head)
    except BAD_YAML as error:
        raise InputError(f"{card}: the metadata at its beginning are no YAML ({error}); mend them") from error
    metadata = metadata if isinstance(metadata, dict) else {}
    if TEMPLATE not in metadata:
        return {} if _OURS in (metadata.get("tags") or ()) else None
    arguments = metadata[TEMPLATE]
    try:
        return template_arguments(arguments)
    except (ValueError, AttributeError) as error:
        raise InputError(
            f"{card}: {TEMPLATE}: found {arguments!r}, expected a mapping as {{enable_thinking: false}}; correct it"
        ) from error


def _figures(evaluation: Mapping[str, Any]) -> list[str]:
    decoded = evaluation.get("decoded")
    if not decoded:
        return []
    dtype = evaluation.get("dtype", "float32")  # which evaluations of before do not name
    lines = ["", f"Real greedy decoding of {evaluation['answers']} held-out prompts in {dtype}, "
             f"{evaluation['chain_length']} draft tokens a pass: **accept length {decoded['accept_length']:.2f}** "
             "((generated tokens - 1) / target passes; 1 without a draft).", ""]  # fmt: skip
    positions = decoded["acceptance_by_position"]
    lines += ["| draft position | " + " | ".join(str(j + 1) for j in range(len(positions))) + " |"]
    lines += ["|---|" + "---|" * len(positions)]
    lines += ["| accepted | " + " | ".join(f"{value:.3f}" for value in positions) + " |"]
    lines += ["", "| category | accept length |", "|---|---|"]
    return lines + [f"| {name} | {value:.2f} |" for name, value in decoded["accept_length_by_category"].items()]


def evaluation_of(origin: Origin) -> Mapping[str, Any]:
    """What the run measured of the checkpoint; empty where it measured another one, or nothing."""
    result = _recorded(origin.run, "evaluation.json").get("result", {})
    return result if result.get("checkpoint", {}).get("step") == origin.step else {}


def _recorded(run: Path | None, name: str) -> dict[str, Any]:
    """What a JSON file of the run holds; nothing where the file is not there yet."""
    return {} if run is None else read_record(run / name)
