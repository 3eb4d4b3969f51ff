"""python -m flaxdraft.evaluate on a tiny target: figures that add up, several turns, several chains, nothing twice."""

import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from eagle3 import algorithm
from flax import nnx
from safetensors.numpy import load_file, save_file
from small_drafts import write_export
from tiny import write_prompts

from flaxdraft import targets
from flaxdraft.algorithms.eagle3.drafts import llama
from flaxdraft.algorithms.loading import from_pretrained
from flaxdraft.devices.sharding import Sharding
from flaxdraft.evaluate import __main__ as evaluate_command
from flaxdraft.evaluate import measure as measure_module
from flaxdraft.evaluate.__main__ import main
from flaxdraft.interfaces import VocabMap
from flaxdraft.nn.precision import Precision
from flaxdraft.serving.record import DraftRecord
from flaxdraft.train.checkpoint import Checkpoints
from flaxdraft.train.state import init_state

QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["and the sea", "again"], "reference": ["left alone"]},
    {"question_id": 82, "category": "math", "turns": ["in the end"]},
    {"question_id": 83, "category": "math", "turns": ["the and a", "more and more"]},
]


ALL = ("--chain", "1", "3", "--tree", "2", "1")


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, tiny_gguf):
    """A run's draft folder, as far as its export: a warm-started draft, which repeats what the target says."""
    root = tmp_path_factory.mktemp("evaluate")
    eagle3 = algorithm(3)
    loaded = targets.from_pretrained(str(tiny_gguf), tap_layers=eagle3.tap_layers(8, None))
    size = loaded.model.config.vocab_size
    vocab = VocabMap(np.delete(np.arange(size), np.arange(5, size, 7)), size)
    config = llama.Config(**llama.Config.for_target(loaded.model.config, vocab.draft_vocab_size))
    draft = llama.make(
        config, vocab, loaded.model, precision=Precision(), sharding=Sharding.none(), rngs=nnx.Rngs(1)
    )  # fmt: skip
    eagle3.warm_start(draft, loaded.model, vocab)
    write_export(
        root / "draft" / "export", llama, config, nnx.state(draft, nnx.Param), vocab,
        tap_layers=loaded.model.config.tap_layers, target=loaded.hf_config,
    )  # fmt: skip
    write_jsonl(root / "questions.jsonl", QUESTIONS)
    write_prompts(root / "prompts.jsonl", num_train=2, num_held_out=5)
    return root


def call(workspace, tiny_gguf, out, *more, draft="draft", prompts="questions.jsonl"):
    return main([
        str(workspace / draft), "--target", str(tiny_gguf), "--prompts", str(workspace / prompts), "--out", str(out),
        "--max-new-tokens", "10", "--rows", "2", *more,
    ])  # fmt: skip


@pytest.fixture(scope="module")
def finished(workspace, tiny_gguf):
    assert call(workspace, tiny_gguf, workspace / "out", *ALL) == 0
    return workspace / "out"


def test_a_checkpoint_of_a_run_is_what_is_measured(workspace, tiny_gguf, tmp_path, monkeypatch):
    """`--step best` reads the run's checkpoint: the weights that its export holds, with the same layers."""
    source = from_pretrained(workspace / "draft" / "export")
    run, target = tmp_path / "run", targets.open_target(str(tiny_gguf)).source.config
    record = {"inputs": {"train": {"ema_decay": None}}, "origin": ""}
    with Checkpoints(run / "checkpoints") as checkpoints:
        for step, score, params in ((4, 1.0, source.params), (8, 0.5, jax.tree.map(jnp.zeros_like, source.params))):
            arrays = {
                "state": init_state(params, optax.sgd(1.0), algorithm(2)),
                "counters": {"tokens": jnp.zeros(2, jnp.int32)},
            }
            checkpoints.save(step, arrays, source.vocab, record | {"score": score})
    DraftRecord(source.config.to_hf(), [1, 3, 4], target, str(tiny_gguf)).write(run)
    found = []
    monkeypatch.setattr(evaluate_command, "evaluate", lambda _, directory: found.append(from_pretrained(directory)))
    assert call(workspace, tiny_gguf, tmp_path / "out", "--step", "best", draft=run) == 0
    jax.tree.map(np.testing.assert_array_equal, found[0].params, source.params)


