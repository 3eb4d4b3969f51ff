"""sglang-jax (python/sgl_jax/srt/models/llama_eagle3.py, utils/weight_utils.py)."""

from flaxdraft.algorithms.eagle3.serving.terms import Engine, Served

ENGINE = Engine(
    title="sglang-jax cddbf6f",
    kinds={"llama": Served(("LlamaForCausalLMEagle3",))},
    layer_prefixes=("midlayer.",),
    unknown_key="unread",
    missing_key="fails",
    embedding="unread",
    required_fields=("draft_vocab_size",),
    not_null=("target_hidden_size", "draft_vocab_size"),
    attention_bias=True,
    tap_fields=(),  # it looks for them in the target's config.json, not in the draft's
    rope_dialects=("rope_theta",),
)
