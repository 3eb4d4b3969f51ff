"""What passes between the parts, and how a part is found by its name.

Shape letters: B batch, T time, R supervised rows kept of T, J unroll steps, D draft width, E target width,
V target vocabulary, W draft vocabulary, N query heads, K key/value heads, H head width, S cache slots.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Iterator
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from flaxdraft.errors import InputError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Token rows, unshifted. Only an algorithm shifts."""

    tokens_BT: Int[Array, "B T"]
    assistant_BT: Bool[Array, "B T"]  # 1 where the assistant produced the token, its end-of-turn token included
    segments_BT: Int[Array, "B T"]  # 0 padding; documents 1, 2, ...
    positions_BT: Int[Array, "B T"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Features:
    """What the frozen target says about a batch; it knows no draft vocabulary."""

    taps_BT3E: Float[Array, "B T 3 E"]  # residual stream after three chosen layers, un-normed
    # After the target's final norm; None where the rows of a split batch bring their own (SplitRows).
    last_BTE: Float[Array, "B T E"] | None
    # Over the full vocabulary; both are None where whoever made the features did not keep them.
    argmax_BT: Int[Array, "B T"] | None
    logsumexp_BT: Float[Array, "B T"] | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SplitRows:
    """What `rows_BR` of a batch read of its features, where devices share a batch row's rows (algorithms/eagle3/shared_rows.py):
    no device has to read another's."""

    taps_BR3E: Float[Array, "B R 3 E"]  # of each row
    last_BRE: Float[Array, "B R E"]  # of the row after it, its teacher at step 0
    owned_BR: Bool[Array, "B R"]  # false: listed for its teacher alone, some other device trains it


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
    """All that an algorithm needs for one evaluation of its loss.

    `rows_BR` lists, ascending, the rows that some step supervises; entries >= T are padding. It must hold every
    supervised row (`flaxdraft.algorithms` builds it on the host), since rows outside it are never computed.
    `teacher_head_WE` are the target's head rows of the draft vocabulary; `full_head_VE` the whole head, which features
    without argmax and logsumexp need. `accepted_J` is the mean expected acceptance
    of each step over the previous global batch, which adaptive objectives read; None before there is one.
    """

    batch: Batch
    features: Features
    rows_BR: Int[Array, "B R"]
    teacher_head_WE: Float[Array, "W E"]
    accepted_J: Float[Array, " J"] | None = None
    full_head_VE: Float[Array, "V E"] | None = None
    split: SplitRows | None = None


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

    def d2t(self) -> np.ndarray:
        """int64 [W] OFFSETS, the servers' convention: target id = i + d2t[i]."""
        return self.target_ids_W.astype(np.int64) - np.arange(self.draft_vocab_size, dtype=np.int64)

    def t2d(self) -> np.ndarray:
        """bool [V] membership mask."""
        member = np.zeros(self.vocab_size, bool)
        member[self.target_ids_W] = True
        return member

    def to_draft(self) -> np.ndarray:
        """int32 [V]: the draft id of each target id, -1 outside the draft vocabulary."""
        table = np.full(self.vocab_size, -1, np.int32)
        table[self.target_ids_W] = np.arange(self.draft_vocab_size, dtype=np.int32)
        return table

    @classmethod
    def from_d2t(cls, d2t: np.ndarray, vocab_size: int) -> VocabMap:
        return cls(np.asarray(d2t).astype(np.int64) + np.arange(len(d2t)), vocab_size)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossSums:
    """Sums per unroll step, never means: they are added over micro-batches and hosts and divided once."""

    loss_J: Float[Array, " J"]
    loss_count_J: Int[Array, " J"]  # supervised, teacher argmax in the draft vocabulary
    row_count_J: Int[Array, " J"]  # supervised
    hit_J: Int[Array, " J"]  # draft argmax is the target's argmax
    prefix_hit_J: Int[Array, " J"]  # hits at this step and all before
    expected_accept_J: Float[Array, " J"]  # sum over supervised rows of sum_w min(p_full[w], q[w])

    @classmethod
    def empty(cls, num_steps: int) -> LossSums:
        """Of no rows."""
        zero_J, none_J = jnp.zeros(num_steps), jnp.zeros(num_steps, jnp.int32)
        return cls(zero_J, none_J, none_J, none_J, none_J, zero_J)

    def __add__(self, other: LossSums) -> LossSums:
        return jax.tree.map(jnp.add, self, other)

    def terms(self, step_weight_J: Float[Array, " J"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """sum_j w_j S_j and sum_j w_j N_j; the loss is their quotient, the one division over whatever was summed."""
        count = jnp.sum(step_weight_J * self.loss_count_J)
        return jnp.sum(step_weight_J * self.loss_J), jnp.maximum(count, 1.0)


@runtime_checkable
class Target(Protocol):
    """A frozen language model: teacher, data generator and verifier. A pytree of its weights."""

    config: Any

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
        """An empty KV cache; slot s holds position s of its row. It has `num_slots`, and
        `moved(from_BT, to_BT)`: itself with some slots' contents put into others."""
        ...

    def fork_cache(self, cache: Any, num_rows: int) -> Any:
        """The cache of one row, copied to many rows that begin alike."""
        ...

    def put_rows(self, cache: Any, rows_F: Int[Array, " F"], other: Any) -> Any:
        """The rows of another cache, of as many slots or fewer, put into rows `rows_F` of this one; numbers that are no
        row's drop theirs. Part of a program that is called `on_mesh`."""
        ...

    def extend(
        self, cache: Any, tokens_BT: Int[Array, "B T"], positions_BT: Int[Array, "B T"], head: str,
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


class Draft(Protocol):
    """The EAGLE-3 surface of a draft module; nothing outside its file knows which architecture it is."""

    config: Any
    softmax_scale: float

    def embed(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]: ...
    def project(self, taps_BT3E: Float[Array, "B T 3 E"]) -> Float[Array, "B T D"]: ...
    def token_projections(self, embeds_BTD: Float[Array, "B T D"]) -> Any:
        """A token's share of the attention's projections: arrays [B, T, ...], the same at every unroll step."""
        ...

    def projections(self, token_projections: Any, hidden_BTD: Float[Array, "B T D"]) -> Any: ...
    def query(self, projections: Any, positions_BT: Int[Array, "B T"]) -> Float[Array, "B T N H"]: ...
    def key_value(
        self, projections: Any, positions_BT: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T K H"], Float[Array, "B T K C"]]: ...
    def finish(
        self, hidden_BTD: Float[Array, "B T D"], heads_BTNC: Float[Array, "B T N C"]
    ) -> Float[Array, "B T D"]: ...
    def head_input(self, hidden_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]: ...
    def head(self) -> Float[Array, "D W"]: ...
    def logits(self, hidden_BTD: Float[Array, "B T D"]) -> Float[Array, "B T W"]: ...


class Algorithm(Protocol):
    """How a draft is trained: the only place where rows are shifted."""

    num_steps: int

    def rows(self, assistant_BT: np.ndarray, segments_BT: np.ndarray) -> np.ndarray: ...
    def describe(self, draft: Draft, example: Example) -> str: ...
    def loss_sums(self, draft: Draft, example: Example) -> LossSums: ...
    def accepted(self, draft: Draft, example: Example) -> tuple[LossSums, Int[Array, "B T"]]: ...
    def loss_terms(self, sums: LossSums) -> tuple[Float[Array, ""], Float[Array, ""]]: ...
    def mean_loss(self, sums: LossSums) -> Float[Array, ""]: ...


def modules_of(package: str) -> Iterator[tuple[str, ModuleType]]:
    """Every module of a package with its short name; a new file is found without being registered anywhere."""
    root = importlib.import_module(package)
    for info in pkgutil.iter_modules(root.__path__):
        if not info.name.startswith("_"):  # a package's command line is not one of its entries
            yield info.name, importlib.import_module(f"{package}.{info.name}")


def find_by_name(package: str, name: str, field: str) -> ModuleType:
    """The module `package.name`.

    Raises:
        InputError: no such module; the message lists the names there are and the file that would add one.
    """
    modules = pkgutil.iter_modules(importlib.import_module(package).__path__)
    names = [info.name for info in modules if not info.name.startswith("_")]
    if name not in names:
        raise InputError(
            f"{field}: no {name!r} in {package}; found {', '.join(sorted(names))}. "
            f"A new one is a new file {package.replace('.', '/')}/{name}.py"
        )
    return importlib.import_module(f"{package}.{name}")


def find_by_architecture(package: str, config: dict[str, Any], origin: str) -> ModuleType:
    """The module that declares the config's `architectures` (first) or `model_type`.

    Raises:
        InputError: none declares it, or two do.
    """
    wanted = [*(config.get("architectures") or [])[:1], config.get("model_type")]
    known = {}
    for name, module in modules_of(package):
        for declared in (*module.ARCHITECTURES, *module.MODEL_TYPES):
            if declared in known and known[declared] is not module:
                raise InputError(f"{package}: both {known[declared].__name__} and {name} declare {declared!r}")
            known[declared] = module
    for key in wanted:
        if key in known:
            return known[key]
    raise InputError(
        f"{origin}: architecture {wanted[0]!r} (model_type {wanted[-1]!r}) is not supported; supported are "
        f"{', '.join(sorted(known))}. A new family is a new file in {package.replace('.', '/')}/"
    )
