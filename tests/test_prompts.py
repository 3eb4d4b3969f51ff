"""Prompts files: a broken line is named by its number, and the shipped file is sound."""

import json
from collections import Counter
from pathlib import Path

import pytest
from tiny import write_prompts

from flaxdraft.data.prompts import Prompt, read_prompts, render
from flaxdraft.errors import InputError
from flaxdraft.files.gguf_file import GGUFCheckpoint

SHIPPED = Path(__file__).parents[1] / "experiments" / "data" / "prompts.jsonl"
GOOD = {"id": "a", "category": "c", "split": "train", "prompt": "p"}
HELD_OUT = {"id": "h", "category": "c", "split": "held_out", "prompt": "q"}


@pytest.fixture
def read(tmp_path):
    """read(lines) of objects or raw text, through a file p.jsonl."""

    def read(*lines):
        path = tmp_path / "p.jsonl"
        texts = (line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines)
        path.write_text("\n".join(texts) + "\n", encoding="utf-8")
        return read_prompts(str(path))

    return read


@pytest.fixture(scope="module")
def tokenizer(tiny_gguf):
    return GGUFCheckpoint(tiny_gguf).tokenizer()


def test_prompts_keep_their_order_and_blank_lines_do_not_count(read):
    assert read(HELD_OUT, "", "  ", GOOD) == [Prompt(**HELD_OUT), Prompt(**GOOD)]


@pytest.mark.parametrize(
    "text",
    ["é 日本 🙂", "a\nb", "a\u2028b", "a\x85b"],
    ids=ascii,
)
def test_any_text_is_read_back(read, text):
    assert read(GOOD | {"prompt": text}, HELD_OUT)[0].prompt == text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "a",', r"not valid JSON \("),
        ("prompt", r"not valid JSON \(Expecting value at column 1\)"),
        ('["a"]', "expected an object, found list"),
        ({**GOOD, "id": 3}, "'id': found 3, expected a non-empty string"),
        ({**GOOD, "prompt": "  "}, "'prompt': found '  ', expected a non-empty string"),
        ({k: v for k, v in GOOD.items() if k != "category"}, "'category': found None, expected a non-empty string"),
        ({**GOOD, "split": "test"}, "'split': found 'test', expected one of train, held_out"),
        ({**GOOD, "answer": "x"}, "unknown field 'answer'; expected id, category, split, prompt"),
        (GOOD | {"id": "first"}, "id 'first' stands in line 1 already"),
    ],
)
def test_a_broken_line_is_named_by_its_number(read, line, message):
    with pytest.raises(InputError, match=rf"p.jsonl line 4: {message}"):
        read(GOOD | {"id": "first"}, "", HELD_OUT, line)


@pytest.mark.parametrize(
    ("lines", "split"), [((GOOD,), "held_out"), ((HELD_OUT,), "train"), (("",), "train")], ids=["train", "held", "none"]
)
def test_both_splits_are_needed(read, lines, split):
    with pytest.raises(InputError, match=rf"p.jsonl: no prompt of split '{split}'; train and held_out are needed"):
        read(*lines)


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path):
    lines = "".join(json.dumps(line) + "\n" for line in (GOOD, HELD_OUT))
    (tmp_path / "marked.jsonl").write_text(lines, encoding="utf-8-sig")
    assert [prompt.id for prompt in read_prompts(str(tmp_path / "marked.jsonl"))] == [GOOD["id"], HELD_OUT["id"]]


def test_unreadable_files_are_named(tmp_path):
    (tmp_path / "latin.jsonl").write_bytes(b'{"id": "\xe9"}\n')
    with pytest.raises(InputError, match=r"latin.jsonl line 1: not UTF-8 text \(byte 8 of the line\)"):
        read_prompts(str(tmp_path / "latin.jsonl"))
    for name, why in (("none.jsonl", "No such file"), (".", "Is a directory")):
        with pytest.raises(InputError, match=rf"data.prompts: cannot read .* \({why}"):
            read_prompts(str(tmp_path / name))


def test_a_prompt_ends_where_the_answer_begins(tokenizer):
    tokens = render(tokenizer, Prompt("a", "c", "train", "hi"), 64)
    assert tokenizer.decode(tokens) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_a_prompt_that_is_one_token_too_long_is_refused(tokenizer):
    prompt = Prompt("long-1", "c", "train", "hello")
    num = len(render(tokenizer, prompt, 1000))
    assert len(render(tokenizer, prompt, num)) == num
    with pytest.raises(InputError, match=f"'long-1' renders to {num} tokens, data.max_prompt_tokens is {num - 1}"):
        render(tokenizer, prompt, num - 1)


def test_the_tiny_file_is_valid(tmp_path):
    prompts = read_prompts(str(write_prompts(tmp_path / "p.jsonl", 5, 3)))
    assert Counter(prompt.split for prompt in prompts) == {"train": 5, "held_out": 3}


def test_the_shipped_prompts_are_enough():
    prompts = read_prompts(str(SHIPPED))
    splits = Counter(prompt.split for prompt in prompts)
    assert splits["train"] >= 600
    assert splits["held_out"] == 60
    trained = {prompt.category for prompt in prompts if prompt.split == "train"}
    assert trained == {prompt.category for prompt in prompts if prompt.split == "held_out"}


def shipped_texts(*splits: str) -> list[str]:
    """Prompts without regard to case and spaces."""
    prompts = read_prompts(str(SHIPPED))
    return [" ".join(prompt.prompt.lower().split()) for prompt in prompts if prompt.split in splits]


def test_no_shipped_held_out_prompt_is_trained_on():
    held_out = shipped_texts("held_out")
    assert len(set(held_out)) == len(held_out)
    assert not set(held_out) & set(shipped_texts("train"))


def test_no_shipped_prompt_stands_twice():
    assert [text for text, count in Counter(shipped_texts("train", "held_out")).items() if count > 1] == []
