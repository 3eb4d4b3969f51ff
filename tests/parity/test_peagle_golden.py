"""P-EAGLE against one forward and backward pass of the PyTorch reference (fp32, CPU, dense attention).

The reference's own mask and its teacher stand in for ours: row p is trained where its mask says so, and reads the
teacher of row p. See golden/peagle_a.json for the configuration. Needs no PyTorch.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import peagle
import pytest
from closeness import assert_close
from flax import nnx
from safetensors.numpy import load_file

from flaxdraft.algorithms.eagle3.objective import UnrollOptions
from flaxdraft.algorithms.peagle.depths import chains, joined
from flaxdraft.algorithms.peagle.drafts import llama
from flaxdraft.algorithms.peagle.objective import scored, states
from flaxdraft.files.name_tables import state_to_torch
from flaxdraft.interfaces import Batch, Features, VocabMap
from flaxdraft.nn.layers import Frozen
from flaxdraft.ops.distillation import DistillOptions

pytestmark = pytest.mark.numeric

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "peagle_a.safetensors")


@pytest.fixture(scope="module")
def meta():
    return json.loads((GOLDEN / "peagle_a.json").read_text())


def segments_of(golden) -> np.ndarray:
    lengths, total = golden["in.lengths"], golden["in.input_ids"].shape[1]
    return np.pad(np.repeat(np.arange(1, len(lengths) + 1), lengths), (0, total - lengths.sum()))


@pytest.fixture(scope="module")
def elements(golden, meta):
    """The anchors of each depth, where those places draw the lowest numbers that the reference kept."""
    o = meta["options"]
    place, depth = golden["sample.anchor_pos"] + golden["sample.depth"], golden["sample.depth"]
    uniform = np.ones((o["depths"] - 1, o["T"]))
    uniform[depth[depth > 0] - 1, place[depth > 0]] = np.random.default_rng(0).random((depth > 0).sum())
    settings = peagle.algorithm(
        num_depths=o["depths"], down_sample_ratio=o["ratio"], down_sample_ratio_min=o["ratio_min"]
    ).settings
    return [np.arange(o["T"]), *chains(golden["in.loss_mask"][0] > 0, segments_of(golden), uniform, settings)]


def test_the_elements_are_the_references(elements, golden):
    for depth, anchors in enumerate(elements):
        np.testing.assert_array_equal(anchors, golden["sample.anchor_pos"][golden["sample.depth"] == depth])


@pytest.fixture(scope="module", params=["dense", pytest.param("chunked", marks=pytest.mark.slow)])
def passed(request, golden, meta, elements):
    """Hidden states, sums, loss and gradients by PyTorch name. A row before the first one holds nothing
    but what makes the reference's rows, which are shifted, rows of a text."""
    o, length = meta["options"], meta["options"]["T"]
    config = llama.Config.from_hf({
        "hidden_size": o["hidden"], "intermediate_size": o["inter"], "vocab_size": o["vocab"], "rms_norm_eps": 1e-6,
        "draft_vocab_size": o["draft_vocab"], "num_attention_heads": o["heads"], "num_key_value_heads": o["kv"],
        "head_dim": o["head_dim"], "num_hidden_layers": o["layers"], "rope_theta": o["rope_theta"],
        "mask_token_id": o["mask_id"],
    })  # fmt: skip
    vocab = VocabMap.from_offsets(golden["w.d2t"], o["vocab"])
    np.testing.assert_array_equal(vocab.t2d(), golden["w.t2d"] > 0)
    weights = {key.removeprefix("w."): value for key, value in golden.items() if key.startswith("w.")}
    weights = {key: value for key, value in weights.items() if key not in ("d2t", "t2d")}
    draft = peagle.make_draft(config, vocab, weights=weights)
    graphdef, params, frozen = nnx.split(draft, nnx.Param, Frozen)
    behind = lambda x: jnp.pad(x, [(0, 0), (1, 0), *[(0, 0)] * (x.ndim - 2)])  # noqa: E731
    before = lambda x: jnp.pad(x, [(0, 0), (0, 1), *[(0, 0)] * (x.ndim - 2)])  # noqa: E731
    segments, logits = before(segments_of(golden)[None]), golden["in.target_logits"]
    batch = Batch(behind(golden["in.input_ids"]), segments > 0, segments, jnp.arange(length + 1)[None])
    taps = before(golden["in.hidden_states"].reshape(1, length, 3, -1))
    told = logits, logits.argmax(-1).astype(np.int32), jax.nn.logsumexp(logits, axis=-1)
    features = Features(taps, *(behind(jnp.asarray(x)) for x in told))
    chosen = jax.tree.map(jnp.asarray, joined([elements], [len(own) for own in elements], length + 1))
    head = jnp.eye(o["vocab"])[vocab.target_ids_W]

    def loss(params):
        draft, how = nnx.merge(graphdef, params, frozen), UnrollOptions(request.param, "none", 8)
        hidden = states(draft, batch, taps, chosen, how)
        mask = before(golden["in.loss_mask"] > 0)
        options = DistillOptions((1.0,), chunk=7)
        sums, _ = scored(options, draft, hidden, chosen, mask, features, head)
        numerator, count = sums.terms()
        return numerator / count, (hidden, sums)

    (value, (hidden, sums)), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return hidden, sums, value, state_to_torch(gradients, llama.name_table(config), np.float32)


def test_hidden_states_losses_and_gradients(passed, golden, meta):
    hidden, sums, value, gradients = passed
    real = segments_of(golden)[golden["sample.anchor_pos"]] > 0
    assert_close(np.asarray(hidden)[0, real], golden["out.hidden_before_norm"][0, real], rtol=1e-5)
    results = meta["results"]
    assert_close(float(value), results["loss"], rtol=1e-5)
    assert sums.hit_D.tolist() == [results[f"position_{depth}_acc_sum"] for depth in range(4)]
    assert int(sums.count) == results["full_acc_total"]
    wanted = {key.removeprefix("g."): x for key, x in golden.items() if key.startswith("g.")}
    assert set(wanted) == set(gradients)
    assert_close(gradients, wanted, rtol=1e-4, of="norm")
