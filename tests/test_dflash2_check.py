"""The linter on DFlash2 drafts: one planted fault at a time in a directory that is right; what other trainers write is
read."""

import json

import numpy as np
import pytest
from contracts import Pair, vocab_of
from flax import nnx
from test_contracts import V, target_config
from test_dflash_check import DIRECTORY, NESTED, TARGET, both, drop, field, nested

from flaxdraft.algorithms.dflash2.algorithm import Algorithm
from flaxdraft.algorithms.dflash2.drafts import mla, qwen3
from flaxdraft.algorithms.dflash2.serving import contract
from flaxdraft.algorithms.dflash2.settings import Settings
from flaxdraft.algorithms.loading import abstract_params, contract_of, from_pretrained
from flaxdraft.errors import InputError
from flaxdraft.files.safetensors_file import load_safetensors, save_safetensors
from flaxdraft.serving import lint
from flaxdraft.serving.export import check_servable, export
from flaxdraft.serving.trained_draft import AboutTarget, TrainedDraft
from flaxdraft.serving.view import view_of_arrays

ABOUT = AboutTarget(TARGET, (1, 2, 3, 4, 5))


def draft_of(module=qwen3):
    algorithm, rng = Algorithm(Settings()), np.random.default_rng(0)
    config = Pair(algorithm, module).config(target_config())
    flat = nnx.to_flat_state(abstract_params(module, config))
    params = nnx.from_flat_state([(p, v.replace(rng.normal(size=v.shape).astype(np.float32))) for p, v in flat])
    return TrainedDraft(algorithm, module, config, params, vocab_of(config))


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """(tensors, config) of a right directory, and where it is."""
    where = tmp_path_factory.mktemp("good") / "draft"
    export(where, draft_of(), ABOUT, dtype="float32", engine="sglang")
    return load_safetensors(where / "model.safetensors"), json.loads((where / "config.json").read_text()), where


def renamed(old, new):
    return lambda tensors, config: tensors.update({new: tensors.pop(old)})


BOOK, KERNEL = "candidate_selector.successor_codebook", "layers.0.mlp_conv.base_kernel"
BOTH = ("sglang", "vllm")
everywhere = lambda level, words: dict.fromkeys(BOTH, (level, words))  # noqa: E731
FAULTS = {
    "codebooks named as in memory": (renamed(BOOK, f"{BOOK}.weight"), everywhere("refused", f"no weights for {BOOK}")),
    "no selector": (drop(BOOK), everywhere("refused", f"no weights for {BOOK}")),
    "no convolution": (drop(KERNEL), everywhere("refused", f"no weights for {KERNEL}")),
    "convolutions that config.json leaves out": (
        both(nested(conv_kernel_size=None), nested(conv_group_size=None)), {DIRECTORY: ("refused", "an object with")},
    ),
    "a selector that config.json leaves out": (nested(selector_rank=None), {DIRECTORY: ("refused", "an object with")}),
    "longer kernels": (nested(conv_kernel_size=3), {DIRECTORY: ("refused", f"{KERNEL} (2, 2, 32)")}),
    "kernels longer than the block": (nested(conv_kernel_size=9), {DIRECTORY: ("refused", "is 9, block_size 8")}),
    "smaller groups": (nested(conv_group_size=8), {DIRECTORY: ("refused", "kernel_projection.weight (8, 32)")}),
    "groups that do not fit": (nested(conv_group_size=12), {DIRECTORY: ("refused", "12 does not divide hidden_size")}),
    "another rank": (nested(selector_rank=16), {DIRECTORY: ("refused", "config.json says (16, 32)")}),
    "more candidates than tokens": (nested(selector_top_k=V + 1), {DIRECTORY: ("refused", f"vocab_size {V}")}),
    "no candidates": (nested(selector_top_k=0), {DIRECTORY: ("refused", "an object with")}),
    "two sizes of a block": (field(block_size=7), {DIRECTORY: ("wrong", "block_size is 7, in dflash_config 8")}),
    "slots shifted": (nested(sample_from_anchor=True), {DIRECTORY: ("wrong", "at a slot's own place")}),
    "a reduced vocabulary": (field(draft_vocab_size=24), {DIRECTORY: ("refused", "tokens of the whole vocabulary")}),
    "served as DFlash": (
        field(architectures=["DFlashDraftModel"]), everywhere("refused", "it knows DFlash2DraftModel"),
    ),
    "logits scaled where nobody looks": (field(output_multiplier=0.5), everywhere("wrong", "reads output_multiplier")),
    "another drafter": (nested(projector_type="dspark", markov_rank=4), {DIRECTORY: ("refused", "another drafter")}),
    "taps counted by input": (nested(target_layer_ids=[4, 5, 6, 7, 8]), {DIRECTORY: ("refused", "counted from 0")}),
}  # fmt: skip


