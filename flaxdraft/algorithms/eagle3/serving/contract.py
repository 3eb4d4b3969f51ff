"""EAGLE-3's exports: the contract of flaxdraft/serving/contract.py, where these functions are described.

An export holds `midlayer.*` keys without a `model.` prefix; d2t as offsets and t2d where the engine wants them; the
embedding only where the draft owns one (engines put the target's in its place otherwise).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flaxdraft.algorithms.eagle3.serving import layer_ids, rules, sanity
from flaxdraft.algorithms.eagle3.serving import tensors as layout
from flaxdraft.algorithms.eagle3.serving.config_json import config_json as config_json
from flaxdraft.algorithms.eagle3.serving.fields import malformed, sizeless
from flaxdraft.algorithms.eagle3.serving.kinds import View, kind_of
from flaxdraft.algorithms.eagle3.serving.kinds import engines as engines
from flaxdraft.algorithms.eagle3.serving.terms import SWITCHES, Engine
from flaxdraft.interfaces import VocabMap
from flaxdraft.serving import vocabulary_tables
from flaxdraft.serving.finding import Finding, few
from flaxdraft.serving.sanity import foreign_form
from flaxdraft.serving.view import DraftView

title: str = "EAGLE-3"
tags: Sequence[str] = ("eagle3", "speculative-decoding")


def tables(vocab: VocabMap, engine: Engine) -> dict[str, np.ndarray]:
    if vocab.draft_vocab_size == vocab.vocab_size and engine.full_d2t != "required":
        return {}
    return vocab.tables()


def flat_name(key: str) -> str | None:
    name = layout.flat_name(key)
    return None if layout.BUFFERS.search(name) else name


def take_vocab(tensors: dict[str, np.ndarray], config: Any, origin: str) -> VocabMap:
    """See the contract; an `embed_tokens.weight` goes where the draft does not own its embedding, since the target's
    stands in its place, as in SGLang.

    Raises:
        InputError: d2t is missing where the draft's vocabulary is smaller, is of another size, or differs from t2d.
    """
    if not config.owns_embedding:
        tensors.pop("embed_tokens.weight", None)
    return vocabulary_tables.take(tensors, config.draft_vocab_size, config.vocab_size, origin)


def tap_layers_of(config: Mapping[str, Any], target: Mapping[str, Any]) -> list[int] | None:
    return layer_ids.outputs_of(config, layer_ids.is_deepseek(target))


def unreadable(view: DraftView) -> list[Finding]:
    if found := foreign_form(view):
        return found
    bad = [*sizeless(view.config), *malformed(view.config)]
    return [Finding("refused", f"config.json: {few(bad)}", "write it again")] if bad else []


def of_directory(view: DraftView) -> list[Finding]:
    return sanity.of_directory(View.of(view))


def of_sizes(view: DraftView) -> list[Finding]:
    known = View.of(view)
    return [*sanity.shapes(known), *sanity.target(known)]


def of_config(engine: Engine, view: DraftView) -> list[Finding]:
    return rules.of_config(engine, View.of(view))


def of_tensors(engine: Engine, view: DraftView) -> list[Finding]:
    return rules.of_tensors(engine, View.of(view))


def describe(config: Mapping[str, Any]) -> str:
    switched = [name for name in SWITCHES if config.get(name)]
    layer = f"EAGLE-3, one {kind_of(config).title} layer of width {config['hidden_size']}"
    return layer + (f", {' and '.join(switched)}" if switched else "")


def describe_training(settings: Mapping[str, Any]) -> str:
    return f"{settings['ttt_length']} unroll steps, {settings['objective']}"
