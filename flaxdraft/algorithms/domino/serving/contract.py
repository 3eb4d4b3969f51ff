"""Domino's exports: the contract of flaxdraft/serving/contract.py, where these functions are described. What is not
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
from flaxdraft.algorithms.dflash.serving.terms import CONFIG
from flaxdraft.algorithms.domino.serving.kind import DOMINO
from flaxdraft.algorithms.domino.serving.rules import RULES
from flaxdraft.algorithms.domino.serving.terms import Engine
from flaxdraft.serving.contract import tables_in

title: str = "Domino"
tags: Sequence[str] = ("domino", "dflash", "speculative-decoding")
describe_training = of_blocks.describe_blocks
unreadable = partial(sanity.unreadable, kind=DOMINO)
of_directory = partial(sanity.of_directory, kind=DOMINO)
of_sizes = partial(sanity.of_sizes, kind=DOMINO)
of_config = partial(of_block_rules.of_config, more=RULES)
of_tensors = partial(of_block_rules.of_tensors, kind=DOMINO)


def engines() -> Mapping[str, Engine]:
    return tables_in("flaxdraft.algorithms.domino.serving.engines")


def describe(config: Mapping[str, Any]) -> str:
    return f"{title}, {of_blocks.describe_layers(config)}, a recurrent state of {config[CONFIG]['gru_hidden_dim']}"
