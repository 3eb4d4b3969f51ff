"""DFlash against one forward and backward pass of the PyTorch reference (fp32, CPU, eager attention).

The reference's uniform numbers are injected; see golden/dflash_a.json for the configuration. Needs no PyTorch.
"""

import json
from pathlib import Path

import dflash
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closeness import assert_close
from flax import nnx
from safetensors.numpy import load_file

from flaxdraft.algorithms.dflash import anchors
from flaxdraft.algorithms.dflash.drafts import qwen3
from flaxdraft.algorithms.dflash.layout import wanted
from flaxdraft.algorithms.dflash.objective import summed, weights
from flaxdraft.files.name_tables import state_to_torch
from flaxdraft.interfaces import Batch, Example, Features
from flaxdraft.nn.layers import Frozen
from flaxdraft.ops.cross_entropy import How, cross_entropy

pytestmark = pytest.mark.numeric

GOLDEN = Path(__file__).parent / "golden"
# The golden's name of each form of the loss -> (settings, the name of its gradients)
FORMS = {
    "main": ({"decay_gamma": 3.0}, "g"),
    "nodecay": ({"decay_gamma": None}, "g_nodecay"),
    "dpace": ({"objective": "dpace", "denominator": "rows"}, "g_dpace"),
    "dpace_confidence": ({"objective": "dpace_confidence", "denominator": "rows"}, "g_dpace_confidence"),
    "dpace_continuation": ({"objective": "dpace_continuation", "denominator": "rows"}, "g_dpace_continuation"),
}


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "dflash_a.safetensors")


@pytest.fixture(scope="module")
def meta():
    return json.loads((GOLDEN / "dflash_a.json").read_text())


@pytest.fixture(scope="module")
def example(golden, meta):
    tokens = golden["in.input_ids"]
    num_batch, length = tokens.shape
    batch = Batch(
        tokens, golden["in.loss_mask"] > 0.5, np.ones_like(tokens), np.tile(np.arange(length), (num_batch, 1))
    )
    found = anchors.lowest(golden["sample.rand"], anchors.possible(batch), meta["options"]["num_anchors"])
    taps = golden["in.hidden_states"].reshape(num_batch, length, 3, -1)
    return jax.tree.map(jnp.asarray, Example(batch, Features(taps), found, ()))


@pytest.fixture(scope="module")
def draft(golden, meta):
    o = meta["options"]
    config = qwen3.Config.from_hf({
        "hidden_size": o["hidden"], "intermediate_size": o["inter"], "vocab_size": o["vocab"], "rms_norm_eps": 1e-6,
        "num_attention_heads": o["heads"], "num_key_value_heads": o["kv"], "head_dim": o["head_dim"],
        "num_hidden_layers": o["layers"], "block_size": o["block"], "rope_theta": o["rope_theta"],
        "dflash_config": o["dflash_config"],
    })  # fmt: skip
    of_target = (golden[f"target.{name}.weight"] for name in ("embed_tokens", "lm_head"))
    weights = {key.removeprefix("w."): value for key, value in golden.items() if key.startswith("w.")}
    return dflash.make_draft(config, dflash.target_of(*of_target), weights)


def test_anchors_are_the_references(example, golden):
    anchor_BA, keep_BA, length = example.chosen.anchor_BA, golden["sample.keep"] > 0, example.batch.tokens_BT.shape[1]
    np.testing.assert_array_equal(anchor_BA < length, keep_BA)
    np.testing.assert_array_equal(np.where(keep_BA, anchor_BA, 0), golden["sample.anchors"])


def test_labels_and_weights_are_the_references(example, golden, meta):
    algorithm, keep_BA1 = dflash.algorithm(block_size=meta["options"]["block"]), golden["sample.keep"][:, :, None] > 0
    found = wanted(example.batch, example.chosen.anchor_BA, algorithm.layout, stop_at_hole=False)
    asked = golden["mid.weight_mask"] > 0
    np.testing.assert_array_equal(found.asked_BAS, asked)
    np.testing.assert_array_equal(np.where(asked, found.label_BAS, 0), np.where(asked, golden["mid.target_ids"], 0))
    for form in ("dpace", "dpace_confidence", "dpace_continuation"):
        settings = dflash.algorithm(objective=form, block_size=4).settings
        got = weights(settings, algorithm.layout, found.asked_BAS, jnp.asarray(golden["out.ce"]))
        assert_close(
            np.where(keep_BA1, got, 0), np.where(keep_BA1 & asked, golden[f"mid.{form}_weights"], 0), rtol=1e-5
        )


