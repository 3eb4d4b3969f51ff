"""comparison.md and comparison.png: algorithms beside each other, on the same answers, in the same minutes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from contestants import LABELS
from drafting import of_pass
from flax import nnx
from report import Draft, table

from flaxdraft import targets
from flaxdraft.algorithms.loading import from_pretrained
from flaxdraft.devices.sharding import Sharding
from flaxdraft.nn.precision import of_both
from flaxdraft.targets import decoder
from flaxdraft.targets.embedding_and_head import EmbeddingAndHeadWeights

# Of one proposal of the cheapest draft, as shares of the time of a target pass.
RATIOS = (0.01, 0.05, 0.2, 0.5)


def summary(draft: Draft, export: Path, target: str) -> dict[str, Any]:
    """All that is written of one trained draft.

    Args:
        export: its directory; of each chain the products are counted.
        target: its address.
    """
    opened, loaded = targets.open_target(target), from_pretrained(export)
    config, precision = opened.config(), of_both("float32")
    weights = EmbeddingAndHeadWeights.of_target(opened, config)
    module = loaded.module.make(
        loaded.config, loaded.vocab, weights, precision=precision, sharding=Sharding.none(), rngs=nnx.Rngs(0)
    )
    taps = loaded.algorithm.tap_layers(config.num_hidden_layers, None)
    chains = []
    for chain in draft.chains:
        length, decoded = chain["chain_length"], chain["decoded"]
        cost = of_pass(module, loaded.algorithm.drafter(), len(taps), config.hidden_size, length)
        chains.append({
            "chain_length": length, "accept_length": decoded["accept_length"], "passes": decoded["target_passes"],
            "passes_alone": decoded["target_passes_alone"], "identical": decoded["identical_answers"],
            "answers": chain["answers"], "flops": cost.flops, "weights": cost.weights,
        })  # fmt: skip
    _, state = decoder.abstract_state(config, opened.family.groups(config, precision, Sharding.none()), precision)
    name, _, seed = draft.name.partition("-seed-")
    return {
        "name": name, "seed": int(seed or 0), "steps": draft.inputs["train"]["num_steps"], "tokens": draft.tokens,
        "tokens_per_second": draft.speed()[0], "curve": [*zip(*draft.by_tokens(), strict=True)], "chains": chains,
        "parameters": sum(x.size for x in jax.tree.leaves(loaded.params)),
        "target_weights": sum(x.size for x in jax.tree.leaves(state)),
    }  # fmt: skip


class Contestant:
    """The seeds of one draft."""

    def __init__(self, name: str, seeds: Sequence[dict[str, Any]]):
        self.name, self.seeds = name, seeds

    @property
    def label(self) -> str:
        return LABELS[self.name]

    @property
    def lengths(self) -> list[int]:
        return [chain["chain_length"] for chain in self.seeds[0]["chains"]]

    def of_chains(self, what: str) -> np.ndarray:
        """[seed, chain]"""
        return np.array([[chain[what] for chain in seed["chains"]] for seed in self.seeds], float)

    def accept(self, at: int) -> str:
        """The mean of the seeds, and how far they spread."""
        values = self.of_chains("accept_length")[:, at]
        return f"{values.mean():.2f}" + (f" ± {np.ptp(values) / 2:.2f}" if len(values) > 1 else "")

    def speedups(self, unit: float) -> np.ndarray:
        """[chain]: tokens in the time of one target pass, if a proposal takes time as it reads weights.

        Args:
            unit: the time in which a draft reads one weight, in target passes.
        """
        return (self.of_chains("accept_length") / (1 + unit * self.of_chains("weights"))).mean(axis=0)


def contestants(drafts: Sequence[dict[str, Any]]) -> list[Contestant]:
    names = [*dict.fromkeys(draft["name"] for draft in drafts)]
    return [Contestant(name, [draft for draft in drafts if draft["name"] == name]) for name in names]


def _accept_table(found: Sequence[Contestant]) -> list[str]:
    lengths = found[0].lengths
    rows = [[each.label, *(each.accept(at) for at in range(len(lengths)))] for each in found]
    return table(["draft tokens a pass", *map(str, lengths)], rows)


def _cost_table(found: Sequence[Contestant]) -> list[str]:
    rows = []
    for each in found:
        first, last = each.seeds[0], each.seeds[0]["chains"][-1]
        same = sum(seed["chains"][-1]["identical"] for seed in each.seeds)
        rows.append([
            each.label, each.lengths[-1], each.accept(-1), f"{first['parameters'] / 1e6:.1f} M",
            f"{last['flops'] / 1e6:,.0f} M", f"{last['weights'] / 1e6:,.0f} M",
            f"{last['weights'] / first['target_weights']:.0%}",
            f"{same} of {sum(seed['chains'][-1]['answers'] for seed in each.seeds)}",
        ])  # fmt: skip
    head = [
        "draft", "tokens a pass", "accept length", "trained weights", "FLOPs a proposal", "weights read a proposal",
        "of the target's", "identical answers",
    ]  # fmt: skip
    return table(head, rows)


def _training_table(found: Sequence[Contestant], data: dict[str, Any]) -> list[str]:
    rows = []
    for each in found:
        for seed in each.seeds:
            seconds = seed["tokens"] / seed["tokens_per_second"]
            rows.append([
                each.label, seed["seed"], f"{seed['steps']:,}", f"{seed['tokens'] / 1e6:.1f} M",
                f"{seed['tokens'] / data['tokens']:.1f}", f"{seed['tokens_per_second']:,.0f}", f"{seconds / 60:.1f}",
                f"{seed['curve'][-1][1]:.2f}",
            ])  # fmt: skip
    head = ["draft", "seed", "steps", "tokens", "epochs", "tokens/s", "minutes of steps", "walked at the end"]
    return table(head, rows)


def _cheapest(found: Sequence[Contestant]) -> float:
    """Weights that the cheapest proposal of the longest chains reads."""
    return min(each.of_chains("weights")[0, -1] for each in found)


def _speedup_table(found: Sequence[Contestant]) -> list[str]:
    unit, rows = 1 / _cheapest(found), []
    for each in found:
        cells = []
        for ratio in RATIOS:
            speedups = each.speedups(ratio * unit)
            best = int(speedups.argmax())
            cells.append(f"{speedups[best]:.2f} ({each.lengths[best]})")
        rows.append([each.label, *cells])
    return table(["draft", *(f"{ratio:.0%}" for ratio in RATIOS)], rows)


def _plot(path: Path, found: Sequence[Contestant]) -> None:
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(16, 4.8), layout="constrained")
    unit, ratios = 1 / _cheapest(found), np.geomspace(0.003, 1, 60)
    for each, color in zip(found, plt.get_cmap("tab10").colors, strict=False):  # pyright: ignore
        left.plot(each.lengths, each.of_chains("accept_length").mean(axis=0), "o-", color=color, label=each.label)
        for i, seed in enumerate(each.seeds):
            middle.plot(*zip(*seed["curve"], strict=True), "-", color=color, label=each.label if i == 0 else None)
        right.plot(ratios, [each.speedups(ratio * unit).max() for ratio in ratios], color=color, label=each.label)
    left.set(title="Accept length, real decoding", xlabel="draft tokens a target pass", ylabel="tokens a target pass")
    middle.set(title="Over training, held-out answers walked", xlabel="million tokens trained on")
    right.set(
        title="Predicted speed-up, best chain length", xscale="log",
        xlabel="time of the cheapest proposal / time of a target pass",
    )  # fmt: skip
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def write(directory: Path, kept: dict[str, Any]) -> None:
    """Both files, from what comparison.json holds."""
    found, data = contestants(kept["drafts"]), kept["data"]
    text = [
        "# Algorithms beside each other: SmolLM2-135M-Instruct, its own answers, one GPU",
        "",
        "![accept length and predicted speed-up](comparison.png)",
        "",
        *([kept["note"], ""] if kept["note"] else []),
        "Accept length, (generated tokens - 1) / target passes, of the held-out prompts, decoded for real:",
        "",
        *_accept_table(found),
        "What a proposal of the longest chain costs, for one conversation; a weight that is used twice is read twice:",
        "",
        *_cost_table(found),
        "Predicted speed-up over the target alone, at each draft's best chain length, which stands in brackets. It "
        "assumes that a target pass over several tokens takes as long as over one, and a proposal as long as "
        "reading its weights. The columns say how long the cheapest proposal takes, in target passes:",
        "",
        *_speedup_table(found),
        "## Training",
        "",
        f"{data['answers']:,} greedy answers of the target, {data['tokens']:,} tokens with prompts; every draft in the "
        "same minutes of steps, measured on a trial beforehand. The target reads the answers while the draft trains.",
        "",
        *_training_table(found, data),
        "Commands and settings: `run.py`, `flagship.yaml`, `contestants.py`.",
        "",
    ]  # fmt: skip
    (directory / "comparison.md").write_text("\n".join(text), encoding="utf-8")
    _plot(directory / "comparison.png", found)
