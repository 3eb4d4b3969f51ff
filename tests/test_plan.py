"""Plans: from a configuration and a config.json alone, for devices that need not be there."""

import importlib.util
import json
import math

import huggingface_hub
import jax
import jax.numpy as jnp
import pytest

from flaxdraft.config import load_config
from flaxdraft.errors import InputError
from flaxdraft.run import plan as planning
from flaxdraft.run.planned_devices import planned_devices
from flaxdraft.targets import describe_target, open_target
from flaxdraft.train.__main__ import main

V, E, F, L, HEADS, KV, H, W = 256, 32, 48, 8, 4, 2, 8, 32
HF = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": V, "hidden_size": E,
    "intermediate_size": F, "num_hidden_layers": L, "num_attention_heads": HEADS, "num_key_value_heads": KV,
    "head_dim": H, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "max_position_embeddings": 4096,
    "tie_word_embeddings": False, "eos_token_id": 2,
}  # fmt: skip
MATRICES = L * (2 * E * HEADS * H + 2 * E * KV * H + 3 * E * F)
YAML = """
output_dir: {out}
target: {{path: {target}, dtype: float32}}
data: {{prompts: {prompts}, conversations: {out}/not-there.jsonl, max_prompt_tokens: 20, max_answer_tokens: 12, rows: 6,
  prefetch: 3}}
algorithm: {{ttt_length: 2}}
draft: {{draft_vocab_size: 32}}
mesh: {{fsdp: 2, tensor: 2}}
evaluate: {{max_new_tokens: 10}}
train: {{batch_size: 4, pack_length: 32, num_steps: 10, compute_dtype: float32, ema_decay: 0.9}}
"""


@pytest.fixture(scope="module", autouse=True)
def _started():
    """A plan for other devices starts JAX with as many CPU devices; here all tests share those that there are."""
    jax.devices()


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """config.json, nothing else."""
    path = tmp_path_factory.mktemp("target")
    (path / "config.json").write_text(json.dumps(HF))
    return path


@pytest.fixture(scope="module")
def run_yaml(directory, tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    prompts = [{"id": f"p{i}", "category": "all", "split": "held_out", "prompt": "x"} for i in range(3)]
    (root / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in prompts))
    text = YAML.format(out=root / "out", target=directory, prompts=root / "prompts.jsonl")
    (root / "run.yaml").write_text(text)
    return root / "run.yaml"


@pytest.fixture(scope="module")
def made(run_yaml):
    """One step and one pass of the target are compiled, once for all tests here."""
    return planning.made_plan(load_config(str(run_yaml), []), planned_devices("4 x H100", 4))


