"""Where a target lies and in which dtype: `--mesh` and `--dtype`, the same for every command that loads one."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flaxdraft.config import HostsConfig, nearest
from flaxdraft.errors import InputError

if TYPE_CHECKING:
    import jax

AXES = ("data", "fsdp", "tensor", "expert")
DTYPES = ("float32", "bfloat16")


def add_target_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--mesh", type=mesh_shape, default={}, metavar="AXIS=N,...",
        help="devices that the target is split over: data (rows), fsdp (rows, and weights in pieces), tensor (heads), "
             "expert; one device where it is left out, and all devices of several processes along data",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of weights and products; float32 on a CPU and bfloat16 elsewhere by default"
    )


def mesh_shape(text: str) -> dict[str, int]:
    """`fsdp=4,tensor=2` as numbers.

    Raises:
        argparse.ArgumentTypeError: it is something else.
    """
    shape = {}
    for part in text.split(","):
        name, equals, number = (word.strip() for word in part.partition("="))
        if not equals or not number.isdecimal() or int(number) < 1:
            raise argparse.ArgumentTypeError(f"found {part!r}, expected AXIS=N as in fsdp=4,tensor=2")
        if name not in AXES:
            raise argparse.ArgumentTypeError(f"no axis {name!r}; {nearest(name, [*AXES])}")
        if name in shape:
            raise argparse.ArgumentTypeError(f"found {name} twice")
        shape[name] = int(number)
    return shape


def dtype_or_default(dtype: str | None) -> str:
    import jax

    return dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")


def target_mesh(
    shape: Mapping[str, int], field: str = "--mesh", devices: Sequence[Any] | None = None
) -> jax.sharding.Mesh | None:  # fmt: skip
    """The devices of that shape; None, which is one device, where it has a single one. Several processes use all of
    theirs.

    Args:
        field: what the shape is called where the user gave it.
        devices: of a plan, in one process; None takes the visible ones.

    Raises:
        InputError: there are fewer devices, or several processes would leave some out.
    """
    import jax

    from flaxdraft.devices.mesh import make_mesh

    processes, visible = (jax.process_count(), jax.device_count()) if devices is None else (1, len(devices))
    if processes > 1 and not shape:
        shape = {"data": visible}
    wanted = math.prod(shape.values())
    if wanted > visible or (processes > 1 and wanted < visible):
        axes = ",".join(f"{name}={number}" for name, number in shape.items())
        whose = "are visible" if processes == 1 else f"belong to the {processes} processes, which use all of them"
        raise InputError(f"{field}: {axes} takes {wanted} devices, {visible} {whose} ({jax.default_backend()})")
    return make_mesh(**shape, devices=devices) if wanted > 1 else None


def on_all_hosts(work: Callable[[], None]) -> int:
    """Does the work in every process of the command, which are found as those of a training run are; the exit code."""
    from flaxdraft.run.supervise import supervised

    return supervised(HostsConfig(), work)
