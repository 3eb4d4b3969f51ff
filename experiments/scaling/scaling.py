"""Bytes and collectives of one optimizer step over 8, 64 and 512 devices, from programs compiled without any of them.

    python experiments/scaling/scaling.py            # half an hour on two cores; writes results.md, scaling.png

Every layout of the llama3-8b and deepseek-v3-mla drafts is compiled for simulated devices, from shapes alone. Each
device has 8192 supervised tokens a step, whatever the layout (weak scaling), bfloat16 products, 7 unroll steps, no
accumulation: with m micro-batches what is moved for weights counts once and what is moved for activations m times.
The time of a step without collectives is counted operations over a measured rate; nothing is taken to overlap.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
CASES = ("llama3-8b", "deepseek-v3-mla")
SIZES = (8, 64, 512)
TOKENS, LENGTH, NUM_STEPS, CHUNK = 8192, 2048, 7, 512
RATE = 500e12  # operations a second of one H100 in this step; see ../bench_results.md


def layouts(devices: int) -> list[dict[str, int]]:
    """Axes alone, and with eight neighbours along a second one."""
    found = [{"data": devices}, {"fsdp": devices}, {"data": devices // 8, "fsdp": 8}]
    found += [{"fsdp": devices // 8, axis: 8} for axis in ("tensor", "sequence")]
    kept = [{axis: size for axis, size in shape.items() if size > 1} for shape in found]
    return [shape for i, shape in enumerate(kept) if shape not in kept[:i]]


def measure(case: str, shape: dict[str, int]) -> dict:
    """Compiles one step in this process, whose devices are already set, and reads its collectives."""
    import jax
    from abstract import abstract_step
    from collectives import parse, partitioned_text

    start = time.monotonic()
    lowered, local_rows, flops = abstract_step(case, shape, TOKENS, LENGTH, NUM_STEPS, CHUNK)
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_pass_re": "spmd-partitioning", "xla_dump_hlo_as_text": True}
        lowered.compile(
            compiler_options=options | {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
        )
        found = parse(partitioned_text(Path(folder)), -(-local_rows // CHUNK))
    kinds = {}
    for one in found:
        count, size = kinds.get(one.kind, (0, 0))
        kinds[one.kind] = (count + one.times, size + one.times * one.bytes)
    compute = flops / RATE
    moving = {
        where: sum(one.seconds(nodes) for one in found) for where, nodes in (("nvlink", False), ("cluster", True))
    }
    return {
        "case": case, "devices": math.prod(shape.values()), "layout": shape, "kinds": kinds, "compute_s": compute,
        **{f"{where}_s": seconds for where, seconds in moving.items()},
        **{f"{where}_efficiency": compute / (compute + seconds) for where, seconds in moving.items()},
        "jax": jax.__version__, "compile_s": time.monotonic() - start,
    }  # fmt: skip


def child(case: str, devices: int) -> None:
    """All layouts of one draft over so many simulated devices, one JSON line each."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    for shape in layouts(devices):
        print(json.dumps(measure(case, shape)), flush=True)


def table(rows: list[dict]) -> str:
    """Markdown."""
    head = (
        "| draft | devices | layout | all-reduce | all-gather | reduce-scatter | all-to-all, permute | ms of work | "
        "ms of moving: NVLink, nodes of 8 | efficiency: NVLink, nodes of 8 |\n|---|---|---|---|---|---|---|---|---|---|"
    )
    lines = [head]
    for row in rows:
        layout = " x ".join(f"{axis} {size}" for axis, size in row["layout"].items())
        lines.append(
            f"| {row['case']} | {row['devices']} | {layout} | "
            f"{amount(row, 'all-reduce')} | {amount(row, 'all-gather')} | "
            f"{amount(row, 'reduce-scatter')} | {amount(row, 'all-to-all', 'collective-permute')} | "
            f"{row['compute_s'] * 1e3:.0f} | "
            f"{row['nvlink_s'] * 1e3:.1f}, {row['cluster_s'] * 1e3:.1f} | "
            f"{row['nvlink_efficiency']:.1%}, {row['cluster_efficiency']:.1%} |"
        )
    return "\n".join(lines)


def amount(row: dict, *kinds: str) -> str:
    """How many collectives of these kinds, and their bytes."""
    found = [row["kinds"][kind] for kind in kinds if kind in row["kinds"]]
    return ", ".join(f"{count} / {size / 1e9:.3g} GB" for count, size in found)


def draw(rows: list[dict], path: Path) -> None:
    """Predicted efficiency against the number of devices, one panel a draft."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(CASES), figsize=(11, 4.2), sharey=True)
    for panel, case in zip(panels, CASES, strict=True):
        curves = {}
        for row in rows:
            if row["case"] == case:
                sizes = {axis: size for axis, size in row["layout"].items() if axis in ("tensor", "sequence")}
                rest = [axis for axis in row["layout"] if axis not in sizes] or ["fsdp"]
                name = " x ".join(rest + [f"{axis} {size}" for axis, size in sizes.items()])
                curves.setdefault(name, {})[row["devices"]] = row["cluster_efficiency"]
        for name, points in sorted(curves.items()):
            panel.plot(list(points), list(points.values()), marker="o", label=name)
        panel.set_xscale("log", base=2)
        panel.set_xticks(SIZES, [str(size) for size in SIZES])
        panel.set_title(case)
        panel.set_xlabel("devices, nodes of 8")
        panel.legend(fontsize=7)
    panels[0].set_ylabel("predicted efficiency, nothing overlapped")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", nargs="+", type=int, default=SIZES)
    parser.add_argument("--case", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--child", action="store_true", help="print the rows of one case and size as JSON")
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.case[0], arguments.devices[0])
        return
    rows = []
    for case in arguments.case:
        for devices in arguments.devices:
            command = [sys.executable, __file__, "--child", "--case", case, "--devices", str(devices)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            rows += [json.loads(line) for line in done.stdout.splitlines()]
            print(table(rows[-len(done.stdout.splitlines()) :]), flush=True)
    if (tuple(arguments.case), tuple(arguments.devices)) == (CASES, SIZES):
        write(rows)  # a part of the study is only printed


def write(rows: list[dict]) -> None:
    """The rows, the table below the text that is in results.md, and the figure."""
    (HERE / "results.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = (HERE / "results.md").read_text() if (HERE / "results.md").exists() else ""
    before = text.partition("<!-- table -->")[0]
    (HERE / "results.md").write_text(f"{before}<!-- table -->\n\n{table(rows)}\n")
    draw(rows, HERE / "scaling.png")


if __name__ == "__main__":
    main()
