"""Temporary memory of forward and backward as XLA plans it, against row length. Nothing is run: it only compiles.

    JAX_PLATFORMS=cpu python experiments/bench_memory.py

Both drafts at width 1024 with 16 heads, W 16384, J 7, bfloat16, one row, everything supervised. "dense" is dense
attention with the plain loss; "chunked" never holds the scores of all rows or their logits.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from bench_cases import CASES, _llama, _mla, make_algorithm, make_draft, make_example
from bench_step import plain_loss
from flax import nnx

from flaxdraft.algorithms.eagle3.objective import ChosenRows
from flaxdraft.interfaces import Example
from flaxdraft.train.state import split_draft

CASES |= {
    "memory-llama": (CASES["tiny"][0], _llama(1024, 4096, 16, 4, 64, 32768, 16384)),
    "memory-mla": (CASES["tiny-mla"][0], _mla(1024, 4096, 16, 384, 256, 64, 32, 64, 32768, 16384)),
}
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)


def planned_bytes(case: str, length: int, path: str, remat: str = "none") -> int:
    """Temporary bytes of the compiled forward and backward."""
    algorithm = make_algorithm(7, True, attention=path, remat=remat)
    example = jax.eval_shape(lambda: make_example(case, 1, 8, 1.0, jnp.bfloat16))
    longer = lambda x: jax.ShapeDtypeStruct(tuple(length if n == 8 else n for n in x.shape), x.dtype)  # noqa: E731
    rows = jax.ShapeDtypeStruct((1, length - 2), jnp.int32)
    batch, features = jax.tree.map(longer, (example.batch, example.features))
    example = Example(batch, features, ChosenRows(rows), example.teacher)
    graphdef, params, frozen = split_draft(nnx.eval_shape(lambda: make_draft(case, jnp.bfloat16)))

    def loss(params, frozen, example):
        draft = nnx.merge(graphdef, params, frozen)
        if path == "dense":
            return plain_loss(draft, example, algorithm)
        numerator, count = algorithm.sums(draft, example, algorithm.first_carry()).terms()
        return numerator / count

    compiled = jax.jit(jax.grad(loss)).lower(params, frozen, example).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def main() -> None:
    print("| draft | path | " + " | ".join(f"{length}" for length in LENGTHS) + " | bytes a token, last doubling |")
    print("|---|---|" + "---|" * (len(LENGTHS) + 1))
    for case in ("memory-llama", "memory-mla"):
        for path, remat in (("dense", "none"), ("chunked", "none"), ("chunked", "full")):
            lengths = [n for n in LENGTHS if path == "chunked" or n <= 4096]
            sizes = [planned_bytes(case, length, path, remat) for length in lengths]
            cells = [f"{size / 1e9:.2f} GB" for size in sizes] + ["-"] * (len(LENGTHS) - len(sizes))
            slope = (sizes[-1] - sizes[-2]) / (lengths[-1] - lengths[-2])
            print(f"| {case} | {path}, remat {remat} | " + " | ".join(cells) + f" | {slope:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
