"""What vLLM's own configuration code makes of drafts, run by a Python that has vLLM: python parse_with_vllm.py FOLDER

The folder holds `target`, drafts, and asked.json: of each draft by its folder's name vLLM's speculative configuration,
but for the path. What vLLM understood, or the error with which it stopped, goes into told.json. No weight is loaded.
"""

import json
import os
import sys
from pathlib import Path

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}

import interpreted_triton  # noqa: F401 (for what it does)
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.models.registry import ModelRegistry
from vllm.v1.worker.gpu.spec_decode.eagle.eagle3_utils import get_eagle3_aux_layers_from_config
from vllm.v1.worker.gpu.spec_decode.utils import get_parallel_drafting_token_id


def understood(folder: Path, speculative: dict) -> dict:
    # The older runner knows no DSpark and no DFlash2, and is the one for parallel drafts of EAGLE-3's method.
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = str(int(speculative["method"] in ("dflash", "dspark")))
    arguments = EngineArgs(
        model=str(folder / "target"), dtype="float32", enforce_eager=True, max_model_len=64, skip_tokenizer_init=True,
        speculative_config=speculative,
    )  # fmt: skip
    found = arguments.create_engine_config().speculative_config
    draft = found.draft_model_config
    model, _ = ModelRegistry.resolve_model_cls(draft.architectures, draft)
    return {
        "class": model.__name__, "method": found.method, "tokens": found.num_speculative_tokens,
        "parallel": found.parallel_drafting, "inputs": [*(get_eagle3_aux_layers_from_config(found) or ())],
        "mask": get_parallel_drafting_token_id(draft.hf_config), "config": draft.hf_config.to_dict(),
    }  # fmt: skip


def told_of(folder: Path, draft: str, speculative: dict) -> dict:
    try:
        return understood(folder, speculative | {"model": str(folder / draft)})
    except Exception as error:  # whatever it stops with is what is asked for
        return {"error": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    asked = json.loads((folder / "asked.json").read_text())
    told = {draft: told_of(folder, draft, speculative) for draft, speculative in asked.items()}
    (folder / "told.json").write_text(json.dumps(told, default=str))
