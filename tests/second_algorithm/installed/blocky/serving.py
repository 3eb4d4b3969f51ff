"""Its exports: the contract of flaxdraft/serving/contract.py, where these functions are described.

No engine serves such drafts: a directory is for flaxdraft itself and for other trainers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from flaxdraft.interfaces import VocabMap
from flaxdraft.serving.contract import Engine
from flaxdraft.serving.finding import Finding
from flaxdraft.serving.trained_draft import AboutTarget
from flaxdraft.serving.view import DraftView

title = "Blocky"
tags = ("blocky", "speculative-decoding")

TAPS = "target_layer_ids"  # by output
SIZES = ("hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers", "num_taps", "block_size")


def engines() -> Mapping[str, Engine]:
    return {"hf": Engine(title="Hugging Face layout", serve=None)}


def config_json(draft: Mapping[str, Any], about: AboutTarget, dtype: str, engine: Engine) -> dict[str, Any]:
    return {**draft, "torch_dtype": dtype, TAPS: [*about.tap_layers]}


def tables(vocab: VocabMap, engine: Engine) -> dict[str, np.ndarray]:
    return {}


def flat_name(key: str) -> str | None:
    return key


def take_vocab(tensors: dict[str, np.ndarray], config: Any, origin: str) -> VocabMap:
    return VocabMap(np.arange(config.vocab_size), config.vocab_size)


def tap_layers_of(config: Mapping[str, Any], target: Mapping[str, Any]) -> list[int] | None:
    return config.get(TAPS)


def unreadable(view: DraftView) -> list[Finding]:
    bad = [name for name in SIZES if not isinstance(view.config.get(name), int)]
    return [Finding("refused", f"config.json: no size {name}", "write it again") for name in bad]


def of_sizes(view: DraftView) -> list[Finding]:
    known = view.target or {}
    return [
        Finding("refused", f"{name} is {view.config[name]}, the target's {known[name]}", "it is for another target")
        for name in ("vocab_size", "hidden_size")
        if name in known and known[name] != view.config[name]
    ]


def of_directory(view: DraftView) -> list[Finding]:
    return of_sizes(view)


def of_config(engine: Engine, view: DraftView) -> list[Finding]:
    taps = view.config[TAPS]
    if len(taps) == view.config["num_taps"]:
        return []
    return [Finding("wrong", f"{TAPS} {taps} are not {view.config['num_taps']}", "train with as many taps")]


def of_tensors(engine: Engine, view: DraftView) -> list[Finding]:
    return []


def describe(config: Mapping[str, Any]) -> str:
    return f"{config['num_hidden_layers']} layers of width {config['hidden_size']}, blocks of {config['block_size']}"


def describe_training(settings: Mapping[str, Any]) -> str:
    return f"{settings['num_anchors']} blocks of {settings['block_size']} a conversation"
