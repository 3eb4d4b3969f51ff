"""One server with OpenAI's interface (vLLM, SGLang, llama.cpp, TensorRT-LLM, ...), and what may go wrong with it.

It is asked at `/completions` with token ids, so that it reads the very prompt that a loaded target would read, whatever
chat template it has. Beyond OpenAI's fields it is asked for token ids, and told to leave out what would change the
distribution: servers take top_k and its like from the model's generation_config.json, or have defaults of their own.
Not every server takes every field; which of its `ways` one takes is tried with one token each.
"""

from __future__ import annotations

import asyncio
import dataclasses
import email.utils
import random
import time
from collections.abc import Mapping, Sequence
from typing import Any

import httpx2

from flaxdraft.data.server_replies import Unanswered, first_choice, given_ids
from flaxdraft.errors import InputError

KEY = "FLAXDRAFT_SERVER_KEY"  # of the environment
_BUSY = (429, 503)  # the server's own state; another request would fare no better
_LATER = (408, 409, 425)  # worth another try, as all from 500 on
_NOT_THIS = (400, 413, 422)  # the request is refused, another one may not be
_SHOWN = 200  # characters of what a server says, in messages

_LONGEST_WAIT = 3600.0  # seconds that a server may ask for
_FIRST_TRIES = 4  # of a server that has answered nothing yet

_IDS = {"return_token_ids": True}  # vLLM, SGLang
_LOGPROBS = {"logprobs": 1, "return_tokens_as_token_ids": True}  # llama.cpp's logprobs hold ids, older vLLM's too
_PURE = {
    "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "skip_special_tokens": False,
    "spaces_between_special_tokens": False,
}  # fmt: skip


def ways(stop_tokens: Sequence[int]) -> list[dict[str, Any]]:
    """Fields beyond OpenAI's, from the best to none. Most servers ignore fields that they do not know; TensorRT-LLM
    refuses them, and calls top_k 0 what others call -1."""
    pure = _PURE | {"stop_token_ids": [*stop_tokens]}
    return [pure | _IDS, pure | _LOGPROBS, pure | {"top_k": 0}, {}]


@dataclasses.dataclass(frozen=True)
class Patience:
    """How long servers are waited for, in seconds."""

    timeout: float = 600.0  # of one answer
    check: float = 30.0  # of what is asked before work begins, and of connections
    first_pause: float = 0.5  # behind a failure; doubled by each further one
    longest_pause: float = 60.0
    give_up: float = 300.0  # a server that answers nothing for so long
    tries: int = 8  # of one conversation, at a server that answers others


class RequestRefused(Exception):
    """The server takes no such request."""


