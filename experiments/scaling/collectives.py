"""The collectives of a partitioned program: what crosses devices in one run of it, and how long that takes.

Read from the HLO right after XLA has cut the program into one per device, while every array still has the type that
the program gave it (XLA's CPU compiler widens bfloat16 later on).
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from pathlib import Path

import numpy as np

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"f32": 4, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "pred": 1, "f64": 8, "s8": 1, "u8": 1, "s64": 8}
NODE = 8  # GPUs that share NVLink
NVLINK, INFINIBAND = 450e9, 50e9  # bytes a second and GPU, one way: H100 SXM; one 400 Gb/s adapter a GPU
LATENCY = {"NVLink": 10e-6, "InfiniBand": 30e-6}  # of one collective


@dataclasses.dataclass(frozen=True)
class Collective:
    kind: str
    bytes: int  # of one device's whole buffer: gathered result, reduced operand
    group: tuple[int, ...]  # devices of the first group
    times: int  # in one step

    def seconds(self, nodes: bool) -> float:
        """By the ring's law. Inside a node, or where `nodes` is false and all devices share NVLink, at its rate; across
        nodes every GPU of the group in a node brings its own adapter."""
        size = len(self.group)
        per_node = max(collections.Counter(device // NODE for device in self.group).values())
        apart = nodes and per_node < size
        rate = min(NVLINK, INFINIBAND * per_node) if apart else NVLINK
        turns = {"all-reduce": 2.0 * (size - 1) / size, "collective-permute": 1.0}.get(self.kind, (size - 1) / size)
        return self.times * (turns * self.bytes / rate + LATENCY["InfiniBand" if apart else "NVLink"])


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    result: str  # its shapes
    op: str
    operands: tuple[str, ...]
    line: str


def computations(text: str) -> dict[str, list[Instruction]]:
    """The computations of an HLO module; the entry is called ENTRY."""
    found, current = {}, None
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            current = found.setdefault("ENTRY" if header.group(1) else header.group(2), [])
        elif current is not None and (match := re.match(r"  (?:ROOT )?%([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$", line)):
            name, result, op, rest = match.groups()
            operands = tuple(re.findall(r"%([\w.\-]+)", rest.split("), ")[0]))
            current.append(Instruction(name, result, op, operands, line))
    return found


def parse(text: str, loop_trips: int) -> list[Collective]:
    """Every collective over two devices or more, in the order of the calls.

    Args:
        loop_trips: of the one loop that holds collectives (the walk over the loss's chunks), whose number of trips
            depends on the data.
    """
    parts, found = computations(text), []

    def walk(name: str, times: int, kept_of_root: int) -> None:
        for one in parts[name]:
            kind = one.op.removesuffix("-start")
            if kind in KINDS:
                group = _group(one.line)
                if len(group) > 1:
                    kept = kept_of_root if "ROOT" in one.line else _kept(one.name, parts[name])
                    size = _size(one.result) * (len(group) if kind == "reduce-scatter" else 1)
                    # Where each device of the group keeps its own slice alone, XLA's GPU compiler reduces and scatters.
                    kind = "reduce-scatter" if kind == "all-reduce" and kept * len(group) == size else kind
                    found.append(Collective(kind, size, group, times))
            elif one.op == "while":
                walk(re.search(r"body=%([\w.\-]+)", one.line).group(1), times * loop_trips, 0)
            elif one.op == "conditional":
                branches = re.search(r"branch_computations=\{(.*?)\}", one.line).group(1)
                for branch in re.findall(r"%([\w.\-]+)", branches):
                    walk(branch, times, 0)
            elif one.op == "call":
                called = re.search(r"to_apply=%([\w.\-]+)", one.line).group(1)
                walk(called, times, _kept(one.name, parts[name]))

    walk("ENTRY", 1, 0)
    return found


def _kept(name: str, part: list[Instruction]) -> int:
    """Bytes of the slice that is all that is read of a result; 0 where there is more than slices."""
    sizes = set()
    for one in part:
        if name in one.operands:
            moved = one.op in ("copy", "bitcast", "convert")
            sizes.add(_kept(one.name, part) if moved else _size(one.result) if one.op == "dynamic-slice" else 0)
    return sizes.pop() if len(sizes) == 1 else 0


def _size(result: str) -> int:
    shapes = re.findall(r"(\w+)\[([\d,]*)\]", result)
    return sum(BYTES[dtype] * math.prod(int(n) for n in dims.split(",") if n) for dtype, dims in shapes)


def _group(line: str) -> tuple[int, ...]:
    """The devices of the first group, however it is written."""
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", line):
        moved = [tuple(map(int, pair)) for pair in re.findall(r"(\d+),(\d+)", pairs.group(1)) if pair[0] != pair[1]]
        return moved[0] if moved else ()
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return tuple(map(int, listed.group(1).split(",")))
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        shape, source, order = (x and [int(n) for n in x.split(",")] for x in iota.groups())
        devices = np.arange(math.prod(source)).reshape(source)
        devices = devices.transpose(order) if order else devices
        return tuple(devices.reshape(shape)[0].tolist())
    if mesh := re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?\))\))? \{(.*?)\}", line):
        names, sizes = zip(*re.findall(r"'([^']+)'=(\d+)", mesh.group(1)), strict=True)
        chosen = [names.index(name) for name in re.findall(r"'([^']+)'", mesh.group(3))]
        devices = np.arange(math.prod(map(int, sizes)))
        if turned := re.match(r"\[([\d,]+)\]T\(([\d,]+)\)", mesh.group(2) or ""):
            source, order = ([int(n) for n in x.split(",")] for x in turned.groups())
            devices = devices.reshape(source).transpose(order)
        devices = devices.reshape([int(n) for n in sizes])
        rest = [i for i in range(len(names)) if i not in chosen]
        return tuple(devices.transpose(rest + chosen).reshape(-1, math.prod(int(sizes[i]) for i in chosen))[0].tolist())
    raise ValueError(f"no devices in {line.strip()[:300]}")


def partitioned_text(folder: Path) -> str:
    """The dump of XLA's pass pipeline right after partitioning."""
    (path,) = folder.glob("*jit_train_step*after_spmd-partitioning*.txt")
    return path.read_text()