@pytest.fixture(scope="module", params=["dense", "chunked"])
def passed(request, draft, example):
    """The head's input; and by form: loss, sums, gradients by PyTorch name."""
    graphdef, params, frozen = nnx.split(draft, nnx.Param, Frozen)
    algorithms = {form: dflash.algorithm(block_size=4, attention=request.param, attention_chunk=8, **settings)
                  for form, (settings, _) in FORMS.items()}  # fmt: skip
    layout = algorithms["main"].layout

    def losses(params):
        draft = nnx.merge(graphdef, params, frozen)
        text, anchor_BA = algorithms["main"].read(draft, example), example.chosen.anchor_BA
        states_BRD = algorithms["main"].states(draft, example.batch, text, anchor_BA)
        label_BAS, asked_BAS = wanted(example.batch, anchor_BA, layout, stop_at_hole=False)
        flat = lambda x: x.reshape(states_BRD.shape[:2])  # noqa: E731
        scored = cross_entropy(How(5), states_BRD, draft.head_VD(), flat(label_BAS), flat(asked_BAS))
        loss_BAS, hit_BAS = (x.reshape(label_BAS.shape) for x in scored)
        counted = slice(layout.first, layout.first + layout.num_predicted)
        scored = counted, asked_BAS, loss_BAS, hit_BAS
        sums = {form: summed(one.settings, layout, *scored) for form, one in algorithms.items()}
        values = jnp.stack([jnp.divide(*one.terms()) for one in sums.values()])
        return values, (states_BRD, values, sums)

    gradients, (states_BRD, values, sums) = jax.jit(jax.jacrev(losses, has_aux=True))(params)
    by_form = {}
    for i, form in enumerate(FORMS):
        own = jax.tree.map(lambda x: x[i], gradients)  # noqa: B023
        by_form[form] = values[i], sums[form], state_to_torch(own, qwen3.name_table(draft.config), np.float32)
    return states_BRD, by_form


@pytest.mark.parametrize("form", FORMS)
def test_losses_and_hits(form, passed, meta):
    value, sums, _ = passed[1][form]
    want = meta["results"][form]
    assert_close(float(value), want["loss"], rtol=1e-5)
    terms = [want["loss_numerator"], want["loss_denominator"]]
    assert_close([float(x) for x in sums.terms()], terms, rtol=1e-5, of="each")
    assert int(sums.hit_Q.sum()) == want["accuracy_numerator"]
    assert int(sums.asked_Q.sum()) == want["accuracy_denominator"]
    assert_close(sums.figures()["mean_over_rows"], meta["results"]["helper_accept_len"], rtol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_every_gradient(form, passed, golden):
    name = FORMS[form][1] + "."
    wanted = {key.removeprefix(name): value for key, value in golden.items() if key.startswith(name)}
    got = passed[1][form][2]
    assert len(wanted) == (len(got) if form == "main" else 2)
    assert_close({key: got[key] for key in wanted}, wanted, rtol=1e-4, of="norm")


def test_the_sums_of_a_trainer(draft, example, meta):
    """All in one call, in chunks, with rematerialisation, as training makes them."""
    how = {"attention": "chunked", "attention_chunk": 8, "loss_chunk": 5, "remat": "full"}
    algorithm = dflash.algorithm(block_size=4, num_anchors=meta["options"]["num_anchors"], **FORMS["dpace"][0], **how)
    graphdef, state = nnx.split(draft)
    terms = jax.jit(lambda state: algorithm.sums(nnx.merge(graphdef, state), example, ()).terms())(state)
    want = meta["results"]["dpace"]
    assert_close([float(x) for x in terms], [want["loss_numerator"], want["loss_denominator"]], rtol=1e-5, of="each")


def test_hidden_states(passed, golden):
    keep = np.repeat(golden["sample.keep"] > 0, 4, axis=1)
    assert_close(np.asarray(passed[0])[keep], golden["out.hidden"][keep], rtol=1e-5)
