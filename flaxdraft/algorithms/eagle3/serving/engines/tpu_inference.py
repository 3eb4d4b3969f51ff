"""tpu-inference, its flax_nnx models (models/jax/llama_eagle3.py, utils/weight_utils.py)."""

from flaxdraft.algorithms.eagle3.serving.terms import Engine, Served

ENGINE = Engine(
    title="tpu-inference 0.32.0",
    serve="MODEL_IMPL_TYPE=flax_nnx vllm serve TARGET --speculative-config \\\n"
          "    '{{\"method\": \"eagle3\", \"model\": \"{draft}\", \"num_speculative_tokens\": {chain}}}'",
    # The name that the others take is not in its registry: it then runs another implementation, in PyTorch.
    kinds={"llama": Served(("Eagle3LlamaForCausalLM", "LlamaForCausalLM"), ("norm_before_residual",))},
    layer_prefixes=("midlayer.",),
    unknown_key="refused",
    missing_key="fails",
    embedding="kept",
    full_d2t="required",
    required_fields=("draft_vocab_size",),
    not_null=("draft_vocab_size",),
    reads_tied_head=False,
    tap_fields=(),  # always 2, n//2 and n-3, counted by input
    target_types=("llama",),
    rope_dialects=("rope_parameters", "rope_theta"),  # vLLM's get_config patches the old one into the new
)  # fmt: skip
