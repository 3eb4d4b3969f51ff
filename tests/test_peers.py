"""The watch over other processes: silence, loss, failure, waiting, a farewell. Threads stand for processes."""

import contextlib
import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock

import pytest

from flaxdraft.config import HostsConfig
from flaxdraft.devices import hosts
from flaxdraft.devices import watchdog as peers_module
from flaxdraft.devices.hosts import members
from flaxdraft.devices.watchdog import RESTART, Peers
from flaxdraft.errors import InputError
from flaxdraft.run import supervise


class Group:
    """Three peers, and a stranger who comes to their door first; what each would have ended with."""

    def __init__(self, silence=30.0):
        self.ends = [threading.Event() for _ in range(3)]
        self.words: list[tuple[int, str] | None] = [None] * 3
        self.order: list[int] = []  # in which they ended
        told: list[bytes] = []
        ready = threading.Event()

        def broadcast(data):
            if data:
                with socket.create_connection(("127.0.0.1", int(data.split()[1]))) as stranger:
                    stranger.sendall(b"hello\n")
                told.append(data)
                ready.set()
            ready.wait()
            return told[0]

        def gather(index):
            return Peers.gather(index, 3, silence, broadcast, lambda *words: self.end(index, words))

        with ThreadPoolExecutor(3) as pool:
            self.peers = list(pool.map(gather, range(3)))

    def end(self, index, words):
        if self.words[index] is None:
            self.words[index] = words
            self.order.append(index)
        self.vanish(index)
        self.ends[index].set()

    def vanish(self, index):
        """Without a farewell, as a process that is killed."""
        self.peers[index]._closed.set()
        for line in self.peers[index]._lines:
            with contextlib.suppress(OSError):  # closed by both ends
                line.socket.shutdown(socket.SHUT_RDWR)

    def close(self):
        for peers in self.peers:
            peers.close()
        for index, peers in enumerate(self.peers):
            self.vanish(index)
            for line in peers._lines:
                assert line.ended.wait(5)
                line.file.close()
                line.socket.close()


@pytest.fixture
def group():
    made = Group()
    yield made
    made.close()


@pytest.mark.parametrize("lost", [0, 2])
def test_a_process_that_is_gone(group, lost):
    group.vanish(lost)
    for index in {0, 1, 2} - {lost}:
        assert group.ends[index].wait(5)
        code, why = group.words[index]
        assert code == RESTART
        assert f"process {lost} on " in why
        assert "is gone: it was killed" in why


@pytest.mark.parametrize("silent", [0, 1])
def test_a_process_that_says_nothing(silent):
    group = Group(silence=2.0)
    for line in group.peers[silent]._lines:
        line.send = lambda text: None
    for index in {0, 1, 2} - {silent}:
        assert group.ends[index].wait(10)
        assert group.words[index][0] == RESTART
        assert f"process {silent} on " in group.words[index][1]
        assert "no sign of life for 2 s" in group.words[index][1]
    group.close()


@pytest.mark.parametrize("failing", [0, 2])
def test_a_process_that_fails_says_why(group, failing):
    group.peers[failing].fail(2, "no room\nleft")
    assert group.words[failing] == (2, "no room\nleft")
    for index in {0, 1, 2} - {failing}:
        assert group.ends[index].wait(5)
        code, why = group.words[index]
        assert code == 2
        assert f"process {failing} on " in why
        assert why.endswith("failed: no room left")


@pytest.mark.parametrize("fault", ["process 0 fails", "process 1 fails", "process 1 is gone"])
def test_process_0_ends_last(group, fault):
    """The JAX runtime of the others aborts them once process 0 is gone, which would hide their exit code."""
    slow = group.peers[2]
    slow._on_end = lambda *words: (threading.Event().wait(0.3), group.end(2, words))
    index, what = int(fault.split()[1]), fault.split(" ", 2)[2]
    group.vanish(index) if what == "is gone" else group.peers[index].fail(2, "no room left")
    assert group.ends[0].wait(2)
    assert group.order[-2:] == [2, 0]


def test_process_0_does_not_wait_for_a_process_that_stays(group, monkeypatch):
    monkeypatch.setattr(peers_module, "_PARTING", 0.2)
    group.peers[2]._on_end = lambda *words: None
    group.peers[0].fail(2, "no room left")
    assert group.order[-1] == 0


def test_the_others_wait_for_process_0_and_nobody_minds_a_farewell(group):
    waiting = [threading.Thread(target=group.peers[index].wait, args=("data",)) for index in (1, 2)]
    for thread in waiting:
        thread.start()
    group.peers[0].reached("other")
    waiting[0].join(0.3)
    assert waiting[0].is_alive()
    group.peers[0].reached("data")
    for thread in waiting:
        thread.join(5)
        assert not thread.is_alive()
    for index in range(3):
        group.peers[index].close()
        group.vanish(index)
    assert not any(event.wait(0.3) for event in group.ends)


@pytest.mark.parametrize("error", [InputError("the checkpoint could not be written"), RuntimeError("gloo")])
def test_a_lost_peer_is_heard_of_before_an_error_that_it_caused(monkeypatch, error):
    """Such an error alone would end the run with a code on which nobody starts it again."""
    peers = Mock()
    monkeypatch.setattr(hosts, "join", lambda config: None)
    monkeypatch.setattr(hosts, "peers", lambda: peers)
    monkeypatch.setattr(supervise.time, "sleep", lambda seconds: sys.exit(RESTART))  # the watch ends the process
    with pytest.raises(SystemExit) as ended:
        supervise.supervised(HostsConfig(), Mock(side_effect=error))
    assert ended.value.code == RESTART
    peers.fail.assert_not_called()


GIVEN = {"FLAXDRAFT_COORDINATOR": "a:1", "FLAXDRAFT_NUM_PROCESSES": "4", "FLAXDRAFT_PROCESS_ID": "2"}


@pytest.mark.parametrize(
    ("config", "environment", "expected"),
    [
        ({}, {}, None),
        ({}, GIVEN, {"coordinator_address": "a:1", "num_processes": 4, "process_id": 2}),
        (
            {"coordinator": "b:2", "num_processes": 8},
            {"FLAXDRAFT_PROCESS_ID": "3"},
            {"coordinator_address": "b:2", "num_processes": 8, "process_id": 3},
        ),
        ({}, GIVEN | {"FLAXDRAFT_NUM_PROCESSES": "1", "FLAXDRAFT_PROCESS_ID": "0"}, None),
        ({"coordinator": "auto"}, {}, {}),
        ({}, {"SLURM_NTASKS": "1"}, None),
        ({}, {"SLURM_NTASKS": "16"}, {}),
        ({}, {"OMPI_COMM_WORLD_SIZE": "2"}, {}),
        ({}, {"TPU_WORKER_HOSTNAMES": "t0,t1"}, {}),
        ({}, {"TPU_WORKER_HOSTNAMES": "t0"}, None),
    ],
)
def test_who_belongs_to_a_run(config, environment, expected):
    assert members(HostsConfig(**config), environment) == expected


def test_half_of_what_it_takes_is_refused():
    with pytest.raises(InputError, match=r"num_processes given without FLAXDRAFT_COORDINATOR .*FLAXDRAFT_PROCESS_ID"):
        members(HostsConfig(num_processes=2), {})
    with pytest.raises(InputError, match=r"FLAXDRAFT_PROCESS_ID: found 'x', expected a number"):
        members(HostsConfig(), GIVEN | {"FLAXDRAFT_PROCESS_ID": "x"})
