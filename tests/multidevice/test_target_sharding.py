"""Targets over eight devices: the same numbers as on one, and no weight is put together under tensor parallelism."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closeness import assert_close
from test_contracts import TARGETS, target_hf
from tiny import random_weights

from flaxdraft.decode.generation import generate
from flaxdraft.decode.tree import Tree
from flaxdraft.devices.mesh import make_mesh
from flaxdraft.devices.sharding import Sharding
from flaxdraft.errors import InputError
from flaxdraft.files.name_tables import ArraySource, load_state
from flaxdraft.interfaces import Batch
from flaxdraft.nn.precision import Precision
from flaxdraft.targets import decoder, target_attention

HEADS = {"num_attention_heads": 8, "num_key_value_heads": 8, "num_hidden_layers": 5}
WINDOWS = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"]
UNTIED = {"tie_word_embeddings": False}
# The family of each, and fields of its config.json.
FIELDS = {
    "qwen3": ("llama", {"architectures": ["Qwen3ForCausalLM"]}),
    "qwen2": ("llama", UNTIED | {"architectures": ["Qwen2ForCausalLM"]}),
    "deepseek v3": ("deepseek", UNTIED | {"architectures": ["DeepseekV3ForCausalLM"]}),
    "qwen3 moe": ("qwen3_moe", UNTIED),
    "gpt-oss": ("gpt_oss", UNTIED),
    "gemma 3": ("gemma3", {"query_pre_attn_scalar": 128}),  # its norms double scores, which would else be steep
    "mistral": ("mistral", {"layer_types": WINDOWS}),
}
QUICK_NAMES = ("qwen3", "qwen2", "deepseek v3")  # the others are made of the same parts
MESHES = {
    "data": (8, 1, 1, 1), "fsdp": (1, 8, 1, 1), "tensor": (1, 1, 8, 1), "expert": (1, 1, 1, 8), "all": (1, 2, 2, 2),
    "rows": (2, 2, 2, 1),
}  # fmt: skip
T = 16


def make(name: str, mesh_shape=None, **fields):
    family_name, own = FIELDS[name]
    family, hf = TARGETS[family_name], target_hf(family_name) | HEADS | own | fields
    config = family.Config.from_hf(hf, (0, 2, 3))
    mesh = None if mesh_shape is None else make_mesh(*mesh_shape)
    sharding = Sharding.none() if mesh is None else Sharding.parallel()
    groups = family.groups(config, Precision(), sharding)
    _, abstract = decoder.abstract_state(config, groups, Precision())
    places = None if mesh is None else decoder.weight_shardings(config, abstract, mesh, sharding)
    source = ArraySource(random_weights(family, config, groups), "random weights")
    spans = {group.name: group.layers for group in groups}
    state = load_state(abstract, family.name_table(config), source, spans, family.num_experts(config), places)
    return decoder.build(config, groups, state, Precision(), mesh, sharding)


def run(target):
    """Features of packed rows; then a cached prefill and two more tokens."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, target.config.vocab_size, (8, T)).astype(np.int32)
    segments = np.repeat([[1, 2]], T // 2, axis=1).repeat(8, 0).astype(np.int32)
    positions = np.tile(np.arange(T // 2, dtype=np.int32), (8, 2))
    whole = target.features(Batch(tokens, np.zeros_like(tokens, bool), segments, positions))
    at = np.tile(np.arange(T, dtype=np.int32), (8, 1))
    cache, first = target.extend(target.new_cache(8, 24), tokens[:, :12], at[:, :12], "end")
    cache, second = target.extend(cache, tokens[:, 12:], at[:, 12:], "all")
    return jax.device_get((whole, first, second)), cache


@pytest.fixture(scope="module")
def single():
    """What each family gives on one device."""
    return functools.cache(lambda name: run(make(name))[0])


# By default the mesh of all axes, for a family without experts, and for both kinds of experts.
QUICK = {("qwen3", "all"), ("deepseek v3", "all"), ("gpt-oss", "all")}
# Each axis alone for a family without experts, and what splits experts for both kinds; others are for changes of
# sharding.
ALONE = {"qwen3": ("data", "fsdp", "tensor"), "deepseek v3": ("tensor", "expert"), "gpt-oss": ("tensor", "expert")}
EXHAUSTIVE = (pytest.mark.slow, pytest.mark.exhaustive)


def marks(name, mesh):
    if (name, mesh) in QUICK:
        return ()
    return (pytest.mark.slow,) if mesh == "all" or mesh in ALONE.get(name, ()) else EXHAUSTIVE


PAIRS = [pytest.param(name, mesh, marks=marks(name, mesh)) for name in FIELDS for mesh in MESHES if mesh != "rows"]


@pytest.mark.parametrize(("name", "mesh"), PAIRS)
def test_one_and_eight_devices_agree(single, name, mesh):
    want = single(name)
    target = make(name, MESHES[mesh])
    got, cache = run(target)
    assert_close(got, want, ulp=80)
    # Every device holds its share of cache and weights, and no more.
    data, fsdp, tensor, expert = MESHES[mesh]
    share = cache.k_LBKHS.addressable_shards[0].data.shape
    assert share[1:3] == (8 // (data * fsdp), 8 // tensor)
    names = {"/".join(map(str, path)): leaf[...] for path, leaf in decoder.nnx.to_flat_state(target.state)}
    split = {"o_proj/kernel": fsdp * tensor, "embed": fsdp * tensor, "experts/up_proj": expert * fsdp * tensor,
             "experts/gate_up_proj": expert * fsdp * tensor, "experts/gate_up_bias": expert * tensor,
             "experts/down_bias": expert, "layers/sinks": tensor}  # fmt: skip
    for end, parts in split.items():
        for leaf in (leaf for path, leaf in names.items() if path.endswith(end)):
            assert leaf.addressable_shards[0].data.size * parts == leaf.size


@pytest.mark.numeric
@pytest.mark.parametrize("name", ["qwen3", pytest.param("deepseek v3", marks=pytest.mark.slow)])
def test_a_tree_is_the_same_on_eight_devices(name):
    """Nodes that lie apart from their positions."""

    def grown(target):
        at = np.tile(np.arange(12, dtype=np.int32), (8, 1))
        tokens = np.random.default_rng(1).integers(0, target.config.vocab_size, (8, 19)).astype(np.int32)
        cache, _ = target.extend(target.new_cache(8, 24), tokens[:, :12], at, "end")
        positions, placement = Tree((2, 2)).place(jnp.full(8, 12), slice(None), 24)
        cache, out = target.extend(cache, tokens[:, 12:], positions, "all", placement)
        return jax.device_get((out, cache))

    got, want = grown(make(name, MESHES["all"])), grown(make(name))
    assert_close(got, want, ulp=80)


# By default they are sampled in test_free_rows_of_all_devices_take_prompts.
SAMPLED = {"temperature": 1.5, "top_p": 0.9, "seeds": [7, 8, 9]}


@pytest.mark.parametrize("sampled", [{}, pytest.param(SAMPLED, marks=pytest.mark.slow)])
@pytest.mark.parametrize("mesh", ["all", pytest.param("tensor", marks=EXHAUSTIVE)])
def test_answers_are_those_of_one_device(mesh, sampled):
    """Three prompts, which four shares of rows do not divide."""
    prompts = [[5, 9, 30, 7], [8] * 11, [40, 41, 6, 50, 51, 52, 53]]
    settings = {"max_new_tokens": 6, "stop_tokens": (), "prefill_chunk": 8} | sampled
    assert generate(make("qwen3", MESHES[mesh]), prompts, **settings) == generate(make("qwen3"), prompts, **settings)


def test_a_cache_of_one_row_is_forked_where_it_lies():
    """As a beginning that all prompts share is, where rows are not split."""
    target = make("qwen3", MESHES["tensor"])
    rng = np.random.default_rng(0)
    one = jax.tree.map(
        lambda x: jax.device_put(rng.normal(size=x.shape).astype(x.dtype), x.sharding), target.new_cache(1, 8)
    )  # fmt: skip
    many = target.fork_cache(one, 3)
    assert many.k_LBKHS.sharding.spec[2] == "tensor"
    np.testing.assert_array_equal(many.k_LBKHS, np.repeat(one.k_LBKHS, 3, axis=1))
    np.testing.assert_array_equal(many.v_LBKSC, np.repeat(one.v_LBKSC, 3, axis=1))


@pytest.mark.parametrize("name", ["qwen3", pytest.param("deepseek v3", marks=pytest.mark.slow)])
def test_free_rows_of_all_devices_take_prompts(name):
    """Eleven prompts in eight rows, two on each share of them; four read together, whichever devices they are on."""
    prompts = [[5 + i, 9, 30 + i] * (1 + i % 3) for i in range(11)]
    target = make(name, MESHES["rows"])
    settings = {"max_new_tokens": 6, "prefill_chunk": 8, "temperature": 1.5, "seeds": [*range(40, 51)]}
    alone = make(name)
    whole = generate(alone, prompts, stop_tokens=(), **settings)
    stops = [whole[0][1], whole[3][2], whole[5][1], whole[6][2]]
    got = generate(target, prompts, stop_tokens=stops, num_rows=8, **settings)
    assert got == generate(alone, prompts, stop_tokens=stops, **settings)


@pytest.mark.parametrize(
    "name", [name if name in QUICK_NAMES else pytest.param(name, marks=pytest.mark.slow) for name in FIELDS]
)
def test_no_weight_is_gathered_under_tensor_parallelism(name):
    target = make(name, MESHES["tensor"])
    at = np.zeros((8, 1), np.int32)
    with jax.set_mesh(target.mesh):
        lowered = decoder._forward.lower(target, at, at, None, target.new_cache(8, 24), "all")
    text = lowered.compile().as_text()
    weights = {tuple(sorted(w.shape[-2:])) for w in jax.tree.leaves(target.state) if w.ndim > 1}
    gathered = [tuple(map(int, dims.split(","))) for dims in re.findall(r"= \w+\[([\d,]+)\][^=]* all-gather\(", text)]
    assert "all-reduce" in text
    assert not [shape for shape in gathered if tuple(sorted(shape[-2:])) in weights]


def test_a_gathered_weight_would_be_seen():
    """The check above on a mesh where weights are gathered by design."""
    target = make("qwen3", MESHES["fsdp"])
    at = np.zeros((8, 1), np.int32)
    with jax.set_mesh(target.mesh):
        text = decoder._forward.lower(target, at, at, None, target.new_cache(8, 24), "all").compile().as_text()
    assert re.search(r"= \w+\[([\d,]+)\][^=]* all-gather\(", text)


@pytest.mark.parametrize(
    ("fields", "mesh", "message"),
    [
        ({"num_key_value_heads": 4}, "tensor", r"mesh.tensor: 8 devices do not divide num_key_value_heads \(4,\)"),
        ({"intermediate_size": 44}, "tensor", r"mesh.tensor: 8 .* layers/mlp/\w+/kernel .* a divisor of 44"),
        ({"hidden_size": 36, "head_dim": 8}, "fsdp", r"mesh.fsdp: 8 devices do not divide embed \(64, 36\)"),
    ],
)  # fmt: skip
def test_a_mesh_that_does_not_divide_is_refused(fields, mesh, message):
    with pytest.raises(InputError, match=message):
        make("qwen3", MESHES[mesh], **fields)


@pytest.mark.numeric
def test_long_rows_attend_in_chunks(monkeypatch):
    target = make("qwen3")
    tokens = np.random.default_rng(2).integers(0, 64, (1, 40)).astype(np.int32)
    segments = np.repeat([1, 2, 0], [15, 20, 5])[None].astype(np.int32)
    positions = np.concatenate([np.arange(15), np.arange(20), np.arange(5)])[None].astype(np.int32)
    batch = Batch(jnp.asarray(tokens), jnp.asarray(tokens > 0), jnp.asarray(segments), jnp.asarray(positions))
    slots = np.where(np.arange(40) < 33, np.arange(40), 48)[None].astype(np.int32)  # the end is padding
    prefill = lambda: target.extend(target.new_cache(1, 48), tokens, slots, "all")[1]  # noqa: E731
    want, cached = target.features(batch), prefill()
    monkeypatch.setattr(target_attention, "DENSE_SCORES", 0)
    monkeypatch.setattr(decoder.vocabulary, "LOGITS_AT_ONCE", 64 * 7)  # seven rows at a time
    decoder._forward.clear_cache()
    got, chunked = target.features(batch), prefill()
    decoder._forward.clear_cache()
    for a, b, num in ((got, want, 35), (chunked, cached, 33)):
        for name, ulp in (("taps_BTKE", 40), ("last_BTE", 80), ("argmax_BT", 0), ("logsumexp_BT", 40)):
            assert_close(getattr(a, name)[:, :num], getattr(b, name)[:, :num], ulp=ulp, path=name)
