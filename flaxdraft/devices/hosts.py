"""One run on many hosts: the same command on each, started by whatever starts jobs there.

Who belongs to a run is found in this order: FLAXDRAFT_COORDINATOR, FLAXDRAFT_NUM_PROCESSES and FLAXDRAFT_PROCESS_ID,
the fields of `hosts:`, then what JAX knows of SLURM, Open MPI, Kubernetes and TPU pods. Without any of them a run has
one process.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from flaxdraft.config import HostsConfig
from flaxdraft.devices.watchdog import Peers
from flaxdraft.errors import InputError

_VARIABLES = {
    "coordinator": "FLAXDRAFT_COORDINATOR", "num_processes": "FLAXDRAFT_NUM_PROCESSES",
    "process_id": "FLAXDRAFT_PROCESS_ID",
}  # fmt: skip
# Variables by which a launcher says that it started more than one process; JAX reads the rest itself.
_COUNTS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")
_ADDRESS_BYTES = 2048

_peers: Peers | None = None


def members(config: HostsConfig, environment: Mapping[str, str]) -> dict[str, Any] | None:
    """Arguments for `jax.distributed.initialize`; an empty dict leaves them to JAX; None means a single process.

    Raises:
        InputError: some of the three are given and some not, or a number is none.
    """
    given: dict[str, Any] = {}
    for name, variable in _VARIABLES.items():
        value = environment.get(variable, getattr(config, name))
        if value is None:
            continue
        try:
            given[name] = value if name == "coordinator" else int(value)
        except ValueError:
            raise InputError(f"{variable}: found {value!r}, expected a number") from None
    if given.get("coordinator") == "auto":
        return {}
    if given:
        missing = [f"{variable} (hosts.{name})" for name, variable in _VARIABLES.items() if name not in given]
        if missing:
            raise InputError(f"hosts: {', '.join(given)} given without {', '.join(missing)}; give all three, or none")
        given["coordinator_address"] = given.pop("coordinator")
        return given if given["num_processes"] > 1 else None
    detected = any(int(environment.get(name, "1")) > 1 for name in _COUNTS)
    pod = "," in environment.get("TPU_WORKER_HOSTNAMES", "") or "MEGASCALE_COORDINATOR_ADDRESS" in environment
    return {} if detected or pod else None


def join(config: HostsConfig) -> None:
    """Makes this process part of its run. Must come before anything touches a device.

    Raises:
        InputError: the configuration is incomplete, or the other processes cannot be reached.
    """
    global _peers
    arguments = members(config, os.environ)
    if arguments is None:
        return
    try:
        jax.distributed.initialize(**arguments, heartbeat_timeout_seconds=config.heartbeat_seconds)
        # The runtime gives up on a silent peer after half to all of its own limit, and cannot say so: be quicker.
        silence = config.heartbeat_seconds / 3
        _peers = Peers.gather(jax.process_index(), jax.process_count(), silence, _broadcast)
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"hosts: the processes of the run do not find each other ({str(error)[:300]})") from error


def peers() -> Peers | None:
    """The watch over the other processes; None in a run of one."""
    return _peers


def is_main() -> bool:
    """Whether this process is the one that speaks, decides and writes what exists once."""
    return jax.process_index() == 0


def _broadcast(data: bytes) -> bytes:
    padded = np.zeros(_ADDRESS_BYTES, np.uint8)
    padded[: len(data)] = np.frombuffer(data, np.uint8)
    return bytes(multihost_utils.broadcast_one_to_all(padded)).rstrip(b"\0")


def agree(value: Any) -> Any:
    """Process 0's value (anything that JSON can hold) in every process, so that all take the same way."""
    if jax.process_count() == 1:
        return value
    text = json.dumps(value).encode()
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    padded = np.zeros(size, np.uint8)
    if is_main():
        padded[:] = np.frombuffer(text, np.uint8)
    return json.loads(bytes(multihost_utils.broadcast_one_to_all(padded)))


def all_agree(flag: bool) -> bool:
    """Whether it is true in every process."""
    return bool(np.all(multihost_utils.process_allgather(np.bool_(flag))))


@contextmanager
def main_first(name: str) -> Iterator[None]:
    """Process 0 goes through the block alone, then the others do; they wait for it without a time limit."""
    if _peers is not None and not is_main():
        _peers.wait(name)
    yield
    if _peers is not None and is_main():
        _peers.reached(name)


def local_part(sharding: jax.sharding.Sharding, num_rows: int) -> tuple[int, int]:
    """(i, n): this process's share of the rows of a global array, the i-th n-th of them.

    Processes whose devices hold the same rows (a tensor axis across hosts) get the same share.

    Raises:
        InputError: the rows of this process's devices are not one n-th of all rows.
    """
    held = sharding.addressable_devices_indices_map((num_rows,)).values()
    spans = {rows[0].indices(num_rows)[:2] for rows in held if rows is not None}  # it is one, but by JAX's types
    first, last = min(start for start, _ in spans), max(stop for _, stop in spans)
    size = last - first
    covered = sum(stop - start for start, stop in spans)
    if covered != size or num_rows % size or first % size:
        raise InputError(
            f"mesh: the devices of process {jax.process_index()} hold rows {sorted(spans)} of {num_rows}, which is no "
            "even share; order the mesh so that the data axes follow the hosts"
        )
    return first // size, num_rows // size
