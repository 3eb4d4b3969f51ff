"""The linter on P-EAGLE drafts: one planted fault at a time in a directory that is right."""

import json

import numpy as np
import pytest
from contracts import Pair, vocab_of
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from peagle import algorithm
from test_check import ODD
from test_contracts import TARGET_HF, V, W, target_config

from flaxdraft.algorithms.eagle3.drafts import llama as sequential
from flaxdraft.algorithms.loading import abstract_params, contract_of, from_pretrained
from flaxdraft.algorithms.peagle.drafts import llama
from flaxdraft.algorithms.peagle.serving import contract
from flaxdraft.errors import InputError
from flaxdraft.files.safetensors_file import load_safetensors, save_safetensors
from flaxdraft.plugins import find_by_architecture
from flaxdraft.serving import lint
from flaxdraft.serving.export import export
from flaxdraft.serving.trained_draft import AboutTarget, TrainedDraft
from flaxdraft.serving.view import view_of_arrays

TARGET = TARGET_HF | {"rope_theta": 1e4, "eos_token_id": 5}
DIRECTORY = lint.DIRECTORY


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """(tensors, config) of a right directory, and where it is."""
    pair, rng = Pair(algorithm(), llama), np.random.default_rng(0)
    config = pair.config(target_config())
    flat = nnx.to_flat_state(abstract_params(llama, config))
    params = nnx.from_flat_state([(p, v.replace(rng.normal(size=v.shape).astype(np.float32))) for p, v in flat])
    where = tmp_path_factory.mktemp("good") / "draft"
    about = AboutTarget(TARGET, pair.algorithm.tap_layers(8, None))
    draft = TrainedDraft(pair.algorithm, llama, config, params, vocab_of(config))
    export(where, draft, about, dtype="float32", engine="vllm")
    return load_safetensors(where / "model.safetensors"), json.loads((where / "config.json").read_text()), where


def field(**values):
    return lambda tensors, config: config.update(values)


def drop(*names):
    return lambda tensors, config: [source.pop(name, None) for name in names for source in (tensors, config)]


def tensor(**values):
    return lambda tensors, config: tensors.update(values)


def renamed(old, new):
    return lambda tensors, config: tensors.update({new: tensors.pop(old)})


