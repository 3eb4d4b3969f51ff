"""Another trainer's draft -> a directory that training, evaluation and export take."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from flaxdraft.algorithms.eagle3.foreign import vocabulary
from flaxdraft.algorithms.eagle3.foreign.configs import Trainer, trainer_of, understand
from flaxdraft.algorithms.eagle3.foreign.names import Row, rename
from flaxdraft.algorithms.eagle3.serving.fields import malformed, sizeless
from flaxdraft.algorithms.eagle3.serving.kinds import kind_of
from flaxdraft.algorithms.eagle3.serving.tensors import ATTENTION, sizes
from flaxdraft.algorithms.loading import from_pretrained
from flaxdraft.errors import InputError
from flaxdraft.files.draft_directory import check_replaceable, written_whole
from flaxdraft.files.json_files import write_json
from flaxdraft.files.safetensors_file import save_safetensors
from flaxdraft.interfaces import VocabMap
from flaxdraft.serving import rope_fields


class Options(NamedTuple):
    """What the user knows and the files do not say."""

    trainer: Trainer | None = None
    d2t: vocabulary.Meaning | None = None
    recurrence: Literal["pre-norm", "post-norm"] | None = None
    rope_theta: float | None = None


class Report(NamedTuple):
    """What was made of the source."""

    trainer: Trainer | None
    rows: list[Row]
    remarks: list[str]


def convert(
    tensors: Mapping[str, np.ndarray], config: Mapping[str, Any], out: Path, origin: str, options: Options = Options(),  # noqa: B008 (immutable)
    *, has_training_state: bool = False,
) -> Report:  # fmt: skip
    """Writes `out` under a temporary name, reads it back as a draft, then puts it in place.

    Args:
        tensors: of the draft, d2t and t2d among them.
        config: its config.json.
        has_training_state: it came out of SpecForge's training_state.pt.

    Raises:
        InputError: see `understand`, `rename` and `target_ids`; or the weights do not make a draft.
    """
    check_replaceable(out)
    nested = config.get("transformer_layer_config")
    if wrong := [*malformed(config), *(malformed(nested) if isinstance(nested, dict) else ())]:
        raise InputError(f"{origin}: config.json: {'; '.join(wrong)}")
    trainer = options.trainer or trainer_of(config, has_training_state)
    understood = understand(config, trainer, options.recurrence, origin)
    written, remarks = understood.config, understood.remarks
    if wrong := sizeless(written):
        raise InputError(f"{origin}: config.json: {'; '.join(wrong)}")
    if options.rope_theta is not None:
        _set_theta(written, options.rope_theta)
    named, rows = rename(tensors, written, origin)
    _order(named, written, options.d2t, remarks, origin)
    kind = kind_of(written)
    if trainer == "nemo" and kind.name == "mla":
        _fold_mscale(named, written, remarks)
    written |= {
        "architectures": [kind.architecture], "model_type": kind.model_type, "tie_word_embeddings": False,
        "draft_trainer": trainer or "unknown",
    }  # fmt: skip
    with written_whole(out) as scratch:
        weights = {name: np.ascontiguousarray(array) for name, array in named.items()}
        save_safetensors(scratch / "model.safetensors", weights, metadata={"format": "pt"})
        write_json(scratch / "config.json", written)
        try:
            from_pretrained(scratch)
        except InputError as error:
            raise InputError(str(error).replace(str(scratch), origin)) from error
    return Report(trainer, rows, remarks)


def _set_theta(config: dict[str, Any], theta: float) -> None:
    config["rope_theta"] = theta
    for dialect in ("rope_parameters", "rope_scaling"):
        if isinstance(config.get(dialect), dict):
            config[dialect] = {**config[dialect], "rope_theta": theta}


def _order(named: dict[str, np.ndarray], config: dict[str, Any], meaning, remarks: list[str], origin: str) -> None:
    """d2t as offsets to ascending ids, the head's rows in that order, in place; no tables for a whole vocabulary."""
    d2t, t2d = named.pop("d2t", None), named.pop("t2d", None)
    head = named.get("lm_head.weight")
    if head is None:
        raise InputError(f"{origin}: no lm_head.weight; a draft without its own head cannot be trained further")
    _, _, vocab_size, draft_vocab_size = sizes(config)
    if head.shape[0] != draft_vocab_size:
        raise InputError(f"{origin}: lm_head.weight has {head.shape[0]} rows, config.json says draft_vocab_size "
                         f"{draft_vocab_size} of {vocab_size}; correct config.json")  # fmt: skip
    config["draft_vocab_size"] = draft_vocab_size
    if d2t is None:
        if draft_vocab_size < vocab_size:
            raise InputError(f"{origin}: no d2t for {draft_vocab_size} of {vocab_size} tokens; put the trainer's into "
                             "the directory (vocab_mapping.pt or d2t.npy)")  # fmt: skip
        return
    if d2t.shape != (draft_vocab_size,) or (t2d is not None and t2d.shape != (vocab_size,)):
        found = [None if table is None else table.shape for table in (d2t, t2d)]
        raise InputError(f"{origin}: d2t and t2d have shapes {found[0]} and {found[1]}, expected "
                         f"{(draft_vocab_size,)} and {(vocab_size,)}")  # fmt: skip
    ids, found = vocabulary.target_ids(d2t, t2d, vocab_size, meaning, origin)
    if found == "ids":
        remarks.append("d2t held target ids; offsets are written")
    order = np.argsort(ids)
    if not np.array_equal(order, np.arange(draft_vocab_size)):
        remarks.append("target ids did not ascend; lm_head's rows were sorted along with them")
        named["lm_head.weight"], ids = head[order], ids[order]
    if draft_vocab_size < vocab_size:
        vocab = VocabMap(ids, vocab_size)
        named |= {"d2t": vocab.d2t(), "t2d": vocab.t2d()}


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
