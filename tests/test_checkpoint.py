"""Checkpoints on disk: what stays, what is selected, what damage does, what a full disk does."""

import contextlib
import math
import os
import resource
import shutil
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P

from flaxdraft.errors import InputError
from flaxdraft.interfaces import VocabMap
from flaxdraft.train import retention
from flaxdraft.train.checkpoint import (
    Checkpoints,
    DamagedError,
    abstract_like,
    fingerprint,
    load,
    read_record,
    read_saved,
)

VOCAB = VocabMap(np.arange(5) * 2, 20)


def mesh_of(*shape):
    return jax.make_mesh(shape, ("data", "model"))


def arrays(mesh, value: float = 1.0):
    """A state of every kind of array, in pieces and whole."""
    put = lambda x, *spec: jax.device_put(x, jax.NamedSharding(mesh, P(*spec)))  # noqa: E731
    weight = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32) * value
    state = {
        "w": put(weight, "data", "model"), "narrow": put(jnp.arange(8, dtype=jnp.bfloat16)), "step": put(jnp.int32(3)),
        "key": put(jax.random.key(7)), "mask": put(np.array([True, False])),
    }  # fmt: skip
    return {"state": state, "counters": {"tokens": put(np.array([5, 0], np.int32))}}


def record(score=None, measure=None):
    return {"score": score, "measure": measure, "inputs": {}, "origin": "", "vocab": {"source": ""}}


def words(tree):
    plain = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x  # noqa: E731
    return [np.asarray(plain(x)).tobytes() for x in jax.tree.leaves(tree)]


def steps_on_disk(directory: Path) -> list[int]:
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit())


SCORES = {5: None, 10: 1.2, 15: 1.9, 20: 1.4, 25: None, 30: 1.9, 35: 1.5, 40: 1.1}


def test_rotation_keeps_what_is_promised(tmp_path):
    """The last two, every twentieth, the best (15: the first of two with its score); in a run, after it, and after a
    restart that goes on; also where the folder was moved in between."""
    directory, state = tmp_path / "checkpoints", arrays(mesh_of(4, 2))
    promised = {20: {15, 20}, 30: {15, 20, 25, 30}, 40: {15, 20, 35, 40}}
    with Checkpoints(directory, keep_latest=2, keep_every=20) as checkpoints:
        for step, score in SCORES.items():
            checkpoints.save(step, state, VOCAB, record(score))
            if step in promised:
                checkpoints.finish()
                assert steps_on_disk(directory) == sorted(promised[step])
    assert steps_on_disk(directory) == [15, 20, 35, 40]
    moved = tmp_path / "moved"
    directory.rename(moved)
    assert (os.readlink(moved / "latest"), os.readlink(moved / "best")) == ("40", "15")
    with Checkpoints(moved, keep_latest=2, keep_every=20) as checkpoints:
        assert (checkpoints.latest.step, checkpoints.best.step, checkpoints.best_score(None)) == (40, 15, 1.9)
        for step, score in {45: 1.8, 50: 2.0, 55: 0.5, 60: None}.items():
            checkpoints.save(step, state, VOCAB, record(score))
    assert steps_on_disk(moved) == [20, 40, 50, 55, 60]
    assert os.readlink(moved / "best") == "50"


def test_the_best_is_the_first_of_the_highest():
    assert retention.best({10: 1.0, 20: 3.0, 30: 3.0, 40: None}) == 20
    assert retention.best({10: None}) is None
    assert retention.kept({10: None, 20: None, 30: None}, 1, None) == {30}


def test_only_scores_of_one_measure_compete(tmp_path):
    """A run that is started again with other settings of its evaluation: its older scores, however high, hold no place
    against the new ones, and one of before scores said what they measure competes with those of its kind alone."""
    walked, decoded = ({"kind": kind, "chain_length": 3, "prompts": 4} for kind in ("walked", "decoded"))
    state = arrays(mesh_of(1, 1))
    old = {key: value for key, value in record(9.0).items() if key != "measure"}
    with Checkpoints(tmp_path, keep_latest=1) as checkpoints:
        for step, one in ((1, old), (2, record(None, walked)), (3, record(5.0, walked)), (4, record(None, decoded))):
            assert checkpoints.best is None or checkpoints.best.step == 1  # as long as nothing else is scored
            checkpoints.save(step, state, VOCAB, one)
        assert [checkpoints.best_score(measure) for measure in (None, walked, decoded)] == [-math.inf, 5.0, -math.inf]
        checkpoints.finish()
        assert (checkpoints.best.step, steps_on_disk(tmp_path)) == (3, [3, 4])
        checkpoints.save(5, state, VOCAB, record(1.0, decoded))
        checkpoints.finish()
        checkpoints.save(6, state, VOCAB, record(0.5, decoded))
    assert (checkpoints.best.step, steps_on_disk(tmp_path)) == (5, [5, 6])
    assert os.readlink(tmp_path / "best") == "5"
    assert retention.best_of(read_saved(tmp_path)).step == 5


def test_arrays_come_back_on_other_devices(tmp_path):
    saved = arrays(mesh_of(4, 2))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, saved, VOCAB, record())
    for shape in ((2, 4), (1, 1), (1, 2)):
        loaded = load(tmp_path / "1", abstract_like(arrays(mesh_of(*shape))) | {"vocab": None})
        assert words(loaded["state"]) == words(saved["state"])
        assert loaded["state"]["w"].sharding.mesh.shape == {"data": shape[0], "model": shape[1]}
        np.testing.assert_array_equal(loaded["vocab"]["target_ids"], VOCAB.target_ids_W)


