"""The whole Llama target against transformers' LlamaForCausalLM: logits, taps and last hidden state, in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import LLAMA, T, assert_close, every_rope, normal, with_rope
from flax import nnx

from flaxdraft.interfaces import Batch
from flaxdraft.precision import Precision
from flaxdraft.targets import llama
from flaxdraft.weights import state_from_torch

pytestmark = pytest.mark.parity
LAYERS, TAPS = 6, (0, 2, 5)


def torch_weights(config) -> dict[str, np.ndarray]:
    """Random weights in transformers' naming, from the name table and the shapes of the target."""
    _, state = llama.abstract_state(config, Precision())
    shapes = {"/".join(path): variable.shape for path, variable in nnx.to_flat_state(state)}
    out = {}
    for path, template, transform in llama.name_table(config):
        for i in range(LAYERS if "{i}" in template else 1):
            shape = shapes[path][1:] if "{i}" in template else shapes[path]
            noise = normal(len(out), *(shape[::-1] if transform == "transpose" else shape))
            scaled = 1 + 0.2 * noise if path.endswith("scale") else noise / np.sqrt(shape[-1])
            out[template.format(i=i)] = scaled.astype(np.float32)
    return out


@pytest.mark.parametrize("tied", [False, True])
@every_rope
def test_logits_and_hidden_states(oracle, rope, tied):
    hf = with_rope(LLAMA | {"num_hidden_layers": LAYERS, "tie_word_embeddings": tied, "head_dim": 12}, rope)
    config = llama.Config.from_hf(hf, TAPS)
    weights = torch_weights(config)
    _, abstract = llama.abstract_state(config, Precision())
    state = state_from_torch(abstract, llama.name_table(config), weights, weights.get, LAYERS, "random weights")
    target = llama.build(config, state, Precision())
    if tied:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]

    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, T))
    positions = np.tile(np.arange(T), (2, 1)) + np.array([[0], [60]])  # the second row leaves the window
    theirs = oracle.llama_model({key: value for key, value in hf.items() if key != "draft_vocab_size"}, weights)
    want = oracle.run(
        lambda ids, at: dict(theirs(ids, position_ids=at, output_hidden_states=True, use_cache=False)),
        tokens, positions,
    )  # fmt: skip
    ones = jnp.ones(tokens.shape, jnp.int32)
    got = target.features(Batch(jnp.asarray(tokens), ones > 0, ones, jnp.asarray(positions)))
    # hidden_states[k] is the input of layer k, the output of layer k - 1; the very last one comes after the norm.
    for tap, layer in enumerate(TAPS[:-1]):
        assert_close(got.taps_BT3E[:, :, tap], want["hidden_states"][layer + 1])
    assert_close(got.last_BTE, want["hidden_states"][-1])
    normed = nnx.merge(target.graphdef, target.state).norm(got.taps_BT3E[:, :, 2])  # the tap of the last layer
    assert_close(normed, want["hidden_states"][-1])
    assert_close(got.last_BTE @ target.head().T, want["logits"])
    assert_close(got.logsumexp_BT, jax.nn.logsumexp(jnp.asarray(want["logits"]), axis=-1))
    np.testing.assert_array_equal(got.argmax_BT, want["logits"].argmax(-1))