def test_answers_that_a_draft_changed_end_the_command_with_one(workspace, tiny_gguf, tmp_path, monkeypatch, capfd):
    """All is written before it ends."""
    measure = measure_module.measure

    def spoilt(*args):
        alone, run = measure(*args)
        tokens = run.turns[0].answer.tokens
        tokens[4] = (tokens[4] + 100) % 250
        return alone, run

    monkeypatch.setattr(measure_module, "measure", spoilt)
    assert call(workspace, tiny_gguf, tmp_path / "out", "--limit", "2") == 1
    assert (
        "of the answers with the draft 1 differ from the target's own by more than rounding" in capfd.readouterr().err
    )
    assert "**wrong**" in (tmp_path / "out" / "report.md").read_text()
    (result,) = json.loads((tmp_path / "out" / "results.json").read_text())["chains"]
    assert [one["near_tie"] for one in result["decoded"]["differences"]] == [False]


def test_figures_add_up(finished):
    results = json.loads((finished / "results.json").read_text())["chains"]
    names = ["chain of 1", "chain of 3", "tree of 2 1"]
    assert [(r["name"], r["chain_length"], r["tree"], r["draft_tokens"]) for r in results] == [
        (names[0], 1, [], 1), (names[1], 3, [], 3), (names[2], 2, [2, 1], 4)
    ]  # fmt: skip
    assert not any(result["decoded"]["differences"] for result in results)
    for result in results[:2]:
        decoded, forced = result["decoded"], result["teacher_forced"]
        assert forced["answers_with_the_decoded_passes"] == 5
        assert decoded["accept_length"] == forced["accept_length"]
    assert "teacher_forced" not in results[2]  # a walk is a chain's
    for result in results:
        decoded, chain = result["decoded"], result["chain_length"]
        assert result["answers"] == decoded["identical_answers"] == 5
        assert decoded["accept_length"] > 1
        assert decoded["accept_length"] == decoded["target_passes_alone"] / decoded["target_passes"]
        assert sum(decoded["accepted_histogram"]) == decoded["target_passes"]
        assert len(decoded["accepted_histogram"]) == chain + 1 == len(decoded["acceptance_by_position"]) + 1
        assert set(decoded["accept_length_by_category"]) == {"math", "writing"}
        assert result["with_draft"]["decoded_tokens"] == result["alone"]["decoded_tokens"]
        assert result["alone"]["decoded_tokens"] == decoded["target_passes_alone"]
        speeds = [result[name]["tokens_per_second"] for name in ("with_draft", "alone")]
        assert result["speedup"] == speeds[0] / speeds[1]
    assert results[1]["decoded"]["accept_length"] > results[0]["decoded"]["accept_length"]
    assert results[2]["decoded"]["accept_length"] >= results[0]["decoded"]["accept_length"]
    report = (finished / "report.md").read_text()
    for name in re.findall(r"!\[\]\((\w+\.png)\)", report):
        assert (finished / name).read_bytes().startswith(b"\x89PNG")
    assert report.count(".png") == 3
    assert f"| accept length, real decoding | {results[0]['decoded']['accept_length']:.3f} |" in report
    for result in results:
        slower = result["speedup"] < 1
        assert (f"{result['name']}: SLOWER than the target alone" in report) == slower
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report.splitlines() if line.startswith("|")]
    assert ["", *names] in table
    assert ["draft tokens a pass", "1", "3", "4"] in table
    assert ["whose walk has the decoded passes", "5", "5", ""] in table
    first = [f"{result['decoded']['first_token_accepted']['first_pass']:.3f}" for result in results]
    assert ["first draft token accepted, first pass of an answer", *first] in table


