"""Every target family against transformers' PyTorch model: written by save_pretrained, loaded from that directory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import PARITY, ROPES
from closeness import assert_close
from flax import nnx

from flaxdraft.decode.generation import generate
from flaxdraft.interfaces import Batch
from flaxdraft.targets import from_pretrained

pytestmark = pytest.mark.parity
T, TAPS = 24, (0, 2, 4)
COMMON = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
}  # fmt: skip
LATENT = {
    "kv_lora_rank": 12, "q_lora_rank": 20, "qk_nope_head_dim": 10, "qk_rope_head_dim": 6, "v_head_dim": 8,
    "num_key_value_heads": 4, "moe_intermediate_size": 16, "n_routed_experts": 8, "num_experts_per_tok": 3,
    "first_k_dense_replace": 2, "n_shared_experts": 2, "routed_scaling_factor": 2.5, "rms_norm_eps": 1e-6,
}  # fmt: skip
GROUPS = {"n_group": 4, "topk_group": 2}
EXPERTS = {"num_key_value_heads": 2, "head_dim": 16, "num_experts": 8, "num_experts_per_tok": 3,
           "moe_intermediate_size": 16}  # fmt: skip
WINDOWS = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention",
           "sliding_attention"]  # fmt: skip
GPT_OSS = {
    "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 8, "num_experts_per_tok": 3, "sliding_window": 7,
    "swiglu_limit": 0.7, "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 1.5e5, "factor": 4.0, "original_max_position_embeddings": 4096,
        "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False},
}  # fmt: skip
GEMMA = {
    "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 7, "sliding_window_pattern": 3,
    "query_pre_attn_scalar": 20, "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e2},
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}},
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 5e4, "factor": 4.0, "original_max_position_embeddings": 16,
        "mscale": 1.0, "mscale_all_dim": 0.8, "beta_fast": 32.0, "beta_slow": 1.0}  # fmt: skip
CASES = {
    **{f"llama, {name} rope": ("Llama", {"num_key_value_heads": 2, "rope_parameters": rope | {"rope_theta": 5e4}})
       for name, rope in ROPES.items()},
    "llama, tied": ("Llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama, head width": ("Llama", {"num_key_value_heads": 1, "head_dim": 12}),
    "llama, biases": ("Llama", {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen2, tied": ("Qwen2", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 16}),
    "qwen3, bias": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 8, "attention_bias": True}),
    "deepseek v2, greedy": ("DeepseekV2", LATENT | {"topk_method": "greedy"}),
    "deepseek v2, groups, plain query": (
        "DeepseekV2", LATENT | GROUPS | {"topk_method": "group_limited_greedy", "q_lora_rank": None}),
    "deepseek v2, yarn, biases": (
        "DeepseekV2", LATENT | {"topk_method": "greedy", "rope_parameters": YARN, "attention_bias": True}),
    "deepseek v3": ("DeepseekV3", LATENT | GROUPS),
    "deepseek v3, plain query, unnormalised": (
        "DeepseekV3", LATENT | GROUPS | {"q_lora_rank": None, "norm_topk_prob": False, "attention_bias": True}),
    "deepseek v3, yarn, tied": ("DeepseekV3", LATENT | GROUPS | {"rope_parameters": YARN, "tie_word_embeddings": True}),
    "deepseek v3, no dense layer": ("DeepseekV3", LATENT | GROUPS | {"first_k_dense_replace": 0}),
    "deepseek v3, all dense": ("DeepseekV3", LATENT | GROUPS | {"first_k_dense_replace": 6}),
    "qwen3 moe": ("Qwen3Moe", EXPERTS | {"norm_topk_prob": True}),
    "qwen3 moe, unnormalised, biases, tied": (
        "Qwen3Moe", EXPERTS | {"norm_topk_prob": False, "attention_bias": True, "tie_word_embeddings": True}),
    "mistral, no window": ("Mistral", {"num_key_value_heads": 2, "sliding_window": None}),
    "mistral, windows": ("Mistral", {"num_key_value_heads": 2, "head_dim": 12, "sliding_window": 7}),
    "ministral, some windows": (
        "Ministral", {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 7, "tie_word_embeddings": True,
                      "layer_types": WINDOWS}),
    "gpt-oss": ("GptOss", GPT_OSS),
    "gpt-oss, other windows, no bias": (
        "GptOss", GPT_OSS | {"layer_types": WINDOWS, "attention_bias": False, "swiglu_alpha": 1.2}),
    "gemma 3": ("Gemma3", GEMMA),
    "gemma 3, its own windows, untied, biases": (
        "Gemma3", GEMMA | {"layer_types": WINDOWS, "attention_bias": True, "tie_word_embeddings": False}),
}  # fmt: skip

# One of every family.
GENERATING = (
    "llama, yarn rope", "qwen2", "qwen3", "deepseek v2, greedy", "deepseek v3", "qwen3 moe", "mistral, windows",
    "ministral, some windows", "gpt-oss", "gemma 3",
)  # fmt: skip


@pytest.fixture(scope="module", params=CASES)
def pair(request, oracle, tmp_path_factory):
    """(transformers' model, ours, where it was written)."""
    family, fields = CASES[request.param]
    theirs = oracle.random_model(family, COMMON | fields)
    directory = tmp_path_factory.mktemp("model")
    theirs.save_pretrained(directory, max_shard_size="100KB")
    assert len(list(directory.glob("*.safetensors"))) > 1
    return theirs, from_pretrained(str(directory), tap_layers=TAPS), directory


def inputs(vocab_size):
    tokens = np.random.default_rng(0).integers(0, vocab_size, (2, T))
    positions = np.tile(np.arange(T), (2, 1)) + np.array([[0], [60]])  # the second row leaves the window
    return tokens, positions


def features_of(loaded, tokens, positions):
    ones = jnp.ones(tokens.shape, jnp.int32)
    return loaded.model.features(Batch(jnp.asarray(tokens), ones > 0, ones, jnp.asarray(positions)))


def test_logits_taps_and_last_hidden_state(oracle, pair):
    theirs, loaded, _ = pair
    config = loaded.model.config
    tokens, positions = inputs(config.vocab_size)
    want = oracle.run(
        lambda ids, at: dict(theirs(ids, position_ids=at, output_hidden_states=True, use_cache=False)),
        tokens, positions,
    )  # fmt: skip
    got = features_of(loaded, tokens, positions)
    close = lambda a, b: assert_close(a, b, rtol=PARITY)  # noqa: E731
    # hidden_states[k] is the input of layer k, the output of layer k - 1; the very last one comes after the norm.
    for tap, layer in enumerate(TAPS):
        close(got.taps_BTKE[:, :, tap], want["hidden_states"][layer + 1])
    close(got.last_BTE, want["hidden_states"][-1])
    close(np.asarray(got.last_BTE) @ np.asarray(loaded.model.head()).T, want["logits"])
    close(got.logsumexp_BT, jax.nn.logsumexp(jnp.asarray(want["logits"]), axis=-1))
    np.testing.assert_array_equal(got.argmax_BT, want["logits"].argmax(-1))
    assert np.abs(want["logits"]).max() > 0.5  # weights large enough for every switch to show


def test_packed_documents(oracle, pair):
    """Each is what it is alone."""
    theirs, loaded, _ = pair
    tokens, _ = inputs(loaded.model.config.vocab_size)
    sizes = (9, 12)
    segments = np.repeat([1, 2, 0], (*sizes, T - sum(sizes)))[None].repeat(2, 0)
    positions = np.concatenate([np.arange(9), np.arange(12), np.zeros(3, int)])[None].repeat(2, 0)
    got = loaded.model.features(Batch(tokens, segments > 0, segments, positions))
    for start, size in zip((0, 9), sizes, strict=True):
        span = slice(start, start + size)
        want = oracle.run(
            lambda ids: dict(theirs(ids, output_hidden_states=True, use_cache=False)), tokens[:, span]
        )  # fmt: skip
        assert_close(got.last_BTE[:, span], want["hidden_states"][-1], rtol=PARITY)
        assert_close(got.taps_BTKE[:, span, 1], want["hidden_states"][TAPS[1] + 1], rtol=PARITY)
        np.testing.assert_array_equal(got.argmax_BT[:, span], want["logits"].argmax(-1))


PROMPTS = ([5, 9, 30, 7], [8] * 11, [40, 41, 6, 50, 51, 52, 53, 54, 3, 2, 1, 70, 71, 72, 73, 74, 75])


@pytest.mark.parametrize("pair", GENERATING, indirect=True)
def test_greedy_answers(oracle, pair):
    """64 tokens with a cache, three prompts beside each other."""
    theirs, loaded, _ = pair
    answers = generate(loaded.model, [*map(list, PROMPTS)], max_new_tokens=64, stop_tokens=())
    theirs.generation_config.eos_token_id = None
    settings = {"max_new_tokens": 64, "do_sample": False, "pad_token_id": 0}
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        want = theirs.generate(oracle.tensor([prompt]), **settings)[0, len(prompt) :]
        assert list(answer) == want.tolist()
    assert len({*answers[0], *answers[1], *answers[2]}) > 10


def test_routing_decisions(oracle, pair):
    """Chosen experts and their weights, token for token, of the first layer with experts on random states."""
    theirs, loaded, _ = pair
    model = nnx.merge(loaded.model.graphdef, loaded.model.state)
    spans = [(name, span) for name, span in loaded.model.spans if hasattr(getattr(model, name).mlp, "gate")]
    if not spans:
        assert not {"gate", "router"} & {name for name, _ in theirs.model.layers[-1].mlp.named_children()}
        return
    ((name, span),) = spans
    x = np.random.default_rng(1).normal(size=(4, 50, COMMON["hidden_size"])).astype(np.float32)
    block = theirs.model.layers[span.start].mlp
    _, weights, experts = oracle.run(getattr(block, "gate", None) or block.router, x.reshape(200, -1))
    graphdef, state = nnx.split(getattr(model, name))
    mlp = nnx.merge(graphdef, jax.tree.map(lambda w: w[0], state)).mlp
    got_weights, got_experts = (np.asarray(a).reshape(200, -1) for a in mlp.routing(jnp.asarray(x)))
    order, want_order = np.argsort(got_experts, -1), np.argsort(experts, -1)
    np.testing.assert_array_equal(np.take_along_axis(got_experts, order, -1), np.sort(experts, -1))
    assert_close(
        np.take_along_axis(got_weights, order, -1), np.take_along_axis(weights, want_order, -1), rtol=2e-5, of="each"
    )
    assert len(np.unique(experts)) > 3
