"""The whole command on a tiny target: both drafts, resume after a kill, nothing done twice, clear refusals."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from commands import tool
from safetensors.numpy import load_file, save_file
from test_contracts import DEEPSEEK_FIELDS, TARGET_HF
from tiny import random_weights, write_prompts

from flaxdraft.config import load_config
from flaxdraft.data.__main__ import main as data_main
from flaxdraft.errors import InputError
from flaxdraft.gguf_file import GGUFCheckpoint
from flaxdraft.lock import DirectoryLock
from flaxdraft.mesh import Sharding
from flaxdraft.precision import Precision
from flaxdraft.stages import claim
from flaxdraft.targets import deepseek
from flaxdraft.train import run_draft, run_results
from flaxdraft.train.__main__ import main


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, tiny_gguf):
    root = tmp_path_factory.mktemp("run")
    write_prompts(root / "prompts.jsonl", num_train=10, num_held_out=4)
    config = {
        "output_dir": str(root / "out"),
        "target": {"path": str(tiny_gguf)},
        "data": {"prompts": str(root / "prompts.jsonl"), "max_answer_tokens": 12, "rows": 4},
        "draft": {"draft_vocab_size": 64},
        "algorithm": {"ttt_length": 3},
        "train": {
            "num_steps": 8, "batch_size": 4, "learning_rate": 2e-3, "compute_dtype": "float32", "log_every": 2,
            "eval_every": 4, "checkpoint_every": 3,
        },
        "evaluate": {"max_new_tokens": 10, "chain_length": 3},
        "export": {"dtype": "float32"},
    }  # fmt: skip
    (root / "run.yaml").write_text(yaml.safe_dump(config))
    return root


def call(root: Path, *overrides: str) -> int:
    return main(["--config", str(root / "run.yaml"), *overrides])


@pytest.fixture(scope="module")
def finished(workspace):
    assert call(workspace, "evaluate.decode_prompts=4") == 0
    return workspace / "out"


def test_every_stage_leaves_its_result(finished):
    draft = finished / "llama"
    evaluation = json.loads((draft / "evaluation.json").read_text())["result"]
    assert evaluation["decoded"]["identical_answers"] == evaluation["answers"] == 4
    assert evaluation["teacher_forced"]["answers_with_the_decoded_passes"] == 4
    assert evaluation["decoded"]["accept_length"] == evaluation["teacher_forced"]["accept_length"] >= 1.0
    steps = [json.loads(line) for line in (draft / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in steps if m["kind"] == "train"] == [2, 4, 6, 8]
    held_out = [m for m in steps if m["kind"] == "held_out"]
    assert [m["step"] for m in held_out] == [0, 4, 8]
    assert all(m["accept_length_decoded"] == m["accept_length"] for m in held_out)  # of all four, by two ways
    assert steps[-2]["loss"] < steps[1]["loss"]
    report = (draft / "report" / "report.md").read_text()
    for name in ("loss", "accuracy", "accept_length", "acceptance", "accepted_lengths", "sample"):
        assert f"({name}.png)" in report
        assert (draft / "report" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_runs_folder_is_exported_as_the_run_did(finished, tmp_path, monkeypatch, capsys):
    """From checkpoint and record alone: no target is opened, and no byte differs."""
    monkeypatch.setattr("flaxdraft.targets.open_target", None)
    out = tmp_path / "served"
    assert tool("convert/to_serving").main([str(finished / "llama"), str(out), "--dtype", "fp32"]) == 0
    for path in (finished / "llama" / "export").iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes(), path.name
    assert "accept length" in (out / "README.md").read_text()
    assert tool("convert/check").main([str(out)]) == 0


def test_a_second_run_does_nothing_again(finished, workspace, monkeypatch, capfd):
    def never(*args, **kwargs):
        raise AssertionError("a finished stage ran again")

    for module, name in (
        (run_draft, "capture"), (run_draft, "Trainer"), (run_results, "decode_held_out"), (run_results, "export"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, never)
    assert call(workspace) == 0
    assert "accept length" in capfd.readouterr().out


def test_another_draft_shares_the_answers(finished, workspace, monkeypatch):
    monkeypatch.setattr(run_draft, "capture", None)
    assert call(workspace, "draft.architecture=mla") == 0
    config = json.loads((finished / "mla" / "export" / "config.json").read_text())
    assert config["architectures"] == ["Eagle3DeepseekV2ForCausalLM"]
    evaluation = json.loads((finished / "mla" / "evaluation.json").read_text())["result"]
    assert evaluation["decoded"]["identical_answers"] == 4
    assert evaluation["teacher_forced"]["answers_with_the_decoded_passes"] == 4


def test_training_goes_on_from_an_exported_draft(finished, workspace, monkeypatch, capfd):
    """Its first held-out loss is the last one of the run that made it; its vocabulary map comes along."""
    monkeypatch.setattr(run_draft, "capture", None)
    source = finished / "llama" / "export"
    more = ("name=more", f"draft.init_from={source}", "train.num_steps=2")
    assert call(workspace, *more) == 0
    lines = {
        name: [json.loads(line) for line in (finished / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("llama", "more")
    }
    held_out = {name: [m for m in found if m["kind"] == "held_out"] for name, found in lines.items()}
    assert held_out["more"][0]["loss"] == pytest.approx(held_out["llama"][-1]["loss"], rel=1e-6)
    before, after = (load_file(finished / name / "export" / "model.safetensors") for name in ("llama", "more"))
    np.testing.assert_array_equal(before["d2t"], after["d2t"])
    assert not np.array_equal(before["fc.weight"], after["fc.weight"])
    inputs = json.loads((finished / "more" / "inputs.json").read_text())
    assert sorted(inputs["draft"]["init_from"]) == ["config.json", "model.safetensors"]
    assert call(workspace, *more, "target.tap_layers=[0, 2, 4]", f"output_dir={finished}-taps") == 2
    assert "has tapped layers [1, 3, 4], this target [0, 2, 4]" in capfd.readouterr().err.replace("\n", " ")


def test_training_begins_with_the_weights_of_a_checkpoint(finished, workspace, tmp_path, monkeypatch, capfd):
    """Its first held-out loss is the last one of the run that made it; nothing else comes along."""

    def stop(self, graphdef, frozen, arrays, start):
        state = arrays["state"]
        assert (start, int(state.step), int(arrays["counters"]["tokens"][0])) == (0, 0, 0)
        raise InputError("that was enough")

    monkeypatch.setattr("flaxdraft.train.loop._Run.steps", stop)
    source = finished / "llama" / "checkpoints" / "latest"
    shutil.copytree(finished / "data", tmp_path / "data")
    assert call(workspace, f"output_dir={tmp_path}", f"draft.init_from={source}") == 2
    assert "that was enough" in capfd.readouterr().err
    last, first = (
        [
            m
            for m in map(json.loads, (root / "llama" / "metrics.jsonl").read_text().splitlines())
            if m["kind"] == "held_out"
        ]
        for root in (finished, tmp_path)
    )
    assert first[0]["loss"] == pytest.approx(last[-1]["loss"], rel=1e-6)


def test_changed_evaluation_is_done_anew_and_training_is_not(finished, workspace, monkeypatch):
    before = json.loads((finished / "llama" / "evaluation.json").read_text())
    copy = finished.with_name("copy")
    shutil.copytree(finished, copy)
    monkeypatch.setattr(run_draft, "capture", None)
    monkeypatch.setattr("flaxdraft.train.loop.make_train_step", lambda *args: None)
    assert call(workspace, f"output_dir={copy}", "evaluate.chain_length=2") == 0
    after = json.loads((copy / "llama" / "evaluation.json").read_text())
    assert after["result"]["chain_length"] == 2
    assert after["inputs"] != before["inputs"]


def test_a_killed_run_goes_on_and_ends_with_the_same_weights(finished, workspace, tmp_path):
    """Killed in training, right after a checkpoint; the resumed weights are those of the undisturbed run, bitwise."""
    out = tmp_path / "killed"
    shutil.copytree(finished / "data", out / "data")
    script = (
        "import os, signal, time, flaxdraft.train.loop as loop\n"
        "log = loop.Watch.log\n"
        "def killed(self, counters):\n"
        "    if self._pending[-1][0] + 1 == 6:\n"
        f"        while not os.path.isdir({str(out / 'llama' / 'checkpoints' / '4')!r}): time.sleep(0.01)\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    log(self, counters)\n"
        "loop.Watch.log = killed\n"
        "from flaxdraft.train.__main__ import main\n"
        f"main(['--config', {str(workspace / 'run.yaml')!r}, 'output_dir={out}'])\n"
    )
    killed = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True, timeout=300)
    assert killed.returncode == -9, killed.stderr
    checkpoints = sorted(p.name for p in (out / "llama" / "checkpoints").iterdir() if p.name.isdigit())
    assert checkpoints == ["3", "4"]  # the fourth step was evaluated, and was the best so far
    assert call(workspace, f"output_dir={out}") == 0
    want = load_file(finished / "llama" / "export" / "model.safetensors")
    got = load_file(out / "llama" / "export" / "model.safetensors")
    assert want.keys() == got.keys()
    for name, array in want.items():
        np.testing.assert_array_equal(got[name], array, err_msg=name)
    lines = [json.loads(line) for line in (out / "llama" / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in lines if m["kind"] == "train"] == [2, 4, 6, 8]


def test_a_killed_capture_goes_on(workspace, finished, tmp_path):
    """One finished chunk stays as it is, a half-written one is not taken for whole."""
    out = tmp_path / "partial"
    shutil.copytree(finished / "data", out / "data")
    (out / "data" / "data.json").unlink()
    (out / "data" / "train-00001.safetensors").unlink()
    (out / "data" / "train-00002.safetensors.tmp").write_bytes(b"half")
    kept = (out / "data" / "train-00000.safetensors").stat().st_mtime_ns
    assert call(workspace, f"output_dir={out}", "train.num_steps=1") == 0
    assert (out / "data" / "train-00000.safetensors").stat().st_mtime_ns == kept
    for name in ("train-00000", "train-00001", "train-00002"):
        want = load_file(finished / "data" / f"{name}.safetensors")
        got = load_file(out / "data" / f"{name}.safetensors")
        for key in want:
            np.testing.assert_array_equal(got[key], want[key], err_msg=f"{name} {key}")


@pytest.mark.parametrize(
    "mesh",
    [("mesh.fsdp=2", "mesh.tensor=2"), pytest.param(("mesh.data=2", "mesh.sequence=4"), marks=pytest.mark.slow)],
)
def test_the_whole_command_on_a_mesh(finished, workspace, tmp_path, mesh):
    """Training is spread, in two micro-batches a step, and its held-out losses are those of one device; decoding is on
    one device, also where a second run finds training done."""
    shutil.copytree(finished / "data", tmp_path / "data")
    assert call(workspace, f"output_dir={tmp_path}", *mesh, "train.accumulate=2") == 0
    lines = [
        [json.loads(line) for line in (out / "llama" / "metrics.jsonl").read_text().splitlines()]
        for out in (finished, tmp_path)
    ]
    want, got = ([line["loss"] for line in each if line["kind"] == "held_out"] for each in lines)
    assert got == pytest.approx(want, rel=1e-5)
    first = (tmp_path / "llama" / "evaluation.json").read_bytes()
    result = json.loads(first)["result"]
    assert result["decoded"]["identical_answers"] == result["answers"] == 4
    (tmp_path / "llama" / "evaluation.json").unlink()
    assert call(workspace, f"output_dir={tmp_path}", *mesh, "train.accumulate=2") == 0
    assert (tmp_path / "llama" / "evaluation.json").read_bytes() == first


def test_a_damaged_export_is_made_again(finished, workspace):
    whole = {path.name: path.read_bytes() for path in (finished / "llama" / "export").iterdir()}
    (finished / "llama" / "export" / "model.safetensors").write_bytes(whole["model.safetensors"][:100])
    (finished / "llama" / "export" / "config.json").unlink()
    assert call(workspace) == 0
    assert {path.name: path.read_bytes() for path in (finished / "llama" / "export").iterdir()} == whole


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"metrics.jsonl": b""}, r"metrics.jsonl: holds no held-out evaluation"),
        ({"metrics.jsonl": b'{"kind": "held_out"}\n'}, r"metrics.jsonl line 1: damaged; delete that line"),
        ({"metrics.jsonl": b"\xff\n"}, r"metrics.jsonl line 1: damaged"),
        (
            {"evaluation.json": b"", "checkpoints/8/state/_METADATA": b"", "checkpoints/8/state/manifest.ocdbt": b""},
            r"checkpoints/8: the checkpoint cannot be read .*take another one",
        ),
    ],
    ids=["empty metrics", "odd metrics", "binary metrics", "checkpoint"],
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of Orbax's reads beside a failing one
@pytest.mark.usefixtures("damaged_reads")
def test_a_damaged_result_is_named(finished, workspace, tmp_path, capfd, damage, message):
    out = tmp_path / "damaged"
    shutil.copytree(finished, out)
    for name, content in damage.items():
        assert (out / "llama" / name).exists()
        (out / "llama" / name).write_bytes(content)
    assert call(workspace, f"output_dir={out}", "train.resume=latest") == 2
    error = capfd.readouterr().err
    assert re.search(message, error), error


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of Orbax's reads beside a failing one
@pytest.mark.usefixtures("damaged_reads")
def test_a_damaged_checkpoint_is_passed_over(finished, workspace, tmp_path, capfd):
    """The run goes on from the one before it, and ends where it had ended."""
    out = tmp_path / "damaged"
    shutil.copytree(finished, out, symlinks=True)
    (out / "llama" / "export.json").unlink()
    (out / "llama" / "checkpoints" / "8" / "state" / "manifest.ocdbt").write_bytes(b"")
    assert call(workspace, f"output_dir={out}") == 0
    said = " ".join(capfd.readouterr().out.split())
    assert "warning: the checkpoint of step 8 cannot be read" in said
    assert "resuming at step 6" in said
    want, got = (load_file(root / "llama" / "export" / "model.safetensors") for root in (finished, out))
    for name, array in want.items():
        np.testing.assert_array_equal(got[name], array, err_msg=name)


def test_two_runs_in_one_folder_are_refused(finished, workspace, capfd):
    with DirectoryLock(finished / "llama"):
        assert call(workspace) == 2
    assert f"is in use by process {os.getpid()} on" in capfd.readouterr().err


def test_a_changed_field_is_forced_by_name(finished, workspace, tmp_path, capfd):
    out = tmp_path / "changed"
    shutil.copytree(finished, out, symlinks=True)
    more = (f"output_dir={out}", "train.num_steps=10")
    assert call(workspace, *more) == 2
    assert "train.num_steps: there 8, here 10" in capfd.readouterr().err
    assert call(workspace, *more, "--allow-change", "train.num_step") == 2
    assert "--allow-change: no field 'train.num_step'; did you mean 'train.num_steps'?" in capfd.readouterr().err
    assert call(workspace, *more, "--allow-change", "train.num_steps") == 0
    assert "resuming at step 8" in capfd.readouterr().out


def test_wrong_input_claims_nothing(tmp_path):
    claim(tmp_path / "x", {"a": 1}, "")
    claim(tmp_path / "x", {"a": 2}, "")
    (tmp_path / "x" / "result").write_text("")
    claim(tmp_path / "x", {"a": 2}, "")
    with pytest.raises(InputError, match=r"a: there 2, here 3"):
        claim(tmp_path / "x", {"a": 3}, "")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.learning_rate=0.5", r"train.learning_rate: there 0.002, here 0.5.*name="),
        ("data.max_answer_tokens=13", r"data.max_answer_tokens: there 12, here 13.*output_dir"),
        ("draft.architecture=mamba", r"draft.architecture: no 'mamba'"),
        ("algorithm.name=eagle9", r"algorithm.name: no 'eagle9'"),
        ("train.learning_rat=1", r"unknown key 'train.learning_rat'; did you mean 'learning_rate'"),
        ("train.num_steps=many", r"train.num_steps: found 'many'"),
        ("data.prompts=/nowhere.jsonl", r"data.prompts: cannot read /nowhere.jsonl"),
        ("data.num_prompts=11", r"data.num_prompts: found 11, .* has 10"),
        ("target.path=/nowhere.gguf", r"target.path: no file or directory /nowhere.gguf"),
        ("target.sha256='00'", r"sha256 is .* target.sha256 says 00"),
        ("output_dir=/proc/flaxdraft", r"output_dir: cannot write to /proc/flaxdraft"),
        ("target.tap_layers=[0,4,7]", r"target.tap_layers: .* holds the last layer, which SGLang cannot capture"),
        ("evaluate.max_new_tokens=120", r"evaluate.max_new_tokens: found 120; after the longest .* context of 128"),
        ("name=data", r"name: found 'data'; .*folder name"),
        ("mesh.data=3", r"train.batch_size: 4 rows cannot be split over mesh.data=3"),
        ("train.accumulate=8", r"train.batch_size: 4 rows cannot be split over train.accumulate=8; give a multiple"),
        ("train.resume=stepp", r"train.resume: found 'stepp', which is no directory; expected auto, latest"),
        ("draft.draft_vocab_size=999999", r"draft.draft_vocab_size"),
        ("draft.fields={hidden_sise: 8}", r"did you mean 'hidden_size'"),
    ],
)
def test_wrong_input_is_one_message_and_exit_code_2(finished, workspace, tmp_path, capfd, override, message):

    fresh = (
        [] if override.startswith(("train.learning_rate=", "data.max", "output_dir")) else [f"output_dir={tmp_path}"]
    )
    assert call(workspace, *fresh, override) == 2
    error = capfd.readouterr().err
    assert re.search(message, error), error
    assert "Traceback" not in error


def test_the_command_itself_reports_without_a_traceback(workspace):
    command = [sys.executable, "-m", "flaxdraft.train", "--config", str(workspace / "nothing.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONWARNINGS": ""})
    assert done.returncode == 2
    assert "nothing.yaml: cannot be read" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def deepseek_directory(tmp_path_factory, tiny_gguf):
    """A DeepSeek-V3 model directory with the tiny target's tokenizer."""
    directory = tmp_path_factory.mktemp("deepseek")
    tokenizer = GGUFCheckpoint(tiny_gguf).tokenizer()
    tokenizer.save_pretrained(directory)
    hf = TARGET_HF | DEEPSEEK_FIELDS | {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "vocab_size": len(tokenizer),
        "max_position_embeddings": 128, "tie_word_embeddings": False, "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(hf))
    config = deepseek.Config.from_hf(hf)
    weights = random_weights(deepseek, config, deepseek.groups(config, Precision(), Sharding.none()))
    save_file(weights, directory / "model.safetensors")
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["mla", "llama"])
def test_a_model_directory_of_another_family(workspace, deepseek_directory, tmp_path, architecture):
    few = ("train.num_steps=2", "train.eval_every=2", f"output_dir={tmp_path}", f"draft.architecture={architecture}")
    assert call(workspace, f"target.path={deepseek_directory}", *few) == 0
    evaluation = json.loads((tmp_path / architecture / "evaluation.json").read_text())["result"]
    assert evaluation["decoded"]["identical_answers"] == evaluation["answers"] == 4
    config = json.loads((tmp_path / architecture / "export" / "config.json").read_text())
    if architecture == "mla":  # its ranks are the target's
        names = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        assert {name: config[name] for name in names} == {name: DEEPSEEK_FIELDS[name] for name in names}
    else:
        assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (5, 5, 6)


