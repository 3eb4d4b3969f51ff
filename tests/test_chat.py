"""Supervision masks of real chat templates, against what a person would mark."""

from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from flaxdraft.data.conversations import Conversation, parse
from flaxdraft.data.templates import ChatOptions, render
from flaxdraft.errors import InputError

TEMPLATES = Path(__file__).parent / "templates"
SPECIAL = {  # (beginning of text, end of turn, other marks)
    "qwen2_5": ("<|endoftext|>", "<|im_end|>", ["<|im_start|>"]),
    "qwen3": ("<|endoftext|>", "<|im_end|>", ["<|im_start|>"]),
    "llama3": ("<|begin_of_text|>", "<|eot_id|>", ["<|start_header_id|>", "<|end_header_id|>"]),
    "gemma": ("<bos>", "<end_of_turn>", ["<start_of_turn>"]),
    "deepseekv3": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", ["<｜User｜>", "<｜Assistant｜>"]),
    "mistral": ("<s>", "</s>", ["[INST]", "[/INST]"]),
}
SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [
    {"role": "user", "content": "Hello, ça va?"},
    {"role": "assistant", "content": "Oui ☕ 日本!"},
    {"role": "user", "content": "Goodbye\nthen"},
    {"role": "assistant", "content": "Bye."},
]


def tokenizer_for(name: str, template: str | None = None) -> PreTrainedTokenizerFast:
    """Bytes, one merge, and the family's special tokens."""
    family = name.removesuffix("_training")
    bos, eos, others = SPECIAL[family]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({token: i for i, token in enumerate([*alphabet, "By"])}, [("B", "y")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(token, normalized=False) for token in (bos, eos, *others)])
    text = template or (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=bos, eos_token=eos, additional_special_tokens=others, chat_template=text
    )


def deepseek_v3() -> PreTrainedTokenizerFast:
    """The release without reasoning: its generation prompt ends before the tag that the reasoning one opens."""
    text = (TEMPLATES / "deepseekv3.jinja").read_text(encoding="utf-8")
    assert "<｜Assistant｜><think>\\n" in text
    return tokenizer_for("deepseekv3", text.replace("<｜Assistant｜><think>\\n", "<｜Assistant｜>"))


def conversation(messages, **fields) -> Conversation:
    return parse({"messages": messages, **fields}, "chat.jsonl row 7", "chat:7")


def supervised(tokenizer, row: Conversation, max_length=10_000, **options) -> list[str]:
    """Each run of supervised tokens as text."""
    rendered = render(tokenizer, row, ChatOptions(max_length, **options))
    assert rendered.tokens.dtype == np.int32
    assert len(rendered.tokens) == len(rendered.assistant)
    cuts = np.flatnonzero(np.diff(rendered.assistant)) + 1
    runs = zip(np.split(rendered.tokens, cuts), np.split(rendered.assistant, cuts), strict=True)
    return [tokenizer.decode(tokens) for tokens, mask in runs if mask.size and mask[0]]


@pytest.mark.parametrize(
    ("name", "with_system"),
    [(name, with_system) for name in ("qwen2_5", "llama3", "gemma", "mistral", "deepseekv3")
     for with_system in (False, True) if (name, with_system) != ("gemma", True)],
)  # fmt: skip
def test_every_turn_of_a_conversation(name, with_system):
    tokenizer = deepseek_v3() if name == "deepseekv3" else tokenizer_for(name)
    end, lead = SPECIAL[name][1], " " if name == "mistral" else ""
    row = conversation([SYSTEM, *TURNS] if with_system else TURNS)
    assert supervised(tokenizer, row) == [f"{lead}Oui ☕ 日本!{end}", f"{lead}Bye.{end}"]
    assert supervised(tokenizer, row, last_turn_only=True) == [f"{lead}Bye.{end}"]


# What these marks enclose that no target writes: parts of the header, the newline after a turn.
BEYOND = {"qwen2_5": {"\n"}, "llama3": set(), "gemma": {"\n"}, "deepseekv3": {"<｜Assistant｜>"}}


