"""What the package expects of its parts, asked of each: algorithms with their draft architectures and engines, target
families.

Nothing is computed; programs are traced for their shapes. test_contracts.py asks every part that is found by its name;
a part outside the package can be asked in its own tests. No part is named here.
"""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flaxdraft import algorithms
from flaxdraft.algorithms.loading import ZeroTarget, abstract_params, from_pretrained, tapped_layers
from flaxdraft.config import AlgorithmConfig
from flaxdraft.devices.mesh import make_mesh
from flaxdraft.devices.sharding import Sharding
from flaxdraft.devices.weight_places import place_of
from flaxdraft.errors import InputError
from flaxdraft.interfaces import Algorithm, Batch, Draw, Example, Features, Target, VocabMap
from flaxdraft.nn.precision import Precision
from flaxdraft.plugins import find_by_architecture, parts_of
from flaxdraft.serving import lint
from flaxdraft.serving.contract import Engine
from flaxdraft.serving.export import export
from flaxdraft.serving.trained_draft import AboutTarget, TrainedDraft
from flaxdraft.serving.view import view_of_directory
from flaxdraft.targets import decoder
from flaxdraft.train.batch_placement import SHARDING, training_example
from flaxdraft.train.state import split_draft

V, W, T, ROWS, LAYERS, SLOTS = 64, 24, 12, 4, 8, 16


class Pair(NamedTuple):
    """An algorithm and one of its own draft architectures."""

    algorithm: Algorithm
    module: Any

    def config(self, target: Any, **fields):
        """Of a draft next to a target, as a run makes it."""
        settings = self.algorithm.settings
        size = target.vocab_size if self.algorithm.full_vocabulary else W
        held = {name: getattr(settings, name) for name in settings.in_draft}
        return self.module.Config(**self.module.Config.for_target(target, size) | held | fields)

    def make(self, config, target: Any, sharding=Sharding.none()) -> nnx.Module:  # noqa: B008 (immutable)
        """Its shapes, as training begins with it."""
        zeros = lambda *shape: lambda: jnp.zeros(shape)  # noqa: E731
        outer = SimpleNamespace(
            config=target, embedding=zeros(target.vocab_size, target.hidden_size),
            head=zeros(target.vocab_size, target.hidden_size), final_norm=zeros(target.hidden_size),
        )  # fmt: skip

        def draft():
            draft = self.module.make(
                config, vocab_of(config), outer, precision=Precision(), sharding=sharding, rngs=nnx.Rngs(0)
            )  # fmt: skip
            self.algorithm.warm_start(draft, outer, vocab_of(config))
            return draft

        return nnx.eval_shape(draft)


def pairs() -> dict[str, Pair]:
    """Every algorithm with each of its own drafts."""
    return {
        f"{name}-{draft}": Pair(algorithms.make(algorithms.settings_of(name)(), packed=True), module)
        for name, folder in parts_of(algorithms.PACKAGE)
        for draft, module in parts_of(f"{folder.__name__}.drafts")
    }


def vocab_of(config) -> VocabMap:
    ids = np.linspace(0, config.vocab_size - 1, config.draft_vocab_size).astype(int)
    return VocabMap(ids, config.vocab_size)


def batch_of(seed: int = 0) -> Batch:
    """On the host; each row is one document whose last two thirds are the assistant's."""
    tokens = np.random.default_rng(seed).integers(0, V, (ROWS, T)).astype(np.int32)
    place = np.tile(np.arange(T, dtype=np.int32), (ROWS, 1))
    return Batch(tokens, place >= 4, np.ones_like(tokens), place)


def example_of(algorithm: Algorithm, config) -> Example:
    """On the host, with the features that the algorithm needs."""
    batch, width = batch_of(), config.target_hidden_size
    taps = np.zeros((ROWS, T, len(algorithm.tap_layers(LAYERS, None)), width), np.float32)
    told = {
        "taps_BTKE": taps, "last_BTE": taps[:, :, 0], "argmax_BT": batch.tokens_BT, "logsumexp_BT": taps[:, :, 0, 0],
    }  # fmt: skip
    features = Features(**{name: told[name] for name in algorithm.needs})
    teacher = jax.eval_shape(lambda: algorithm.teacher(ZeroTarget(config), vocab_of(config), jnp.float32))
    return Example(batch, features, algorithm.choose(batch, T, Draw(0, 0, 0)), teacher)


