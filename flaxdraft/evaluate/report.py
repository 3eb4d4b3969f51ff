"""Figures and Markdown of one run, drawn from its metrics.jsonl and evaluation.json alone."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.font_manager import findfont, get_font
from rich.text import Text

from flaxdraft.evaluate.results import own_figures
from flaxdraft.progress import CONSOLE
from flaxdraft.serving.contract import Engine

SAMPLE_COLUMNS = 96
FIRST_TOKEN = (("first pass of an answer", "first_pass"), ("later passes", "later_passes"))
FIRST_PASS = (
    "The first pass of an answer is drafted from the prompt's last token. Little accepted there, and later passes as "
    "good as ever, is what a draft gives that was trained with an unshifted loss mask (tokens and labels moved on, the "
    "mask left where it was), or on few answers."
)
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


def _curves(directory: Path, metrics: Sequence[dict[str, Any]]) -> None:
    train = [line for line in metrics if line["kind"] == "train"]
    held = [line for line in metrics if line["kind"] == "held_out"]
    axes, save = _figure(directory / "loss.png", "Loss", "optimizer step", "cross-entropy, nats a row")
    axes.plot([m["step"] for m in train], [m["loss"] for m in train], label="training", color="#9ecae1")
    axes.plot([m["step"] for m in held], [m["loss"] for m in held], "o-", label="held out", color="#08519c")
    axes.legend()
    save()
    axes, save = _figure(
        directory / "accuracy.png", "Held-out top-1 accuracy by draft position", "optimizer step", "share of rows"
    )
    num_steps = min(len(m["accuracy"]) for m in held)  # a resumed run may draft longer chains
    for j in range(num_steps):
        color = plt.get_cmap("viridis")(j / max(num_steps - 1, 1) * 0.85)
        axes.plot([m["step"] for m in held], [m["accuracy"][j] for m in held], "o-", label=f"{j + 1}", color=color)
    axes.set_ylim(0, axes.get_ylim()[1])
    axes.legend(title="position")
    save()
    axes, save = _figure(directory / "accept_length.png", "Held-out accept length", "optimizer step", "tokens a pass")
    axes.plot([m["step"] for m in held], [m["accept_length"] for m in held], "o-", color="#1b7837")
    axes.axhline(1.0, color="grey", linewidth=1, linestyle="--")
    save()


def _bars(directory: Path, decoded: dict[str, Any]) -> None:
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


def _sample(path: Path, prompt: str, pieces: Sequence[str], yields: Sequence[int]) -> None:
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
        axes.add_patch(plt.Rectangle((column, row + 0.04), width, 0.92, facecolor=color, edgecolor=edge, linewidth=0.4))

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


def _markdown(evaluation: dict[str, Any], metrics: Sequence[dict[str, Any]], facts: dict[str, str]) -> str:
    decoded, forced = evaluation["decoded"], evaluation["teacher_forced"]
    untrained = next((line["accept_length"] for line in metrics if line["kind"] == "held_out"), float("nan"))
    saved = 1 - decoded["target_passes"] / max(decoded["target_passes_alone"], 1)
    rows = [
        ("accept length, real decoding", f"{decoded['accept_length']:.3f}"),
        ("accept length, walked over the greedy answers", f"{forced['accept_length']:.3f}"),
        ("accept length before training (walked)", f"{untrained:.3f}"),
        *((name, f"{value:.3f}") for name, value in own_figures(forced, float).items()),
        (
            "target passes",
            f"{decoded['target_passes']} instead of {decoded['target_passes_alone']} ({saved:.0%} saved)",
        ),
        ("answers identical to the target's own", f"{decoded['identical_answers']} of {evaluation['answers']}"),
        (
            "answers whose walk has the decoded passes",
            f"{forced['answers_with_the_decoded_passes']} of {evaluation['answers']}",
        ),
        *(
            (f"first draft token accepted, {where}", f"{decoded['first_token_accepted'][name]:.3f}")
            for where, name in FIRST_TOKEN
        ),
        ("held-out loss", f"{forced['loss']:.3f}"),
        ("draft tokens a pass (chain)", str(evaluation["chain_length"])),
    ]
    lines = ["# Report", "", *(f"- {name}: {value}" for name, value in facts.items()), ""]
    lines += ["| figure | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows), "", FIRST_PASS, ""]
    lines += ["| draft position | " + " | ".join(str(j + 1) for j in range(len(forced["accuracy"]))) + " |"]
    lines += ["|---|" + "---|" * len(forced["accuracy"])]
    for name, values in (
        *own_figures(forced, list).items(),
        ("accepted in real decoding", decoded["acceptance_by_position"]),
    ):
        lines.append(f"| {name} | " + " | ".join(f"{value:.3f}" for value in values) + " |")
    lines += ["", "| category | accept length |", "|---|---|"]
    lines += [f"| {name} | {value:.3f} |" for name, value in decoded["accept_length_by_category"].items()]
    caption = "The held-out answer that gained most, each token coloured by how many tokens its target pass yielded:"
    lines += ["", caption, "", "![](sample.png)"]
    for name in ("accept_length", "acceptance", "accepted_lengths", "accuracy", "loss"):
        lines += ["", f"![]({name}.png)"]
    return "\n".join(lines) + "\n"


def write_report(
    directory: Path,
    evaluation: dict[str, Any],
    metrics: Sequence[dict[str, Any]],
    sample: tuple[str, Sequence[str], Sequence[int]],
    facts: dict[str, str],
) -> None:
    """report.md and its PNG figures.

    Args:
        sample: a prompt, its answer as one text a token, and the tokens that each target pass yielded.
        facts: what the run was, shown at the top.
    """
    directory.mkdir(parents=True, exist_ok=True)
    _curves(directory, metrics)
    _bars(directory, evaluation["decoded"])
    _sample(directory / "sample.png", *sample)
    _replace(directory / "report.md", _markdown(evaluation, metrics, facts))


def _guess_table(results: Sequence[dict[str, Any]]) -> list[str]:
    def row(name, value, form=".3f"):
        """A figure of every guess; empty where it has none, as a tree has no walk."""
        cells = (format(value(result), form) if value(result) is not None else "" for result in results)
        return f"| {name} | " + " | ".join(cells) + " |"

    decoded = lambda name: lambda result: result["decoded"][name]  # noqa: E731
    lines = [
        "| | " + " | ".join(result["name"] for result in results) + " |",
        "|---|" + "---|" * len(results),
        row("draft tokens a pass", lambda result: result["draft_tokens"], "d"),
        row("accept length, real decoding", decoded("accept_length")),
    ]
    if "teacher_forced" in results[0]:
        forced = lambda name: lambda result: result.get("teacher_forced", {}).get(name)  # noqa: E731
        lines += [
            row("accept length, walked over the target's greedy answers", forced("accept_length")),
            *(
                row(name, lambda result, name=name: own_figures(result.get("teacher_forced", {}), float).get(name))
                for name in own_figures(results[0]["teacher_forced"], float)
            ),
        ]
    lines += [
        row("target passes", decoded("target_passes"), "d"),
        row("tokens that they gave", decoded("target_passes_alone"), "d"),
        *(
            row(
                f"first draft token accepted, {where}",
                lambda result, name=name: decoded("first_token_accepted")(result)[name],
            )
            for where, name in FIRST_TOKEN
        ),
        row("tokens/s with the draft", lambda result: result["with_draft"]["tokens_per_second"], ".1f"),
        row("tokens/s of the target alone", lambda result: result["alone"]["tokens_per_second"], ".1f"),
        row("ratio", lambda result: result["speedup"], ".2f"),
    ]
    if "teacher_forced" in results[0]:
        lines += [
            row("answers", lambda result: result["answers"], "d"),
            row("identical to the target's own", decoded("identical_answers"), "d"),
            row("whose walk has the decoded passes", forced("answers_with_the_decoded_passes"), "d"),
        ]
    return lines


def _verdict(result: dict[str, Any]) -> str:
    """One sentence on wall time that hides nothing."""
    name, ratio, length = result["name"], result["speedup"], result["decoded"]["accept_length"]
    if ratio >= 1:
        doubt = "; that is more than the saved passes explain: too little was timed, or the machine was busy"
        return (
            f"{name}: {ratio:.2f} times as fast as the target alone, {length:.2f} tokens a target pass"
            f"{doubt if ratio > length else ''}"
        )
    return (
        f"{name}: SLOWER than the target alone ({ratio:.2f} times its speed) in spite of {length:.2f} tokens "
        "a target pass; drafting, and verifying several tokens at once, cost more here than the passes saved"
    )


def write_evaluation(directory: Path, results: Sequence[dict[str, Any]], facts: dict[str, str]) -> None:
    """report.md with its PNG figures for one or several chain lengths, and trees behind them; the figures of one are of
    the longest chain."""
    longest = max(results, key=lambda result: result["chain_length"])
    decoded = longest["decoded"]
    _bars(directory, decoded)
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
    lines = ["# Evaluation", "", *(f"- {name}: {value}" for name, value in facts.items()), ""]
    lines += [*(f"{_verdict(result)}." for result in results), "", *_guess_table(results), ""]
    lines += [
        "Tokens/s count what target passes gave over the time that they took, drafting included; prefill and "
        "compilation are left out. Every batch was decoded with and without the draft, one after the other.",
        "", FIRST_PASS, "", "| category | " + " | ".join(names) + " |",
        "|---|" + "---|" * len(names),
    ]  # fmt: skip
    for name in decoded["accept_length_by_category"]:
        values = (result["decoded"]["accept_length_by_category"][name] for result in results)
        lines.append(f"| {name} | " + " | ".join(f"{value:.3f}" for value in values) + " |")
    positions = range(longest["chain_length"])
    lines += [
        "",
        "| draft position | " + " | ".join(str(j + 1) for j in positions) + " |",
        "|---|" + "---|" * len(positions),
    ]
    for result in results:
        rates = [*map("{:.3f}".format, result["decoded"]["acceptance_by_position"])]
        cells = rates + [""] * (len(positions) - len(rates))
        lines.append(f"| accepted, {result['name']} | " + " | ".join(cells) + " |")
    for name in ("accepted_lengths", "acceptance", "chains"):
        lines += ["", f"![]({name}.png)"]
    _replace(directory / "report.md", "\n".join(lines) + "\n")


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def print_evaluation(results: Sequence[dict[str, Any]], directory: Path) -> None:
    """The end of an evaluation: what was found and where it lies."""
    for result in results:
        decoded = result["decoded"]
        CONSOLE.print(Text.assemble((f"accept length {decoded['accept_length']:.3f}", "bold"), f"  {_verdict(result)}"))
        if decoded.get("identical_answers", result["answers"]) < result["answers"]:
            CONSOLE.print(
                f"  {decoded['identical_answers']} of {result['answers']} answers are the target's own, token for "
                "token; where two tokens are nearly equal, rounding may choose either"
            )
    CONSOLE.print(f"report  {directory / 'report.md'}")


def print_headline(evaluation: dict[str, Any], export_dir: Path, report_dir: Path, target: str, engine: Engine) -> None:
    """The end of a run: what was reached, where it lies, how to serve it.

    Args:
        engine: for which the draft was exported.
    """
    decoded = evaluation["decoded"]
    saved = 1 - decoded["target_passes"] / max(decoded["target_passes_alone"], 1)
    headline = (
        f" by real decoding of {evaluation['answers']} "
        f"held-out prompts: {decoded['target_passes']} target passes instead of {decoded['target_passes_alone']} "
        f"({saved:.0%} saved), {decoded['identical_answers']} of {evaluation['answers']} answers identical to the "
        f"target's own\n"
        f"report  {report_dir / 'report.md'}\n"
        f"draft   {export_dir}\n"
    )
    if engine.serves:
        command = engine.command(export_dir, evaluation["chain_length"]).replace("\n", "\n" + 8 * " ")
        headline += f"serve   {command}\n        (TARGET: the Hugging Face directory of {target})"
    else:
        headline += (
            "serve   no command: export.engine=hf is the layout for other trainers, which no engine was asked about; "
            "for an engine's own see tools/convert/to_serving.py"
        )
    CONSOLE.print(Text.assemble((f"\naccept length {decoded['accept_length']:.2f}", "bold"), headline))
    same_passes = evaluation["teacher_forced"]["answers_with_the_decoded_passes"]
    if min(decoded["identical_answers"], same_passes) < evaluation["answers"]:
        CONSOLE.print(
            f"warning: {decoded['identical_answers']} answers are identical to the stored ones and {same_passes} walk "
            f"with the decoded passes, of {evaluation['answers']}; the answers come from another target or device"
        )
