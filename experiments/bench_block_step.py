"""Times the training step (forward, backward, AdamW) of DFlash drafts of named sizes, on whatever device there is.

    python experiments/bench_block_step.py                                  # CPU: a tiny draft, about a minute
    python experiments/bench_block_step.py --case qwen3-8b --batch 4 --length 3072 --compute bfloat16 \\
        --attention-chunk 512 1024 --loss-chunk 1024 2048

Before any timing the fast path (attention and cross entropy in chunks) is checked against dense attention and all
logits at once, gradients included, on short rows. Each line gives tokens/s of the text, TFLOP/s from counted operations
(`count_flops`), their share of a matrix product measured in the same run, and memory.
"""

from __future__ import annotations

import argparse
import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from bench_step import DTYPES, TOLERANCE, ceiling, seconds
from flax import nnx

from flaxdraft.algorithms.dflash.algorithm import Algorithm
from flaxdraft.algorithms.dflash.drafts import qwen3
from flaxdraft.algorithms.dflash.layout import wanted
from flaxdraft.algorithms.dflash.objective import summed
from flaxdraft.algorithms.dflash.settings import Settings
from flaxdraft.config import TrainConfig
from flaxdraft.devices.sharding import Sharding
from flaxdraft.interfaces import Batch, Draw, Example, Features, VocabMap
from flaxdraft.nn.precision import Precision
from flaxdraft.nn.rope import RopeConfig
from flaxdraft.train.optimizer import optimizer
from flaxdraft.train.state import init_state, split_draft
from flaxdraft.train.step import make_train_step

# hidden, intermediate, heads, key/value heads, head width, vocabulary, layers, taps, block, anchors of a row
CASES = {
    "tiny": (64, 128, 4, 2, 16, 512, 2, 3, 4, 16),
    "qwen3-8b": (4096, 12288, 32, 8, 128, 151_936, 5, 5, 16, 512),
    "qwen3-8b-2": (4096, 12288, 32, 8, 128, 151_936, 2, 5, 16, 512),
}


def make(case: str, compute: str, **settings) -> tuple[nnx.Module, Algorithm]:
    hidden, inner, heads, kv_heads, width, vocab, layers, taps, block, num_anchors = CASES[case]
    config = qwen3.Config(
        hidden_size=hidden, target_hidden_size=hidden, intermediate_size=inner, vocab_size=vocab,
        draft_vocab_size=vocab, rms_norm_eps=1e-6, num_attention_heads=heads, num_hidden_layers=layers, num_taps=taps,
        block_size=block, mask_token_id=vocab - 1, rope=RopeConfig(rope_theta=1e6), num_key_value_heads=kv_heads,
        head_dim=width,
    )  # fmt: skip
    table = lambda seed: 0.02 * jax.random.normal(jax.random.key(seed), (vocab, hidden))  # noqa: E731
    draft = qwen3.make(
        config, VocabMap(np.arange(vocab), vocab), SimpleNamespace(embedding=lambda: table(0), head=lambda: table(1)),
        precision=Precision(compute=DTYPES[compute]), sharding=Sharding.none(), rngs=nnx.Rngs(0),
    )  # fmt: skip
    return draft, Algorithm(Settings(block_size=block, num_anchors=num_anchors, **settings))


