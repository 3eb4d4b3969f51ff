"""DFlash decodes as the PyTorch reference does, round by round: proposals, what the target accepts, outputs.

See golden/decode_dflash_a.json. Needs no PyTorch.
"""

import json
from pathlib import Path

import dflash
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from flaxdraft.algorithms.dflash.drafter import BlockDrafter
from flaxdraft.algorithms.dflash.drafts import qwen3
from flaxdraft.algorithms.dflash.layout import layout_of
from flaxdraft.decode.decoding import Decoding, ReadyDraft, Settings
from flaxdraft.devices.sharding import Sharding
from flaxdraft.files.name_tables import state_from_torch
from flaxdraft.nn.precision import Precision
from flaxdraft.targets import decoder, llama

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def meta():
    return json.loads((GOLDEN / "decode_dflash_a.json").read_text())


@pytest.fixture(scope="module")
def models(meta):
    tensors, t, d = load_file(GOLDEN / "decode_dflash_a.safetensors"), meta["target_config"], meta["draft_config"]
    shared = {
        "vocab_size": t["vocab"], "hidden_size": t["hidden"], "intermediate_size": t["inter"], "rms_norm_eps": 1e-6,
        "num_attention_heads": t["heads"], "num_key_value_heads": t["kv"], "head_dim": t["head_dim"],
        "rope_theta": t["rope_theta"], "max_position_embeddings": 256,
    }  # fmt: skip
    hf = shared | {"architectures": ["Qwen3ForCausalLM"], "num_hidden_layers": t["layers"]}
    config = llama.Config.from_hf(hf, d["dflash_config"]["target_layer_ids"])
    groups = llama.groups(config, Precision(), Sharding.none())
    _, state = decoder.abstract_state(config, groups, Precision())
    of = lambda prefix: {k.removeprefix(prefix): x for k, x in tensors.items() if k.startswith(prefix)}  # noqa: E731
    state = state_from_torch(state, llama.name_table(config), of("target."), "target", t["layers"])
    target = decoder.build(config, groups, state, Precision())
    own = {"num_hidden_layers": d["layers"], "block_size": d["block_size"], "dflash_config": d["dflash_config"]}
    return target, dflash.make_draft(qwen3.Config.from_hf(shared | own), target, of("draft."))


class Noting(BlockDrafter):
    """Keeps what it proposes."""

    def propose(self, draft, state, newest_B, token_B, num_tokens, choose):
        state, proposal = super().propose(draft, state, newest_B, token_B, num_tokens, choose)
        jax.debug.callback(lambda *told: NOTED.append(told), newest_B, token_B, proposal.ids_BQ, ordered=True)
        return state, proposal


NOTED = []  # of each target pass: positions and tokens of the newest tokens, and what was proposed


@pytest.fixture(scope="module")
def decoded(meta, models):
    """All prompts in one batch, each some tokens further than the reference went."""
    target, draft = models
    ready = ReadyDraft(*nnx.split(draft), Noting(layout_of(draft.config.block_size, sample_from_anchor=False)))
    prompts = [one["prompt"] for one in meta["results"]["prompts"]]
    answers = Decoding(target, ready, prompts, Settings(32, draft.config.block_size - 1, (-1,))).finish()
    jax.effects_barrier()
    return answers


@pytest.mark.parametrize("number", range(3))
def test_every_round_is_the_references(number, meta, decoded):
    want, answer = meta["results"]["prompts"][number], decoded[number]
    assert (want["prompt"] + answer.tokens)[: len(want["output"])] == want["output"]
    for i, one in enumerate(want["rounds"]):
        newest_B, token_B, ids_BQ = NOTED[i]
        assert (int(newest_B[number]), int(token_B[number])) == (one["start"], one["block_in"][0])
        assert ids_BQ[number].tolist() == one["proposal"]
        assert answer.yields[i] == one["accepted_drafts"] + 1
        assert answer.tokens[sum(answer.yields[: i + 1])] == one["bonus"]


def test_the_cache_holds_the_text_alone(models):
    """A proposal leaves no trace."""
    _, draft = models
    drafter = BlockDrafter(layout_of(draft.config.block_size, sample_from_anchor=False))
    choose = lambda logits, j: (jnp.argmax(logits, axis=-1).astype(jnp.int32), None)  # noqa: E731

    @jax.jit
    def proposed(taps):
        one = jnp.ones(1, jnp.int32)
        state = drafter.read(draft, drafter.start(draft, 1, 16), taps, None, jnp.arange(6)[None], one)
        return state, drafter.propose(draft, state, 6 * one, 3 * one, 4, choose)[0]

    taps = np.random.default_rng(0).normal(size=(1, 6, 3, draft.config.hidden_size)).astype(np.float32)
    before, after = proposed(taps)
    jax.tree.map(np.testing.assert_array_equal, after, before)
    assert all(np.asarray(x)[:, :6].all() and not np.asarray(x)[:, 6:].any() for x in jax.tree.leaves(after))