@pytest.mark.parametrize("name", BEYOND)
def test_prefixes_and_generation_marks_agree(name):
    """The same template with and without marks: transformers' own mask without what no target writes."""
    marked = tokenizer_for(f"{name}_training")
    plain = deepseek_v3() if name == "deepseekv3" else tokenizer_for(name)
    theirs = marked.apply_chat_template(TURNS, return_dict=True, return_assistant_tokens_mask=True)
    by_marks, by_prefixes = (render(t, conversation(TURNS), ChatOptions(10_000)) for t in (marked, plain))
    assert by_marks.tokens.tolist() == by_prefixes.tokens.tolist() == theirs["input_ids"]
    assert by_marks.assistant.tolist() == by_prefixes.assistant.tolist()
    marked = np.array(theirs["assistant_masks"], bool)
    assert not (by_prefixes.assistant & ~marked).any()
    beyond = by_marks.tokens[marked & ~by_prefixes.assistant]
    assert {plain.decode([token]) for token in beyond} == BEYOND[name]


def test_qwen3_thinks_in_its_last_turn():
    tokenizer = tokenizer_for("qwen3")
    thinking = [*TURNS[:3], {"role": "assistant", "content": "<think>\nshort\n</think>\n\nBye."}]
    row = conversation(thinking)
    want = "<think>\nshort\n</think>\n\nBye.<|im_end|>"
    assert supervised(tokenizer, row, last_turn_only=True) == [want]
    assert supervised(tokenizer, row, last_turn_only=True, mask_reasoning=True) == ["\n\nBye.<|im_end|>"]
    separate = [*TURNS[:3], {"role": "assistant", "reasoning_content": "short", "content": "Bye."}]
    assert supervised(tokenizer, conversation(separate), last_turn_only=True) == [want]
    assert supervised(tokenizer, conversation(TURNS[:2])) == ["<think>\n\n</think>\n\nOui ☕ 日本!<|im_end|>"]


def test_a_template_that_rewrites_earlier_turns_is_refused():
    with pytest.raises(InputError) as caught:
        render(tokenizer_for("qwen3"), conversation(TURNS), ChatOptions(10_000))
    text = str(caught.value)
    assert "chat.jsonl row 7: the chat template is not prefix-stable: up to and with message 1" in text
    assert r"<think>\n\n</think>\n\nOui" in text  # what the prefix renders to
    assert r"<|im_start|>assistant\nOui" in text  # what the whole conversation has there
    assert "data.last_turn_only=true" in text


def test_a_generation_prompt_that_opens_reasoning_is_refused():
    with pytest.raises(InputError, match="not prefix-stable: before message 1 it renders"):
        render(tokenizer_for("deepseekv3"), conversation(TURNS), ChatOptions(10_000))


def test_tool_calls_are_produced_and_their_results_are_not():
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "snow"},
        {"role": "assistant", "content": "It snows."},
    ]
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    assert supervised(tokenizer_for("qwen2_5"), conversation(messages, tools=tools)) == [
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>',
        "It snows.<|im_end|>",
    ]
    rendered = render(tokenizer_for("qwen2_5"), conversation(messages, tools=tools), ChatOptions(10_000))
    assert '"name": "weather", "parameters"' in tokenizer_for("qwen2_5").decode(rendered.tokens)


CALL = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
TOOL_TURNS = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "snow"},
    {"role": "assistant", "content": "It snows."},
]


def test_tool_calls_of_deepseek():
    """What stands between a tool's result and the answer to it is the template's."""
    assert supervised(deepseek_v3(), conversation(TOOL_TURNS)) == [
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
        '{"city": "Oslo"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>',
        "It snows.<｜end▁of▁sentence｜>",
    ]


def test_tool_calls_of_qwen3():
    """It writes a thinking block into its last message alone, so that an earlier call is not prefix-stable."""
    row = conversation(TOOL_TURNS, tools=[{"type": "function", "function": {"name": "weather", "parameters": {}}}])
    with pytest.raises(InputError, match="not prefix-stable: up to and with message 1"):
        render(tokenizer_for("qwen3"), row, ChatOptions(10_000))
    last = supervised(tokenizer_for("qwen3"), row, last_turn_only=True)
    assert last == ["<think>\n\n</think>\n\nIt snows.<|im_end|>"]
    asked = supervised(tokenizer_for("qwen3"), conversation(TOOL_TURNS[:2]))
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
    assert asked == [f"<think>\n\n</think>\n\n{call}<|im_end|>"]


@pytest.mark.parametrize("name", ["llama3", "gemma", "mistral"])
def test_a_template_that_knows_no_tools_is_refused(name):
    """The call would be gone without a word."""
    with pytest.raises(InputError, match=r"chat.jsonl row 7: the chat template writes nothing of the tool 'weather'"):
        render(tokenizer_for(name), conversation(TOOL_TURNS[:2]), ChatOptions(10_000))
    offered = conversation(TURNS, tools=[{"type": "function", "function": {"name": "weather", "parameters": {}}}])
    with pytest.raises(InputError, match=r"chat.jsonl row 7: the chat template writes nothing of the tool 'weather'"):
        render(tokenizer_for(name), offered, ChatOptions(10_000))


