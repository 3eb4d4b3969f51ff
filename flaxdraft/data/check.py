"""What a file of conversations would teach a draft of a target: looked at whole, before anything is computed.

`check` renders every row as training would and gathers what a person wants to know of the file; `as_table` says it in
one table, `draw_lengths` shows the lengths.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.table import Table
from rich.text import Text

from flaxdraft.data.bad_rows import BadRows
from flaxdraft.data.conversations import Conversation
from flaxdraft.data.draft_vocabulary import coverage_by_size
from flaxdraft.data.reasoning import CLOSE
from flaxdraft.data.templates import ChatOptions, render_with_text
from flaxdraft.errors import InputError

_BAR = 30  # characters of the longest bar
_DROPPED_REASONING = "reasoning of an assistant"


@dataclasses.dataclass
class Found:
    """What was found in one file."""

    bad: BadRows
    lengths: list[int] = dataclasses.field(default_factory=list)  # of rows, as training would see them
    supervised: int = 0
    silent: list[str] = dataclasses.field(default_factory=list)  # rows that supervise nothing
    cut: list[str] = dataclasses.field(default_factory=list)
    unended: list[str] = dataclasses.field(default_factory=list)  # rows with a turn behind which the target goes on
    dropped: dict[str, list[str]] = dataclasses.field(default_factory=dict)  # what a template leaves out, and of whom
    counts: Counter[int] = dataclasses.field(default_factory=Counter)  # of supervised tokens

    @property
    def num_rows(self) -> int:
        return len(self.lengths) + len(self.bad.messages)

    def wrong(self, max_silent: float) -> bool:
        """Whether training would refuse the file, or learn from it what the target would not say."""
        lost = any(kind != _DROPPED_REASONING for kind in self.dropped)
        silent = len(self.silent) > max_silent * max(len(self.lengths), 1) or not self.supervised
        bad = bool(self.bad.messages) and self.bad.policy == "stop"
        return bad or lost or silent


def check(
    conversations: Iterable[Conversation], tokenizer: Any, options: ChatOptions, stop_tokens: Sequence[int],
    bad: BadRows,
) -> Found:  # fmt: skip
    """Renders every row as training would and gathers what was found.

    Args:
        stop_tokens: that end an answer of the target.
        bad: of the file; is given the rows that cannot be rendered, too.
    """
    found = Found(bad)
    for conversation in conversations:
        try:
            rendered, text = render_with_text(tokenizer, conversation, options)
        except InputError as error:
            bad.add(error)
            continue
        supervised = rendered.tokens[rendered.assistant]
        found.lengths.append(len(rendered.tokens))
        found.supervised += len(supervised)
        found.counts.update(supervised.tolist())
        if not len(supervised):
            found.silent.append(conversation.where)
        if rendered.num_cut:
            found.cut.append(conversation.where)
        ends = rendered.tokens[:-1][rendered.assistant[:-1] & ~rendered.assistant[1:]]
        if rendered.assistant[-1:].any() and not rendered.num_cut:
            ends = np.append(ends, rendered.tokens[-1])
        if not np.isin(ends, stop_tokens).all():
            found.unended.append(conversation.where)
        for kind in _dropped(conversation, text):
            found.dropped.setdefault(kind, []).append(conversation.where)
    return found


def _dropped(conversation: Conversation, text: str) -> set[str]:
    """What the template does not write of the messages. What one says may stand in what others say, too: it is written
    where it stands in the text as often as in all messages together."""
    kinds, said = set(), "\0".join(map(_answer, conversation.messages))

    def written(part: str) -> bool:
        escaped = json.dumps(part, ensure_ascii=False)[1:-1]  # some write a tool's result as JSON text
        found = text.count(part) + (text.count(escaped) if escaped != part else 0)
        return not part or found >= max(said.count(part), 1)

    for message in conversation.messages:
        content, role, answer = message["content"].strip(), message["role"], _answer(message)
        if not written(answer):
            kinds.add(f"what {'an assistant' if role == 'assistant' else f'a {role}'} says")
        elif not written(content):
            kinds.add(_DROPPED_REASONING)
        for name in ("reasoning_content", "reasoning", "thinking"):
            if isinstance(message.get(name), str) and message[name].strip() not in text:
                kinds.add(_DROPPED_REASONING)
    return kinds


def _answer(message: Mapping[str, Any]) -> str:
    """What a message says without the reasoning before it, which templates may leave out."""
    content = message["content"]
    return (content.rpartition(CLOSE)[2] if message["role"] == "assistant" else content).strip()


def as_table(found: Found, special: Sequence[int], vocab_size: int, limit: int) -> Table:
    """What was found, for people.

    Args:
        special: tokens that every draft vocabulary holds.
        limit: tokens where rows are cut.
    """
    table = Table(box=box.SIMPLE, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")

    def row(name: str, *lines: str) -> None:
        table.add_row(name, Text("\n".join(lines)))

    total = sum(found.lengths)
    row("rows", f"{found.num_rows:,}, {len(found.bad.messages):,} of them bad")
    row("tokens", f"{total:,}")
    row("supervised", f"{found.supervised:,}, {found.supervised / max(total, 1):.1%} of all")
    if found.lengths:
        row("lengths", *_histogram(found.lengths))
    for name, rows in (("cut", found.cut), ("supervise nothing", found.silent), ("not ended", found.unended)):
        what = {"cut": f" at {limit:,} tokens", "not ended": " with a turn behind which the target would go on"}
        if rows:
            row(name, f"{len(rows):,} rows{what.get(name, '')}, first {rows[0]}")
    for messages in found.bad.by_kind().values():
        row("bad", f"{len(messages):,} x  {messages[0]}")
    for kind, rows in sorted(found.dropped.items()):
        row("dropped", f"{kind}, by the chat template, in {len(rows):,} rows, first {rows[0]}")
    if found.counts:
        counts = np.zeros(vocab_size, np.int64)
        counts[[*found.counts]] = [*found.counts.values()]
        sizes = coverage_by_size(counts, special)
        row("draft vocabulary", *(f"{size:>7,} tokens hold {share:.1%}" for size, share in sizes.items()))
    return table


def _edges(lengths: Sequence[int]) -> list[int]:
    """The powers of two between which all lengths lie."""
    first, last = (max(length, 1).bit_length() for length in (min(lengths), max(lengths)))
    return [1 << bits for bits in range(first - 1, last + 1)]


def _histogram(lengths: Sequence[int]) -> list[str]:
    edges = _edges(lengths)
    counts = np.histogram(lengths, edges)[0]
    width = len(f"{edges[-1]:,}")
    return [
        f"{edge:>{width},} - {after - 1:<{width},} {count:>8,}  {'#' * round(_BAR * count / counts.max())}"
        for edge, after, count in zip(edges, edges[1:], counts.tolist(), strict=False)
    ]


def draw_lengths(path: Path, found: Found, limit: int) -> None:
    """A picture of how many rows have which length.

    Raises:
        InputError: it cannot be written there.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    axes.hist(found.lengths, bins=min(max(len(found.lengths), 1), 60), color="#1b7837")
    if max(found.lengths, default=0) >= limit:
        axes.axvline(limit, color="grey", linestyle="--", label=f"cut at {limit:,}")
        axes.legend()
    axes.set(title="Rows by length", xlabel="tokens", ylabel="rows")
    axes.spines[["top", "right"]].set_visible(False)
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(temporary, dpi=130, format="png")
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"--out: cannot write {path} ({error.strerror}); give another path") from error
    finally:
        plt.close(figure)