def check(tensors, config):
    verdicts = lint.check(view_of_arrays(config, tensors, TARGET), contract)
    return {verdict.name: verdict.findings for verdict in verdicts}


def test_both_engines_serve_what_was_exported(good):
    tensors, config, _ = good
    found = check(tensors, config)
    assert not any(found[engine] for engine in (DIRECTORY, *BOTH))
    assert config["architectures"] == ["DFlash2DraftModel"]
    assert config[NESTED] == {
        "mask_token_id": V - 1, "target_layer_ids": [1, 2, 3, 4, 5], "block_size": 8, "conv_kernel_size": 2,
        "conv_group_size": 16, "selector_rank": 32, "selector_top_k": 16,
    }  # fmt: skip
    own = ("candidate_selector.", "layers.0.mlp_conv.")
    assert {name: x.shape for name, x in tensors.items() if name.startswith(own)} == {
        "candidate_selector.predecessor_codebook": (V, 32), BOOK: (V, 32),
        "candidate_selector.hidden_projection.weight": (32, 32), KERNEL: (2, 2, 32),
        "layers.0.mlp_conv.kernel_projection.weight": (8, 32),
    }  # fmt: skip


def test_both_engines_scale_and_cap_the_logits_of_candidates(good):
    """vLLM does it for these drafts alone: among candidates it is not the likeliest token that is proposed."""
    tensors, config = dict(good[0]), json.loads(json.dumps(good[1]))
    nested(output_multiplier=0.5, final_logit_softcapping=30.0)(tensors, config)
    found = check(tensors, config)
    assert not any(found[engine] for engine in (DIRECTORY, *BOTH))


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(good, name):
    tensors, config = dict(good[0]), json.loads(json.dumps(good[1]))
    change, wanted = FAULTS[name]
    change(tensors, config)
    found = check(tensors, config)
    for engine, (level, words) in wanted.items():
        assert any(one.level == level and words in one.what for one in found[engine]), found[engine]


@pytest.mark.parametrize("engine", BOTH)
def test_what_no_engine_serves_is_refused_before_training(engine):
    draft = draft_of(mla)
    with pytest.raises(InputError, match="it serves no drafts with latent attention"):
        check_servable(draft.algorithm, draft.config, ABOUT, engine)
    check_servable(draft.algorithm, draft.config, ABOUT, "hf")


def test_what_other_trainers_write_is_read(good, tmp_path):
    """SpecForge's and z-lab's form: the block's size in one place alone, `model.` before names, their code named, or
    codebooks as they are called in memory."""
    tensors, config, where = good
    config = {name: value for name, value in config.items() if name != "block_size"}
    config |= {"auto_map": {"AutoModel": "dflash2.DFlash2DraftModel"}}
    named = {f"model.{key}{'.weight' if key == BOOK else ''}": x for key, x in tensors.items()}
    save_safetensors(tmp_path / "model.safetensors", named)
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours, theirs = from_pretrained(where), from_pretrained(tmp_path)
    assert theirs.config == ours.config
    assert theirs.algorithm.settings.block_size == 8
    for one, other in zip(nnx.to_flat_state(theirs.params), nnx.to_flat_state(ours.params), strict=True):
        np.testing.assert_array_equal(one[1].get_value(), other[1].get_value())


def test_a_config_of_dflashs_name_is_no_draft_of_either(good):
    """Whoever reads it as DFlash would pass the convolutions over."""
    config = good[1] | {"architectures": ["DFlashDraftModel"]}
    assert contract_of(good[1]).title == "DFlash2"
    named = contract_of(config)
    assert named.title == "DFlash"
    found = named.unreadable(view_of_arrays(config, good[0], TARGET))
    assert "dflash_config.conv_kernel_size 2" in found[0].what
