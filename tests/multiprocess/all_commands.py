"""One process of commands that ask a target: a training run, or all that may follow it, one after the other.

python all_commands.py FOLDER MESH train|others: FOLDER holds tiny.gguf, prompts.jsonl, run.yaml and chats.jsonl.
"""

import sys
from pathlib import Path

from flaxdraft.config import load_config
from flaxdraft.data import __main__ as data_command
from flaxdraft.data.talks import FILE
from flaxdraft.evaluate import __main__ as evaluate_command
from flaxdraft.run.run import run
from flaxdraft.run.target_options import mesh_shape, on_all_hosts


def train(root: Path, mesh: str) -> None:
    run(load_config(str(root / "run.yaml"), [f"mesh.{axis}={size}" for axis, size in mesh_shape(mesh).items()]))


def others(root: Path, mesh: str) -> None:
    """data regenerate, data capture, evaluate."""
    target = ("--target", str(root / "tiny.gguf"), "--mesh", mesh)
    limits = ("--max-new-tokens", "8", "--max-prompt-tokens", "60", "--rows", "2")
    answers = root / "answers"
    assert data_command.main(["regenerate", str(root / "chats.jsonl"), str(answers), *target, *limits]) == 0
    narrow = ("--taps-dtype", "float32", "--last-dtype", "float32", "--tap-layers", "0", "2", "5")
    assert data_command.main(["capture", str(answers / FILE), str(root / "store"), *target, *narrow]) == 0
    prompts = ("--prompts", str(root / "prompts.jsonl"), "--max-new-tokens", "8", "--chain", "2", "--rows", "2")
    out = ("--out", str(root / "evaluation"))
    assert evaluate_command.main([str(root / "out" / "llama"), *target, *prompts, *out]) == 0


if __name__ == "__main__":
    sys.modules["torch"] = None  # TensorBoard's writer would import it
    for command in (data_command, evaluate_command):
        command.on_all_hosts = lambda own: own() or 0  # the processes meet once
    commands = {"train": train, "others": others}[sys.argv[3]]
    sys.exit(on_all_hosts(lambda: commands(Path(sys.argv[1]), sys.argv[2])))
