"""The linter on DFlash drafts: one planted fault at a time in a directory that is right."""

import json

import numpy as np
import pytest
from contracts import Pair, vocab_of
from dflash import algorithm
from flax import nnx
from test_contracts import TARGET_HF, V, target_config

from flaxdraft.algorithms.dflash.drafts import qwen3
from flaxdraft.algorithms.loading import abstract_params, from_pretrained
from flaxdraft.errors import InputError
from flaxdraft.evaluate.__main__ import main as evaluate
from flaxdraft.files.safetensors_file import load_safetensors, save_safetensors
from flaxdraft.serving import lint
from flaxdraft.serving.export import export
from flaxdraft.serving.trained_draft import AboutTarget, TrainedDraft
from flaxdraft.serving.view import view_of_arrays

TARGET = TARGET_HF | {"rope_theta": 1e4, "eos_token_id": 5}
DIRECTORY, NESTED = lint.DIRECTORY, "dflash_config"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """(tensors, config) of a right directory, and where it is."""
    pair, rng = Pair(algorithm(), qwen3), np.random.default_rng(0)
    config = pair.config(target_config())
    flat = nnx.to_flat_state(abstract_params(qwen3, config))
    params = nnx.from_flat_state([(p, v.replace(rng.normal(size=v.shape).astype(np.float32))) for p, v in flat])
    where = tmp_path_factory.mktemp("good") / "draft"
    about = AboutTarget(TARGET, pair.algorithm.tap_layers(8, None))
    draft = TrainedDraft(pair.algorithm, qwen3, config, params, vocab_of(config))
    export(where, draft, about, dtype="float32", engine="sglang")
    return load_safetensors(where / "model.safetensors"), json.loads((where / "config.json").read_text()), where


def field(**values):
    return lambda tensors, config: config.update(values)


def nested(**values):
    return lambda tensors, config: config.update({NESTED: config[NESTED] | values})


def drop(*names):
    return lambda tensors, config: [source.pop(name, None) for name in names for source in (tensors, config)]


def both(*changes):
    return lambda tensors, config: [change(tensors, config) for change in changes]


