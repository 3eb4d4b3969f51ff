"""Another trainer's draft -> a directory that training, evaluation and export take."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flaxdraft.algorithms.dflash.foreign.configs import claims as claims
from flaxdraft.algorithms.dflash.foreign.configs import understand
from flaxdraft.algorithms.dflash.foreign.family import OF_DFLASH, Family
from flaxdraft.algorithms.dflash.foreign.names import layout_of
from flaxdraft.algorithms.dflash.serving.fields import malformed
from flaxdraft.algorithms.dflash.serving.sanity import unreadable
from flaxdraft.algorithms.dflash.serving.tensors import is_reduced
from flaxdraft.algorithms.importing import write
from flaxdraft.errors import InputError
from flaxdraft.files.draft_directory import check_replaceable
from flaxdraft.serving import rope_fields, vocabulary_tables
from flaxdraft.serving.foreign.layers import FORM, check_types
from flaxdraft.serving.foreign.names import rename
from flaxdraft.serving.foreign.report import Options, Report
from flaxdraft.serving.foreign.vocabulary import known_tokens
from flaxdraft.serving.sanity import MARK
from flaxdraft.serving.view import view_of_arrays


def convert(
    tensors: Mapping[str, np.ndarray], config: Mapping[str, Any], out: Path, origin: str, options: Options = Options(),  # noqa: B008 (immutable)
    *, has_training_state: bool = False, family: Family = OF_DFLASH,
) -> Report:  # fmt: skip
    """
    Args:
        tensors: of the draft, the tables of a reduced vocabulary among them.
        config: its config.json.
        has_training_state: it came out of SpecForge's training_state.pt.
        family: the algorithm's.

    Raises:
        InputError: see `understand`, `rename` and `known_tokens`; or the weights do not make a draft.
    """
    check_replaceable(out)
    if options.recurrence is not None:
        raise InputError("--recurrence: a draft of blocks feeds no state back; leave it out")
    check_types(config, malformed, origin)
    written, remarks = understand(config, origin, family)
    view = view_of_arrays(written, tensors, None)
    if found := unreadable(view, family.kind) or [one for rule in family.kind.rules for one in rule(view)]:
        raise InputError(f"{origin}: {found[0].what}")
    if options.rope_theta is not None:
        rope_fields.set_theta(written, options.rope_theta)
    named, rows = rename(tensors, layout_of(written, family), origin)
    if is_reduced(written):
        _check_reduced(written, family, origin)
        remarks += _order(named, written, options, origin)
    trainer = options.trainer or ("speculators" if FORM in config else "specforge" if has_training_state else None)
    write(out, named, written | {MARK: trainer or "unknown"}, origin)
    return Report(trainer, rows, remarks)


def _check_reduced(config: Mapping[str, Any], family: Family, origin: str) -> None:
    if (why := family.sizes.whole_vocabulary) is not None:
        raise InputError(f"{origin}: draft_vocab_size is {config['draft_vocab_size']} of {config['vocab_size']}, "
                         f"expected all: {why}")  # fmt: skip


def _order(named: dict[str, np.ndarray], config: Mapping[str, Any], options: Options, origin: str) -> list[str]:
    """Sorts the draft's tokens by their target ids, in place: the tables become offsets, the head's rows move along.

    Returns:
        Remarks for the report.

    Raises:
        InputError: the draft brings no table, or no head of its own.
    """
    sizes = config["draft_vocab_size"], config["vocab_size"]
    offsets, mask = (named.pop(name, None) for name in vocabulary_tables.TABLES)
    if offsets is None:
        raise InputError(f"{origin}: no d2t for {sizes[0]} of {sizes[1]} tokens; put the trainer's into the directory "
                         "(d2t.npy)")  # fmt: skip
    if (head := named.get("lm_head.weight")) is None or len(head) != sizes[0]:
        found = "no lm_head.weight" if head is None else f"lm_head.weight has {len(head)} rows"
        raise InputError(f"{origin}: {found}, expected the {sizes[0]} rows of the tokens that the draft knows")
    known = known_tokens(offsets, mask, *sizes, options.table, origin)
    named["lm_head.weight"] = head[known.order]
    named |= known.vocab.tables()
    return known.remarks
