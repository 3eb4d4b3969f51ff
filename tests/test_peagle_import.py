"""P-EAGLE checkpoints of other trainers, written in the layouts that they document, imported: the same draft comes out,
and goes out again to the engine that serves it."""

import json

import numpy as np
import pytest
import test_dflash_import
from commands import tool
from test_contracts import TARGET_HF, V, W
from test_dflash_import import IDS, add, assert_same, drop, fused, imported, imported_whole, say

from flaxdraft.algorithms.loading import from_pretrained
from flaxdraft.algorithms.peagle.drafts import llama
from flaxdraft.errors import InputError
from flaxdraft.files.safetensors_file import load_safetensors, save_safetensors
from flaxdraft.serving import lint
from flaxdraft.serving.export import export
from flaxdraft.serving.trained_draft import AboutTarget
from flaxdraft.serving.view import view_of_directory

from_pytorch = tool("convert/from_pytorch")
TAPS = [1, 3, 4]
ORDER = np.r_[W - 2 : W, 0 : W - 2]


class Source(test_dflash_import.Source):
    def __init__(self, size=W, **fields):
        super().__init__(llama, draft_vocab_size=size, **fields)


def specforge(source):
    """A name of its own, nulls, tables whatever the vocabulary; the mask token where its block drafts have it."""
    config = {name: value for name, value in source.hf.items() if name not in ("mask_token_id", "parallel_drafting")}
    config |= {"architectures": ["PEagleDraftModel"], "rope_scaling": None,
               "norm_before_residual": source.config.norm_before_residual}  # fmt: skip
    config["eagle_config"] = {"eagle_aux_hidden_state_layer_ids": TAPS, "use_aux_hidden_state": True}
    config["dflash_config"] = {"mask_token_id": source.config.mask_token_id}
    return source.tensors | source.vocab.tables(), config


def nemo(source):
    """`model.` in front, special tokens first in d2t, one axis of the mask's state."""
    tensors = {f"model.{name}": array for name, array in source.tensors.items()}
    tensors["lm_head.weight"] = tensors.pop("model.lm_head.weight")[ORDER]
    tensors["model.mask_hidden"] = tensors["model.mask_hidden"].reshape(-1)
    tables = {"d2t": IDS[ORDER] - np.arange(W), "t2d": source.vocab.t2d()}
    return tensors | tables, source.hf | {"architectures": ["LlamaForCausalLMPeagle"]}


def speculators(source):
    """The layer's configuration nested, and only what differs from transformers' Llama; what training needed."""
    c = source.config
    layer = {
        "vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": c.num_hidden_layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 64, "rope_theta": 1e4, "model_type": "llama",
    }  # fmt: skip
    config = {
        "architectures": ["PEagleSpeculator"], "speculators_model_type": "peagle", "draft_vocab_size": W,
        "mask_token_id": c.mask_token_id, "embed_requires_grad": True, "norm_before_residual": c.norm_before_residual,
        "norm_before_fc": c.norm_before_fc, "fc_norm": c.fc_norm, "norm_output": False, "target_hidden_size": None,
        "eagle_aux_hidden_state_layer_ids": [layer_id + 1 for layer_id in TAPS],
        "transformer_layer_config": layer, "speculators_config": {"algorithm": "peagle"},
    }  # fmt: skip
    target = {"verifier_lm_head.weight": np.ones((W, 32), np.float32), "verifier_norm.weight": np.ones(32, np.float32)}
    return source.tensors | source.vocab.tables() | target, config


