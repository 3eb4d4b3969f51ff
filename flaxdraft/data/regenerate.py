"""The target answers conversations itself: every assistant turn of a file is replaced by the target's own.

A draft agrees with its target most where it has learned from what the target says, so this is what to train on. What
is written, and when a line of it stands, is told in talks.py. Of many processes all answer, and the first one writes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import BinaryIO

from flaxdraft.data.conversations import Conversation
from flaxdraft.data.talks import FILE, Asking, Results, Talk, finished, to_answer
from flaxdraft.decode.generation import Writing, generate_each
from flaxdraft.devices import hosts
from flaxdraft.interfaces import Target
from flaxdraft.progress import bar

# Times the rows: conversations of one turn that share rows. Longer ones are answered by rows alone, first turns first:
# none of a group is done, and on disk, before its last turn.
GROUP = 8


def regenerate(
    directory: Path, conversations: Iterable[Conversation], target: Target, asking: Asking, num_rows: int
) -> Counter[str]:
    """Answers what the file does not hold yet; returns how many conversations were `answered`, and of those that were
    not, or not to their end, how many for each reason.

    Each answer depends on its conversation and the seed alone, not on those beside it or on where a run was stopped.

    Args:
        conversations: those that are `answerable`.
        num_rows: conversations answered together.

    Raises:
        InputError: the chat template refuses what the target answered.
    """
    path = directory / FILE
    done = hosts.agree(sorted(finished(path)) if hosts.is_main() else None)
    left, counts = to_answer(conversations, set(done))
    num_rows = min(num_rows, max(len(left), 1))
    # By length, so that rows decoded together are padded little.
    left.sort(key=lambda talk: (sum(len(message["content"]) for message in talk.asked[0]), talk.number))
    with bar("conversations", len(done) + len(left), len(done)) as progress, _appended(path) as file:
        results = Results(asking, counts, progress, file)
        size = num_rows * (GROUP if all(len(talk.asked) == 1 for talk in left) else 1)
        for at in range(0, len(left), size):
            for talk in _answered(left[at : at + size], target, asking, num_rows):
                results.take(talk)
            results.sync()
    return counts


def _appended(path: Path) -> AbstractContextManager[BinaryIO | None]:
    """Opens the file to append, in the first process alone."""
    return path.open("ab") if hosts.is_main() else nullcontext()


def _answered(group: list[Talk], target: Target, asking: Asking, num_rows: int) -> Iterator[Talk]:
    """Conversations as they come to their end, their turns answered: first turns first, then second ones."""
    options = asking.options
    how = Writing(options.max_new_tokens, asking.stop_tokens, options.temperature, options.top_p)
    while group:
        here = []
        for talk in group:
            if (found := talk.next_prompt(asking)) is None:
                yield talk
            else:
                here.append((talk, *found))
        prompts, seeds = [prompt for _, _, prompt in here], [talk.seed(options.seed) for talk, _, _ in here]
        for number, answer, _ in generate_each(target, prompts, how, seeds=seeds, num_rows=num_rows):
            talk, messages, prompt = here[number]
            talk.hear(messages, prompt, answer, asking)
            if talk.is_done:
                yield talk
        group = [talk for talk, _, _ in here if not talk.is_done]
