"""Times the training step (forward, backward, AdamW) of drafts of named sizes, on whatever device there is.

    python experiments/bench_step.py                                        # CPU: two tiny drafts, about a minute
    python experiments/bench_step.py --case llama3-8b --batch 4 --length 2048 --compute bfloat16

Before any timing the fast path is checked against dense attention and the plain loss, gradients included. Each line
gives tokens/s, TFLOP/s from counted operations (bench_cases.py), their share of a matrix product measured in the same
run, and peak memory.
"""

from __future__ import annotations

import argparse
import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np
from bench_cases import CASES, count_flops, make_draft, make_example
from flax import nnx

from flaxdraft.algorithms.eagle3 import Algorithm, supervision, unroll
from flaxdraft.config import TrainConfig
from flaxdraft.interfaces import Example
from flaxdraft.ops import distillation_reference
from flaxdraft.ops.rows import take_rows
from flaxdraft.train.optimizer import optimizer
from flaxdraft.train.state import init_state, split_draft
from flaxdraft.train.step import make_train_step

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
# Largest relative error of any gradient, norm-wise, that passes for rounding.
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
FLOAT8_RATIO = 1.3  # see `check`


def plain_loss(draft: nnx.Module, example: Example, algorithm: Algorithm) -> jax.Array:
    """The same loss with dense attention, all logits at once, differentiated by JAX."""
    batch, rows, num_steps = example.batch, example.rows_BR, algorithm.num_steps
    hidden = unroll(draft, batch, example.features.taps_BT3E, rows, num_steps, attention="dense")
    logits = jnp.einsum("bre,we->brw", take_rows(example.features.last_BTE, rows + 1), example.teacher_head_WE)
    teacher = distillation_reference.Teacher(
        logits.astype(jnp.float32), take_rows(example.features.logsumexp_BT, rows + 1),
        draft.draft_ids[...][take_rows(example.features.argmax_BT, rows + 1)],
    )  # fmt: skip
    supervised = jnp.stack([take_rows(m, rows) for m in supervision(batch.assistant_BT, batch.segments_BT, num_steps)])
    steps = [distillation_reference.step_signals(draft.logits(h), teacher, j) for j, h in enumerate(hidden)]
    return algorithm.mean_loss(distillation_reference.sum_signals(steps, supervised, teacher))


def check(
    case: str, compute: str, float8: bool, num_steps: int, length: int, attention: str, documents: int
) -> tuple[float, float, str]:
    """What was found, the most that is allowed, and what it is: the fast path against the plain one, on short rows.

    Without float8, the largest relative error of a gradient. In float8 a difference in the last bit moves numbers to
    the next float8 one, and all of an array where it moves its scale: two orders of summation may differ by much. There
    each gradient of either path is as far from the one of plain `compute` as float8 makes it, and the fast one may not
    be further away than the plain one.
    """
    example = make_example(case, 2, length, 0.7, DTYPES[compute], documents=documents)
    algorithm = Algorithm(num_steps, attention=attention, loss_chunk=64, packed=documents > 1)

    def fast(draft, example):
        return algorithm.mean_loss(algorithm.loss_sums(draft, example))

    def plain(draft, example):
        return plain_loss(draft, example, algorithm)

    def found(loss, float8):
        graphdef, params, frozen = split_draft(make_draft(case, DTYPES[compute], float8))
        of_params = lambda p, frozen, example: loss(nnx.merge(graphdef, p, frozen), example)  # noqa: E731
        # GPUs round float32 products to 10 bits unless told otherwise; the check is of the algorithm, not of that.
        with jax.default_matmul_precision("highest" if compute == "float32" else "default"):
            value, gradients = jax.jit(jax.value_and_grad(of_params))(params, frozen, example)
        return value, jax.tree.leaves(gradients)

    def apart(one, other):
        norm = jnp.linalg.norm
        return [float(norm((x - y).ravel()) / norm(y.ravel())) for x, y in zip(one, other, strict=True)]

    (a, got), (b, want) = found(fast, float8), found(plain, float8)
    of_loss = abs(float(a - b) / float(b))
    if not float8:
        return float(np.max([of_loss, *apart(got, want)])), TOLERANCE[compute], "largest relative error"
    if not of_loss <= TOLERANCE["bfloat16"]:  # NaN does not pass
        raise SystemExit(f"{case}: losses {float(a)} and {float(b)}; nothing is timed")
    _, unrounded = found(plain, False)
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


