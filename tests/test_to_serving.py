"""Checkpoint -> export -> import, and a directory for one engine from that of another."""

import dataclasses
import itertools
import json
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import optax
import pytest
from commands import tool
from eagle3 import algorithm
from flax import nnx
from small_drafts import config_of, random_params, vocab_of
from test_contracts import DRAFTS, TARGET_HF, TARGETS, V, W
from test_engine_contracts import DEFAULT_TAPS, SWITCHES

from flaxdraft.algorithms.loading import contract_of, from_pretrained
from flaxdraft.config import DraftConfig
from flaxdraft.errors import InputError
from flaxdraft.files.draft_directory import written_whole
from flaxdraft.files.safetensors_file import load_safetensors
from flaxdraft.run.init_from import check_target, load_start, start_files
from flaxdraft.serving import lint
from flaxdraft.serving.record import DraftRecord
from flaxdraft.serving.view import view_of_directory
from flaxdraft.train.checkpoint import Checkpoints
from flaxdraft.train.state import init_state
from flaxdraft.train.token_counter import zero

to_serving = tool("convert/to_serving")
FIELDS = {"plain": {}, "switches": SWITCHES, "own width": {"hidden_size": 40}}
USUAL = [("llama", "plain", W), ("llama", "switches", V), ("llama", "own width", W),
         ("mla", "plain", V), ("mla", "switches", W), ("mla", "own width", V)]  # fmt: skip
SLOW = [("qwen3", "plain", W), ("qwen3", "switches", V), ("qwen3", "own width", W)]


def marks(case):
    if case in USUAL:
        return ()
    return (pytest.mark.slow,) if case in SLOW else (pytest.mark.slow, pytest.mark.exhaustive)


CASES = [pytest.param(*case, marks=marks(case)) for case in itertools.product(DRAFTS, FIELDS, (W, V))]
NORMS_BEFORE = {"norm_before_fc": True, "norm_before_residual": True}  # which vLLM alone serves
EVALUATION = {
    "answers": 4, "chain_length": 3, "decoded": {
        "accept_length": 1.625, "acceptance_by_position": [0.5, 0.25, 0.125],
        "accept_length_by_category": {"code": 1.75, "chat": 1.5},
    },
}  # fmt: skip
INPUTS = {
    "train": {"num_steps": 200, "batch_size": 16, "learning_rate": 3e-3},
    "algorithm": {"ttt_length": 7, "objective": "lk_alpha"},
}  # fmt: skip


def make_run(directory, kind, fields, size=W, steps=(4,), devices=1, ema=None):
    """A run's folder as training leaves it."""
    config = config_of(kind, size, **fields)
    mesh = jax.make_mesh((devices,), ("data",), devices=jax.devices()[:devices])
    params = {}
    with Checkpoints(directory / "checkpoints") as checkpoints:
        for step in steps:
            params[step] = random_params(kind, config, step)
            placed = jax.device_put(params[step], jax.NamedSharding(mesh, jax.P()))
            state = init_state(placed, optax.sgd(1.0), algorithm(2), ema=ema is not None)
            if ema is not None:
                state = dataclasses.replace(state, params=jax.tree.map(lambda x: x + 1, state.params))
            record = {"score": -step, "inputs": {"train": {"ema_decay": ema}}, "origin": ""}
            checkpoints.save(step, {"state": state, "counters": zero(mesh)}, vocab_of(size), record)
    DraftRecord(config.to_hf(), DEFAULT_TAPS, TARGET_HF, "ORG/target").write(directory)
    return config, params


def assert_equal(loaded, config, params, dtype=np.float32):
    assert loaded.config == config
    for (path, want), (_, got) in zip(nnx.to_flat_state(params), nnx.to_flat_state(loaded.params), strict=True):
        rounded = np.asarray(want[...]).astype(dtype).astype(np.float32)
        np.testing.assert_array_equal(got[...], rounded, err_msg="/".join(map(str, path)))


def verdicts(directory):
    view = view_of_directory(directory, TARGET_HF)
    return lint.check(view, contract_of(view.config))


def call(*arguments):
    return to_serving.main([str(argument) for argument in arguments])


