"""A line of TCP between process 0 and every other process: who is alive, who failed and why, who may go on.

Why `jax.distributed`'s heartbeat and a launcher that restarts are not enough: seconds until all processes but a stopped
one have ended, with which code and last words (two processes, CPU, JAX 0.10.2, `heartbeat_seconds` 30):

| | with this watch | without |
|---|---|---|
| kill -9 of process 1 | 0.2, 75, who is gone | 16, 134, "the checkpoint could not be written" |
| kill -9 of process 0 | 0.1, 75 (134 where the runtime is quicker), who is gone | 0.7, 134, the runtime's own |
| SIGSTOP of process 1 | 9, 75, who is silent | 16, 134, the runtime's own |
| wrong input in process 1 | 4, 2, what is wrong | not in 60: it waits for process 0 to leave, that one for its step |

The last row is worth the file: a launcher would wait, or restart for ever on input that is wrong. By the same line the
others wait for process 0, which may work for hours alone.

Lines, each ended by a newline: `hello TOKEN INDEX HOST` to process 0, once; `pass NAME` (process 0 is through with
NAME) from it; `.` (I am alive), `end CODE WHY` (all end) and `bye` (I have nothing left to do) both ways.
"""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn

RESTART = 75  # EX_TEMPFAIL: the run can go on from its last checkpoint; launchers start it again on this code
_BEAT = 1.0  # seconds between signs of life
_PARTING = 3.0  # seconds that process 0 gives the others to end before it


def leave(code: int, message: str) -> NoReturn:
    """Ends the process at once: no clean-up that would wait for a dead peer."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.write(2, f"flaxdraft: {message}\n".encode())
    os._exit(code)


class _Line:
    """One connection, and the process at its other end."""

    def __init__(self, connection: socket.socket, index: int = 0, host: str = ""):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket, self.file = connection, connection.makefile("rb")
        self.index, self.host = index, host
        self.ended = threading.Event()

    def send(self, text: str) -> None:
        with contextlib.suppress(OSError):  # gone or deaf: reading will tell
            self.socket.sendall(text.encode() + b"\n")

    def receive(self) -> tuple[str, str]:
        """The first word of the next line, and the rest of it; both are empty once the other end is closed.

        Raises:
            TimeoutError: nothing has come for as long as the socket allows.
        """
        try:
            text = self.file.readline()
        except TimeoutError:
            raise
        except OSError:  # reset, or no way to the host any more
            text = b""
        word, _, rest = text.decode(errors="replace").rstrip("\n").partition(" ")
        return word, rest


class Peers:
    """The watch over the other processes: a thread for each of them, and one that gives signs of life."""

    def __init__(self, index: int, silence: float, on_end: Callable[[int, str], None]):
        """
        Args:
            silence: seconds after which a peer that says nothing counts as lost.
            on_end: called with an exit code and a message; ends the process.
        """
        self._index, self._silence, self._on_end = index, silence, on_end
        self._lines: list[_Line] = []
        self._passed: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._ending, self._closed = threading.Lock(), threading.Event()

    @classmethod
    def gather(
        cls, index: int, count: int, silence: float, broadcast: Callable[[bytes], bytes],
        on_end: Callable[[int, str], None] = leave,
    ) -> Peers:  # fmt: skip
        """Connects every process with process 0.

        Args:
            broadcast: gives every process what process 0 put in; called once by each.

        Raises:
            OSError: process 0 cannot be reached, or does not hear from all in a minute.
        """
        peers = cls(index, silence, on_end)
        if index == 0:
            with socket.create_server(("", 0), backlog=count) as listener:
                token = os.urandom(8).hex()
                broadcast(f"{token} {listener.getsockname()[1]} {' '.join(_own_addresses())}".encode())
                peers._accept(listener, token, count)
        else:
            token, port, *addresses = broadcast(b"").decode().split()
            peers._lines.append(_Line(_connect(addresses, int(port)), 0, addresses[0]))
            peers._tell(f"hello {token} {index} {socket.gethostname()}")
        for line in peers._lines:
            line.socket.settimeout(silence)
            threading.Thread(target=peers._watch, args=(line,), daemon=True).start()
        threading.Thread(target=peers._beat, daemon=True).start()
        return peers

    def _accept(self, listener: socket.socket, token: str, count: int) -> None:
        listener.settimeout(60.0)
        while len(self._lines) < count - 1:
            connection, _ = listener.accept()
            connection.settimeout(10.0)
            line = _Line(connection)
            words = " ".join(line.receive()).split()
            if words[:2] == ["hello", token]:  # anyone may knock on a port
                line.index, line.host = int(words[2]), words[3]
                self._lines.append(line)
            else:
                connection.close()

    def _tell(self, text: str) -> None:
        for line in self._lines:
            line.send(text)

    def _beat(self) -> None:
        while not self._closed.wait(_BEAT):
            self._tell(".")

    def _watch(self, line: _Line) -> None:
        """Reads what one peer says until it has nothing left to say."""
        word, rest, how = ".", "", "is gone: it was killed, or its host went down"
        try:
            while word in (".", "pass"):
                word, rest = line.receive()
                if word == "pass":
                    self._passed.put(rest)
        except TimeoutError:
            how = f"has given no sign of life for {self._silence:.0f} s: stopped, or cut off"
        line.ended.set()
        if word == "bye" or self._closed.is_set():
            return
        if word == "end":
            code, _, why = rest.partition(" ")
            self._end(int(code), why)
        else:
            self._end(
                RESTART,
                f"process {line.index} on {line.host} {how}; all processes end with code {RESTART}: started again, "
                "they go on from the last complete checkpoint",
            )

    def _end(self, code: int, why: str, told: str = "") -> None:
        """Ends this process, and with process 0 all of them.

        Process 0 ends last: the runtime of the others aborts them (134) as soon as they miss process 0.
        """
        with self._ending:  # the first reason counts: another thread with another one waits here for the end
            if self._index == 0 or told:
                self._tell(f"end {code} {told or why}")
            if self._index == 0:
                until = time.monotonic() + _PARTING
                for line in self._lines:
                    line.ended.wait(max(until - time.monotonic(), 0.0))
            self._on_end(code, why)

    def fail(self, code: int, why: str) -> None:
        """Ends this process, and tells the others why they end too."""
        told = f"process {self._index} on {socket.gethostname()} failed: {' '.join(why.split())}"
        self._end(code, why, told)

    def reached(self, name: str) -> None:
        """Process 0 is through with what the others wait for."""
        self._tell(f"pass {name}")

    def wait(self, name: str) -> None:
        """Returns once process 0 has reached `name`, however long that takes."""
        while self._passed.get() != name:
            pass

    def close(self) -> None:
        """This process ends as it should."""
        self._closed.set()
        self._tell("bye")


def _own_addresses() -> list[str]:
    """Every name and number under which other hosts may reach this one, likely ones first."""
    name = socket.gethostname()
    found = [name]
    with contextlib.suppress(OSError):  # a host whose own name does not resolve
        found += [str(info[4][0]) for info in socket.getaddrinfo(name, None, socket.AF_INET, socket.SOCK_STREAM)]
    return list(dict.fromkeys([*found, "127.0.0.1"]))


def _connect(addresses: list[str], port: int) -> socket.socket:
    reasons = []
    for address in addresses:
        try:
            return socket.create_connection((address, port), timeout=20.0)
        except OSError as error:
            reasons.append(f"{address}: {error}")
    raise OSError(f"cannot reach process 0 on port {port} ({'; '.join(reasons)})")
