"""Every field of the configuration reaches what it is for: from the YAML, through the training command.

The tables say for each what is seen of it. Whatever computes has a stand-in (see wiring.py), so that nothing is
compiled; that the parts do what they are told is what the other tests are for.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from closeness import assert_close
from pydantic import BaseModel
from stand_ins import MEAN_MOVES
from tiny import TEMPLATE, write_prompts, write_tiny_gguf
from wire_rows import As, Begins, Differs, Ends, Says, Told
from wire_settings import SETTINGS
from wiring import (
    Command,
    algorithms,
    begins_with,
    best,
    chosen,
    due,
    kept,
    lengths,
    logged,
    moved,
    prompts_of,
)  # fmt: skip

from flaxdraft.plugins import settings_of

# In every value and override below, {here} is the folder of the module's files, {base} that of a run of `run.yaml` that
# has ended.


BASE = {
    "output_dir": "{here}/out",
    "target": {"path": "{here}/tiny.gguf"},
    "data": {"prompts": "{here}/prompts.jsonl", "max_answer_tokens": 12, "rows": 4},
    "draft": {"draft_vocab_size": 64},
    "algorithm": {"ttt_length": 1},
    "train": {
        "num_steps": 8, "batch_size": 4, "learning_rate": 2e-3, "compute_dtype": "float32", "log_every": 2,
        "eval_every": 4, "checkpoint_every": 3,
    },
    "evaluate": {"max_new_tokens": 10, "chain_length": 3},
    "export": {"dtype": "float32", "step": "latest"},
}  # fmt: skip
# All in one run, since each is seen by something else.
OTHER = {
    "output_dir": "{here}/elsewhere", "name": "other", "data.prompts": "{here}/others.jsonl", "data.num_prompts": 8,
    "data.max_answer_tokens": 11, "data.rows": 3, "data.feature_dtype": "float32", "data.prefetch": 0,
    "train.num_steps": 9, "train.log_every": 5, "train.eval_every": 3, "train.checkpoint_every": 2,
    "train.keep_latest": 1, "train.keep_every": 3, "train.ema_decay": 0.5, "train.profile": [2, 3],
    "train.wandb": "drafts", "evaluate.max_new_tokens": 9, "evaluate.chain_length": 2, "evaluate.decode_prompts": 2,
    "export.engine": "tpu-inference", "export.dtype": "bfloat16",
    "export.step": "best",
}  # fmt: skip
CHATS = ("data.conversations={here}/chats.jsonl",)
DATED = ("target.path={here}/dated.gguf",)  # whose chat template writes the day, and a mood
PROCESSES = ("hosts.coordinator=localhost:1", "hosts.num_processes=2", "hosts.process_id=1")
WSD, MEAN = ("train.schedule=wsd",), ("train.ema_decay=0.5",)
EVERY_FOURTH = [*range(0, 256, 4)]
SERVED_AS = {"sglang": "LlamaForCausalLMEagle3", "tpu-inference": "Eagle3LlamaForCausalLM"}


ROWS: dict[str, list] = {
    "output_dir": [Ends(lambda run, value: (Path(value) / "data" / "data.json") in run.files())],
    "name": [Ends(lambda run, value: run.file("export").parent.name == (value or "llama"))],
    "seed": [Differs("weights", 1), Differs("batches", 1)],
    "target.path": [Differs("weights", "{here}/another.gguf"), Differs("batches", "{here}/another.gguf")],
    "target.sha256": [Says("'00'", "sha256 is .* target.sha256 says 00")],
    "target.tap_layers": [Differs("batches", [0, 2, 4]), Differs("config_json", [0, 2, 4])],
    "target.dtype": [Differs("batches", "bfloat16")],
    # The same figures on every mesh: tests/multidevice/test_target_of_a_run.py.
    "target.mesh.data": [Says(2, r"weights a device \(data 2\)", code=0)],
    "target.mesh.fsdp": [Says(2, r"weights a device \(fsdp 2\)", code=0)],
    "target.mesh.tensor": [Says(2, r"weights a device \(tensor 2\)", code=0)],
    "target.mesh.expert": [Says(2, r"weights a device \(expert 2\)", code=0)],
    "data.prompts": [Ends(lambda run, value: {*run.prompts("train"), *run.prompts("held_out")} <= prompts_of(value))],
    "data.store": [Differs("batches", "{here}/store")],
    "data.conversations": [Differs("batches", "{here}/chats.jsonl")],
    "data.max_length": [Differs("batches", 40, CHATS)],
    "data.last_turn_only": [Differs("batches", True, CHATS)],
    "data.mask_reasoning": [Differs("batches", True, CHATS)],
    "data.max_silent": [Says(0.0, r"1 of 7 conversations .* a share of 0.0 \(data.max_silent\)", CHATS)],
    "data.on_bad_row": [Says("skip", "1 bad row left out", ("data.conversations={here}/bad.jsonl",), code=0)],
    "data.template": [Differs("batches", {"mood": "kind"}, given) for given in (DATED, (*DATED, *CHATS))],
    "data.date": [
        Differs("batches", "2026-01-31", (*DATED, *rows, "data.date=2026-01-30")) for rows in ((), CHATS)
    ],
    "data.last_batch": [Differs("batches", "drop")],
    "data.prefetch": [Ends(lambda run, value: run.readers == {value == 0})],
    "data.num_prompts": [Ends(lambda run, value: len(run.prompts("train")) == (value or 10))],
    "data.max_prompt_tokens": [Says(8, "tokens, data.max_prompt_tokens is 8")],
    "data.max_answer_tokens": [Ends(lambda run, value: lengths(run, "train") == {value})],
    "data.rows": [
        Ends(lambda run, value: len(run.answers("train")) == math.ceil(len(run.prompts("train")) / value)),
        Ends(lambda run, value: run.decoded[-1].num_prompts == (len(run.prompts("held_out")) - 1) % value + 1),
    ],
    "data.feature_dtype": [Ends(lambda run, value: run.answers("train")[0][0].features.taps_BTKE.dtype == value)],
    "draft.architecture": [Differs("weights", "mla")],
    "draft.draft_vocab_size": [Begins(32, lambda first, value: first.weights["lm_head/kernel"].shape[1] == value)],
    "draft.vocab_map": [Begins("{here}/d2t.npy", lambda first, _: first.frozen["target_ids"].tolist() == EVERY_FOURTH)],
    "draft.fields": [
        Begins({"intermediate_size": 48}, lambda first, _: first.weights["mlp/up_proj/kernel"].shape[1] == 48)
    ],
    "draft.warm_start": [Differs("weights", False)],
    "draft.init_from": [Begins("{base}/llama/export", begins_with)],
    "train.num_steps": [Differs("update", 9), Ends(lambda run, value: logged(run, "train")[-1] == value)],
    "train.batch_size": [Differs("batches", 2)],
    "train.accumulate": [Differs("step", 2)],  # the same figures: tests/multidevice/test_micro_batches.py
    "train.learning_rate": [Differs("update", 1e-3)],
    "train.schedule": [Differs("update", "constant"), Differs("update", "wsd")],
    "train.warmup_ratio": [Differs("update", 0.5)],
    "train.decay_ratio": [Differs("update", 0.5, WSD)],
    "train.final_lr_ratio": [Differs("update", 0.1), Differs("update", 0.1, WSD)],
    "train.optimizer": [Differs("update", "muon")],
    "train.betas": [Differs("update", [0.8, 0.95]), Differs("update", [0.9, 0.8])],
    "train.eps": [Differs("update", 1e-3)],
    "train.weight_decay": [Differs("update", 0.1)],
    "train.clip_norm": [Differs("update", 0.1)],
    "train.ema_decay": [Differs("update", 0.9, MEAN), Ends(lambda run, value: moved(run, MEAN_MOVES if value else 1))],
    "train.compute_dtype": [
        Differs("step", "bfloat16"), Begins("bfloat16", lambda first, value: first.teacher_dtypes() == {value})
    ],
    "train.float8": [Differs("step", True)],
    "train.pack_length": [Differs("batches", 128)],
    "train.length_buckets": [Differs("batches", 1, CHATS)],
    "train.log_every": [Ends(lambda run, value: logged(run, "train") == due(value, run))],
    "train.eval_every": [Ends(lambda run, value: logged(run, "held_out") == [0, *due(value, run)])],
    "train.checkpoint_every": [Ends(lambda run, value: run.saved == sorted({*due(value, run), best(run)}))],
    "train.keep_latest": [Ends(lambda run, value: kept(run, value, run.config.train.keep_every))],
    "train.keep_every": [Ends(lambda run, value: kept(run, run.config.train.keep_latest, value))],
    "train.resume": [Says("{base}/llama/checkpoints/6", "resuming at step 6", code=0)],
    "train.max_skipped": [Says(3, "at step 3, the last of 3 steps in a row that are not finite", loss=math.nan)],
    "train.profile": [Ends(lambda run, value: run.traced == (value or []))],
    "train.wandb": [Ends(lambda run, value: run.projects == ([] if value is None else [value]))],
    "evaluate.max_new_tokens": [
        Ends(lambda run, value: lengths(run, "held_out") == {value}),
        Ends(lambda run, value: set.union(*run.evaluated) == {value}),
        Ends(lambda run, value: {call.settings.max_new_tokens for call in run.decoded} == {value}),
    ],
    "evaluate.chain_length": [
        Ends(lambda run, value: {len(line["accuracy"]) for line in run.metrics("held_out")} == {value}),
        Ends(lambda run, value: {call.settings.chain_length for call in run.decoded} == {value}),
        Ends(lambda run, value: run.evaluation()["chain_length"] == value),
    ],
    "evaluate.decode_prompts": [
        Ends(lambda run, value: sum(call.num_prompts for call in run.decoded)
             == len(run.prompts("held_out")) + value * len(run.metrics("held_out"))),
    ],
    "export.engine": [Ends(lambda run, value: run.config_json()["architectures"] == [SERVED_AS[value]])],
    "export.step": [Ends(lambda run, value: chosen(run) == (best(run) if value == "best" else run.saved[-1]))],
    "export.dtype": [Ends(lambda run, value: run.exported()["lm_head.weight"].dtype == value)],
    # The same figures on every mesh: tests/multidevice/test_meshes.py.
    "mesh.data": [Differs("places", 2)],
    "mesh.fsdp": [Differs("places", 2), Begins(2, lambda first, _: first.largest_share == 0.5)],
    "mesh.tensor": [Differs("places", 2), Begins(2, lambda first, _: first.largest_share == 0.5)],
    "mesh.sequence": [Differs("places", 2)],
    "hosts.coordinator": [Told("localhost:2", "coordinator_address")],
    "hosts.num_processes": [Told(3, "num_processes")],
    "hosts.process_id": [Told(0, "process_id")],
    "hosts.heartbeat_seconds": [Told(60, "heartbeat_timeout_seconds")],
}  # fmt: skip


def fields(section: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every field of a configuration."""
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from fields(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


CHAT = [
    {"role": "user", "content": "and the inn in the land"},
    {"role": "assistant", "content": "<think>the and</think>then an inn"},
    {"role": "user", "content": "and then"},
    {"role": "assistant", "content": "the land and the inn"},
]


@pytest.fixture(scope="module")
def here(tmp_path_factory, tiny_gguf):
    """What the tables name."""
    root = tmp_path_factory.mktemp("wire")
    (root / "tiny.gguf").symlink_to(tiny_gguf)
    write_tiny_gguf(root / "another.gguf", seed=1)
    dated = "{{ strftime_now('%d') }}{% if mood is defined %}{{ mood }}{% endif %}" + TEMPLATE
    write_tiny_gguf(root / "dated.gguf", template=dated)
    write_prompts(root / "prompts.jsonl")
    (root / "others.jsonl").write_text((root / "prompts.jsonl").read_text().replace("prompt ", "words "))
    chats = [{"messages": [CHAT[0] | {"content": f"and {i}"}, *CHAT[1 : 4 if i < 2 else 2]]} for i in range(6)]
    chats.append({"messages": CHAT[:1]})  # supervises nothing
    (root / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    (root / "bad.jsonl").write_text((root / "chats.jsonl").read_text() + "{}\n")
    np.save(root / "d2t.npy", np.array(EVERY_FOURTH) - np.arange(64))
    (root / "run.yaml").write_text(yaml.safe_dump(BASE).replace("{here}", str(root)))
    return root


@pytest.fixture(scope="module")
def command(here):
    return Command(here / "run.yaml")


@pytest.fixture(scope="module")
def say(here, command):
    """say(field, value): an override; the files that it names are then there."""

    def filled(text: str) -> str:
        if "{here}/store" in text and not (here / "store").exists():
            command.store(here / "chats.jsonl", here / "store")
        if "{base}" in text:
            text = text.replace("{base}", command.ended().config.output_dir)
        return text.replace("{here}", str(here))

    return lambda field, value: filled(f"{field}={value if isinstance(value, str) else json.dumps(value)}")


def check(row: Any, field: str, command: Command, say: Callable[[str, Any], str], algorithm: str = "") -> None:
    value_of = lambda *overrides: dict(fields(command.config(*overrides)))[field]  # noqa: E731
    if isinstance(row, Ends):
        ends = command.ended(), command.ended(*map(say, OTHER, OTHER.values()))
        values = [dict(fields(run.config))[field] for run in ends]
        assert values[0] != values[1], "OTHER has no other value"
        for run, own, foreign in zip(ends, values, reversed(values), strict=True):
            assert run.code == 0, run.complained
            assert row.holds(run, own)
            assert not row.holds(run, foreign), "this holds whatever the value is"
        return
    if isinstance(row, As):
        name, (own, other) = field.removeprefix("algorithm."), map(settings_of, (algorithm, row.algorithm))
        declares = lambda kind: next(one for one in kind.__mro__ if name in vars(one).get("__annotations__", {}))  # noqa: E731
        assert declares(own) is declares(other)
        return
    changed, both = say(field, row.to), [say(*text.split("=")) for text in getattr(row, "given", ())]
    # A value that is refused is in no configuration.
    other = row.to if isinstance(row, Says) else value_of(*both, changed)
    assert value_of(*both) != other, "this is no other value"
    if isinstance(row, Begins):
        assert row.holds(command.first(changed), value_of(changed))
        assert not row.holds(command.first(), value_of(changed)), "this holds whatever the value is"
    elif isinstance(row, Told):
        assert command.joins(*PROCESSES).get(row.name) != row.to
        assert command.joins(*PROCESSES, changed).get(row.name) == row.to
    elif isinstance(row, Says):
        run = command.ended(*both, changed, loss=row.loss)
        assert run.code == row.code, run.complained
        assert re.search(row.message, run.complained + run.said), run.complained
    else:
        look = getattr(command, row.look)
        assert look(*both) != look(*both, changed)


def test_every_field_has_its_rows_and_every_row_its_field(command):
    found = {name for name, _ in fields(command.config()) if not name.startswith("algorithm.")}
    assert found == set(ROWS)
    assert set(algorithms()) == set(SETTINGS)
    for name, rows in SETTINGS.items():
        section = command.config(f"algorithm.name={name}").algorithm
        assert {field for field, _ in fields(section)} == set(rows), name
    assert all(ROWS.values())
    assert all(all(rows.values()) for rows in SETTINGS.values())


@pytest.mark.parametrize("field", ROWS)
def test_the_field_shows(field, command, say):
    for row in ROWS[field]:
        check(row, field, command, say)


@pytest.mark.parametrize(("name", "field"), [(name, field) for name, rows in SETTINGS.items() for field in rows])
def test_the_setting_of_an_algorithm_shows(name, field, command, say):
    for row in SETTINGS[name][field]:
        check(row, f"algorithm.{field}", command, say, name)


@pytest.mark.parametrize("look", ["step", "update", "weights", "batches", "places"])
def test_nothing_is_seen_of_a_field_that_is_for_something_else(look, command):
    """So a difference is one of the field that was changed."""
    assert getattr(command, look)() == getattr(command, look)("train.log_every=7")


@pytest.mark.parametrize("name", ["base", "other"])
def test_the_trained_weights_are_those_that_are_evaluated(name, command, say):
    """In the end as after the chosen step of training, and with a running mean that mean."""
    run = command.ended(*([] if name == "base" else map(say, OTHER, OTHER.values())))
    at_the_end = run.evaluation()["teacher_forced"]["loss"]
    losses = {line["step"]: line["loss"] for line in run.metrics("held_out")}
    assert_close(at_the_end, losses[chosen(run)], ulp=8, dtype=np.float32)
    each = MEAN_MOVES if name == "other" else 1
    assert_close(losses[chosen(run)] - losses[0], float(each * chosen(run)), rtol=1e-3)
