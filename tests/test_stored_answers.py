"""The answers under `data/` are bound by what they depend on and by nothing else: any draft of the target may use them,
whatever it trains on and however its rows are put into batches."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from tiny_runs import make_workspace

from flaxdraft.config import DataConfig, load_config
from flaxdraft.data import answers as answers_module
from flaxdraft.data.documents import Answer
from flaxdraft.data.store import MANIFEST
from flaxdraft.errors import InputError
from flaxdraft.interfaces import Features
from flaxdraft.run.answers import answer_prompts
from flaxdraft.run.setup import claim_folders, prepare
from flaxdraft.run.target import RunTarget
from flaxdraft.stages import same_inputs
from flaxdraft.stages.claims import Stage, claim
from flaxdraft.stages.directory_lock import directory_lock
from flaxdraft.targets import OpenedTarget

# Field -> another value, and whether stored answers and a draft depend on it.
FIELDS = {
    "prompts": ("other.jsonl", True, True), "num_prompts": (7, True, True), "max_prompt_tokens": (100, True, True),
    "max_answer_tokens": (11, True, True), "rows": (3, True, True), "feature_dtype": ("float32", True, True),
    "store": ("store", False, True), "conversations": ("chats.jsonl", False, True), "max_length": (64, False, True),
    "last_turn_only": (True, False, True), "mask_reasoning": (True, False, True), "max_silent": (0.1, False, True),
    "last_batch": ("drop", False, True), "prefetch": (1, False, False),
    "on_bad_row": ("skip", False, False), "template": ("{mood: kind}", True, True), "date": ("2026-01-31", True, True),
}  # fmt: skip
FILES = ("prompts", "store", "conversations")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, tiny_gguf):
    root = make_workspace(tmp_path_factory.mktemp("run"), tiny_gguf)
    (root / "other.jsonl").write_text((root / "prompts.jsonl").read_text().replace("prompt 0", "prompt zero"))
    (root / "chats.jsonl").write_text("{}")
    (root / "store").mkdir()
    (root / "store" / MANIFEST).write_text("{}")
    return root


@pytest.fixture
def make_run(workspace, monkeypatch):
    """A run of the workspace with some fields of `data` changed."""
    monkeypatch.setattr("flaxdraft.run.setup.FeatureStore", lambda path: SimpleNamespace(directory=workspace / "store"))

    def make(*overrides, **data):
        changed = [f"data.{name}={workspace / value if name in FILES else value}" for name, value in data.items()]
        return prepare(load_config(str(workspace / "run.yaml"), [*changed, *overrides]))

    return make


@pytest.fixture
def answered(monkeypatch):
    """Answers of random numbers in place of a target's; the list has the number of prompts of each asking."""
    asked = []

    def row(prompt, stop_tokens):
        zeros = lambda *shape: np.zeros((len(prompt) + 2, *shape), np.float32)  # noqa: E731
        features = Features(zeros(3, 4), zeros(4), zeros().astype(np.int32), zeros())
        return Answer(np.array([*prompt, 5, stop_tokens[0]], np.int32), len(prompt), features)

    def answer(target, prompts, max_new_tokens, stop_tokens, num_rows, on_step):
        asked.append(len(prompts))
        return [row(prompt, stop_tokens) for prompt in prompts]

    loaded = lambda target: SimpleNamespace(model=None, tokenizer=target.tokenizer, stop_tokens=[2])  # noqa: E731
    monkeypatch.setattr("flaxdraft.data.answers.answer_greedily", answer)
    monkeypatch.setattr(RunTarget, "loaded", property(loaded))
    return asked


def test_every_field_is_decided():
    assert FIELDS.keys() == DataConfig.model_fields.keys()
    assert {f"data.{name}" for name, (_, answers, draft) in FIELDS.items() if draft and not answers} == {
        *same_inputs.NOT_OF_ANSWERS
    }


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_binds_what_depends_on_it(make_run, name):
    value, answers, draft = FIELDS[name]
    before, after = make_run(), make_run(**{name: value})
    assert bool(same_inputs.differing(before.answer_inputs, after.answer_inputs)) == answers
    assert bool(same_inputs.differing(before.draft_inputs, after.draft_inputs)) == draft


def test_where_the_target_lies_binds_nothing_and_its_dtype_all(make_run):
    """What a run of before did not say was float32; the default is the value that is used."""
    before, spread, narrow = make_run(), make_run("target.mesh.fsdp=2"), make_run("target.dtype=bfloat16")
    for name in ("answer_inputs", "draft_inputs"):
        inputs = getattr(before, name)
        assert inputs["target"]["dtype"] == "float32"
        assert not same_inputs.differing(inputs, getattr(spread, name))
        assert not same_inputs.differing(inputs, getattr(make_run("target.dtype=float32"), name))
        found = same_inputs.differing(inputs, getattr(narrow, name))
        assert found == {"target.dtype": ("float32", "bfloat16")}
        older = inputs | {"target": {name: value for name, value in inputs["target"].items() if name != "dtype"}}
        assert not same_inputs.differing(older, inputs)
        assert same_inputs.differing(older, getattr(narrow, name)) == found


