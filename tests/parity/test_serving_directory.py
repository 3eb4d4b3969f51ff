"""What is exported computes in an engine what it computes here: the same draft tokens and states over eight steps."""

import dataclasses
import json
import pickle

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import test_dflash_import
import test_peagle_import
from cases import HIDDEN, LLAMA, MLA, PARITY, ROPES, normal, randomize
from closeness import assert_close
from commands import tool
from eagle3 import target_of
from flax import nnx
from jitted import unroll
from small_drafts import write_export
from trainers_layouts import TRAINERS, Source

from flaxdraft.algorithms.dflash2.drafts import qwen3 as dflash2
from flaxdraft.algorithms.eagle3.drafts import llama, mla
from flaxdraft.algorithms.eagle3.foreign.convert import convert
from flaxdraft.algorithms.loading import from_pretrained
from flaxdraft.devices.sharding import Sharding
from flaxdraft.interfaces import Batch, VocabMap
from flaxdraft.nn.precision import Precision
from flaxdraft.nn.rope import RopeConfig
from flaxdraft.serving.foreign.report import Options
from flaxdraft.train.state import split_draft

pytestmark = pytest.mark.parity
from_pytorch = tool("convert/from_pytorch")
STEPS, PROMPTS, LENGTH = 8, 4, 11
CASES = {"llama": (llama, LLAMA), "mla": (mla, MLA)}
TARGET = {"model_type": "llama", "hidden_size": HIDDEN, "vocab_size": LLAMA["vocab_size"], "num_hidden_layers": 8}
ON = {"fc_norm": True, "norm_output": True}
# kind, rotary type, fields
VARIANTS = [
    ("llama", "default", {}), ("llama", "linear", {"fc_norm": True}), ("llama", "llama3", {"norm_output": True}),
    ("llama", "yarn", ON), ("llama", "default", {"hidden_size": 40}), ("llama", "default", {"draft_vocab_size": 96}),
    ("llama", "default", {"norm_before_fc": True, "norm_output": True}),
    ("llama", "linear", {"norm_before_residual": True}),
    ("mla", "default", {}), ("mla", "yarn", {"norm_output": True}), ("mla", "yarn_mscale", {"fc_norm": True}),
    ("mla", "llama3", ON), ("mla", "default", {"hidden_size": 40}), ("mla", "default", {"draft_vocab_size": 96}),
]  # fmt: skip


@pytest.fixture(scope="session")
def engine():
    import engine

    return engine


def make(kind, rope, fields):
    """(module, draft with weights at which every part matters, the target's embedding)."""
    module, hf = CASES[kind]
    hf = hf | {"rope_parameters": {**ROPES[rope], "rope_theta": 5e4}}
    config = dataclasses.replace(module.Config.from_hf(hf), **fields)
    if "hidden_size" in fields:
        config = dataclasses.replace(config, target_hidden_size=HIDDEN)
    return build(module, config)


def vocab_of(config):
    ids = np.random.default_rng(9).permutation(config.vocab_size)[: config.draft_vocab_size]
    return VocabMap(np.sort(ids), config.vocab_size)


def build(module, config, vocab=None, params=None):
    embedding = jnp.asarray(normal(1, config.vocab_size, HIDDEN))
    draft = module.make(
        config, vocab or vocab_of(config), target_of(embedding), precision=Precision(),
        sharding=Sharding.none(), rngs=nnx.Rngs(0),
    )  # fmt: skip
    if params is None:
        randomize(draft, seed=2)
    else:
        nnx.update(draft, params)
    return draft, np.asarray(embedding)


def inputs(vocab_size):
    rng = np.random.default_rng(3)
    return rng.integers(0, vocab_size, (PROMPTS, LENGTH)), normal(4, PROMPTS, LENGTH - 1, 3, HIDDEN)


