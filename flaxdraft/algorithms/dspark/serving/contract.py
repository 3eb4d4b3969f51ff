"""DSpark's exports: the contract of flaxdraft/serving/contract.py, where these functions are described. What is not
said here is DFlash's."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from flaxdraft.algorithms.dflash.serving import contract as of_blocks
from flaxdraft.algorithms.dflash.serving import rules as of_block_rules
from flaxdraft.algorithms.dflash.serving import sanity
from flaxdraft.algorithms.dflash.serving.contract import config_json as config_json
from flaxdraft.algorithms.dflash.serving.contract import flat_name as flat_name
from flaxdraft.algorithms.dflash.serving.contract import tables as tables
from flaxdraft.algorithms.dflash.serving.contract import take_vocab as take_vocab
from flaxdraft.algorithms.dspark.serving.kind import DSPARK, of_head
from flaxdraft.algorithms.dspark.serving.rules import RULES
from flaxdraft.algorithms.dspark.serving.terms import Engine
from flaxdraft.algorithms.dspark.sizes import nested
from flaxdraft.serving.contract import tables_in
from flaxdraft.serving.finding import Finding
from flaxdraft.serving.view import DraftView

title: str = "DSpark"
tags: Sequence[str] = ("dspark", "dflash", "speculative-decoding")
describe_training = of_blocks.describe_blocks


def _nested(view: DraftView) -> DraftView:
    return dataclasses.replace(view, config=nested(view.config))


def tap_layers_of(config: Mapping[str, Any], target: Mapping[str, Any]) -> list[int] | None:
    return of_blocks.tap_layers_of(nested(config), target)


def unreadable(view: DraftView) -> list[Finding]:
    return sanity.unreadable(_nested(view), DSPARK)


def of_directory(view: DraftView) -> list[Finding]:
    return sanity.of_directory(_nested(view), DSPARK)


def of_sizes(view: DraftView) -> list[Finding]:
    return sanity.of_sizes(_nested(view), DSPARK)


def of_config(engine: Engine, view: DraftView) -> list[Finding]:
    return of_block_rules.of_config(engine, _nested(view), RULES)


def of_tensors(engine: Engine, view: DraftView) -> list[Finding]:
    return of_block_rules.of_tensors(engine, _nested(view), DSPARK)


def engines() -> Mapping[str, Engine]:
    return tables_in("flaxdraft.algorithms.dspark.serving.engines")


def describe(config: Mapping[str, Any]) -> str:
    told, own = of_blocks.describe_layers(nested(config)), of_head(nested(config))
    trusting = " and a confidence" if own.get("enable_confidence_head") else ""
    return f"{title}, {told}, a {own['markov_head_type']} Markov head of rank {own['markov_rank']}{trusting}"
