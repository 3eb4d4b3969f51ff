"""The date that a run's chat template writes: chosen when the run starts, recorded in its folders, and kept."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flaxdraft.config import RunConfig
from flaxdraft.data.chat_template import now
from flaxdraft.data.store import FeatureStore
from flaxdraft.devices import hosts
from flaxdraft.errors import InputError
from flaxdraft.files.fetch import fetch
from flaxdraft.files.json_files import read_record
from flaxdraft.files.template_text import may_write_date
from flaxdraft.stages.claims import RECORD


def dated(config: RunConfig) -> RunConfig:
    """The configuration with `data.date`: the given one; else the one recorded by the run that is continued; else that
    of the store or answers it trains on; else this minute. All processes get that of the first one.

    It stays unset where the template writes none, and where an earlier version made the folders: nobody knows the day.

    Raises:
        InputError: there is no such target or store.
    """
    if config.data.date is not None or not may_write_date(fetch(config.target.path, config.target.sha256)):
        return config
    date = hosts.agree(_recorded(config))
    return config.model_copy(update={"data": config.data.model_copy(update={"date": date})})


def _recorded(config: RunConfig) -> str | None:
    for directory in (Path(config.output_dir) / "data", config.draft_dir):
        if found := read_record(directory / RECORD):  # what is damaged is refused when the folder is claimed
            data = found.get("data")
            return data.get("date") if isinstance(data, dict) else None
    stored = None if config.data.store is None else FeatureStore(config.data.store).date
    return stored or answers_of(config.data.conversations).get("date") or now()


def check_answered_with(file: str, arguments: Mapping[str, Any], field: str) -> None:
    """Refuses other arguments of the chat template than the target answered a file with.

    Args:
        file: of conversations.
        arguments: of the chat template, and the field that they were given in.

    Raises:
        InputError: the target answered the file with other ones.
    """
    answered = answers_of(file).get("template", arguments)
    if answered != arguments:
        raise InputError(
            f"{field}: found {arguments}, the target answered {file} with {answered}; give the same, or let it answer "
            "again"
        )


def check_date(date: str | None, recorded: str | None, field: str, made: str) -> None:
    """Refuses another date than the recorded one.

    Args:
        recorded: the date that the conversations were rendered with, if any, and what was `made` of them.

    Raises:
        InputError: another one was given.
    """
    if None not in (date, recorded) and date != recorded:
        raise InputError(f"{field}: found {date}, {made} is of {recorded}; give that one, or leave it out")


def answers_of(conversations: str | None) -> dict[str, Any]:
    """What `python -m flaxdraft.data regenerate` recorded beside the conversations that it wrote; nothing where
    somebody else did."""
    if conversations is None:
        return {}
    found = read_record(Path(conversations).expanduser().parent / RECORD)
    return found if "max_new_tokens" in found else {}
