"""What an evaluation found, as Markdown with pictures and on the console: of a run's end and of the evaluate command.

What there are no data for is left out: training that was not watched, a walk over sampled answers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.text import Text

from flaxdraft.evaluate.differences import LIMIT
from flaxdraft.evaluate.figures import draw_acceptance, draw_guesses, draw_sample, draw_training
from flaxdraft.evaluate.results import own_figures
from flaxdraft.progress import CONSOLE
from flaxdraft.serving.card import TEMPLATE
from flaxdraft.serving.contract import Engine

# Title, where the figure lies in a result, and how it is written.
_FIGURES = (
    ("draft tokens a pass", ("draft_tokens",), "d"),
    ("accept length, real decoding", ("decoded", "accept_length"), ".3f"),
    ("accept length, walked over the target's greedy answers", ("teacher_forced", "accept_length"), ".3f"),
    ("loss over these answers", ("teacher_forced", "loss"), ".3f"),
)
_PASSES = (
    ("target passes", ("decoded", "target_passes"), "d"),
    ("tokens that they gave", ("decoded", "target_passes_alone"), "d"),
    ("first draft token accepted, first pass of an answer", ("decoded", "first_token_accepted", "first_pass"), ".3f"),
    ("first draft token accepted, later passes", ("decoded", "first_token_accepted", "later_passes"), ".3f"),
    ("tokens/s with the draft", ("with_draft", "tokens_per_second"), ".1f"),
    ("tokens/s of the target alone", ("alone", "tokens_per_second"), ".1f"),
    ("ratio", ("speedup",), ".2f"),
    ("answers", ("answers",), "d"),
    ("identical to the target's own", ("decoded", "identical_answers"), "d"),
    ("whose walk has the decoded passes", ("teacher_forced", "answers_with_the_decoded_passes"), "d"),
)
_SPEED = (
    "Tokens/s count what target passes gave over the time that they took, drafting included; prefill and compilation "
    "are left out. Every batch was decoded with and without the draft, one after the other."
)
_FIRST_PASS = (
    "The first pass of an answer is drafted from the prompt's last token. Little accepted there, and later passes as "
    "good as ever, is what a draft gives that was trained with an unshifted loss mask (tokens and labels moved on, the "
    "mask left where it was), or on few answers."
)
_PARTED = (
    "Greedy answers with a draft should be the target's own. These differ, from the token shown on; its logit stands "
    "behind it. Distance is how far the lower of the two logits lies below the highest. Rounding is how far the logits "
    "of this text are apart (root mean square) when the target computes them in two ways. Both are in units of the "
    "last place of the highest logit, in the precision that decoded. A distance of up to "
    f"{LIMIT} times the rounding, or {LIMIT} units where rounding is less than one, is a near tie: either token may be "
    "chosen. Later turns of these conversations answer other texts and are not judged."
)
_SAMPLE = (
    "The answer for which the draft saved the most target passes, each token coloured by how many tokens its target "
    "pass yielded:"
)


class Sample(NamedTuple):
    """An answer with a draft."""

    prompt: str
    pieces: Sequence[str]  # its text, token by token
    yields: Sequence[int]  # tokens of each target pass


def write_report(
    directory: Path,
    facts: Mapping[str, str],
    results: Sequence[dict[str, Any]],
    metrics: Sequence[dict[str, Any]] = (),
    sample: Sample | None = None,
) -> None:
    """report.md with its PNG figures.

    Args:
        facts: what was evaluated, shown at the top.
        results: of one or several guesses, see `guess_results`; pictures of one are of that with the longest chain.
        metrics: of training.
    """
    directory.mkdir(parents=True, exist_ok=True)
    lines = ["# Report", "", *(f"- {name}: {value}" for name, value in facts.items()), ""]
    lines += [*(f"{_verdict(result)}." for result in results), "", *_figures(results), "", _SPEED, "", _FIRST_PASS]
    lines += ["", *_categories(results), "", *_positions(results), *_parted(results)]
    if sample is not None:
        draw_sample(directory / "sample.png", *sample)
        lines += ["", _SAMPLE, "", "![](sample.png)"]
    longest = max(results, key=lambda result: result["chain_length"])
    pictures = draw_acceptance(directory, longest["decoded"])
    if len(results) > 1:
        pictures += draw_guesses(directory, results)
    if metrics:
        pictures += draw_training(directory, metrics)
    for name in pictures:
        lines += ["", f"![]({name}.png)"]
    temporary = directory / "report.md.tmp"
    temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    os.replace(temporary, directory / "report.md")


def _table(head: Iterable[str], rows: Iterable[tuple[str, Iterable[str]]]) -> list[str]:
    head = [*head]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---|" * (len(head) - 1)]
    return lines + [f"| {name} | " + " | ".join(cells) + " |" for name, cells in rows]


def _figures(results: Sequence[dict[str, Any]]) -> list[str]:
    """A column for each guess; empty where it lacks a figure, as a tree has no walk."""
    rows = []

    def add(title: str, values: list[Any], form: str) -> None:
        if any(value is not None for value in values):
            rows.append((title, ["" if value is None else format(value, form) for value in values]))

    def found(result: Any, path: Sequence[str]) -> Any:
        for name in path:
            result = result.get(name, {})
        return None if result == {} else result

    walked = [own_figures(result.get("teacher_forced", {}), float) for result in results]
    for title, path, form in _FIGURES:
        add(title, [found(result, path) for result in results], form)
    for title in walked[0]:
        add(title, [own.get(title) for own in walked], ".3f")
    for title, path, form in _PASSES:
        add(title, [found(result, path) for result in results], form)
    return _table(["", *(result["name"] for result in results)], rows)


def _categories(results: Sequence[dict[str, Any]]) -> list[str]:
    by_category = [result["decoded"]["accept_length_by_category"] for result in results]
    rows = ((name, [f"{one[name]:.3f}" for one in by_category]) for name in by_category[0])
    return _table(["category", *(f"accept length, {result['name']}" for result in results)], rows)


def _positions(results: Sequence[dict[str, Any]]) -> list[str]:
    """What there is of each draft position."""
    rows = [
        (f"{title}, {result['name']}", values)
        for result in results
        for title, values in {
            "accepted": result["decoded"]["acceptance_by_position"],
            **own_figures(result.get("teacher_forced", {}), list),
        }.items()
    ]
    most = max(len(values) for _, values in rows)
    padded = ((title, [*map("{:.3f}".format, values), *[""] * (most - len(values))]) for title, values in rows)
    return _table(["draft position", *(str(j + 1) for j in range(most))], padded)


def _parted(results: Sequence[dict[str, Any]]) -> list[str]:
    """Where answers are not the target's own; nothing where all are."""
    rows = [
        (result["name"], [
            f"{one['question']}, turn {one['turn'] + 1}", str(one["position"] + 1), _choice(one["own"]),
            _choice(one["drafted"]), f"{one['distance']:.1f}", f"{one['rounding']:.1f}",
            "near tie" if one["near_tie"] else "**wrong**",
        ])
        for result in results for one in result["decoded"].get("differences", ())
    ]  # fmt: skip
    head = ("", "prompt", "token", "the target's own", "with the draft", "distance", "rounding", "")
    return ["", _PARTED, "", *_table(head, rows)] if rows else []


