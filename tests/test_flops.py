"""What algorithms say that a step multiplies, against the products in the traced program of its loss and gradients."""

import math

import contracts
import jax
import pytest
from contracts import Pair
from flax import nnx
from test_contracts import PAIRS, target_config

from flaxdraft.algorithms.eagle3.draft import SWITCHES
from flaxdraft.train.state import split_draft

# Rows of the loss: in one chunk of so many its loop, which counts once, has all of them. Drafts that fill blocks have
# fewer rows than their default chunk, and take one no larger than that.
ROWS = {
    "eagle3": lambda example: example.chosen.rows_BR.size,
    "peagle": lambda example: sum(at_BR.size for at_BR in example.chosen.anchors),
}
# What that one chunk has beyond those rows: the teachers of its last steps.
MORE = dict.fromkeys(("dflash", "dflash2", "domino", "dspark", "peagle"), lambda teacher: 0)
MORE["eagle3"] = lambda teacher: 2 * 6 * teacher.size


def products(jaxpr) -> float:
    """Operations of the products that somebody reads; those of attention, batch by batch, are none with weights."""
    total, read = 0.0, {x for x in jaxpr.outvars if not hasattr(x, "val")}
    for equation in reversed(jaxpr.eqns):
        if not read & {*equation.outvars}:
            continue
        read |= {x for x in equation.invars if not hasattr(x, "val")}
        if equation.primitive.name == "dot_general":
            (contracted, _), (batched, _) = equation.params["dimension_numbers"]
            width = math.prod(equation.invars[0].aval.shape[i] for i in contracted)
            total += 0 if batched else 2.0 * width * equation.outvars[0].aval.size
        for value in jax.tree.leaves([*equation.params.values()], is_leaf=lambda x: hasattr(x, "jaxpr")):
            inner, times = getattr(value, "jaxpr", value), equation.params.get("length", 1)  # of a scan
            total += times * products(inner) if hasattr(inner, "eqns") else 0
    return total


@pytest.mark.parametrize(
    ("name", "fields", "settings"),
    [
        *((name, {}, {}) for name in PAIRS),
        *((f"{name}-llama", {fc: True}, {}) for name in ("eagle3", "peagle") for fc in SWITCHES if "fc" in fc),
        ("dflash-qwen3", {"draft_vocab_size": 24}, {}),
        ("dflash2-qwen3", {}, {"selector_stop_gradient": True}),
    ],
)
def test_a_step_multiplies_what_is_said(name, fields, settings):
    algorithm, module = PAIRS[name]
    kind, config = algorithm.settings.name, PAIRS[name].config(target_config(), **fields)
    example = contracts.example_of(algorithm, config)
    chosen = settings | {"attention": "dense"} | ({"loss_chunk": ROWS[kind](example)} if kind in ROWS else {})
    algorithm = type(algorithm)(algorithm.settings.model_copy(update=chosen), True)
    graphdef, params, frozen = split_draft(Pair(algorithm, module).make(config, target_config()))

    def loss(params, frozen, example):
        sums = algorithm.sums(nnx.merge(graphdef, params, frozen), example, algorithm.first_carry())
        numerator, count = sums.terms()
        return numerator / count

    traced = jax.make_jaxpr(jax.grad(loss))(params, frozen, example).jaxpr
    assert algorithm.flops(params, frozen, example) + MORE[kind](example.teacher) == products(traced)