def test_each_part_is_what_a_device_holds_of_it(made):
    """Four devices: matrices lie in four pieces, norms whole on each; moments and running mean are three of the draft's
    parameters."""
    norms = (2 * L + 1) * E
    assert made.training["target"] == 4 * ((MATRICES + 2 * V * E) // 4 + norms)
    assert made.answering["target"] == made.training["target"]
    rows, heads = 6 // 2, KV // 2
    answer = 10  # of the held-out prompts, which alone are asked
    assert made.answering["caches"] == rows * (20 + answer) * L * heads * 2 * H * 4
    chunk = 32  # of prompts of 20 tokens
    assert made.answering["answers' features"] == 6 * (answer + chunk) * 4 * E * 4
    trained = made.step.trained * 4 / 4
    assert 3 * trained <= made.training["moments"] < 3.2 * trained
    assert trained < made.training["draft"]
    tokens = 2 * 32  # of a device's rows; two batches are there at a time
    assert made.training["features"] == 2 * tokens * 4 * (4 * E + 2)
    assert made.training["work"] > 0
    held = made.step.held
    assert made.host["batches read ahead"] == 3 * 4 * held["batch"]  # of conversations no features are read
    assert made.host["a checkpoint on its way"] == 4 * (held["draft"] + held["moments"])


def test_targets_of_accelerators_are_bfloat16_where_nothing_is_said(run_yaml, monkeypatch):
    """Whatever compiles in their place; and their own mesh is theirs."""
    asked = []
    monkeypatch.setattr(planning, "estimate", lambda *_: 1 / 0)
    monkeypatch.setattr(planning, "target_figures", lambda target, mesh, dtype, *_: asked.append((dtype, mesh.shape)))
    for devices in ("4 x H100", None):
        config = load_config(str(run_yaml), ["target.dtype=null", "target.mesh.fsdp=4"])
        with pytest.raises(ZeroDivisionError):
            planning.made_plan(config, planned_devices(devices, 4))
    assert [dtype for dtype, _ in asked] == [jnp.bfloat16, jnp.float32]
    assert all(shape["fsdp"] == 4 for _, shape in asked)


def test_compute_and_store(made):
    assert made.target_flops == 2 * (MATRICES + V * E) * 4 * 32
    rows, steps = 4 * 32, 2  # every row is supervised at every step
    tokens, later = 4 * (32 + steps), rows + rows * (steps - 1)
    products = (
        (E * HEADS * H, tokens + rows * steps), (2 * E * KV * H, tokens + later),  # tokens' and states' halves
        (HEADS * H * E + 3 * E * F + E * W, rows * steps),
    )  # fmt: skip
    once = 4 * 3 * E * E * rows + 2 * W * E * rows  # fc, which gives the taps no gradient, and the teacher
    assert made.step.flops == once + sum(6 * size * count for size, count in products)
    assert made.store == (3 * E + E) * 2 + 13
    assert made.answers == 3 * (20 + 10)
    assert (made.step.rows, made.step.length) == (4, 32)


def test_hours_at_a_rate_that_is_given_or_assumed(made):
    tokens = 10 * 4 * 32
    assert made.hours(f"{tokens / 3600 / 2:.9f} tokens/s").startswith("2.00 hours at ")
    each = made.flops * 10 / 4 / 3600 / 1e12
    assert made.hours(f"{each / 3:.12f} TFLOP/s").startswith("3.00 hours at ")
    slow = made._replace(devices=made.devices._replace(peak=each * 1e12))
    assert slow.hours(None).startswith("2.50 hours at ")
    assert "assumed: 40% of the peak" in slow.hours(None)
    unknown = made._replace(devices=made.devices._replace(peak=None))
    assert unknown.hours(None).startswith("unknown: the peak of these devices is; give --rate")
    for rate in ("fast", "0 tokens/s", "3 TFLOP"):
        with pytest.raises(InputError, match=f"--rate: found '{rate}', expected '20000 tokens/s'"):
            made.hours(rate)


def with_memory(made, limit, **changed):
    return made._replace(devices=made.devices._replace(memory=limit, stand_in=False), **changed)


def test_what_does_not_fit_is_refused_with_what_helps(made):
    total = sum(made.training.values())
    assert with_memory(made, float(total)).doubt() is None
    cases = {
        "target": "mesh.fsdp, or target.mesh", "moments": "mesh.fsdp", "features": "lower train.batch_size",
        "work": "raise train.accumulate, or set algorithm.remat=full",
    }  # fmt: skip
    for part, advice in cases.items():
        training = made.training | {part: 10**9}
        with pytest.raises(InputError, match=rf"training does not fit: 1.00 GB: .*{part} 1.00 GB.* First, .*{advice}"):
            with_memory(made, 9e8, training=training).doubt()
    with pytest.raises(InputError, match=r"answering does not fit: .*caches 1.00 GB.* 0.90 GB each. First, lower data"):
        with_memory(made, 9e8, answering=made.answering | {"caches": 10**9}).doubt()


def test_an_estimate_of_the_work_alone_refuses_nothing(made):
    training = made.training | {"work": 10**9}
    doubtful = made._replace(devices=made.devices._replace(memory=9e8), training=training)
    assert "training may not fit, by an estimate of the work: 1.00 GB" in doubtful.doubt()
    with pytest.raises(InputError, match="training does not fit"):
        doubtful._replace(training=training | {"target": 10**9}).doubt()


def test_the_command_says_it_and_writes_nothing(made, run_yaml, capfd, monkeypatch):
    monkeypatch.setattr(planning, "made_plan", lambda config, devices: made._replace(config=config, devices=devices))
    before = sorted(run_yaml.parent.iterdir())
    call = ["--config", str(run_yaml), "--plan", "--devices", "8 x H100", "--rate", "20000 tokens/s"]
    assert main(call) == 0
    said = capfd.readouterr().out
    for line in (
        r"mesh       fsdp 2 x tensor 2 (4 of 8 x H100 (75% of 80 GB",
        "(work as compiled for CPUs in their place: an estimate)",
        "steps      10", "hours at 20000 tokens/s (given)", "caches ",
    ):  # fmt: skip
        assert line in said
    assert sorted(run_yaml.parent.iterdir()) == before
    for option in ("--devices", "--rate"):
        assert main(["--config", str(run_yaml), option, "8 x H100"]) == 2
        assert f"{option}: only a plan uses it; give --plan as well" in capfd.readouterr().err


def test_a_target_is_described_by_its_configuration_alone(directory):
    assert describe_target(str(directory)).config((1, 3)).num_hidden_layers == L
    with pytest.raises(InputError, match=r"holds neither model.safetensors nor"):
        open_target(str(directory))


def test_of_a_target_on_the_hub_its_configuration_alone_is_fetched(directory, monkeypatch):
    asked = []

    def download(*wanted):
        asked.append(wanted)
        return str(directory / "config.json")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    assert describe_target("org/model").path == directory
    assert asked == [("org/model", "config.json")]

    def refuse(*wanted):
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(InputError, match=r"no directory org/model, and the hub could not .*\(no route to the hub\)"):
        describe_target("org/model")


def test_devices_by_name(monkeypatch):
    """JAX takes three quarters of a GPU's memory, or what the environment says, and all of a TPU's."""
    for name, memory in (("8 x H100", 60), ("2x a100 80GB", 60), ("1 × A100-40", 30), ("4 x v5p", 95)):
        found = planned_devices(name, 1)
        assert found.memory == memory * 1e9
        assert found.stand_in
    for field in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.setenv(field, "0.9")
        assert planned_devices("8 x H100", 1)[:4:3] == ("8 x H100 (90% of 80 GB, XLA_CLIENT_MEM_FRACTION)", 72e9)
        monkeypatch.delenv(field)
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "1.0")
    assert planned_devices("8 x H100", 1)[:4:3] == ("8 x H100", 80e9)
    assert planned_devices("8 x H100", 8).total == 8
    with pytest.raises(InputError, match="--devices: the mesh takes 16 devices, 8 x H100 were given"):
        planned_devices("8 x H100", 16)
    for wrong in ("H100", "8 x H1000", "8", "v5e:2xx2", "8 x A100"):
        with pytest.raises(InputError, match=rf"--devices: found '{wrong}', expected a number of one of A100-40, "):
            planned_devices(wrong, 1)


def test_visible_devices_have_the_memory_that_they_say():
    found = planned_devices(None, 1)
    assert found.total == len(found.devices) == jax.device_count()
    assert (found.memory, found.peak, found.stand_in) == (None, None, False)


def test_a_topology_without_libtpu_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"v5e:2x2 is compiled for by libtpu, .* pip install 'flaxdraft\[tpu\]'"):
        planned_devices("v5e:2x2", 4)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
@pytest.mark.slow
def test_a_step_is_compiled_for_a_topology(run_yaml):
    found = planned_devices("v5e:2x2", 4)
    assert (found.total, found.memory) == (4, 16e9)
    made = planning.made_plan(load_config(str(run_yaml), []), found)
    assert math.prod(made.mesh.values()) == 4
    assert made.training["work"] > 0
    assert made.doubt() is None