def test_an_answer_stands_in_the_next_prompt(finished, tiny_gguf):
    tokenizer = targets.open_target(str(tiny_gguf)).source.tokenizer()
    stored = [json.loads(path.read_text())["result"] for path in sorted((finished / "batches").glob("chain3-*.json"))]
    turns = {(turn["question"], turn["turn"]): turn for result in stored for turn in result["turns"]}
    assert sorted(turns) == [("81", 0), ("81", 1), ("82", 0), ("83", 0), ("83", 1)]
    for question, texts in (("81", QUESTIONS[0]["turns"]), ("83", QUESTIONS[2]["turns"])):
        answer = tokenizer.decode(turns[question, 0]["answer"]["tokens"], skip_special_tokens=True)
        roles = ("user", "assistant", "user")
        messages = [{"role": r, "content": t} for r, t in zip(roles, (texts[0], answer, texts[1]), strict=True)]
        want = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert turns[question, 1]["prompt"] == want


def test_a_stopped_run_goes_on_and_a_finished_one_decodes_nothing(workspace, finished, tiny_gguf, monkeypatch):
    decoded = []
    decode = measure_module.Clock.decode
    monkeypatch.setattr(
        measure_module.Clock, "decode",
        lambda self, prompts, seeds, settings, *rest: decoded.append((settings.chain_length, settings.tree))
        or decode(self, prompts, seeds, settings, *rest),
    )  # fmt: skip
    before = (finished / "results.json").read_bytes()
    assert call(workspace, tiny_gguf, finished, *ALL) == 0
    assert decoded == []
    assert (finished / "results.json").read_bytes() == before
    lost = finished / "batches" / "chain3-seed0-00001.json"
    whole = json.loads(lost.read_text())["result"]["turns"]
    lost.write_text(lost.read_text()[:50])  # as a disk that was full might have left it
    assert call(workspace, tiny_gguf, finished, *ALL) == 0
    assert set(decoded) == {(3, ())}
    (finished / "batches" / "tree2-1-seed0-00000.json").unlink()
    decoded.clear()
    assert call(workspace, tiny_gguf, finished, *ALL) == 0
    assert set(decoded) == {(0, (2, 1))}
    assert json.loads(lost.read_text())["result"]["turns"] == whole


def test_an_evaluation_keeps_its_mesh(workspace, finished, tiny_gguf, tmp_path, capfd):
    """Speed is of the devices that it was measured on."""
    shutil.copytree(finished, tmp_path / "out")
    inputs = json.loads((tmp_path / "out" / "inputs.json").read_text())
    (tmp_path / "out" / "inputs.json").write_text(json.dumps(inputs | {"target_mesh": {"fsdp": 2}}))
    assert call(workspace, tiny_gguf, tmp_path / "out", *ALL, "--mesh", "tensor=2") == 2
    said = " ".join(capfd.readouterr().err.split())
    assert "target_mesh.fsdp: there 2" in said
    assert re.search(r"target_mesh\.tensor: there \S+, here 2", said)


