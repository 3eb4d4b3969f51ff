"""vLLM (model_executor/models/llama_eagle3.py, v1/spec_decode/llm_base_proposer.py), since 0.16; with its older runner,
which it takes for such drafts by itself."""

from flaxdraft.algorithms.eagle3.serving.engines import vllm
from flaxdraft.algorithms.eagle3.serving.terms import Served
from flaxdraft.algorithms.peagle.serving.terms import serving

ENGINE = serving(
    vllm.ENGINE,
    # It puts `Eagle3` before every name that neither begins nor ends with it (transformers_utils/configs/eagle.py), and
    # knows no model by what comes of PeagleLlamaForCausalLM or PEagleDraftModel.
    Served(("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM"), ("fc_norm", "norm_before_fc", "norm_before_residual")),
    "vllm serve TARGET --speculative-config \\\n"
    "    '{{\"method\": \"eagle3\", \"model\": \"{draft}\", \"num_speculative_tokens\": {chain}, "
    "\"parallel_drafting\": true}}'",
)  # fmt: skip
