"""vLLM (model_executor/models/qwen3_dflash.py), since 0.20.0."""

from flaxdraft.algorithms.dflash.serving.terms import Engine

ENGINE = Engine(
    title="vLLM 0.33.0",
    portable=True,
    # It makes a block of num_speculative_tokens mask tokens; the draft was trained with block_size - 1.
    serve="# N: one less than block_size of config.json\n"
          "    vllm serve TARGET --speculative-config \\\n"
          "    '{{\"method\": \"dflash\", \"model\": \"{draft}\", \"num_speculative_tokens\": N}}'",
    nested_causal=True,
    mixed_layers="VLLM_USE_V2_MODEL_RUNNER=1",
    reduced_vocabulary=True,
    last_layer=True,
    rope_dialects=("rope_parameters", "rope_theta"),  # its get_config turns the old one into the new
)  # fmt: skip
