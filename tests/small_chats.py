"""Tokenizers of all kinds with chat templates of few lines, and what of a conversation they make supervised."""

import dataclasses
from functools import cache

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from flaxdraft.data.conversations import parse
from flaxdraft.data.templates import ChatOptions, render


@dataclasses.dataclass(frozen=True)
class Kind:
    """Of a tokenizer."""

    trimmed: bool = False  # its post-processor takes white space off the offsets
    holes: bool = False  # its ids do not follow one another
    named: bool = True  # its end of turn is its eos_token; else another token is, and this one is not special
    merges: bool = True  # of white space


@cache
def tokenizer_of(template: str, special: tuple[str, str, tuple[str, ...]], kind: Kind) -> PreTrainedTokenizerFast:
    bos, end, others = special
    alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ĠĠ", "Ċĉ"]
    vocab = {token: i * (2 if kind.holes else 1) for i, token in enumerate([*alphabet, bos, end, *others, "<eos>"])}
    inner = Tokenizer(models.BPE(vocab, [("Ġ", "Ġ"), ("Ċ", "ĉ")] if kind.merges else []))
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


# A template of three lines, with what its author might have written otherwise.
IM = ("<|endoftext|>", "<|im_end|>", ("<|im_start|>",))
HEADER = "{{'<|im_start|>' + m['role'] + '\n'}}"
SYSTEM_FIRST = "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
ASKS = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
BODY = "{% for m in messages %}" + HEADER + "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
MARKED_BODY = (
    "{% for m in messages %}" + HEADER + "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
    "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
)  # fmt: skip
FOOTER = ASKS.replace("{% endif %}", "{% else %}{{ '<|endoftext|>' }}{% endif %}")
HI, HELLO = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
BYE = {"role": "assistant", "content": "bye"}
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
