"""The linter on Domino drafts: one planted fault at a time in a directory that is right; engines that serve none; what
SpecForge writes is read."""

import json

import numpy as np
import pytest
from contracts import Pair, vocab_of
from flax import nnx
from test_contracts import V, target_config
from test_dflash_check import DIRECTORY, NESTED, TARGET, both, drop, field, nested

from flaxdraft.algorithms.domino.algorithm import Algorithm
from flaxdraft.algorithms.domino.drafts import mla, qwen3
from flaxdraft.algorithms.domino.serving import contract
from flaxdraft.algorithms.domino.settings import Settings
from flaxdraft.algorithms.loading import abstract_params, contract_of, from_pretrained
from flaxdraft.errors import InputError
from flaxdraft.files.safetensors_file import load_safetensors, save_safetensors
from flaxdraft.serving import lint
from flaxdraft.serving.export import check_servable, export
from flaxdraft.serving.trained_draft import AboutTarget, TrainedDraft
from flaxdraft.serving.view import view_of_arrays


def draft_of(module=qwen3, **settings):
    algorithm, rng = Algorithm(Settings(**settings)), np.random.default_rng(0)
    config = Pair(algorithm, module).config(target_config())
    flat = nnx.to_flat_state(abstract_params(module, config))
    params = nnx.from_flat_state([(p, v.replace(rng.normal(size=v.shape).astype(np.float32))) for p, v in flat])
    return TrainedDraft(algorithm, module, config, params, vocab_of(config))


ABOUT = AboutTarget(TARGET, (1, 2, 3, 4, 5))


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """(tensors, config) of a right directory, and where it is."""
    where = tmp_path_factory.mktemp("good") / "draft"
    export(where, draft_of(), ABOUT, dtype="bfloat16", engine="sglang")
    return load_safetensors(where / "model.safetensors"), json.loads((where / "config.json").read_text()), where


STATE = "prefix_gru.weight_hh_l0"
FAULTS = {
    "a prefix of none": (nested(pure_draft_prefix_len=0), {"sglang": ("refused", "is 0, it serves 1 alone")}),
    "a prefix of two": (nested(pure_draft_prefix_len=2), {"sglang": ("refused", "is 2, it serves 1 alone")}),
    "a prefix as long as the block": (nested(pure_draft_prefix_len=8), {DIRECTORY: ("wrong", "none of 8 slots")}),
    "slots that are not said": (nested(shift_label=None), {DIRECTORY: ("refused", "shift_label (true or false)")}),
    "slots that are said in words": (nested(shift_label="yes"), {DIRECTORY: ("refused", "shift_label (true or")}),
    "slots that are said twice": (nested(sample_from_anchor=False), {DIRECTORY: ("wrong", "shifted by one")}),
    "slots that are said above": (field(sample_from_anchor=False), {DIRECTORY: ("wrong", "shifted by one")}),
    "the name of its trainer": (field(architectures=["DominoDraftModel"]), {
        "sglang": ("refused", "names 'DominoDraftModel', it knows DFlashDraftModel"),
    }),
    "code of its trainer": (field(auto_map={"AutoModel": "x"}), {"sglang": ("refused", "it runs its own")}),
    "the head left out": (drop(STATE), {"sglang": ("refused", f"no weights for {STATE}")}),
    "another width of the state": (nested(gru_hidden_dim=32), {DIRECTORY: ("refused", f"{STATE} (192, 64)")}),
    "two widths": (field(emb_dim=16), {DIRECTORY: ("refused", "emb_dim is 16, in dflash_config 32")}),
    "no width of the latents": (nested(emb_dim=None), {DIRECTORY: ("refused", "no emb_dim")}),
    "a width that is none": (field(emb_dim="wide"), {DIRECTORY: ("refused", "emb_dim is 'wide', expected a positive")}),
    "no width of the state": (nested(gru_hidden_dim=0), {DIRECTORY: ("refused", "an object with")}),
    "logits that are capped": (field(final_logit_softcapping=30.0), {"sglang": ("wrong", "softcapping is 30.0")}),
    "wide weights": (field(torch_dtype="float32"), {"sglang": ("note", "it wants bfloat16 of target and draft")}),
    "another drafter": (nested(projector_type="dspark", markov_rank=4), {DIRECTORY: ("refused", "another drafter")}),
    "taps counted by input": (nested(target_layer_ids=[4, 5, 6, 7, 8]), {DIRECTORY: ("refused", "counted from 0")}),
}  # fmt: skip


