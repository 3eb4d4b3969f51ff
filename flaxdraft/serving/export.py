"""Draft -> serving directory: safetensors and config.json as an engine's contract (flaxdraft/serving) has them.

`midlayer.*` keys without a `model.` prefix; d2t as offsets and t2d where the contract wants them; the embedding only
where the draft owns one (engines put the target's in its place otherwise). What is about to be written is held against
the contract first, and refused where the engine would not serve the trained draft.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from flax import nnx

from flaxdraft.algorithms import algorithm_of, draft_packages
from flaxdraft.algorithms.eagle3.serving import layer_ids, rules, sanity
from flaxdraft.algorithms.eagle3.serving.config_json import serving_config
from flaxdraft.algorithms.eagle3.serving.contract import Engine, find_engine
from flaxdraft.algorithms.loading import LoadedDraft, abstract_params, from_pretrained
from flaxdraft.errors import InputError
from flaxdraft.files.json_files import write_json
from flaxdraft.files.name_tables import state_to_torch
from flaxdraft.files.safetensors_file import save_safetensors
from flaxdraft.interfaces import VocabMap
from flaxdraft.plugins import find_by_architecture
from flaxdraft.serving.card import Origin, model_card
from flaxdraft.serving.finding import Finding
from flaxdraft.serving.lint import of_engine
from flaxdraft.serving.record import DraftRecord
from flaxdraft.serving.view import DraftView, read_config, view_of_arrays
from flaxdraft.train.checkpoint import DamagedError, load_params, read_record

DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}


def _refuse(engine: Engine, findings: Iterable[Finding]) -> None:
    for finding in findings:
        if finding.level != "note":
            raise InputError(f"export for {engine.title}: {finding.what}; {finding.mend}")


def check_servable(
    draft_config: Any, tap_layers: Sequence[int], target_config: Mapping[str, Any], engine: str = "sglang"
) -> None:
    """Asks before training what an export would refuse after it.

    Raises:
        InputError: the engine cannot serve a draft of this configuration; the reason is the contract's.
    """
    table = find_engine(engine)
    config = serving_config(draft_config.to_hf(), tap_layers, target_config, "float32", table)
    view = DraftView(config, {}, {}, {}.__getitem__, target_config)
    _refuse(table, (finding for rule in rules.CONFIG_RULES for finding in rule(table, view)))


def export(
    directory: Path,
    draft_module: ModuleType,
    draft_config: Any,
    params: nnx.State,
    vocab: VocabMap,
    *,
    tap_layers: Sequence[int],
    target_config: Mapping[str, Any],
    dtype: str,
    engine: str = "sglang",
    origin: Origin | None = None,
) -> None:
    """Writes the whole directory under a temporary name, then puts it in place.

    Args:
        engine: whose contract it must meet. That of SGLang serves vLLM as well, and sglang-jax for Llama drafts.
        origin: with it the directory gets a model card, README.md.

    Raises:
        InputError: a weight is not finite, or the engine could not serve such a draft.
    """
    table = find_engine(engine)
    config = serving_config(draft_config.to_hf(), tap_layers, target_config, dtype, table)
    tensors = state_to_torch(params, draft_module.name_table(draft_config), DTYPES[dtype])
    for name, array in tensors.items():
        if not np.isfinite(array.astype(np.float32)).all():
            raise InputError(f"export: {name} holds values that are not finite in {dtype}; choose another dtype")
    if vocab.draft_vocab_size < vocab.vocab_size or table.full_d2t == "required":
        tensors["d2t"], tensors["t2d"] = vocab.d2t(), vocab.t2d()
    view = view_of_arrays(config, tensors, target_config)
    _refuse(table, [*of_engine(table, view), *sanity.shapes(view), *sanity.target(view)])
    scratch = directory.with_name(directory.name + ".tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    save_safetensors(scratch / "model.safetensors", tensors, metadata={"format": "pt"})
    write_json(scratch / "config.json", config)
    if origin is not None:
        (scratch / "README.md").write_text(model_card(view, origin), encoding="utf-8")
    shutil.rmtree(directory, ignore_errors=True)
    os.replace(scratch, directory)


class DraftSource(NamedTuple):
    """A trained draft with what is known of its target, of which no weight is loaded."""

    draft: LoadedDraft
    tap_layers: Sequence[int]  # by output
    target: Mapping[str, Any]  # its config.json, as far as known
    origin: Origin


def open_draft(source: Path, *, step: str = "latest", target: Mapping[str, Any] | None = None) -> DraftSource:
    """A run's folder (its checkpoint and its record) or an exported directory.

    Args:
        step: of the checkpoint, a number, "latest" or "best" (where the run keeps a link of that name).
        target: the target's config.json, which an exported directory does not hold.

    Raises:
        InputError: neither of the two, or it is incomplete or damaged.
    """
    if (source / "checkpoints").is_dir():
        record = DraftRecord.read(source)
        module = find_by_architecture(draft_packages(), dict(record.draft), str(source))
        config = module.Config.from_hf(record.draft)
        checkpoint = _checkpoint(source / "checkpoints", step)
        try:
            params, ids = load_params(checkpoint, abstract_params(module, config))
            number = read_record(checkpoint)["step"]  # the folder may be a link's copy
        except DamagedError as error:
            raise InputError(f"{checkpoint}: cannot be read ({error}); take another one with --step") from error
        draft = LoadedDraft(algorithm_of(module, config), module, config, params, VocabMap(ids, config.vocab_size))
        return DraftSource(draft, record.tap_layers, record.target, Origin(record.target_path, source, number))
    draft, written = from_pretrained(source), read_config(source / "config.json")
    target = target or {}
    outputs = layer_ids.outputs_of(written, layer_ids.is_deepseek(target))
    if outputs is None and "num_hidden_layers" in target:
        outputs = layer_ids.default_outputs(target["num_hidden_layers"])
    if outputs is None:
        raise InputError(f"{source}: config.json names no tapped layers; give --target, whose defaults they then are")
    # What stands there for the tokenizer came from the target.
    tokens = {name: written[name] for name in written if name.endswith("_token_id")}
    return DraftSource(draft, outputs, tokens | dict(target), Origin("TARGET", None, None))


def _checkpoint(directory: Path, step: str) -> Path:
    steps = sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit())
    chosen = directory / (str(steps[-1]) if step == "latest" and steps else step)
    if not chosen.is_dir():
        raise InputError(f"{directory}: no checkpoint {step!r}; there are {', '.join(map(str, steps)) or 'none'}")
    return chosen


def export_again(source: DraftSource, directory: Path, *, engine: str, dtype: str) -> None:
    """A draft as a directory for an engine.

    Raises:
        InputError: the directory is something else, see `export` for the rest.
    """
    if directory.exists() and not (directory / "config.json").exists():
        raise InputError(f"{directory}: exists and is no draft's directory; choose another name")
    _, module, config, params, vocab = source.draft
    export(
        directory, module, config, params, vocab, tap_layers=source.tap_layers, target_config=source.target,
        dtype=dtype, engine=engine, origin=source.origin,
    )  # fmt: skip