def test_a_directory_without_a_tokenizer_is_refused(workspace, deepseek_directory, tmp_path, capfd):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(deepseek_directory / name, bare / name)
    assert call(workspace, f"target.path={bare}", f"output_dir={tmp_path / 'out'}") == 2
    assert "has no tokenizer, which it takes to ask the target" in capfd.readouterr().err.replace("\n", " ")


def test_packed_rows_train(finished, workspace, monkeypatch, capfd):
    monkeypatch.setattr(run_draft, "capture", None)
    assert call(workspace, "name=packed", "train.pack_length=128", "train.num_steps=4") == 0
    text = " ".join(capfd.readouterr().out.split())
    assert re.search(r"10 documents packed into \d+ rows of 128 tokens, \d+% full", text), text
    losses = [json.loads(line) for line in (finished / "packed" / "metrics.jsonl").read_text().splitlines()]
    held_out = [line["loss"] for line in losses if line["kind"] == "held_out"]
    assert held_out[-1] < held_out[0]


@pytest.fixture(scope="module")
def store(workspace, tiny_gguf):
    """A store of conversations that the tiny target answered."""
    rows = [json.loads(line) for line in (workspace / "prompts.jsonl").read_text().splitlines()]
    chats = [{"id": row["id"], "messages": [{"role": "user", "content": row["prompt"]}]} for row in rows]
    (workspace / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    target = ("--target", str(tiny_gguf), "--dtype", "float32")
    limits = ("--max-new-tokens", "20", "--max-prompt-tokens", "100")
    answers, out = workspace / "answers", workspace / "store"
    assert data_main(["regenerate", str(workspace / "chats.jsonl"), str(answers), *target, *limits]) == 0
    assert data_main(["capture", str(answers / "conversations.jsonl"), str(out), *target]) == 0
    return out


@pytest.fixture(scope="module")
def trained_on_the_store(workspace, store):
    """Metrics of a run on the store's rows, in buckets by length."""
    out = workspace / "on-store"
    assert call(workspace, f"data.store={store}", "train.num_steps=6", f"output_dir={out}") == 0
    return out


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "llama" / "metrics.jsonl").read_text().splitlines()]


