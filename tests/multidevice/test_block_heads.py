"""Block drafts with a head over the axes of the mesh: losses, counts and weights of one device, whatever is split;
every matrix gradient crosses devices once, the head's own among them."""

import pytest
from reductions import matrices
from steps_on_mesh import assert_trained_alike, reduced_inside
from test_dflash_meshes import train

from flaxdraft.algorithms.dflash2 import algorithm as dflash2
from flaxdraft.algorithms.dflash2.drafts import qwen3 as dflash2_draft
from flaxdraft.algorithms.dflash2.settings import Settings as DFlash2Settings
from flaxdraft.algorithms.domino import algorithm as domino
from flaxdraft.algorithms.domino.drafts import qwen3 as domino_draft
from flaxdraft.algorithms.domino.settings import Settings as DominoSettings
from flaxdraft.algorithms.dspark import algorithm as dspark
from flaxdraft.algorithms.dspark.drafts import qwen3 as dspark_draft
from flaxdraft.algorithms.dspark.settings import Settings as DSparkSettings

pytestmark = pytest.mark.slow
SIZES = {"block_size": 4, "num_anchors": 3, "attention": "chunked", "attention_chunk": 8, "loss_chunk": 8}
HEADS = {
    "dflash2": (
        dflash2.Algorithm(DFlash2Settings(**SIZES, selector_warmup_steps=1, selector_ramp_steps=2)), dflash2_draft
    ),
    "domino": (domino.Algorithm(DominoSettings(**SIZES, base_steps=8)), domino_draft),
    "dspark": (dspark.Algorithm(DSparkSettings(**SIZES)), dspark_draft),
}  # fmt: skip
# What a vocabulary that is split makes every chunk of the loss add up: scores of its rows' candidates.
IN_A_CHUNK = {"dflash2": (SIZES["loss_chunk"], 16)}
SHAPE = (("data", 2), ("fsdp", 2), ("tensor", 2))


@pytest.mark.parametrize("name", HEADS)
def test_training_is_that_of_one_device(name):
    assert_trained_alike(train(SHAPE, 2, *HEADS[name]), train((), 1, *HEADS[name]))


@pytest.mark.parametrize("name", HEADS)
def test_every_matrix_gradient_is_reduced_once_after_the_loop(name):
    inside = reduced_inside(train(SHAPE, 2, *HEADS[name]), dict(SHAPE)["tensor"])
    inside.pop(IN_A_CHUNK.get(name), None)
    assert not matrices(inside), inside