def shapes(tree: Any) -> Any:
    return jax.tree.map(lambda x: (x.shape, jnp.dtype(x.dtype)), tree)


def assert_settings(name: str) -> None:
    """The section of the configuration: strict, with defaults, and no field named that is not there."""
    settings = algorithms.settings_of(name)
    assert issubclass(settings, AlgorithmConfig)
    assert settings.model_config["extra"] == "forbid"
    assert settings.model_config["strict"]
    assert settings().name == name
    assert {*settings.free, *settings.in_draft} <= set(settings.model_fields) - {"name"}
    algorithms.architecture(settings(), settings.default_architecture)


def assert_asks_well(algorithm: Algorithm) -> None:
    """What it wants of the target: ascending layers, features that there are."""
    taps = algorithm.tap_layers(LAYERS, None)
    assert [*taps] == sorted(set(taps))
    assert set(taps) <= set(range(LAYERS))
    assert algorithm.tap_layers(LAYERS, taps) == taps
    with pytest.raises(InputError, match=r"tap_layers.*ascending layers"):
        algorithm.tap_layers(LAYERS, taps[::-1])
    assert {"taps_BTKE"} <= set(algorithm.needs) <= {field.name for field in dataclasses.fields(Features)}
    algorithm.check_answers(10_000)
    with pytest.raises(InputError, match=r"algorithm\."):
        algorithm.check_answers(0)


def assert_chooses_alike(algorithm: Algorithm) -> None:
    """The same rows however many hosts share a batch, and however often they are asked; the sizes do not depend on what
    the batch holds. In evaluation nothing is drawn."""
    batch = batch_of()
    whole = algorithm.choose(batch, T, Draw(3, 5, 0))
    halves = []
    for first in (0, ROWS // 2):
        part = jax.tree.map(lambda x: x[first : first + ROWS // 2], batch)  # noqa: B023
        halves.append(algorithm.choose(part, T, Draw(3, 5, first)))
    joined = jax.tree.map(lambda *parts: np.concatenate(parts), *halves)
    jax.tree.map(np.testing.assert_array_equal, joined, whole)
    assert all(len(x) == ROWS for x in jax.tree.leaves(whole))
    empty = dataclasses.replace(batch, assistant_BT=np.zeros((ROWS, T), bool))
    assert shapes(algorithm.choose(empty, T, Draw(3, 5, 0))) == shapes(whole)
    evaluation = algorithm.drafting(1)
    one, other = (evaluation.choose(batch, T, Draw(*numbers)) for numbers in ((0, 0, 0), (1, 2, 3)))
    jax.tree.map(np.testing.assert_array_equal, one, other)


def assert_shares_or_says_so(algorithm: Algorithm, config) -> None:
    """The mesh's axis `sequence`."""
    example = dataclasses.replace(example_of(algorithm, config), teacher=None)
    try:
        shared, cut = algorithm.share(example, 2)
    except InputError as error:
        assert "mesh.sequence" in str(error)  # noqa: PT017 (either is well)
    else:
        assert jax.tree.structure(shared) == jax.tree.structure(cut)


def assert_trains(pair: Pair, target: Any) -> None:
    """Loss and gradients, on a mesh of every axis that each algorithm knows; what is carried keeps its shape."""
    algorithm, config, mesh = pair.algorithm, pair.config(target), make_mesh(2, 2, 2)
    graphdef, *states = split_draft(pair.make(config, target, SHARDING))
    example = example_of(algorithm, config)

    def placed(path, variable):
        place = jax.NamedSharding(mesh, place_of(variable, SHARDING))
        return path, variable.replace(jax.ShapeDtypeStruct(variable.shape, variable.dtype, sharding=place))

    params, frozen = (nnx.from_flat_state([placed(*one) for one in nnx.to_flat_state(state)]) for state in states)
    once = algorithm.flops(params, frozen, example)
    twice = jax.tree.map(lambda x: np.concatenate([x, x]), dataclasses.replace(example, teacher=None))
    twice = algorithm.flops(params, frozen, dataclasses.replace(twice, teacher=example.teacher))
    assert 1.8 * once < twice <= 2 * once
    place = jax.NamedSharding(mesh, SHARDING.weight_ve)
    teacher = jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), place), example.teacher)

    def loss(params, frozen, example, carry):
        sums = algorithm.sums(nnx.merge(graphdef, params, frozen), example, carry)
        numerator, count = sums.terms()
        return numerator / count, (sums, algorithm.next_carry(carry, sums, jnp.int32(0)))

    with jax.set_mesh(mesh):
        example = training_example(dataclasses.replace(example, teacher=None), mesh, algorithm, teacher)
        carry = algorithm.first_carry()
        (value, (sums, after)), gradients = jax.eval_shape(
            jax.value_and_grad(loss, has_aux=True), params, frozen, example, carry
        )
        said = []
        jax.eval_shape(lambda *of: said.append(algorithm.describe(nnx.merge(graphdef, *of[:2]), of[2])), params,
                       frozen, example)  # fmt: skip
    assert shapes(value) == ((), jnp.float32)
    assert shapes(after) == shapes(carry)
    assert shapes(gradients) == shapes(params)
    assert [type(one) for one in said] == [str]
    figures = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), sums).figures()
    assert isinstance(figures["accuracy"], list)
    assert all(
        isinstance(x, float) for value in figures.values() for x in (value if isinstance(value, list) else [value])
    )