def test_a_store_trains(trained_on_the_store):
    held_out = [line["loss"] for line in metrics(trained_on_the_store) if line["kind"] == "held_out"]
    assert held_out[-1] < held_out[0]
    assert not list((trained_on_the_store / "data").glob("train-*"))  # the held-out prompts alone were answered
    evaluation = json.loads((trained_on_the_store / "llama" / "evaluation.json").read_text())["result"]
    assert evaluation["decoded"]["identical_answers"] == evaluation["answers"] == 4


def test_conversations_train_to_what_their_store_gives(workspace, trained_on_the_store, tmp_path, capfd):
    """The target reads each batch on the training mesh. The store holds bfloat16, the target is asked in float32."""
    chats = f"data.conversations={workspace / 'answers' / 'conversations.jsonl'}"
    more = ("train.num_steps=6", f"output_dir={tmp_path}", "mesh.data=2")
    assert call(workspace, chats, *more) == 0
    assert "14 documents in rows of" in capfd.readouterr().out
    for got, want in zip(metrics(tmp_path), metrics(trained_on_the_store), strict=True):
        assert (got["kind"], got["step"]) == (want["kind"], want["step"])
        assert got["loss"] == pytest.approx(want["loss"], rel=2e-3)
        assert 0 <= got.get("data_wait", 0) <= 1