def test_a_save_that_gives_up_waiting_has_failed(tmp_path):
    """Orbax raises TimeoutError too, which only says "not yet" to whoever asks with a timeout."""
    with Checkpoints(tmp_path / "c") as checkpoints:
        gave_up = Mock(result=Mock(side_effect=TimeoutError("no signal")))
        checkpoints._saving = (SimpleNamespace(step=3), gave_up)
        checkpoints.poll()
        with pytest.raises(InputError, match="no signal"):
            checkpoints.finish()


def test_no_single_bit_leaves_the_fingerprint_as_it_was():
    host = np.random.default_rng(1).normal(size=(3, 5)).astype(np.float32)
    before = int(fingerprint(host))
    for at in range(host.nbytes * 8):
        altered = bytearray(host.tobytes())
        altered[at // 8] ^= 1 << at % 8
        assert int(fingerprint(np.frombuffer(bytes(altered), np.float32).reshape(3, 5))) != before


@pytest.fixture(scope="module")
def one_checkpoint(tmp_path_factory):
    """A folder with the checkpoint of step 1, and its arrays."""
    directory, state = tmp_path_factory.mktemp("damage"), arrays(mesh_of(4, 2))
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(1, state, VOCAB, record(1.5))
    return directory / "1", state


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of Orbax's reads beside a failing one
@pytest.mark.usefixtures("damaged_reads")
def test_damaged_files_are_noticed_or_do_not_matter(one_checkpoint, tmp_path):
    """Every file cut in half, and with one bit flipped: reading either fails, or gives what was written (some files
    are copies and logs). TensorStore itself lets flipped bits of large arrays pass."""
    whole, state = one_checkpoint
    rng, noticed, said, files = np.random.default_rng(0), set(), set(), []
    for path in sorted(path for path in whole.rglob("*") if path.is_file() and path.stat().st_size):
        content = path.read_bytes()
        kinds = {"cut": content[: len(content) // 2]}
        for kind in ("flip", "flip 2", "flip 3", "flip 4")[: 4 if len(content) > 4096 else 1]:
            flipped = bytearray(content)
            flipped[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
            kinds[kind] = bytes(flipped)
        files.append((path.relative_to(whole), kinds))
    for name, kinds in files:
        for kind, content in kinds.items():
            copy = tmp_path / "copy"
            shutil.copytree(whole, copy)
            (copy / name).write_bytes(content)
            try:
                found = read_record(copy)
                loaded = load(copy, abstract_like(state) | {"vocab": None})
            except DamagedError as error:
                noticed.add((kind, name.parts[0]))
                said.add(str(error))
            else:
                assert found["score"] == 1.5
                assert words(loaded["state"]) == words(state["state"]), f"{kind} {name}"
                assert words(loaded["counters"]) == words(state["counters"]), f"{kind} {name}"
                np.testing.assert_array_equal(loaded["vocab"]["target_ids"], VOCAB.target_ids_W)
            shutil.rmtree(copy)
    assert "state['w'] is not what was written" in said
    assert {("cut", "state"), ("flip", "state"), ("cut", "_CHECKPOINT_METADATA"), ("flip", "vocab")} <= noticed


def test_what_a_killed_save_left_is_no_checkpoint(one_checkpoint, tmp_path):
    shutil.copytree(one_checkpoint[0], tmp_path / "1")
    shutil.copytree(one_checkpoint[0], tmp_path / "2.orbax-checkpoint-tmp")
    shutil.copytree(one_checkpoint[0], tmp_path / "3.orbax-checkpoint-tmp-removed")
    with Checkpoints(tmp_path) as checkpoints:
        assert [saved.step for saved in checkpoints.saved()] == [1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "best", "latest"]


def test_a_full_disk_fails_the_save_and_keeps_the_last_checkpoint(tmp_path):
    """No file may grow beyond a limit, as on a full disk a file cannot grow."""
    mesh = mesh_of(4, 2)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, arrays(mesh), VOCAB, record())
        checkpoints.finish()
        message = r"2: the checkpoint could not be written \(the disk is full\); the checkpoint of step 1 is complete"
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
            checkpoints.save(2, arrays(mesh, 2.0), VOCAB, record())
            with pytest.raises(InputError, match=message):
                checkpoints.finish()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "latest"]
        checkpoints.save(3, arrays(mesh), VOCAB, record())  # once there is room again
    assert steps_on_disk(tmp_path) == [1, 3]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if shutil.which("mount") is None:
        pytest.skip("no file systems are mounted here")
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"a small file system may not be mounted here ({done.stderr.strip()})")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of Orbax's writes beside a failing one
@pytest.mark.usefixtures("damaged_reads")
def test_no_space_left_on_the_device(small_disk):
    """The disk itself says so; what is complete can still be read, and with room again saving goes on."""
    state, directory, filler = arrays(mesh_of(4, 2)), small_disk / "checkpoints", small_disk / "filler"
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(1, state, VOCAB, record())
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    message = r"2: the checkpoint could not be written \(the disk is full\); the checkpoint of step 1 is complete"
    with pytest.raises(InputError, match=message), Checkpoints(directory) as checkpoints:
        checkpoints.save(2, state, VOCAB, record())
    assert steps_on_disk(directory) == [1]
    loaded = load(directory / "1", abstract_like(state) | {"vocab": None})
    assert words(loaded["state"]) == words(state["state"])
    filler.unlink()
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(3, state, VOCAB, record())
    assert steps_on_disk(directory) == [1, 3]
