"""Which checkpoint a run goes on from, and what must be the same."""

import re
import shutil

import jax
import numpy as np
import pytest
from jax import P

from flaxdraft.errors import InputError
from flaxdraft.interfaces import VocabMap
from flaxdraft.stages import same_inputs
from flaxdraft.stages.claims import check_claimed, claim
from flaxdraft.train.checkpoint import Checkpoints, abstract_like
from flaxdraft.train.resume import Resume, begin, goes_back
from flaxdraft.train.state import SCHEMA

INPUTS = {
    "seed": 0, "target": {"path": "/a/target", "content": "abc"}, "data": {"prompts": "digest", "prefetch": 4},
    "train": {
        "batch_size": 8, "num_steps": 100, "schedule": "cosine", "accumulate": 1, "log_every": 10, "resume": "auto",
        "betas": (0.9, 0.95),
    },
}  # fmt: skip
VOCAB = VocabMap(np.arange(5) * 2, 20, "tokenizer and data")
WALKED = {"kind": "walked", "chain_length": 4, "prompts": 40}
SCORES = {10: 1.0, 20: 3.0, 30: 2.0}


def changed(**train):
    return INPUTS | {"train": INPUTS["train"] | train}


def arrays(step: int):
    place = jax.NamedSharding(jax.make_mesh((2,), ("data",)), P())
    put = lambda x: jax.device_put(np.asarray(x), place)  # noqa: E731
    return {"state": {"step": put(np.int32(step)), "w": put(np.full((64, 64), step, np.float32))},
            "counters": {"tokens": put(np.array([step, 0], np.int32))}}  # fmt: skip


def record(score, origin="", inputs=INPUTS):
    return {
        "schema": SCHEMA, "score": score, "measure": WALKED, "inputs": inputs, "origin": origin,
        "vocab": {"source": VOCAB.source},
    }  # fmt: skip


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    directory = tmp_path_factory.mktemp("written")
    with Checkpoints(directory, keep_latest=9) as checkpoints:
        for step, score in SCORES.items():
            checkpoints.save(step, arrays(step), VOCAB, record(score))
    return directory


@pytest.fixture
def directory(written, tmp_path):
    """Checkpoints of steps 10, 20 (the best) and 30."""
    return shutil.copytree(written, tmp_path / "checkpoints", symlinks=True)


def go_on(directory, request="auto", inputs=INPUTS, vocab=VOCAB, allowed=(), measure=WALKED):
    """The step that a run begins from."""
    checkpoints = Checkpoints(directory, keep_latest=9)
    begun = begin(checkpoints, Resume(request, inputs, vocab, allowed, measure), abstract_like(arrays(0)))
    if begun is None:
        return None
    step = int(begun.arrays["state"]["step"])
    assert begun.record["step"] == step
    assert float(begun.arrays["state"]["w"][0, 0]) == int(begun.arrays["counters"]["tokens"][0]) == step
    return step


@pytest.mark.parametrize(("request_", "step"), [("auto", 30), ("latest", 30), ("best", 20), ("step 10", 10)])
def test_the_checkpoint_that_is_asked_for(directory, request_, step):
    assert go_on(directory, request_) == step
    left = sorted(path.name for path in directory.iterdir() if path.name[0].isdigit())
    older = [str(s) for s in SCORES if s <= step]
    assert left == sorted([*older, *(f"{s}.superseded" for s in SCORES if s > step)])  # nothing is lost


def test_a_repeated_command_goes_on_with_what_it_began(directory):
    """A launcher starts `train.resume=best` again after the run has come further."""
    assert go_on(directory, "best") == 20
    with Checkpoints(directory, keep_latest=9) as checkpoints:
        checkpoints.save(25, arrays(25), VOCAB, record(1.0, origin="best"))
    assert go_on(directory, "best") == 25


def test_a_run_goes_back_once(directory):
    """To an older checkpoint that is asked for, until it has checkpoints of its own from there."""
    asked = {"auto": False, "latest": False, "none": False, "step 30": False, "best": True, "step 10": True}
    assert {request: goes_back(request, directory) for request in asked} == asked
    with pytest.raises(InputError, match=r"train.resume: step 11, but .* holds steps 10, 20, 30"):
        goes_back("step 11", directory)
    with pytest.raises(InputError, match=r"holds step 30 of a run that did not begin there"):
        goes_back(str(directory / "10"), directory)
    assert go_on(directory, "step 10") == 10
    with Checkpoints(directory, keep_latest=9) as checkpoints:
        checkpoints.save(15, arrays(15), VOCAB, record(1.0, origin="step 10"))
    assert not goes_back("step 10", directory)


def test_scores_of_another_measure_are_left_out_aloud(directory, capsys):
    go_on(directory)
    assert capsys.readouterr().out == ""
    go_on(directory, measure=WALKED | {"chain_length": 2})
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("older checkpoints (steps 10, 20, 30) measure something else than evaluate.* asks for now") == 1


