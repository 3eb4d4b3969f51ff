"""DFlash's exports: the contract of flaxdraft/serving/contract.py, where these functions are described.

An export holds neither embedding nor head: engines take the target's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flaxdraft.algorithms.dflash.serving import rules
from flaxdraft.algorithms.dflash.serving import tensors as layout
from flaxdraft.algorithms.dflash.serving.sanity import of_directory as of_directory
from flaxdraft.algorithms.dflash.serving.sanity import of_sizes as of_sizes
from flaxdraft.algorithms.dflash.serving.sanity import unreadable as unreadable
from flaxdraft.algorithms.dflash.serving.terms import CONFIG, TAPS, Engine
from flaxdraft.interfaces import VocabMap
from flaxdraft.plugins import parts_of
from flaxdraft.serving import rope_fields
from flaxdraft.serving.finding import Finding
from flaxdraft.serving.sanity import MARK
from flaxdraft.serving.trained_draft import AboutTarget
from flaxdraft.serving.view import DraftView

title: str = "DFlash"
tags: Sequence[str] = ("dflash", "speculative-decoding")


def engines() -> Mapping[str, Engine]:
    found = parts_of("flaxdraft.algorithms.dflash.serving.engines")
    return {name.replace("_", "-"): module.ENGINE for name, module in sorted(found)}


def config_json(draft: Mapping[str, Any], about: AboutTarget, dtype: str, engine: Engine) -> dict[str, Any]:
    target = about.config
    own = {name: value for name, value in draft[CONFIG].items() if name != "num_taps"}  # so many layer ids
    config = {**draft, "torch_dtype": dtype, CONFIG: own | {TAPS: [*about.tap_layers]}, MARK: "flaxdraft"}
    config["architectures"] = [engine.architecture]
    rope_fields.for_context(config, target.get("max_position_embeddings", 0))
    if target.get("num_hidden_layers") is not None:
        config["num_target_layers"] = target["num_hidden_layers"]
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if target.get(name) is not None:
            config[name] = target[name]
    return config


def tables(vocab: VocabMap, engine: Engine) -> dict[str, np.ndarray]:
    return {}


def flat_name(key: str) -> str | None:
    name = layout.flat_name(key)
    return None if layout.PASSED_OVER.search(name) else name


def take_vocab(tensors: dict[str, np.ndarray], config: Any, origin: str) -> VocabMap:
    return VocabMap(np.arange(config.vocab_size), config.vocab_size)


def tap_layers_of(config: Mapping[str, Any], target: Mapping[str, Any]) -> list[int] | None:
    return config[CONFIG].get(TAPS)


def of_config(engine: Engine, view: DraftView) -> list[Finding]:
    return rules.of_config(engine, view)


def of_tensors(engine: Engine, view: DraftView) -> list[Finding]:
    return rules.of_tensors(engine, view)


def describe(config: Mapping[str, Any]) -> str:
    layers, size = config["num_hidden_layers"], layout.block_size(config)
    kind = "DeepSeek-MLA" if layout.is_latent(config) else "Qwen3"
    return f"DFlash, {layers} {kind} layer{'s' * (layers > 1)} of width {config['hidden_size']}, blocks of {size}"


def describe_training(settings: Mapping[str, Any]) -> str:
    return f"{settings['num_anchors']} blocks of {settings['block_size']} a conversation, {settings['objective']}"
