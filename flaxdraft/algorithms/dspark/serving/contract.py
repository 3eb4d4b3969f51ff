"""DSpark's exports: the contract of flaxdraft/serving/contract.py, where these functions are described. What is not
said here is DFlash's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from flaxdraft.algorithms.dflash.serving import contract as of_blocks
from flaxdraft.algorithms.dflash.serving import rules as of_block_rules
from flaxdraft.algorithms.dflash.serving import sanity
from flaxdraft.algorithms.dflash.serving.contract import config_json as config_json
from flaxdraft.algorithms.dflash.serving.contract import flat_name as flat_name
from flaxdraft.algorithms.dflash.serving.contract import tables as tables
from flaxdraft.algorithms.dflash.serving.contract import take_vocab as take_vocab
from flaxdraft.algorithms.dflash.serving.contract import tap_layers_of as tap_layers_of
from flaxdraft.algorithms.dspark.serving.kind import DSPARK, of_head
from flaxdraft.algorithms.dspark.serving.rules import RULES
from flaxdraft.algorithms.dspark.serving.terms import Engine
from flaxdraft.plugins import parts_of

title: str = "DSpark"
tags: Sequence[str] = ("dspark", "dflash", "speculative-decoding")
unreadable = partial(sanity.unreadable, kind=DSPARK)
of_directory = partial(sanity.of_directory, kind=DSPARK)
of_sizes = partial(sanity.of_sizes, kind=DSPARK)
of_config = partial(of_block_rules.of_config, more=RULES)
of_tensors = partial(of_block_rules.of_tensors, kind=DSPARK)


def engines() -> Mapping[str, Engine]:
    found = parts_of("flaxdraft.algorithms.dspark.serving.engines")
    return {name.replace("_", "-"): module.ENGINE for name, module in sorted(found)}


def describe(config: Mapping[str, Any]) -> str:
    told = of_blocks.describe(config).removeprefix(f"{of_blocks.title}, ")
    own = of_head(config)
    trusting = " and a confidence" if own.get("enable_confidence_head") else ""
    return f"{title}, {told}, a {own['markov_head_type']} Markov head of rank {own['markov_rank']}{trusting}"


def describe_training(settings: Mapping[str, Any]) -> str:
    return f"{settings['num_anchors']} blocks of {settings['block_size']} a conversation"
