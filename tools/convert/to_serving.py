"""Writes a draft as the directory that a serving engine loads.

CHECKPOINT is a run's draft folder (runs/NAME/llama: its newest checkpoint, or --step best), or a directory that was
exported before. The target is not loaded: a run's folder says what has to be known of it.

    python tools/convert/to_serving.py runs/quickstart/llama served/ --engine sglang
    python tools/convert/to_serving.py runs/quickstart/llama/export tpu/ --engine tpu-inference --target TARGET

The directory for sglang serves vLLM as well, and Llama drafts also under sglang-jax; tpu-inference asks for other
names, hf is for other trainers and holds what no engine serves. A draft that the engine would not serve as it was
trained is refused with the reason. tools/convert/check.py looks at the result, or at any other draft.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from flaxdraft.errors import InputError
from flaxdraft.run.commands import Command, call

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="a run's draft folder, or an exported directory")
    parser.add_argument("out", type=Path, help="the directory to write")
    parser.add_argument(
        "--engine", help="one of the algorithm's, of EAGLE-3: sglang (if left out), vllm, sglang-jax, tpu-inference, hf"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the weights")
    parser.add_argument("--step", default="latest", help="of the checkpoint: a number, latest or best")
    parser.add_argument(
        "--target", type=Path, help="the target's directory or .gguf file, next to an exported directory"
    )


def main(argv: list[str] | None = None) -> int:
    """0 when the directory is written; 2 with one message for wrong input."""
    return call(Command(__doc__ or "", _arguments, _work), argv)


def _work(arguments: argparse.Namespace) -> None:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from flaxdraft.run.draft_source import open_draft
    from flaxdraft.serving.export import export_again
    from flaxdraft.serving.view import read_target_config

    target = None if arguments.target is None else read_target_config(arguments.target)
    if arguments.out.resolve() == arguments.checkpoint.resolve():
        raise InputError(f"{arguments.out}: is the source itself; choose another name")
    source = open_draft(arguments.checkpoint, step=arguments.step, target=target)
    engine = arguments.engine or source.draft.algorithm.settings.default_engine
    how = {"engine": engine, "dtype": DTYPES[arguments.dtype], "origin": source.origin}
    export_again(arguments.out, source.draft, source.target, **how)
    print(f"{arguments.out}: for {engine}, {arguments.dtype}")


if __name__ == "__main__":
    sys.exit(main())
