"""What ends a run early or is noticed on its way: broken steps, memory, SIGTERM, reads from the device."""

import contextlib
import json
import os
import re
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from closeness import assert_close
from worker import E, V, rows, train

from flaxdraft.data.documents import AnsweredPrompts
from flaxdraft.data.store import TARGET, FeatureStore, Source, finish, shard_name, write_shard
from flaxdraft.devices import host_reads
from flaxdraft.devices.mesh import make_mesh
from flaxdraft.errors import InputError
from flaxdraft.files.safetensors_file import save_safetensors
from flaxdraft.train import loop
from flaxdraft.train.guards import PreemptedError, Preemption, memory_advice
from flaxdraft.train.resident import Resident


def test_reads_happen_in_logging_and_evaluating_steps_alone(runs, monkeypatch):
    """Of 12 steps, 4, 8 and 12 log, 6 and 12 evaluate. Nothing else reads a number off the device, also where a
    checkpoint is saved at every step."""
    at_step, seen = [], []
    real_read, real_advanced = host_reads.read, loop.counting.advanced
    monkeypatch.setattr(host_reads, "read", lambda tree: (seen.append(len(at_step)), real_read(tree))[1])
    monkeypatch.setattr(loop.counting, "advanced", lambda *args: (at_step.append(0), real_advanced(*args))[1])
    guarded = []

    @contextlib.contextmanager
    def guard(direction):
        guarded.append(direction)
        yield

    monkeypatch.setattr(jax, "transfer_guard_device_to_host", guard)
    before = host_reads.count()
    train(runs, "reads", "train.log_every=4", "train.eval_every=6", "train.checkpoint_every=1")
    # The counters as the run begins, the first evaluation, the log steps, the evaluations; the weights at the end.
    assert sorted(seen) == [0, 0, 4, 6, 8, 12, 12, 12]
    assert host_reads.count() - before == len(seen)
    assert guarded[0] == "disallow"  # holds for the whole loop; only saving and evaluating lift it
    assert set(guarded[1:]) == {"allow"}


@pytest.mark.gpu
def test_an_accelerator_s_runtime_refuses_other_reads(runs, monkeypatch):
    """pytest -m gpu -n 0 tests/multiprocess/test_guards.py: the whole run passes under the runtime's own guard, and one
    number that a step looks at does not."""
    options = ("mesh.data=1", "train.log_every=4", "train.eval_every=6", "train.checkpoint_every=5")
    train(runs, "guarded", *options)
    assert len(runs.lines("guarded")) == 3
    real_advanced = loop.counting.advanced

    def looking(*args):
        counters = real_advanced(*args)
        assert int(counters["tokens"][0]) >= 0
        return counters

    monkeypatch.setattr(loop.counting, "advanced", looking)
    with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed device-to-host transfer"):
        train(runs, "looking", *options)


def test_one_compile_for_each_length(runs, monkeypatch):
    """Forty steps over documents of two lengths."""
    made, real = [], loop.make_train_step
    monkeypatch.setattr(loop, "make_train_step", lambda *args: made.append(real(*args)) or made[-1])
    documents = AnsweredPrompts([*rows(24, 2, []), *rows(8, 5, [], 40)], V)
    seldom = [f"train.{name}_every=40" for name in ("log", "eval", "checkpoint")]
    options = ("mesh.data=1", "train.length_buckets=2", "train.num_steps=40", *seldom)
    train(runs, "compiles", *options, documents=documents)
    assert made[0]._cache_size() == 2
    assert runs.lines("compiles")[-1]["tokens"] == 40 // 4 * (24 * 14 + 8 * 40)  # 10 epochs of 4 batches


def test_steps_that_are_not_finite_are_skipped_then_end_the_run(runs, monkeypatch):
    """One broken document in 24: its batch is skipped, once an epoch; three of its kind in a row end the run."""
    monkeypatch.setenv("WORKER_BROKEN", "[5]")
    params = train(runs, "one", "train.max_skipped=3")
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))
    losses = [line["loss"] for line in runs.lines("one")]
    assert sum(not np.isfinite(loss) for loss in losses) == 4  # of 12 steps, 3 an epoch
    monkeypatch.setenv("WORKER_BROKEN", json.dumps(list(range(24))))
    with pytest.raises(InputError) as error:
        train(runs, "all", "train.max_skipped=3", "train.log_every=5")
    message = r"at step 3, the last of 3 steps in a row .*not finite are in documents (.*); its rows"
    assert (found := re.search(message, str(error.value))), error.value
    assert len(found[1].split(", ")) == 8


def test_sigterm_saves_and_stops(runs, monkeypatch):
    real = loop.Meters.log

    def log(self, counters):
        real(self, counters)
        if self._progress.done == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(loop.Meters, "log", log)
    with pytest.raises(PreemptedError, match=r"step 5 of 12 is saved; the same command goes on there"):
        train(runs, "asked", "train.checkpoint_every=100", "train.eval_every=100")
    assert runs.checkpoints("asked") == [5]
    assert signal.getsignal(signal.SIGTERM) == before
    monkeypatch.setattr(loop.Meters, "log", real)
    train(runs, "asked", "train.checkpoint_every=100", "train.eval_every=100")
    assert [line["step"] for line in runs.lines("asked")] == list(range(1, 13))


def stored(directory: Path, documents) -> FeatureStore:
    """The same documents as a store of six shards."""
    directory.mkdir()
    source = Source("t", "k", "d", "float32", (1, 3, 5), E, V, "float32", "float32")
    for shard in range(6):
        write_shard(directory, shard, [documents.row(4 * shard + i) for i in range(4)], source)
    save_safetensors(directory / TARGET, {"embedding": np.ones((V, E), np.float32)})
    finish(directory, source, 6)
    return FeatureStore(directory)