class Server:
    """One of the servers, and how it fares."""

    def __init__(self, url: str, model: str, client: httpx2.AsyncClient, patience: Patience):
        self.url, self.model, self._client, self._patience = url, model, client, patience
        self.way: dict[str, Any] = {}  # see `choose_way`
        self.used = self.unused = 0  # answers
        self.is_gone = False
        self._failures = 0  # since the last answer; of requests that were in flight together, one
        self._failed_at = self._free_at = 0.0
        self._silent_since: float | None = None  # failures alone

    @property
    def heard(self) -> int:
        """Answers, whatever became of them."""
        return self.used + self.unused

    async def check_model(self, longest: int) -> None:
        """
        Args:
            longest: tokens of a prompt with its answer.

        Raises:
            InputError: the server is not there, does not have the model, or not for so many tokens.
        """
        try:
            reply = await self._request("GET", "models", None, self._patience.check)
        except (Unanswered, RequestRefused) as error:
            raise InputError(
                f"--server {self.url}: {error}; start the server, or correct the address (http://HOST:PORT/v1)"
            ) from error
        listed = reply.get("data")
        models = [one for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []
        found = next((one for one in models if one.get("id") == self.model), None)
        if found is None:
            names = ", ".join(str(one.get("id")) for one in models) or "none"
            raise InputError(f"--model: {self.url} has no {self.model!r}, but: {names}")
        held = found.get("max_model_len")
        if isinstance(held, int) and longest > held:
            raise InputError(
                f"--max-prompt-tokens and --max-new-tokens: found {longest} together, more than the {held} tokens that "
                f"{self.url} was started for"
            )

    async def choose_way(self, prompt: Sequence[int], fields: Mapping[str, Any], stop_tokens: Sequence[int]) -> bool:
        """Finds out which fields the server takes. Returns whether it gives token ids.

        Args:
            prompt: to try it with.
            fields: of every request.

        Raises:
            InputError: it takes not even OpenAI's own, or reads another prompt.
        """
        taken, refusal = None, ""
        for self.way in ways(stop_tokens):
            try:
                reply = await self._patiently(prompt, {**fields, "max_tokens": 1})
            except RequestRefused as error:
                refusal = refusal or str(error)
                continue
            self._check_prompt(reply, prompt)
            if given_ids(first_choice(reply)) is not None:
                return True
            taken = self.way if taken is None else taken
        if taken is None:
            raise InputError(f"--server {self.url}: {refusal}")
        self.way = taken
        return False

    def _check_prompt(self, reply: Mapping[str, Any], prompt: Sequence[int]) -> None:
        """
        Raises:
            InputError: the server reads another prompt than it was given, as far as it says what it reads.
        """
        read, usage = first_choice(reply).get("prompt_token_ids"), reply.get("usage")
        num = usage.get("prompt_tokens") if isinstance(usage, dict) else None
        if (isinstance(read, list) and read != [*prompt]) or (type(num) is int and num != len(prompt)):
            num = len(read) if isinstance(read, list) else num
            raise InputError(
                f"--server {self.url}: reads another prompt than it was given ({num} tokens, not {len(prompt)}); "
                "expected a server that takes token ids as they are"
            )

    async def _patiently(self, prompt: Sequence[int], fields: Mapping[str, Any]) -> dict[str, Any]:
        """The reply to a request before work begins: a few tries, then it is wrong input.

        Raises:
            InputError: nothing came.
            RequestRefused: see `complete`.
        """
        why = ""
        for _ in range(_FIRST_TRIES):
            await self.when_free()
            started = time.monotonic()
            try:
                return await self.complete(prompt, fields, self._patience.check)
            except Unanswered as error:
                self.failed(error, started)
                why = str(error)
        raise InputError(f"--server {self.url}: {why}, {_FIRST_TRIES} times; look at what the server says")

    async def complete(
        self, prompt: Sequence[int], fields: Mapping[str, Any], timeout: float | None = None
    ) -> dict[str, Any]:  # fmt: skip
        """The reply to a request.

        Args:
            fields: of the request, beside those of the server's way.
            timeout: in seconds; that of its patience by default.

        Raises:
            Unanswered: there is no whole reply.
            RequestRefused: the server takes no such request.
            InputError: it takes none at all.
        """
        body = {"model": self.model, "prompt": [*prompt], **fields, **self.way}
        reply = await self._request("POST", "completions", body, timeout or self._patience.timeout)
        first_choice(reply)
        return reply

    async def _request(
        self, method: str, path: str, body: Mapping[str, Any] | None, timeout: float
    ) -> dict[str, Any]:  # fmt: skip
        seconds = httpx2.Timeout(timeout, connect=min(timeout, self._patience.check))
        try:
            response = await self._client.request(method, f"{self.url}/{path}", json=body, timeout=seconds)
        except httpx2.TimeoutException as error:
            raise Unanswered(f"no answer in time ({type(error).__name__})") from error
        except httpx2.ConnectError as error:
            raise Unanswered(f"cannot be reached ({str(error)[:_SHOWN]})", is_servers=True) from error
        except httpx2.RequestError as error:
            raise Unanswered(f"{type(error).__name__} ({str(error)[:_SHOWN]})") from error
        except httpx2.InvalidURL as error:
            raise InputError(f"--server {self.url}: {error}; expected http://HOST:PORT/v1") from error
        if (code := response.status_code) != 200:
            self._fail(code, response)
        try:
            reply = response.json()
        except ValueError as error:
            raise Unanswered(f"its answer is no JSON ({str(error)[:_SHOWN]})") from error
        if not isinstance(reply, dict):
            raise Unanswered(f"its answer is {type(reply).__name__}, expected an object")
        return reply

    def _fail(self, code: int, response: httpx2.Response) -> None:
        said = f"HTTP {code}: {' '.join(response.text.split())[:_SHOWN]}"
        if code >= 500 or code in (*_BUSY, *_LATER):
            raise Unanswered(said, wait=_retry_after(response.headers.get("Retry-After")), is_servers=code in _BUSY)
        if code in _NOT_THIS:
            raise RequestRefused(said)
        mend = f"give its key in the environment variable {KEY}" if code in (401, 403) else "correct the address"
        raise InputError(f"--server {self.url}: {said}; {mend}")

    def is_free(self) -> bool:
        """Whether no pause is on."""
        return time.monotonic() >= self._free_at

    async def when_free(self) -> None:
        while not self.is_free():
            await asyncio.sleep(self._free_at - time.monotonic())

    def answered(self) -> None:
        """Takes note of an answer."""
        self._failures, self._silent_since = 0, None

    def failed(self, error: Unanswered, started: float) -> None:
        """Takes note of a failure: a pause, as long as the server asks for or longer each time. A server that answers
        nothing for long is gone; one that says when it will is not.

        Args:
            started: when the request began.
        """
        now = time.monotonic()
        if error.wait is not None:
            self._free_at, self._silent_since = max(self._free_at, now + error.wait), None
            return
        self._silent_since = now if self._silent_since is None else self._silent_since
        if now - self._silent_since > self._patience.give_up:
            self.is_gone = True
        if started >= self._failed_at:
            pause = min(self._patience.first_pause * 2 ** min(self._failures, 20), self._patience.longest_pause)
            self._free_at = max(self._free_at, now + pause * random.uniform(0.5, 1.0))
            self._failures, self._failed_at = self._failures + 1, now


def _retry_after(text: str | None) -> float | None:
    """Seconds; the header has a number of them, or a date."""
    if text is None:
        return None
    try:
        wait = float(text) if text.isdecimal() else email.utils.parsedate_to_datetime(text).timestamp() - time.time()
    except ValueError:
        return None
    return min(max(wait, 0.0), _LONGEST_WAIT)