def compiled_step(case, compute, batch, length, supervised, documents, algorithm, float8=False):
    """The compiled step, a call that takes one and returns its loss, and the example."""
    example = make_example(case, batch, length, supervised, DTYPES[compute], documents=documents)
    graphdef, params, frozen = split_draft(make_draft(case, DTYPES[compute], float8))
    tx = optimizer(TrainConfig(num_steps=1000))
    state = jax.jit(lambda p: init_state(p, tx, algorithm.num_steps), donate_argnums=0)(params)
    compiled = make_train_step(graphdef, algorithm, tx).lower(state, frozen, example).compile()

    def call():
        nonlocal state
        state, metrics = compiled(state, frozen, example)
        return metrics.loss

    return compiled, call, example


def measure(case, compute, float8, batch, length, supervised, documents, algorithm, repeats, top) -> str:
    """One line of the table."""
    compiled, call, example = compiled_step(case, compute, batch, length, supervised, documents, algorithm, float8)
    flops = count_flops(case, example, algorithm.num_steps)
    analysis = compiled.memory_analysis()
    took = seconds(call, repeats)
    if not np.isfinite(float(call())):
        raise SystemExit(f"{case}: the loss is not finite")
    stats = jax.local_devices()[0].memory_stats() or {}
    planned = analysis.temp_size_in_bytes + analysis.argument_size_in_bytes + analysis.output_size_in_bytes
    planned -= analysis.alias_size_in_bytes
    peak = f"{stats['peak_bytes_in_use'] / 1e9:.2f} GB" if "peak_bytes_in_use" in stats else "-"
    rate = flops.total / took
    products = "float8, " if float8 else ""
    how = f"{products}{algorithm.attention}, {algorithm.remat}, {algorithm.loss_chunk}/{algorithm.attention_chunk}"
    return (
        f"| {case} | {batch} x {length} / {documents} | {supervised:.0%} | {how} | {took * 1e3:.1f} | "
        f"{batch * length / took:,.0f} | "
        f"{rate / 1e12:.2f} | {rate / top:.0%} | {planned / 1e9:.2f} GB | {peak} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=CASES, default=["tiny", "tiny-mla"])
    parser.add_argument("--batch", nargs="+", type=int, default=[2])
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
    device = jax.devices()[0]
    top = ceiling(arguments.compute)
    print(
        f"jax {jax.__version__} on {device.device_kind}, {arguments.compute}; matrix product {top / 1e12:.2f} TFLOP/s"
    )
    # On short rows "auto" is dense attention, which is what it would be checked against.
    attentions = {"chunked" if name in ("auto", "dense") else name for name in arguments.attention}
    for case, attention, documents in itertools.product(arguments.case, sorted(attentions), {1, *arguments.documents}):
        settings = arguments.compute, arguments.float8, arguments.ttt_length, arguments.check_length
        error, allowed, what = check(case, *settings, attention, documents)
        print(f"{case}, {documents} documents a row: {attention} attention against the plain path, {what} {error:.2g}",
              flush=True)  # fmt: skip
        if not error <= allowed:  # NaN does not pass
            raise SystemExit(f"{case}: more than {allowed:.2g}; nothing is timed")
    print("| case | batch x length / documents | supervised | attention, remat, chunks | ms | tokens/s | TFLOP/s | "
          "of the product | planned memory | peak so far |\n|---|---|---|---|---|---|---|---|---|---|")  # fmt: skip
    for case, batch, length, supervised, documents, attention, remat, loss_chunk, attention_chunk in itertools.product(
        arguments.case, arguments.batch, arguments.length, arguments.supervised, arguments.documents,
        arguments.attention, arguments.remat, arguments.loss_chunk, arguments.attention_chunk,
    ):  # fmt: skip
        algorithm = Algorithm(
            arguments.ttt_length, attention=attention, remat=remat, loss_chunk=loss_chunk,
            attention_chunk=attention_chunk, packed=documents > 1,
        )  # fmt: skip
        line = measure(
            case, arguments.compute, arguments.float8, batch, length, supervised, documents, algorithm,
            arguments.repeats, top,
        )  # fmt: skip
        print(line, flush=True)


if __name__ == "__main__":
    main()