def _choice(choice: dict[str, Any] | None) -> str:
    """As a cell of a table."""
    if choice is None:
        return "the end"
    text = repr(choice["text"]).replace("|", r"\|").replace("`", "'")
    return f"`{text}` ({choice['logit']:.4f})"


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


def _warn(result: dict[str, Any]) -> None:
    """Where greedy answers are not what they could be."""
    num = result["answers"]
    same = result["decoded"].get("identical_answers", num)
    ties = sum(one["near_tie"] for one in result["decoded"].get("differences", ()))
    walked = result.get("teacher_forced", {}).get("answers_with_the_decoded_passes", num)
    if min(same, walked) < num:
        CONSOLE.print(
            f"warning: of {num} answers {same} are the target's own, token for token ({ties} part from it where two "
            f"tokens are nearly equal, so that rounding chooses), and {walked} walk with the decoded passes"
        )


def print_evaluation(results: Sequence[dict[str, Any]], directory: Path) -> None:
    """The end of an evaluation: what was found and where it lies."""
    for result in results:
        length = result["decoded"]["accept_length"]
        CONSOLE.print(Text.assemble((f"accept length {length:.3f}", "bold"), f"  {_verdict(result)}"))
        _warn(result)
    CONSOLE.print(f"report  {directory / 'report.md'}")


def print_headline(
    evaluation: dict[str, Any], export_dir: Path, report_dir: Path, target: str, engine: Engine,
    template: Mapping[str, Any],
) -> None:  # fmt: skip
    """The end of a run: what was reached, where it lies, how to serve it.

    Args:
        engine: for which the draft was exported.
        template: arguments of the chat template, with which the draft was trained.
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
        if template:
            headline += f'\n        with "{TEMPLATE}": {json.dumps(template)} in every request, as it was trained'
    else:
        headline += (
            "serve   no command: export.engine=hf is the layout for other trainers, which no engine was asked about; "
            "for an engine's own see tools/convert/to_serving.py"
        )
    CONSOLE.print(Text.assemble((f"\naccept length {decoded['accept_length']:.2f}", "bold"), headline))
    _warn(evaluation)
