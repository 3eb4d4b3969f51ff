"""What the training command refuses: one message that names the field, exit code 2, and nothing left behind."""

import json
import os
import re
import subprocess
import sys

import pytest
from safetensors.numpy import save_file
from test_contracts import TARGET_HF
from tiny_runs import call, make_workspace

from flaxdraft.config import load_config
from flaxdraft.errors import InputError
from flaxdraft.run.draft import check_draft
from flaxdraft.run.plan import plan
from flaxdraft.run.setup import claim_folders, prepare
from flaxdraft.run.target import RunTarget
from flaxdraft.stages.claims import claim


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, tiny_gguf):
    return make_workspace(tmp_path_factory.mktemp("run"), tiny_gguf)


def test_wrong_input_claims_nothing(tmp_path):
    claim(tmp_path / "x", {"a": 1}, "")
    claim(tmp_path / "x", {"a": 2}, "")
    (tmp_path / "x" / "result").write_text("")
    claim(tmp_path / "x", {"a": 2}, "")
    with pytest.raises(InputError, match=r"a: there 2, here 3"):
        claim(tmp_path / "x", {"a": 3}, "")


@pytest.fixture(scope="module")
def claimed(workspace):
    """Folders that another run has begun to fill."""
    config = load_config(str(workspace / "run.yaml"), [])
    claim_folders(prepare(config))
    (config.draft_dir / "metrics.jsonl").touch()
    (config.draft_dir.parent / "data" / "train-00000.safetensors").touch()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.learning_rate=0.5", r"train.learning_rate: there 0.002, here 0.5.*name="),
        ("data.max_answer_tokens=13", r"data.max_answer_tokens: there 12, here 13.*output_dir"),
        # Features that lie beside answers are of an algorithm's own layers.
        ("algorithm.name=dflash", r"target.tap_layers: there None, here 'those of dflash'.*output_dir"),
    ],
)
@pytest.mark.usefixtures("claimed")
def test_another_configuration_is_refused(workspace, capfd, override, message):
    assert call(workspace, override) == 2
    error = capfd.readouterr().err
    assert re.search(message, error), error


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("draft.architecture=mamba", r"draft.architecture: no 'mamba'"),
        ("algorithm.name=eagle9", r"algorithm.name: no 'eagle9'"),
        ("train.learning_rat=1", r"unknown key 'train.learning_rat'; did you mean 'learning_rate'"),
        ("train.num_steps=many", r"train.num_steps: found 'many'"),
        ("data.prompts=/nowhere.jsonl", r"data.prompts: cannot read /nowhere.jsonl"),
        ("data.num_prompts=11", r"data.num_prompts: found 11, .* has 10"),
        ("target.path=/nowhere.gguf", r"target.path: no file or directory /nowhere.gguf"),
        ("target.sha256='00'", r"sha256 is .* target.sha256 says 00"),
        ("output_dir=/proc/flaxdraft", r"output_dir: cannot write to /proc/flaxdraft"),
        (
            "target.tap_layers=[0,4,7]",
            r"export for SGLang .*: layer 7 is the target's last, .* layers up to 6 \(target.tap_layers\)",
        ),
        ("evaluate.max_new_tokens=120", r"evaluate.max_new_tokens: found 120; after the longest .* context of 128"),
        ("name=data", r"name: found 'data'; .*folder name"),
        ("mesh.data=3", r"train.batch_size: 4 rows cannot be split over mesh.data=3"),
        ("target.mesh.fsdp=9", r"target.mesh: fsdp=9 takes 9 devices, 8 are visible"),
        ("target.mesh.tensor=4", r"target.mesh.tensor: 4 devices do not divide num_key_value_heads \(2,\)"),
        ("train.accumulate=8", r"train.batch_size: 4 rows cannot be split over train.accumulate=8; give a multiple"),
        ("train.resume=stepp", r"train.resume: found 'stepp', which is no directory; expected auto, latest"),
        ("train.resume=best", r"train.resume: best, but .*checkpoints holds no complete checkpoint"),
        ("train.resume=step 3", r"train.resume: step 3, but .*checkpoints holds no complete checkpoint"),
        ("draft.draft_vocab_size=999999", r"draft.draft_vocab_size"),
        (
            "export.engine=tensorrt",
            r"export.engine: no 'tensorrt'; known are hf, sglang, sglang-jax, tpu-inference, vllm",
        ),
        (
            "draft.fields={norm_before_residual: true}",
            r"export for SGLang .*: it ignores norm_before_residual; take .*export.engine",
        ),
        ("draft.fields={hidden_sise: 8}", r"did you mean 'hidden_size'"),
    ],
)
def test_wrong_input_is_one_message_and_exit_code_2(workspace, tmp_path, capfd, override, message):
    fresh = [] if override.startswith("output_dir") else [f"output_dir={tmp_path}"]
    assert call(workspace, *fresh, override) == 2
    error = capfd.readouterr().err
    assert re.search(message, error), error
    assert "Traceback" not in error
    assert not list(tmp_path.glob("data/*.safetensors"))  # before the target is asked anything


@pytest.mark.parametrize("engine", ["vllm", "hf"])
def test_the_last_layer_is_tapped_for_an_engine_that_can(workspace, tmp_path, engine):
    wanted = [f"output_dir={tmp_path}", "target.tap_layers=[0,4,7]", f"export.engine={engine}"]
    setup = prepare(load_config(str(workspace / "run.yaml"), wanted))
    target = RunTarget(setup)
    check_draft(setup, target)
    assert target.config.tap_layers == (0, 4, 7)


def test_a_plan_of_a_run_that_would_be_refused_is_refused(workspace, tmp_path, monkeypatch):
    """Before its step is compiled; the engine that is named is the one that the export is for."""
    monkeypatch.setattr("flaxdraft.run.plan.estimate", None)
    wanted = [f"output_dir={tmp_path}", "target.tap_layers=[1,3,7]", "export.engine=sglang-jax"]
    with pytest.raises(InputError, match=r"export for sglang-jax .*: layer 7 is the target's last"):
        plan(load_config(str(workspace / "run.yaml"), wanted))


def test_a_map_that_is_none_is_refused_before_the_target_answers(workspace, tmp_path, capfd):
    (tmp_path / "map.npy").write_text("d2t")
    assert call(workspace, f"output_dir={tmp_path}", f"draft.vocab_map={tmp_path / 'map.npy'}") == 2
    error = " ".join(capfd.readouterr().err.split())
    assert "map.npy (not a whole .npy file); expected a .npy file of offsets" in error
    assert not list(tmp_path.glob("data/*.safetensors"))


def test_the_command_itself_reports_without_a_traceback(workspace):
    command = [sys.executable, "-m", "flaxdraft.train", "--config", str(workspace / "nothing.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONWARNINGS": ""})
    assert done.returncode == 2
    assert "nothing.yaml: cannot be read" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_directory_without_a_tokenizer_is_refused(workspace, tmp_path, capfd):
    bare = tmp_path / "bare"
    bare.mkdir()
    hf = TARGET_HF | {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rope_theta": 1e4}
    (bare / "config.json").write_text(json.dumps(hf))
    save_file({}, bare / "model.safetensors")  # no weight is asked for
    assert call(workspace, f"target.path={bare}", f"output_dir={tmp_path / 'out'}") == 2
    assert "has no tokenizer, which it takes to ask the target" in capfd.readouterr().err.replace("\n", " ")
