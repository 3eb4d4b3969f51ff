"""The quickstart's own target: read right, and the whole command on a small share of its prompts."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from closeness import assert_close
from eagle3 import algorithm

from flaxdraft import targets
from flaxdraft.config import load_config
from flaxdraft.data.answers import answer_greedily
from flaxdraft.data.prompts import Prompt, render_messages
from flaxdraft.decode.generation import generate
from flaxdraft.interfaces import Batch
from flaxdraft.train.__main__ import main

pytestmark = pytest.mark.slow

QUICKSTART = Path(__file__).parents[1] / "experiments" / "quickstart.yaml"
TEXT = (
    "The sea was calm that morning, and the fishermen had already gone out when the bells of the small church began "
    "to ring. Nobody in the village could remember why they rang on Thursdays."
)


@pytest.fixture(scope="module")
def loaded():
    config = load_config(str(QUICKSTART), []).target
    num_layers = targets.open_target(config.path, config.sha256).config().num_hidden_layers
    taps = algorithm(7).tap_layers(num_layers, None)
    return targets.from_pretrained(config.path, sha256=config.sha256, tap_layers=taps)


def test_text_costs_what_it_should(loaded):
    """Mean negative log-likelihood; a wrong row order of q and k, or another rope base, costs a nat or more."""
    tokens = jnp.asarray([loaded.tokenizer.encode(TEXT)], jnp.int32)
    assert tokens.shape == (1, 39)
    ones, positions = jnp.ones_like(tokens), jnp.arange(39)[None]
    features = loaded.model.features(Batch(tokens, ones.astype(bool), ones, positions))
    chosen_TE = loaded.model.head()[tokens[0, 1:]]
    logits = jnp.einsum("te,te->t", features.last_BTE[0, :-1], chosen_TE)
    assert_close(jnp.mean(features.logsumexp_BT[0, :-1] - logits), 3.56, rtol=0.005 / 3.56)
    assert loaded.model.config.tap_layers == (1, 14, 26)


def rendered(tokenizer, question: str) -> list[int]:
    return render_messages(tokenizer, Prompt("x", "question", "train", (question,)).first, "here")


def test_capital_of_france(loaded):
    prompt = rendered(loaded.tokenizer, "What is the capital of France?")
    row = answer_greedily(loaded.model, [prompt], 24, loaded.stop_tokens, 1, lambda num: None)[0]
    answer = loaded.tokenizer.decode(row.tokens[row.num_prompt :], skip_special_tokens=True)
    assert answer.strip().rstrip(".").endswith("Paris")
    assert row.tokens[-1] == loaded.tokenizer.eos_token_id


def test_greedy_text_is_the_text_decoded_without_a_cache(loaded):
    prompt = rendered(loaded.tokenizer, "Name three primary colours and say why they are called so.")
    end = loaded.tokenizer.eos_token_id
    cached = generate(loaded.model, [prompt], max_new_tokens=32, stop_tokens=[end])[0]
    tokens, length = np.zeros((1, len(prompt) + 32), np.int32), len(prompt)
    tokens[0, :length] = prompt
    positions = np.arange(tokens.shape[1], dtype=np.int32)[None]
    while length < tokens.shape[1] and tokens[0, length - 1] != end:
        inside = (positions < length).astype(np.int32)
        features = loaded.model.features(Batch(tokens, inside > 0, inside, positions))
        tokens[0, length] = features.argmax_BT[0, length - 1]
        length += 1
    assert len(cached) > 20
    answer = loaded.tokenizer.decode(tokens[0, len(prompt) : length], skip_special_tokens=True)
    assert loaded.tokenizer.decode(cached, skip_special_tokens=True) == answer


def test_the_command_on_a_few_prompts(tmp_path):
    """Twelve held-out prompts and 40 steps: lossless, the walk equals decoding, and training already helps."""
    rows = [json.loads(line) for line in (QUICKSTART.parent / "data" / "prompts.jsonl").read_text().splitlines()]
    held_out = [row for row in rows if row["split"] == "held_out"][::5]
    train = [row for row in rows if row["split"] == "train"][::11]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in [*train, *held_out]))
    raw = yaml.safe_load(QUICKSTART.read_text())
    raw |= {"output_dir": str(tmp_path / "out")}
    raw["data"] |= {"prompts": str(prompts), "num_prompts": None, "rows": 64, "max_answer_tokens": 48}
    raw["train"] |= {"num_steps": 40, "eval_every": 40}
    raw["evaluate"] |= {"max_new_tokens": 32}
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(raw))
    assert main(["--config", str(config)]) == 0
    result = json.loads((tmp_path / "out" / "llama" / "evaluation.json").read_text())["result"]
    assert result["decoded"]["identical_answers"] == result["answers"] == len(held_out)
    assert result["teacher_forced"]["answers_with_the_decoded_passes"] == len(held_out)
    lines = (tmp_path / "out" / "llama" / "metrics.jsonl").read_text().splitlines()
    walked = [m["accept_length"] for m in map(json.loads, lines) if m["kind"] == "held_out"]
    assert walked[0] < 1.1
    assert walked[-1] == result["decoded"]["accept_length"] > walked[0] + 0.1
    jax.clear_caches()