LAYOUTS = {
    "specforge": (specforge, {"num_hidden_layers": 4}, "specforge"),
    "specforge, the residual normed": (specforge, {"num_hidden_layers": 1, "norm_before_residual": True}, "specforge"),
    "nemo": (nemo, {}, "nemo"), "fused": (fused, {}, None),
    "speculators": (speculators, {"num_hidden_layers": 3}, "speculators"),
    "speculators, each state normed": (speculators, {"fc_norm": True, "norm_before_residual": True}, "speculators"),
    "speculators, all states normed": (speculators, {"norm_before_fc": True}, "speculators"),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_same_draft_which_vllm_takes_again(tmp_path, name):
    build, fields, trainer = LAYOUTS[name]
    source = Source(**fields)
    report, written = imported_whole(tmp_path / "in", *build(source))
    assert report.trainer == trainer
    assert ("lm_head's rows were sorted along" in " ".join(report.remarks)) == (build is nemo)
    found = assert_same(tmp_path / "in", source)
    if build in (specforge, speculators):
        assert written["eagle_aux_hidden_state_layer_ids"] == [layer_id + 1 for layer_id in TAPS]
    whole = lint.check(view_of_directory(tmp_path / "in", TARGET_HF), found.algorithm.serving())[0]
    assert whole.faithful, whole.findings
    export(tmp_path / "out", found, AboutTarget(TARGET_HF, TAPS), dtype="float32", engine="vllm")
    assert_same(tmp_path / "out", source)


def test_a_whole_vocabulary_loses_its_tables(tmp_path):
    source = Source(V)
    imported(tmp_path / "in", *specforge(source))
    assert_same(tmp_path / "in", source)
    assert not {"d2t", "t2d"} & load_safetensors(tmp_path / "in" / "model.safetensors").keys()


def test_switches_are_written_where_engines_read_them(tmp_path):
    """Norms may be switched on in eagle_config, or by SGLang's other name."""
    source = Source(fc_norm=True, norm_before_residual=True)
    tensors, config = fused(source)
    config = {name: value for name, value in config.items() if name not in ("fc_norm", "norm_before_residual")}
    config |= {"use_aux_norm": True, "norm_before_fc": False, "eagle_config": {"norm_before_residual": True}}
    _, written = imported_whole(tmp_path / "in", tensors, config)
    assert {name: written.get(name) for name in ("fc_norm", "norm_before_residual")} == {
        "fc_norm": True, "norm_before_residual": True,
    }  # fmt: skip
    assert not {"use_aux_norm", "norm_before_fc"} & written.keys()
    assert_same(tmp_path / "in", source)


def test_what_says_nothing_here_is_pointed_out(tmp_path):
    tensors, config = speculators(Source())
    report = imported(tmp_path / "in", tensors, config | {"norm_output": True, "embed_requires_grad": False})
    said = " ".join(report.remarks)
    assert "norm_output true left out: it says which state a next step reads" in said
    assert "embed_requires_grad is false: the embedding is still that of the target" in said
    assert_same(tmp_path / "in", Source())


def test_the_residual_starts_from_the_plain_state_where_speculators_does_not_say_it(tmp_path):
    """Trainer and engine agree there."""
    tensors, config = speculators(Source())
    del config["norm_before_residual"]
    imported(tmp_path / "in", tensors, config)
    assert_same(tmp_path / "in", Source())


def test_the_command_finds_the_algorithm(tmp_path, capsys):
    """Tables in numpy's files; a base that the user knows better."""
    tensors, config = speculators(Source())
    (tmp_path / "in").mkdir()
    for name in ("d2t", "t2d"):
        np.save(tmp_path / "in" / f"{name}.npy", tensors.pop(name))
    save_safetensors(tmp_path / "in" / "model.safetensors", tensors)
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    assert from_pytorch.main([str(tmp_path / "in"), str(tmp_path / "out"), "--rope-theta", "5000"]) == 0
    said = capsys.readouterr().out
    for line in ("mask_hidden  -> mask_hidden", "embed_tokens.weight  -> embed_tokens.weight",
                 "verifier_norm.weight  left out (the target's final norm", "a draft of speculators"):  # fmt: skip
        assert line in said
    assert from_pretrained(tmp_path / "out").config.rope.rope_theta == 5000
    assert from_pytorch.main([str(tmp_path / "in"), str(tmp_path / "x"), "--recurrence", "pre-norm"]) == 2
    assert "a draft that proposes in one pass feeds no state back" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("d2t"), "there: no d2t for 24 of 64 tokens"),
        (drop("lm_head.weight"), "there: no lm_head.weight"),
        (drop("mask_hidden"), "there: the weights do not fit.* missing: mask_hidden"),
        (drop("embed_tokens.weight"), "there: the weights do not fit.* missing: embed_tokens.weight"),
        (drop("mask_token_id"), "there: no mask_token_id; write the token that the draft was trained with"),
        (say(pard_token=3), "mask_token_id 63, pard_token 3: different tokens for masked places"),
        (say(mask_token_id="mask"), "mask_token_id is 'mask', expected a token of the target"),
        (say(mask_token_id=64), r"mask_token_id: found 64, expected a token of the target, 0\.\.63"),
        (drop("transformer_layer_config"), "no transformer_layer_config"),
        (say(transformer_layer_config={"layer_types": 1}), "layer_types: found 1, expected a list of names"),
        (say(draft_vocab_size="many"), "there: config.json: draft_vocab_size is 'many', expected a positive integer"),
        (add("layers.1.self_attn.q_norm.weight", 8), "a Qwen3 layer with norms over each head"),
        (add("layers.2.mlp.up_proj.weight", 48, 32), "of a layer more than num_hidden_layers says"),
        (add("input_norm.weight", 96), "that of norm_before_fc, which config.json does not name"),
        (add("surprise", 2), "surprise: an unknown name; it would have been lost"),
    ],
)
def test_what_cannot_be_imported_is_an_error_and_leaves_nothing(tmp_path, change, message):
    tensors, config = map(dict, speculators(Source()))
    change(tensors, config)
    with pytest.raises(InputError, match=message):
        imported(tmp_path / "out", tensors, config)
    assert not list(tmp_path.iterdir())
