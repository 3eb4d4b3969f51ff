"""The linter on DSpark drafts: one planted fault at a time in a directory that is right; heads that an engine lacks;
what SpecForge writes is read; the confidence's temperatures."""

import json

import jax
import numpy as np
import pytest
from contracts import Pair, vocab_of
from flax import nnx
from test_contracts import V, target_config
from test_dflash_check import DIRECTORY, NESTED, TARGET, both, drop, field, nested

from flaxdraft.algorithms.dspark.algorithm import Algorithm
from flaxdraft.algorithms.dspark.drafts import qwen3
from flaxdraft.algorithms.dspark.serving import contract
from flaxdraft.algorithms.dspark.serving.temperatures import NAME, temperatures
from flaxdraft.algorithms.dspark.settings import Settings
from flaxdraft.algorithms.loading import abstract_params, contract_of, from_pretrained, tapped_layers
from flaxdraft.errors import InputError
from flaxdraft.files.safetensors_file import load_safetensors, save_safetensors
from flaxdraft.serving import lint
from flaxdraft.serving.export import check_servable, export
from flaxdraft.serving.trained_draft import AboutTarget, Origin, TrainedDraft
from flaxdraft.serving.view import view_of_arrays

ABOUT = AboutTarget(TARGET, (1, 2, 3, 4, 5))


def draft_of(**fields):
    algorithm, rng = Algorithm(Settings()), np.random.default_rng(0)
    config = Pair(algorithm, qwen3).config(target_config(), **fields)
    flat = nnx.to_flat_state(abstract_params(qwen3, config))
    params = nnx.from_flat_state([(p, v.replace(rng.normal(size=v.shape).astype(np.float32))) for p, v in flat])
    return TrainedDraft(algorithm, qwen3, config, params, vocab_of(config))


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """(tensors, config) of a right directory, and where it is."""
    where = tmp_path_factory.mktemp("good") / "draft"
    export(where, draft_of(), ABOUT, dtype="float32", engine="sglang")
    return load_safetensors(where / "model.safetensors"), json.loads((where / "config.json").read_text()), where


W2 = "markov_head.markov_w2.weight"
SHIFTED = both(nested(sample_from_anchor=False), field(sample_from_anchor=False))
FAULTS = {
    "slots read as DFlash has them": (SHIFTED, {DIRECTORY: ("wrong", "slots are read as DFlash has them")}),
    "slots said in two ways": (field(sample_from_anchor=False), {DIRECTORY: ("wrong", "shifted by one")}),
    "slots said where vLLM refuses DFlash's": (nested(sample_from_anchor=True), {
        "vllm": ("refused", "it stops at dflash_config.sample_from_anchor"),
    }),
    "a rank said in two ways": (field(markov_rank=16), {DIRECTORY: ("wrong", "markov_rank is 16, in dflash_conf")}),
    "fields out of the engines' sight": (drop("markov_rank"), {
        "sglang": ("refused", "markov_rank stand in dflash_config alone"), "vllm": ("refused", "at the top level"),
    }),
    "a head that there is not": (nested(markov_head_type="best"), {DIRECTORY: ("refused", "vanilla, gated or rnn")}),
    "a head whose weights are missing": (both(nested(markov_head_type="gated"), field(markov_head_type="gated")), {
        "sglang": ("refused", "no weights for markov_head.gate_proj.weight"), "vllm": ("refused", "it has vanilla"),
    }),
    "the name of its trainer": (field(architectures=["DSparkDraftModel"]), {
        "vllm": ("refused", "names 'DSparkDraftModel', it knows Qwen3DSparkModel"),
    }),
    "no rank": (both(nested(markov_rank=None), field(markov_rank=None)), {DIRECTORY: ("refused", "no markov_rank")}),
    "a rank that is none": (field(markov_rank=[]), {DIRECTORY: ("refused", "markov_rank is [], expected a positive")}),
    "a head of no type": (field(markov_head_type=[1]), {DIRECTORY: ("refused", "expected vanilla, gated or rnn")}),
    "half of the head left out": (drop(W2), {"sglang": ("refused", f"no weights for {W2}")}),
    "a confidence of another width": (
        both(nested(confidence_head_with_markov=False), field(confidence_head_with_markov=False)),
        {DIRECTORY: ("refused", "confidence_head.proj.weight (1, 64)")},
    ),
    "a confidence that nobody reads": (
        both(nested(enable_confidence_head=False), field(enable_confidence_head=False)),
        {"vllm": ("wrong", "passes over confidence_head")},
    ),
    "logits that are scaled": (nested(output_multiplier=0.5), {
        "sglang": ("wrong", "output_multiplier is 0.5, which"), "vllm": ("wrong", "output_multiplier is 0.5, which"),
    }),
    "logits that are capped": (nested(final_logit_softcapping=30.0), {"sglang": ("wrong", "softcapping is 30.0")}),
    "another drafter": (nested(projector_type="domino", shift_label=True), {DIRECTORY: ("refused", "another drafter")}),
    "the target's last layer": (nested(target_layer_ids=[1, 2, 3, 4, 7]), {"sglang": ("refused", "target's last")}),
}  # fmt: skip


def check(tensors, config):
    verdicts = lint.check(view_of_arrays(config, tensors, TARGET), contract)
    return {verdict.name: verdict.findings for verdict in verdicts}


