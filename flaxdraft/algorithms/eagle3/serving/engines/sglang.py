"""SGLang (srt/models/llama_eagle3.py, kimi_k25_eagle3.py; srt/speculative/)."""

from flaxdraft.algorithms.eagle3.serving.terms import Engine, Served

ENGINE = Engine(
    title="SGLang 0.5.23",
    portable=True,
    serve="python -m sglang.launch_server --model-path TARGET --speculative-algorithm EAGLE3 \\\n"
          "    --speculative-draft-model-path {draft} --speculative-num-steps {chain} --speculative-eagle-topk 1 \\\n"
          "    --speculative-num-draft-tokens {verified}",
    kinds={
        "llama": Served(
            ("LlamaForCausalLMEagle3",), ("fc_norm", "norm_output", "norm_before_fc"), model_prefix=True
        ),
        "mla": Served(("Eagle3DeepseekV2ForCausalLM",), ("fc_norm", "norm_output")),
    },
    unknown_key="skipped",
    missing_key="random",
    embedding="replaced",
    other_names={"fc_norm": "use_aux_norm"},
    required_fields=("draft_vocab_size",),
    not_null=("target_hidden_size", "draft_vocab_size"),
    # Its capture reads this place alone; whatever goes wrong there makes it fall back to its default in silence.
    tap_fields=("eagle_config.eagle_aux_hidden_state_layer_ids",),
    rope_dialects=("rope_parameters", "rope_theta"),
    max_layers=None,
)  # fmt: skip
