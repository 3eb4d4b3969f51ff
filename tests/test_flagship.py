"""experiments/flagship: which prompts are kept, what a proposal costs, and that its tables and figures can be drawn."""

import sys
from pathlib import Path

import pytest
from contracts import Pair
from flax import nnx
from test_contracts import PAIRS, W, target_config

from flaxdraft import targets

HERE = Path(__file__).parents[1] / "experiments" / "flagship"


@pytest.fixture(scope="module")
def flagship():
    """Its modules, which are no package."""
    names = ("prompts", "report", "contestants", "drafting", "comparison")
    sys.path.insert(0, str(HERE))
    yield [__import__(name) for name in names]
    sys.path.remove(str(HERE))
    for name in names:
        del sys.modules[name]


def test_copies_and_what_resembles_a_held_out_prompt_are_left_out(flagship):
    kept = flagship[0].Kept(["Explain how a bicycle stays upright."])
    assert kept.add("Why do cats purr at night?")
    assert not kept.add("why do cats purr, at night")
    assert not kept.add("Explain how a bicycle stays upright!")
    assert not kept.add("Please explain how a bicycle stays upright.")
    assert kept.add("Explain how a sailing boat moves against the wind.")
    assert not kept.add("Why not")
    assert not kept.add("What does <|im_start|> mean here")


def test_a_turn_begins_as_the_template_has_it(flagship, tiny_gguf):
    tokenizer = targets.open_target(str(tiny_gguf)).source.tokenizer()
    seeds = [{"category": "a", "prompt": "tell the king and the queen of it"}]
    asked = flagship[0].requests(seeds, 40, 3)
    assert asked == flagship[0].requests(seeds, 40, 3)
    assert {opening for _, opening in asked} == {"", "tell", "tell the", "tell the king", "tell the king and"}
    assert {category for category, opening in asked if not opening} == {"free"}
    (begun,) = flagship[0].beginnings(tokenizer, ["tell the"])
    whole = tokenizer.apply_chat_template([{"role": "user", "content": "tell the king"}], tokenize=False)
    assert whole.startswith(tokenizer.decode(begun))
    assert tokenizer.decode(begun).endswith("user\ntell the")


def test_the_report(flagship, tmp_path):
    def chain(length):
        decoded = {
            "accept_length": 1 + length / 4, "target_passes": 80, "target_passes_alone": 120, "identical_answers": 9,
            "acceptance_by_position": [0.5] * length, "accept_length_by_category": {"code": 1.5, "story": 1.25},
        }  # fmt: skip
        return {"chain_length": length, "answers": 10, "decoded": decoded}

    train = [
        {"kind": "train", "step": 10 * i, "tokens": 50000 * i, "tokens_per_second": 1e5, "data_wait": 0.01}
        for i in range(1, 9)
    ]
    held = [{"kind": "held_out", "step": 20 * i, "accept_length": 1 + i / 5} for i in range(5)]
    evaluation = {"chains": [chain(2), chain(1)], "facts": {"devices": "one", "prompts": "10", "decoding": "greedy"}}
    drafts = [
        flagship[1].Draft(name, evaluation, train + held, {}, {"train": {"num_steps": 80}}) for name in ("llama", "mla")
    ]
    data = {
        "answers": 10, "answer_tokens": 100, "tokens": 200000, "median_answer": 10.0, "cut_at_limit": 1,
        "tokens_per_second": 20.0, "seconds": 5.0, "prompts_asked": 9, "prompt_tokens": 90, "prompt_seconds": 2.0,
        "coverage": {"256": 0.75, "512": 1.0}, "draft_vocab_size": 512,
    }  # fmt: skip
    flagship[1].write(tmp_path, drafts, data, "one machine")
    text = (tmp_path / "results.md").read_text()
    assert "| 2 | 1.50 | 80 of 120 | 9 of 10 | 1.50 | 80 of 120 | 9 of 10 |" in text
    assert "| llama | 80 | 0.4 M | 2.0 | 100,000 | 1.0% | 0.1 |" in text
    assert (tmp_path / "flagship.png").stat().st_size > 10000
    held[-1]["accuracy"] = [0.5, 0.25]
    flagship[1].write(tmp_path, [draft._replace(evaluation=None) for draft in drafts], data, None)
    assert "| llama | 1.80 | 0.50 | 0.25 |" in (tmp_path / "results.md").read_text()  # walked alone


