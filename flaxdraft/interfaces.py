"""What passes between the parts.

Shape letters: B batch, T time, K tapped layers (of features), E target width, V target vocabulary, W draft vocabulary,
S cache slots, F fresh rows, Q draft tokens of a proposal.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from flaxdraft.errors import InputError

# JAX's on devices, numpy's on the host: containers that travel between the two hold either.
AnyArray: TypeAlias = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Token rows, unshifted. Only an algorithm shifts."""

    tokens_BT: Int[AnyArray, "B T"]
    assistant_BT: Bool[AnyArray, "B T"]  # 1 where the assistant produced the token, its end-of-turn token included
    segments_BT: Int[AnyArray, "B T"]  # 0 padding; documents 1, 2, ...
    positions_BT: Int[AnyArray, "B T"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Features:
    """What the frozen target says about a batch; it knows no draft vocabulary. What whoever made the features did not
    keep, or an algorithm does not need, is None."""

    taps_BTKE: Float[AnyArray, "B T K E"]  # residual stream after K chosen layers, un-normed
    last_BTE: Float[AnyArray, "B T E"] | None = None  # after the target's final norm
    argmax_BT: Int[AnyArray, "B T"] | None = None  # over the full vocabulary
    logsumexp_BT: Float[AnyArray, "B T"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Placement:
    """Where new rows lie in a KV cache that are no continuation of one text: the nodes of a tree, several of which have
    the same position."""

    slots_BT: Int[Array, "B T"]  # beyond the last slot: padding
    visible_BTS: Bool[Array, "B T S"]  # the slots that each row attends to, its own among them


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Example:
    """All that an algorithm needs for one evaluation of its loss. Arrays of the first three lead with the batch; on the
    host they are numpy's, and there is no teacher yet."""

    batch: Batch
    features: Features | None  # None on the host where the target is to read the batch itself
    chosen: Any  # what the algorithm chose there (`Algorithm.choose`): supervised rows, anchors
    teacher: Any = None  # arrays of the target that the loss reads (`Algorithm.teacher`); the same for every batch


class Draw(NamedTuple):
    """What random choices on the host may depend on, so that they are the same however many hosts share a batch and
    wherever a run goes on."""

    seed: int
    step: int  # of the optimizer, from 0
    first_row: int  # the number, in the global batch, of this host's first row


@dataclasses.dataclass(frozen=True, eq=False)
class VocabMap:
    """The target ids of the W draft tokens, strictly ascending. It belongs to the draft and its checkpoint."""

    target_ids_W: np.ndarray
    vocab_size: int
    source: str = ""  # digest of the tokenizer and the data it was chosen from; empty where it came with a draft

    def __post_init__(self):
        ids = self.target_ids_W
        if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer) or ids.size == 0:
            raise InputError(f"vocabulary map: expected a non-empty integer vector, found {ids.dtype}{ids.shape}")
        if np.any(np.diff(ids) <= 0):
            at = int(np.argmax(np.diff(ids) <= 0))
            raise InputError(
                f"vocabulary map: target ids must ascend strictly, found {ids[at]} then {ids[at + 1]} at entry {at}"
            )
        if ids[0] < 0 or ids[-1] >= self.vocab_size:
            raise InputError(
                f"vocabulary map: ids {ids[0]}..{ids[-1]} leave the target vocabulary 0..{self.vocab_size - 1}"
            )

    @property
    def draft_vocab_size(self) -> int:
        return int(self.target_ids_W.size)

    def check_fits(self, config: DraftConfig) -> None:
        """
        Raises:
            InputError: the draft's config is of another vocabulary.
        """
        if (self.draft_vocab_size, self.vocab_size) != (config.draft_vocab_size, config.vocab_size):
            raise InputError(
                f"vocabulary map: {self.draft_vocab_size} of {self.vocab_size} tokens, the draft config says "
                f"{config.draft_vocab_size} of {config.vocab_size}"
            )

    def d2t(self) -> np.ndarray:
        """int64 [W] OFFSETS, the servers' convention: target id = i + d2t[i]."""
        return self.target_ids_W.astype(np.int64) - np.arange(self.draft_vocab_size, dtype=np.int64)

    def t2d(self) -> np.ndarray:
        """bool [V] membership mask."""
        member = np.zeros(self.vocab_size, bool)
        member[self.target_ids_W] = True
        return member

    def tables(self) -> dict[str, np.ndarray]:
        """Both, by the names that every engine gives them."""
        return {"d2t": self.d2t(), "t2d": self.t2d()}

    def to_draft(self) -> np.ndarray:
        """int32 [V]: the draft id of each target id, -1 outside the draft vocabulary."""
        table = np.full(self.vocab_size, -1, np.int32)
        table[self.target_ids_W] = np.arange(self.draft_vocab_size, dtype=np.int32)
        return table

    @classmethod
    def from_offsets(cls, d2t: np.ndarray, vocab_size: int) -> VocabMap:
        return cls(np.asarray(d2t).astype(np.int64) + np.arange(len(d2t)), vocab_size)


class Sums(Protocol):
    """A pytree of counts and sums, never means: it is added over micro-batches and hosts, and divided once."""

    def terms(self) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """The loss as numerator and denominator, which is at least 1."""
        ...

    def figures(self) -> dict[str, float | list[float]]:
        """What a log or a report shows of sums on the host; a list has one entry a draft position. Always there is
        `accuracy`, the share of rows whose likeliest token is right; the others are the algorithm's own."""
        ...


class EmbeddingAndHead(Protocol):
    """What stands before and behind a target's layers."""

    @property
    def config(self) -> Any: ...

    def embedding(self) -> Float[Array, "V E"]: ...
    def head(self) -> Float[Array, "V E"]: ...
    def final_norm(self) -> Float[Array, " E"]: ...


@runtime_checkable
class Target(Protocol):
    """A frozen language model: teacher, data generator and verifier. A pytree of its weights."""

    @property
    def config(self) -> Any: ...

    @property
    def mesh(self) -> jax.sharding.Mesh | None:
        """The devices that its weights are split over; None: all of it is on one."""
        ...

    @property
    def row_multiple(self) -> int:
        """The rows of every batch are a multiple of this: of the devices that share them out."""
        ...

    def on_mesh(self) -> AbstractContextManager:
        """The context in which compiled programs that run the target are called."""
        ...

    def features(self, batch: Batch) -> Features:
        """Taps, last hidden state and full-vocabulary statistics of every row of the batch."""
        ...

    def new_cache(self, num_rows: int, num_slots: int) -> Any:
        """An empty KV cache; slot s holds position s of its row. It has `num_slots`."""
        ...

    def move_slots(self, cache: Any, from_BT: Int[Array, "B T"], to_BT: Int[Array, "B T"]) -> Any:
        """The cache with some slots' contents put into others. Part of a program that is called `on_mesh`."""
        ...

    def fork_cache(self, cache: Any, num_rows: int) -> Any:
        """The cache of one row, copied to many rows that begin alike."""
        ...

    def put_rows(self, cache: Any, rows_F: Int[Array, " F"], other: Any) -> Any:
        """The rows of another cache, of as many slots or fewer, put into rows `rows_F` of this one; numbers that are no
        row's drop theirs. Part of a program that is called `on_mesh`."""
        ...

    def extend(
        self, cache: Any, tokens_BT: Int[AnyArray, "B T"], positions_BT: Int[AnyArray, "B T"], head: str,
        placement: Placement | None = None,
    ) -> tuple[Any, Features]:  # fmt: skip
        """Run new tokens against the cache (which is consumed) and return it with their features; head is "all" or
        "end": statistics of every position, or of each row's last one. Without a placement every token lies at its
        position and sees all up to it."""
        ...

    def logits(self, last_BE: Float[Array, "B E"]) -> Float[Array, "B V"]:
        """Logits of post-norm last hidden states, at least float32."""
        ...

    def embedding(self) -> Float[Array, "V E"]: ...
    def head(self) -> Float[Array, "V E"]: ...
    def final_norm(self) -> Float[Array, " E"]: ...


class DraftConfig(Protocol):
    """Sizes of a draft, as far as everybody needs them; names as in config.json."""

    hidden_size: int
    target_hidden_size: int
    vocab_size: int
    draft_vocab_size: int

    def to_hf(self) -> dict[str, Any]: ...


class Draft(Protocol):
    """A draft's module, as far as everybody needs it. Variables of type nnx.Param are trained, Frozen ones travel
    along."""

    config: Any
    target_ids: Any  # Frozen [W]: the target id of each draft token


class Proposal(NamedTuple):
    """What a drafter guesses for the next target pass."""

    ids_BQ: Int[Array, "B Q"]  # draft ids
    q_BQW: Float[Array, "B Q W"] | None  # the distributions that they were drawn from; None where they are argmaxes
    # How many of them each row proposes, which may not depend on the tokens behind; None: all.
    num_B: Int[Array, " B"] | None = None


# Draft ids, and the distribution that they were drawn from or None, from the logits [B, W] of proposal number j.
Chooser = Callable[[Float[Array, "B W"], Any], tuple[Int[Array, " B"], Any]]


class Drafter(Protocol):
    """How a draft proposes while a target decodes: pure functions inside compiled programs. `state` is the drafter's
    own pytree, whose arrays lead with the rows of the batch."""

    most_tokens: int | None  # that one proposal holds; None: any number
    trees: bool  # whether `propose_tree` is there

    def start(self, draft: Any, num_rows: int, num_slots: int) -> Any:
        """Before anything is read; position p of a text has slot p."""
        ...

    def read(
        self, draft: Any, state: Any, taps_BTKE: Float[Array, "B T K E"], next_BT: Int[Array, "B T"],
        positions_BT: Int[Array, "B T"], last_B: Int[Array, " B"],
    ) -> Any:  # fmt: skip
        """The target's real states at some positions, in their order, each with the token that follows there. Positions
        beyond the last slot mark padding. `last_B` is the entry of each row behind which the next proposal begins."""
        ...

    def propose(
        self, draft: Any, state: Any, newest_B: Int[Array, " B"], token_B: Int[Array, " B"], num_tokens: int,
        choose: Chooser,
    ) -> tuple[Any, Proposal]:  # fmt: skip
        """Guesses behind the newest token, which is at position `newest_B` and which the target has not read."""
        ...

    def propose_tree(
        self, draft: Any, state: Any, newest_B: Int[Array, " B"], tree: Any
    ) -> tuple[Any, Int[Array, "B Q"]]:
        """Draft ids of the nodes of a `decode.tree.Tree` below its root, which is the newest token."""
        ...


class Algorithm(Protocol):
    """All that is one algorithm's own, and the only place where rows are shifted. A package `flaxdraft.algorithms.NAME`
    has `settings.Settings`, its section of the configuration; `algorithm.Algorithm(settings, packed)`, this; and
    `drafts`, a package of its architectures, each with ARCHITECTURES, MODEL_TYPES, Config, make and name_table."""

    settings: Any
    full_vocabulary: bool  # its drafts know every target token: no vocabulary is chosen
    needs: tuple[str, ...]  # the fields of `Features` that it reads, the taps among them; it gets no others from disk

    # The target.
    def tap_layers(self, num_layers: int, chosen: tuple[int, ...] | None) -> tuple[int, ...]:
        """The layers whose outputs the draft reads: `chosen` by the user, or the default for such a target.

        Raises:
            InputError: they are no taps for this algorithm.
        """
        ...

    def teacher(self, target: EmbeddingAndHead, vocab: VocabMap, dtype: Any) -> Any:
        """Arrays [V or W, E] of the target that the loss reads."""
        ...

    # Examples, on the host.
    def check_answers(self, longest: int) -> None:
        """
        Raises:
            InputError: answers of at most so many tokens supervise nothing at some place.
        """
        ...

    def choose(self, batch: Batch, most_supervised: int, draw: Draw) -> Any:
        """What is computed of a batch of numpy arrays: arrays that lead with its rows and whose other sizes follow from
        the batch's shape and `most_supervised`, a bound on the supervised tokens of a row."""
        ...

    def share(self, example: Example, num_shards: int) -> tuple[Example, Example]:
        """A host's example with every batch row shared by several devices, and the same tree with True where an array
        is cut along its second axis and False where it is whole.

        Raises:
            InputError: this algorithm does not do that.
        """
        ...

    # The loss.
    def first_carry(self) -> Any: ...
    def next_carry(self, carry: Any, sums: Any, step: Int[Array, ""]) -> Any:
        """What the train state carries to the next step: a small pytree, made of the sums of the whole global batch."""
        ...

    def sums(self, draft: Any, example: Example, carry: Any) -> Any: ...
    def accepted(self, draft: Any, example: Example) -> tuple[Any, Int[Array, "B T"]]:
        """The sums, and for each row how many draft tokens greedy verification would accept there."""
        ...

    def describe(self, draft: Any, example: Example) -> str:
        """How such sums are computed on this machine, for the log."""
        ...

    def flops(self, params: Any, frozen: Any, example: Example) -> float:
        """Of a step's products with weights over such an example, whose arrays may be described, if all that is chosen
        in it were supervised; those with the draft's frozen arrays and the teacher's included."""
        ...

    # Beginning and drafting.
    def warm_start(self, draft: Any, target: EmbeddingAndHead, vocab: VocabMap) -> None:
        """Weights of the target put into a fresh draft, in place, where that helps."""
        ...

    def drafting(self, num_tokens: int) -> Algorithm:
        """The same algorithm for evaluation: rows of one document, `num_tokens` draft tokens a target pass."""
        ...

    def drafter(self) -> Drafter: ...
    def serving(self) -> Any:
        """The contract of its exports: a `flaxdraft.serving.contract.Contract`."""
        ...
