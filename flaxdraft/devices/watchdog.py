"""A line of TCP between process 0 and every other process: who is alive, who failed and why, who may go on.

The JAX runtime ends every process, without a word of Python, once a peer has missed its heartbeats. This watch is
quicker: a killed peer closes its connection at once, a stopped one falls silent, a failing one says why. All others
then print who it was and leave with the code on which launchers start a run again.

Lines, each ended by a newline: `hello TOKEN INDEX HOST` and `.` (I am alive) to process 0; `.`, `pass NAME` (process 0
is through with NAME) and `lost CODE WHY` from it; `failed CODE WHY` and `bye` both ways.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn

RESTART = 75  # EX_TEMPFAIL: the run can go on from its last checkpoint; launchers start it again on this code
_BEAT = 1.0  # seconds between signs of life


def leave(code: int, message: str) -> NoReturn:
    """Ends the process at once: no clean-up that would wait for a dead peer."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.write(2, f"flaxdraft: {message}\n".encode())
    os._exit(code)


class _Line:
    """One connection: whole lines in, lines out, and when it was last heard."""

    def __init__(self, connection: socket.socket, index: int = -1, host: str = ""):
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket, self.index, self.host = connection, index, host
        self.heard, self.left = time.monotonic(), False
        self._rest = b""

    def send(self, line: str) -> None:
        with contextlib.suppress(OSError):  # gone or deaf: reading will tell, or its silence
            self.socket.sendall(line.encode() + b"\n")

    def receive(self) -> list[str] | None:
        """The lines that have come since; None once the other end is closed."""
        try:
            data = self.socket.recv(65536)
        except BlockingIOError:
            return []
        except OSError:
            return None
        if not data:
            return None
        self.heard = time.monotonic()
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [line.decode(errors="replace") for line in lines]


class Peers:
    """The watch over the other processes, in a thread of its own."""

    def __init__(self, index: int, count: int, silence: float, on_loss: Callable[[int, str], None]):
        """
        Args:
            silence: seconds after which a peer that says nothing counts as lost.
            on_loss: called with an exit code and a message; ends the process.
        """
        self.index, self.count = index, count
        self._silence, self._on_loss = silence, on_loss
        self._selector = selectors.DefaultSelector()
        self._passed: set[str] = set()
        self._news = threading.Condition()
        self._lines: list[_Line] = []
        self._closed = False
        self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)

    @classmethod
    def gather(
        cls, index: int, count: int, silence: float, broadcast: Callable[[bytes], bytes],
        on_loss: Callable[[int, str], None] = leave,
    ) -> Peers:  # fmt: skip
        """Connects every process with process 0.

        Args:
            broadcast: gives every process what process 0 put in; called once by each.

        Raises:
            OSError: process 0 cannot be reached, or does not hear from all in a minute.
        """
        peers = cls(index, count, silence, on_loss)
        if index == 0:
            listener = socket.create_server(("", 0), backlog=count)
            token = os.urandom(8).hex()
            where = f"{token} {listener.getsockname()[1]} {' '.join(_own_addresses())}"
            broadcast(where.encode())
            peers._accept(listener, token)
        else:
            token, port, *addresses = broadcast(b"").decode().split()
            connection = _connect(addresses, int(port))
            line = _Line(connection, 0, addresses[0])
            line.send(f"hello {token} {index} {socket.gethostname()}")
            peers._add(line)
        peers._thread.start()
        return peers

    def _add(self, line: _Line) -> None:
        self._selector.register(line.socket, selectors.EVENT_READ, line)
        self._lines.append(line)

    def _accept(self, listener: socket.socket, token: str) -> None:
        with listener:
            listener.settimeout(60.0)
            while len(self._lines) < self.count - 1:
                connection, _ = listener.accept()
                connection.settimeout(10.0)
                with connection.makefile("rb", buffering=0) as file:  # unbuffered: what follows is for the watch
                    words = file.readline(1000).decode(errors="replace").split()
                if words[:2] == ["hello", token]:  # anyone may knock on a port
                    self._add(_Line(connection, int(words[2]), words[3]))
                else:
                    connection.close()

    def _watch(self) -> None:
        spoke = 0.0
        while not self._closed:
            for key, _ in self._selector.select(_BEAT):
                lines = key.data.receive()
                if lines is None:
                    self._selector.unregister(key.fileobj)
                    if not key.data.left:
                        self._lost(key.data, "is gone: it was killed, or its host went down")
                    continue
                for line in lines:
                    self._heed(key.data, line)
            now = time.monotonic()
            if now - spoke < _BEAT:
                continue
            spoke = now
            for line in self._lines:
                line.send(".")
                if not line.left and now - line.heard > self._silence:
                    self._lost(line, f"has given no sign of life for {self._silence:.0f} s: stopped, or cut off")
        self._selector.close()
        for line in self._lines:
            line.socket.close()

    def _heed(self, line: _Line, text: str) -> None:
        word, _, rest = text.partition(" ")
        if word == "bye":
            line.left = True
            with self._news:
                self._passed.add("bye")
                self._news.notify_all()
        elif word == "pass":
            with self._news:
                self._passed.add(rest)
                self._news.notify_all()
        elif word == "failed":
            code, _, why = rest.partition(" ")
            self._end(int(code), f"process {line.index} on {line.host} failed: {why}")
        elif word == "lost":
            code, _, why = rest.partition(" ")
            self._on_loss(int(code), why)

    def _lost(self, line: _Line, how: str) -> None:
        self._end(
            RESTART,
            f"process {line.index} on {line.host} {how}; all processes end with code {RESTART}: started again, they go "
            "on from the last complete checkpoint",
        )

    def _end(self, code: int, why: str) -> None:
        for line in self._lines:
            if self.index == 0:
                line.send(f"lost {code} {why}")
        self._on_loss(code, why)

    def reached(self, name: str) -> None:
        """Process 0 is through with what the others wait for."""
        for line in self._lines:
            line.send(f"pass {name}")

    def wait(self, name: str) -> None:
        """Returns once process 0 has reached `name`, however long that takes."""
        with self._news:
            self._news.wait_for(lambda: name in self._passed or "bye" in self._passed)

    def failed(self, code: int, why: str) -> None:
        """Tells the others why this process ends."""
        for line in self._lines:
            line.send(f"failed {code} {' '.join(why.split())}")

    def close(self) -> None:
        """This process ends as it should."""
        for line in self._lines:
            line.send("bye")
        self._closed = True


def _own_addresses() -> list[str]:
    """Every name and number under which other hosts may reach this one, likely ones first."""
    name = socket.gethostname()
    found = [name]
    with contextlib.suppress(OSError):  # a host whose own name does not resolve
        found += [info[4][0] for info in socket.getaddrinfo(name, None, socket.AF_INET, socket.SOCK_STREAM)]
    return list(dict.fromkeys([*found, "127.0.0.1"]))


def _connect(addresses: list[str], port: int) -> socket.socket:
    reasons = []
    for address in addresses:
        try:
            return socket.create_connection((address, port), timeout=20.0)
        except OSError as error:
            reasons.append(f"{address}: {error}")
    raise OSError(f"cannot reach process 0 on port {port} ({'; '.join(reasons)})")
