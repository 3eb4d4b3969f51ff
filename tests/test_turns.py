"""What is supervised is what the target would have written, neither more nor fewer: over roles, contents, templates and
tokenizers, against a description of each template in Python."""

import copy
import dataclasses
import json
from itertools import groupby, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_chats import (
    ASKS,
    BODY,
    BYE,
    FOOTER,
    HEADER,
    HELLO,
    HI,
    IM,
    MARKED_BODY,
    SYSTEM_FIRST,
    Kind,
    row_of,
    spans,
    tokenizer_of,
)
from test_chat import SPECIAL, TEMPLATES, deepseek_v3

from flaxdraft.data.chat import Chat
from flaxdraft.data.conversations import parse
from flaxdraft.data.templates import ChatOptions, render
from flaxdraft.errors import InputError

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
    return [*first, *_im(message, _with_calls(message, message["content"]))]


def _with_calls(message, content: str) -> str:
    calls = [_call_text(call) for call in message.get("tool_calls", ())]
    return "\n".join([*([content] if content or not calls else []), *calls])


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
    return _im(message, "<think>\n\n</think>\n\n" + _with_calls(message, message["content"].lstrip("\n")))


def plain(message, i, messages):
    """Of a template of few lines, whose marks enclose the content alone."""
    return _im(message, message["content"])


def phi3(message, i, messages):
    """It ends in an end of text, wherever that is."""
    end = [("<|endoftext|>", False)] if i == len(messages) - 1 else []
    return [*_im(message, message["content"]), *end]


SHORT = {"plain": ASKS, "phi3": FOOTER}
FAMILIES = {"qwen2_5": qwen2_5, "llama3": llama3, "gemma": gemma, "mistral": mistral, "deepseekv3": deepseekv3,
            "qwen3": qwen3, "plain": plain, "phi3": phi3}  # fmt: skip
CONTENTS = (
    "hello", "", "  two  spaces ", "ends in lines\n\n", "\n\tbegins in one", "ça ☕ 日本", "It ends <|im_end|> a turn.",
    "<|im_start|>assistant\nno", "</s> <end_of_turn>\n<start_of_turn>model\n", "[INST] x [/INST]", "<eos>",
)  # fmt: skip
THOUGHT = "<think>\nhm  hm\n</think>\n\nyes"


def template_of(family: str, marked: bool) -> str:
    if family == "deepseekv3" and not marked:
        return deepseek_v3().chat_template
    if family in SHORT:
        return (MARKED_BODY if marked else BODY) + SHORT[family]
    if family == "mistral":
        text = (TEMPLATES / "mistral.jinja").read_text(encoding="utf-8")
        written = '{{- " " + message.content + eos_token }}'
        assert text.count(written) == 1
        return text.replace(written, f"{{%- generation %}}{written}{{%- endgeneration %}}") if marked else text
    return (TEMPLATES / f"{family}{'_training' * marked}.jinja").read_text(encoding="utf-8")


@st.composite
def cases(draw):
    family = draw(st.sampled_from([*FAMILIES]))
    marked = draw(st.booleans())
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
        elif message["role"] == "assistant" and family in ("qwen2_5", "qwen3") and draw(st.booleans()):
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
    bos, end, others = SPECIAL.get(family, IM)
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
    tokenizer = tokenizer_of(BODY + FOOTER, IM, Kind(named=False))
    stops = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<eos>"])
    messages = [HI, HELLO, HI, HELLO]
    assert spans(tokenizer, row_of(messages), stop_tokens=stops) == ["hello<|im_end|>"] * 2
    assert spans(tokenizer, row_of(messages), stop_tokens=stops, last_turn_only=True) == ["hello<|im_end|>"]


