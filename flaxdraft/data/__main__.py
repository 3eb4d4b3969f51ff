"""python -m flaxdraft.data: what comes before training.

check        look at a whole file: what training would make of it; exit code 1 where that would be wrong
show         print conversations as the target reads them, with what is supervised in colour
regenerate   let the target answer them itself, loaded here or run by servers
capture      run the target over them and keep its features in a store

regenerate and capture may run on many hosts: the same command on each, in step with each other.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from flaxdraft import algorithms
from flaxdraft.errors import InputError
from flaxdraft.run.chat_options import (
    add_bad_row_option,
    add_row_options,
    add_template_options,
    bad_rows,
    chat_options,
    template_inputs,
    template_of,
    template_of_rows,
)
from flaxdraft.run.commands import ADDRESS, Command, at_least, call_one_of, share
from flaxdraft.run.target_options import add_target_options, dtype_or_default, on_all_hosts, target_mesh

if TYPE_CHECKING:
    from flaxdraft.data.conversations import Conversation
    from flaxdraft.data.talks import Answering, Asking
    from flaxdraft.targets.text_side import TextSide

_OTHER_FOLDER = "Give another folder, or remove it to start anew."


def main(argv: Sequence[str] | None = None) -> int:
    """0 when done; 2 with one message for wrong input."""
    commands = {
        "check": Command("look at a whole file as training would see it", _check_arguments, check_file),
        "show": Command("print rows with what is supervised in colour", _show_arguments, show),
        "regenerate": Command("replace every assistant turn by the target's own", _answer_arguments, answer_all),
        "capture": Command("run the target over conversations and keep its features", _capture_arguments, capture_all),
    }
    return call_one_of(commands, argv, "python -m flaxdraft.data", __doc__)


def _file_and_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="conversations: JSON lines, a JSON array, or .parquet")
    parser.add_argument("--target", required=True, help=ADDRESS)


def _check_arguments(parser: argparse.ArgumentParser) -> None:
    _file_and_target(parser)
    add_row_options(parser)
    parser.add_argument("--max-silent", type=share, default=0.5, help="largest share of rows that supervise nothing")
    parser.add_argument("--out", type=Path, metavar="PNG", help="a picture of the rows' lengths")


def _show_arguments(parser: argparse.ArgumentParser) -> None:
    _file_and_target(parser)
    add_row_options(parser)
    parser.add_argument("--rows", type=at_least(1), default=3, help="from the beginning of the file")


def _answer_arguments(parser: argparse.ArgumentParser) -> None:
    from flaxdraft.data.talks import Answering

    _file_and_target(parser)
    add_target_options(parser)
    add_template_options(parser)
    add_bad_row_option(parser)
    parser.add_argument("output_dir", type=Path, help="a folder for the answers; the same one goes on")
    parser.add_argument("--rows", type=at_least(1), help="answered together (32), or by each server at a time (64)")
    parser.add_argument(
        "--server", type=_server, action="append", default=[], metavar="URL",
        help="http://HOST:PORT/v1 of a server that runs the target, which is then not loaded; may be given again",
    )  # fmt: skip
    parser.add_argument("--model", metavar="NAME", help="what the servers call the target")
    parser.add_argument("--timeout", type=at_least(1), default=600, help="seconds for one answer of a server")
    for field in dataclasses.fields(Answering):
        whole = at_least(0 if field.name == "seed" else 1)
        kind = whole if isinstance(field.default, int) else float
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default)


def _server(text: str) -> str:
    if not re.fullmatch(r"https?://[^/\s]+(/\S*)?", text):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected http://HOST:PORT/v1")
    return text.rstrip("/")


def _capture_arguments(parser: argparse.ArgumentParser) -> None:
    _file_and_target(parser)
    add_target_options(parser)
    add_row_options(parser)
    parser.add_argument("output_dir", type=Path, help="the store; the same one goes on")
    parser.add_argument("--algorithm", default=algorithms.DEFAULT, help="that the store is for; it chooses the layers")
    parser.add_argument("--tap-layers", type=int, nargs="+", metavar="LAYER", help="(0-based) in place of those")
    parser.add_argument("--taps-dtype", choices=("bfloat16", "float32", "fp8"), default="bfloat16", help="on disk")
    parser.add_argument("--last-dtype", choices=("bfloat16", "float32"), default="bfloat16", help="on disk")
    parser.add_argument("--max-silent", type=share, default=0.5, help="largest share of rows that supervise nothing")
    parser.add_argument("--shard-tokens", type=at_least(1), default=16384, help="of one file, about")
    parser.add_argument("--batch-tokens", type=at_least(1), default=8192, help="of one forward pass")
    parser.add_argument("--part", type=_part, default=(0, 1), metavar="I/N", help="this host's share: 0/4, 1/4, ...")
    parser.add_argument("--plan", action="store_true", help="say what the store will take, and stop")


def _part(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    if not (part.isdigit() and parts.isdigit() and int(part) < int(parts)):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected I/N with I from 0 to N - 1")
    return int(part), int(parts)


def check_file(arguments: argparse.Namespace) -> int:
    from flaxdraft import targets
    from flaxdraft.data.check import as_table, check, draw_lengths
    from flaxdraft.data.conversations import read_conversations
    from flaxdraft.progress import CONSOLE

    opened, bad = targets.open_target(arguments.target), bad_rows(arguments)
    tokenizer, stops = opened.needed_tokenizer(), opened.needed_stop_tokens()
    options = chat_options(arguments, opened, template_of_rows(arguments, tokenizer))
    found = check(read_conversations(arguments.file, bad), tokenizer, options, stops, bad)
    CONSOLE.print(as_table(found, opened.special_tokens, opened.config().vocab_size, options.limit))
    if arguments.out is not None:
        draw_lengths(arguments.out, found, options.limit)
        CONSOLE.print(f"{arguments.out}: the lengths")
    return int(found.wrong(arguments.max_silent))


def show(arguments: argparse.Namespace) -> None:
    from rich.text import Text

    from flaxdraft import targets
    from flaxdraft.data.conversations import read_conversations
    from flaxdraft.data.templates import render
    from flaxdraft.progress import CONSOLE

    opened, bad = targets.open_target(arguments.target), bad_rows(arguments)
    tokenizer = opened.needed_tokenizer()
    options = chat_options(arguments, opened, template_of_rows(arguments, tokenizer))
    shown = total = supervised = silent = cut = 0
    conversations = [*read_conversations(arguments.file, bad)]  # all of them, for all that is wrong with the file
    for conversation in conversations[: arguments.rows]:
        try:
            rendered = render(tokenizer, conversation, options)
        except InputError as error:
            bad.add(error)
            continue
        share = int(rendered.assistant.sum())
        CONSOLE.rule(f"{conversation.where}, {len(rendered.tokens)} tokens, {share} supervised")
        text = Text()
        for begin, end, on in runs(rendered.assistant):
            piece = cast(str, tokenizer.decode(rendered.tokens[begin:end]))  # a list is of several rows
            # Colours are lost in a file; there the supervised text stands in marks.
            marked = piece if CONSOLE.is_terminal or not on else f"«{piece}»"
            text.append(marked, "bold green" if on else "dim")
        CONSOLE.print(text)
        shown, total = shown + 1, total + len(rendered.tokens)
        supervised, silent, cut = supervised + share, silent + (share == 0), cut + (rendered.num_cut > 0)
    CONSOLE.rule()
    CONSOLE.print(
        f"{shown} rows, {total} tokens, {supervised} supervised"
        + (f"; {silent} rows supervise nothing" if silent else "")
        + (f"; {cut} rows cut at {options.limit} tokens" if cut else "")
    )
    bad.judge()


def runs(mask):
    """(begin, end, value) of each run of equal values."""
    import numpy as np

    edges = [0, *(np.flatnonzero(np.diff(mask)) + 1), len(mask)]
    return [(begin, end, bool(mask[begin])) for begin, end in pairwise(edges) if begin < end]


def answer_all(arguments: argparse.Namespace) -> int | None:
    if arguments.server:
        return _ask_servers(arguments)
    if arguments.model is not None:
        raise InputError("--model: names a server's model; give --server, too, or leave it out")
    return on_all_hosts(lambda: _answer_all(arguments))


def _answering(arguments: argparse.Namespace) -> Answering:
    from flaxdraft.data.talks import Answering

    if not arguments.file.is_file():
        raise InputError(f"{arguments.file}: no such file")
    return Answering(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(Answering)})


def _asking(
    arguments: argparse.Namespace, options: Answering, target: TextSide
) -> tuple[Asking, list[Conversation], dict[str, Any]]:  # fmt: skip
    """How the target is asked, for which conversations, and what the folder of answers records of both."""
    from flaxdraft.data.conversations import read_conversations
    from flaxdraft.data.talks import Asking, answerable
    from flaxdraft.files.fetch import sha256_of
    from flaxdraft.stages.claims import RECORD

    tokenizer, bad = target.needed_tokenizer(with_template=True), bad_rows(arguments)
    template = template_of(arguments, tokenizer, arguments.output_dir / RECORD)
    asking = Asking(tokenizer, template, target.needed_stop_tokens(), options)
    conversations = answerable(read_conversations(arguments.file, bad), tokenizer, template, bad)
    bad.judge()
    inputs = {
        "target": arguments.target, "conversations": sha256_of(arguments.file), **dataclasses.asdict(options),
        **template_inputs(template, tokenizer),
    }  # fmt: skip
    return asking, conversations, inputs


def _say_counts(directory: Path, counts: Counter[str]) -> None:
    from flaxdraft.data.talks import FILE
    from flaxdraft.progress import CONSOLE

    CONSOLE.print(f"{counts.pop('answered')} conversations answered: {directory / FILE}")
    for reason, count in sorted(counts.items()):
        CONSOLE.print(f"  {count} {reason}")


def _ask_servers(arguments: argparse.Namespace) -> None:
    """Nothing here touches a device of this machine, which may be the server's."""
    import os

    import jax

    from flaxdraft.config import HostsConfig
    from flaxdraft.data.served_answers import Served, answer_from_servers
    from flaxdraft.data.server_client import Patience
    from flaxdraft.data.templates import tokenizer_digest
    from flaxdraft.devices.hosts import members
    from flaxdraft.stages.claims import claim
    from flaxdraft.targets.text_side import open_text_side

    jax.config.update("jax_platforms", "cpu")
    if arguments.model is None:
        raise InputError("--server: give --model NAME, too: what the server calls the target")
    if arguments.mesh or arguments.dtype:
        raise InputError("--mesh and --dtype are for a target that is loaded here; leave them out with --server")
    if members(HostsConfig(), os.environ) is not None:
        raise InputError("--server: found several processes; start this command once, it keeps all servers busy")
    options, opened = _answering(arguments), open_text_side(arguments.target)
    asking, conversations, inputs = _asking(arguments, options, opened)
    inputs |= {"tokenizer": tokenizer_digest(asking.tokenizer), "model": arguments.model}
    claim(arguments.output_dir, inputs, _OTHER_FOLDER)
    served = Served(arguments.server, arguments.model, arguments.rows or 64, Patience(timeout=arguments.timeout))
    counts = answer_from_servers(arguments.output_dir, conversations, served, asking, opened.num_tokens)
    _say_counts(arguments.output_dir, counts)


