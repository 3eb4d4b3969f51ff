"""vLLM (model_executor/models/qwen3_dspark.py), since 0.25.0; of the Markov heads it has the plain one."""

from flaxdraft.algorithms.dflash.serving.engines import vllm
from flaxdraft.algorithms.dspark.serving.temperatures import NAME, temperatures
from flaxdraft.algorithms.dspark.serving.terms import Engine
from flaxdraft.serving.contract import like

ENGINE = like(
    vllm.ENGINE, Engine, architecture="Qwen3DSparkModel", samples_from_anchor=True, top_level=True, plain_logits=True,
    head_types=("vanilla",), nested_anchor=False, model_prefix=False, files={NAME: temperatures},
    # It proposes num_speculative_tokens, every slot of the block.
    serve="# N: block_size of config.json\n"
          "    vllm serve TARGET --speculative-config \\\n"
          "    '{{\"method\": \"dspark\", \"model\": \"{draft}\", \"num_speculative_tokens\": N}}'",
)  # fmt: skip
