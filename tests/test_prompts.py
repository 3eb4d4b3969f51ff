"""Prompts files: a broken line is named by its number, and the shipped file is sound."""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny import write_prompts

from flaxdraft.data.prompts import SPLITS, Prompt, check_context, read_prompts, render_prompts
from flaxdraft.errors import InputError
from flaxdraft.files.gguf_file import GGUFCheckpoint

SHIPPED = Path(__file__).parents[1] / "experiments" / "data" / "prompts.jsonl"
GOOD = {"id": "a", "category": "c", "split": "train", "prompt": "p"}
HELD_OUT = {"id": "h", "category": "c", "split": "held_out", "prompt": "q"}


@pytest.fixture
def read(tmp_path):
    """read(lines) of objects or raw text, through a file p.jsonl."""

    def read(*lines, needed=SPLITS):
        path = tmp_path / "p.jsonl"
        texts = (line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines)
        path.write_text("\n".join(texts) + "\n", encoding="utf-8")
        return read_prompts(str(path), needed)

    return read


@pytest.fixture(scope="module")
def tokenizer(tiny_gguf):
    return GGUFCheckpoint(tiny_gguf).tokenizer()


def test_prompts_keep_their_order_and_blank_lines_do_not_count(read):
    assert read(HELD_OUT, "", "  ", GOOD) == [Prompt("h", "c", "held_out", ("q",)), Prompt("a", "c", "train", ("p",))]


@pytest.mark.parametrize(
    "text",
    ["é 日本 🙂", "a\nb", "a\u2028b", "a\x85b"],
    ids=ascii,
)
def test_any_text_is_read_back(read, text):
    assert read(GOOD | {"prompt": text}, HELD_OUT)[0].turns == (text,)


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


def test_all_broken_lines_are_named_at_once(read):
    with pytest.raises(InputError, match=r"p.jsonl: 3 bad rows; mend them:\n") as caught:
        read(GOOD, "{", HELD_OUT, [1], GOOD)
    for words in ("line 2: not valid JSON", "line 4: expected an object", "line 5: id "):
        assert words in str(caught.value)
    assert "skip" not in str(caught.value)


@pytest.mark.parametrize(("line", "split"), [(GOOD, "held_out"), (HELD_OUT, "train")], ids=["train", "held_out"])
def test_both_splits_are_needed(read, line, split):
    with pytest.raises(
        InputError, match=rf"p.jsonl: no prompt of split '{split}'; expected some of each of: train, held_out"
    ):
        read(line)


def test_a_file_of_blank_lines_is_named_empty(read):
    with pytest.raises(InputError, match=r"p.jsonl: is empty, expected one prompt or question a line"):
        read("")


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
    tokens = render_prompts(tokenizer, [Prompt("a", "c", "train", ("hi",))], 64)
    assert tokenizer.decode(tokens["a"]) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_a_prompt_that_is_one_token_too_long_is_refused(tokenizer):
    prompts = [Prompt("short", "c", "train", ("h",)), Prompt("long-1", "c", "train", ("hello",))]
    num = len(render_prompts(tokenizer, prompts, 1000)["long-1"])
    assert len(render_prompts(tokenizer, prompts, num)["long-1"]) == num
    with pytest.raises(InputError, match=f"'long-1' renders to {num} tokens, data.max_prompt_tokens is {num - 1}"):
        render_prompts(tokenizer, prompts, num - 1)


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
    return [" ".join(prompt.turns[0].lower().split()) for prompt in prompts if prompt.split in splits]


def test_no_shipped_held_out_prompt_is_trained_on():
    held_out = shipped_texts("held_out")
    assert len(set(held_out)) == len(held_out)
    assert not set(held_out) & set(shipped_texts("train"))


def test_no_shipped_prompt_stands_twice():
    assert [text for text, count in Counter(shipped_texts("train", "held_out")).items() if count > 1] == []


QUESTION = {"question_id": 7, "turns": ["a", "b"], "reference": ["left alone"]}


def test_questions_of_several_turns_are_held_out(read):
    want = [Prompt("7", "all", "held_out", ("a", "b")), Prompt("x", "math", "held_out", ("c",))]
    assert read(QUESTION, {"question_id": "x", "category": "math", "turns": ["c"]}, needed=("held_out",)) == want
    with pytest.raises(InputError, match=r"p.jsonl: no prompt of split 'train'"):
        read(QUESTION)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1]", "expected an object, found list"),
        ({"turns": ["a"]}, "'question_id': found None"),
        ({"question_id": True, "turns": ["a"]}, "'question_id': found True, expected a number or a string"),
        ({"question_id": 1, "turns": ["a"], "category": 3}, "'category': found 3, expected a string"),
        ({"question_id": 1, "turns": []}, r"'turns': found \[\], expected a list of non-empty strings"),
        ({"question_id": 1, "turns": ["a", " "]}, r"'turns': found \['a', ' '\]"),
        ({"question_id": "7", "turns": ["b"]}, "id '7' stands in line 1 already"),
        (GOOD, "'question_id': found None"),
        ('{"question_id": 1, "turns": ["a"]', "not valid JSON"),
    ],
)
def test_broken_questions_are_named(read, line, message):
    with pytest.raises(InputError, match=f"line 3: {message}"):
        read(QUESTION, "", line, needed=())


def test_an_empty_file_is_named(read):
    with pytest.raises(InputError, match=r"p.jsonl: is empty, expected one prompt or question a line"):
        read("", needed=())


def test_a_template_that_refuses_is_named():
    def refuses(messages, **more):
        raise ValueError("no system role")

    with pytest.raises(InputError, match="prompt 'a': the chat template refuses this conversation: no system role"):
        render_prompts(SimpleNamespace(apply_chat_template=refuses), [Prompt("a", "c", "train", ("hi",))], 64)


def test_a_prompt_whose_answer_leaves_the_context_is_named():
    check_context(28, "prompt a", 100, "--most", 128)
    message = r"--most: found 100; after prompt a \(29 tokens\) that leaves .* context of 128; expected at most 99"
    with pytest.raises(InputError, match=message):
        check_context(29, "prompt a", 100, "--most", 128)