def test_a_shard_that_vanishes_ends_the_run_and_is_named(runs, tmp_path):
    """Once it is back, the same command goes on and trains what a run on the documents in memory does."""
    train(runs, "in-memory")
    store = stored(tmp_path / "store", AnsweredPrompts(rows(24, 2, []), V))
    shard, away = tmp_path / "store" / shard_name(3), tmp_path / "away"
    shard.rename(away)
    with pytest.raises(InputError, match=shard.name):
        train(runs, "stored", documents=store)
    away.rename(shard)
    train(runs, "stored", documents=store)
    assert runs.losses("stored") == runs.losses("in-memory")


def test_a_best_evaluation_between_saves_is_saved(runs):
    train(runs, "best", "train.eval_every=5", "train.checkpoint_every=100", "train.keep_latest=1")
    held_out = {line["step"]: line["accept_length"] for line in runs.lines("best", "held_out") if line["step"]}
    best = max(held_out, key=lambda step: (held_out[step], -step))
    assert runs.checkpoints("best") == sorted({best, 12})


def test_figures_go_to_tensorboard_and_json(runs):
    train(runs, "figures", "train.num_steps=4", "train.profile=[2, 3]")
    folder = runs.draft("figures")
    events = b"".join(path.read_bytes() for path in (folder / "tensorboard").iterdir())
    for name in (b"train/loss", b"train/accuracy/2", b"train/tokens_per_second", b"held_out/accept_length"):
        assert name in events
    assert {"tokens", "tokens_per_second", "data_wait", "accuracy", "grad_norm"} <= set(runs.lines("figures")[-1])
    assert list((folder / "profile").rglob("*.xplane.pb"))


@pytest.mark.slow
def test_float8_is_asked_for_in_the_configuration(runs):
    """Its losses are near those of a run without, and other ones."""
    losses = []
    for name in ("false", "true"):
        train(runs, f"float8-{name}", "train.num_steps=4", "train.log_every=2", f"train.float8={name}")
        losses.append([line["loss"] for line in runs.lines(f"float8-{name}") if line["kind"] == "train"])
    exact, narrow = np.array(losses)
    assert len(exact) == 2
    assert (exact != narrow).all()
    assert_close(narrow, exact, rtol=0.05, of="each")


MIB = 1 << 20


def test_out_of_memory_says_what_is_held_and_what_helps_first(tmp_path, monkeypatch):
    """Of the fullest device, whose parts are read off the arrays' places; the one that is the most decides."""
    monkeypatch.setattr(jax, "live_arrays", list)
    mesh = make_mesh(fsdp=2)
    described = lambda mib, *spec: jax.ShapeDtypeStruct(  # noqa: E731
        (mib * MIB // 4,), np.float32, sharding=jax.NamedSharding(mesh, jax.P(*spec))
    )
    cases = {
        "target": "split the target over more devices .mesh.fsdp, or target.mesh",
        "draft": "split the weights over more devices .mesh.fsdp",
        "moments": "split the optimizer's moments, .* .mesh.fsdp",
        "batch": "lower train.batch_size",
        "work": "raise train.accumulate, or set algorithm.remat=full",
    }
    for largest, advice in cases.items():
        resident = Resident()
        sizes = {name: 900 if name == largest else 40 for name in cases}
        split = {name: described(sizes[name] * 2, "fsdp") for name in ("draft", "moments", "batch")}
        resident.note(target=[described(sizes["target"])], **split)
        error = jax.errors.JaxRuntimeError(
            f"RESOURCE_EXHAUSTED: Out of memory while trying to allocate {sizes['work']}.00MiB."
        )
        with pytest.raises(InputError) as caught, memory_advice(tmp_path, resident):
            raise error
        said = ", ".join(f"{name} {size * MIB / 1e9:.2f} GB" for name, size in sizes.items())
        assert f"on cpu:0: {said} " in str(caught.value)
        assert re.search(f"First, {advice}", str(caught.value))
    assert (tmp_path / "memory.prof").stat().st_size


def test_out_of_memory_counts_what_nobody_names(tmp_path, monkeypatch):
    """What two arrays share is one piece of memory, and the fullest device is looked at."""
    device = jax.devices()[3]
    array = jax.device_put(np.zeros(25_000_000, np.float32), device)
    shared = array.addressable_shards[0].data
    monkeypatch.setattr(jax, "live_arrays", lambda: [array, shared])
    resident = Resident()
    resident.note(draft=jax.device_put(np.zeros(5_000_000, np.float32), device))
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9000 bytes.")
    expected = r"on cpu:3: draft 0.02 GB, other arrays 0.08 GB \(.*First, end the run and start it again"
    with pytest.raises(InputError, match=expected), memory_advice(tmp_path, resident):
        raise error


def test_another_error_of_the_runtime_is_left_alone(tmp_path):
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), memory_advice(tmp_path, Resident()):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")


def test_a_run_names_its_parts(runs, monkeypatch):
    """Three float32 of each parameter: itself in the draft, two in the moments."""
    noted, real = {}, Resident.note
    monkeypatch.setattr(Resident, "note", lambda self, **parts: (noted.update(parts), real(self, **parts))[1])
    train(runs, "noted", "train.num_steps=1")
    count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))  # noqa: E731
    params, *_ = noted["draft"]
    assert set(noted) == {"target", "draft", "moments", "batch"}
    assert noted["target"] is None  # its features are given
    assert_close(float(count(noted["moments"])), float(2 * count(params)), rtol=0.01)
    assert count(noted["batch"])


def test_without_a_signal_nothing_is_due():
    with Preemption() as preemption:
        assert not preemption.due(1)