def assert_drafts(pair: Pair, target: Any) -> None:
    """The walk gives a number for every row; the drafter's state leads with the rows of its batch, and keeps its shape
    through all that decoding does with it."""
    algorithm, config, num = pair.algorithm.drafting(1), pair.config(target), 3
    graphdef, state = nnx.split(pair.make(config, target))
    example = example_of(algorithm, config)
    walked = jax.eval_shape(
        lambda state, example: algorithm.accepted(nnx.merge(graphdef, state), example), state, example
    )
    assert shapes(walked[1]) == ((ROWS, T), jnp.int32)
    drafter = algorithm.drafter()
    assert hash(drafter) == hash(algorithm.drafter())
    assert drafter.trees == hasattr(drafter, "propose_tree")
    assert drafter.most_tokens is None or drafter.most_tokens > 0
    taps = jnp.zeros((ROWS, num, *example.features.taps_BTKE.shape[2:]))
    asked = []

    def choose(logits_BW, j):
        asked.append(logits_BW.shape)
        return jnp.argmax(logits_BW, axis=-1).astype(jnp.int32), jax.nn.softmax(logits_BW, axis=-1)

    def program(state):
        draft, some = nnx.merge(graphdef, state), jnp.zeros((ROWS, num), jnp.int32)
        first = drafter.start(draft, ROWS, SLOTS)
        read = drafter.read(draft, first, taps, some, some, some[:, 0])
        return first, read, *drafter.propose(draft, read, some[:, 0], some[:, 0], 1, choose)

    first, read, proposing, proposal = jax.eval_shape(program, state)
    assert shapes(first) == shapes(read) == shapes(proposing)
    assert all(x.shape[0] == ROWS for x in jax.tree.leaves(first))
    assert shapes(proposal.ids_BQ) == ((ROWS, 1), jnp.int32)
    assert proposal.q_BQW.shape == (ROWS, 1, config.draft_vocab_size)
    assert set(asked) == {(ROWS, config.draft_vocab_size)}