def test_another_run_s_checkpoint(written, tmp_path):
    path = str(written / "best")  # a link, for people
    assert go_on(tmp_path / "new", path) == 20
    with Checkpoints(tmp_path / "new") as checkpoints:
        checkpoints.save(22, arrays(22), VOCAB, record(None, origin=path))
    assert go_on(tmp_path / "new", path) == 22
    with pytest.raises(InputError, match=r"holds step 30 of a run that did not begin there"):
        go_on(written, str(tmp_path / "new" / "22"))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ("none", r"train.resume: none, but .* holds a checkpoint of step 30"),
        ("step 11", r"train.resume: step 11, but .* holds steps 10, 20, 30"),
    ],
)
def test_a_request_that_cannot_be_met(written, request_, message):
    with pytest.raises(InputError, match=message):
        go_on(written, request_)


def test_nothing_to_go_on_from(tmp_path):
    assert go_on(tmp_path) is None
    assert go_on(tmp_path, "none") is None
    with pytest.raises(InputError, match=r"train.resume: best, but .* holds no complete checkpoint"):
        go_on(tmp_path, "best")


def damage(directory, step):
    for path in (directory / str(step) / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:40])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of Orbax's reads beside a failing one
@pytest.mark.usefixtures("damaged_reads")
def test_auto_takes_the_newest_that_can_be_read(directory, capsys):
    damage(directory, 30)
    (directory / "20" / "_CHECKPOINT_METADATA").write_text("{")
    with pytest.raises(InputError, match=r"30: the checkpoint cannot be read .*train.resume=auto"):
        go_on(directory, "latest")
    assert go_on(directory) == 10
    said = " ".join(capsys.readouterr().out.split())
    for step in (20, 30):
        assert re.search(f"warning: the checkpoint of step {step} cannot be read .*set aside as .*{step}.damaged", said)
        assert (directory / f"{step}.damaged").is_dir()
    damage(directory, 10)
    with pytest.raises(InputError, match=r"no checkpoint can be read; the damaged ones are set aside"):
        go_on(directory)
    assert go_on(directory) is None


def test_what_may_change(written):
    moved = INPUTS | {"target": {"path": "/b/target", "content": "abc"}, "data": {"prompts": "digest", "prefetch": 0}}
    for inputs in (changed(accumulate=4, log_every=1, resume="latest"), moved, {**INPUTS, "mesh": {"data": 8}}):
        assert go_on(written, inputs=inputs) == 30


def test_what_may_not_change_is_refused_with_both_values_or_forced(written):
    other_target = INPUTS | {"target": {"path": "/a/target", "content": "def"}}
    for inputs, field, values in (
        (changed(batch_size=16), "train.batch_size", "there 8, here 16"),
        (changed(num_steps=200), "train.num_steps", "there 100, here 200"),
        (other_target, "target.content", "there 'abc', here 'def'"),
        (INPUTS | {"seed": 1}, "seed", "there 0, here 1"),
    ):
        with pytest.raises(InputError, match=f"{field}: {values}.*add --allow-change {field}"):
            go_on(written, inputs=inputs)
        assert go_on(written, inputs=inputs, allowed=(field,)) == 30


def test_another_vocabulary_map_is_refused(written):
    for vocab in (VocabMap(np.arange(5), 20, VOCAB.source), VocabMap(VOCAB.target_ids_W, 20, "other data")):
        with pytest.raises(InputError, match=r"has another vocabulary map \(5 tokens"):
            go_on(written, vocab=vocab)


def test_a_run_on_a_constant_schedule_may_be_made_longer():
    old, new = changed(schedule="constant"), changed(schedule="constant", num_steps=200)
    assert not same_inputs.differing(old, new)
    assert same_inputs.differing(INPUTS, new)["train.num_steps"] == (100, 200)


def test_a_run_of_before_a_field_goes_on_with_what_it_did():
    assert not same_inputs.differing(INPUTS, changed(float8=False))
    assert same_inputs.differing(INPUTS, changed(float8=True)) == {"train.float8": (False, True)}


def test_the_folder_remembers_the_newest_inputs(tmp_path):
    """A free field may change back and forth; a binding one is compared with what was allowed last."""
    claim(tmp_path, INPUTS, "", ())
    (tmp_path / "result").write_text("")
    claim(tmp_path, changed(accumulate=2), "", ())
    claim(tmp_path, changed(batch_size=16), "", ("train.batch_size",))
    with pytest.raises(InputError, match=r"train.batch_size: there 16, here 8.* add --allow-change train.batch_size"):
        claim(tmp_path, INPUTS, "", ())


def test_other_processes_check_a_folder_and_write_nothing(tmp_path):
    with pytest.raises(InputError, match=r"inputs.json: cannot be read .* output_dir must lie where all processes"):
        check_claimed(tmp_path / "elsewhere", INPUTS, "", ())
    assert not (tmp_path / "elsewhere").exists()
    claim(tmp_path, INPUTS, "", ())
    before = (tmp_path / "inputs.json").stat()
    check_claimed(tmp_path, changed(accumulate=2), "", ())
    with pytest.raises(InputError, match=r"train.batch_size: there 8, here 16"):
        check_claimed(tmp_path, changed(batch_size=16), "", ())
    assert (tmp_path / "inputs.json").stat() == before
