"""Whatever stands in the config.json of another trainer's Domino, DSpark, DFlash2 or P-EAGLE draft, the importer gives
a draft or an `InputError`."""

import contextlib

import pytest
import test_peagle_import as peagle
from fuzzing import LONG, fuzz
from hypothesis import strategies as st
from test_block_head_imports import deepspec, specforge_domino, specforge_dspark, speculators
from test_dflash_fuzz import LAYER, NESTED, ODD, TABLE, TOP, fields
from test_dflash_import import Source, imported, specforge

from flaxdraft.algorithms.dflash2.drafts import qwen3 as dflash2
from flaxdraft.algorithms.domino.drafts import qwen3 as domino
from flaxdraft.algorithms.dspark.drafts import qwen3 as dspark
from flaxdraft.errors import InputError

OWN = [
    "conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k", "markov_rank", "markov_head_type",
    "enable_confidence_head", "confidence_head_with_markov", "confidence_head_alpha", "emb_dim", "gru_hidden_dim",
    "pure_draft_prefix_len", "shift_label", "pard_token", "dspark_noise_token_id", "fc_norm", "norm_output",
    "norm_before_fc", "norm_before_residual", "embed_requires_grad", "eagle_aux_hidden_state_layer_ids",
]  # fmt: skip
OBJECTS = {"dflash_config": "nested", "eagle_config": "nested", "transformer_layer_config": "layer"}


@pytest.fixture(scope="module")
def sources():
    built = [build(Source(module)) for build, module in (
        (specforge_domino, domino), (specforge_dspark, dspark), (deepspec, dspark), (speculators, dspark),
        (specforge, dflash2), (speculators, dflash2),
    )]  # fmt: skip
    return [*built, *(build(peagle.Source()) for build in (peagle.specforge, peagle.speculators))]


EXAMPLES = st.fixed_dictionaries({
    "which": st.integers(0, 7), "top": fields([*TOP, *OWN]), "nested": fields([*NESTED, *OWN]), "layer": fields(LAYER),
    "tables": st.dictionaries(st.sampled_from(["d2t", "t2d"]), TABLE, max_size=1),
    "odd": st.fixed_dictionaries({}, optional=dict.fromkeys(OBJECTS, ODD)) | st.just({}),
})  # fmt: skip


@pytest.mark.parametrize("seconds", [3, LONG])
def test_any_draft_is_imported_or_refused(seconds, sources, tmp_path):
    def check(example):
        tensors, config = sources[example["which"]]
        config = dict(config)
        for name, kind in OBJECTS.items():
            if name in config:
                config[name] = config[name] | example[kind]
        with contextlib.suppress(InputError):
            imported(tmp_path / "out", tensors | example["tables"], config | example["odd"] | example["top"])

    assert fuzz(check, EXAMPLES, seconds) > 5 * seconds
