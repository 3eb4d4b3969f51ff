"""Servers that run the target answer conversations: the same lines as regenerate.py writes, from models of any size.

Every server has as many requests in flight as it is allowed; all take conversations from one queue. A request that
comes to nothing puts its conversation back, and what asked for it pauses, longer each time: so work goes to the servers
that answer. A conversation is written once, when it is done; stopping in between loses what was in flight alone.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
import os
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import httpx2

from flaxdraft.data.chat import Chat
from flaxdraft.data.conversations import Conversation
from flaxdraft.data.prompts import render_messages
from flaxdraft.data.server_client import KEY, Patience, RequestRefused, Server
from flaxdraft.data.server_replies import Reader, Unanswered, Unlike, end_of_turn
from flaxdraft.data.talks import FILE, Asking, Results, Talk, finished, to_answer
from flaxdraft.errors import InputError
from flaxdraft.progress import CONSOLE, SECONDS_BETWEEN_LINES, bar

HOPELESS = 16  # answers that cannot be used, when none could be before


@dataclasses.dataclass(frozen=True)
class Served:
    """Who is asked, for what."""

    urls: Sequence[str]
    model: str  # as the servers call it
    in_flight: int = 64  # requests, at each of them
    patience: Patience = dataclasses.field(default_factory=Patience)


def answer_from_servers(
    directory: Path, conversations: Iterable[Conversation], served: Served, asking: Asking, num_tokens: int
) -> Counter[str]:
    """Answers what the file does not hold yet; returns how many conversations were `answered`, and of those that were
    not, or not to their end, how many for each reason.

    Args:
        conversations: those that are `answerable`.
        num_tokens: rows of the target's embedding.

    Raises:
        InputError: no server is left, one takes no requests, or has another model.
    """
    left, counts = to_answer(conversations, finished(directory / FILE))
    if left:
        reader = Reader(asking, num_tokens, end_of_turn(asking.tokenizer, asking.template, asking.stop_tokens))
        asyncio.run(_answer(directory / FILE, left, served, reader, counts))
    return counts


async def _answer(path: Path, left: list[Talk], served: Served, reader: Reader, counts: Counter[str]) -> None:
    async with _client(served) as client:
        servers = [Server(url, served.model, client, served.patience) for url in served.urls]
        await _check(servers, left, reader.asking)
        done = counts["answered"]
        with bar("conversations", done + len(left), done) as progress, path.open("ab") as file:
            results = Results(reader.asking, counts, progress, file)
            try:
                await _Work(servers, reader, results).answer(left, served)
            finally:
                results.sync()


def _client(served: Served) -> httpx2.AsyncClient:
    key = os.environ.get(KEY)
    total = served.in_flight * len(served.urls)
    return httpx2.AsyncClient(
        headers={"Authorization": f"Bearer {key}"} if key else {},
        limits=httpx2.Limits(max_connections=total, max_keepalive_connections=total),
    )


async def _check(servers: Sequence[Server], left: Sequence[Talk], asking: Asking) -> None:
    """All that can be known before work begins, with the shortest question there is.

    Raises:
        InputError: see `Server.check_model` and `Server.choose_way`.
    """
    options = asking.options
    for server in servers:
        await server.check_model(options.max_prompt_tokens + options.max_new_tokens)
    talk = min(left, key=lambda talk: sum(len(message["content"]) for message in talk.asked[0]))
    prompt = render_messages(asking.tokenizer, talk.asked[0], talk.source.where, talk.source.tools, asking.template)
    for server in servers:
        gives_ids = await server.choose_way(prompt, _fields(talk, asking), asking.stop_tokens)
        how = "gives token ids" if gives_ids else "gives text alone, which is tokenised again and checked"
        missing = "" if server.way else "; its own top_k, min_p and repetition penalty hold"
        CONSOLE.print(f"{server.url}: {how}{missing}")


def _fields(talk: Talk, asking: Asking) -> dict[str, Any]:
    """Of the request for a talk's next answer. Greedy answers need no seed, which costs some servers time."""
    options = asking.options
    seed = {"seed": talk.seed(options.seed)} if options.temperature > 0 else {}
    return {
        "max_tokens": options.max_new_tokens, "temperature": options.temperature, "top_p": options.top_p, **seed,
    }  # fmt: skip


