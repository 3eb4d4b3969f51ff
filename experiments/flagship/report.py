"""results.md and flagship.png from what the stages left."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLORS = {"llama": "#1f77b4", "mla": "#d95f02"}


class Draft(NamedTuple):
    """One trained draft."""

    name: str
    evaluation: dict[str, Any] | None  # results.json of `python -m flaxdraft.evaluate`; None before that
    metrics: list[dict[str, Any]]  # of its training
    plan: dict[str, Any]  # how the number of steps was found
    inputs: dict[str, Any]  # its configuration

    def lines(self, kind: str) -> list[dict[str, Any]]:
        return [line for line in self.metrics if line["kind"] == kind]

    @property
    def chains(self) -> list[dict[str, Any]]:
        return sorted(self.evaluation["chains"], key=lambda chain: chain["chain_length"])

    @property
    def tokens(self) -> int:
        """Trained on, every epoch counted."""
        return self.lines("train")[-1]["tokens"]

    def speed(self) -> tuple[float, float]:
        """Tokens/s and share of the time spent waiting for data, of the training's middle half."""
        rows = self.lines("train")
        middle = rows[len(rows) // 4 : -(len(rows) // 4) or None]
        mean = lambda name: sum(row[name] for row in middle) / len(middle)  # noqa: E731
        return mean("tokens_per_second"), mean("data_wait")

    def by_tokens(self) -> tuple[list[float], list[float]]:
        """Millions of tokens seen, and the held-out accept length there."""
        rows, held = self.lines("train"), self.lines("held_out")
        per_step = self.tokens / rows[-1]["step"]
        return [line["step"] * per_step / 1e6 for line in held], [line["accept_length"] for line in held]


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows] + [""]


def _accept_table(drafts: Sequence[Draft]) -> list[str]:
    head = ["chain", *(f"{draft.name}: accept length | target passes | identical answers" for draft in drafts)]
    head = " | ".join(head).split(" | ")
    rows = []
    for chains in zip(*(draft.chains for draft in drafts), strict=True):
        row: list[object] = [chains[0]["chain_length"]]
        for chain in chains:
            decoded = chain["decoded"]
            passes = f"{decoded['target_passes']} of {decoded['target_passes_alone']}"
            identical = f"{decoded['identical_answers']} of {chain['answers']}"
            row += [f"{decoded['accept_length']:.2f}", passes, identical]
        rows.append(row)
    return table(head, rows)


def _by_position(drafts: Sequence[Draft]) -> list[str]:
    rows = [
        [draft.name, *(f"{share:.2f}" for share in draft.chains[-1]["decoded"]["acceptance_by_position"])]
        for draft in drafts
    ]
    return table(["draft", *(str(i + 1) for i in range(len(rows[0]) - 1))], rows)


def _by_category(drafts: Sequence[Draft]) -> list[str]:
    found = [draft.chains[-1]["decoded"]["accept_length_by_category"] for draft in drafts]
    rows = [[name, *(f"{one[name]:.2f}" for one in found)] for name in found[0]]
    return table(["category", *(draft.name for draft in drafts)], rows)


def _training(drafts: Sequence[Draft], data: dict[str, Any]) -> list[str]:
    rows = []
    for draft in drafts:
        speed, wait = draft.speed()
        train = draft.inputs["train"]
        seconds = draft.tokens / speed
        rows.append([
            draft.name, train["num_steps"], f"{draft.tokens / 1e6:.1f} M", f"{draft.tokens / data['tokens']:.1f}",
            f"{speed:,.0f}", f"{wait:.1%}", f"{seconds / 60:.1f}",
        ])  # fmt: skip
    head = ["draft", "steps", "tokens", "epochs", "tokens/s", "waiting for data", "minutes of steps"]
    return table(head, rows)


