"""P-EAGLE's exports: the contract of flaxdraft/serving/contract.py, where these functions are described.

An export holds SpecForge's names, `layers.0.*` and so on, without a `model.` prefix; `mask_hidden`; the embedding,
which is trained; d2t as offsets and t2d where the engine wants them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flaxdraft.algorithms.eagle3.serving import contract as sequential
from flaxdraft.algorithms.eagle3.serving.config_json import config_json as config_json
from flaxdraft.algorithms.eagle3.serving.contract import tables as tables
from flaxdraft.algorithms.eagle3.serving.contract import tap_layers_of as tap_layers_of
from flaxdraft.algorithms.eagle3.serving.kinds import View
from flaxdraft.algorithms.peagle.drafts.llama import SERVING
from flaxdraft.algorithms.peagle.serving import rules, sanity
from flaxdraft.algorithms.peagle.serving import tensors as layout
from flaxdraft.algorithms.peagle.serving.terms import Engine
from flaxdraft.interfaces import VocabMap
from flaxdraft.serving.contract import tables_in
from flaxdraft.serving.finding import Finding, few
from flaxdraft.serving.sanity import foreign_form
from flaxdraft.serving.view import DraftView

title: str = "P-EAGLE"
tags: Sequence[str] = ("p-eagle", "eagle3", "speculative-decoding")


def engines() -> Mapping[str, Engine]:
    return tables_in("flaxdraft.algorithms.peagle.serving.engines")


def flat_name(key: str) -> str | None:
    name = layout.flat_name(key)
    return None if layout.BUFFERS.search(name) else name


def take_vocab(tensors: dict[str, np.ndarray], config: Any, origin: str) -> VocabMap:
    """See the contract and EAGLE-3's; trainers write the mask state with more axes of size 1 or fewer."""
    if (state := tensors.get(layout.MASK_STATE)) is not None:
        tensors[layout.MASK_STATE] = state.reshape(1, 1, -1)
    return sequential.take_vocab(tensors, config, origin)


def _known(view: DraftView) -> View:
    return View.of(view, SERVING)


def unreadable(view: DraftView) -> list[Finding]:
    if found := foreign_form(view):
        return found
    bad = sanity.malformed(view.config)
    return [Finding("refused", f"config.json: {few(bad)}", "write it again")] if bad else []


def of_directory(view: DraftView) -> list[Finding]:
    return sanity.of_directory(_known(view))


def of_sizes(view: DraftView) -> list[Finding]:
    return sanity.of_sizes(_known(view))


def of_config(engine: Engine, view: DraftView) -> list[Finding]:
    return rules.of_config(engine, _known(view))


def of_tensors(engine: Engine, view: DraftView) -> list[Finding]:
    return rules.of_tensors(engine, _known(view))


def describe(config: Mapping[str, Any]) -> str:
    layers = config["num_hidden_layers"]
    return f"P-EAGLE, {layers} Llama layer{'s' * (layers > 1)} of width {config['hidden_size']}, all tokens in one pass"


def describe_training(settings: Mapping[str, Any]) -> str:
    return f"{settings['num_depths']} depths, {settings['objective']}"
