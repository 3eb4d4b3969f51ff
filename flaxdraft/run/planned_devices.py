"""The devices that a plan is made for: those that are visible, others by name, or a TPU topology, for which libtpu
compiles on any machine."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from flaxdraft.errors import InputError

# Memory in GB and dense bfloat16 TFLOP/s of one device, by the makers' data sheets.
KNOWN = {
    "A100-40": (40, 312), "A100-80": (80, 312), "L40S": (48, 362), "H100": (80, 989), "H200": (141, 989),
    "B200": (180, 2250), "v5e": (16, 197), "v5p": (95, 459), "v6e": (32, 918),
}  # fmt: skip
_KINDS = {"TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e"}  # as JAX calls them
_TPUS = {*_KINDS.values()}
MEMORY_FRACTION = "XLA_CLIENT_MEM_FRACTION"  # as in the environment
_COUNTED = re.compile(r"(\d+)\s*[x×]\s*(\S.*)")
_TOPOLOGY = re.compile(r"(v\d+\w*):\d+(x\d+)*")


class PlannedDevices(NamedTuple):
    """What a plan is compiled for, and what it is compared with."""

    name: str
    devices: Sequence[Any]  # whose compiler says what a step takes
    total: int  # of the real ones
    memory: float | None  # bytes of each that JAX takes, where known
    peak: float | None  # FLOP/s of each in bfloat16, where known
    stand_in: bool  # whether a CPU is compiled for in their place

    @property
    def are_cpus(self) -> bool:
        """Those of the run, and not what is compiled for in their place."""
        return not self.stand_in and self.devices[0].platform == "cpu"

    @property
    def work_label(self) -> str:
        """What the size of the work is."""
        return "as compiled for CPUs in their place: an estimate" if self.stand_in else "as compiled"


def planned_devices(wanted: str | None, num: int) -> PlannedDevices:
    """
    Args:
        wanted: "8 x H100", "v5e:2x2", or None for what is visible.
        num: devices of the mesh.

    Raises:
        InputError: no such device is known, there are fewer than the mesh wants, or libtpu is not installed.
    """
    if wanted is None:
        return _visible()
    if _TOPOLOGY.fullmatch(wanted):
        return _topology(wanted)
    match = _COUNTED.fullmatch(wanted.strip())
    name = None if match is None else _known(match[2])
    if match is None or name is None:
        raise InputError(
            f"--devices: found {wanted!r}, expected a number of one of {', '.join(KNOWN)}, as in '8 x H100', or a TPU "
            "topology, as in v5e:2x2"
        )
    count = int(match[1])
    if num > count:
        raise InputError(f"--devices: the mesh takes {num} devices, {count} x {name} were given")
    memory, peak = KNOWN[name]
    with contextlib.suppress(RuntimeError):  # JAX has started: its devices are what there is
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", num)
    share = 1.0 if name in _TPUS else _share_of_gpus()
    said = f"{count} x {name}" if share == 1 else f"{count} x {name} ({share:.0%} of {memory} GB, {MEMORY_FRACTION})"
    return PlannedDevices(said, jax.devices("cpu"), count, share * memory * 1e9, peak * 1e12, True)


def _share_of_gpus() -> float:
    """Of its memory, that JAX takes of a GPU when it starts, and never more."""
    return float(os.environ.get(MEMORY_FRACTION) or os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION") or 0.75)


def _known(text: str) -> str | None:
    """The name in the table, however it is spelt: A100 80GB, a100-80."""
    plain = re.sub(r"[\s_-]|GB", "", text, flags=re.IGNORECASE).lower()
    return next((name for name in KNOWN if name.replace("-", "").lower() == plain), None)


def _visible() -> PlannedDevices:
    devices = jax.devices()
    first = jax.local_devices()[0]  # no process asks another one's devices
    kind = first.device_kind
    name = _KINDS.get(kind) or next((name for name in KNOWN if all(part in kind for part in name.split("-"))), None)
    limit = (first.memory_stats() or {}).get("bytes_limit")
    peak = None if name is None else KNOWN[name][1] * 1e12
    return PlannedDevices(f"{len(devices)} visible, {kind}", devices, len(devices), limit, peak, False)


def _topology(wanted: str) -> PlannedDevices:
    name = wanted.partition(":")[0]
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(
            f"--devices: {wanted} is compiled for by libtpu, which is not installed; pip install 'flaxdraft[tpu]'"
        )
    from jax.experimental import topologies

    # libtpu compiles; it is not asked for chips of this machine, nor the cloud for what this machine is.
    jax.config.update("jax_platforms", "cpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    try:
        devices = topologies.get_topology_desc(wanted, platform="tpu").devices
    except Exception as error:  # libtpu raises no narrower kind for a topology that does not exist
        raise InputError(f"--devices: libtpu knows no topology {wanted} ({str(error).splitlines()[0]})") from error
    memory, peak = KNOWN.get(name, (None, None))
    return PlannedDevices(
        f"TPU {wanted}", devices, len(devices), memory and memory * 1e9, peak and peak * 1e12, False
    )  # fmt: skip