def _answer_all(arguments: argparse.Namespace) -> None:
    from flaxdraft import targets
    from flaxdraft.data.regenerate import regenerate
    from flaxdraft.files.fetch import content_of
    from flaxdraft.nn.precision import of_both
    from flaxdraft.stages.claims import claim_together

    options = _answering(arguments)
    dtype, mesh = dtype_or_default(arguments.dtype), target_mesh(arguments.mesh)
    longest = options.max_prompt_tokens + options.max_new_tokens
    opened = targets.open_target(arguments.target)
    opened.needed_stop_tokens()  # what the target lacks is said before the options that do not fit it
    if longest > (context := opened.config().context):
        raise InputError(
            f"--max-prompt-tokens and --max-new-tokens: found {longest} together, more than the target's context of "
            f"{context}"
        )
    asking, conversations, inputs = _asking(arguments, options, opened)
    inputs |= {"content": content_of(arguments.target, None), "dtype": dtype}
    claim_together(arguments.output_dir, inputs, _OTHER_FOLDER)
    model = targets.load_target(opened, precision=of_both(dtype), mesh=mesh).model
    counts = regenerate(arguments.output_dir, conversations, model, asking, arguments.rows or 32)
    _say_counts(arguments.output_dir, counts)


def capture_all(arguments: argparse.Namespace) -> int:
    return on_all_hosts(lambda: _capture_all(arguments))


