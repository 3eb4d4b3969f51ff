"""Times the training step (forward, backward, AdamW) of drafts of named sizes, on whatever device there is.

    python experiments/bench_step.py                                        # CPU: two tiny drafts, about a minute
    python experiments/bench_step.py --case llama3-8b --batch 4 --length 2048 --compute bfloat16

Before any timing the fast path is checked against dense attention and the plain loss, gradients included. Each line
gives tokens/s, TFLOP/s from counted operations (bench_cases.py), their share of a matrix product measured in the same
run, and peak memory. With --mesh the step runs over several devices and is checked against one; tokens/s and TFLOP/s
are then of all devices, memory is of one.

The check takes chunked attention for `auto`; cuDNN's kernels have tests of their own (`pytest -m gpu`).
"""

from __future__ import annotations

import argparse
import itertools
import time
from contextlib import AbstractContextManager, nullcontext

import jax
import jax.numpy as jnp
import numpy as np
from bench_cases import CASES, count_flops, make_algorithm, make_draft, make_example
from flax import nnx
from jax.sharding import Mesh

from flaxdraft.algorithms.eagle3.algorithm import Algorithm
from flaxdraft.algorithms.eagle3.objective import UnrollOptions, supervision, unroll
from flaxdraft.config import TrainConfig
from flaxdraft.devices.mesh import make_mesh
from flaxdraft.devices.weight_places import on_mesh, weight_on_mesh
from flaxdraft.errors import InputError
from flaxdraft.interfaces import Example
from flaxdraft.nn.layers import WHOLE
from flaxdraft.ops import distillation_reference
from flaxdraft.ops.rows import take_rows
from flaxdraft.train.batch_placement import SHARDING, placed_rows
from flaxdraft.train.optimizer import optimizer
from flaxdraft.train.state import init_state, split_draft
from flaxdraft.train.step import make_train_step, summed_gradients

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
# Largest relative error of any gradient, norm-wise, that passes for rounding.
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
FLOAT8_RATIO = 1.3  # see `check`


def plain_loss(draft: nnx.Module, example: Example, algorithm: Algorithm) -> jax.Array:
    """The same loss with dense attention, all logits at once, differentiated by JAX."""
    batch, rows, num_steps = example.batch, example.chosen.rows_BR, algorithm.settings.ttt_length
    hidden = unroll(draft, batch, example.features.taps_BTKE, example.chosen, num_steps, UnrollOptions("dense"))
    logits = jnp.einsum("bre,we->brw", take_rows(example.features.last_BTE, rows + 1), example.teacher)
    teacher = distillation_reference.Teacher(
        logits.astype(jnp.float32), take_rows(example.features.logsumexp_BT, rows + 1),
        draft.draft_ids[...][take_rows(example.features.argmax_BT, rows + 1)],
    )  # fmt: skip
    supervised = jnp.stack([take_rows(m, rows) for m in supervision(batch.assistant_BT, batch.segments_BT, num_steps)])
    steps = [distillation_reference.step_signals(draft.logits(h), teacher, j) for j, h in enumerate(hidden)]
    numerator, count = distillation_reference.sum_signals(steps, supervised, teacher, algorithm.step_weights).terms()
    return numerator / count


def on_devices(mesh: Mesh | None, params: nnx.State, frozen: nnx.State, example: Example) -> tuple:
    """All three where training has them on that mesh; as they are where there is none."""
    if mesh is None:
        return params, frozen, example
    rows = placed_rows((example.batch, example.features, example.chosen), mesh)
    head_WE = weight_on_mesh("teacher head", example.teacher, mesh, SHARDING.weight_ve)
    return on_mesh(params, mesh, SHARDING), on_mesh(frozen, mesh, SHARDING), Example(*rows, head_WE)


def setting(mesh: Mesh | None) -> AbstractContextManager:
    return nullcontext() if mesh is None else jax.set_mesh(mesh)


def gradients_of(loss, case: str, compute: str, float8: bool, example: Example, mesh: Mesh | None = None):
    """A loss and its gradients, brought to the host.

    Args:
        loss: of a draft's structure, trained and frozen arrays and an example: the loss and its gradients.
    """
    draft = make_draft(case, DTYPES[compute], float8, WHOLE if mesh is None else SHARDING)
    graphdef, *arrays = split_draft(draft)
    # GPUs round float32 products to 10 bits unless told otherwise; the check is of the algorithm, not of that.
    with setting(mesh), jax.default_matmul_precision("highest" if compute == "float32" else "default"):
        value, gradients = jax.jit(lambda p, f, e: loss(graphdef, p, f, e))(*on_devices(mesh, *arrays, example))
    return float(value), [np.asarray(x, np.float32).ravel() for x in jax.tree.leaves(gradients)]