NORM = "layers.0.self_attn.q_norm.weight"
THETA = {"rope_type": "default", "rope_theta": 1e6}
# name: change, and {engine: (level, words)} that must be found.
FAULTS = {
    "taps counted by input": (nested(target_layer_ids=[4, 5, 6, 7, 8]), {DIRECTORY: ("refused", "counted from 0")}),
    "taps that two places count differently": (
        field(aux_hidden_state_layer_ids=[1, 2, 3, 4, 5]), {DIRECTORY: ("wrong", "one layer apart")},
    ),
    "taps out of order": (nested(target_layer_ids=[2, 1, 3, 4, 5]), {DIRECTORY: ("wrong", "do not ascend")}),
    "fewer taps than fc reads": (nested(target_layer_ids=[1, 2, 3]), {DIRECTORY: ("refused", "fc.weight (32, 160)")}),
    "the target's last layer": (
        nested(target_layer_ids=[1, 2, 3, 4, 7]), {"sglang": ("refused", "layer 7 is the target's last")},
    ),
    "slots shifted": (nested(sample_from_anchor=True), {
        "sglang": ("refused", "slot k for the token at its own place"), "vllm": ("refused", "for the one behind it"),
    }),
    "slots shifted in one place": (field(sample_from_anchor=True), {DIRECTORY: ("wrong", "shifted by one")}),
    "causal in one engine": (nested(causal=True), {"sglang": ("wrong", "full layers see their whole block")}),
    "causal in one place": (
        both(nested(causal=True), field(is_causal=False)), {DIRECTORY: ("wrong", "is_causal is False")},
    ),
    "another base": (
        field(rope_theta=1e6, rope_parameters=THETA), {DIRECTORY: ("wrong", "rope_theta is 1e+06, the target's 10000")},
    ),
    "half of yarn": (field(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}), {
        "sglang": ("refused", "yarn without original_max"),
    }),
    "a nested section that is none": (field(dflash_config=[1]), {DIRECTORY: ("refused", "an object with mask")}),
    "taps of another trainer that are none": (
        nested(aux_hidden_state_layer_ids="abc"), {DIRECTORY: ("refused", "dflash_config")},
    ),
    "another architecture": (field(architectures=["DFlash2DraftModel"]), {
        "sglang": ("refused", "names 'DFlash2DraftModel'"), "vllm": ("refused", "it knows DFlashDraftModel"),
    }),
    "another model type": (field(model_type="llama"), {"vllm": ("refused", "model_type is 'llama'")}),
    "code of another trainer": (field(auto_map={"AutoModel": "dflash.DFlash"}), {DIRECTORY: ("note", "auto_map")}),
    "a mask beyond the vocabulary": (nested(mask_token_id=V), {DIRECTORY: ("refused", f"mask_token_id is {V}")}),
    "a mask that ends answers": (nested(mask_token_id=5), {DIRECTORY: ("note", "ends the target's answers")}),
    "two sizes of a block": (nested(block_size=16), {DIRECTORY: ("wrong", "block_size is 4, in dflash_config 16")}),
    "no size of a block": (drop("block_size"), {DIRECTORY: ("refused", "no block_size")}),
    "no layer ids": (field(dflash_config={"mask_token_id": 3}), {DIRECTORY: ("refused", "an object with mask")}),
    "another drafter of the family": (nested(projector_type="domino"), {DIRECTORY: ("refused", "another drafter")}),
    "the speculators form": (field(speculators_model_type="dflash"), {DIRECTORY: ("refused", "speculators form")}),
    "sliding and full layers": (
        field(layer_types=["sliding_attention", "full_attention"], sliding_window=4), {"vllm": ("note", "V2 runner")},
    ),
    "a window that is missing": (
        field(layer_types=["sliding_attention"] * 2), {DIRECTORY: ("refused", "there is no sliding_window")},
    ),
    "a layer type too many": (field(layer_types=["full_attention"] * 3), {DIRECTORY: ("refused", "names 3 of 2")}),
    "a weight that is missing": (drop(NORM), {"sglang": ("refused", f"no weights for {NORM}")}),
    "a weight too many": (
        lambda tensors, config: tensors.update({"markov_head.markov_w1.weight": np.ones((V, 2), np.float32)}),
        {"vllm": ("wrong", "passes over markov_head")},
    ),
    "a weight that is not finite": (
        lambda tensors, config: tensors.update({NORM: np.full(8, np.nan, np.float32)}), {DIRECTORY: ("wrong", "NaN")},
    ),
    "a scale where no engine looks": (field(attention_value_scale=1.5), {
        "sglang": ("wrong", "reads attention_value_scale in dflash_config alone"), "vllm": ("wrong", "top level"),
    }),
    "a scale that one engine passes over": (nested(output_multiplier=1.5), {"vllm": ("note", "output_multiplier")}),
    "sinks that are missing": (
        nested(attention_sink_bias=True), {"vllm": ("refused", "weights for layers.0.self_attn.attention_sink_bias")},
    ),
    "names that one engine prefixes": (
        lambda tensors, config: tensors.update({f"model.{name}": tensors.pop(name) for name in [*tensors]}),
        {"vllm": ("refused", "it finds no weights for")},
    ),
    "latent attention": (
        field(kv_lora_rank=8, q_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8),
        {"sglang": ("refused", "no drafts with latent"), "vllm": ("refused", "as no released engine does")},
    ),
    "another target": (field(hidden_size=16, head_dim=4), {DIRECTORY: ("refused", "hidden_size is 16")}),
}  # fmt: skip


def check(tensors, config, target=TARGET):
    from flaxdraft.algorithms.dflash.serving import contract

    verdicts = lint.check(view_of_arrays(config, tensors, target), contract)
    return {verdict.name: verdict.findings for verdict in verdicts}


