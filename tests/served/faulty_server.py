"""A small server with OpenAI's interface in a thread, which fails as it is told to."""

import json
import time
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any, NamedTuple

MODEL = "org/target"
OPENAIS = frozenset({"model", "prompt", "max_tokens", "temperature", "top_p", "seed", "logprobs"})
TENSORRTS = OPENAIS | {
    "top_k", "min_p", "repetition_penalty", "skip_special_tokens", "spaces_between_special_tokens", "stop_token_ids",
}  # fmt: skip


class Said(NamedTuple):
    """What the server's model generates."""

    ids: list[int]
    text: str
    finish: str = "stop"


class FaultyServer:
    """What it is told, and what it was asked."""

    def __init__(self, answer: Callable[[list[int]], Said]):
        self.answer = answer
        self.gives = "token_ids"  # or "content", "tagged" (both in logprobs), "text"
        self.fields: frozenset[str] | None = None  # that it takes; all by default
        self.counts = True  # whether it says how many tokens there were
        self.fault: Callable[[int, list[int]], Any] = lambda number, prompt: None  # of each request; see `Handler`
        self.first_fault: Any = None  # of those that try what the server takes
        self.model: dict[str, Any] = {"id": MODEL}
        self.key: str | None = None
        self.asked: list[dict[str, Any]] = []  # but for those with one token, which try what the server takes
        self.times: list[float] = []
        self.tried: list[dict[str, Any]] = []
        self.url = ""
        self._lock = Lock()

    def number(self, body: dict[str, Any]) -> int:
        """Of a request."""
        with self._lock:
            self.asked.append(body)
            self.times.append(time.monotonic())
            return len(self.asked) - 1

    def reply(self, body: dict[str, Any]) -> dict[str, Any]:
        said = self.answer(body["prompt"])
        if body["max_tokens"] == 1:
            said = Said(said.ids[:1], "", "length")
        choice: dict[str, Any] = {"index": 0, "text": said.text, "finish_reason": said.finish, "logprobs": None}
        if self.gives == "token_ids" and body.get("return_token_ids"):
            choice |= {"token_ids": said.ids, "prompt_token_ids": body["prompt"]}
        if self.gives == "content" and body.get("logprobs"):
            choice["logprobs"] = {"content": [{"id": token, "logprob": -0.1} for token in said.ids]}
        if self.gives == "tagged" and body.get("logprobs") and body.get("return_tokens_as_token_ids"):
            choice["logprobs"] = {"tokens": [f"token_id:{token}" for token in said.ids]}
        usage = {"completion_tokens": len(said.ids), "prompt_tokens": len(body["prompt"])}
        return {"choices": [choice], "usage": usage if self.counts else None}


def _handler(server: FaultyServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        """A fault is a status, (status, headers), "hang", "cut", "drop", "no JSON", or a reply in place of the right
        one."""

        protocol_version = "HTTP/1.1"
        wbufsize, disable_nagle_algorithm = -1, True  # a reply in one piece

        def log_message(self, *_: Any) -> None:
            """Silent."""

        def is_let_in(self) -> bool:
            if server.key and self.headers.get("Authorization") != f"Bearer {server.key}":
                self.say(401, {"error": "no key"})
                return False
            return True

        def do_GET(self) -> None:
            if not self.is_let_in():
                return
            if self.path == "/v1/models":
                self.say(200, {"data": [server.model, {"id": "another"}]})
            else:
                self.say(404, {"error": "not found"})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if not self.is_let_in():
                return None
            if server.fields is not None and (more := sorted({*body} - server.fields)):
                return self.say(400, {"error": f"extra inputs are not permitted: {more}"})
            if body["max_tokens"] == 1:
                server.tried.append(body)
                fault = server.first_fault
            else:
                fault = server.fault(server.number(body), body["prompt"])
            if isinstance(fault, int):
                return self.say(fault, {"error": "told to"})
            if isinstance(fault, tuple):
                return self.say(fault[0], {"error": "told to"}, fault[1])
            if fault == "hang":
                time.sleep(0.6)
                self.close_connection = True
            elif fault == "drop":
                self.close_connection = True
            elif fault in ("cut", "no JSON"):
                text = json.dumps(server.reply(body)).encode()
                self.head(200, len(text) if fault == "cut" else len(text) - 9)
                self.wfile.write(text[:-9])
                self.close_connection = True
            else:
                self.say(200, server.reply(body) if fault is None else fault)

        def say(self, code: int, reply: Any, headers: dict[str, str] | None = None) -> None:
            text = json.dumps(reply).encode()
            self.head(code, len(text), headers)
            self.wfile.write(text)

        def head(self, code: int, length: int, headers: dict[str, str] | None = None) -> None:
            self.send_response(code)
            for name, value in {"Content-Length": str(length), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()

    return Handler


class _HTTPServer(ThreadingHTTPServer):
    daemon_threads, block_on_close, request_queue_size = True, False, 128

    def handle_error(self, *_: Any) -> None:
        """Clients that hang up are what tests are about."""


@contextmanager
def serving(answer: Callable[[list[int]], Said]):
    """A server that listens until the block ends."""
    server = FaultyServer(answer)
    inner = _HTTPServer(("127.0.0.1", 0), _handler(server))
    server.url = f"http://127.0.0.1:{inner.server_address[1]}/v1"
    thread = Thread(target=inner.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        inner.shutdown()
        inner.server_close()
        thread.join()
