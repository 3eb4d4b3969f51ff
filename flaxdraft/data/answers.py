"""The target answers every prompt, and its features are kept: one file a chunk, so a stopped run goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flaxdraft.data.answer_files import read_rows, write_rows
from flaxdraft.data.documents import Answer
from flaxdraft.data.prompts import Prompt
from flaxdraft.decode.generation import Writing, generate_each
from flaxdraft.devices import hosts
from flaxdraft.files.json_files import write_json
from flaxdraft.interfaces import Target
from flaxdraft.progress import bar

PREFILL_CHUNK, MULTIPLE = 512, 32  # see `Writing`


def answer_greedily(
    target: Target,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop_tokens: Sequence[int],
    num_rows: int,
    on_tokens: Callable[[int], None],
) -> list[Answer]:
    """The target's own greedy answers, with taps, last hidden state, argmax and logsumexp of every position.

    Args:
        num_rows: rows of the compiled batch (>= len(prompts); the rest is padding).
        on_tokens: called now and then with the number of tokens made since the last call.
    """
    how = Writing(
        max_new_tokens, tuple(stop_tokens), prefill_chunk=PREFILL_CHUNK, multiple=MULTIPLE, keep_features=True
    )  # fmt: skip
    found: dict[int, Answer] = {}
    for number, answer, features in generate_each(target, prompts, how, num_rows=num_rows, on_tokens=on_tokens):
        assert features is not None
        tokens = np.array([*prompts[number], *answer], np.int32)
        found[number] = Answer(tokens, len(prompts[number]), features)
    return [found[i] for i in range(len(prompts))]


def _rows_of_chunks(num_prompts: int, num_rows: int) -> int:
    """At most num_rows, spread evenly, so that no chunk decodes mostly padding."""
    return -(-num_prompts // -(-num_prompts // num_rows))


def _chunk_paths(directory: Path, split: str, num_prompts: int, num_rows: int) -> list[Path]:
    num_chunks = -(-num_prompts // _rows_of_chunks(num_prompts, num_rows))
    return [directory / f"{split}-{i:05d}.safetensors" for i in range(num_chunks)]


def capture(
    directory: Path,
    split: str,
    target: Target,
    prompts: Mapping[str, list[int]],
    stop_tokens: Sequence[int],
    max_new_tokens: int,
    num_rows: int,
    dtype: str,
) -> list[str]:
    """Answers the prompts of one split and writes `<split>-NNNNN.safetensors`; returns their ids in file order. Of many
    processes all answer and the first one writes.

    Prompts are taken by length, so that rows decoded together are padded little.

    Args:
        prompts: rendered, by id.
    """
    order = sorted(prompts, key=lambda id: (len(prompts[id]), id))
    size = _rows_of_chunks(len(order), num_rows)
    paths = _chunk_paths(directory, split, len(order), num_rows)
    chunks = {path: order[at * size : (at + 1) * size] for at, path in enumerate(paths)}
    missing = [path for path, is_there in zip(paths, hosts.agree([p.exists() for p in paths]), strict=True)
               if not is_there]  # fmt: skip
    done = len(order) - sum(len(chunks[path]) for path in missing)
    with bar(f"answers ({split})", len(order), done) as progress:
        made, start = 0, time.monotonic()

        def on_tokens(num):
            nonlocal made
            made += num
            share = min(num / max_new_tokens, done + len(chunk) - progress.done)
            progress.advance(share, f"{made / (time.monotonic() - start):.0f} tokens/s")

        for path in missing:
            chunk = chunks[path]
            asked = [prompts[id] for id in chunk]
            rows = answer_greedily(target, asked, max_new_tokens, stop_tokens, size, on_tokens)
            if hosts.is_main():
                write_rows(path, rows, dtype)
            done += len(chunk)
            progress.advance(done - progress.done, f"{made / (time.monotonic() - start):.0f} tokens/s")
    return order


def write_texts(
    path: Path, tokenizer: Any, prompts: Sequence[Prompt], order: Sequence[str], answers: Sequence[Answer]
) -> None:
    """The conversations in readable form."""
    by_id = {prompt.id: prompt for prompt in prompts}
    texts = []
    for id, one in zip(order, answers, strict=True):
        text = tokenizer.decode(one.tokens[one.num_prompt :], skip_special_tokens=True)
        texts.append({"id": id, "category": by_id[id].category, "prompt": by_id[id].turns[0], "answer": text})
    write_json(path, texts)


def is_captured(directory: Path, split: str, num_prompts: int, num_rows: int) -> bool:
    """Whether every chunk of a split is there."""
    return all(path.exists() for path in _chunk_paths(directory, split, num_prompts, num_rows))


def load_split(directory: Path, split: str, num_prompts: int, num_rows: int) -> list[Answer]:
    """Every answer of a captured split, in file order."""
    return [one for path in _chunk_paths(directory, split, num_prompts, num_rows) for one in read_rows(path)]