@pytest.mark.parametrize("target", [TARGET, None], ids=["target", "no target"])
def test_nothing_is_found_in_what_was_exported(good, target):
    found = check(*good[:2], target)
    assert {name: one for name, one in found.items() if one and target is not None} == {}
    assert all(finding.level == "note" for one in found.values() for finding in one)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(good, name):
    tensors, config = dict(good[0]), json.loads(json.dumps(good[1]))
    change, wanted = FAULTS[name]
    change(tensors, config)
    found = check(tensors, config)
    for engine, (level, words) in wanted.items():
        assert any(one.level == level and words in one.what for one in found[engine]), found[engine]


def test_a_base_that_nobody_wrote_is_found(good):
    """Readers take 10000; the target has another one."""
    tensors, config = good[0], {name: value for name, value in good[1].items() if "rope" not in name}
    found = check(tensors, config, TARGET | {"rope_theta": 1e6})
    assert [one.level for one in found[DIRECTORY] if "rope_theta is 10000, the target's 1e+06" in one.what] == ["wrong"]
    assert not any("rope" in one.what for one in check(tensors, config)[DIRECTORY])


def test_a_checkpoint_of_another_trainer_is_read(good, tmp_path):
    """SpecForge's and z-lab's: `model.` before names or not, the target's embedding and head among the weights or not,
    auto_map, layer types that say nothing new, the older dialect of RoPE."""
    tensors, config, where = good
    config = config | {"auto_map": {"AutoModel": "dflash.DFlashDraftModel"}, "layer_types": ["full_attention"] * 2}
    config = {name: value for name, value in config.items() if name not in ("draft_trainer", "rope_parameters")}
    config |= {"sliding_window": None, "max_window_layers": 2, "use_sliding_window": False}
    more = {"embed_tokens.weight": np.ones((V, 32), np.float32), "lm_head.weight": np.ones((V, 32), np.float32)}
    save_safetensors(tmp_path / "model.safetensors", {f"model.{key}": x for key, x in tensors.items()} | more)
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours, theirs = from_pretrained(where), from_pretrained(tmp_path)
    assert theirs.config == ours.config
    for one, other in zip(nnx.to_flat_state(theirs.params), nnx.to_flat_state(ours.params), strict=True):
        np.testing.assert_array_equal(one[1].get_value(), other[1].get_value())


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (("--chain", "3", "8"), "chain length: found 8, but this draft proposes at most 3 tokens at a time"),
        (("--tree", "2", "1"), "tree: found widths 2 1, but this draft proposes no trees"),
    ],
)
def test_what_a_draft_cannot_propose_is_refused_before_a_target_is_looked_for(good, tmp_path, capfd, asked, message):
    call = [str(good[2]), "--target", "nowhere", "--prompts", "none", "--out", str(tmp_path / "out"), *asked]
    assert evaluate(call) == 2
    assert message in " ".join(capfd.readouterr().err.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (nested(projector_type="domino", shift_label=True), "dflash_config.projector_type 'domino'"),
        (nested(attention_mode="sparse"), "dflash_config.attention_mode 'sparse': drafts of this kind are not"),
        (field(use_swa=True), "use_swa True"),
        (field(hidden_act="gelu"), "hidden_act 'gelu'"),
        (field(is_neox_style=False), "is_neox_style False"),
        (drop("dflash_config"), "no dflash_config, expected an object with mask_token_id and target_layer_ids"),
        (field(layer_types=["linear_attention"] * 2), "layer_types: found"),
        (field(draft_vocab_size=65), "draft.fields.draft_vocab_size: found 65, expected at most the target's 64"),
    ],
)  # fmt: skip
def test_what_no_draft_here_has_is_refused_by_name(good, change, message):
    config = json.loads(json.dumps(good[1]))
    change({}, config)
    with pytest.raises(InputError, match="draft") as caught:
        qwen3.Config.from_hf(config)
    assert message in str(caught.value)