def check(
    case: str,
    compute: str,
    float8: bool,
    num_steps: int,
    length: int,
    attention: str,
    documents: int,
    mesh: Mesh | None,
) -> tuple[float, float, str]:
    """What was found, the most that is allowed, and what it is: the fast path, as the step on that mesh has it, against
    the plain one on one device, on short rows.

    Without float8, the largest relative error of a gradient. In float8 a difference in the last bit moves numbers to
    the next float8 one, and all of an array where it moves its scale: two orders of summation may differ by much. There
    each gradient of either path is as far from the one of plain `compute` as float8 makes it, and the fast one may not
    be further away than the plain one.
    """
    batch = 2 if mesh is None else 2 * mesh.size
    example = make_example(case, batch, length, 0.7, DTYPES[compute], documents=documents)
    algorithm = make_algorithm(num_steps, documents > 1, attention=attention, loss_chunk=64)

    def fast(graphdef, params, frozen, example):
        def terms(params, part):
            sums = algorithm.sums(nnx.merge(graphdef, params, frozen), part, algorithm.first_carry())
            return sums.terms()[0], sums

        sums, gradients = summed_gradients(terms, params, example, 1, DTYPES[compute])
        numerator, count = sums.terms()
        return numerator / count, jax.tree.map(lambda g: g / count, gradients)

    def plain(graphdef, params, frozen, example):
        return jax.value_and_grad(lambda p: plain_loss(nnx.merge(graphdef, p, frozen), example, algorithm))(params)

    def apart(one, other):
        return [float(np.linalg.norm(x - y) / np.linalg.norm(y)) for x, y in zip(one, other, strict=True)]

    a, got = gradients_of(fast, case, compute, float8, example, mesh)
    b, want = gradients_of(plain, case, compute, float8, example)
    of_loss = abs((a - b) / b)
    if not float8:
        return float(np.max([of_loss, *apart(got, want)])), TOLERANCE[compute], "largest relative error"
    if not of_loss <= TOLERANCE["bfloat16"]:  # NaN does not pass
        raise SystemExit(f"{case}: losses {a} and {b}; nothing is timed")
    _, unrounded = gradients_of(plain, case, compute, False, example)
    ratios = [x / y for x, y in zip(apart(got, unrounded), apart(want, unrounded), strict=True)]
    return float(np.max(ratios)), FLOAT8_RATIO, f"largest error in float8, fast beside plain, both from {compute}"


def seconds(call, repeats: int) -> float:
    """Mean time of call() after one warm-up; it must return arrays."""
    jax.block_until_ready(call())
    start = time.perf_counter()
    for _ in range(repeats):
        out = call()
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / repeats


def ceiling(compute: str) -> float:
    """FLOP/s of a large square matrix product."""
    size = 8192 if jax.default_backend() == "gpu" else 1536
    # Random numbers: with constant ones a GPU draws less power, and its clock and this figure are higher than in use.
    a = jax.random.normal(jax.random.key(0), (size, size), DTYPES[compute])
    product = jax.jit(lambda a: a @ a)
    return 2 * size**3 / seconds(lambda: product(a), 10)


def compiled_step(case, compute, batch, length, supervised, documents, algorithm, float8=False, mesh=None):
    """The compiled step, a call that takes one and returns its loss, and the example.

    Args:
        batch: rows of one device.
    """
    rows = batch if mesh is None else batch * mesh.size
    example = make_example(case, rows, length, supervised, DTYPES[compute], documents=documents)
    graphdef, *arrays = split_draft(make_draft(case, DTYPES[compute], float8, WHOLE if mesh is None else SHARDING))
    tx = optimizer(TrainConfig(num_steps=1000))
    with setting(mesh):
        params, frozen, example = on_devices(mesh, *arrays, example)
        del arrays
        state = jax.jit(lambda p: init_state(p, tx, algorithm), donate_argnums=0)(params)
        compiled = make_train_step(graphdef, algorithm, tx, DTYPES[compute]).lower(state, frozen, example).compile()

    def call():
        nonlocal state
        with setting(mesh):
            state, metrics = compiled(state, frozen, example)
        return metrics.loss

    return compiled, call, example