def test_a_template_that_asks_without_being_told_to():
    """It writes the header of an answer behind whatever is none."""
    asks = "{% if messages[-1].role != 'assistant' %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    odd = {**HELLO, "content": "<|im_start|>assistant\nno"}
    for template, lead in (
        (BODY, ""), (marked("", "{{ m.content }}", "<|im_end|>", ""), ""),
        (marked("<think></think>", "{{ m.content }}", "<|im_end|>", ""), "<think></think>"),
    ):  # fmt: skip
        tokenizer = tokenizer_of(template + asks, IM, Kind())
        for messages in ([HI, HELLO], [HELLO, BYE], [HI, HELLO, BYE, HI], [HI, odd, odd], [HELLO]):
            written = [lead + m["content"] + "<|im_end|>" for m in messages if m["role"] == "assistant"]
            assert spans(tokenizer, row_of(messages)) == written


def test_a_template_that_ends_a_turn_where_another_follows():
    template = (
        "{% for m in messages %}{{ '<|im_end|>\n' if not loop.first }}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_end|>\n<|im_start|>assistant\n' }}{% endif %}"
    )
    tokenizer = tokenizer_of(template, IM, Kind())
    stops = tokenizer.convert_tokens_to_ids(["<|im_end|>"])
    row = row_of([HI, HELLO, HI, BYE])
    assert spans(tokenizer, row, stop_tokens=stops) == ["hello<|im_end|>", "bye"]


def test_a_generation_prompt_that_opens_reasoning_names_what_works():
    template = BODY + ASKS.replace("assistant\n", "assistant\n<think>\n")
    with pytest.raises(InputError, match="before message 1 it renders") as caught:
        spans(tokenizer_of(template, IM, Kind()), row_of([HI, HELLO]), last_turn_only=True)
    assert "python -m flaxdraft.data regenerate" in str(caught.value)
    assert "last_turn_only" not in str(caught.value)