def test_every_contestant_has_a_label_and_proposes_as_many_tokens(flagship):
    from flaxdraft.config import load_config
    from flaxdraft.run.setup import parts

    contestants = flagship[2]
    assert contestants.LABELS.keys() == contestants.CONTESTANTS.keys()
    for name, overrides in contestants.CONTESTANTS.items():
        setup = parts(load_config(str(HERE / "flagship.yaml"), [*overrides, f"name={name}"]))
        assert (setup.algorithm.drafter().most_tokens or 7) >= contestants.MOST_TOKENS


def test_what_a_proposal_costs(flagship):
    """Counted by hand: a chain runs its layer and head once a token; fc and the layer read what the target says."""
    algorithm, module = PAIRS["eagle3-llama"]
    config = module.Config(**module.Config.for_target(target_config(), W))
    draft = Pair(algorithm, module).make(config, target_config())
    weights = {
        "/".join(map(str, path)): x.size
        for path, x in nnx.to_flat_state(nnx.state(draft, nnx.Param)) if x.ndim == 2
    }  # fmt: skip
    taps, width = 3, target_config().hidden_size
    one, two = (flagship[3].of_pass(draft, algorithm.drafter(), taps, width, tokens) for tokens in (1, 2))
    head = next(size for name, size in weights.items() if "head" in name)
    layer = sum(weights.values()) - head - next(size for name, size in weights.items() if name.startswith("fc"))
    assert one.weights == sum(weights.values())
    assert two.weights == one.weights + layer + head
    assert one.flops > 2 * (2 * layer + head)  # two states are read


def test_the_comparison(flagship, tmp_path):
    def draft(name, seed, accept, weights):
        chains = [
            {"chain_length": n, "accept_length": accept + n / 10, "passes": 5, "passes_alone": 9, "identical": 10,
             "answers": 10, "flops": 2e6 * n, "weights": weights * n} for n in (1, 7)
        ]  # fmt: skip
        return {
            "name": name, "seed": seed, "steps": 100, "tokens": 4_000_000, "tokens_per_second": 1e5, "parameters": 2e6,
            "curve": [[1.0, 1.1], [4.0, accept]], "chains": chains, "target_weights": 1e8,
        }  # fmt: skip

    drafts = [draft("llama", 0, 1.5, 1e6), draft("llama", 1, 1.7, 1e6), draft("dflash", 0, 2.0, 2e6)]
    kept = {"note": "one machine", "drafts": drafts, "data": {"answers": 10, "tokens": 2_000_000}}
    flagship[4].write(tmp_path, kept)
    text = (tmp_path / "comparison.md").read_text()
    assert "| EAGLE-3 (Llama) | 1.70 ± 0.10 | 2.30 ± 0.10 |" in text
    assert "| EAGLE-3 (Llama) | 7 | 2.30 ± 0.10 | 2.0 M | 14 M | 7 M | 7% | 20 of 20 |" in text
    # The cheapest proposal reads 7 M weights; DFlash's reads 14 M, and takes twice as long.
    assert "| DFlash, 2 layers | 2.65 (7) | 2.45 (7) | 1.99 (1) | 1.84 (1) |" in text
    assert "| EAGLE-3 (Llama) | 1 | 100 | 4.0 M | 2.0 | 100,000 | 0.7 | 1.70 |" in text
    assert (tmp_path / "comparison.png").stat().st_size > 10000
