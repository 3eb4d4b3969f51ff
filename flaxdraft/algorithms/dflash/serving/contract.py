"""DFlash's exports: the contract of flaxdraft/serving/contract.py, where these functions are described.

An export holds neither embedding nor head, since engines take the target's; a reduced vocabulary's holds the head of
its tokens and the tables that say which they are.
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
from flaxdraft.serving import rope_fields, vocabulary_tables
from flaxdraft.serving.contract import tables_in
from flaxdraft.serving.finding import Finding
from flaxdraft.serving.sanity import MARK
from flaxdraft.serving.trained_draft import AboutTarget
from flaxdraft.serving.view import DraftView

title: str = "DFlash"
tags: Sequence[str] = ("dflash", "speculative-decoding")


def engines() -> Mapping[str, Engine]:
    return tables_in("flaxdraft.algorithms.dflash.serving.engines")


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
    return {} if vocab.draft_vocab_size == vocab.vocab_size else vocab.tables()


def flat_name(key: str) -> str | None:
    name = layout.flat_name(key)
    return None if layout.BUFFERS.search(name) else name


def take_vocab(tensors: dict[str, np.ndarray], config: Any, origin: str) -> VocabMap:
    """See the contract; an embedding goes, and a head where the target's serves the draft."""
    tensors.pop(layout.EMBEDDING, None)
    if config.knows_every_token:
        tensors.pop(layout.HEAD, None)
    return vocabulary_tables.take(tensors, config.draft_vocab_size, config.vocab_size, origin)


def tap_layers_of(config: Mapping[str, Any], target: Mapping[str, Any]) -> list[int] | None:
    return config[CONFIG].get(TAPS)


def of_config(engine: Engine, view: DraftView) -> list[Finding]:
    return rules.of_config(engine, view)


def of_tensors(engine: Engine, view: DraftView) -> list[Finding]:
    return rules.of_tensors(engine, view)


def describe(config: Mapping[str, Any]) -> str:
    return f"{title}, {describe_layers(config)}"


def describe_layers(config: Mapping[str, Any]) -> str:
    layers, size = config["num_hidden_layers"], layout.block_size(config)
    kind = "DeepSeek-MLA" if layout.is_latent(config) else "Qwen3"
    return f"{layers} {kind} layer{'s' * (layers > 1)} of width {config['hidden_size']}, blocks of {size}"


def describe_training(settings: Mapping[str, Any]) -> str:
    return f"{describe_blocks(settings)}, {settings['objective']}"


def describe_blocks(settings: Mapping[str, Any]) -> str:
    return f"{settings['num_anchors']} blocks of {settings['block_size']} a conversation"
