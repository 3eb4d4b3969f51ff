"""gpt-oss as it is published, loaded by transformers, which widens its weights by its own code."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from cases import PARITY
from closeness import assert_close
from safetensors.numpy import save_file
from test_mxfp4 import HF, STORED

from flaxdraft.interfaces import Batch
from flaxdraft.targets import from_pretrained

pytestmark = pytest.mark.parity


def test_packed_weights(oracle, tmp_path):
    quantisation = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    (tmp_path / "config.json").write_text(json.dumps(HF | {"quantization_config": quantisation}))
    save_file(STORED, tmp_path / "model.safetensors", metadata={"format": "pt"})
    transformers = oracle.transformers
    theirs = transformers.GptOssForCausalLM.from_pretrained(
        tmp_path, dtype=oracle.torch.float32, attn_implementation="eager",
        quantization_config=transformers.Mxfp4Config(dequantize=True),
    ).eval()  # fmt: skip
    tokens = np.random.default_rng(0).integers(0, HF["vocab_size"], (2, 24))
    want = oracle.run(lambda ids: dict(theirs(ids, use_cache=False)), tokens)["logits"]
    ones = jnp.ones(tokens.shape, jnp.int32)
    loaded = from_pretrained(str(tmp_path)).model
    got = loaded.features(Batch(jnp.asarray(tokens), ones > 0, ones, jnp.tile(jnp.arange(24), (2, 1))))
    assert_close(np.asarray(got.last_BTE) @ np.asarray(loaded.head()).T, want, rtol=PARITY)
