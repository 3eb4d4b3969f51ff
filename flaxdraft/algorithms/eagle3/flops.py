"""What a step multiplies: products with weights, counted from shapes, since XLA counts what is in a loop once.

Each is two operations for every entry of a matrix and every row that it multiplies, once forwards and once for each of
its two gradients, if there are two.
"""

from __future__ import annotations

import math

from flax import nnx

from flaxdraft.interfaces import Example

# The attention's first projections. One half of their inputs is a token's, and is multiplied once for all steps.
QUERIES, KEYS_AND_VALUES = ("q_proj", "q_a_proj"), ("k_proj", "v_proj", "kv_a_proj_with_mqa")


def of_step(params: nnx.State, example: Example, num_steps: int) -> float:
    """Of an example, whose arrays may be described; every chosen row is supervised at every step.

    Keys and values of step 0 are made for every row of the text, all else for the chosen rows. Nobody needs the
    gradient of `fc` by the taps, but for norms that stand before it; the teacher is multiplied once, forwards.
    """
    (num_batch, length), chosen = example.batch.tokens_BT.shape, example.chosen.rows_BR.size
    text, tokens, steps = num_batch * length, num_batch * (length + num_steps), chosen * num_steps
    later_keys = text + chosen * (num_steps - 1)
    total = 2.0 * math.prod(example.teacher.shape) * chosen
    normed = any(str(name).startswith(("fc_norm", "input_norm")) for name in params)
    for path, variable in nnx.to_flat_state(params):
        if len(variable.shape) < 2 or path[0] == "embed_tokens":
            continue
        size, name = float(math.prod(variable.shape)), path[-2]
        if name == "fc":
            total += (6 if normed else 4) * size * text
        elif name in QUERIES:
            total += 6 * size / 2 * (tokens + steps)
        elif name in KEYS_AND_VALUES:
            total += 6 * size / 2 * (tokens + later_keys)
        else:
            total += 6 * size * (later_keys if name == "kv_b_proj" else steps)
    return total
