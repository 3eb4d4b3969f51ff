"""Draft -> serving directory: safetensors and config.json in the EAGLE-3 layout that SGLang and vLLM load.

`midlayer.*` keys without a `model.` prefix; d2t as offsets and t2d only where the draft vocabulary is smaller than the
target's; the embedding only where the draft owns one (servers put the target's in its place otherwise).
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from flax import nnx

from flaxdraft.errors import InputError
from flaxdraft.interfaces import VocabMap
from flaxdraft.weights import save_safetensors, state_to_torch, write_json

_DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}


def serving_config(draft_config: Any, tap_layers: tuple[int, ...], target_config: dict[str, Any], dtype: str) -> dict:
    """config.json. Layer ids stand in both places and both conventions: SGLang reads eagle_config and counts layer
    outputs, vLLM reads the top level and counts layer inputs."""
    config = {
        **draft_config.to_hf(),
        "torch_dtype": dtype,
        "eagle_config": {
            "use_aux_hidden_state": True,
            "eagle_aux_hidden_state_layer_ids": list(tap_layers),
        },
        "eagle_aux_hidden_state_layer_ids": [layer + 1 for layer in tap_layers],
    }
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if target_config.get(name) is not None:
            config[name] = target_config[name]
    return config


def export(
    directory: Path,
    draft_module: Any,
    draft_config: Any,
    params: nnx.State,
    vocab: VocabMap,
    *,
    tap_layers: tuple[int, ...],
    target_config: dict[str, Any],
    dtype: str,
) -> None:
    """Writes the whole directory under a temporary name, then puts it in place.

    Raises:
        InputError: a weight is not finite, or no server could load such a draft.
    """
    config = serving_config(draft_config, tap_layers, target_config, dtype)
    tensors = state_to_torch(params, draft_module.name_table(draft_config), _DTYPES[dtype])
    for name, array in tensors.items():
        if not np.isfinite(array.astype(np.float32)).all():
            raise InputError(f"export: {name} holds values that are not finite in {dtype}; choose another export.dtype")
    if vocab.draft_vocab_size < vocab.vocab_size:
        tensors["d2t"], tensors["t2d"] = vocab.d2t(), vocab.t2d()
    scratch = directory.with_name(directory.name + ".tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    save_safetensors(scratch / "model.safetensors", tensors, metadata={"format": "pt"})
    write_json(scratch / "config.json", config)
    shutil.rmtree(directory, ignore_errors=True)
    os.replace(scratch, directory)
