"""The sizes of heads of block drafts where nobody says them."""

import dataclasses

import pytest
from test_contracts import V, target_config

from flaxdraft.algorithms.dflash2.drafts import qwen3 as dflash2
from flaxdraft.algorithms.domino.drafts import qwen3 as domino
from flaxdraft.algorithms.dspark.drafts import qwen3 as dspark

WIDTHS = {"selector_rank": dflash2, "emb_dim": domino, "markov_rank": dspark}


@pytest.mark.parametrize("name", WIDTHS)
def test_a_matrix_over_the_vocabulary_is_as_wide_as_in_drafts_of_qwen3_8b(name):
    for width, usual in ((4096, 256), (2560, 160), (32, 32)):
        target = dataclasses.replace(target_config(), hidden_size=width)
        assert WIDTHS[name].Config.for_target(target, V)[name] == usual


def test_so_is_dominos_state():
    for width, usual in ((4096, 1024), (2560, 640), (32, 64)):
        target = dataclasses.replace(target_config(), hidden_size=width)
        assert domino.Config.for_target(target, V)["gru_hidden_dim"] == usual
