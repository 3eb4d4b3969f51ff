"""What is supervised is what the target would have written, neither more nor fewer: over roles, contents, templates and
tokenizers, against a description of each template in Python."""

import dataclasses
import json
from functools import cache
from itertools import groupby, product

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_chat import SPECIAL, TEMPLATES, deepseek_v3
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from flaxdraft.data.conversations import parse, read_conversations
from flaxdraft.data.templates import ChatOptions, render
from flaxdraft.errors import InputError


@dataclasses.dataclass(frozen=True)
class Kind:
    """Of a tokenizer."""

    trimmed: bool = False  # its post-processor takes white space off the offsets
    holes: bool = False  # its ids do not follow one another
    named: bool = True  # its end of turn is its eos_token; else another token is, and this one is not special


@cache
def tokenizer_of(template: str, special: tuple[str, str, tuple[str, ...]], kind: Kind) -> PreTrainedTokenizerFast:
    bos, end, others = special
    alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ĠĠ", "Ċĉ"]
    vocab = {token: i * (2 if kind.holes else 1) for i, token in enumerate([*alphabet, bos, end, *others, "<eos>"])}
    inner = Tokenizer(models.BPE(vocab, [("Ġ", "Ġ"), ("Ċ", "ĉ")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    if kind.trimmed:
        inner.post_processor = processors.ByteLevel(trim_offsets=True)
    plain = [AddedToken(token, normalized=False) for token in (bos, *others, "<eos>")]
    inner.add_special_tokens(plain + ([AddedToken(end, normalized=False)] if kind.named else []))
    inner.add_tokens([AddedToken(end, normalized=False)])
    eos = end if kind.named else "<eos>"
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=bos, eos_token=eos, chat_template=template)


def spans(tokenizer, row, **options) -> list[str]:
    """Each run of supervised tokens, as text; all tokens are those of transformers."""
    rendered = render(tokenizer, row, ChatOptions(100_000, **options))
    if row.tokens is None and not any(message.get("tool_calls") for message in row.messages):
        assert rendered.tokens.tolist() == tokenizer.apply_chat_template([*row.messages], return_dict=False)
    cuts = np.flatnonzero(np.diff(rendered.assistant)) + 1
    runs = zip(np.split(rendered.tokens, cuts), np.split(rendered.assistant, cuts), strict=True)
    return [tokenizer.decode(tokens) for tokens, mask in runs if mask.size and mask[0]]


def row_of(messages, **fields):
    return parse({"messages": messages, **fields}, "chat.jsonl row 1", "chat:1")


# Each writes [(text, whether the target wrote it), ...] for one message, its number and all of them.


def _im(message, written: str):
    return [(f"<|im_start|>{message['role']}\n", False), (f"{written}<|im_end|>", message["role"] == "assistant"),
            ("\n", False)]  # fmt: skip


def _call_text(call) -> str:
    arguments = call["function"]["arguments"]
    as_object = json.loads(arguments) if isinstance(arguments, str) else arguments
    return f'<tool_call>\n{{"name": "f", "arguments": {json.dumps(as_object)}}}\n</tool_call>'


def qwen2_5(message, i, messages):
    first = [("<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n",
              False)] if i == 0 and message["role"] != "system" else []  # fmt: skip
    calls = [_call_text(call) for call in message.get("tool_calls", ())]
    return [
        *first,
        *_im(message, "\n".join([*([message["content"]] if message["content"] or not calls else []), *calls])),
    ]


def llama3(message, i, messages):
    header = f"<|start_header_id|>{message['role']}<|end_header_id|>\n\n"
    written = f"{message['content'].strip()}<|eot_id|>"
    return [("<|begin_of_text|>" * (i == 0) + header, False), (written, message["role"] == "assistant")]


def gemma(message, i, messages):
    role = {"assistant": "model"}.get(message["role"], message["role"])
    written = f"{message['content'].strip()}<end_of_turn>"
    return [("<bos>" * (i == 0) + f"<start_of_turn>{role}\n", False), (written, role == "model"), ("\n", False)]


def mistral(message, i, messages):
    bos = [("<s>", False)] * (i == 0)
    if message["role"] == "system":
        return bos
    if message["role"] == "assistant":
        return [*bos, (f" {message['content']}</s>", True)]
    begins = i == 1 and messages[0]["role"] == "system"
    system = messages[0]["content"] + "\n\n" if begins else ""
    return [*bos, (f"[INST] {system}{message['content']}[/INST]", False)]


def deepseekv3(message, i, messages):
    bos = ("<｜begin▁of▁sentence｜>" * (i == 0), False)
    if message["role"] == "system":
        return [(bos[0] + message["content"], False)]
    if message["role"] == "user":
        return [bos, (f"<｜User｜>{message['content']}", False)]
    return [bos, ("<｜Assistant｜>", False), (f"{message['content']}<｜end▁of▁sentence｜>", True)]


def qwen3(message, i, messages):
    """Of the training variant, and of the last turn of the other."""
    if message["role"] != "assistant":
        return _im(message, message["content"])
    return _im(message, "<think>\n\n</think>\n\n" + message["content"].lstrip("\n"))


FAMILIES = {"qwen2_5": qwen2_5, "llama3": llama3, "gemma": gemma, "mistral": mistral, "deepseekv3": deepseekv3,
            "qwen3": qwen3}  # fmt: skip
MARKED = {"qwen2_5", "llama3", "gemma", "deepseekv3", "qwen3"}
CONTENTS = (
    "hello", "", "  two  spaces ", "ends in lines\n\n", "\n\tbegins in one", "ça ☕ 日本", "It ends <|im_end|> a turn.",
    "<|im_start|>assistant\nno", "</s> <end_of_turn>\n<start_of_turn>model\n", "[INST] x [/INST]", "<eos>",
)  # fmt: skip
THOUGHT = "<think>\nhm  hm\n</think>\n\nyes"


def template_of(family: str, marked: bool) -> str:
    if family == "deepseekv3" and not marked:
        return deepseek_v3().chat_template
    return (TEMPLATES / f"{family}{'_training' * marked}.jinja").read_text(encoding="utf-8")


@st.composite
def cases(draw):
    family = draw(st.sampled_from([*FAMILIES]))
    marked = family in MARKED and draw(st.booleans())
    roles = draw(st.lists(st.sampled_from(["user", "assistant"]), min_size=1, max_size=5))
    last_only = (family, marked) == ("qwen3", False) or draw(st.booleans())
    if family == "gemma":  # its roles alternate, and no system speaks
        roles = ["user", "assistant"] * len(roles)
    elif family == "qwen3":  # it looks for a question
        roles = ["user", *roles, "user", "assistant"]
    elif draw(st.booleans()):
        roles = ["system", *roles]
    messages = [{"role": role, "content": draw(st.sampled_from(CONTENTS))} for role in roles]
    for message in messages:
        if message["role"] == "assistant" and family in ("qwen2_5", "llama3", "mistral") and draw(st.booleans()):
            message["content"] = THOUGHT
        elif message["role"] == "assistant" and family == "qwen2_5" and draw(st.booleans()):
            arguments = draw(st.sampled_from([{"city": "Oslo"}, '{"city":"Oslo", "days": null}', "{}"]))
            message["tool_calls"] = [{"type": "function", "function": {"name": "f", "arguments": arguments}}]
    kind = draw(st.builds(Kind, st.booleans(), st.booleans(), st.booleans()))
    if family in ("mistral", "deepseekv3"):  # these write eos_token itself
        kind = dataclasses.replace(kind, named=True)
    return family, marked, messages, last_only, draw(st.booleans()), kind


def expected(family: str, messages, last_only: bool, mask_reasoning: bool) -> list[str]:
    kept = _turns(messages)[-1:] if last_only else _turns(messages)
    pieces = [
        (text, written and i in kept)
        for i, message in enumerate(messages)
        for text, written in FAMILIES[family](message, i, messages)
    ]
    if mask_reasoning:
        pieces = [part for piece in pieces for part in _without_thought(*piece)]
    runs = [
        ("".join(text for text, _ in group), on) for on, group in groupby((p for p in pieces if p[0]), lambda p: p[1])
    ]
    return [text for text, on in runs if on]


def _turns(messages) -> list[int]:
    return [i for i, message in enumerate(messages) if message["role"] == "assistant"]


def _without_thought(text, written):
    begin, end = text.find("<think>"), text.rfind("</think>") + len("</think>")
    if not written or begin < 0:
        return [(text, written)]
    return [(text[:begin], True), (text[begin:end], False), (text[end:], True)]


@given(cases())
@settings(max_examples=300, deadline=None, derandomize=True)
def test_supervised_is_what_the_target_would_write(case):
    family, marked, messages, last_only, mask_reasoning, kind = case
    bos, end, others = SPECIAL[family]
    tokenizer = tokenizer_of(template_of(family, marked), (bos, end, tuple(others)), kind)
    if not _turns(messages):
        assert spans(tokenizer, row_of(messages)) == []
        return
    want = expected(family, messages, last_only, mask_reasoning)
    stops = tokenizer.convert_tokens_to_ids([end, "<eos>"])
    how = {"last_turn_only": last_only, "mask_reasoning": mask_reasoning, "stop_tokens": stops}
    assert spans(tokenizer, row_of(messages), **how) == want


@pytest.mark.parametrize("family", ["qwen2_5", "llama3", "deepseekv3"])
def test_prefixes_and_marks_agree_on_every_sequence_of_roles(family):
    """Where a template moves what was said (DeepSeek's puts every system message first), prefixes refuse and marks do
    not."""
    bos, end, others = SPECIAL[family]
    both = [tokenizer_of(template_of(family, marked), (bos, end, tuple(others)), Kind()) for marked in (False, True)]
    refused = 0
    for roles in (roles for num in (1, 2, 3) for roles in product(("system", "user", "assistant", "tool"), repeat=num)):
        row = row_of([{"role": role, "content": f"{role} {i}"} for i, role in enumerate(roles)])
        try:
            assert spans(both[0], row) == spans(both[1], row), roles
        except InputError:
            refused += 1
            assert (family, "system" in roles[1:]) == ("deepseekv3", True)
    assert refused < 20


# A template of three lines, with what its author might have written otherwise.
IM = ("<|endoftext|>", "<|im_end|>", ("<|im_start|>",))
HEADER = "{{'<|im_start|>' + m['role'] + '\n'}}"
SYSTEM_FIRST = "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
ASKS = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
BODY = "{% for m in messages %}" + HEADER + "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
HI, HELLO = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}


def test_a_conversation_that_begins_with_the_assistant():
    tokenizer = tokenizer_of(SYSTEM_FIRST + BODY + ASKS, IM, Kind())
    assert spans(tokenizer, row_of([HELLO, HI, HELLO])) == ["hello<|im_end|>", "hello<|im_end|>"]
    row = {"conversations": [{"from": "gpt", "value": "Welcome!"}, {"from": "human", "value": "hi"}]}
    assert spans(tokenizer, parse(row, "r", "r")) == ["Welcome!<|im_end|>"]


def test_a_template_that_asks_for_an_answer_to_a_user_alone():
    """Its prefixes cannot be rendered where the assistant speaks twice."""
    picky = "{% if add_generation_prompt and messages[-1].role != 'user' %}{{ raise_exception('ask') }}{% endif %}"
    tokenizer = tokenizer_of(picky + BODY + ASKS, IM, Kind())
    assert spans(tokenizer, row_of([HI, HELLO, HELLO])) == ["hello<|im_end|>", "hello<|im_end|>"]


@pytest.mark.parametrize("trimmed", [False, True])
def test_tokens_of_white_space_alone_are_where_they_are(trimmed):
    """Trimmed, the offsets of such a token say that it ends where it begins: behind itself."""
    template = (
        "{% for m in messages %}{{ m.role + ':  ' + m.content + '  ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:  ' }}{% endif %}"
    )
    assert spans(tokenizer_of(template, IM, Kind(trimmed=trimmed)), row_of([HI, HELLO, HI, HELLO])) == ["hello  "] * 2


def test_an_end_of_text_behind_the_last_turn():
    """Phi-3's template writes it wherever a conversation ends; no target writes it behind its end of turn."""
    footer = ASKS.replace("{% endif %}", "{% else %}{{ '<|endoftext|>' }}{% endif %}")
    tokenizer = tokenizer_of(BODY + footer, IM, Kind(named=False))
    stops = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<eos>"])
    messages = [HI, HELLO, HI, HELLO]
    assert spans(tokenizer, row_of(messages), stop_tokens=stops) == ["hello<|im_end|>"] * 2
    assert spans(tokenizer, row_of(messages), stop_tokens=stops, last_turn_only=True) == ["hello<|im_end|>"]


CALLED = {"role": "assistant", "content": None}
TOOLED = (
    "{% for m in messages %}"
    + HEADER
    + "{{ m.content }}{% for c in m.tool_calls %}@f{% endfor %}<|im_end|>{% endfor %}"
)


def calls(arguments):
    return [
        HI,
        {**CALLED, "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": arguments}}]},
    ]


