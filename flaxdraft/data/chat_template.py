"""A tokenizer's chat template with all that it is given beside the conversation: arguments, and the date it may write.

Templates read arguments of their own (`enable_thinking`), and some write the day (`strftime_now`). Both decide what a
target reads, so that both are inputs of whatever is made with them: they are chosen once, recorded, and given to the
template at every call. A tokenizer may hold several templates by name; conversations with tools take `tool_use` where
there is one, all others `default`, as transformers chooses.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from flaxdraft.errors import InputError
from flaxdraft.files.template_text import CLOCK

# What apply_chat_template gives to a template, or takes for itself.
_TAKEN = (
    "messages", "conversation", "tools", "documents", "add_generation_prompt", "continue_final_message", "tokenize",
    "padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask",
    "sanitize_control_tokens", "tokenizer_kwargs", "chat_template", CLOCK, "strftime_codes",
)  # fmt: skip
# transformers lets no function into a template, so that the clock is one of the template's own. The line's end is the
# block's, which swallows it.
_STOPPED_CLOCK = (
    "{% macro strftime_now(format) %}{% set ns = namespace(text=format) %}{% for code in strftime_codes %}"
    "{% set ns.text = ns.text.replace(code, strftime_codes[code]) %}{% endfor %}{{ ns.text }}{% endmacro %}\n"
)
_LETTERS = "aAwdbBmyYHIpPMSfzZjUWcxXGgCuVDFeRrTkhlsnt"


def now() -> str:
    """This minute, as it is recorded."""
    return datetime.now().isoformat(timespec="minutes")


@dataclasses.dataclass(frozen=True, eq=False)
class ChatTemplate:
    """What a template is given beside conversations."""

    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    date: str = dataclasses.field(default_factory=now)  # in ISO's form

    def text(self, tokenizer: Any, tools: Any) -> str | None:
        """The template's own text; None where there is none.

        Raises:
            InputError: there are several, and none for such conversations.
        """
        held = getattr(tokenizer, "chat_template", None)
        if not isinstance(held, dict):
            return held
        name = "tool_use" if tools is not None and "tool_use" in held else "default"
        if name not in held:
            raise InputError(
                f"the tokenizer has several chat templates ({', '.join(sorted(held))}) and none is called 'default'; "
                "rename one of them in its tokenizer_config.json, or in additional_chat_templates/"
            )
        return held[name]

    def keywords(self, tokenizer: Any, tools: Sequence[Any] | None) -> dict[str, Any]:
        """Keyword arguments for `apply_chat_template`.

        Raises:
            InputError: see `text`.
        """
        text, more = self.text(tokenizer, tools), {"tools": None if tools is None else list(tools), **self.arguments}
        if isinstance(text, str) and CLOCK in text:
            more |= {"chat_template": _STOPPED_CLOCK + text, "strftime_codes": self._codes()}
        return more

    def _codes(self) -> dict[str, str]:
        moment = datetime.fromisoformat(self.date)
        codes = [f"%{dash}{letter}" for dash in ("-", "") for letter in _LETTERS]
        return {code: moment.strftime(code) for code in codes} | {"%%": "%"}

    def writes_date(self, tokenizer: Any) -> bool:
        return any(CLOCK in text for text in _all(tokenizer))

    def check(self, tokenizer: Any, field: str) -> None:
        """
        Args:
            field: where the arguments were given, for messages.

        Raises:
            InputError: there is no template for plain conversations; it is not told of such an argument, or knows none
                of that name.
        """
        self.text(tokenizer, None)
        for name in self.arguments:
            if name in _TAKEN:
                raise InputError(f"{field}: {name!r} is no argument of a template's own; leave it out")
            if not any(re.search(rf"\b{re.escape(name)}\b", text) for text in _all(tokenizer)):
                raise InputError(f"{field}: the target's chat template knows no {name!r}; correct it, or leave it out")


def _all(tokenizer: Any) -> list[str]:
    held = getattr(tokenizer, "chat_template", None)
    return [*held.values()] if isinstance(held, dict) else [held or ""]
