"""A conversation with all that its chat template is given, and what the template makes of it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

from jinja2.exceptions import SecurityError, TemplateError

from flaxdraft.data.chat_template import ChatTemplate
from flaxdraft.errors import InputError

Span = tuple[int, int]


class Refused(InputError):
    """The template refuses some messages."""


REFUSALS = (
    TemplateError, SecurityError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError,
)  # fmt: skip
_MARKS = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


@dataclasses.dataclass(frozen=True)
class Chat:
    """A conversation with what its chat template is given."""

    tokenizer: Any
    template: ChatTemplate
    where: str  # for messages
    messages: Sequence[dict[str, Any]]
    tools: Sequence[dict[str, Any]] | None
    stops: tuple[str, ...] = ()  # what ends an answer, as text

    def text(self, messages: Sequence[dict[str, Any]], prompt: bool = False) -> str:
        """Renders some messages, with the generation prompt behind them where it is asked for.

        Raises:
            Refused: by the template.
        """
        return self._call(self._apply, messages, add_generation_prompt=prompt)

    def marks(self) -> list[Span] | None:
        """What the template marks as generated; None where it has no marks."""
        if not _MARKS.search(self.template.text(self.tokenizer, self.tools) or ""):
            return None
        return self._call(self._tracked, self.messages)

    def _call(self, render: Callable, *args: Any, **options: Any) -> Any:
        try:
            return render(*args, **options)
        except REFUSALS as error:
            raise Refused(f"{self.where}: the chat template refuses this conversation: {error}") from error

    def _apply(self, messages, **options) -> str:
        keywords = self.template.keywords(self.tokenizer, self.tools)
        return self.tokenizer.apply_chat_template([*messages], tokenize=False, **options, **keywords)

    def _tracked(self, messages) -> list[Span]:
        from transformers.utils.chat_template_utils import render_jinja_template  # the import takes seconds

        keywords = {"chat_template": self.template.text(self.tokenizer, self.tools)}
        keywords |= self.tokenizer.special_tokens_map | self.template.keywords(self.tokenizer, self.tools)
        # Its return type is that of its first versions.
        found: Any = render_jinja_template([[*messages]], return_assistant_tokens_mask=True, **keywords)
        return [(begin, end) for begin, end in found[1][0]]
