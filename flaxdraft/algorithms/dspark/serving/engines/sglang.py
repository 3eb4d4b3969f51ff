"""SGLang (srt/models/dspark.py, srt/speculative/dspark_components), since 0.5.16."""

from flaxdraft.algorithms.dflash.serving.engines import sglang
from flaxdraft.algorithms.dspark.serving.temperatures import NAME, temperatures
from flaxdraft.algorithms.dspark.serving.terms import Engine
from flaxdraft.serving.contract import like

ENGINE = like(
    sglang.ENGINE, Engine, architecture="Qwen3DSparkModel", samples_from_anchor=True, top_level=True, plain_logits=True,
    files={NAME: temperatures},
    # It verifies so many draft tokens as a block has, one token more; the temperatures are for its ragged verification.
    serve="python -m sglang.launch_server --model-path TARGET --speculative-algorithm DSPARK \\\n"
          "    --speculative-draft-model-path {draft}\n"
          "    # with SGLANG_RAGGED_VERIFY_MODE other than static, where the run fitted them:\n"
          "    #   --speculative-dspark-confidence-sts-path {draft}/" + NAME,
)  # fmt: skip