ONCE = ("refused", "nothing that proposes in one pass")
# name: change, and {engine: (level, words)} that must be found.
FAULTS = {
    "no mask token": (drop("mask_token_id"), {DIRECTORY: ("refused", "no mask_token_id")}),
    "a mask that is no token": (field(mask_token_id="<mask>"), {DIRECTORY: ("refused", "mask_token_id is '<mask>'")}),
    "a mask beyond the vocabulary": (field(mask_token_id=V), {DIRECTORY: ("refused", f"mask_token_id is {V}, beyond")}),
    "a mask that ends answers": (field(mask_token_id=5), {DIRECTORY: ("note", "ends the target's answers")}),
    "two masks": (field(pard_token=7), {DIRECTORY: ("wrong", "pard_token 7: different tokens")}),
    "the name that the speculators form has": (
        field(architectures=["PeagleLlamaForCausalLM"]), {"vllm": ("refused", "names 'PeagleLlamaForCausalLM'")},
    ),
    "SpecForge's name": (field(architectures=["PEagleDraftModel"]), {"vllm": ("refused", "names 'PEagleDraftModel'")}),
    "the speculators form": (field(speculators_model_type="peagle"), {DIRECTORY: ("refused", "speculators form")}),
    "no mask state": (drop("mask_hidden"), {"vllm": ("refused", "there is no mask_hidden")}),
    "a mask state of one tap": (
        tensor(mask_hidden=np.ones((1, 1, 32), np.float32)), {DIRECTORY: ("refused", "mask_hidden (1, 1, 32)")},
    ),
    "a mask state that is one number": (
        tensor(mask_hidden=np.ones((), np.float32)), {DIRECTORY: ("refused", "mask_hidden ()")},
    ),
    "no embedding": (drop("embed_tokens.weight"), {"vllm": ("wrong", "in which nobody learned the mask token")}),
    "a layer fewer than said": (field(num_hidden_layers=3), {"vllm": ("wrong", "random values for layers.2.")}),
    "a layer more than said": (field(num_hidden_layers=1), {"vllm": ("refused", "stops at layers.1.")}),
    "no number of layers": (drop("num_hidden_layers"), {DIRECTORY: ("refused", "num_hidden_layers is None")}),
    "a prefix": (renamed("fc.weight", "model.fc.weight"), {"vllm": ("refused", "stops at model.fc.weight")}),
    "norm_output": (field(norm_output=True), {DIRECTORY: ("wrong", "norm_output is true")}),
    "d2t of target ids": (
        tensor(d2t=np.sort(np.random.default_rng(1).choice(V, W, replace=False))), {DIRECTORY: ("wrong", "d2t")},
    ),
    "no d2t": (drop("d2t"), {"vllm": ("wrong", "no d2t with 24 of 64 tokens")}),
    "taps counted by output": (
        field(eagle_aux_hidden_state_layer_ids=[1, 3, 4]), {DIRECTORY: ("wrong", "different states")},
    ),
    "another base": (
        field(rope_theta=1e6, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
        {DIRECTORY: ("wrong", "rope_theta is 1e+06, the target's 10000")},
    ),
    "a weight that is not finite": (
        tensor(mask_hidden=np.full((1, 1, 96), np.nan, np.float32)), {DIRECTORY: ("wrong", "NaN")},
    ),
    "another target": (field(hidden_size=16, head_dim=4), {DIRECTORY: ("refused", "target_hidden_size is 16")}),
    "nothing": (field(), {
        "sglang": ONCE, "sglang-jax": ("refused", "never looks at mask_hidden"),
        "tpu-inference": ("refused", "stops at mask_hidden"),
    }),
}  # fmt: skip


def check(tensors, config, target=TARGET):
    verdicts = lint.check(view_of_arrays(config, tensors, target), contract)
    return {verdict.name: verdict.findings for verdict in verdicts}


@pytest.mark.parametrize("target", [TARGET, None], ids=["target", "no target"])
def test_nothing_is_found_in_what_was_exported(good, target):
    found = check(*good[:2], target)
    served = {name: found[name] for name in (DIRECTORY, "vllm")}
    assert {name: one for name, one in served.items() if one and target is not None} == {}
    assert all(finding.level == "note" for one in served.values() for finding in one)
    assert lint.passes(lint.check(view_of_arrays(good[1], good[0], target), contract))


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(good, name):
    tensors, config = dict(good[0]), json.loads(json.dumps(good[1]))
    change, wanted = FAULTS[name]
    change(tensors, config)
    found = check(tensors, config)
    for engine, (level, words) in wanted.items():
        assert any(one.level == level and words in one.what for one in found[engine]), found[engine]


def test_no_config_makes_the_linter_stumble(good):
    """Whatever stands in config.json, there is a verdict and no traceback."""
    names = [
        "num_hidden_layers",
        "mask_token_id",
        "pard_token",
        "dflash_config",
        "norm_output",
        "head_dim",
        "eagle_config",
    ]

    @settings(max_examples=40, deadline=None)
    @given(
        fields=st.dictionaries(st.sampled_from(names), ODD | st.dictionaries(st.just("mask_token_id"), ODD), max_size=3)
    )
    def one(fields):
        found = check(dict(good[0]), good[1] | fields)
        assert DIRECTORY in found
        contract_of(good[1] | fields)

    one()


def test_the_export_says_what_vllm_reads(good):
    tensors, config, _ = good
    assert (config["architectures"], config["model_type"]) == (["LlamaForCausalLMEagle3"], "llama")
    assert (config["parallel_drafting"], config["mask_token_id"], config["num_hidden_layers"]) == (True, V - 1, 2)
    assert config["eagle_aux_hidden_state_layer_ids"] == [2, 4, 5]
    assert tensors["mask_hidden"].shape == (1, 1, 96)
    assert {"embed_tokens.weight", "d2t", "layers.1.self_attn.q_proj.weight"} <= tensors.keys()
    assert '"parallel_drafting": true' in contract.engines()["vllm"].command("DRAFT", 3)


def test_a_sequential_draft_and_a_parallel_one_are_told_apart(good):
    """Though they may have the same name in vLLM."""
    config = good[1]
    drafts = ["flaxdraft.algorithms.eagle3.drafts", "flaxdraft.algorithms.peagle.drafts"]
    assert find_by_architecture(drafts, config, "x") is llama
    assert find_by_architecture(drafts, {**config, "mask_token_id": None}, "x") is sequential
    for name in sequential.ARCHITECTURES:
        assert find_by_architecture(drafts, {**config, "architectures": [name]}, "x") is llama
    assert contract_of(config).title == "P-EAGLE"
    assert contract_of({**config, "mask_token_id": None}).title == "EAGLE-3"


@pytest.mark.parametrize("name", ["PEagleDraftModel", "PeagleLlamaForCausalLM", "LlamaForCausalLMPeagle"])
def test_a_checkpoint_of_another_trainer_is_read(good, tmp_path, name):
    """Under each trainer's name of the architecture, mask token and layers, with the mask state as one row."""
    tensors, config, where = good
    config = {key: value for key, value in config.items() if key not in ("draft_trainer", "mask_token_id")}
    config |= {"architectures": [name], "pard_token": V - 1}
    theirs = {f"model.{key}".replace("layers.0.", "midlayer."): x for key, x in tensors.items()}
    save_safetensors(tmp_path / "model.safetensors", theirs | {"model.mask_hidden": tensors["mask_hidden"][0]})
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours, theirs = from_pretrained(where), from_pretrained(tmp_path)
    assert theirs.config == ours.config
    for one, other in zip(nnx.to_flat_state(theirs.params), nnx.to_flat_state(ours.params), strict=True):
        np.testing.assert_array_equal(one[1].get_value(), other[1].get_value())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_token_id": None}, "no mask_token_id (nor dspark_noise_token_id, pard_token, ptd_token_id)"),
        ({"norm_output": True}, "draft.fields.norm_output: found true"),
        ({"attention_bias": True}, "attention_bias is true"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is true"),
    ],
)
def test_what_no_draft_here_has_is_refused_by_name(good, changes, message):
    with pytest.raises(InputError, match="draft") as caught:
        llama.Config.from_hf(good[1] | changes)
    assert message in str(caught.value)
