"""How commands are told what a chat template is given, and how rows become tokens: the same options everywhere."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from flaxdraft.config import BAD_YAML, iso_date, template_arguments
from flaxdraft.errors import InputError
from flaxdraft.files.json_files import read_record
from flaxdraft.run.commands import at_least

if TYPE_CHECKING:
    from flaxdraft.data.bad_rows import BadRows
    from flaxdraft.data.chat_template import ChatTemplate
    from flaxdraft.data.templates import ChatOptions
    from flaxdraft.targets import OpenedTarget


def add_template_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--template", type=_argument, action="append", default=[], metavar="NAME=VALUE",
        help="an argument of the chat template, as enable_thinking=false; may be given again",
    )  # fmt: skip
    parser.add_argument(
        "--date",
        help="the date that the chat template writes, as 2026-01-31; if left out, the recorded one or today's",
    )  # fmt: skip


def add_row_options(parser: argparse.ArgumentParser) -> None:
    """Adds the template's options, too."""
    add_template_options(parser)
    parser.add_argument("--max-length", type=at_least(8), default=4096, help="tokens, where rows are cut")
    parser.add_argument("--last-turn-only", action="store_true", help="supervise the last assistant turn alone")
    parser.add_argument("--mask-reasoning", action="store_true", help="leave out what stands in <think> tags")
    add_bad_row_option(parser)


def add_bad_row_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--on-bad-row", choices=("stop", "skip"), default="stop", help="where a row cannot be used")


def _argument(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    wrong = argparse.ArgumentTypeError(f"found {text!r}, expected NAME=VALUE as in enable_thinking=false")
    if not equals or not name.isidentifier():
        raise wrong
    try:
        parsed = yaml.safe_load(value)
    except BAD_YAML as error:
        raise wrong from error
    try:
        return name, template_arguments({name: parsed})[name]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def template_of(
    arguments: argparse.Namespace, tokenizer: Any, record: Path | None = None, date: str | None = None
) -> ChatTemplate:  # fmt: skip
    """The chat template with its arguments and its date, which all processes of a command get from the first one.

    Args:
        record: a JSON file in which an earlier call recorded its `date`, which then holds.
        date: that holds where neither says one; None: this minute.

    Raises:
        InputError: the template knows no such argument, or the date is none.
    """
    from flaxdraft.data.chat_template import ChatTemplate, now
    from flaxdraft.devices import hosts

    try:
        chosen = iso_date(arguments.date or hosts.agree(recorded_date(record) or date or now()))
    except ValueError as error:
        raise InputError(f"--date: found {arguments.date!r}; {error}") from error
    template = ChatTemplate(dict(arguments.template), chosen)
    template.check(tokenizer, "--template")
    return template


def template_of_rows(arguments: argparse.Namespace, tokenizer: Any, record: Path | None = None) -> ChatTemplate:
    """As `template_of`, for commands that render a file of rows. Where the target answered the file, the arguments and
    the date that were recorded then hold here, too.

    Raises:
        InputError: see `template_of`; the file was answered with other arguments, or on another date.
    """
    from flaxdraft.run.dates import answers_of, check_answered_with, check_date

    file = str(arguments.file)
    date = answers_of(file).get("date")
    check_answered_with(file, dict(arguments.template), "--template")
    check_date(arguments.date, date, "--date", file)
    return template_of(arguments, tokenizer, record, date)


def recorded_date(record: Path | None) -> str | None:
    date = None if record is None else read_record(record).get("date")
    return date if isinstance(date, str) else None


def template_inputs(template: ChatTemplate, tokenizer: Any) -> dict[str, Any]:
    """What a folder records of a template."""
    return {"template": dict(template.arguments)} | (
        {"date": template.date} if template.writes_date(tokenizer) else {}
    )  # fmt: skip


def chat_options(arguments: argparse.Namespace, opened: OpenedTarget, template: ChatTemplate) -> ChatOptions:
    """How rows become tokens that this target reads."""
    from flaxdraft.data.templates import ChatOptions
    from flaxdraft.run.dates import answers_of

    config = opened.config()
    return ChatOptions(
        arguments.max_length, arguments.last_turn_only, arguments.mask_reasoning, template, config.context,
        config.vocab_size, opened.stop_tokens, bool(answers_of(str(arguments.file))),
    )  # fmt: skip


def bad_rows(arguments: argparse.Namespace) -> BadRows:
    from flaxdraft.data.bad_rows import BadRows

    return BadRows(str(arguments.file), arguments.on_bad_row)
