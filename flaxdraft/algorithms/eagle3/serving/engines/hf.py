"""No engine: the directory as transformers' configuration classes and other trainers read it.

What no engine serves can still be kept in this form and trained further.
"""

from flaxdraft.algorithms.eagle3.serving.terms import SWITCHES, Engine, Served

ENGINE = Engine(
    title="Hugging Face layout",
    kinds={
        "llama": Served(("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM", "LlamaForCausalLM"), SWITCHES),
        "mla": Served(
            ("Eagle3DeepseekV2ForCausalLM", "DeepseekV3ForCausalLMEagle3", "Eagle3DeepseekV3ForCausalLM"), SWITCHES
        ),
    },
    serve=None,
    unknown_key="skipped",
    missing_key="random",
    embedding="replaced",
    full_d2t="required",  # trainers ask for both tables always
    required_fields=("draft_vocab_size",),
    tap_fields=("eagle_aux_hidden_state_layer_ids", "eagle_config.eagle_aux_hidden_state_layer_ids"),
    last_layer=True,
    rope_dialects=("rope_parameters", "rope_theta"),
    rope_types=("default", "linear", "dynamic", "llama3", "yarn"),
)
