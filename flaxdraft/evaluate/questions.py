"""What a draft is tried on: conversations of one or several user turns, which the target answers.

Two kinds of JSONL: this project's prompts ({id, category, split, prompt}), and MT-bench's questions ({question_id,
category, turns}), whose other fields are left alone.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from flaxdraft.data.prompts import SPLITS, read_prompts
from flaxdraft.errors import InputError


@dataclasses.dataclass(frozen=True)
class Question:
    id: str
    category: str
    turns: tuple[str, ...]


def read_questions(path: Path, split: str | None) -> list[Question]:
    """Every question of a file.

    Args:
        split: of a prompts file, the prompts to take; None takes all.

    Raises:
        InputError: the file is missing or empty, a line is broken (its number is given), or an id repeats.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"prompts: cannot read {path} ({getattr(error, 'strerror', None) or error})") from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise InputError(f"{path}: is empty, expected one prompt or question a line")
    if "turns" not in _object(numbered[0][1], f"{path} line {numbered[0][0]}"):
        if split is not None and split not in SPLITS:
            raise InputError(f"split: found {split!r}, expected one of {', '.join(SPLITS)}")
        prompts = read_prompts(str(path), () if split is None else (split,))
        return [Question(p.id, p.category, (p.prompt,)) for p in prompts if split in (None, p.split)]
    questions, seen = [], {}
    for number, line in numbered:
        question = _question(_object(line, f"{path} line {number}"), f"{path} line {number}")
        if question.id in seen:
            raise InputError(
                f"{path} line {number}: question_id {question.id} stands in line {seen[question.id]} already"
            )
        seen[question.id] = number
        questions.append(question)
    return questions


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not valid JSON ({error})") from error
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected an object, found {type(row).__name__}")
    return row


def _question(row: dict[str, Any], where: str) -> Question:
    id, category, turns = row.get("question_id"), row.get("category", "all"), row.get("turns")
    if isinstance(id, bool) or not isinstance(id, (int, str)):
        raise InputError(f"{where}: 'question_id': found {id!r}, expected a number or a string")
    if not isinstance(category, str):
        raise InputError(f"{where}: 'category': found {category!r}, expected a string")
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) and turn.strip() for turn in turns):
        raise InputError(f"{where}: 'turns': found {turns!r}, expected a list of non-empty strings")
    return Question(str(id), category, tuple(turns))
