"""What may differ between a run and the work that it goes on with.

Everything that the result depends on must be the same, unless the user names the field on the command line. How the
work is laid out over devices, how often something is written, and where inputs lie may change.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from flaxdraft.plugins import settings_of

# Dotted names as they stand in the inputs; `*` matches any rest.
FREE = (
    # Where the work is done: the same global batches, results that agree to rounding.
    "mesh.*", "hosts.*", "train.accumulate",
    # How often something is written, and what is kept of it.
    "train.log_every", "train.eval_every", "train.checkpoint_every", "train.keep_latest", "train.keep_every",
    "train.resume", "train.max_skipped", "train.profile", "train.wandb", "data.prefetch",
    # A run that went past it has no bad rows, or has left them out.
    "data.on_bad_row",
    # Where an input lies; what it holds is compared by its digest.
    "target.path", "target.sha256",
)  # fmt: skip
# What training reads in place of answers and makes of its rows: a draft depends on these, the target's answers to the
# prompts do not. The folder of the answers does not name them; older ones do.
NOT_OF_ANSWERS = (
    "data.store", "data.conversations", "data.max_length", "data.last_turn_only", "data.mask_reasoning",
    "data.max_silent", "data.last_batch",
)  # fmt: skip
# Fields that older runs do not name, and what they did; the last one is the newest.
OLDER = {"train.float8": False, "target.dtype": "float32"}
# target.content is the sha256 of a file, as it always was, so older runs of a .gguf file or with target.sha256 go on.
# Of a directory it once covered only the beginning of each weight file, and of a wheel without target.sha256 it was
# None. Neither tells which model it was, so what was made with these is refused with both values.


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys."""
    if not isinstance(value, Mapping):
        return {prefix: value}
    return {k: v for name, inner in value.items() for k, v in flatten(inner, f"{prefix}.{name}".lstrip(".")).items()}


def binding(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The fields (dotted) that a result depends on. An algorithm says which of its own are free."""
    name = inputs.get("algorithm", {}).get("name")
    free = (*FREE, *(f"algorithm.{field}" for field in settings_of(name).free)) if name else FREE
    return {
        field: value for field, value in flatten(inputs).items()
        if not any(fnmatch.fnmatchcase(field, pattern) for pattern in free)
    }  # fmt: skip


def as_older_runs(binding: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The binding fields of an input, then as versions before each of OLDER named them that did the same."""
    fields = dict(binding)
    yield fields
    for name, value in reversed(OLDER.items()):
        if fields.get(name, value) != value:
            return
        fields = {field: kept for field, kept in fields.items() if field != name}
        yield fields


def differing(
    there: Mapping[str, Any], here: Mapping[str, Any], allowed: Iterable[str] = ()
) -> dict[str, tuple[Any, Any]]:
    """The binding fields that differ, with both values; without those that the user allows to.

    A longer or shorter run is the same run as long as the learning rate does not depend on its length.
    """
    old, new = (OLDER | binding(json.loads(json.dumps(inputs))) for inputs in (there, here))  # as they are stored
    fields = {field for field in {*old, *new} if old.get(field) != new.get(field)} - set(allowed)
    fields -= {field for field in NOT_OF_ANSWERS if field not in new}
    if old.get("train.schedule") == new.get("train.schedule") == "constant":
        fields.discard("train.num_steps")
    return {field: (old.get(field), new.get(field)) for field in sorted(fields)}


def describe(differences: Mapping[str, tuple[Any, Any]]) -> str:
    """`field: there A, here B; ...`"""
    return "; ".join(f"{field}: there {old!r}, here {new!r}" for field, (old, new) in differences.items())


def flags(differences: Mapping[str, tuple[Any, Any]]) -> str:
    """What to add to the command of a training run to go on regardless."""
    return " ".join(f"--allow-change {field}" for field in differences)