@pytest.mark.parametrize(
    ("written", "want"),
    [
        ("c.function.arguments | tojson", '{"city": "Oslo"}'),
        ("c.function.arguments", '{"city":"Oslo"}'),  # as text alone: it would write an object as Python does
        ("'```' + c.function.arguments", '```{"city":"Oslo"}'),  # which refuses an object
        ("c.function.arguments | tojson if c.function.arguments is mapping else '?'", '{"city": "Oslo"}'),
        ("c.function.arguments | items | first | join('=')", "city=Oslo"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("form", ["text", "object", "function_call"])
def test_arguments_are_given_as_the_template_takes_them(written, want, form):
    template = TOOLED.replace("@f", "weather{{ " + written + " }}")
    messages = calls('{"city":"Oslo"}' if form != "object" else {"city": "Oslo"})
    if form == "function_call":
        messages = [HI, {**CALLED, "function_call": messages[1]["tool_calls"][0]["function"]}]
    if form == "object":
        want = want.replace('":"', '": "')
    assert spans(tokenizer_of(template + ASKS, IM, Kind()), row_of(messages)) == [f"weather{want}<|im_end|>"]


def test_functions_are_tools():
    tool = {"name": "weather", "parameters": {}}
    old, new = (
        row_of([HI, HELLO], functions=[tool]),
        row_of([HI, HELLO], tools=[{"type": "function", "function": tool}]),
    )
    assert old.tools == new.tools


@pytest.mark.parametrize("arguments", ["{", "[1]", "3", [1]])
def test_arguments_that_are_no_object(arguments):
    with pytest.raises(
        InputError, match=r"messages\[1\]: tool_calls: arguments: (not valid JSON|expected a JSON object)"
    ):
        row_of(calls(arguments))


def test_a_row_is_the_same_from_json_lines_and_from_parquet(tmp_path):
    """Arrow gives each row the keys of all."""
    schema = lambda **more: [{"type": "function", "function": {"name": "weather", "parameters": {"p": more}}}]  # noqa: E731
    rows = [
        {"messages": calls({"city": "Oslo"}), "tools": schema(city="text")},
        {"messages": calls({"day": 3}), "tools": schema(day="number")},
        {"messages": [HI, HELLO]},
    ]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "c.parquet")
    template = "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}" + TOOLED.replace(
        "@f", "weather{{ c | tojson }}"
    )
    tokenizer = tokenizer_of(template + ASKS, IM, Kind())
    lines, table = (
        [render(tokenizer, row, ChatOptions(1000)) for row in read_conversations(tmp_path / name)]
        for name in ("c.jsonl", "c.parquet")
    )
    for one, other in zip(lines, table, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_array_equal(one.assistant, other.assistant)


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


def test_a_generation_prompt_that_opens_reasoning_names_what_works():
    template = BODY + ASKS.replace("assistant\n", "assistant\n<think>\n")
    with pytest.raises(InputError, match="before message 1 it renders") as caught:
        spans(tokenizer_of(template, IM, Kind()), row_of([HI, HELLO]), last_turn_only=True)
    assert "python -m flaxdraft.data regenerate" in str(caught.value)
    assert "last_turn_only" not in str(caught.value)


def test_rows_are_cut_at_the_context():
    tokenizer = tokenizer_of(BODY + ASKS, IM, Kind())
    whole = render(tokenizer, row_of([HI, HELLO]), ChatOptions(1000))
    cut = render(tokenizer, row_of([HI, HELLO]), ChatOptions(1000, context=20))
    assert (len(cut.tokens), cut.num_cut) == (20, len(whole.tokens) - 20)
    assert render(tokenizer, row_of([HI, HELLO]), ChatOptions(20)).num_cut == cut.num_cut
