"""Hidden states that another program kept, into a feature store: so that any engine can be the one that captures.

A `Folder` of some layout gives tokens, masks and hidden states of each row. What else a store holds comes from the
target's own files, of which embedding, head and final norm alone are read, however large the target is: the norm where
the last state was kept before it, and argmax and logsumexp over the full vocabulary.

Shape letters: L tokens of a row, E target width, V target vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from flaxdraft.data.documents import Document
from flaxdraft.data.store import Source
from flaxdraft.data.store_writer import StorePlan, fill, make_plan
from flaxdraft.data.templates import Rendered, rows_digest, tokenizer_digest
from flaxdraft.devices.sharding import Sharding
from flaxdraft.errors import InputError
from flaxdraft.files.fetch import content_of
from flaxdraft.interfaces import Features
from flaxdraft.nn import vocabulary
from flaxdraft.ops.padding import round_up
from flaxdraft.progress import CONSOLE
from flaxdraft.targets import OpenedTarget
from flaxdraft.targets.embedding_and_head import EmbeddingAndHeadWeights
from flaxdraft.targets.tied_head import say_which_head

STORED = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float32"}  # a dtype of a file, and of the store


class States(NamedTuple):
    taps_LKE: np.ndarray
    last_LE: np.ndarray  # before or after the target's final norm, as the folder says


class Folder(Protocol):
    """Rows of another program's layout."""

    @property
    def last_is_normed(self) -> bool: ...
    @property
    def num_left_out(self) -> int:
        """Rows without hidden states."""
        ...

    @property
    def rows(self) -> Sequence[Rendered]: ...

    def name(self, index: int) -> str:
        """The row's file, for messages."""
        ...

    def states(self, index: int) -> States:
        """
        Raises:
            InputError: the file is damaged, or is of another row.
        """
        ...


def token_row(tokens: np.ndarray, mask: np.ndarray, where: str) -> Rendered:
    """
    Raises:
        InputError: the two do not go together, or are no token ids and no mask.
    """
    if tokens.ndim != 1 or tokens.shape != mask.shape or not tokens.size:
        raise InputError(
            f"{where}: input_ids has shape {tokens.shape}, loss_mask {mask.shape}; expected two vectors of one length"
        )
    whole = np.issubdtype(tokens.dtype, np.integer) and np.issubdtype(mask.dtype, np.integer)
    if not whole or tokens.min() < 0 or tokens.max() >= 2**31 or mask.min() < 0 or mask.max() > 1:
        raise InputError(f"{where}: expected token ids from 0 on and a mask of 0 and 1")
    return Rendered(tokens.astype(np.int32), mask.astype(bool))


def plan_of(folder: Folder, opened: OpenedTarget, tap_layers: Sequence[int], shard_tokens: int) -> StorePlan:
    """
    Raises:
        InputError: the folder has no rows, its states are of another width or of a type that no store has, a token is
            outside the target's vocabulary, or a row is longer than its context.
    """
    config, tokenizer = opened.config(tap_layers), opened.source.tokenizer()
    if not len(folder.rows):
        raise InputError("no row has hidden states and something that the assistant produced; nothing can be trained")
    for index, row in enumerate(folder.rows):
        if row.tokens.max() >= config.vocab_size:
            raise InputError(
                f"{folder.name(index)}: token {row.tokens.max()} is outside the target's vocabulary of "
                f"{config.vocab_size}; the folder is of another target"
            )
        if len(row.tokens) > config.context:
            raise InputError(
                f"{folder.name(index)}: {len(row.tokens)} tokens, the target's context is {config.context}; leave the "
                "file out, or give the target with the config.json that it was served with"
            )
    first = folder.states(0)
    for name, found in (("taps", first.taps_LKE.dtype.name), ("last hidden state", first.last_LE.dtype.name)):
        if found not in STORED:
            raise InputError(f"{folder.name(0)}: {name} is {found}; expected one of {', '.join(STORED)}")
    source = Source(
        target=content_of(str(opened.path), None), tokenizer="" if tokenizer is None else tokenizer_digest(tokenizer),
        data=rows_digest(folder.rows), compute_dtype=first.last_LE.dtype.name, tap_layers=config.tap_layers,
        hidden_size=config.hidden_size, vocab_size=config.vocab_size, taps_dtype=STORED[first.taps_LKE.dtype.name],
        last_dtype=STORED[first.last_LE.dtype.name], template=None,
    )  # fmt: skip
    lengths = [len(row.tokens) for row in folder.rows]
    return make_plan(source, lengths, shard_tokens, config.tie_word_embeddings)


