"""Goldens of block drafters with a head: the example and the draft of one forward and backward pass of the PyTorch
reference, the target and the draft of its decoding. The reference's uniform numbers are injected. See golden/*.json for
the configurations."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import dflash
import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from flaxdraft.algorithms.dflash import anchors
from flaxdraft.devices.sharding import Sharding
from flaxdraft.files.name_tables import state_from_torch
from flaxdraft.interfaces import Batch, Example, Features
from flaxdraft.nn.precision import Precision
from flaxdraft.targets import decoder, llama

GOLDEN = Path(__file__).parent / "golden"


class Golden(NamedTuple):
    tensors: dict[str, np.ndarray]
    meta: dict[str, Any]

    def of(self, prefix: str) -> dict[str, np.ndarray]:
        return {key.removeprefix(prefix): x for key, x in self.tensors.items() if key.startswith(prefix)}


def golden(name: str) -> Golden:
    return Golden(load_file(GOLDEN / f"{name}.safetensors"), json.loads((GOLDEN / f"{name}.json").read_text()))


def example_of(golden: Golden) -> Example:
    tensors, tokens = golden.tensors, golden.tensors["in.input_ids"]
    num_batch, length = tokens.shape
    positions = np.tile(np.arange(length), (num_batch, 1))
    batch = Batch(tokens, tensors["in.loss_mask"] > 0.5, np.ones_like(tokens), positions)
    found = anchors.lowest(tensors["sample.rand"], anchors.possible(batch), golden.meta["options"]["num_anchors"])
    taps = tensors["in.hidden_states"].reshape(num_batch, length, 3, -1)
    features = Features(taps, tensors.get("in.target_last_hidden_states"))
    return jax.tree.map(jnp.asarray, Example(batch, features, found, ()))


def draft_of(module, golden: Golden):
    o, tensors = golden.meta["options"], golden.tensors
    config = module.Config.from_hf({
        "hidden_size": o["hidden"], "intermediate_size": o["inter"], "vocab_size": o["vocab"], "rms_norm_eps": 1e-6,
        "num_attention_heads": o["heads"], "num_key_value_heads": o["kv"], "head_dim": o["head_dim"],
        "num_hidden_layers": o["layers"], "block_size": o["block"], "rope_theta": o["rope_theta"],
        "dflash_config": o["dflash_config"],
    })  # fmt: skip
    of_target = (tensors[f"target.{name}.weight"] for name in ("embed_tokens", "lm_head"))
    return dflash.make_draft(config, dflash.target_of(*of_target), golden.of("w."))


def models_of(module, golden: Golden):
    """Target and draft of a decoding."""
    t, d = golden.meta["target_config"], golden.meta["draft_config"]
    shared = {
        "vocab_size": t["vocab"], "hidden_size": t["hidden"], "intermediate_size": t["inter"], "rms_norm_eps": 1e-6,
        "num_attention_heads": t["heads"], "num_key_value_heads": t["kv"], "head_dim": t["head_dim"],
        "rope_theta": t["rope_theta"], "max_position_embeddings": 256,
    }  # fmt: skip
    hf = shared | {"architectures": ["Qwen3ForCausalLM"], "num_hidden_layers": t["layers"]}
    config = llama.Config.from_hf(hf, d["dflash_config"]["target_layer_ids"])
    groups = llama.groups(config, Precision(), Sharding.none())
    _, state = decoder.abstract_state(config, groups, Precision())
    state = state_from_torch(state, llama.name_table(config), golden.of("target."), "target", t["layers"])
    target = decoder.build(config, groups, state, Precision())
    own = {"num_hidden_layers": d["layers"], "block_size": d["block_size"], "dflash_config": d["dflash_config"]}
    return target, dflash.make_draft(module.Config.from_hf(shared | own), target, golden.of("draft."))