def switches(config) -> list[dict[str, Any]]:
    """What may be asked of a draft besides its defaults: nothing, each field that is on or off turned over, and another
    width than the target's."""
    turned = [{field.name: not field.default} for field in dataclasses.fields(config) if field.type == "bool"]
    return [{}, *turned, {"hidden_size": config.hidden_size * 3 // 4}]


def assert_named(pair: Pair, target: Any) -> None:
    """Whatever is switched on, each trained weight has one name, and a config comes back from its config.json."""
    found = pair.config(target)
    for fields in switches(found):
        try:
            config = pair.config(target, **fields)
        except InputError as error:
            assert all(f"draft.fields.{name}" in str(error) for name in fields)  # noqa: PT017 (either is well)
            continue
        _, params, _ = split_draft(pair.make(config, target))
        table = pair.module.name_table(config)
        assert {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(params)} == {row[0] for row in table}
        assert len({row[1] for row in table}) == len(table)
        written = config.to_hf()
        assert pair.module.Config.from_hf(written) == config
        assert find_by_architecture(algorithms.draft_packages(), written, "x") is pair.module
        read = algorithms.algorithm_of(pair.module, config)
        assert type(read) is type(pair.algorithm)
        assert all(getattr(read.settings, name) == getattr(config, name) for name in read.settings.in_draft)


def assert_refuses_another_map(pair: Pair, target: Any) -> None:
    config = pair.config(target)
    with pytest.raises(InputError, match=rf"8 of {V} tokens.* {config.draft_vocab_size} of {V}"):
        pair.module.make(
            config, VocabMap(np.arange(8), V), ZeroTarget(config), precision=Precision(), sharding=Sharding.none(),
            rngs=nnx.Rngs(0),
        )  # fmt: skip


def assert_exports(pair: Pair, target: Any, hf: dict[str, Any], directory: Path) -> None:
    """Each engine takes the draft or says why not; what was written is read again as what it was.

    Args:
        hf: the target's config.json.
    """
    contract, config, rng = pair.algorithm.serving(), pair.config(target), np.random.default_rng(0)
    engines = contract.engines()
    assert {"hf", pair.algorithm.settings.default_engine} <= set(engines)  # the first keeps whatever nobody serves
    flat = nnx.to_flat_state(abstract_params(pair.module, config))
    params = nnx.from_flat_state(
        [(path, variable.replace(rng.normal(size=variable.shape).astype(np.float32))) for path, variable in flat]
    )
    draft = TrainedDraft(pair.algorithm, pair.module, config, params, vocab_of(config))
    about = AboutTarget(hf, pair.algorithm.tap_layers(target.num_hidden_layers, None))
    taken = []
    for name, engine in engines.items():
        assert isinstance(engine, Engine)
        assert not engine.serves or "TARGET" in engine.command("DRAFT", 3)
        try:
            export(directory / name, draft, about, dtype="float32", engine=name)
        except InputError as error:
            assert str(error).startswith(f"export for {engine.title}: ")  # noqa: PT017 (either is well)
            continue
        read = from_pretrained(directory / name)
        jax.tree.map(np.testing.assert_array_equal, read.params, params)
        np.testing.assert_array_equal(read.vocab.target_ids_W, draft.vocab.target_ids_W)
        assert (read.module, read.config) == (pair.module, config)
        assert tapped_layers(directory / name, hf) == [*about.tap_layers]
        whole, *verdicts = lint.check(view_of_directory(directory / name, hf), contract)
        assert whole.faithful, whole.findings
        assert all(verdict.faithful for verdict in verdicts if verdict.name == name)
        taken.append(name)
    assert "hf" in taken


def assert_family(module, hf: dict[str, Any]) -> None:
    """A target family under each of its names, its head tied to the embedding and not.

    Args:
        hf: a config.json of the family, but for these.
    """
    for architecture in module.ARCHITECTURES:
        for tied in (False, True):
            config = module.Config.from_hf(hf | {"architectures": [architecture], "tie_word_embeddings": tied})
            groups = module.groups(config, Precision(), Sharding.none())
            assert [i for group in groups for i in group.layers] == list(range(config.num_hidden_layers))
            _, state = decoder.abstract_state(config, groups, Precision())
            paths = {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(state)}
            assert paths == {row[0] for row in module.name_table(config)}
            assert isinstance(decoder.build(config, groups, state, Precision()), Target)
            assert not module.ignored(config, "model.layers.1.mlp.down_proj.weight")
            assert module.ignored(config, "model.layers.1.self_attn.rotary_emb.inv_freq")
            assert module.ignored(config, "lm_head.weight") == tied
