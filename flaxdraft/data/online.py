"""The frozen target reads batches while the draft trains: no features are kept, on disk or in memory.

The target's pass over step n + 1 is started before anybody waits for the draft's step n, so that the device goes from
one to the other without a pause; one prepared example is held, not more.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from flaxdraft.config import DataConfig
from flaxdraft.data.bad_rows import BadRows
from flaxdraft.data.chat_template import ChatTemplate
from flaxdraft.data.conversations import read_conversations
from flaxdraft.data.documents import Conversations
from flaxdraft.data.templates import ChatOptions, render_all
from flaxdraft.progress import CONSOLE
from flaxdraft.targets import OpenedTarget

In = TypeVar("In")
Out = TypeVar("Out")


def one_ahead(items: Iterable[In], prepare: Callable[[In], Out]) -> Iterator[Out]:
    """prepare(item) of each item in order; the next item is prepared before each is handed out.

    `prepare` starts work on the device and returns at once: JAX's dispatch is asynchronous.
    """
    ahead: deque[Out] = deque()
    for item in items:
        ahead.append(prepare(item))
        if len(ahead) > 1:
            yield ahead.popleft()
    yield from ahead


def open_conversations(
    data: DataConfig, opened: OpenedTarget, template: ChatTemplate, answered: bool = False
) -> Conversations:  # fmt: skip
    """The rendered rows of data.conversations; says how many are left out, and how many cut.

    Args:
        answered: see `ChatOptions`.

    Raises:
        InputError: see `templates.render_all`.
    """
    tokenizer, target = opened.needed_tokenizer(with_template=True), opened.config()
    options = ChatOptions(
        data.max_length, data.last_turn_only, data.mask_reasoning, template, target.context, target.vocab_size,
        opened.stop_tokens, answered,
    )  # fmt: skip
    assert data.conversations is not None
    bad = BadRows(data.conversations, data.on_bad_row, "data.on_bad_row=")
    rows = read_conversations(data.conversations, bad)
    rendered = render_all(rows, tokenizer, options, data.max_silent, "data.max_silent", bad)
    if rendered.cut:
        CONSOLE.print(f"  {rendered.cut} conversations cut at {options.limit} tokens")
    if rendered.silent:
        CONSOLE.print(f"  {rendered.silent} conversations left out that supervise nothing")
    return Conversations(rendered.rows, target.vocab_size)
