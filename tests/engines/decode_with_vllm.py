"""Greedy decoding in vLLM with a draft, run by a Python that has vLLM: python decode_with_vllm.py FOLDER

The folder holds `target`, drafts, and asked.json: prompts as token ids, the longest answer, drafts and how vLLM is told
of each, and whether its newer runner is to run (interpreted_triton.py). What vLLM answers and how many target passes it
took goes into told.json.
"""

import json
import os
import sys
from pathlib import Path

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}

FOLDER = Path(sys.argv[1])
ASKED = json.loads((FOLDER / "asked.json").read_text())
if ASKED["interpreted"]:
    import interpreted_triton  # noqa: F401 (for what it does)

from vllm import LLM, SamplingParams  # noqa: E402 (the interpreter comes before it)
from vllm.inputs import TokensPrompt  # noqa: E402


def decoded(folder: Path, asked: dict, draft: str) -> dict:
    llm = LLM(
        model=str(folder / "target"), dtype="float32", enforce_eager=True, max_model_len=128, max_num_seqs=16,
        enable_prefix_caching=False, disable_log_stats=False, skip_tokenizer_init=True,
        speculative_config=asked["speculative"] | {"model": str(folder / draft)},
    )  # fmt: skip
    prompts = [TokensPrompt(prompt_token_ids=prompt) for prompt in asked["prompts"]]
    sampling = SamplingParams(temperature=0, max_tokens=asked["limit"], ignore_eos=True, detokenize=False)
    answers = [list(one.outputs[0].token_ids) for one in llm.generate(prompts, sampling)]
    counts = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    passes, accepted = (int(counts[f"vllm:spec_decode_num_{name}"]) for name in ("drafts", "accepted_tokens"))
    return {"answers": answers, "passes": passes, "accepted": accepted}


if __name__ == "__main__":
    told = {draft: decoded(FOLDER, ASKED, draft) for draft in ASKED["drafts"]}
    (FOLDER / "told.json").write_text(json.dumps(told))
