"""The pictures of a report."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.font_manager import findfont, get_font
from matplotlib.patches import Rectangle

from flaxdraft.ops.step_sums import TITLES

SAMPLE_COLUMNS = 96
# Light to dark: one token a pass is what the target does alone.
PASS_COLORS = ("#ffffff", "#d7ecd9", "#a5d6a7", "#66bb6a", "#2e9e4f", "#1b7837", "#0f5a2a", "#083d1b")


def _figure(path: Path, title: str, xlabel: str, ylabel: str):
    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)

    def save():
        figure.savefig(path, dpi=130)
        plt.close(figure)

    return axes, save


def draw_training(directory: Path, metrics: Sequence[dict[str, Any]]) -> list[str]:
    """Loss, accept length, and what has a figure for each draft position, as training went on; the pictures' names."""
    train = [line for line in metrics if line["kind"] == "train"]
    held = [line for line in metrics if line["kind"] == "held_out"]
    steps = [line["step"] for line in held]
    axes, save = _figure(directory / "loss.png", "Loss", "optimizer step", "cross-entropy, nats a row")
    axes.plot([m["step"] for m in train], [m["loss"] for m in train], label="training", color="#9ecae1")
    axes.plot(steps, [m["loss"] for m in held], "o-", label="held out", color="#08519c")
    axes.legend()
    save()
    axes, save = _figure(directory / "accept_length.png", "Held-out accept length", "optimizer step", "tokens a pass")
    axes.plot(steps, [m["accept_length"] for m in held], "o-", color="#1b7837")
    axes.axhline(1.0, color="grey", linewidth=1, linestyle="--")
    save()
    by_position = [name for name, value in held[0].items() if isinstance(value, list)]
    for name in by_position:
        title = TITLES.get(name, name.replace("_", " "))
        axes, save = _figure(
            directory / f"{name}.png", f"Held-out {title} by draft position", "optimizer step", "mean over rows"
        )
        num_positions = min(len(m[name]) for m in held)  # a resumed run may draft longer chains
        for j in range(num_positions):
            color = plt.get_cmap("viridis")(j / max(num_positions - 1, 1) * 0.85)
            axes.plot(steps, [m[name][j] for m in held], "o-", label=f"{j + 1}", color=color)
        axes.set_ylim(0, axes.get_ylim()[1])
        axes.legend(title="position")
        save()
    return ["accept_length", *by_position, "loss"]


def draw_acceptance(directory: Path, decoded: Mapping[str, Any]) -> list[str]:
    """What target passes accepted; names of the pictures.

    Args:
        decoded: see `results.acceptance`.
    """
    rates = decoded["acceptance_by_position"]
    axes, save = _figure(
        directory / "acceptance.png", "Draft token accepted, real decoding", "position in the chain", "share of passes"
    )
    drawn = axes.bar(range(1, len(rates) + 1), rates, color="#66bb6a")
    axes.bar_label(drawn, [f"{rate:.0%}" for rate in rates])
    axes.set_xticks(range(1, len(rates) + 1))
    save()
    counts = decoded["accepted_histogram"]
    axes, save = _figure(
        directory / "accepted_lengths.png", "Draft tokens used by each target pass", "draft tokens", "target passes"
    )
    axes.bar_label(axes.bar(range(len(counts)), counts, color="#74a9cf"), [str(count) for count in counts])
    axes.set_xticks(range(len(counts)))
    save()
    return ["accepted_lengths", "acceptance"]


def draw_guesses(directory: Path, results: Sequence[dict[str, Any]]) -> list[str]:
    """Several chains, and trees behind them, beside each other; names of the pictures."""
    axes, save = _figure(directory / "chains.png", "Tokens a target pass, and speed", "drafted for each pass", "ratio")
    names, num_chains = [result["name"] for result in results], sum(not result["tree"] for result in results)
    for name, color, values in (
        ("accept length", "#1b7837", [result["decoded"]["accept_length"] for result in results]),
        ("speed next to the target alone", "#08519c", [result["speedup"] for result in results]),
    ):
        axes.plot(values, "o", label=name, color=color)
        axes.plot(values[:num_chains], color=color)
    axes.axhline(1.0, color="grey", linewidth=1, linestyle="--")
    axes.set_xticks(range(len(names)), [textwrap.fill(name, 8) for name in names])
    axes.legend()
    save()
    return ["chains"]


def _drawable(text: str) -> str:
    """Characters that the figure's font lacks (control characters, other scripts, emoji) become dots."""
    glyphs = get_font(findfont("DejaVu Sans Mono")).get_charmap()
    return "".join(letter if ord(letter) in glyphs or letter in "\n\t" else "·" for letter in text)


def _lay_out(pieces: Sequence[str], per_token: Sequence[int]) -> list[list[tuple[int, str, int]]]:
    """Lines of (column, text, tokens of its pass), broken like a terminal would at SAMPLE_COLUMNS."""
    lines, column = [[]], 0
    for piece, gained in zip(pieces, per_token, strict=True):
        for part in piece.replace("\t", "    ").splitlines(keepends=True):
            text = part.rstrip("\n")
            if column and column + len(text) > SAMPLE_COLUMNS:
                lines.append([])
                text, column = text.lstrip(" "), 0
            lines[-1].append((column, text, gained))
            column += len(text)
            if part.endswith("\n"):
                lines.append([])
                column = 0
    return lines


def draw_sample(path: Path, prompt: str, pieces: Sequence[str], yields: Sequence[int]) -> None:
    """The answer's tokens, each coloured by how many its target pass yielded; the first came with the prefill."""
    lines = _lay_out([_drawable(piece) for piece in pieces], [1] + [gained for gained in yields for _ in range(gained)])
    question = textwrap.wrap(_drawable(prompt), SAMPLE_COLUMNS)
    height = len(question) + len(lines) + 3.5
    figure = plt.figure(figsize=(9, 0.24 * height))
    axes = figure.add_axes((0.02, 0, 0.96, 1), xlim=(0, SAMPLE_COLUMNS), ylim=(height, 0))
    axes.set_axis_off()
    style = {"family": "DejaVu Sans Mono", "fontsize": 9.3, "va": "center", "parse_math": False}

    def put(column, row, text, **more):
        # One character a time: columns stay columns, whatever the font's own advance is.
        for i, letter in enumerate(text):
            axes.text(column + i + 0.5, row + 0.5, letter, ha="center", **style, **more)

    def shade(column, row, width, gained):
        color = PASS_COLORS[min(gained, len(PASS_COLORS)) - 1]
        edge = "#bbbbbb" if gained == 1 else color
        axes.add_patch(Rectangle((column, row + 0.04), width, 0.92, facecolor=color, edgecolor=edge, linewidth=0.4))

    for row, text in enumerate(question):
        put(0, row + 0.3, text, weight="bold")
    for row, line in enumerate(lines, len(question) + 1):
        for column, text, gained in line:
            if text:
                shade(column, row, len(text), gained)
            put(column, row, text, color="white" if gained > 4 else "black")
    column = 0
    for gained in range(1, max(yields, default=1) + 1):
        label = f" {gained} a pass "
        shade(column, height - 1.4, len(label), gained)
        put(column, height - 1.4, label, color="white" if gained > 4 else "black")
        column += len(label) + 1
    figure.savefig(path, dpi=130)
    plt.close(figure)