def _capture_all(arguments: argparse.Namespace) -> None:
    import numpy as np

    from flaxdraft import targets
    from flaxdraft.data.conversations import read_conversations
    from flaxdraft.data.draft_vocabulary import describe_sizes
    from flaxdraft.data.store import PLAN, Source
    from flaxdraft.data.store_capture import capture
    from flaxdraft.data.store_writer import make_plan, start
    from flaxdraft.data.templates import render_all, tokenizer_digest
    from flaxdraft.files.fetch import content_of
    from flaxdraft.nn.precision import of_both
    from flaxdraft.progress import CONSOLE

    dtype, mesh = dtype_or_default(arguments.dtype), target_mesh(arguments.mesh)
    opened, bad = targets.open_target(arguments.target), bad_rows(arguments)
    tokenizer = opened.needed_tokenizer()
    template = template_of_rows(arguments, tokenizer, arguments.output_dir / PLAN)
    config = opened.config(algorithms.tap_layers(arguments.algorithm, opened.config(), arguments.tap_layers))
    options = chat_options(arguments, opened, template)
    documents = render_all(
        read_conversations(arguments.file, bad), tokenizer, options, arguments.max_silent, bad=bad
    )  # fmt: skip
    source = Source(
        target=content_of(str(opened.path), None), tokenizer=tokenizer_digest(tokenizer),
        data=documents.digest, compute_dtype=dtype, tap_layers=config.tap_layers,
        hidden_size=config.hidden_size, vocab_size=config.vocab_size, taps_dtype=arguments.taps_dtype,
        last_dtype=arguments.last_dtype, **template_inputs(template, tokenizer),
    )  # fmt: skip
    lengths = [len(row.tokens) for row in documents.rows]
    plan = make_plan(source, lengths, arguments.shard_tokens, config.tie_word_embeddings)
    supervised = sum(int(row.assistant.sum()) for row in documents.rows)
    CONSOLE.print(
        f"{len(documents.rows)} rows, {plan.num_tokens} tokens, {supervised} supervised, {documents.silent} rows left "
        f"out that supervise nothing, {documents.cut} cut at {options.limit} tokens; {len(plan.first_rows) - 1} "
        f"shards, {plan.num_bytes / 1e9:.2f} GB"
    )
    counts = np.bincount(
        np.concatenate([row.tokens[row.assistant] for row in documents.rows]), minlength=config.vocab_size
    )
    CONSOLE.print(describe_sizes(counts, opened.special_tokens))
    if arguments.plan:
        return
    missing = start(arguments.output_dir, plan)
    if missing:
        CONSOLE.print(f"{len(missing)} shards to do")
    loaded = targets.load_target(opened, tap_layers=config.tap_layers, precision=of_both(dtype), mesh=mesh)
    complete = capture(
        arguments.output_dir, plan, documents.rows, loaded.model, batch_tokens=arguments.batch_tokens,
        part=arguments.part,
    )  # fmt: skip
    done = "complete" if complete else "this part is done; when all are, run part 0 again, which finishes the store"
    CONSOLE.print(f"{arguments.output_dir}: {done}")


if __name__ == "__main__":
    sys.exit(main())
