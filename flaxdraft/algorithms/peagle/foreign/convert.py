"""Another trainer's draft -> a directory that training, evaluation and export take."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from flaxdraft.algorithms.eagle3.foreign.configs import Trainer
from flaxdraft.algorithms.eagle3.foreign.vocabulary import order
from flaxdraft.algorithms.eagle3.serving import fields
from flaxdraft.algorithms.importing import write
from flaxdraft.algorithms.peagle.foreign.configs import claims as claims
from flaxdraft.algorithms.peagle.foreign.configs import trainer_of, understand
from flaxdraft.algorithms.peagle.foreign.names import layout_of
from flaxdraft.algorithms.peagle.serving.sanity import malformed
from flaxdraft.algorithms.peagle.serving.tensors import MASK_STATE
from flaxdraft.errors import InputError
from flaxdraft.files.draft_directory import check_replaceable
from flaxdraft.serving import rope_fields
from flaxdraft.serving.foreign.layers import check_types
from flaxdraft.serving.foreign.names import rename
from flaxdraft.serving.foreign.report import Options, Report
from flaxdraft.serving.sanity import MARK


def convert(
    tensors: Mapping[str, np.ndarray], config: Mapping[str, Any], out: Path, origin: str, options: Options = Options(),  # noqa: B008 (immutable)
    *, has_training_state: bool = False,
) -> Report:  # fmt: skip
    """As EAGLE-3's `convert`."""
    check_replaceable(out)
    if options.recurrence is not None:
        raise InputError("--recurrence: a draft that proposes in one pass feeds no state back; leave it out")
    trainer = cast(Trainer | None, options.trainer) or trainer_of(config, has_training_state)
    check_types(config, fields.malformed, origin)
    written, remarks = understand(config, origin)
    if wrong := malformed(written):
        raise InputError(f"{origin}: config.json: {'; '.join(wrong)}")
    if options.rope_theta is not None:
        rope_fields.set_theta(written, options.rope_theta)
    named, rows = rename(tensors, layout_of(written), origin)
    if (state := named.get(MASK_STATE)) is not None:
        named[MASK_STATE] = state.reshape(1, 1, -1)  # with more axes of size 1 or fewer
    order(named, written, options.table, remarks, origin)
    write(out, named, written | {MARK: trainer or "unknown"}, origin)
    return Report(trainer, rows, remarks)
