"""vLLM's OpenAI server, run by a Python that has vLLM: python serve_with_vllm.py FOLDER PORT

FOLDER is a target with its tokenizer; the server calls it `target`.
"""

import os
import runpy
import sys

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}

if __name__ == "__main__":
    folder, port = sys.argv[1:]
    sys.argv[1:] = [
        "--model", folder, "--served-model-name", "target", "--host", "127.0.0.1", "--port", port, "--dtype", "float32",
        "--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "16", "--no-enable-prefix-caching",
    ]  # fmt: skip
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")
