"""Exports of P-EAGLE drafts in vLLM's CPU build: its configuration and model classes load them, and it decodes with
them as flaxdraft does, token by token and in as many target passes.
"""

import jax.numpy as jnp
import numpy as np
import peagle
import pytest
import vllm_runs
from vllm_runs import CHAIN, LIMIT, V

from flaxdraft.algorithms.peagle.depths import every
from flaxdraft.algorithms.peagle.drafts import llama
from flaxdraft.interfaces import Example, VocabMap

pytestmark = vllm_runs.MARKS

W = 56
VOCAB = VocabMap(np.arange(V - W, V), V)
DRAFTS = {
    "plain": {}, "one layer, each state normed": {"num_hidden_layers": 1, "fc_norm": True},
    "normed residual": {"num_hidden_layers": 3, "norm_before_residual": True, "norm_before_fc": True},
}  # fmt: skip


def teach(target, prompts, answers, fields) -> vllm_runs.Taught:
    """All depths behind every place of the answers."""
    algorithm, batch = peagle.algorithm(num_depths=CHAIN), vllm_runs.batch_of(prompts, answers)
    draft = peagle.make_draft(llama.Config(**llama.Config.for_target(target.config, W) | fields), VOCAB, target)
    algorithm.warm_start(draft, target, VOCAB)
    teacher = algorithm.teacher(target, VOCAB, jnp.float32)
    example = Example(batch, target.features(batch), every(batch, LIMIT, CHAIN), teacher)
    return vllm_runs.taught(algorithm, llama, draft, VOCAB, example)


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    folder, hf = tmp_path_factory.mktemp("vllm"), vllm_runs.config_json("LlamaForCausalLM", "llama")
    return vllm_runs.decoded_by_both(folder, hf, DRAFTS, teach, {"method": "eagle3", "parallel_drafting": True})


@pytest.mark.parametrize("name", DRAFTS)
def test_vllm_decodes_as_flaxdraft_does(told, name, record_property):
    vllm_runs.assert_decodes_alike(told[name], record_property)
