"""Exports of block drafts as SGLang's own configuration code reads them: every size, layer and slot is the one that was
trained, and the class that it loads has the name that stands there.

FLAXDRAFT_SGLANG names a Python that has PyTorch, transformers, msgspec and SGLang's files
(`pip install --no-deps sglang==0.5.23`); see parse_with_sglang.py for what of SGLang runs without a GPU.
"""

import os

import pytest
from parsing import BLOCK_TAPS, told, write
from test_dflash_import import SLIDING, Source

from flaxdraft.algorithms.dflash.drafts import qwen3 as dflash
from flaxdraft.algorithms.dflash2.drafts import qwen3 as dflash2
from flaxdraft.algorithms.domino.drafts import qwen3 as domino
from flaxdraft.algorithms.dspark.drafts import qwen3 as dspark

SGLANG = os.environ.get("FLAXDRAFT_SGLANG")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(SGLANG is None, reason="FLAXDRAFT_SGLANG names no Python with it")]

DRAFTS = {
    "dflash": (dflash, {"attention_sink_bias": True, "attention_value_scale": 0.7, **SLIDING}),
    "domino": (domino, {}), "domino-plain": (domino, {"shift_label": False, "emb_dim": 48}),
    "domino-long": (domino, {"pure_draft_prefix_len": 2}),
    "dspark": (dspark, {"markov_rank": 48}), "dspark-gated": (dspark, {"markov_head_type": "gated"}),
    "dspark-rnn": (dspark, {"markov_head_type": "rnn", "enable_confidence_head": False,
                            "confidence_head_with_markov": False}),
    "dflash2": (dflash2, {"conv_kernel_size": 3, "selector_top_k": 5, **SLIDING}),
}  # fmt: skip
SOURCES = {name: Source(module, **fields) for name, (module, fields) in DRAFTS.items()} if SGLANG else {}
OWN = {
    "dflash": (), "domino": ("shift_label", "pure_draft_prefix_len", "gru_hidden_dim", "emb_dim"),
    "dspark": ("markov_rank", "markov_head_type", "sample_from_anchor"),
    "dflash2": ("conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k"),
}  # fmt: skip
CLASSES = {"dflash": "DFlashDraftModel", "domino": "DFlashDraftModel", "dspark": "Qwen3DSparkModel",
           "dflash2": "DFlash2DraftModel"}  # fmt: skip


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sglang")
    for name, source in SOURCES.items():
        engine = "hf" if name == "domino-long" else "sglang"  # which refuses it
        write(folder / name, source, BLOCK_TAPS, engine, "bfloat16" if "domino" in name else "float32")
    return told("parse_with_sglang.py", SGLANG, folder, {name: name.split("-")[0] for name in DRAFTS})


@pytest.mark.parametrize("name", [name for name in DRAFTS if name != "domino-long"])
def test_sglang_reads_what_was_trained(read, name):
    found, config, algorithm = read["drafts"][name], SOURCES[name].config, name.split("-")[0]
    assert found["architectures"] == [CLASSES[algorithm]]
    assert CLASSES[algorithm] in read["architectures"]
    assert found["target_layer_ids"] == BLOCK_TAPS
    assert found["mask_token_id"] == config.mask_token_id
    assert found["num_hidden_layers"] == config.num_hidden_layers
    for field in OWN[algorithm]:
        assert found[field] == getattr(config, field), field
    if algorithm == "dspark":
        assert (found["gamma"], found["verify_num_draft_tokens"]) == (config.block_size, config.block_size + 1)
    else:
        assert found["block_size"] == config.block_size
        assert (found["projector_type"] == "domino") == (algorithm == "domino")
        assert found["attention_sink_bias"] == config.attention_sink_bias
        assert (found["attention_value_scale"] or 1.0) == config.attention_value_scale
    if config.sliding_window is not None:  # it counts the places before the slot
        assert (found["layer_types"], found["window_left"]) == ([*config.layer_types], config.sliding_window - 1)
    else:
        assert found["window_left"] is None


def test_sglang_stops_at_what_the_export_refuses(read):
    assert read["drafts"]["domino-long"] == {
        "error": "DFLASH Domino currently requires pure_draft_prefix_len=1, got 2."
    }
