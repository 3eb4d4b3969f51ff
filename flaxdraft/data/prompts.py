"""Prompts from JSONL, rendered by the tokenizer's own chat template."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flaxdraft.errors import InputError
from flaxdraft.files.json_files import read_json_lines

SPLITS = ("train", "held_out")
_FIELDS = ("id", "category", "split", "prompt")


@dataclasses.dataclass(frozen=True)
class Prompt:
    id: str
    category: str
    split: str
    prompt: str


def read_prompts(path: str, needed: Sequence[str] = SPLITS) -> list[Prompt]:
    """Every line of a prompts file, which has prompts of all splits that are needed.

    Raises:
        InputError: the file is missing or has no prompts; a line is broken (its number is given); an id repeats.
    """
    prompts, seen = [], {}
    try:
        for number, row in read_json_lines(Path(path), "line"):
            prompt = _parse(row, f"{path} line {number}")
            if prompt.id in seen:
                raise InputError(f"{path} line {number}: id {prompt.id!r} stands in line {seen[prompt.id]} already")
            seen[prompt.id] = number
            prompts.append(prompt)
    except OSError as error:
        raise InputError(f"data.prompts: cannot read {path} ({error.strerror})") from error
    for split in needed:
        if not any(prompt.split == split for prompt in prompts):
            raise InputError(f"{path}: no prompt of split {split!r}; {' and '.join(needed)} are needed")
    return prompts


def _parse(row: Any, where: str) -> Prompt:
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected an object, found {type(row).__name__}")
    for field in _FIELDS:
        if not isinstance(row.get(field), str) or not row[field].strip():
            raise InputError(f"{where}: {field!r}: found {row.get(field)!r}, expected a non-empty string")
    if extra := sorted(set(row) - set(_FIELDS)):
        raise InputError(f"{where}: unknown field {extra[0]!r}; expected {', '.join(_FIELDS)}")
    if row["split"] not in SPLITS:
        raise InputError(f"{where}: 'split': found {row['split']!r}, expected one of {', '.join(SPLITS)}")
    return Prompt(**row)


def render(tokenizer: Any, prompt: Prompt, max_tokens: int) -> list[int]:
    """Token ids up to and including the assistant's header, where the answer begins.

    Raises:
        InputError: the rendered prompt is longer than data.max_prompt_tokens.
    """
    messages = [{"role": "user", "content": prompt.prompt}]
    tokens = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    if len(tokens) > max_tokens:
        raise InputError(
            f"prompt {prompt.id!r} renders to {len(tokens)} tokens, data.max_prompt_tokens is {max_tokens}; "
            "shorten the prompt or raise the limit"
        )
    return tokens