def test_results_of_before_stand(make_run, tmp_path):
    """Their key lacks the fields that were not there yet. Those of another dtype do not stand."""
    now = make_run().draft_inputs
    older = now | {"target": {name: value for name, value in now["target"].items() if name != "dtype"}}
    oldest = older | {"train": {name: value for name, value in older["train"].items() if name != "float8"}}
    for number, inputs in enumerate((now, older, oldest)):
        Stage(tmp_path / "result.json", inputs).store(number)
        assert Stage(tmp_path / "result.json", now).load() == number
        assert Stage(tmp_path / "result.json", make_run("target.dtype=bfloat16").draft_inputs).load() is None
        assert Stage(tmp_path / "result.json", make_run("train.float8=true").draft_inputs).load() is None


def test_a_folder_of_before_is_taken_over(make_run, tmp_path):
    """Its inputs name the whole section; what the answers depend on is compared all the same."""
    old = make_run(last_batch="drop", max_length=64, conversations="chats.jsonl")
    (tmp_path / "result").touch()
    (tmp_path / "inputs.json").write_text(json.dumps(old.answer_inputs | {"data": old.draft_inputs["data"]}))
    with pytest.raises(InputError, match=r"data.rows: there 4, here 3\)"):
        claim(tmp_path, make_run(rows=3).answer_inputs, "")
    claim(tmp_path, make_run().answer_inputs, "")
    assert json.loads((tmp_path / "inputs.json").read_text()) == make_run().answer_inputs
    with pytest.raises(InputError, match=r"data.rows: there 4, here 3\)"):
        claim(tmp_path, make_run(rows=3).answer_inputs, "")


def test_answers_are_asked_for_once_whatever_is_trained_on(make_run, answered, tmp_path):
    """Ten prompts to train on and four held out, four at a time."""
    here = f"output_dir={tmp_path}"

    def splits(**data):
        setup = make_run(here, f"name=draft-{len(list(tmp_path.iterdir()))}", **data)
        claim_folders(setup)
        (setup.draft_dir / "metrics.jsonl").touch()
        answers = answer_prompts(setup, RunTarget(setup))
        return {split: len(answers.rows(split)) for split in setup.splits}

    assert splits(conversations="chats.jsonl") == {"held_out": 4}
    assert answered == [4]
    assert splits(last_batch="drop") == {"train": 10, "held_out": 4}  # the held-out answers are there
    assert sum(answered) == 14
    del answered[:]
    assert splits(store="store", max_length=64) == {"held_out": 4}
    assert splits(max_silent=0.1) == {"train": 10, "held_out": 4}
    assert not answered
    with pytest.raises(InputError, match=r"data.max_answer_tokens: there 12, here 11"):
        splits(max_answer_tokens=11)


def test_prompts_of_several_turns_are_refused(make_run, answered, workspace, tmp_path):
    """The draft trains on something else, so only held-out prompts are needed: MT-bench's questions would do."""
    (workspace / "questions.jsonl").write_text(json.dumps({"question_id": 1, "turns": ["a", "b"]}))
    setup = make_run(f"output_dir={tmp_path}", prompts="questions.jsonl", conversations="chats.jsonl")
    with pytest.raises(InputError, match=r"questions.jsonl: prompt '1' has 2 turns; those of a run have one"):
        answer_prompts(setup, RunTarget(setup))
    assert not answered


def test_a_folder_in_use_is_not_claimed(make_run, tmp_path):
    """Its holder may not have written anything yet."""
    holder, other = (make_run(f"output_dir={tmp_path}", rows=rows) for rows in (4, 3))
    claim_folders(holder)
    before = (holder.data_dir / "inputs.json").read_bytes()
    with directory_lock(holder.data_dir), pytest.raises(InputError, match="data is in use by process"):
        claim_folders(other)
    assert (holder.data_dir / "inputs.json").read_bytes() == before


def test_a_target_without_an_end_token_is_refused_before_it_is_loaded(make_run, tmp_path, monkeypatch):
    setup = make_run(f"output_dir={tmp_path}")
    claim_folders(setup)
    monkeypatch.setattr(OpenedTarget, "stop_tokens", [])
    monkeypatch.setattr(RunTarget, "loaded", property(lambda target: pytest.fail("it was loaded")))
    with pytest.raises(InputError, match=r"names no token that ends an answer; expected eos_token_id"):
        answer_prompts(setup, RunTarget(setup))


def test_answers_end_at_every_end_token_of_the_target(make_run, answered, tmp_path, monkeypatch):
    setup, asked = make_run(f"output_dir={tmp_path}"), []
    claim_folders(setup)
    monkeypatch.setattr(OpenedTarget, "stop_tokens", [2, 7])
    inner = answers_module.answer_greedily
    monkeypatch.setattr(answers_module, "answer_greedily", lambda *args: (asked.append(args[3]), inner(*args))[1])
    assert answer_prompts(setup, RunTarget(setup)).stops == [2, 7]
    assert set(map(tuple, asked)) == {(2, 7)}


def test_answers_of_before_keep_the_one_token_that_ended_them(make_run, answered, tmp_path):
    setup = make_run(f"output_dir={tmp_path}")
    claim_folders(setup)
    assert answer_prompts(setup, RunTarget(setup)).stops == [2]
    record = setup.data_dir / "data.json"
    stored = json.loads(record.read_text())
    assert stored["result"].pop("stops") == [2]
    stored["result"]["eos"] = 5
    record.write_text(json.dumps(stored))
    assert answer_prompts(setup, RunTarget(setup)).stops == [5]