@pytest.mark.slow
def test_sampled_on_two_devices(workspace, tiny_gguf, tmp_path):
    """Prompts of this project's kind; the same answers as on one device, since each row has its own seed."""
    more = ("--temperature", "0.8", "--seeds", "3", "4", "--chain", "3", "--rows", "4")
    found = {}
    for data in ("1", "2"):
        out = tmp_path / data
        assert call(workspace, tiny_gguf, out, *more, "--mesh", f"data={data}", prompts="prompts.jsonl") == 0
        result = json.loads((out / "results.json").read_text())["chains"][0]
        assert "teacher_forced" not in result
        assert result["answers"] == 10  # five held-out prompts, two seeds
        found[data] = result["decoded"]
    assert found["1"] == found["2"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--chain", "0"), "--chain: found 0, expected at least 1"),
        (("--chain", "2", "2"), "--chain: found 2 2, expected each once"),
        (("--seeds", "1", "2"), "--seeds: several make sense only with --temperature above 0"),
        (("--tree", "2", "0"), "tree: found widths 2 0, expected each at least 1"),
        (("--tree", "2", "1", "--tree", "2", "1"), "--tree: found 2 1 2 1, expected each once"),
        (("--tree", "2", "1", "--temperature", "1"), "tree: found one with temperature 1"),
        (("--temperature", "-1"), "found temperature -1.0"),
        (("--mesh", "data=99"), "--mesh: data=99 takes 99 devices, 8 are visible"),
        (
            ("--max-new-tokens", "126"),
            r"--max-new-tokens: found 126; after turn 1 of prompt '8\d' \(\d+ tokens\) that leaves .* of 128",
        ),
    ],
)
def test_wrong_arguments(workspace, tiny_gguf, tmp_path, capfd, more, message):
    assert call(workspace, tiny_gguf, tmp_path, *more) == 2
    assert re.search(message, " ".join(capfd.readouterr().err.split()))


def damaged(workspace, tmp_path, change_weights=None, change_config=None):
    source, directory = workspace / "draft" / "export", tmp_path / "damaged"
    directory.mkdir()
    weights, config = load_file(source / "model.safetensors"), json.loads((source / "config.json").read_text())
    save_file(weights | (change_weights or (lambda w: {}))(weights), directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config | (change_config or {})))
    return directory


@pytest.mark.parametrize(
    ("weights", "config", "message"),
    [
        (lambda w: {"fc.weight": w["fc.weight"] * np.nan}, {}, "damaged: fc/kernel holds values that are not finite"),
        (None, {"intermediate_size": 48}, "do not fit the configuration.*midlayer.mlp.gate_proj.weight"),
        (None, {"draft_vocab_size": 99}, r"d2t has shape \(\d+,\), expected \(99,\)"),
        (None, {"num_hidden_layers": 2}, "num_hidden_layers is 2, expected 1"),
        (lambda w: {"t2d": np.append(w["t2d"], False)}, {"vocab_size": 267},
         "its vocab_size is 267, that of the target .* is 266; the draft was made for another target"),
        (None, {"eagle_aux_hidden_state_layer_ids": 3}, "its layer ids cannot be read"),
        (None, {"eagle_aux_hidden_state_layer_ids": [2, 2, 5]}, r"\[1, 1, 4\] are not three ascending layers"),
    ],
    ids=["nan", "sizes", "vocabulary", "layers", "another target", "layer ids", "equal layers"],
)  # fmt: skip
def test_a_draft_that_lies_is_refused(workspace, tiny_gguf, tmp_path, capfd, weights, config, message):
    directory = damaged(workspace, tmp_path, weights, config)
    assert call(workspace, tiny_gguf, tmp_path / "out", draft=directory) == 2
    assert re.search(message, " ".join(capfd.readouterr().err.split()))


def test_a_draft_that_names_no_layers_taps_the_default_ones(workspace, finished, tiny_gguf, tmp_path):
    silent = {"eagle_config": None, "eagle_aux_hidden_state_layer_ids": None}
    directory = damaged(workspace, tmp_path, change_config=silent)
    assert call(workspace, tiny_gguf, tmp_path / "out", "--chain", "1", draft=directory) == 0
    found, want = (json.loads((out / "results.json").read_text())["chains"][0] for out in (tmp_path / "out", finished))
    assert found["decoded"] == want["decoded"]


def test_a_folder_that_is_no_draft_is_refused(tmp_path, tiny_gguf, capfd):
    (tmp_path / "empty").mkdir()
    for more, found in (
        ((), "neither config.json nor export/ nor checkpoints/"),
        (("--step", "best"), "nor checkpoints/"),
    ):
        assert call(tmp_path, tiny_gguf, tmp_path / "out", *more, draft="empty", prompts="none") == 2
        assert found in " ".join(capfd.readouterr().err.split())
