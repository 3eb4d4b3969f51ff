"""vLLM (model_executor/models/qwen3_dflash.py), since 0.20.0."""

from flaxdraft.algorithms.dflash.serving.terms import Engine

ENGINE = Engine(
    title="vLLM 0.33.0",
    portable=True,
    # It fills blocks of as many mask tokens as it is told; a draft was trained with those of its own block.
    serve="# N: one less than block_size of config.json\n"
          "    vllm serve TARGET --speculative-config \\\n"
          "    '{{\"method\": \"dflash\", \"model\": \"{draft}\", \"num_speculative_tokens\": N}}'",
    model_prefix=True,
    nested_causal=True,
    mixed_layers="VLLM_USE_V2_MODEL_RUNNER=1",
    last_layer=True,
    rope_dialects=("rope_parameters",),
)  # fmt: skip