def test_both_engines_serve_what_was_exported(good):
    assert {name: one for name, one in check(*good[:2]).items() if one} == {}
    config = good[1]
    assert (config["architectures"], config["model_type"], config["block_size"]) == (["Qwen3DSparkModel"], "qwen3", 7)
    told = {"markov_rank": 32, "markov_head_type": "vanilla", "enable_confidence_head": True,
            "confidence_head_with_markov": True}  # fmt: skip
    at_top = told | {"sample_from_anchor": True}
    assert {name: config[name] for name in at_top} == at_top
    assert config[NESTED] == told | {
        "mask_token_id": V - 1, "target_layer_ids": [1, 2, 3, 4, 5], "projector_type": "dspark",
        "attention_mode": "gqa",
    }  # fmt: skip
    shapes = {name: x.shape for name, x in good[0].items() if name.startswith(("markov", "confidence"))}
    assert shapes == {
        "markov_head.markov_w1.weight": (V, 32), W2: (V, 32), "confidence_head.proj.weight": (1, 64),
        "confidence_head.proj.bias": (1,),
    }  # fmt: skip
    assert not (good[2] / NAME).exists()  # nothing was evaluated


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(good, name):
    tensors, config = dict(good[0]), json.loads(json.dumps(good[1]))
    change, wanted = FAULTS[name]
    change(tensors, config)
    found = check(tensors, config)
    for engine, (level, words) in wanted.items():
        assert any(one.level == level and words in one.what for one in found[engine]), found[engine]


@pytest.mark.parametrize("kind", ["gated", "rnn"])
def test_a_head_that_one_engine_lacks(kind):
    draft = draft_of(markov_head_type=kind)
    check_servable(draft.algorithm, draft.config, ABOUT, "sglang")
    with pytest.raises(InputError, match=rf"vLLM 0.33.0: markov_head_type is {kind}, it has vanilla alone"):
        check_servable(draft.algorithm, draft.config, ABOUT, "vllm")


@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn"])
def test_a_checkpoint_of_specforge_is_read(kind, tmp_path):
    """Its architecture name, its code, all of its fields in dflash_config."""
    draft = draft_of(markov_head_type=kind)
    export(tmp_path / "ours", draft, ABOUT, dtype="float32", engine="hf")
    tensors = load_safetensors(tmp_path / "ours" / "model.safetensors")
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config["architectures"] == ["DSparkDraftModel"]
    theirs = {name: value for name, value in config.items() if name not in (*draft.config.to_hf()[NESTED], "x")}
    theirs |= {"auto_map": {"AutoModel": "dspark.DSparkDraftModel"}}
    (tmp_path / "theirs").mkdir()
    save_safetensors(tmp_path / "theirs" / "model.safetensors", tensors)
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(theirs))
    found = from_pretrained(tmp_path / "theirs")
    assert found.config == draft.config
    for one, other in zip(nnx.to_flat_state(found.params), nnx.to_flat_state(draft.params), strict=True):
        np.testing.assert_array_equal(one[1].get_value(), other[1].get_value())
    assert contract_of(theirs).title == "DSpark"


def test_a_checkpoint_of_the_authors_is_read(good, tmp_path):
    """Its fields at the top level, the target's embedding and head among the weights."""
    tensors, config, where = good
    theirs = {name: value for name, value in config.items() if name not in (NESTED, "sample_from_anchor")}
    theirs |= {"target_layer_ids": [1, 2, 3, 4, 5], "mask_token_id": V - 1, "num_anchors": 512}
    more = {name: np.ones((V, 32), np.float32) for name in ("embed_tokens.weight", "lm_head.weight")}
    save_safetensors(tmp_path / "model.safetensors", tensors | more)
    (tmp_path / "config.json").write_text(json.dumps(theirs))
    found, ours = from_pretrained(tmp_path), from_pretrained(where)
    assert found.config == ours.config
    jax.tree.map(np.testing.assert_array_equal, found.params, ours.params)
    assert tapped_layers(tmp_path, {}) == [1, 2, 3, 4, 5]
    assert {name: one for name, one in check(tensors | more, theirs).items() if one} == {}


def test_temperatures_stand_beside_what_they_were_fitted_for(tmp_path):
    """Of the checkpoint that is exported, one a slot; 1 where the evaluated chain was shorter than a block."""
    forced = {"confidence_temperatures": [2.0, 0.5]}
    result = {"answers": 60, "checkpoint": {"step": 4, "last": 5}, "teacher_forced": forced}
    (tmp_path / "evaluation.json").write_text(json.dumps({"result": result}))
    for step in (4, 5):
        origin = Origin("tiny", tmp_path, step)
        export(tmp_path / str(step), draft_of(), ABOUT, dtype="float32", engine="sglang", origin=origin)
    written = json.loads((tmp_path / "4" / NAME).read_text())
    assert written["temperatures"] == [2.0, 0.5, 1, 1, 1, 1, 1]
    assert written["num_samples"] == 60
    assert not (tmp_path / "5" / NAME).exists()
    assert temperatures({"block_size": 1}, result)["temperatures"] == [2.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (SHIFTED, "sample_from_anchor is false: slots as DFlash has them"),
        (field(markov_rank=16), "markov_rank is 16, in dflash_config 32"),
        (nested(shift_label=True), "dflash_config.shift_label True: drafts of this kind are not supported"),
    ],
)
def test_a_config_that_says_two_things_is_refused(good, change, message):
    config = json.loads(json.dumps(good[1]))
    change({}, config)
    with pytest.raises(InputError) as caught:
        qwen3.Config.from_hf(config)
    assert message in str(caught.value)
