"""Where the time of a training step goes: the device's kernels, longest first, grouped by the operation they came from,
and the time between them.

    python experiments/profile_step.py --case llama3-8b --batch 4 --length 2048 --compute bfloat16 --out trace/

Writes the trace (for XProf or Perfetto) and the compiled program's text beside it.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections import defaultdict
from pathlib import Path

import jax
from bench_cases import CASES, make_algorithm
from bench_step import DTYPES, compiled_step


def device_events(directory: Path) -> list[dict]:
    """Every kernel of the newest trace, with its duration in microseconds."""
    path = max(directory.glob("plugins/profile/*/*.trace.json.gz"), key=lambda p: p.stat().st_mtime)
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    devices = {e["pid"] for e in events if e.get("name") == "process_name" and "/device:" in e["args"]["name"]}
    return [e for e in events if e.get("ph") == "X" and e["pid"] in devices and "hlo_op" in e.get("args", {})]


def gaps(events: list[dict], steps: int) -> list[tuple[float, str]]:
    """Milliseconds a step between two kernels, longest first, and which two they are. On one device; copies outside the
    program and the time between steps count as well."""
    found, end, last = defaultdict(float), None, None
    for event in sorted(events, key=lambda e: e["ts"]):
        if end is not None and event["ts"] > end:
            found[f"{last} -> {event['name'][:50]}"] += (event["ts"] - end) / steps / 1e3
        if end is None or event["ts"] + event["dur"] > end:
            end, last = event["ts"] + event["dur"], event["name"][:50]
    return sorted(((took, name) for name, took in found.items()), reverse=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, default="tiny")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--remat", default="none")
    parser.add_argument("--loss-chunk", type=int, default=1024)
    parser.add_argument("--compute", choices=DTYPES, default="float32")
    parser.add_argument("--float8", action="store_true")
    parser.add_argument("--ttt-length", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rows", type=int, default=60, help="lines of the table")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    algorithm = make_algorithm(arguments.ttt_length, False, remat=arguments.remat, loss_chunk=arguments.loss_chunk)
    compiled, call, _ = compiled_step(
        arguments.case, arguments.compute, arguments.batch, arguments.length, 1.0, 1, algorithm,
        arguments.float8,
    )  # fmt: skip
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "step.hlo.gz").write_bytes(gzip.compress(compiled.as_text().encode()))
    jax.block_until_ready(call())
    with jax.profiler.trace(str(arguments.out)):
        for _ in range(arguments.steps):
            out = call()
        jax.block_until_ready(out)
    total, count, by_op = 0.0, 0, defaultdict(lambda: [0.0, 0])
    events = device_events(arguments.out)
    for event in events:
        name = f"{event['args']['hlo_op']}  [{event['name'][:60]}]"
        by_op[name][0] += event["dur"] / arguments.steps / 1e3
        by_op[name][1] += 1
        total, count = total + event["dur"] / arguments.steps / 1e3, count + 1
    print(f"{arguments.case}: {total:.1f} ms of kernels a step, {count // arguments.steps} kernels")
    for name, (took, times) in sorted(by_op.items(), key=lambda item: -item[1][0])[: arguments.rows]:
        print(f"{took:8.2f} ms  {times // arguments.steps:5d} x  {name}")
    between = gaps(events, arguments.steps)
    print(f"{sum(took for took, _ in between):.1f} ms between kernels")
    for took, name in between[: arguments.rows]:
        print(f"{took:8.2f} ms  {name}")


if __name__ == "__main__":
    main()
