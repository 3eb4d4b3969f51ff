"""What a run and a draft's card tell the user to type to serve the draft: the commands of the engines that take it."""

from pathlib import Path

import pytest
from small_drafts import config_of, random_params, vocab_of, write_export
from test_contracts import DRAFTS, TARGET_HF, V, W

from flaxdraft.algorithms.eagle3.serving import contract
from flaxdraft.algorithms.eagle3.serving.kinds import engines
from flaxdraft.evaluate.report import print_headline
from flaxdraft.serving.contract import find_engine
from flaxdraft.serving.trained_draft import Origin

EVALUATION = {
    "answers": 4, "chain_length": 3, "teacher_forced": {"answers_with_the_decoded_passes": 4},
    "decoded": {"accept_length": 1.5, "target_passes": 20, "target_passes_alone": 30, "identical_answers": 4},
}  # fmt: skip
SGLANG = (
    "--model-path TARGET --speculative-algorithm EAGLE3 --speculative-draft-model-path {} --speculative-num-steps 3 "
    "--speculative-eagle-topk 1 --speculative-num-draft-tokens 4"
)
VLLM = 'vllm serve TARGET --speculative-config \'{{"method": "eagle3", "model": "{}", "num_speculative_tokens": 3}}\''
COMMANDS = {
    "sglang": f"python -m sglang.launch_server {SGLANG}", "sglang-jax": f"python -m sgl_jax.launch_server {SGLANG}",
    "vllm": VLLM, "tpu-inference": f"MODEL_IMPL_TYPE=flax_nnx {VLLM}",
}  # fmt: skip


def typed(text: str) -> str:
    """On one line, as a shell reads it."""
    return " ".join(text.replace("\\\n", " ").split())


def ended_with(name: str, template, capfd) -> str:
    engine = find_engine(contract, name)
    print_headline(EVALUATION, Path("out/export"), Path("out/report"), "ORG/target", engine, template)
    return typed(capfd.readouterr().out)


def test_every_engine_has_a_command():
    assert COMMANDS.keys() == {name for name, engine in engines().items() if engine.serves}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_run_ends_with_the_command_of_its_engine(capfd, name):
    text = ended_with(name, {}, capfd)
    assert f"serve {COMMANDS[name].format('out/export')}" in text
    assert "TARGET: the Hugging Face directory of ORG/target" in text
    assert ("sglang.launch_server" in text) == (name == "sglang")


def test_a_run_ends_with_what_its_template_was_given(capfd):
    assert '"chat_template_kwargs": {"mood": "kind"} in every request' in ended_with("vllm", {"mood": "kind"}, capfd)
    assert "request" not in ended_with("vllm", {}, capfd)


def test_a_layout_that_no_engine_was_asked_about_has_no_command_and_says_why(capfd):
    text = ended_with("hf", {"mood": "kind"}, capfd)
    assert "serve no command: export.engine=hf is the layout for other trainers" in text
    assert "TARGET" not in text


@pytest.mark.parametrize(
    ("engine", "kind", "fields", "size", "takers"),
    [
        ("sglang", "llama", {}, W, {"sglang", "sglang-jax", "vllm"}),
        ("sglang", "mla", {}, W, {"sglang", "vllm"}),
        ("sglang", "llama", {"norm_output": True}, W, {"sglang", "vllm"}),
        ("vllm", "llama", {"norm_before_residual": True}, W, {"vllm"}),
        ("tpu-inference", "llama", {}, W, {"tpu-inference", "vllm"}),
        ("tpu-inference", "llama", {}, V, {"tpu-inference"}),  # its d2t of zeros is what vLLM stops at
        ("hf", "mla", {"q_lora_rank": None}, W, set()),
    ],
)
def test_the_card_has_the_commands_of_the_engines_that_take_the_directory_as_it_is(
    tmp_path, engine, kind, fields, size, takers
):
    config = config_of(kind, size, **fields)
    write_export(
        tmp_path / "out", DRAFTS[kind], config, random_params(kind, config), vocab_of(size), tap_layers=(1, 3, 4),
        target=TARGET_HF, engine=engine, origin=Origin("ORG/target", None, None),
    )  # fmt: skip
    card = (tmp_path / "out" / "README.md").read_text()
    assert {name for name in COMMANDS if f"{find_engine(contract, name).title}, TARGET being" in card} == takers
    assert all(COMMANDS[name].format(".") in typed(card) for name in takers)
    assert ("No engine that flaxdraft knows serves this directory as it is." in card) == (not takers)
