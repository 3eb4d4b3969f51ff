"""Greedy answers with a draft that are not the target's own: do they part where two tokens are nearly equal?

A verified answer parts from the target's own at its first different token. Both tokens were chosen from logits of the
same text, which the target computed in two ways: one token at a time, and several at once. The ways round differently,
so where two logits are nearly equal either token may be chosen. Anything else is an error of the decoding.

Shape letters: B rows, T time, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flaxdraft.data.whole_texts import batch_of
from flaxdraft.devices import host_reads
from flaxdraft.devices.sharding import everywhere
from flaxdraft.errors import WrongAnswersError
from flaxdraft.evaluate.measure import Measured, Session, Turn
from flaxdraft.interfaces import Target
from flaxdraft.ops.padding import round_up

MULTIPLE = 128  # of padded lengths, each of which compiles once
# Where rounding moves one logit by r (root mean square), it moves the distance of two logits, each computed in both
# ways, by 2 r. Four times that happens once in ten thousand.
LIMIT = 8


class Choice(NamedTuple):
    """One of the two tokens."""

    token: int
    text: str
    logit: float


@dataclasses.dataclass(frozen=True)
class Difference:
    """The first token of a conversation that is another one with the draft."""

    question: str  # id of the prompt
    turn: int
    position: int  # of the token in the answer, from 0
    own: Choice | None  # the target's own; None: its answer ended here, and not with an end token
    drafted: Choice | None
    distance: float  # of the lower of the two logits from the highest of all, in units of rounding at its size
    rounding: float  # how far the logits here are apart when computed in two ways (root mean square), in the same units

    @property
    def is_near_tie(self) -> bool:
        """Whether rounding explains it."""
        return self.own is not None and self.drafted is not None and self.distance <= LIMIT * max(self.rounding, 1.0)

    def to_json(self) -> dict[str, Any]:
        choices = {name: choice and choice._asdict() for name, choice in (("own", self.own), ("drafted", self.drafted))}
        return dataclasses.asdict(self) | choices | {"near_tie": self.is_near_tie}


def first_differences(run: Measured, alone: Measured) -> list[tuple[Turn, Turn, int]]:
    """Turns (with the draft, without) that part, and where. Later turns of a conversation that has parted already are
    answers to something else."""
    found: dict[str, tuple[Turn, Turn, int]] = {}
    for one, other in zip(run.turns, alone.turns, strict=True):
        drafted, own = one.answer.tokens, other.answer.tokens
        if one.prompt == other.prompt and drafted != own and one.question not in found:
            same = [a == b for a, b in zip(drafted, own, strict=False)]
            found[one.question] = one, other, same.index(False) if False in same else len(same)
    return list(found.values())


def differences(session: Session, run: Measured, alone: Measured) -> list[Difference]:
    """Each first difference with the logits of its two tokens. All processes of the target's mesh must call it.

    Args:
        run, alone: greedy, of the same prompts.
    """
    found, num_rows = [], round_up(session.num_rows, session.target.row_multiple)
    parted = first_differences(run, alone)
    for at in range(0, len(parted), num_rows):
        chunk = parted[at : at + num_rows]
        texts = [[*own.prompt, *own.answer.tokens[:position]] for _, own, position in chunk]
        logits_BV, rounding_B = _logits_of(session.target, texts, num_rows)
        for row, (drafted, own, position) in enumerate(chunk):
            found.append(_difference(session, drafted, own, position, logits_BV[row], float(rounding_B[row])))
    return found


def _difference(session: Session, drafted: Turn, own: Turn, position: int, logits_V, rounding: float) -> Difference:
    pair = [turn.answer.tokens[position : position + 1] for turn in (own, drafted)]
    one, other = (
        Choice(tokens[0], session.tokenizer.decode(tokens), float(logits_V[tokens[0]])) if tokens else None
        for tokens in pair
    )
    highest = float(logits_V.max())
    unit = rounding_unit(abs(highest), session.target.precision.compute)
    distance = (highest - min(choice.logit for choice in (one, other) if choice is not None)) / unit
    return Difference(own.question, own.turn, position, one, other, distance, rounding / unit)


def rounding_unit(size: float, dtype: Any) -> float:
    """The distance of neighbouring numbers of a dtype at this size."""
    return math.ldexp(1.0, math.frexp(max(size, float(jnp.finfo(dtype).tiny)))[1] - 1 - jnp.finfo(dtype).nmant)


def _logits_of(target: Target, texts: Sequence[Sequence[int]], num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits behind the last token of each text, read at once, [rows, V]; and the root mean square of what they are
    apart from those of a last token that is read alone, as decoding does, [rows]."""
    slots = round_up(max(map(len, texts)), MULTIPLE)
    batch = batch_of(texts, num_rows, slots)
    read = target.features(batch)
    length_B = np.array([*map(len, texts), *[2] * (num_rows - len(texts))], np.int32)  # rows behind them are padding
    counted_BT = np.tile(np.arange(slots, dtype=np.int32), (num_rows, 1))
    cache = target.new_cache(num_rows, slots)
    before_BT = np.where(counted_BT < length_B[:, None] - 1, counted_BT, slots)
    cache, _ = target.extend(cache, batch.tokens_BT, before_BT, "end")
    ends_B1 = np.take_along_axis(batch.tokens_BT, length_B[:, None] - 1, axis=1)
    _, alone = target.extend(cache, ends_B1, length_B[:, None] - 1, "end")
    with target.on_mesh():
        last_BE, other_BE = _at(read.last_BTE, length_B - 1), _at(alone.last_BTE, np.zeros_like(length_B))
    logits = [target.logits(x) for x in (last_BE, other_BE)]
    logits_BV, other_BV = (np.asarray(x) for x in host_reads.read(logits))
    return logits_BV, np.sqrt(np.mean(np.square(logits_BV - other_BV), axis=1))


@jax.jit
def _at(x_BTE, at_B):
    """One position of each row."""
    return everywhere(x_BTE)[jnp.arange(len(at_B)), at_B]


def refuse_wrong_answers(results: Sequence[dict[str, Any]]) -> None:
    """
    Args:
        results: see `guess_results`.

    Raises:
        WrongAnswersError: an answer differs from the target's own by more than rounding explains.
    """
    wrong = [
        (result["name"], one)
        for result in results
        for one in result["decoded"].get("differences", ())
        if not one["near_tie"]
    ]
    if wrong:
        name, one = wrong[0]
        raise WrongAnswersError(
            f"of the answers with the draft {len(wrong)} differ from the target's own by more than rounding explains; "
            f"the first: {name}, prompt {one['question']!r}, turn {one['turn'] + 1}, token {one['position'] + 1}: "
            f"{_told(one['drafted'])} instead of {_told(one['own'])}. The lower of the two lies {one['distance']:.1f} "
            f"units below the highest logit, and rounding is {one['rounding']:.1f} here. Verified answers must be the "
            "target's: this is a fault of flaxdraft or of "
            "the machine, not of the draft; please report it with the report's table"
        )


def _told(choice: dict[str, Any] | None) -> str:
    return "the end of the answer" if choice is None else f"{choice['text']!r} (logit {choice['logit']:.4f})"