def _plot(path: Path, drafts: Sequence[Draft], decoded: bool) -> None:
    figure, panels = plt.subplots(1, 3 if decoded else 1, figsize=(15 if decoded else 6, 4.2), layout="constrained")
    panels = list(panels) if decoded else [panels]
    for draft in drafts:
        panels[-1].plot(*draft.by_tokens(), "o-", color=COLORS[draft.name], label=draft.name)
    panels[-1].set(
        title="Accept length over training (walked)", xlabel="million tokens trained on", ylabel="tokens a target pass"
    )
    if decoded:
        _plot_decoded(*panels[:2], drafts)
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _plot_decoded(left: Any, right: Any, drafts: Sequence[Draft]) -> None:
    for draft in drafts:
        how, chains = {"color": COLORS[draft.name], "label": draft.name}, draft.chains
        lengths = [chain["chain_length"] for chain in chains]
        left.plot(lengths, [chain["decoded"]["accept_length"] for chain in chains], "o-", **how)
        shares = chains[-1]["decoded"]["acceptance_by_position"]
        right.plot(range(1, len(shares) + 1), shares, "o-", **how)
    left.set(title="Accept length, real decoding", xlabel="draft tokens a target pass", ylabel="tokens a target pass")
    right.set(title="Draft tokens accepted, by position", xlabel="position in the chain", ylabel="share of passes")
    right.set_ylim(0, 1)


def _decoded(drafts: Sequence[Draft]) -> list[str]:
    facts, chain = drafts[0].evaluation["facts"], drafts[0].chains[-1]["chain_length"]
    return [
        f"Held-out prompts ({facts['prompts']}), decoded for real on {facts['devices']}: {facts['decoding']}. Accept "
        "length is (generated tokens - 1) / target passes; without a draft it is 1.",
        "",
        *_accept_table(drafts),
        f"Share of passes that accepted the draft token at each position, chain of {chain}:",
        "",
        *_by_position(drafts),
        "Accept length by category, the same chain:",
        "",
        *_by_category(drafts),
    ]


def _walked(drafts: Sequence[Draft]) -> list[str]:
    rows = []
    for draft in drafts:
        held = draft.lines("held_out")[-1]
        rows.append([draft.name, f"{held['accept_length']:.2f}", *(f"{share:.2f}" for share in held["accuracy"])])
    steps = [str(i + 1) for i in range(len(rows[0]) - 2)]
    return [
        "Held-out prompts, the target's own answers walked with teacher forcing in the precision of training (real "
        "decoding has not been run yet): accept length and accuracy by unroll step.",
        "",
        *table(["draft", "accept length", *steps], rows),
    ]


def write(directory: Path, drafts: Sequence[Draft], data: dict[str, Any], note: str | None) -> None:
    """Both files; without the decoded figures where a draft has none."""
    decoded = all(draft.evaluation is not None for draft in drafts)
    sizes = ", ".join(f"{size} {share:.1%}" for size, share in data["coverage"].items())
    text = [
        "# Flagship: SmolLM2-135M-Instruct, its own answers, one GPU",
        "",
        "![accept length](flagship.png)",
        "",
        *([note, ""] if note else []),
        *(_decoded(drafts) if decoded else _walked(drafts)),
        "## Data",
        "",
        f"{data['answers']:,} greedy answers of the target, {data['answer_tokens']:,} tokens of its own (median "
        f"{data['median_answer']:.0f} an answer, {data['cut_at_limit']:,} cut at the limit; with prompts "
        f"{data['tokens']:,}), made at {data['tokens_per_second']:,.0f} tokens/s in {data['seconds']:.0f} s. Prompts: "
        f"the project's training prompts and {data['prompts_asked']:,} that the target was asked to write "
        f"({data['prompt_tokens']:,} tokens in {data['prompt_seconds']:.0f} s), without copies and without any that "
        "resembles a held-out one.",
        "",
        f"Share of the answers' tokens that a draft vocabulary holds: {sizes}. Taken: {data['draft_vocab_size']}.",
        "",
        "## Training",
        "",
        "The target reads the packed answers while the draft trains (`data.conversations`); nothing is stored.",
        "",
        *_training(drafts, data),
        "Commands and settings: `run.py`, `flagship.yaml`.",
        "",
    ]  # fmt: skip
    (directory / "results.md").write_text("\n".join(text), encoding="utf-8")
    _plot(directory / "flagship.png", drafts, decoded)
