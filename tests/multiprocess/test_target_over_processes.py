"""A target whose weights lie in two processes: every command gives what it gives in one process with both devices."""

import json
import os
import subprocess
import sys
from pathlib import Path

import all_commands
import numpy as np
import pytest
import yaml
from closeness import assert_close
from compiling import FAST
from launch import finish, free_port
from tiny import write_prompts
from tiny_runs import make_workspace

from flaxdraft.data.store import FeatureStore
from flaxdraft.files.safetensors_file import load_safetensors

# By default a target lies over eight devices of a process (multidevice/test_target_sharding.py), and two processes
# train and evaluate.
pytestmark = pytest.mark.slow
SCRIPT, MESH = Path(all_commands.__file__), "fsdp=2"
SHORT = {"num_steps": 2, "eval_every": 2, "checkpoint_every": 2, "batch_size": 2, "length_buckets": 1}


def workspace(root: Path, target: Path) -> Path:
    root.mkdir()
    (root / "tiny.gguf").symlink_to(target)
    make_workspace(root, root / "tiny.gguf")
    write_prompts(root / "prompts.jsonl", num_train=4, num_held_out=2)
    config = yaml.safe_load((root / "run.yaml").read_text())
    config["train"] |= SHORT
    config["data"]["feature_dtype"] = "float32"  # one rounding more would be seen in the losses
    (root / "run.yaml").write_text(yaml.safe_dump(config))
    chats = [{"id": str(i), "messages": [{"role": "user", "content": f"and {i}"}]} for i in range(3)]
    (root / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    return root


def start(root: Path, commands: str) -> list[subprocess.Popen]:
    """Two processes of some commands, with a device each."""
    port, processes = free_port(), []
    for index in (0, 1):
        own = os.environ | FAST | {
            "JAX_NUM_CPU_DEVICES": "1", "JAX_PLATFORMS": "cpu", "PYTHONWARNINGS": "ignore",
            "FLAXDRAFT_COORDINATOR": f"localhost:{port}", "FLAXDRAFT_NUM_PROCESSES": "2",
            "FLAXDRAFT_PROCESS_ID": str(index),
        }  # fmt: skip
        with (root / f"output-{index}.txt").open("ab") as output:
            command = [sys.executable, str(SCRIPT), str(root), MESH, commands]
            processes.append(subprocess.Popen(command, env=own, stdout=output, stderr=output))
    return processes


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_gguf) -> tuple[Path, Path]:
    """The folders of one process and of two, after a run."""
    root = tmp_path_factory.mktemp("commands")
    one, two = (workspace(root / name, tiny_gguf) for name in ("one", "two"))
    all_commands.train(one, MESH)
    end(two, "train")
    return one, two


@pytest.fixture(scope="module")
def ended(trained) -> tuple[Path, Path]:
    """After the other commands."""
    all_commands.others(trained[0], MESH)
    end(trained[1], "others")
    return trained


def end(root: Path, commands: str) -> None:
    codes = finish(start(root, commands))
    assert codes == [0, 0], "\n".join(path.read_text()[-3000:] for path in root.glob("output-*.txt"))


def read(root: Path, name: str):
    return json.loads((root / name).read_text())


def test_answers_are_the_same(trained):
    one, two = trained
    for split in ("train", "held_out"):
        assert read(two, f"out/data/{split}.json") == read(one, f"out/data/{split}.json")
        paths = sorted((one / "out" / "data").glob(f"{split}-*.safetensors"))
        assert paths
        for path in paths:
            want, got = load_safetensors(path), load_safetensors(two / "out" / "data" / path.name)
            assert got.keys() == want.keys()
            for name in ("tokens", "lengths", "num_prompt"):
                np.testing.assert_array_equal(got[name], want[name])
            for name in ("taps_BT3E", "last_BTE"):
                assert_close(got[name], want[name], ulp=80)


def test_the_trained_draft_is_the_same(trained):
    one, two = (load_safetensors(root / "out" / "llama" / "export" / "model.safetensors") for root in trained)
    assert_close(two, one, ulp=80, of="norm")
    lines = [(root / "out" / "llama" / "metrics.jsonl").read_text().splitlines() for root in trained]
    for mine, other in zip(*(map(json.loads, each) for each in lines), strict=True):
        assert (mine["step"], mine["kind"]) == (other["step"], other["kind"])
        assert_close(mine["loss"], other["loss"], ulp=80, dtype=np.float32)


def assert_same_evaluation(one, two):
    assert one["decoded"] == two["decoded"]
    assert one["decoded"]["identical_answers"] == one["answers"] == 2
    assert_close(one["teacher_forced"]["loss"], two["teacher_forced"]["loss"], ulp=80, dtype=np.float32)
    for name in ("target_passes", "accept_length", "accuracy"):
        assert one["teacher_forced"][name] == two["teacher_forced"][name]


def test_the_runs_evaluation_is_the_same(trained):
    assert_same_evaluation(*(read(root, "out/llama/evaluation.json")["result"] for root in trained))


def test_the_first_process_alone_speaks(trained):
    said = [(trained[1] / f"output-{index}.txt").read_text() for index in (0, 1)]
    assert "the target answers the prompts" in said[0]
    assert "the target answers the prompts" not in said[1]


def test_the_commands_evaluation_is_the_same(ended):
    assert_same_evaluation(*(read(root, "evaluation/results.json")["chains"][0] for root in ended))


def test_conversations_and_stores_are_the_same(ended):
    one, two = ((root / "answers" / "conversations.jsonl").read_text() for root in ended)
    assert len(one.splitlines()) == 3
    assert sorted(two.splitlines()) == sorted(one.splitlines())
    stores = [FeatureStore(root / "store") for root in ended]
    for number in range(3):
        mine, other = (store.row(number) for store in stores)
        np.testing.assert_array_equal(mine.tokens, other.tokens)
        assert_close(mine.features, other.features, ulp=80)
