"""From what a server replies to the token ids that the target produced.

Where the server gives ids they are taken, once their text is the server's text. Where it gives text alone, the text is
tokenised behind the prompt; that these are the tokens which the target produced is believed only if they say the text
again and are as many as the server counted, since a text has several tokenisations and special tokens may be left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from flaxdraft.data.chat import Chat
from flaxdraft.data.chat_template import ChatTemplate
from flaxdraft.data.conversations import Conversation
from flaxdraft.data.talks import Asking
from flaxdraft.data.templates import ChatOptions, render
from flaxdraft.data.token_spans import encode
from flaxdraft.errors import InputError

_HALF = "\ufffd"  # what decoders write for bytes that are no letter
_TAGGED = "token_id:"  # what a token is called in logprobs where return_tokens_as_token_ids was asked for


class Unanswered(Exception):
    """A request came to nothing, and is worth another try."""

    def __init__(self, why: str, *, wait: float | None = None, is_servers: bool = False):
        """
        Args:
            wait: seconds that the server asks for.
            is_servers: it says nothing about the request; any other would have failed, too.
        """
        super().__init__(why)
        self.wait, self.is_servers = wait, is_servers


class Unlike(Exception):
    """An answer's tokens are not known."""


def first_choice(reply: Mapping[str, Any]) -> dict[str, Any]:
    """What was generated.

    Raises:
        Unanswered: the reply holds nothing of the kind.
    """
    choices = reply.get("choices")
    if not (isinstance(choices, list) and choices and isinstance(choices[0], dict)):
        raise Unanswered("its answer has no choices")
    return choices[0]


def given_ids(choice: Mapping[str, Any]) -> list[int] | None:
    """The token ids that a server gives, by themselves or in its logprobs; None where it gives none."""
    ids: Any = choice.get("token_ids")
    logprobs = choice.get("logprobs")
    if ids is None and isinstance(logprobs, dict):
        content, tokens = logprobs.get("content"), logprobs.get("tokens")
        if isinstance(content, list) and content:  # llama.cpp
            ids = [one.get("id") if isinstance(one, dict) else None for one in content]
        elif isinstance(tokens, list) and tokens:
            digits = [str(token).removeprefix(_TAGGED) for token in tokens if str(token).startswith(_TAGGED)]
            ids = [int(one) if one.isdecimal() else None for one in digits] if len(digits) == len(tokens) else None
    if isinstance(ids, list) and all(type(token) is int for token in ids):
        return ids
    return None


def end_of_turn(tokenizer: Any, template: ChatTemplate, stop_tokens: Sequence[int]) -> int:
    """The token that is taken for an answer's end where a server does not say which one it was: the one that the chat
    template writes behind a turn, else the tokenizer's."""
    turns = ({"role": "user", "content": "yes?"}, {"role": "assistant", "content": "yes"})
    whole = Conversation("a turn", "", "", "", turns)
    try:
        rendered = render(tokenizer, whole, ChatOptions(1 << 20, template=template, stop_tokens=stop_tokens))
        candidates = [*rendered.tokens[rendered.assistant][-1:].tolist(), tokenizer.eos_token_id]
    except InputError:
        candidates = [tokenizer.eos_token_id]
    return next((token for token in candidates if token in stop_tokens), stop_tokens[0])


@dataclasses.dataclass(frozen=True)
class Reader:
    """Reads replies to prompts of one target."""

    asking: Asking
    num_tokens: int  # rows of the target's embedding
    end: int  # see `end_of_turn`

    def tokens(self, reply: Mapping[str, Any], chat: Chat, prompt: list[int], where: str) -> list[int]:
        """An answer, which ends with a stop token if it is done.

        Args:
            chat: what the prompt was rendered from.
            where: the reply came from, for messages.

        Raises:
            Unanswered: the reply is no whole answer.
            Unlike: its tokens are not known.
            InputError: a token is none of the target's.
        """
        choice = first_choice(reply)
        text, why = choice.get("text"), choice.get("finish_reason")
        if not isinstance(text, str) or why not in ("stop", "length"):
            raise Unanswered(f"its answer has text {str(text)[:40]!r} and finish_reason {why!r}, not stop or length")
        given = given_ids(choice)
        if given is not None:
            self._check(given, text, where)
        ids = self._encoded(text, chat, prompt) if given is None else given
        answer = ids if why == "length" or (ids and ids[-1] in self.asking.stop_tokens) else [*ids, self._end(choice)]
        if not answer:
            raise Unlike("tokens are none")
        if given is None:
            self._check_count(reply, len(answer), why)
        return answer

    def _end(self, choice: Mapping[str, Any]) -> int:
        """The token that ended an answer: servers name it where it is not the tokenizer's eos token."""
        for named in (choice.get("stop_reason"), choice.get("matched_stop")):  # vLLM's and SGLang's
            if type(named) is int and named in self.asking.stop_tokens:
                return named
        return self.end

    def _check(self, ids: list[int], text: str, where: str) -> None:
        wrong = [token for token in ids if not 0 <= token < self.num_tokens]
        if wrong:
            raise InputError(
                f"{where}: token {wrong[0]} in an answer, the target has 0 to {self.num_tokens - 1}; give the target "
                "that the server runs (--target), or the server that runs it"
            )
        body = ids[:-1] if ids and ids[-1] in self.asking.stop_tokens else ids
        said = {_plain(self._decoded(part, skip)) for part in (ids, body) for skip in (False, True)}
        if _plain(text) not in said:
            raise Unlike("tokens do not say its text")

    def _encoded(self, text: str, chat: Chat, prompt: list[int]) -> list[int]:
        if _HALF in text:
            raise Unlike("text has halves of letters")
        whole, _ = encode(self.asking.tokenizer, chat.text(chat.messages, prompt=True) + text)
        ids = whole.tolist()
        if ids[: len(prompt)] != prompt:
            raise Unlike("text cannot be told from its prompt")
        ids = ids[len(prompt) :]
        if self._decoded(ids, False) != text:
            raise Unlike("text reads otherwise once it is tokenised")
        return ids

    def _check_count(self, reply: Mapping[str, Any], num: int, why: str) -> None:
        """Servers count the token that ended an answer, or not."""
        usage = reply.get("usage")
        counted = usage.get("completion_tokens") if isinstance(usage, dict) else None
        if type(counted) is int and counted not in ((num,) if why == "length" else (num, num - 1)):
            raise Unlike("text is tokenised otherwise than the server did")

    def _decoded(self, ids: list[int], skip: bool) -> str:
        return self.asking.tokenizer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)


def _plain(text: str) -> str:
    """Without what decoders differ in: white space at the ends, and halves of letters."""
    return text.replace(_HALF, "").strip()