@pytest.mark.parametrize(("kind", "fields", "size"), CASES)
def test_a_checkpoint_comes_back_bit_by_bit(tmp_path, kind, fields, size):
    engine = "vllm" if kind == "qwen3" else "sglang"
    config, params = make_run(tmp_path / "run", kind, FIELDS[fields], size)
    assert call(tmp_path / "run", tmp_path / "out", "--engine", engine, "--dtype", "fp32") == 0
    loaded = from_pretrained(tmp_path / "out")
    assert_equal(loaded, config, params[4])
    np.testing.assert_array_equal(loaded.vocab.target_ids_W, vocab_of(size).target_ids_W)
    assert lint.passes(verdicts(tmp_path / "out"), [engine])
    # And from there for other trainers, and back.
    assert call(tmp_path / "out", tmp_path / "hf", "--engine", "hf", "--dtype", "fp32") == 0
    assert call(tmp_path / "hf", tmp_path / "again", "--engine", engine, "--dtype", "fp32") == 0
    first, again = (load_safetensors(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert first.keys() == again.keys()
    for name, array in first.items():
        np.testing.assert_array_equal(again[name], array)


def test_norms_before_fc_and_residual_come_back_bit_by_bit(tmp_path, capsys):
    config, params = make_run(tmp_path / "run", "llama", NORMS_BEFORE)
    assert call(tmp_path / "run", tmp_path / "refused") == 2
    assert "export for SGLang 0.5.23: it ignores norm_before_residual" in capsys.readouterr().err
    assert call(tmp_path / "run", tmp_path / "out", "--engine", "vllm", "--dtype", "fp32") == 0
    assert_equal(from_pretrained(tmp_path / "out"), config, params[4])
    assert lint.passes(verdicts(tmp_path / "out"), ["vllm"])


def test_a_checkpoint_of_eight_devices_is_read_on_one(tmp_path):
    config, params = make_run(tmp_path / "run", "llama", {}, devices=8)
    assert call(tmp_path / "run", tmp_path / "out", "--dtype", "fp32") == 0
    assert_equal(from_pretrained(tmp_path / "out"), config, params[4])


@pytest.mark.parametrize(("name", "dtype"), [("bf16", ml_dtypes.bfloat16), ("fp16", np.float16)])
def test_narrow_types_hold_the_rounded_values(tmp_path, name, dtype):
    config, params = make_run(tmp_path / "run", "llama", {})
    assert call(tmp_path / "run", tmp_path / "out", "--dtype", name) == 0
    assert load_safetensors(tmp_path / "out" / "model.safetensors")["fc.weight"].dtype == dtype
    assert_equal(from_pretrained(tmp_path / "out"), config, params[4], dtype)


def test_any_checkpoint_of_the_run_can_be_taken(tmp_path, capsys):
    config, params = make_run(tmp_path / "run", "llama", {}, steps=(4, 8))
    for step, want in ((), 8), (("--step", "4"), 4), (("--step", "best"), 4):
        assert call(tmp_path / "run", tmp_path / "out", "--dtype", "fp32", *step) == 0
        assert_equal(from_pretrained(tmp_path / "out"), config, params[want])
    assert call(tmp_path / "run", tmp_path / "out", "--step", "5") == 2
    assert "no checkpoint '5'; there are 4, 8" in capsys.readouterr().err


def test_a_run_needs_no_target(tmp_path, monkeypatch):
    """The record says what is needed of it; nothing of flaxdraft.targets is asked."""
    make_run(tmp_path / "run", "llama", {})
    monkeypatch.setattr("flaxdraft.targets.from_pretrained", None)
    monkeypatch.setattr("flaxdraft.targets.open_target", None)
    assert call(tmp_path / "run", tmp_path / "out", "--engine", "tpu-inference") == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["eagle_aux_hidden_state_layer_ids"] == [2, 4, 5]
    assert config["architectures"] == ["Eagle3LlamaForCausalLM"]


def test_the_card_shows_what_the_run_recorded(tmp_path):
    make_run(tmp_path / "run", "llama", SWITCHES)
    (tmp_path / "run" / "inputs.json").write_text(json.dumps(INPUTS))
    (tmp_path / "run" / "evaluation.json").write_text(json.dumps({"inputs": "x", "result": EVALUATION}))
    assert call(tmp_path / "run", tmp_path / "out") == 0
    card = (tmp_path / "out" / "README.md").read_text()
    for words in (
        "`ORG/target`", "fc_norm and norm_output", "24 of 64 tokens", "1, 3, 4 (0-based)", "accept length 1.62",
        "| accepted | 0.500 | 0.250 | 0.125 |", "| code | 1.75 |", "200 steps of 16 conversations", "7 unroll steps",
        "--speculative-num-draft-tokens 4", '"num_speculative_tokens": 3', "bfloat16",
    ):  # fmt: skip
        assert words in card


def test_a_card_claims_no_figures_of_another_checkpoint(tmp_path):
    make_run(tmp_path / "run", "llama", {}, steps=(4, 8))
    evaluation = EVALUATION | {"checkpoint": {"step": 4, "last": 8, "sha256": "x"}}
    (tmp_path / "run" / "evaluation.json").write_text(json.dumps({"inputs": "x", "result": evaluation}))
    for step, fact in (("best", "step 4 of 8, the best held-out score"), ("latest", "step 8")):
        assert call(tmp_path / "run", tmp_path / "out", "--step", step) == 0
        card = (tmp_path / "out" / "README.md").read_text()
        assert f"| checkpoint | {fact} |" in card
        assert ("accept length" in card) == (step == "best")


def test_training_begins_from_a_checkpoint_by_its_own_path(tmp_path):
    config, params = make_run(tmp_path / "run", "llama", {}, steps=(4, 8))
    for name, step in (("best", 4), ("latest", 8), ("4", 4)):
        path = str(tmp_path / "run" / "checkpoints" / name)
        start = load_start(DraftConfig(init_from=path, architecture="llama"), DRAFTS["llama"])
        assert_equal(start, config, params[step])
        assert [file.name for file in start_files(path)] == ["_CHECKPOINT_METADATA"]
    target = TARGETS["llama"].Config.from_hf(TARGET_HF)
    check_target(start, path, dataclasses.replace(target, tap_layers=DEFAULT_TAPS), TARGET_HF)
    with pytest.raises(InputError, match=r"has tapped layers \[1, 3, 4\], this target \[2, 3, 4\]"):
        check_target(start, path, dataclasses.replace(target, tap_layers=(2, 3, 4)), TARGET_HF)


def test_a_checkpoint_is_read_without_the_other_processes(tmp_path, monkeypatch):
    """The first process of a run exports while the others wait."""
    make_run(tmp_path / "run", "llama", {})
    monkeypatch.setattr("flaxdraft.devices.hosts.all_agree", None)
    assert call(tmp_path / "run", tmp_path / "out") == 0


def test_a_card_without_figures_claims_none(tmp_path):
    make_run(tmp_path / "run", "mla", {})
    assert call(tmp_path / "run", tmp_path / "out") == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "accept length" not in card
    assert "DeepSeek-MLA" in card


def test_the_running_mean_is_what_was_evaluated(tmp_path):
    config, means = make_run(tmp_path / "run", "llama", {}, ema=0.99)
    assert call(tmp_path / "run", tmp_path / "out", "--dtype", "fp32") == 0
    assert_equal(from_pretrained(tmp_path / "out"), config, means[4])


def damaged(run):
    """One bit of the largest file."""
    files = [path for path in (run / "checkpoints" / "4").rglob("*") if path.is_file()]
    path = max(files, key=lambda path: path.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "arguments", "message"),
    [
        (lambda run: (run / "draft.json").unlink(), [], "no draft.json, which says what the draft and its target are"),
        (lambda run: (run / "draft.json").write_text('{"draft": {}}'), [], "tap_layers, target, target_path missing"),
        (damaged, [], "checkpoints/4: cannot be read"),
        (lambda run: None, ["--engine", "tensorrt"], "engine: no 'tensorrt'; known are"),
        (lambda run: None, ["--target", "nowhere"], "nowhere/config.json: cannot be read"),
        (lambda run: (run.parent / "out").mkdir(), [], "exists and is no draft's directory"),
    ],
)
def test_what_cannot_be_exported_is_told_in_one_line(tmp_path, capsys, damage, arguments, message):
    make_run(tmp_path / "run", "llama", {})
    damage(tmp_path / "run")
    assert call(tmp_path / "run", tmp_path / "out", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "config.json").exists()


def test_the_source_is_never_overwritten(tmp_path, capsys):
    make_run(tmp_path / "run", "llama", {})
    assert call(tmp_path / "run", tmp_path / "out") == 0
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert call(tmp_path / "out", Path(tmp_path / "out"), "--engine", "hf") == 2
    assert "is the source itself" in capsys.readouterr().err
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before


def test_a_targets_directory_is_never_overwritten(tmp_path, capsys):
    make_run(tmp_path / "run", "llama", {})
    (tmp_path / "target").mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / "target" / name).write_text(name)
    assert call(tmp_path / "run", tmp_path / "target") == 2
    assert "exists and is no draft's directory (it holds tokenizer.json)" in capsys.readouterr().err
    assert (tmp_path / "target" / "model.safetensors").read_text() == "model.safetensors"


def test_an_export_that_fails_leaves_the_one_before(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("before")
    with pytest.raises(OSError, match="full"), written_whole(tmp_path / "out"):
        raise OSError("the disk is full")
    assert (tmp_path / "out" / "config.json").read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_directory_without_layer_ids_takes_the_targets_defaults(tmp_path, capsys):
    make_run(tmp_path / "run", "llama", {})
    assert call(tmp_path / "run", tmp_path / "out") == 0
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    for name in ("eagle_config", "eagle_aux_hidden_state_layer_ids"):
        del config[name]
    path.write_text(json.dumps(config))
    assert call(tmp_path / "out", tmp_path / "vllm", "--engine", "vllm") == 2
    assert "names no tapped layers; give --target" in capsys.readouterr().err
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "config.json").write_text(json.dumps(TARGET_HF | {"num_hidden_layers": 20}))
    assert call(tmp_path / "out", tmp_path / "vllm", "--engine", "vllm", "--target", tmp_path / "target") == 0
    config = json.loads((tmp_path / "vllm" / "config.json").read_text())
    assert config["eagle_aux_hidden_state_layer_ids"] == [2, 10, 17]
