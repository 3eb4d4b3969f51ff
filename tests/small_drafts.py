"""Drafts as configurations and numpy weights: nothing is compiled to make one."""

from functools import cache

import numpy as np
from flax import nnx
from test_contracts import DRAFTS, V, W, target_config

from flaxdraft.algorithms import algorithm_of
from flaxdraft.algorithms.loading import abstract_params
from flaxdraft.interfaces import VocabMap
from flaxdraft.serving.export import export
from flaxdraft.serving.trained_draft import AboutTarget, TrainedDraft


@cache
def _abstract(kind, config):
    return abstract_params(DRAFTS[kind], config)


def config_of(kind, size=W, **fields):
    module = DRAFTS[kind]
    return module.Config(**module.Config.for_target(target_config(), size) | fields)


def random_params(kind, config, seed=0):
    """No two values alike, most of them not representable in bfloat16."""
    rng = np.random.default_rng(seed)
    flat = nnx.to_flat_state(_abstract(kind, config))
    return nnx.from_flat_state([(path, v.replace(rng.normal(size=v.shape).astype(np.float32))) for path, v in flat])


def vocab_of(size):
    """Every other token, or all of them."""
    return VocabMap(np.arange(size) * (2 if size < V else 1), V)


def write_export(
    directory, module, config, params, vocab, *, tap_layers, target, dtype="float32", engine="sglang", origin=None
):  # fmt: skip
    """A serving directory; with an origin it has a model card."""
    draft = TrainedDraft(algorithm_of(module, config), module, config, params, vocab)
    export(directory, draft, AboutTarget(target, tap_layers), dtype=dtype, engine=engine, origin=origin)
