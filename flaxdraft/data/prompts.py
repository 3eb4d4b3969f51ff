"""What a target is asked: prompts from JSONL, rendered by the tokenizer's own chat template.

Two kinds of file: this project's prompts ({id, category, split, prompt}), and MT-bench's questions ({question_id,
category, turns}), whose other fields are left alone. The first line says which it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flaxdraft.data.bad_rows import BadRows
from flaxdraft.data.chat_template import ChatTemplate
from flaxdraft.errors import InputError
from flaxdraft.files.json_files import read_json_lines

SPLITS = ("train", "held_out")
_FIELDS = ("id", "category", "split", "prompt")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One conversation with the target."""

    id: str
    category: str
    split: str  # held_out where the file names none: questions are what a draft is tried on
    turns: tuple[str, ...]  # of the user; the target answers each

    @property
    def first(self) -> list[dict[str, str]]:
        """Messages before the first answer."""
        return [{"role": "user", "content": self.turns[0]}]


def read_prompts(path: str | Path, needed: Sequence[str] = SPLITS, field: str = "data.prompts") -> list[Prompt]:
    """Every line of a prompts file, which has prompts of all splits that are needed.

    Args:
        field: what names the file, for messages.

    Raises:
        InputError: the file is missing or has no prompts; lines are broken, or their ids repeat (all are named).
    """
    found: dict[str, tuple[int, Prompt]] = {}
    bad, parse = BadRows(str(path), field=None), None
    try:
        for number, row in read_json_lines(Path(path), "line", bad.add):
            where = f"{path} line {number}"
            parse = parse or (_question if isinstance(row, dict) and "turns" in row else _prompt)
            try:
                prompt = parse(row, where)
                if prompt.id in found:
                    raise InputError(f"{where}: id {prompt.id!r} stands in line {found[prompt.id][0]} already")
                found[prompt.id] = number, prompt
            except InputError as error:
                bad.add(error)
    except OSError as error:
        raise InputError(f"{field}: cannot read {path} ({error.strerror})") from error
    bad.judge()
    prompts = [prompt for _, prompt in found.values()]
    if not prompts:
        raise InputError(f"{path}: is empty, expected one prompt or question a line")
    for split in needed:
        if not any(prompt.split == split for prompt in prompts):
            raise InputError(f"{path}: no prompt of split {split!r}; expected some of each of: {', '.join(needed)}")
    return prompts


def _prompt(row: Any, where: str) -> Prompt:
    _check_object(row, where)
    for field in _FIELDS:
        if not isinstance(row.get(field), str) or not row[field].strip():
            raise InputError(f"{where}: {field!r}: found {row.get(field)!r}, expected a non-empty string")
    if extra := sorted(set(row) - set(_FIELDS)):
        raise InputError(f"{where}: unknown field {extra[0]!r}; expected {', '.join(_FIELDS)}")
    if row["split"] not in SPLITS:
        raise InputError(f"{where}: 'split': found {row['split']!r}, expected one of {', '.join(SPLITS)}")
    return Prompt(row["id"], row["category"], row["split"], (row["prompt"],))


def _question(row: Any, where: str) -> Prompt:
    _check_object(row, where)
    id, category, turns = row.get("question_id"), row.get("category", "all"), row.get("turns")
    if isinstance(id, bool) or not isinstance(id, (int, str)):
        raise InputError(f"{where}: 'question_id': found {id!r}, expected a number or a string")
    if not isinstance(category, str):
        raise InputError(f"{where}: 'category': found {category!r}, expected a string")
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) and turn.strip() for turn in turns):
        raise InputError(f"{where}: 'turns': found {turns!r}, expected a list of non-empty strings")
    return Prompt(str(id), category, "held_out", tuple(turns))


def _check_object(row: Any, where: str) -> None:
    """
    Raises:
        InputError: a row is none.
    """
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected an object, found {type(row).__name__}")


def render_messages(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], where: str, tools: Sequence[Any] | None = None,
    template: ChatTemplate | None = None,
) -> list[int]:  # fmt: skip
    """Token ids up to and including the assistant's header, where the answer begins.

    Args:
        where: the conversation is from, for messages.
        template: what the chat template is given besides.

    Raises:
        InputError: the chat template refuses the conversation.
    """
    more = {"add_generation_prompt": True, "return_dict": False}
    more |= (template or ChatTemplate()).keywords(tokenizer, tools)
    try:
        return tokenizer.apply_chat_template(list(messages), **more)
    except Exception as error:  # templates raise whatever their author thought of
        raise InputError(f"{where}: the chat template refuses this conversation: {error}") from error


def render_prompts(
    tokenizer: Any, prompts: Sequence[Prompt], max_tokens: int, template: ChatTemplate | None = None
) -> dict[str, list[int]]:
    """The first turns, by id.

    Raises:
        InputError: see `render_messages`; one is longer than data.max_prompt_tokens.
    """
    rendered = {
        prompt.id: render_messages(tokenizer, prompt.first, f"prompt {prompt.id!r}", template=template)
        for prompt in prompts
    }
    for id, tokens in rendered.items():
        if len(tokens) > max_tokens:
            raise InputError(
                f"prompt {id!r} renders to {len(tokens)} tokens, data.max_prompt_tokens is {max_tokens}; "
                "shorten the prompt or raise the limit"
            )
    return rendered


def check_context(num_tokens: int, what: str, limit: int, field: str, context: int) -> None:
    """
    Args:
        num_tokens: of a prompt, and what it is called.
        limit: tokens of an answer, and the field that says so.
        context: the target's.

    Raises:
        InputError: the prompt with its longest answer would leave the context.
    """
    if num_tokens + limit > context:
        raise InputError(
            f"{field}: found {limit}; after {what} ({num_tokens} tokens) that leaves the target's context of {context}"
            f"; expected at most {max(context - num_tokens, 0)}, or leave the prompt out"
        )