def measure(case, compute, float8, batch, length, supervised, documents, algorithm, mesh, repeats, top) -> str:
    """One line of the table."""
    compiled, call, example = compiled_step(
        case, compute, batch, length, supervised, documents, algorithm, float8, mesh
    )  # fmt: skip
    flops = count_flops(case, example, algorithm.settings.ttt_length)
    analysis = compiled.memory_analysis()
    took = seconds(call, repeats)
    if not np.isfinite(float(call())):
        raise SystemExit(f"{case}: the loss is not finite")
    stats = jax.local_devices()[0].memory_stats() or {}
    planned = analysis.temp_size_in_bytes + analysis.argument_size_in_bytes + analysis.output_size_in_bytes
    planned -= analysis.alias_size_in_bytes
    peak = f"{stats['peak_bytes_in_use'] / 1e9:.2f} GB" if "peak_bytes_in_use" in stats else "-"
    rate, devices = flops.total / took, 1 if mesh is None else mesh.size
    products = "float8, " if float8 else ""
    how = algorithm.settings
    how = f"{products}{how.attention}, {how.remat}, {how.loss_chunk}/{how.attention_chunk}"
    return (
        f"| {case} | {name_of(mesh)} | {batch} x {length} / {documents} | {supervised:.0%} | {how} | "
        f"{took * 1e3:.1f} | {devices * batch * length / took:,.0f} | {rate / 1e12:.2f} | "
        f"{rate / (devices * top):.0%} | {planned / 1e9:.2f} GB | {peak} |"
    )


def parse_mesh(text: str) -> Mesh | None:
    """`one`, or AXIS=N of `data` and `fsdp`, joined by commas."""
    if text == "one":
        return None
    pairs = [part.partition("=") for part in text.split(",")]
    shape = {axis: int(size) for axis, _, size in pairs if size.isdigit()}
    if len(shape) < len(pairs) or not shape.keys() <= {"data", "fsdp"} or min(shape.values()) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected one, data=N, fsdp=N or data=N,fsdp=N")
    try:
        return make_mesh(**shape)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def name_of(mesh: Mesh | None) -> str:
    if mesh is None:
        return "one"
    return ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "a mesh of one"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=CASES, default=["tiny", "tiny-mla"])
    parser.add_argument(
        "--mesh", nargs="+", type=parse_mesh, default=[None], help="one, data=2, fsdp=2, data=2,fsdp=4 ..."
    )
    parser.add_argument("--batch", nargs="+", type=int, default=[2], help="rows of one device")
    parser.add_argument("--length", nargs="+", type=int, default=[512])
    parser.add_argument("--supervised", nargs="+", type=float, default=[1.0])
    parser.add_argument("--documents", nargs="+", type=int, default=[1], help="packed into one row")
    parser.add_argument("--attention", nargs="+", default=["auto"])
    parser.add_argument("--remat", nargs="+", default=["none"])
    parser.add_argument("--loss-chunk", nargs="+", type=int, default=[512])
    parser.add_argument("--attention-chunk", nargs="+", type=int, default=[256])
    parser.add_argument("--compute", choices=DTYPES, default="float32")
    parser.add_argument("--float8", action="store_true", help="products of the layer; ops/float8.py")
    parser.add_argument("--ttt-length", type=int, default=7)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--check-length", type=int, default=96)
    arguments = parser.parse_args()
    device, meshes = jax.devices()[0], arguments.mesh
    top = ceiling(arguments.compute)
    print(
        f"jax {jax.__version__} on {device.device_kind}, {arguments.compute}; matrix product {top / 1e12:.2f} TFLOP/s"
    )
    # On short rows "auto" is dense attention, which is what it would be checked against.
    attentions = {"chunked" if name in ("auto", "dense") else name for name in arguments.attention}
    for case, attention, documents, mesh in itertools.product(
        arguments.case, sorted(attentions), sorted({1, *arguments.documents}), meshes
    ):
        settings = arguments.compute, arguments.float8, arguments.ttt_length, arguments.check_length
        error, allowed, what = check(case, *settings, attention, documents, mesh)
        print(f"{case}, {name_of(mesh)}, {documents} documents a row: {attention} attention against the plain path, "
              f"{what} {error:.2g}", flush=True)  # fmt: skip
        if not error <= allowed:  # NaN does not pass
            raise SystemExit(f"{case}: more than {allowed:.2g}; nothing is timed")
    print("| case | devices | batch x length / documents | supervised | attention, remat, chunks | ms | tokens/s | "
          "TFLOP/s | of the product | planned memory | peak so far |\n" + 11 * "|---" + "|")  # fmt: skip
    for case, mesh, batch, length, supervised, documents, attention, remat, loss_chunk, attention_chunk in (
        itertools.product(
            arguments.case, meshes, arguments.batch, arguments.length, arguments.supervised, arguments.documents,
            arguments.attention, arguments.remat, arguments.loss_chunk, arguments.attention_chunk,
        )
    ):  # fmt: skip
        algorithm = make_algorithm(
            arguments.ttt_length, documents > 1, attention=attention, remat=remat, loss_chunk=loss_chunk,
            attention_chunk=attention_chunk,
        )  # fmt: skip
        line = measure(
            case, arguments.compute, arguments.float8, batch, length, supervised, documents, algorithm, mesh,
            arguments.repeats, top,
        )  # fmt: skip
        print(line, flush=True)


if __name__ == "__main__":
    main()