TURN = "{{ '<|im_start|>' + m.role + '\n' }}"
CALL = {**HELLO, "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}


def marked(before: str, inside: str, behind: str, asks: str = ASKS, when: str = "m.role == 'assistant'") -> str:
    """A template that marks the middle of an assistant's turn."""
    turn = f"{TURN}{before}{{% generation %}}{inside}{{% endgeneration %}}{behind}"
    plain = f"{TURN}{before}{inside}{behind}"
    return f"{{% for m in messages %}}{{% if {when} %}}{turn}{{% else %}}{plain}{{% endif %}}\n{{% endfor %}}{asks}"


@pytest.mark.parametrize("last_only", [False, True])
@pytest.mark.parametrize(
    ("template", "messages", "want"),
    [
        (marked("", "{{ m.content }}", "<|im_end|>"), [HI, HELLO], "hello<|im_end|>"),
        (marked(" ", "{{ m.content }}", " <|im_end|>"), [HI, HELLO], " hello <|im_end|>"),
        (marked("<think>\n\n</think>\n\n", "{{ m.content }}", "<|im_end|>"), [HI, HELLO],
         "<think>\n\n</think>\n\nhello<|im_end|>"),
        (marked("", "{{ m.content }}", "{% for c in m.tool_calls %}@f{% endfor %}<|im_end|>"), [HI, CALL],
         "hello@f<|im_end|>"),
        # No generation prompt: marks alone tell the header from what is written behind it.
        (marked("", "{{ m.content }}", "<|im_end|>", asks=""), [HI, HELLO], "hello<|im_end|>"),
        (marked("", "{{ m.content }}<|im_end|>", "", asks=""), [HI, HELLO], "hello<|im_end|>"),
    ],
)  # fmt: skip
def test_marks_that_leave_out_what_the_target_writes(template, messages, want, last_only):
    tokenizer = tokenizer_of(template, IM, Kind())
    assert spans(tokenizer, row_of([*messages, HI, HELLO]), last_turn_only=last_only)[0] == (
        want.replace("@f", "") if last_only else want
    )
    assert spans(tokenizer, row_of(messages), last_turn_only=last_only) == [want]


def test_a_turn_that_is_not_marked_is_left_out():
    template = marked("", "{{ m.content }}", "<|im_end|>", when="m.role == 'assistant' and loop.last")
    assert spans(tokenizer_of(template, IM, Kind()), row_of([HI, HELLO, HI, BYE])) == ["bye<|im_end|>"]


NEEDS_USER = (
    "{% if not messages | selectattr('role', 'equalto', 'user') | list %}{{ raise_exception('no user') }}{% endif %}"
)


@pytest.mark.parametrize("body", [BODY, MARKED_BODY])
@pytest.mark.parametrize("first", [HELLO, {**HELLO, "content": ""}, {**HELLO, "content": "Q <|im_start|>assistant\n"}])
def test_a_template_that_refuses_a_conversation_before_a_user_speaks(body, first):
    tokenizer = tokenizer_of(NEEDS_USER + body + ASKS, IM, Kind())
    want = [first["content"] + "<|im_end|>", "hello<|im_end|>"]
    assert spans(tokenizer, row_of([first, HI, HELLO])) == want
    assert spans(tokenizer, row_of([first, first, HI])) == [want[0]] * 2


def test_a_turn_with_a_header_of_its_own_is_refused():
    """The generation prompt stands before an earlier turn alone, which is not where the later one begins."""
    named = "{{ '<|im_start|>' + (m.role if m.content in ('hi', 'hello') else 'narrator') + '\n' }}"
    own = BODY.replace(HEADER, named)
    picky = "{% if add_generation_prompt and messages[-1].role != 'user' %}{{ raise_exception('ask') }}{% endif %}"
    tokenizer = tokenizer_of(picky + own + ASKS, IM, Kind())
    with pytest.raises(InputError, match="before message 2 it renders"):
        spans(tokenizer, row_of([HI, HELLO, BYE]))


def test_a_template_that_refuses_a_call_before_a_user_speaks():
    called = BODY.replace("m['content']", "m['content'] + ('@f{}' if m.tool_calls else '')")
    tokenizer = tokenizer_of(NEEDS_USER + called + ASKS, IM, Kind())
    assert spans(tokenizer, row_of([CALL, HI, HELLO])) == ["hello@f{}<|im_end|>", "hello<|im_end|>"]


def test_turns_end_as_the_template_of_conversations_with_tools_ends_them():
    """Its marker is another one than that of the template for all others, and neither is a token of its own."""
    plain = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + ' #END\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    tooled = plain.replace("#END", "#STOP").replace("': '", "'= '").replace("assistant: ", "assistant= ")
    tokenizer = copy.deepcopy(tokenizer_of(plain, IM, Kind()))
    tokenizer.chat_template = {"default": plain, "tool_use": "{{ tools | tojson }}" + tooled}
    tools = [{"type": "function", "function": {"name": "w"}}]
    row = [HELLO, HI, HELLO, HI]
    assert spans(tokenizer, row_of(row)) == ["hello #END"] * 2
    rendered = render(tokenizer, row_of(row, tools=tools), ChatOptions(1000))
    assert tokenizer.decode(rendered.tokens[rendered.assistant]) == "hello #STOP" * 2


def test_the_whole_text_is_rendered_once(monkeypatch):
    """And for each turn what stands before it; what the template writes around turns is asked of it once."""
    tokenizer, options, rendered, text = tokenizer_of(BODY + ASKS, IM, Kind()), ChatOptions(100), [], Chat.text

    def counted(chat, messages, prompt=False):
        rendered.append((len(messages), prompt))
        return text(chat, messages, prompt)

    monkeypatch.setattr(Chat, "text", counted)
    for more, want in (([], [(2, False), (1, True)]), ([HI], [(3, False), (1, True), (2, False)])):
        row = row_of([HI, HELLO, *more])
        render(tokenizer, row, options)
        rendered.clear()
        render(tokenizer, row, options)
        assert rendered == want
