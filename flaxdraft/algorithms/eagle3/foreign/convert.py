"""Another trainer's draft -> a directory that training, evaluation and export take."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from flaxdraft.algorithms.eagle3.foreign.configs import Trainer, trainer_of, understand
from flaxdraft.algorithms.eagle3.foreign.names import layout_of
from flaxdraft.algorithms.eagle3.foreign.vocabulary import order
from flaxdraft.algorithms.eagle3.serving.fields import malformed, sizeless
from flaxdraft.algorithms.eagle3.serving.kinds import kind_of
from flaxdraft.algorithms.eagle3.serving.tensors import ATTENTION
from flaxdraft.algorithms.importing import write
from flaxdraft.errors import InputError
from flaxdraft.files.draft_directory import check_replaceable
from flaxdraft.serving import rope_fields
from flaxdraft.serving.foreign.layers import check_types
from flaxdraft.serving.foreign.names import rename
from flaxdraft.serving.foreign.report import Options, Report
from flaxdraft.serving.sanity import MARK


def claims(config: Mapping[str, Any]) -> bool:
    """This is the default algorithm, which takes what no other one claims."""
    return False


def convert(
    tensors: Mapping[str, np.ndarray], config: Mapping[str, Any], out: Path, origin: str, options: Options = Options(),  # noqa: B008 (immutable)
    *, has_training_state: bool = False,
) -> Report:  # fmt: skip
    """
    Args:
        tensors: of the draft, d2t and t2d among them.
        config: its config.json.
        has_training_state: it came out of SpecForge's training_state.pt.

    Raises:
        InputError: see `understand`, `rename` and `order`; or the weights do not make a draft.
    """
    check_replaceable(out)
    check_types(config, malformed, origin)
    trainer = cast(Trainer | None, options.trainer) or trainer_of(config, has_training_state)
    understood = understand(config, trainer, options.recurrence, origin)
    written, remarks = understood.config, understood.remarks
    if wrong := sizeless(written):
        raise InputError(f"{origin}: config.json: {'; '.join(wrong)}")
    if options.rope_theta is not None:
        rope_fields.set_theta(written, options.rope_theta)
    named, rows = rename(tensors, layout_of(written), origin)
    order(named, written, options.table, remarks, origin)
    kind = kind_of(written)
    if trainer == "nemo" and kind.name == "mla":
        _fold_mscale(named, written, remarks)
    written |= {
        "architectures": [kind.architecture], "model_type": kind.model_type, "tie_word_embeddings": False,
        MARK: trainer or "unknown",
    }  # fmt: skip
    write(out, named, written, origin)
    return Report(trainer, rows, remarks)


def _fold_mscale(named: dict[str, np.ndarray], config: dict[str, Any], remarks: list[str]) -> None:
    """NeMo leaves YaRN's factors out of its MLA draft: the one on cos and sin, and the square on the softmax scale.
    With both mscales equal the first is 1 for engines too; the queries are divided by the second. In place."""
    rope = rope_fields.parameters(config)
    if rope["rope_type"] != "yarn":
        return
    for dialect in ("rope_parameters", "rope_scaling"):
        if config.get(dialect):
            config[dialect] = {**config[dialect], "mscale": 1.0, "mscale_all_dim": 1.0}
    squared = (0.1 * math.log(rope["factor"]) + 1.0) ** 2
    name = next(ATTENTION + p for p in ("q_b_proj.weight", "q_proj.weight") if ATTENTION + p in named)
    named[name] = named[name].astype(np.float32) / np.float32(squared)
    remarks.append(
        f"{name} divided by {squared:.4f}: NeMo leaves YaRN's mscale squared out of the softmax scale, engines apply it"
    )