def check(tensors, config):
    verdicts = lint.check(view_of_arrays(config, tensors, TARGET), contract)
    return {verdict.name: verdict.findings for verdict in verdicts}


def test_one_engine_serves_what_was_exported_and_the_other_says_why_not(good):
    found = check(*good[:2])
    assert found[DIRECTORY] == found["sglang"] == []
    assert [(one.level, one.what.split(":")[0]) for one in found["vllm"]] == [("refused", "it has no Domino")]
    assert good[1][NESTED] == {
        "mask_token_id": V - 1, "target_layer_ids": [1, 2, 3, 4, 5], "projector_type": "domino", "emb_dim": 32,
        "gru_hidden_dim": 64, "pure_draft_prefix_len": 1, "shift_label": True,
    }  # fmt: skip
    assert good[1]["architectures"] == ["DFlashDraftModel"]
    shapes = {name: x.shape for name, x in good[0].items() if name.startswith(("prefix_gru", "embed_proj"))}
    assert shapes == {
        "prefix_gru.weight_ih_l0": (192, 32), "prefix_gru.weight_hh_l0": (192, 64), "embed_proj.0.weight": (32, 96),
        "embed_proj.2.weight": (V, 32),
    }  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(good, name):
    tensors, config = dict(good[0]), json.loads(json.dumps(good[1]))
    change, wanted = FAULTS[name]
    change(tensors, config)
    found = check(tensors, config)
    for engine, (level, words) in wanted.items():
        assert any(one.level == level and words in one.what for one in found[engine]), found[engine]


@pytest.mark.parametrize(
    ("settings", "module", "engine", "message"),
    [
        ({"pure_draft_prefix_len": 0}, qwen3, "sglang", "SGLang 0.5.23: pure_draft_prefix_len is 0, it serves 1 alone"),
        ({}, qwen3, "vllm", "vLLM 0.33.0: it has no Domino"),
        ({}, mla, "sglang", "SGLang 0.5.23: it serves no drafts with latent attention"),
    ],
)
def test_what_no_engine_serves_is_refused_before_training(settings, module, engine, message):
    draft = draft_of(module, **settings)
    with pytest.raises(InputError, match=message):
        check_servable(draft.algorithm, draft.config, ABOUT, engine)
    check_servable(draft.algorithm, draft.config, ABOUT, "hf")


def test_a_checkpoint_of_specforge_is_read(good, tmp_path):
    """Its architecture name, its code, `model.` before names, emb_dim at the top level."""
    tensors, config, where = good
    inside = {name: value for name, value in config[NESTED].items() if name != "emb_dim"}
    config = config | {"architectures": ["DominoDraftModel"], "auto_map": {"AutoModel": "domino.DominoDraftModel"}}
    config |= {NESTED: inside, "emb_dim": 32}
    save_safetensors(tmp_path / "model.safetensors", {f"model.{key}": x for key, x in tensors.items()})
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours, theirs = from_pretrained(where), from_pretrained(tmp_path)
    assert theirs.config == ours.config
    assert theirs.algorithm.settings.shift_label is True
    for one, other in zip(nnx.to_flat_state(theirs.params), nnx.to_flat_state(ours.params), strict=True):
        np.testing.assert_array_equal(one[1].get_value(), other[1].get_value())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (both(nested(), field(emb_dim=16)), "emb_dim is 16, in dflash_config 32"),
        (nested(shift_label=1), "dflash_config.shift_label is 1, expected true or false"),
        (nested(sample_from_anchor=True), "of domino algorithm.shift_label says what a slot predicts"),
        (nested(markov_rank=4), "dflash_config.markov_rank 4: drafts of this kind are not supported"),
    ],
)
def test_a_config_that_says_two_things_is_refused(good, change, message):
    config = json.loads(json.dumps(good[1]))
    change({}, config)
    with pytest.raises(InputError) as caught:
        qwen3.Config.from_hf(config)
    assert message in str(caught.value)


def test_each_drafter_of_the_family_is_judged_by_its_own_contract(good):
    own = lambda **values: contract_of(good[1] | {NESTED: good[1][NESTED] | values}).title  # noqa: E731
    assert (own(), own(projector_type="dflash", shift_label=False)) == ("Domino", "DFlash")
    assert own(projector_type="lilicorr") == own(projector_type=[1]) == "DFlash"  # which refuses what it does not know
