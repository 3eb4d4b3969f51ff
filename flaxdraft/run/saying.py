"""What a run says of its stages."""

from __future__ import annotations

from rich.text import Text

from flaxdraft.progress import CONSOLE

STAGES = ("target", "data", "train", "evaluate", "export", "report")


def say(stage: str, text: str) -> None:
    """The first line of a stage."""
    CONSOLE.print(Text.assemble((f"{STAGES.index(stage) + 1}/{len(STAGES)} {stage}", "bold"), f"  {text}"))
