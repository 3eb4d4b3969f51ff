"""Checkpoints of other trainers for the algorithms that build on DFlash, written in the layouts that they document,
imported: the same draft comes out, and goes out again to the engines that serve it."""

import importlib
import json

import numpy as np
import pytest
from commands import tool
from test_contracts import TARGET_HF, V
from test_dflash_import import (
    SIZE,
    SLIDING,
    TAPS,
    Source,
    add,
    assert_same,
    drop,
    fused,
    imported,
    imported_whole,
    say,
    specforge,
    specforge_mla,
    z_lab,
)
from test_dflash_import import speculators as speculators_dflash

from flaxdraft.algorithms.dflash2.drafts import mla as dflash2_mla
from flaxdraft.algorithms.dflash2.drafts import qwen3 as dflash2
from flaxdraft.algorithms.domino.drafts import qwen3 as domino
from flaxdraft.algorithms.dspark.drafts import mla as dspark_mla
from flaxdraft.algorithms.dspark.drafts import qwen3 as dspark
from flaxdraft.algorithms.importing import converter
from flaxdraft.algorithms.loading import from_pretrained
from flaxdraft.errors import InputError
from flaxdraft.files.safetensors_file import save_safetensors
from flaxdraft.serving import lint
from flaxdraft.serving.export import export
from flaxdraft.serving.trained_draft import AboutTarget
from flaxdraft.serving.view import view_of_directory

from_pytorch = tool("convert/from_pytorch")


def specforge_domino(source):
    """Under a name of its own, that no engine knows."""
    tensors, config = specforge(source)
    config["dflash_config"]["projector_type"] = "domino"
    return tensors, config | {"architectures": ["DominoDraftModel"]}


def specforge_dspark(source):
    """The heads' fields nested alone, the confidence by what the loss counts; the target's head inside."""
    tensors, config = specforge(source)
    heads = ("markov_rank", "markov_head_type", "enable_confidence_head", "confidence_head_with_markov")
    config = {name: value for name, value in config.items() if name not in (*heads, "sample_from_anchor")}
    nested = {name: config["dflash_config"][name] for name in config["dflash_config"] if name != heads[2]}
    alpha = float(source.config.enable_confidence_head)
    nested |= {"projector_type": "dspark", "confidence_head_alpha": alpha, "num_anchors": 512}
    tensors = tensors | {"target_lm_head.weight": np.ones((V, 32), np.float32)}
    return tensors, config | {"architectures": ["DSparkDraftModel"], "dflash_config": nested}


def deepspec(source):
    """All fields at the top level, the target's embedding and head inside."""
    config = {name: value for name, value in source.hf.items() if name not in ("dflash_config", "sample_from_anchor")}
    config |= {name: source.hf["dflash_config"][name] for name in ("target_layer_ids", "mask_token_id")}
    ones = np.ones((V, 32), np.float32)
    return source.tensors | {"embed_tokens.weight": ones, "lm_head.weight": ones}, config | {"num_anchors": 512}


def deepspec_by_share(source):
    """The confidence by what the loss counts."""
    tensors, config = deepspec(source)
    del config["enable_confidence_head"]
    return tensors, config | {"confidence_head_alpha": 0.5}


def z_lab_dflash2(source):
    """The codebooks as its classes call them."""
    tensors, config = z_lab(source)
    for name in [name for name in tensors if name.endswith("_codebook")]:
        tensors[f"{name}.weight"] = tensors.pop(name)
    return tensors, config


def speculators(source):
    """The algorithm's own fields at the top level."""
    tensors, config = speculators_dflash(source)
    name = type(source.config).projector
    own = {
        "dflash2": ("conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k"),
        "dspark": ("markov_rank", "markov_head_type", "enable_confidence_head", "confidence_head_with_markov"),
    }[name]  # fmt: skip
    ones = np.ones((V, 32), np.float32)
    target = {"embed_tokens.weight": ones, "lm_head.weight": ones, "verifier_lm_head.weight": ones}
    told = {field: getattr(source.config, field) for field in own}
    architecture = {"dflash2": "DFlash2DraftModel", "dspark": "DSparkSpeculator"}[name]
    return tensors | target, config | told | {"speculators_model_type": name, "architectures": [architecture]}


