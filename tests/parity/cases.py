"""Configurations and inputs that the parity tests share. Needs no PyTorch."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flaxdraft.ops.attention import causal_visibility

B, T, WINDOW = 2, 24, 64
PARITY = 1e-5  # the largest difference from PyTorch, of the largest value

ROPES = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "dynamic_original": {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 16},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "yarn_mscale": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "mscale": 0.7,
        "mscale_all_dim": 1.3, "beta_fast": 16.0, "beta_slow": 2.0,
    },
    "yarn_attention_factor": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "attention_factor": 1.2,
    },
}  # fmt: skip
every_rope = pytest.mark.parametrize("rope", ROPES)

_PLAIN = np.tile(np.arange(T), (B, 1))
# name -> (segments, positions); "far" lies beyond the window, where dynamic NTK stretches.
LAYOUTS = {
    "plain": (np.ones((B, T), np.int32), _PLAIN),
    "offset": (np.ones((B, T), np.int32), _PLAIN + np.array([[5], [17]])),
    "far": (np.ones((B, T), np.int32), _PLAIN + 90),
    "packed": (np.repeat([[1, 2, 3]], 8, axis=1).repeat(B, 0), np.tile(np.arange(8), (B, 3))),
}
every_layout = pytest.mark.parametrize("layout", LAYOUTS)

HIDDEN = 32
LLAMA = {
    "vocab_size": 96, "draft_vocab_size": 40, "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": WINDOW,
    "tie_word_embeddings": False,
}  # fmt: skip
MLA = LLAMA | {
    "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 20, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8,
    "v_head_dim": 10, "rms_norm_eps": 1e-6,
}  # fmt: skip


def with_rope(hf: dict, rope: str, theta: float = 5e4) -> dict:
    return hf | {"rope_parameters": {**ROPES[rope], "rope_theta": theta}}


def layout_arrays(layout: str):
    """(positions, visibility) of a layout."""
    segments, positions = LAYOUTS[layout]
    return jnp.asarray(positions), causal_visibility(jnp.asarray(segments))


def normal(seed: int, *shape: int, scale: float = 1.0) -> np.ndarray:
    return (scale * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


def randomize(module: nnx.Module, seed: int) -> None:
    """Weights at which every part matters, in place: kernels of unit gain, norms around one."""
    params = nnx.state(module, nnx.Param)
    for i, (path, variable) in enumerate(nnx.to_flat_state(params)):
        shape = variable[...].shape
        noise = normal(seed + i, *shape)
        variable[...] = jnp.asarray(1 + 0.2 * noise if path[-1] == "scale" else noise / np.sqrt(shape[0]))
    nnx.update(module, params)
