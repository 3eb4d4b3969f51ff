"""The target answers every prompt, and its features are kept: one file a chunk, so a stopped run goes on."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from flaxdraft.data.answer_files import read_rows, write_rows
from flaxdraft.data.prompts import Prompt, render
from flaxdraft.decode.greedy import Row, answer_greedily
from flaxdraft.files.json_files import write_json
from flaxdraft.interfaces import Target
from flaxdraft.progress import bar


def chunk_path(directory: Path, split: str, index: int) -> Path:
    return directory / f"{split}-{index:05d}.safetensors"


def chunk_rows(num_prompts: int, num_rows: int) -> int:
    """Rows of each chunk: at most num_rows, spread evenly, so that no chunk decodes mostly padding."""
    return -(-num_prompts // -(-num_prompts // num_rows))


def capture(
    directory: Path,
    split: str,
    target: Target,
    tokenizer,
    prompts: Sequence[Prompt],
    *,
    max_prompt_tokens: int,
    max_new_tokens: int,
    num_rows: int,
    dtype: str,
) -> list[str]:
    """Answers the prompts of one split and writes `<split>-NNNNN.safetensors`; returns the prompt ids in file order.

    Prompts are taken by length, so that rows decoded together are padded little.
    """
    rendered = {prompt.id: render(tokenizer, prompt, max_prompt_tokens) for prompt in prompts}
    order = sorted(rendered, key=lambda id: (len(rendered[id]), id))
    num_rows = chunk_rows(len(order), num_rows)
    chunks = [order[at : at + num_rows] for at in range(0, len(order), num_rows)]
    missing = [i for i in range(len(chunks)) if not chunk_path(directory, split, i).exists()]
    done = len(order) - sum(len(chunks[i]) for i in missing)
    with bar(f"answers ({split})", len(order), done) as progress:
        made, start = 0, time.monotonic()

        def on_step(num):
            nonlocal made
            made += num
            share = min(len(chunk) / max_new_tokens, done + len(chunk) - progress.done)
            progress.advance(share, f"{made / (time.monotonic() - start):.0f} tokens/s")

        for i in missing:
            chunk = [rendered[id] for id in chunks[i]]
            rows = answer_greedily(target, chunk, max_new_tokens, tokenizer.eos_token_id, num_rows, on_step)
            write_rows(chunk_path(directory, split, i), rows, dtype)
            done += len(chunk)
            progress.advance(done - progress.done, f"{made / (time.monotonic() - start):.0f} tokens/s")
    return order


def write_texts(path: Path, tokenizer, prompts: Sequence[Prompt], order: Sequence[str], rows: Sequence[Row]) -> None:
    """The conversations in readable form."""
    by_id = {prompt.id: prompt for prompt in prompts}
    texts = []
    for id, row in zip(order, rows, strict=True):
        answer = tokenizer.decode(row.tokens[row.num_prompt :], skip_special_tokens=True)
        texts.append({"id": id, "category": by_id[id].category, "prompt": by_id[id].prompt, "answer": answer})
    write_json(path, texts)


def is_captured(directory: Path, split: str, num_prompts: int, num_rows: int) -> bool:
    """Whether every chunk of a split is there."""
    num_chunks = -(-num_prompts // chunk_rows(num_prompts, num_rows))
    return all(chunk_path(directory, split, i).exists() for i in range(num_chunks))


def load_split(directory: Path, split: str, num_prompts: int, num_rows: int) -> list[Row]:
    """Every row of a captured split, in file order."""
    num_chunks = -(-num_prompts // chunk_rows(num_prompts, num_rows))
    return [row for i in range(num_chunks) for row in read_rows(chunk_path(directory, split, i))]