class _Work:
    """A queue of conversations, and those that answer them."""

    def __init__(self, servers: Sequence[Server], reader: Reader, results: Results):
        self._servers, self._reader, self._results = servers, reader, results
        self._queue: asyncio.Queue[Talk] = asyncio.Queue()
        # Of a talk at a server: how many answers the server had given at the first failure, and how often it failed.
        self._failures: dict[tuple[int, str], tuple[int, int]] = {}
        self._spoke = -math.inf

    async def answer(self, talks: Iterable[Talk], served: Served) -> None:
        """
        Raises:
            InputError: see `answer_from_servers`.
        """
        for talk in talks:
            self._queue.put_nowait(talk)
        wrong: InputError | None = None
        try:
            async with asyncio.TaskGroup() as group:
                workers = [
                    group.create_task(self._work(server, served))
                    for server in self._servers for _ in range(served.in_flight)
                ]  # fmt: skip
                await self._queue.join()
                for worker in workers:
                    worker.cancel()
        except* InputError as errors:
            wrong = cast(InputError, errors.exceptions[0])
        if wrong is not None:
            raise wrong

    async def _work(self, server: Server, served: Served) -> None:
        """One request in flight after the other."""
        while not server.is_gone:
            await server.when_free()
            talk = await self._queue.get()
            try:
                # A pause may have begun while this waited. Others may be free.
                if server.is_free() and not server.is_gone:
                    await self._ask(server, talk, served.patience)
                else:
                    self._queue.put_nowait(talk)
            finally:
                self._queue.task_done()

    async def _ask(self, server: Server, talk: Talk, patience: Patience) -> None:
        """Asks for all that is left of a conversation, which is then done, left out, or put back."""
        asking = self._reader.asking
        while not talk.is_done and (found := talk.next_prompt(asking)) is not None:
            messages, prompt = found
            chat = Chat(asking.tokenizer, asking.template, talk.source.where, messages, talk.source.tools)
            started = time.monotonic()
            try:
                reply = await server.complete(prompt, _fields(talk, asking))
                answer = self._reader.tokens(reply, chat, prompt, f"--server {server.url}")
            except Unanswered as error:
                self._put_back(server, talk, error, started, patience)
                return
            except (Unlike, RequestRefused) as error:
                server.answered()
                self._end(server, talk, error)
            else:
                server.answered()
                server.used += 1
                talk.hear(messages, prompt, answer, asking)
        self._results.take(talk)

    def _put_back(self, server: Server, talk: Talk, error: Unanswered, started: float, patience: Patience) -> None:
        """Puts a conversation back for another try. One that a server fails at, while it answers others, is left out
        in the end; a server that answers nothing says nothing about it.

        Raises:
            InputError: no server is left.
        """
        was_gone = server.is_gone
        server.failed(error, started)
        if server.is_gone and all(one.is_gone for one in self._servers):
            raise InputError(
                f"--server {server.url}: {error}; no server has answered for {patience.give_up:.0f} s. What was "
                "answered stays; the same command goes on"
            )
        is_given_up = server.is_gone and not was_gone
        if (now := time.monotonic()) - self._spoke > SECONDS_BETWEEN_LINES or is_given_up:
            self._spoke = now
            CONSOLE.print(f"  {server.url}: {error}; {'given up' if server.is_gone else 'asked again'}")
        answers, tries = self._failures.get((talk.number, server.url), (server.heard, 0))
        tries += not error.is_servers
        self._failures[talk.number, server.url] = answers, tries
        if tries >= patience.tries and answers < server.heard:
            self._results.leave_out(f"not answered in {patience.tries} tries, left out until the command is run again")
        else:
            self._queue.put_nowait(talk)

    def _end(self, server: Server, talk: Talk, error: Exception) -> None:
        """Ends a conversation before an answer that cannot be used.

        Raises:
            InputError: none of this server's could.
        """
        server.unused += 1
        if server.used == 0 and server.unused >= HOPELESS:
            raise InputError(
                f"--server {server.url}: none of its first {HOPELESS} answers can be used ({error}); does it run "
                "another model than --target?"
            )
        if isinstance(error, RequestRefused):
            if server.unused == 1:
                CONSOLE.print(f"  {server.url}: {talk.source.where}: {error}")
            talk.ended = "with a request that the server refused, ended before it"
        else:
            talk.ended = f"with an answer whose {error}, ended before it"