SIX = ("qwen2_5", "llama3", "qwen3", "deepseekv3", "gemma", "mistral")


def of_family(name) -> PreTrainedTokenizerFast:
    return deepseek_v3() if name == "deepseekv3" else tokenizer_for(name)


@pytest.mark.parametrize("name", SIX)
def test_empty_turns_end_all_the_same(name):
    end = SPECIAL[name][1]
    before = {"qwen3": "<think>\n\n</think>\n\n", "mistral": " "}.get(name, "")
    assert supervised(of_family(name), conversation([TURNS[0], {"role": "assistant", "content": ""}])) == [before + end]


def test_no_assistant_no_supervision():
    assert supervised(tokenizer_for("llama3"), conversation(TURNS[:1])) == []


def test_a_conversation_may_begin_with_the_assistant():
    assert supervised(tokenizer_for("qwen2_5"), conversation([SYSTEM, TURNS[1]])) == ["Oui ☕ 日本!<|im_end|>"]


@pytest.mark.parametrize("name", SIX)
def test_truncation_inside_an_assistant_turn(name):
    tokenizer, row = of_family(name), conversation(TURNS)
    options = {"last_turn_only": name == "qwen3"}  # which is not prefix-stable over turns
    whole = render(tokenizer, row, ChatOptions(10_000, **options))
    at = int(np.flatnonzero(whole.assistant)[-3])  # inside the last turn
    cut = render(tokenizer, row, ChatOptions(at, **options))
    np.testing.assert_array_equal(cut.tokens, whole.tokens[:at])
    np.testing.assert_array_equal(cut.assistant, whole.assistant[:at])
    assert cut.assistant[-1]


def test_generation_marks_of_qwen3():
    """This variant of the template writes a thinking block into every turn."""
    tokenizer = tokenizer_for("qwen3_training")
    theirs = tokenizer.apply_chat_template(TURNS, return_dict=True, return_assistant_tokens_mask=True)
    ours = render(tokenizer, conversation(TURNS), ChatOptions(10_000))
    assert ours.tokens.tolist() == theirs["input_ids"]
    marked = np.array(theirs["assistant_masks"], bool)
    assert not (ours.assistant & ~marked).any()
    assert {tokenizer.decode([token]) for token in ours.tokens[marked & ~ours.assistant]} == {"\n"}
    empty = "<think>\n\n</think>\n\n"
    assert supervised(tokenizer, conversation(TURNS)) == [
        f"{empty}Oui ☕ 日本!<|im_end|>", f"{empty}Bye.<|im_end|>"
    ]  # fmt: skip


@pytest.mark.parametrize("marks", [False, True])
def test_reasoning_can_be_left_out_by_marks_and_by_prefixes(marks):
    tokenizer = tokenizer_for("qwen3_training" if marks else "qwen3")
    row = conversation([TURNS[0], {"role": "assistant", "content": "<think>\n日本\n</think>\n\nOui."}])
    assert supervised(tokenizer, row, mask_reasoning=True) == ["\n\nOui.<|im_end|>"]


def test_what_a_template_refuses_names_the_row():
    with pytest.raises(InputError, match=r"chat.jsonl row 7: the chat template refuses.*System role not supported"):
        render(tokenizer_for("gemma"), conversation([SYSTEM, *TURNS]), ChatOptions(100))


def test_tokens_pass_through():
    row = parse({"input_ids": [1, 2, 3, 4, 5], "loss_mask": [0, 1, 0, 1, 1]}, "t.jsonl row 1", "t:1")
    rendered = render(tokenizer_for("mistral"), row, ChatOptions(4))
    assert rendered.tokens.tolist() == [1, 2, 3, 4]
    assert rendered.assistant.tolist() == [False, True, False, True]
    last = render(tokenizer_for("mistral"), row, ChatOptions(5, last_turn_only=True))
    assert last.assistant.tolist() == [False, False, False, True, True]
    foreign = parse({"input_ids": [1, 9000], "loss_mask": [0, 1]}, "t.jsonl row 2", "t:2")
    with pytest.raises(InputError, match=r"t.jsonl row 2: token 9000 is outside the tokenizer's \d+"):
        render(tokenizer_for("mistral"), foreign, ChatOptions(5))
