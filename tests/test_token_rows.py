"""Rows that come as tokens, and tokens whatever they come from: reasoning, unknown ids, where rows are cut."""

import pytest
from small_chats import ASKS, BODY, HELLO, HI, IM, Kind, row_of, spans, tokenizer_of

from flaxdraft.data.conversations import parse
from flaxdraft.data.templates import ChatOptions, render
from flaxdraft.errors import InputError

THOUGHT = "<think>\nhm  hm\n</think>\n\nyes"


@pytest.mark.parametrize(
    ("prompt", "answer", "want"),
    [
        ("q<|im_start|>assistant\n", THOUGHT + "<|im_end|>", ["\n\nyes<|im_end|>"]),
        ("q<|im_start|>assistant\n<think>\n", "hm\n</think>\n\nyes<|im_end|>", ["\n\nyes<|im_end|>"]),  # R1's kind
        ("q<|im_start|>assistant\n", "hm\n</think>\n\nyes", ["\n\nyes"]),  # without the tag that the prompt wrote
        ("q<|im_start|>assistant\n", "<think>\nit was cut while it", []),
        ("q<|im_start|>assistant\n<think>\n", "it was cut, too", []),
        ("what does <think> do?<|im_start|>assistant\n", "It opens.", ["It opens."]),
        ("q<|im_start|>assistant\n", "Write <think> first.", ["Write <think> first."]),
    ],
)
def test_reasoning_of_rows_that_are_tokens(prompt, answer, want):
    tokenizer = tokenizer_of(BODY + ASKS, IM, Kind())
    ids = [tokenizer(text)["input_ids"] for text in (prompt, answer)]
    row = {"input_ids": [*ids[0], *ids[1]], "loss_mask": [0] * len(ids[0]) + [1] * len(ids[1])}
    assert spans(tokenizer, parse(row, "t", "t"), mask_reasoning=True) == want


def test_ids_with_holes():
    """The tokenizer gives ids beyond the number of its tokens, and not those between."""
    tokenizer = tokenizer_of(BODY + ASKS, IM, Kind(holes=True))
    last = max(tokenizer.get_vocab().values())
    assert last > len(tokenizer)
    row = lambda *ids: parse({"input_ids": [*ids], "loss_mask": [1] * len(ids)}, "t.jsonl row 1", "t")  # noqa: E731
    assert render(tokenizer, row(0, last), ChatOptions(9)).tokens.tolist() == [0, last]
    for unknown in (1, last + 2):
        with pytest.raises(InputError, match=rf"t.jsonl row 1: token {unknown} is outside the tokenizer's"):
            render(tokenizer, row(0, unknown), ChatOptions(9))
    with pytest.raises(InputError, match=rf"token {last} has no row in the target's embedding of {last}"):
        render(tokenizer, row(0, last), ChatOptions(9, vocab_size=last))


def test_rows_are_cut_at_the_context():
    tokenizer = tokenizer_of(BODY + ASKS, IM, Kind())
    whole = render(tokenizer, row_of([HI, HELLO]), ChatOptions(1000))
    cut = render(tokenizer, row_of([HI, HELLO]), ChatOptions(1000, context=20))
    assert (len(cut.tokens), cut.num_cut) == (20, len(whole.tokens) - 20)
    assert render(tokenizer, row_of([HI, HELLO]), ChatOptions(20)).num_cut == cut.num_cut
