"""What a step multiplies: products with weights, counted from shapes, since XLA counts what is in a loop once.

Each is two operations for every entry of a matrix and every row that it multiplies, once forwards and once for each of
its two gradients, if there are two.
"""

from __future__ import annotations

import math

from flax import nnx

from flaxdraft.algorithms.dflash.layout import Layout
from flaxdraft.interfaces import Example

# Of each layer's attention; queries are made of slots alone.
READ_BY_THE_TEXT = ("k_proj", "v_proj", "kv_a_proj_with_mqa", "kv_b_proj")


def of_step(params: nnx.State, frozen: nnx.State, example: Example, layout: Layout) -> float:
    """The operations of a step over an example, whose arrays may be described; every slot that predicts is asked.

    Layers multiply every slot of a block, and keys and values the rows of the text as well; `fc` multiplies those rows
    alone, and nobody needs its gradient by the taps; the head multiplies slots that predict, and has no gradient.
    """
    num_blocks, num_rows = example.chosen.anchor_BA.size, example.batch.tokens_BT.size
    num_slots, head = num_blocks * layout.block_size, frozen["head"] if "head" in frozen else params["lm_head"]
    total = 4.0 * math.prod(head.shape) * num_blocks * layout.num_predicted
    for path, variable in nnx.to_flat_state(params):
        if len(variable.shape) < 2 or path[0] == "lm_head":
            continue
        if path[0] == "fc":
            total += 4.0 * math.prod(variable.shape) * num_rows
        else:
            rows = num_slots + (num_rows if path[-2] in READ_BY_THE_TEXT else 0)
            total += 6.0 * math.prod(variable.shape) * rows
    return total
