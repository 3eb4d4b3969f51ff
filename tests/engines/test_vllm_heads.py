"""Exports of DSpark and DFlash2 drafts in vLLM's CPU build: its configuration and model classes load them, and its
newer runner, with Triton's interpreter in place of a GPU, decodes with them as flaxdraft does, token by token and in as
many target passes.
"""

import dflash as dflash_for_tests
import pytest
import vllm_runs
from vllm_runs import CHAIN, LIMIT, V

from flaxdraft.algorithms import algorithm_of
from flaxdraft.algorithms.dflash import anchors
from flaxdraft.algorithms.dflash2.drafts import qwen3 as dflash2
from flaxdraft.algorithms.dspark.drafts import qwen3 as dspark
from flaxdraft.interfaces import Example

pytestmark = vllm_runs.MARKS

DSPARK = {"plain": {}, "no confidence": {"enable_confidence_head": False, "confidence_head_with_markov": False}}
DFLASH2 = {"plain": {}, "three taps": {"conv_kernel_size": 3, "selector_top_k": 5}}


def teacher_of(module, block_size):
    def teach(target, prompts, answers, fields) -> vllm_runs.Taught:
        """All blocks of the answers."""
        batch = vllm_runs.batch_of(prompts, answers)
        sizes = module.Config.for_target(target.config, V) | {"block_size": block_size}
        draft = dflash_for_tests.make_draft(module.Config(**sizes | fields), target)
        algorithm = algorithm_of(module, draft.config)
        example = Example(batch, target.features(batch), anchors.every(batch, LIMIT), ())
        return vllm_runs.taught(algorithm, module, draft, dflash_for_tests.vocab_of(draft.config), example)

    return teach


def told(folder, module, drafts, block_size, method):
    hf = vllm_runs.config_json("Qwen3ForCausalLM", "qwen3")
    return vllm_runs.decoded_by_both(
        folder, hf, drafts, teacher_of(module, block_size), {"method": method}, interpreted=True
    )


@pytest.fixture(scope="module")
def of_dspark(tmp_path_factory):
    return told(tmp_path_factory.mktemp("dspark"), dspark, DSPARK, CHAIN, "dspark")


@pytest.fixture(scope="module")
def of_dflash2(tmp_path_factory):
    return told(tmp_path_factory.mktemp("dflash2"), dflash2, DFLASH2, CHAIN + 1, "dflash")


# Of this draft vLLM takes 236 passes, here it takes 233: in three of twelve answers one pass accepts less there. The
# answers are the same, noise on the weights changes no pass here, and the cause is not known.
PARTS = pytest.mark.xfail(strict=True, reason="three passes more in vLLM; the cause is not known")


@pytest.mark.parametrize("name", [pytest.param("plain", marks=PARTS), "no confidence"])
def test_vllm_decodes_with_dspark_as_flaxdraft_does(of_dspark, name, record_property):
    vllm_runs.assert_decodes_alike(of_dspark[name], record_property)


@pytest.mark.parametrize("name", DFLASH2)
def test_vllm_decodes_with_dflash2_as_flaxdraft_does(of_dflash2, name, record_property):
    vllm_runs.assert_decodes_alike(of_dflash2[name], record_property)
