"""What a step multiplies: products with weights, counted from shapes, since XLA counts what is in a loop once.

Each is two operations for every entry of a matrix and every row that it multiplies, once forwards and once for each of
its two gradients, if there are two.
"""

from __future__ import annotations

import math

from flax import nnx

from flaxdraft.interfaces import Example


def of_step(params: nnx.State, example: Example) -> float:
    """Of an example, whose arrays may be described; every chosen element is supervised.

    `fc` and the first layer's projections read every row of the text, and one masked place a batch row, which all
    masked places share. What follows reads every element, depth 0 in the last layer only where it is asked for. Nobody
    needs the gradient of `fc` by the taps, but for norms before it; the teacher is multiplied once, forwards.
    """
    (num_batch, length), sizes = example.batch.tokens_BT.shape, [at_BR.size for at_BR in example.chosen.anchors]
    text, asked, layers = num_batch * length, sum(sizes), [name for name in params if str(name).startswith("layer_")]
    every, last = text + sum(sizes[1:]), f"layer_{len(layers)}" if layers else None
    normed = any(str(name).startswith(("fc_norm", "input_norm")) for name in params)
    total = 2.0 * math.prod(example.teacher.shape) * asked
    for path, variable in nnx.to_flat_state(params):
        if len(variable.shape) != 2 or path[0] == "embed_tokens":
            continue
        size, name = float(math.prod(variable.shape)), path[-2]
        is_last = path[0] == last or (last is None and not str(path[0]).startswith("layer_"))
        if name == "fc":
            total += size * ((6 if normed else 4) * text + 6 * num_batch)
        elif path[0] == "self_attn" and name != "o_proj":
            total += 6 * size * (text + num_batch)
        elif name == "lm_head":
            total += 6 * size * asked
        elif name in ("q_proj", "k_proj", "v_proj"):
            total += 6 * size * every
        else:
            total += 6 * size * (asked if is_last else every)
    return total
