"""DFlash2's exports: the contract of flaxdraft/serving/contract.py, where these functions are described. What is not
said here is DFlash's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from flaxdraft.algorithms.dflash.serving import contract as of_blocks
from flaxdraft.algorithms.dflash.serving import rules, sanity
from flaxdraft.algorithms.dflash.serving.contract import config_json as config_json
from flaxdraft.algorithms.dflash.serving.contract import of_config as of_config
from flaxdraft.algorithms.dflash.serving.contract import tables as tables
from flaxdraft.algorithms.dflash.serving.contract import take_vocab as take_vocab
from flaxdraft.algorithms.dflash.serving.contract import tap_layers_of as tap_layers_of
from flaxdraft.algorithms.dflash.serving.terms import CONFIG, Engine
from flaxdraft.algorithms.dflash2.serving import kind
from flaxdraft.algorithms.dflash2.serving.kind import DFLASH2
from flaxdraft.serving.contract import tables_in

title: str = "DFlash2"
tags: Sequence[str] = ("dflash2", "dflash", "speculative-decoding")
describe_training = of_blocks.describe_blocks
unreadable = partial(sanity.unreadable, kind=DFLASH2)
of_directory = partial(sanity.of_directory, kind=DFLASH2)
of_sizes = partial(sanity.of_sizes, kind=DFLASH2)
of_tensors = partial(rules.of_tensors, kind=DFLASH2)


def engines() -> Mapping[str, Engine]:
    return tables_in("flaxdraft.algorithms.dflash2.serving.engines")


def flat_name(key: str) -> str | None:
    return None if of_blocks.flat_name(key) is None else kind.flat_name(key)


def describe(config: Mapping[str, Any]) -> str:
    return f"{title}, {of_blocks.describe_layers(config)}, a choice among {config[CONFIG]['selector_top_k']} candidates"
