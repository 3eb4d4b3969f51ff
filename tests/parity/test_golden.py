"""Both drafts against one forward and backward pass of the PyTorch reference (fp32, CPU, dense attention).

The reference's masks, its mean over B*T and its already shifted tokens are injected; see golden/*.json for the
configurations. Needs no PyTorch.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closeness import assert_close
from eagle3 import target_of
from flax import nnx
from safetensors.numpy import load_file

from flaxdraft.algorithms.eagle3 import objective
from flaxdraft.devices.sharding import Sharding
from flaxdraft.files.name_tables import state_from_torch, state_to_torch
from flaxdraft.interfaces import Batch, VocabMap
from flaxdraft.nn.layers import Frozen
from flaxdraft.nn.precision import Precision
from flaxdraft.ops import distillation, distillation_reference
from flaxdraft.plugins import find_by_architecture

pytestmark = pytest.mark.numeric

GOLDEN = Path(__file__).parent / "golden"
CASES = ("eagle3_llama_gqa", "eagle3_mla_qlora", "eagle3_mla_yarn")


def run_case(name: str, attention: str, chunked_loss: bool):
    """(golden tensors, sums, hidden states, total loss, gradients by PyTorch name)."""
    meta = json.loads((GOLDEN / f"{name}.json").read_text())
    golden = load_file(GOLDEN / f"{name}.safetensors")
    hf = meta["config"] | {"architectures": [meta["architecture"]]}
    module = find_by_architecture(["flaxdraft.algorithms.eagle3.drafts"], hf, name)
    config = module.Config.from_hf(hf)
    weights = {key.removeprefix("weights/"): value for key, value in golden.items() if key.startswith("weights/")}
    vocab = VocabMap.from_offsets(weights.pop("d2t"), config.vocab_size)
    np.testing.assert_array_equal(vocab.t2d(), weights.pop("t2d"))
    embedding = jnp.asarray(weights.pop("embed_tokens.weight"))
    draft = module.make(
        config, vocab, target_of(embedding), precision=Precision(), sharding=Sharding.none(), rngs=nnx.Rngs(0)
    )  # fmt: skip
    graphdef, params, frozen = nnx.split(draft, nnx.Param, Frozen)
    plain_query = "q_lora_rank" in hf and hf["q_lora_rank"] is None
    table = module.NAME_TABLE_PLAIN_QUERY if plain_query else module.NAME_TABLE
    params = state_from_torch(params, table, weights, name)

    ids, num_steps = golden["inputs/input_ids"], meta["ttt_length"]
    num_batch, num_rows = ids.shape
    # The reference's row p holds x_{p+1}; one more token in front gives the unshifted row.
    tokens = np.pad(ids, ((0, 0), (1, 0))).astype(np.int32)
    segments = np.pad(golden["inputs/attention_mask"], ((0, 0), (0, 1))).astype(np.int32)
    positions = np.tile(np.arange(num_rows + 1), (num_batch, 1))
    batch = Batch(jnp.asarray(tokens), jnp.zeros(tokens.shape, bool), jnp.asarray(segments), jnp.asarray(positions))
    taps = golden["inputs/aux_hidden_states"].reshape(num_batch, num_rows, 3, -1)
    taps = jnp.asarray(np.pad(taps, ((0, 0), (0, 1), (0, 0), (0, 0))))
    logits = jnp.asarray(golden["inputs/target_logits"])
    logsumexp, wanted = jax.nn.logsumexp(logits, -1), jnp.asarray(vocab.to_draft())[jnp.argmax(logits, -1)]
    # The reference hands over logits: as "states" of width V, with a head that passes them on.
    states = distillation.TeacherStates(logits, logsumexp, wanted)
    head = jnp.eye(config.vocab_size)[vocab.target_ids_W]
    plan = distillation.DistillOptions(tuple(0.8**j for j in range(num_steps)), chunk=5)
    mask = golden["inputs/loss_mask"].reshape(num_batch, num_rows) > 0
    supervised = jnp.stack([jnp.pad(mask[:, j:], ((0, 0), (0, j))) for j in range(num_steps)])
    rows = objective.ChosenRows(jnp.tile(jnp.arange(num_rows, dtype=jnp.int32), (num_batch, 1)))
    options = objective.UnrollOptions(attention)

    def total_loss(params):
        draft = nnx.merge(graphdef, params, frozen)
        hidden = objective.unroll(draft, batch, taps, rows, num_steps, options)
        if chunked_loss:
            inputs = tuple(draft.head_input(h) for h in hidden)
            sums, _ = distillation.distill(plan, inputs, draft.head(), states, head, supervised, jnp.zeros(num_steps))
        else:
            teacher = distillation_reference.Teacher(logits[..., vocab.target_ids_W], logsumexp, wanted)
            step_signals = distillation_reference.step_signals
            steps = [step_signals(draft.logits(h), teacher, j) for j, h in enumerate(hidden)]
            sums = distillation_reference.sum_signals(steps, supervised, teacher, plan.step_weights)
        return jnp.sum(0.8 ** jnp.arange(num_steps) * sums.loss_J) / (num_batch * num_rows), (sums, jnp.stack(hidden))

    (loss, (sums, hidden)), grads = jax.jit(jax.value_and_grad(total_loss, has_aux=True))(params)
    return golden, sums, np.asarray(hidden), float(loss), state_to_torch(grads, table, np.float32)


def paths():
    """Each case on the path that runs take. The plain one, which that is compared with in other tests too, once."""
    for attention in ("chunked", "dense"):
        for name in CASES:
            marks = () if attention == "chunked" or name == CASES[0] else pytest.mark.slow
            yield pytest.param((name, attention), id=f"{name}-{attention}", marks=marks)


@pytest.fixture(scope="module", params=[*paths()])
def case(request):
    name, attention = request.param
    return run_case(name, attention, chunked_loss=attention == "chunked")


def test_step_losses_and_hits(case):
    golden, sums, hidden, loss, _ = case
    per_row = np.prod(hidden.shape[1:3])
    assert_close(sums.loss_J / per_row, golden["outputs/step_loss"], rtol=1e-5, of="each")
    assert_close(loss, float(golden["outputs/total_loss"]), rtol=1e-5)
    np.testing.assert_array_equal(sums.hit_J, golden["outputs/correct"])
    np.testing.assert_array_equal(sums.row_count_J, golden["outputs/denominator"])


def test_hidden_states(case):
    golden, _, hidden, _, _ = case
    real = golden["inputs/attention_mask"].astype(bool)
    want = golden["outputs/hidden_states"][:, real]
    assert_close(hidden[:, real], want, rtol=1e-5, of="norm")
    assert_close(hidden[:, real], want, rtol=1e-5)


def test_every_gradient(case):
    golden, _, _, _, grads = case
    wanted = {key.removeprefix("grads/"): value for key, value in golden.items() if key.startswith("grads/")}
    assert_close(grads, wanted, rtol=1e-4, of="norm")
