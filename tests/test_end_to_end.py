"""The whole command on a tiny target: both drafts, resume after a kill, nothing done twice, damage named or mended."""

import json
import os
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from closeness import assert_close
from commands import tool
from safetensors.numpy import load_file
from tiny_runs import call, make_workspace, metrics

from flaxdraft.algorithms.loading import from_pretrained
from flaxdraft.errors import InputError
from flaxdraft.run import answers, results, run, training
from flaxdraft.run.draft_source import open_draft
from flaxdraft.stages.directory_lock import directory_lock


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, tiny_gguf):
    return make_workspace(tmp_path_factory.mktemp("run"), tiny_gguf)


@pytest.fixture(scope="module")
def finished(workspace):
    assert call(workspace, "evaluate.decode_prompts=4") == 0
    return workspace / "out"


def assert_same_end(one, other):
    """The last weights of two runs are the same, bit by bit."""
    got, want = (open_draft(root / "llama", step="8").draft.params for root in (one, other))
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_every_stage_leaves_its_result(finished):
    draft = finished / "llama"
    evaluation = json.loads((draft / "evaluation.json").read_text())["result"]
    assert evaluation["decoded"]["identical_answers"] == evaluation["answers"] == 4
    assert evaluation["teacher_forced"]["answers_with_the_decoded_passes"] == 4
    assert evaluation["decoded"]["accept_length"] == evaluation["teacher_forced"]["accept_length"] >= 1.0
    steps, held_out = metrics(draft, "train"), metrics(draft, "held_out")
    assert [m["step"] for m in steps] == [2, 4, 6, 8]
    assert [m["step"] for m in held_out] == [0, 4, 8]
    assert all(m["accept_length_decoded"] == m["accept_length"] for m in held_out)  # of all four, by two ways
    assert steps[-1]["loss"] < steps[0]["loss"]
    best, last = held_out[1:]
    assert best["accept_length_decoded"] > last["accept_length_decoded"]
    assert evaluation["checkpoint"].items() >= {"step": 4, "last": 8}.items()
    assert evaluation["decoded"]["accept_length"] == best["accept_length_decoded"]
    report = (draft / "report" / "report.md").read_text()
    assert "- checkpoint: step 4 of 8, the best held-out score" in report
    for name in ("loss", "accuracy", "accept_length", "acceptance", "accepted_lengths", "sample"):
        assert f"({name}.png)" in report
        assert (draft / "report" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_runs_folder_is_exported_as_the_run_did(finished, tmp_path, monkeypatch, capsys):
    """From checkpoint and record alone: no target is opened, and no byte differs."""
    monkeypatch.setattr("flaxdraft.targets.open_target", None)
    out = tmp_path / "served"
    arguments = [str(finished / "llama"), str(out), "--dtype", "fp32", "--step", "best"]
    assert tool("convert/to_serving").main(arguments) == 0
    for path in (finished / "llama" / "export").iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes(), path.name
    assert "accept length" in (out / "README.md").read_text()
    assert tool("convert/check").main([str(out)]) == 0


def test_a_run_whose_draft_changed_answers_ends_with_one(finished, workspace, monkeypatch, capfd):
    """All stages are done, and said, before."""
    choice = {"token": 5, "text": "x", "logit": 1.0}
    wrong = {"question": "p", "turn": 0, "position": 2, "own": choice, "drafted": choice, "distance": 99.0,
             "rounding": 1.0, "near_tie": False}  # fmt: skip
    evaluate = run.evaluate_draft

    def spoilt(*args):
        found = evaluate(*args)
        return found | {"decoded": found["decoded"] | {"differences": [wrong]}}

    monkeypatch.setattr(run, "evaluate_draft", spoilt)
    assert call(workspace, "evaluate.decode_prompts=4") == 1
    said = capfd.readouterr()
    assert "of the answers with the draft 1 differ from the target's own by more than rounding" in said.err
    assert "answers identical to the target's own" in " ".join(said.out.split())


def test_a_second_run_does_nothing_again(finished, workspace, monkeypatch, capfd):
    def never(*args, **kwargs):
        raise AssertionError("a finished stage ran again")

    for module, name in (
        (answers, "capture"), (training, "Trainer"), (results, "measure"), (results, "export"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, never)
    assert call(workspace) == 0
    assert "accept length" in capfd.readouterr().out


@pytest.mark.slow  # by default test_stored_answers.py says what shares answers
def test_another_draft_shares_the_answers(finished, workspace, monkeypatch):
    monkeypatch.setattr(answers, "capture", None)
    assert call(workspace, "draft.architecture=mla") == 0
    config = json.loads((finished / "mla" / "export" / "config.json").read_text())
    assert config["architectures"] == ["Eagle3DeepseekV2ForCausalLM"]
    evaluation = json.loads((finished / "mla" / "evaluation.json").read_text())["result"]
    assert evaluation["decoded"]["identical_answers"] == 4
    assert evaluation["teacher_forced"]["answers_with_the_decoded_passes"] == 4


@pytest.mark.slow
def test_training_goes_on_from_an_exported_draft(finished, workspace, monkeypatch, capfd):
    """Its first held-out loss is that of the step that was exported, the best; its vocabulary map comes along."""
    monkeypatch.setattr(answers, "capture", None)
    source = finished / "llama" / "export"
    more = ("name=more", f"draft.init_from={source}", "train.num_steps=2")
    assert call(workspace, *more) == 0
    best, first = metrics(finished / "llama", "held_out")[1], metrics(finished / "more", "held_out")[0]
    assert_close(first["loss"], best["loss"], ulp=8, dtype=np.float32)
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
    last, first = metrics(finished / "llama", "held_out")[-1], metrics(tmp_path / "llama", "held_out")[0]
    assert_close(first["loss"], last["loss"], ulp=8, dtype=np.float32)


def untrained(monkeypatch):
    """From here on a step of training is an error."""
    monkeypatch.setattr("flaxdraft.train.loop.make_train_step", lambda *args: None)


def test_another_step_is_evaluated_and_exported_where_it_is_asked_for(finished, workspace, monkeypatch, capfd):
    copy = finished.with_name("latest")
    shutil.copytree(finished, copy, symlinks=True)
    untrained(monkeypatch)
    assert call(workspace, f"output_dir={copy}", "export.step=latest") == 0
    said = " ".join(capfd.readouterr().out.split())
    assert "evaluate step 8: 4 held-out prompts" in said
    assert "export step 8: " in said
    evaluation = json.loads((copy / "llama" / "evaluation.json").read_text())["result"]
    assert evaluation["decoded"]["accept_length"] == metrics(copy / "llama", "held_out")[-1]["accept_length"]
    exported, last = from_pretrained(copy / "llama" / "export"), open_draft(copy / "llama", step="8").draft
    jax.tree.map(np.testing.assert_array_equal, exported.params, last.params)
    assert "| checkpoint | step 8 |" in (copy / "llama" / "export" / "README.md").read_text()
    # A finished run needs its checkpoints no more.
    shutil.rmtree(copy / "llama" / "checkpoints")
    monkeypatch.setattr(training, "Trainer", None)
    assert call(workspace, f"output_dir={copy}", "export.step=latest") == 0


@pytest.mark.slow
def test_a_finished_run_goes_back_to_the_step_that_is_asked_for(finished, workspace, monkeypatch, capfd):
    """Once: the same command then shows what that gave. An older checkpoint than those left is refused."""
    copy = finished.with_name("back")
    shutil.copytree(finished, copy, symlinks=True)
    before = (copy / "llama" / "evaluation.json").read_bytes()
    assert call(workspace, f"output_dir={copy}", "train.resume=step 5") == 2
    assert "train.resume: step 5, but" in " ".join(capfd.readouterr().err.split())
    command = (f"output_dir={copy}", "train.resume=step 6", "export.step=latest", "evaluate.decode_prompts=4")
    assert call(workspace, *command) == 0
    said = " ".join(capfd.readouterr().out.split())
    assert "the checkpoint of step 8 is newer than what this run goes on from" in said
    assert "resuming at step 6" in said
    assert "evaluate step 8: 4 held-out prompts" in said
    assert (copy / "llama" / "checkpoints" / "8.superseded").is_dir()
    assert_same_end(copy, finished)
    assert (copy / "llama" / "evaluation.json").read_bytes() != before
    monkeypatch.setattr(training, "Trainer", None)
    assert call(workspace, *command) == 0
    assert "accept length" in capfd.readouterr().out


@pytest.mark.slow
def test_changed_evaluation_is_done_anew_and_training_is_not(finished, workspace, monkeypatch):
    before = json.loads((finished / "llama" / "evaluation.json").read_text())
    copy = finished.with_name("copy")
    shutil.copytree(finished, copy)
    monkeypatch.setattr(answers, "capture", None)
    untrained(monkeypatch)
    assert call(workspace, f"output_dir={copy}", "evaluate.chain_length=2") == 0
    after = json.loads((copy / "llama" / "evaluation.json").read_text())
    assert after["result"]["chain_length"] == 2
    assert after["inputs"] != before["inputs"]


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_with_the_same_weights(finished, workspace, tmp_path):
    """Killed in training, right after a checkpoint; the resumed weights are those of the undisturbed run, bitwise."""
    out = tmp_path / "killed"
    shutil.copytree(finished / "data", out / "data")
    script = (
        "import os, signal, time, flaxdraft.train.loop as loop\n"
        "log = loop.Meters.log\n"
        "def killed(self, counters):\n"
        "    if self._pending[-1][0] + 1 == 6:\n"
        f"        while not os.path.isdir({str(out / 'llama' / 'checkpoints' / '4')!r}): time.sleep(0.01)\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    log(self, counters)\n"
        "loop.Meters.log = killed\n"
        "from flaxdraft.train.__main__ import main\n"
        f"main(['--config', {str(workspace / 'run.yaml')!r}, 'output_dir={out}'])\n"
    )
    killed = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True, timeout=300)
    assert killed.returncode == -9, killed.stderr
    checkpoints = sorted(p.name for p in (out / "llama" / "checkpoints").iterdir() if p.name.isdigit())
    assert checkpoints == ["3", "4"]  # the fourth step was evaluated, and was the best so far
    assert call(workspace, f"output_dir={out}") == 0
    assert_same_end(out, finished)
    assert [m["step"] for m in metrics(out / "llama", "train")] == [2, 4, 6, 8]


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


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh",
    [
        ("mesh.fsdp=2", "mesh.tensor=2"),
        pytest.param(("mesh.data=2", "mesh.sequence=4"), marks=pytest.mark.exhaustive),
    ],
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
    assert_close(got, want, ulp=80, dtype=np.float32)
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


@pytest.mark.slow
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
    assert_same_end(out, finished)


def test_two_runs_in_one_folder_are_refused(finished, workspace, capfd):
    with directory_lock(finished / "llama"):
        assert call(workspace) == 2
    assert f"is in use by process {os.getpid()} on" in capfd.readouterr().err


@pytest.mark.slow
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


@pytest.mark.slow
def test_packed_rows_train(finished, workspace, monkeypatch, capfd):
    monkeypatch.setattr(answers, "capture", None)
    assert call(workspace, "name=packed", "train.pack_length=128", "train.num_steps=4") == 0
    text = " ".join(capfd.readouterr().out.split())
    assert re.search(r"10 documents packed into \d+ rows of 128 tokens, \d+% full", text), text
    held_out = metrics(finished / "packed", "held_out")
    assert held_out[-1]["loss"] < held_out[0]["loss"]
