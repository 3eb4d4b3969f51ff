"""Exports of DFlash drafts in vLLM's CPU build: its configuration and model classes load them, and it decodes with them
as flaxdraft does, token by token and in as many target passes.
"""

import dflash
import pytest
import vllm_runs
from vllm_runs import CHAIN, LIMIT, V

from flaxdraft.algorithms.dflash import anchors
from flaxdraft.algorithms.dflash.drafts import qwen3
from flaxdraft.interfaces import Example, Features

pytestmark = vllm_runs.MARKS

DRAFTS = {
    "plain": {},
    "sliding, with sinks and a scale": {
        "layer_types": ["sliding_attention"] * 2, "sliding_window": 6, "is_causal": False, "attention_sink_bias": True,
        "attention_value_scale": 0.6,
    },
    "causal, with biases and a reduced vocabulary": {
        "is_causal": True, "attention_bias": True, "draft_vocab_size": 52,
    },
}  # fmt: skip


def teach(target, prompts, answers, fields) -> vllm_runs.Taught:
    """All blocks of the answers."""
    algorithm = dflash.algorithm(block_size=CHAIN + 1, decay_gamma=None)
    batch = vllm_runs.batch_of(prompts, answers)
    sizes = qwen3.Config.for_target(target.config, V) | {"block_size": CHAIN + 1, "sample_from_anchor": False}
    draft = dflash.make_draft(qwen3.Config(**sizes | fields), target)
    example = Example(batch, Features(target.features(batch).taps_BTKE), anchors.every(batch, LIMIT), ())
    return vllm_runs.taught(algorithm, qwen3, draft, dflash.vocab_of(draft.config), example)


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    folder, hf = tmp_path_factory.mktemp("vllm"), vllm_runs.config_json("Qwen3ForCausalLM", "qwen3")
    return vllm_runs.decoded_by_both(folder, hf, DRAFTS, teach, {"method": "dflash"})


@pytest.mark.parametrize("name", DRAFTS)
def test_vllm_decodes_as_flaxdraft_does(told, name, record_property):
    vllm_runs.assert_decodes_alike(told[name], record_property)
