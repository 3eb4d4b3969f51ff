"""vLLM (model_executor/models/llama_eagle3.py, deepseek_eagle3.py; v1/worker/gpu/spec_decode/eagle/)."""

from flaxdraft.algorithms.eagle3.serving.terms import Engine, Served

ENGINE = Engine(
    title="vLLM 0.33.0",
    portable=True,
    serve="vllm serve TARGET --speculative-config \\\n"
          "    '{{\"method\": \"eagle3\", \"model\": \"{draft}\", \"num_speculative_tokens\": {chain}}}'",
    kinds={
        "llama": Served(
            (
                "LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM", "Eagle3MiniMaxM2ForCausalLM",
                "Eagle3Qwen2_5vlForCausalLM", "Eagle3Qwen3vlForCausalLM", "LlamaForCausalLM",
            ),
            ("fc_norm", "norm_output", "norm_before_fc", "norm_before_residual"),
        ),
        "mla": Served(
            (
                "Eagle3DeepseekV2ForCausalLM", "Eagle3DeepseekV3ForCausalLM", "DeepseekV2ForCausalLM",
                "DeepseekV3ForCausalLM",
            ),
            ("fc_norm", "norm_output"),
        ),
    },
    unknown_key="refused",
    missing_key="random",
    embedding="kept",
    shares_head=True,
    full_d2t="refused",
    not_null=("target_hidden_size", "draft_vocab_size"),
    reads_tied_head=False,
    attention_bias=True,
    # Its default runner reads the top level, and inside eagle_config another key.
    tap_fields=("eagle_aux_hidden_state_layer_ids", "eagle_config.layer_ids"),
    last_layer=True,
    rope_dialects=("rope_parameters", "rope_theta"),  # vLLM's get_config patches the old one into the new
    max_layers=None,
)  # fmt: skip