def make_example(case: str, algorithm: Algorithm, batch: int, length: int, compute: str) -> Example:
    """Rows of one document whose last four fifths are the assistant's."""
    hidden, vocab, num_taps, rng = CASES[case][0], CASES[case][5], CASES[case][7], np.random.default_rng(0)
    tokens = rng.integers(0, vocab, (batch, length)).astype(np.int32)
    positions = np.tile(np.arange(length, dtype=np.int32), (batch, 1))
    rows = Batch(tokens, positions >= length // 5, np.ones_like(tokens), positions)
    taps = jax.random.normal(jax.random.key(2), (batch, length, num_taps, hidden), DTYPES[compute])
    return jax.tree.map(jnp.asarray, Example(rows, Features(taps), algorithm.choose(rows, length, Draw(0, 0, 0)), ()))


def count_flops(case: str, example: Example) -> float:
    """Of one step: two operations for each entry of a matrix, three times over for the two gradients. The frozen head
    has one gradient, fc none by its input. Attention: what slots see, forward and 2.5 times that backward."""
    hidden, inner, heads, kv_heads, width, vocab, layers, num_taps, block, _ = CASES[case]
    anchor_BA, rows = np.asarray(example.chosen.anchor_BA), example.batch.tokens_BT.size
    real = anchor_BA < example.batch.tokens_BT.shape[1]
    slots = float(real.sum()) * block
    of_slot = 2 * hidden * heads * width + 2 * hidden * kv_heads * width + 3 * hidden * inner
    of_row = 2 * hidden * kv_heads * width
    seen = block * float((anchor_BA * real).sum()) + slots * block
    attention = 4.0 * heads * width * seen * 3.5
    head = 4.0 * vocab * hidden * float(real.sum()) * (block - 1)
    return layers * (6.0 * (slots * of_slot + rows * of_row) + attention) + head + 4.0 * rows * num_taps * hidden**2


def check(case: str, compute: str, length: int) -> float:
    """The largest relative error of a gradient, norm-wise, and of the loss."""
    draft, fast = make(case, compute, attention="chunked", attention_chunk=64, loss_chunk=64)
    plain = Algorithm(fast.settings.model_copy(update={"attention": "dense"}))
    example = make_example(case, fast, 2, length, compute)
    graphdef, params, frozen = split_draft(draft)

    def of_fast(params):
        numerator, count = fast.sums(nnx.merge(graphdef, params, frozen), example, ()).terms()
        return numerator / count

    def of_plain(params):
        draft, anchor_BA, layout = nnx.merge(graphdef, params, frozen), example.chosen.anchor_BA, plain.layout
        states = plain.states(draft, example.batch, plain.read(draft, example), anchor_BA)
        label, asked = wanted(example.batch, anchor_BA, layout, stop_at_hole=False)
        logits = draft.logits(states).reshape(*label.shape, -1)
        right = jnp.take_along_axis(logits, label[..., None], axis=-1)[..., 0]
        loss, hit = jax.nn.logsumexp(logits, axis=-1) - right, jnp.argmax(logits, axis=-1) == label
        numerator, count = summed(plain.settings, layout, slice(layout.first, None), asked, loss, hit).terms()
        return numerator / count

    with jax.default_matmul_precision("highest" if compute == "float32" else "default"):
        (a, got), (b, want) = (jax.jit(jax.value_and_grad(loss))(params) for loss in (of_fast, of_plain))
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    apart = [float(jnp.linalg.norm(x - y) / jnp.linalg.norm(y)) for x, y in ((x.ravel(), y.ravel()) for x, y in pairs)]
    return max(abs(float((a - b) / b)), *apart)


def measure(case, compute, batch, length, repeats, top, **settings) -> str:
    """One line of the table."""
    draft, algorithm = make(case, compute, **settings)
    example = make_example(case, algorithm, batch, length, compute)
    graphdef, params, frozen = split_draft(draft)
    del draft
    tx = optimizer(TrainConfig(num_steps=1000))
    state = jax.jit(lambda p: init_state(p, tx, algorithm), donate_argnums=0)(params)
    compiled = make_train_step(graphdef, algorithm, tx, DTYPES[compute]).lower(state, frozen, example).compile()

    def call():
        nonlocal state
        state, metrics = compiled(state, frozen, example)
        return metrics.loss

    took, analysis = seconds(call, repeats), compiled.memory_analysis()
    if not np.isfinite(float(call())):
        raise SystemExit(f"{case}: the loss is not finite")
    planned = analysis.temp_size_in_bytes + analysis.argument_size_in_bytes + analysis.output_size_in_bytes
    planned -= analysis.alias_size_in_bytes
    stats, rate = jax.local_devices()[0].memory_stats() or {}, count_flops(case, example) / took
    peak = f"{stats['peak_bytes_in_use'] / 1e9:.2f} GB" if "peak_bytes_in_use" in stats else "-"
    how = ", ".join(map(str, settings.values()))
    return (
        f"| {case} | {batch} x {length} | {how} | {took * 1e3:.1f} | {batch * length / took:,.0f} | "
        f"{rate / 1e12:.2f} | {rate / top:.0%} | {planned / 1e9:.2f} GB | {peak} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=CASES, default=["tiny"])
    parser.add_argument("--batch", nargs="+", type=int, default=[2])
    parser.add_argument("--length", nargs="+", type=int, default=[256])
    parser.add_argument("--attention", nargs="+", default=["auto"])
    parser.add_argument("--remat", nargs="+", default=["none"])
    parser.add_argument("--loss-chunk", nargs="+", type=int, default=[512])
    parser.add_argument("--attention-chunk", nargs="+", type=int, default=[256])
    parser.add_argument("--compute", choices=DTYPES, default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--check-length", type=int, default=96)
    arguments = parser.parse_args()
    top = ceiling(arguments.compute)
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}, {arguments.compute}; matrix product "
          f"{top / 1e12:.2f} TFLOP/s")  # fmt: skip
    for case in arguments.case:
        error, allowed = check(case, arguments.compute, arguments.check_length), TOLERANCE[arguments.compute]
        print(f"{case}: chunks against the plain path, largest relative error {error:.2g}", flush=True)
        if not error <= allowed:  # NaN does not pass
            raise SystemExit(f"{case}: more than {allowed:.2g}; nothing is timed")
    print("| case | batch x length | attention, remat, chunks of loss and attention | ms | tokens/s | TFLOP/s | "
          "of the product | planned memory | peak so far |\n" + 9 * "|---" + "|")  # fmt: skip
    names = ("attention", "remat", "loss_chunk", "attention_chunk")
    for case, batch, length, *how in itertools.product(
        arguments.case, arguments.batch, arguments.length, *(getattr(arguments, name) for name in names)
    ):
        settings = dict(zip(names, how, strict=True))
        print(measure(case, arguments.compute, batch, length, arguments.repeats, top, **settings), flush=True)


if __name__ == "__main__":
    main()