BOTH, SGLANG = {"sglang", "vllm"}, {"sglang"}
LAYOUTS = {  # with the engines that take the export
    "domino, specforge": (specforge_domino, domino, {}, set()),  # it wants bfloat16
    "domino, no shift": (specforge_domino, domino, {"shift_label": False}, set()),
    "dspark, specforge": (specforge_dspark, dspark, {}, BOTH),
    "dspark, specforge, mla": (specforge_dspark, dspark_mla, {}, set()),
    "dspark, specforge, gated, no confidence": (
        specforge_dspark, dspark, {"markov_head_type": "gated", "enable_confidence_head": False,
                                   "confidence_head_with_markov": False}, SGLANG),
    "dspark, deepspec, rnn": (deepspec, dspark, {"markov_head_type": "rnn"}, SGLANG),
    "dspark, deepspec, the confidence by its share": (deepspec_by_share, dspark, {}, BOTH),
    "dspark, speculators": (speculators, dspark, {}, BOTH),
    "dflash2, specforge": (specforge, dflash2, {}, BOTH),
    "dflash2, specforge, mla": (specforge_mla, dflash2_mla, {}, set()),
    "dflash2, specforge, sliding": (specforge, dflash2, SLIDING, BOTH),
    "dflash2, z-lab": (z_lab_dflash2, dflash2, {"conv_kernel_size": 3, "selector_top_k": 5}, BOTH),
    "dflash2, speculators": (speculators, dflash2, {"conv_group_size": 8}, BOTH),
    "dflash2, speculators, sliding both ways": (speculators, dflash2, SLIDING | {"is_causal": False}, BOTH),
    "dflash2, fused": (fused, dflash2, {}, BOTH),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_same_draft_which_engines_take_again(tmp_path, name):
    build, module, fields, engines = LAYOUTS[name]
    source = Source(module, **fields)
    _, written = imported_whole(tmp_path / "in", *build(source))
    assert written["dflash_config"]["target_layer_ids"] == TAPS
    if module in (dspark, dspark_mla):  # whose authors do not write it
        assert written["dflash_config"]["projector_type"] == "dspark"
    found = assert_same(tmp_path / "in", source)
    whole = lint.check(view_of_directory(tmp_path / "in", TARGET_HF), found.algorithm.serving())[0]
    assert whole.faithful, whole.findings
    export(tmp_path / "out", found, AboutTarget(TARGET_HF, TAPS), dtype="float32", engine="hf")
    assert_same(tmp_path / "out", source)
    for engine in engines:
        export(tmp_path / engine, found, AboutTarget(TARGET_HF, TAPS), dtype="float32", engine=engine)
        assert_same(tmp_path / engine, source)


@pytest.mark.parametrize(
    ("module", "usual"),
    [
        (dflash2, {"conv_kernel_size": 2, "conv_group_size": 16, "selector_rank": 256, "selector_top_k": 16}),
        (dspark, {"markov_rank": 256, "markov_head_type": "vanilla", "enable_confidence_head": True,
                  "confidence_head_with_markov": True}),
    ],
    ids=["dflash2", "dspark"],
)  # fmt: skip
def test_what_speculators_does_not_write_is_as_usual_there(module, usual, tmp_path):
    source = Source(module, **usual)
    tensors, config = speculators(source)
    imported(tmp_path / "in", tensors, {name: value for name, value in config.items() if name not in usual})
    assert_same(tmp_path / "in", source)


def test_sliding_layers_of_dflash2_see_their_whole_block_where_speculators_does_not_say_it(tmp_path):
    source = Source(dflash2, **SLIDING, is_causal=False)
    tensors, config = speculators(source)
    del config["sliding_window_non_causal"]
    imported(tmp_path / "in", tensors, config)
    assert_same(tmp_path / "in", source)


@pytest.mark.parametrize("name", ["dflash", "dflash2", "domino", "dspark"])
def test_behind_an_architecture_that_nobody_knows_dflash_config_tells_the_algorithm(name):
    config = {"architectures": ["SomeDraftModel"], "model_type": "llama", "dflash_config": {"projector_type": name}}
    known = importlib.import_module(f"flaxdraft.algorithms.{name}.foreign.convert")
    assert converter(config) is known.convert


def test_the_command_reads_them(tmp_path, capsys):
    tensors, config = speculators(Source(dflash2))
    (tmp_path / "in").mkdir()
    save_safetensors(tmp_path / "in" / "model.safetensors", tensors)
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    assert from_pytorch.main([str(tmp_path / "in"), str(tmp_path / "out"), "--rope-theta", "5000"]) == 0
    said = capsys.readouterr().out
    assert "candidate_selector.successor_codebook  -> candidate_selector.successor_codebook" in said
    assert "verifier_lm_head.weight  left out (the target's head" in said
    assert "a draft of speculators" in said
    assert from_pretrained(tmp_path / "out").config.rope.rope_theta == 5000


@pytest.mark.parametrize(
    ("build", "module", "change", "message"),
    [
        (speculators, dflash2, say(sample_from_anchor=True), "sample_from_anchor is true: such drafts predict"),
        (speculators, dspark, say(sample_from_anchor=False), "sample_from_anchor is false: slots are read as"),
        (speculators, dspark, drop("sample_from_anchor"), "no sample_from_anchor, which the trainer reads as"),
        (speculators, dspark, say(draft_vocab_size=SIZE), "24 of 64, expected all: the Markov head corrects"),
        (speculators, dflash2, say(draft_vocab_size=SIZE), "24 of 64: candidates are tokens of the whole"),
        (speculators, dflash2, say(speculators_model_type="domino"), "_model_type 'domino', expected 'eagle3'"),
        (speculators, dflash2, say(selector_rank="wide"), "selector_rank"),
        (speculators, dspark, say(markov_head_type="lattice"), "markov_head_type"),
        (specforge, dflash2, add("markov_head.markov_w1.weight", V, 2), "another drafter of the family, whose parts"),
        (specforge, dflash2, drop("candidate_selector.predecessor_codebook"), "missing: candidate_selector.pred"),
        (specforge, dflash2, say(dflash_config={"target_layer_ids": TAPS, "mask_token_id": 63}), "conv_kernel_size"),
        (specforge_domino, domino, drop("prefix_gru.weight_hh_l0"), "missing: prefix_gru.weight_hh_l0"),
        (deepspec, dspark, drop("markov_rank"), "no markov_rank"),
    ],
)  # fmt: skip
def test_what_cannot_be_imported_is_an_error_and_leaves_nothing(tmp_path, build, module, change, message):
    tensors, config = map(dict, build(Source(module)))
    change(tensors, config)
    with pytest.raises(InputError, match=message):
        imported(tmp_path / "out", tensors, config)
    assert not list(tmp_path.iterdir())