def assert_computes_the_same(draft, chains, states, tokens, taps):
    """The unroll over the tokens that the engine drafted gives the engine's states and, greedily, its tokens."""
    num = LENGTH + STEPS
    row = np.full((PROMPTS, 1), LENGTH - 2)
    ones, positions = jnp.ones((PROMPTS, num), jnp.int32), jnp.tile(jnp.arange(num), (PROMPTS, 1))
    rows = jnp.asarray(np.concatenate([tokens, chains], axis=1))
    batch = Batch(rows, ones.astype(bool), ones, positions)
    padded = np.pad(taps, ((0, 0), (0, num - taps.shape[1]), (0, 0), (0, 0)))
    hidden = jnp.stack(unroll(draft, batch, jnp.asarray(padded), jnp.asarray(row), STEPS))[:, :, 0]
    choice = draft.target_ids[...][jnp.argmax(draft.logits(hidden), axis=-1)]
    np.testing.assert_array_equal(np.asarray(choice).T, chains)
    for j in range(STEPS):
        assert_close(hidden[j], states[:, j], rtol=PARITY)


def draft_with(engine, config, tensors, embedding, tokens, taps, **how):
    """(chains [P, J], states [P, J, D]) of the engine, one sequence at a time."""
    import torch

    chains, states = [], []
    for prompt, tapped in zip(tokens, taps, strict=True):
        served = engine.Draft(config, tensors, torch.tensor(embedding), **how)
        chain, state = served.propose(prompt, tapped, STEPS)
        chains.append(chain)
        states.append(torch.stack(state).numpy())
    return np.array(chains), np.array(states)


@pytest.mark.parametrize(("kind", "rope", "fields"), VARIANTS, ids=str)
def test_an_engine_drafts_the_same(tmp_path, engine, kind, rope, fields):
    draft, embedding = make(kind, rope, fields)
    module, config = CASES[kind][0], draft.config
    write_export(
        tmp_path / "out", module, config, split_draft(draft)[1], vocab_of(config), tap_layers=(1, 3, 4), target=TARGET,
        engine="vllm",
    )  # fmt: skip
    tokens, taps = inputs(config.vocab_size)
    drafted = draft_with(engine, *engine.load_directory(tmp_path / "out"), embedding, tokens, taps)
    assert len(np.unique(drafted[0])) > PROMPTS  # no draft that says one thing always
    assert_computes_the_same(draft, *drafted, tokens, taps)


def torch_tensors(tensors):
    import torch

    return {name: torch.tensor(np.asarray(array)) for name, array in tensors.items()}


@pytest.mark.parametrize("trainer", TRAINERS)
def test_an_imported_draft_computes_what_its_trainer_did(tmp_path, engine, trainer):
    kind, layout = TRAINERS[trainer]
    source = Source(kind)
    randomized = build(source.module, source.config, source.vocab)[0]
    source = Source.of(randomized, source.module, source.vocab)
    tensors, config = layout(source)
    convert(tensors, config, tmp_path / "out", "there")
    loaded = from_pretrained(tmp_path / "out")
    draft, embedding = build(source.module, loaded.config, loaded.vocab, loaded.params)
    tokens, taps = inputs(source.config.vocab_size)
    original = torch_tensors(source.tensors | source.tables())
    drafted = draft_with(engine, source.hf, original, embedding, tokens, taps)
    assert_computes_the_same(draft, *drafted, tokens, taps)


def test_nemos_mla_draft_computes_the_same_with_an_engines_scale(tmp_path, engine):
    rope = RopeConfig("yarn", 1e4, 64, 4.0, 16, mscale=1.0, mscale_all_dim=0.0)
    source = Source("mla", rope=rope)
    source = Source.of(build(source.module, source.config, source.vocab)[0], source.module, source.vocab)
    convert(source.tensors | source.tables(), source.hf, tmp_path / "out", "there", Options(trainer="nemo"))
    loaded = from_pretrained(tmp_path / "out")
    draft, embedding = build(source.module, loaded.config, loaded.vocab, loaded.params)
    tokens, taps = inputs(source.config.vocab_size)
    original = torch_tensors(source.tensors | source.tables())
    trained = draft_with(engine, source.hf, original, embedding, tokens, taps, scale_like_nemo=True)
    assert_computes_the_same(draft, *trained, tokens, taps)
    served = draft_with(engine, *engine.load_directory(tmp_path / "out"), embedding, tokens, taps)
    np.testing.assert_array_equal(served[0], trained[0])
    assert_close(served[1], trained[1], rtol=PARITY)


