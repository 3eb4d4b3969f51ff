"""sglang-jax (python/sgl_jax/srt/models/llama_eagle3.py, utils/weight_utils.py)."""

from flaxdraft.algorithms.eagle3.serving.terms import Engine, Served

ENGINE = Engine(
    title="sglang-jax cddbf6f",
    # Its documentation turns the overlapping schedule off for EAGLE-3.
    serve="python -m sgl_jax.launch_server --model-path TARGET --speculative-algorithm EAGLE3 \\\n"
          "    --speculative-draft-model-path {draft} --speculative-num-steps {chain} --speculative-eagle-topk 1 \\\n"
          "    --speculative-num-draft-tokens {verified} --disable-overlap-schedule",
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
)  # fmt: skip