def test_a_store_trains_without_the_target(workspace, trained_on_the_store, store, monkeypatch, capfd):
    """Its files are there, its layers are never loaded, once the held-out prompts are answered; packed this time, and
    with a draft vocabulary from a file."""
    ids = np.arange(0, 256, 4)
    np.save(workspace / "d2t.npy", ids - np.arange(64))
    more = ("name=packed", "train.pack_length=128", "train.num_steps=6", f"draft.vocab_map={workspace / 'd2t.npy'}")
    config = load_config(
        str(workspace / "run.yaml"), [f"data.store={store}", f"output_dir={trained_on_the_store}", *more]
    )
    monkeypatch.setattr("flaxdraft.targets.load_state", None)
    stages = run_draft.Run(config)
    stages.claim_folders()
    stages.params  # noqa: B018 (training is what this property does)
    text = " ".join(capfd.readouterr().out.split())
    assert re.search(r"14 documents packed into \d+ rows of 128 tokens", text), text
    assert "the draft vocabulary of 64 holds" in text
    assert re.search(r"coverage by draft_vocab_size: 256 \d+.\d%", text), text


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("target.tap_layers=[0,2,4]",), r"tap_layers is \[1, 3, 4\], expected \[0, 2, 4\]"),
        (("data.store=/nowhere",), "/nowhere: no feature store"),
        (
            ("data.store=null", "data.conversations=/nowhere.jsonl", "mesh.sequence=2"),
            "mesh.sequence: features that the target makes while the draft trains",
        ),
        (("data.conversations=/nowhere.jsonl",), "data.store, data.conversations: both are given"),
        (("data.store=null", "data.conversations=/nowhere.jsonl"), "cannot read /nowhere.jsonl"),
    ],
)
def test_a_store_that_does_not_fit_is_refused(workspace, store, tmp_path, capfd, more, message):
    assert call(workspace, f"data.store={store}", f"output_dir={tmp_path}", "train.num_steps=6", *more) == 2
    assert re.search(message, " ".join(capfd.readouterr().err.split()))