@pytest.fixture
def foreign(tmp_path):
    """A folder with config.json, and the tensors that belong there."""
    source = Source()
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text(json.dumps(source.hf))
    return tmp_path / "source", source


def test_specforges_training_state_is_read(tmp_path, foreign, capsys):
    import torch

    folder, source = foreign
    state = {name: torch.tensor(array).bfloat16() for name, array in source.tensors.items()}
    torch.save({"draft_state_dict": state, "epoch": 3, "global_step": 9}, folder / "training_state.pt")
    torch.save({name: torch.tensor(table) for name, table in source.tables().items()}, folder / "vocab_mapping.pt")
    assert from_pytorch.main([str(folder), str(tmp_path / "out")]) == 0
    assert "a draft of specforge" in capsys.readouterr().out
    loaded = from_pretrained(tmp_path / "out")
    rounded = source.tensors["fc.weight"].astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(loaded.params["fc"]["kernel"][...].T, rounded)
    np.testing.assert_array_equal(loaded.vocab.target_ids_W, source.vocab.target_ids_W)


def codebooks(tensors):
    """As the classes call them, whose state is saved."""
    return {f"{name}.weight" if name.endswith("_codebook") else name: array for name, array in tensors.items()}


@pytest.mark.parametrize(
    ("build", "make"),
    [(test_dflash_import.specforge, lambda: test_dflash_import.Source(dflash2)),
     (test_peagle_import.specforge, test_peagle_import.Source)], ids=["dflash2", "peagle"],
)  # fmt: skip
@pytest.mark.parametrize("name", ["training_state.pt", "pytorch_model.bin"])
def test_torch_files_of_other_algorithms_are_read(tmp_path, build, make, name):
    import torch

    source = make()
    tensors, config = build(source)
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    state = torch_tensors({key: np.ascontiguousarray(x) for key, x in codebooks(tensors).items()})
    whole = {"draft_state_dict": state, "global_step": 9} if name == "training_state.pt" else state
    torch.save(whole, tmp_path / "source" / name)
    assert from_pytorch.main([str(tmp_path / "source"), str(tmp_path / "out")]) == 0
    test_dflash_import.assert_same(tmp_path / "out", source)


def test_one_torch_file_is_read(tmp_path, foreign):
    import torch

    folder, source = foreign
    torch.save(torch_tensors(source.tensors | source.tables()), folder / "pytorch_model.bin")
    assert from_pytorch.main([str(folder / "pytorch_model.bin"), str(tmp_path / "out")]) == 0
    np.testing.assert_array_equal(
        from_pretrained(tmp_path / "out").params["norm"]["scale"][...], source.tensors["norm.weight"]
    )


class Harmful:
    def __reduce__(self):
        return (open, ("executed", "w"))


@pytest.mark.parametrize("write", [pickle.dumps, None])
def test_nothing_but_weights_is_unpickled(tmp_path, foreign, capsys, monkeypatch, write):
    import torch

    folder, _ = foreign
    monkeypatch.chdir(tmp_path)
    if write is None:
        torch.save({"draft_state_dict": {"fc.weight": Harmful()}}, folder / "training_state.pt")
    else:
        (folder / "training_state.pt").write_bytes(write(Harmful()))
    assert from_pytorch.main([str(folder), str(tmp_path / "out")]) == 2
    assert "training_state.pt: cannot be read as weights alone" in capsys.readouterr().err
    assert not (tmp_path / "executed").exists()
    assert not (tmp_path / "out").exists()