def ingest(directory: Path, folder: Folder, opened: OpenedTarget, tap_layers: Sequence[int],
           shard_tokens: int) -> None:  # fmt: skip
    """Makes a feature store of a folder; a stopped one goes on.

    Says how many supervised tokens are the target's argmax: nearly all of them where the target answered greedily, and
    almost none where folder and target do not belong together.

    Args:
        tap_layers: the layers (0-based) whose outputs the folder holds.

    Raises:
        InputError: see `plan_of` and `store_writer.start`; a file is damaged, of another width, or not finite.
    """
    plan = plan_of(folder, opened, tap_layers, shard_tokens)
    say_which_head(opened)
    weights = EmbeddingAndHeadWeights.of_target(opened, opened.config())
    CONSOLE.print(
        f"{len(folder.rows)} rows, {plan.num_tokens} tokens, taps of layers {list(plan.source.tap_layers)}, "
        f"{folder.num_left_out} rows left out; {len(plan.first_rows) - 1} shards, {plan.num_bytes / 1e9:.2f} GB"
    )
    finish_states = _finisher(weights, plan.source.compute_dtype, folder.last_is_normed)
    agreeing = supervised = 0

    def read(span: range, advance: Callable[[int], None]) -> list[Document]:
        nonlocal agreeing, supervised
        out = []
        for index in span:
            features = finish_states(_checked(folder, index, plan.source))
            tokens, assistant = folder.rows[index].tokens, folder.rows[index].assistant
            out.append(Document(tokens, assistant, features))
            assert features.argmax_BT is not None
            agreeing += int((features.argmax_BT[:-1] == tokens[1:])[assistant[1:]].sum())
            supervised += int(assistant[1:].sum())
            advance(1)
        return out

    fill(directory, plan, read, lambda: weights.tensors, (0, 1))
    if supervised:
        CONSOLE.print(f"{agreeing / supervised:.1%} of the supervised tokens are the target's argmax")


def _checked(folder: Folder, index: int, source: Source) -> States:
    states, tokens = folder.states(index), folder.rows[index].tokens
    wanted = {
        "taps": (len(tokens), len(source.tap_layers), source.hidden_size),
        "last hidden state": (len(tokens), source.hidden_size),
    }
    for (name, shape), array in zip(wanted.items(), states, strict=True):
        if array.shape != shape:
            raise InputError(
                f"{folder.name(index)}: {name} has shape {array.shape}, expected {shape} for this target; the folder "
                "is of another one"
            )
        if not np.isfinite(array.astype(np.float32)).all():
            raise InputError(f"{folder.name(index)}: {name} holds values that are not finite; remove the file")
    return states


def _finisher(weights: EmbeddingAndHeadWeights, dtype: str, last_is_normed: bool) -> Callable[[States], Features]:
    """From the states of a row to its features, in the dtype that the states came in, as the target computes them."""
    head_VE, scale_E = weights.head().astype(dtype), weights.final_norm()
    eps = weights.config.rms_norm_eps

    @jax.jit
    def finished(last_BTE, head_VE):
        if not last_is_normed:
            wide = last_BTE.astype(jnp.float32)
            normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
            last_BTE = (normed * scale_E[None, None]).astype(dtype)
        return last_BTE, *vocabulary.statistics(last_BTE, head_VE, Sharding.none())

    def run(states: States) -> Features:
        num = len(states.last_LE)
        # Few lengths, so that few programs are compiled.
        padded = np.zeros((1, round_up(num, 256), states.last_LE.shape[1]), dtype)
        padded[0, :num] = states.last_LE
        last, argmax, logsumexp = jax.device_get(finished(padded, head_VE))
        return Features(states.taps_LKE, last[0, :num], argmax[0, :num], logsumexp[0, :num])

    return run
