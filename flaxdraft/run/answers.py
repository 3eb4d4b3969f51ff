"""The stage `data`: the target answers the prompts, once for all drafts of an output directory."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from flaxdraft.data.answers import capture, is_captured, load_split, write_texts
from flaxdraft.data.documents import Answer
from flaxdraft.data.draft_vocabulary import check_size
from flaxdraft.data.prompts import Prompt, check_context, render_prompts
from flaxdraft.devices import hosts
from flaxdraft.errors import InputError
from flaxdraft.run.draft import check_draft
from flaxdraft.run.saying import say
from flaxdraft.run.setup import Setup
from flaxdraft.run.target import RunTarget
from flaxdraft.stages.claims import Stage


@dataclasses.dataclass(frozen=True, eq=False)
class Answers:
    """What the stage left on disk."""

    directory: Path
    order: dict[str, list[str]]  # ids of the prompts of each split, in the order of its rows
    stops: list[int]  # tokens that end an answer
    special: list[int]  # tokens that every draft vocabulary holds
    chunk: int  # answered at a time
    _rows: dict[str, list[Answer]] = dataclasses.field(default_factory=dict)

    def rows(self, split: str) -> list[Answer]:
        """Read once: they are wanted to the run's end, and go with it."""
        if split not in self._rows:
            self._rows[split] = load_split(self.directory, split, len(self.order[split]), self.chunk)
        return self._rows[split]


def answer_prompts(setup: Setup, target: RunTarget) -> Answers:
    """Answers and features of the splits that are asked for; what is there from the same inputs is left alone. The
    processes of a run do it together, and the first one writes.

    Raises:
        InputError: the draft could not be trained or served beside this target; a prompt is too long.
    """
    data, directory = setup.config.data, setup.data_dir
    stage = Stage(directory / "data.json", setup.answer_inputs)
    result = hosts.agree(stage.load())
    order = {} if result is None else result["order"]  # of other splits, too
    missing = [
        split for split in setup.splits
        if split not in order or not is_captured(directory, split, len(order[split]), data.rows)
    ]  # fmt: skip
    if not hosts.agree(missing):
        assert result is not None, "a run asks for some split"
        say("data", f"done before: {directory}")
        # Answers of earlier versions were ended by one token alone.
        stops = result["stops"] if "stops" in result else [result["eos"]]
        return Answers(directory, order, stops, result["special"], data.rows)
    check_draft(setup, target)
    prompts = {split: _prompts(setup, split) for split in setup.splits}
    rendered = {split: _rendered(setup, target, split, prompts[split]) for split in setup.splits}
    stops, special = target.opened.needed_stop_tokens(), target.opened.special_tokens
    if setup.start is None and setup.config.draft.vocab_map is None and not setup.algorithm.full_vocabulary:
        check_size(setup.config.draft.draft_vocab_size, special, target.config.vocab_size)
    loaded = target.loaded
    say("data", "the target answers the prompts")
    for split in setup.splits:
        _, limit = answer_limit(setup, split)
        dtype = data.feature_dtype if split == "train" else "float32"
        order[split] = capture(directory, split, loaded.model, rendered[split], stops, limit, data.rows, dtype)
    with hosts.main_first("answers"):  # the others read what it has written
        if hosts.is_main():
            for split in setup.splits:
                rows = load_split(directory, split, len(order[split]), data.rows)
                write_texts(directory / f"{split}.json", target.tokenizer, prompts[split], order[split], rows)
            stage.store({"order": order, "stops": stops, "special": special})
    return Answers(directory, order, stops, special, data.rows)


def _prompts(setup: Setup, split: str) -> list[Prompt]:
    prompts = [prompt for prompt in setup.prompts if prompt.split == split]
    if longer := [prompt for prompt in prompts if len(prompt.turns) > 1]:
        raise InputError(
            f"{setup.config.data.prompts}: prompt {longer[0].id!r} has {len(longer[0].turns)} turns; those of a run "
            "have one (python -m flaxdraft.evaluate asks several)"
        )
    count = setup.config.data.num_prompts
    if split == "held_out" or count is None:
        return prompts
    if count > len(prompts):
        raise InputError(f"data.num_prompts: found {count}, {setup.config.data.prompts} has {len(prompts)}")
    # A fixed mixture of categories, whatever the order of the file.
    order = np.random.default_rng(0).permutation(len(prompts))[:count]
    return [prompts[i] for i in sorted(order)]


def answer_limit(setup: Setup, split: str) -> tuple[str, int]:
    """The tokens that an answer of a split has at most: the field that says so, and its value."""
    if split == "train":
        return "data.max_answer_tokens", setup.config.data.max_answer_tokens
    return "evaluate.max_new_tokens", setup.config.evaluate.max_new_tokens


def _rendered(setup: Setup, target: RunTarget, split: str, prompts: list[Prompt]) -> dict[str, list[int]]:
    """
    Raises:
        InputError: a prompt is too long, or with its longest answer it would leave the target's context.
    """
    rendered = render_prompts(target.tokenizer, prompts, setup.config.data.max_prompt_tokens, target.template)
    field, limit = answer_limit(setup, split)
    longest = max(map(len, rendered.values()))
    check_context(longest, "the longest prompt", limit, field, target.config.context)
    return rendered
