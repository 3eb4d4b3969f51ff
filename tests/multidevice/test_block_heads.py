"""Block drafts with a head over the axes of the mesh: losses, counts and weights of one device, whatever is split;
every matrix gradient crosses devices once, the head's own among them."""

import jax
import numpy as np
import pytest
from closeness import assert_close
from reductions import matrices, matrix_shapes, reduced_operands
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
    got, want = train(SHAPE, 2, *HEADS[name]), train((), 1, *HEADS[name])
    assert_close(got.losses, want.losses, ulp=80, dtype=np.float32)
    for a, b in zip(got.sums, want.sums, strict=True):
        for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            if np.issubdtype(one.dtype, np.integer):
                np.testing.assert_array_equal(one, other)
    assert_close(got.params, want.params, ulp=80, of="norm")


@pytest.mark.parametrize("name", HEADS)
def test_every_matrix_gradient_is_reduced_once_after_the_loop(name):
    trained = train(SHAPE, 2, *HEADS[name])
    inside, outside = reduced_operands(trained.text)
    wanted = matrix_shapes(trained, dict(SHAPE)["tensor"])
    assert {key: outside[key] for key in wanted} == dict(wanted)
    inside.pop(IN_A_CHUNK.get(name), None)
    assert not matrices(inside), inside
