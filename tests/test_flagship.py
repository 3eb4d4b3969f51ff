"""experiments/flagship: which prompts are kept, and that its tables and figures can be drawn."""

import sys
from pathlib import Path

import pytest

from flaxdraft import targets

HERE = Path(__file__).parents[1] / "experiments" / "flagship"


@pytest.fixture(scope="module")
def flagship():
    """Its modules, which are no package."""
    names = ("prompts", "report")
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
