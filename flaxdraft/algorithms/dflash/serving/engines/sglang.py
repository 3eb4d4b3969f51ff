"""SGLang (srt/models/dflash.py), since 0.5.11."""

from flaxdraft.algorithms.dflash.serving.terms import Engine

ENGINE = Engine(
    title="SGLang 0.5.23",
    portable=True,
    # The size of a block is read from config.json.
    serve="python -m sglang.launch_server --model-path TARGET --speculative-algorithm DFLASH \\\n"
          "    --speculative-draft-model-path {draft}",
    model_prefix=True,
    scales_logits=True,
    rope_dialects=("rope_parameters", "rope_theta"),
)  # fmt: skip
