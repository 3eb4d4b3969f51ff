"""What is supervised under templates that are put together from parts, so that what a target would write is known: what
stands behind the generation prompt, up to the end of the turn."""

import dataclasses
import json

from hypothesis import given, settings
from hypothesis import strategies as st
from small_chats import IM, Kind, row_of, spans, tokenizer_of

ENDS = ("<|im_end|>", " <|im_end|>", "\n<|im_end|>", "#END", "")
MARKED = {"": "", "content": "C", "content and end": "CE", "all but the header": "LCE", "what follows, too": "LCEA",
          "all": "HLCEA"}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Built:
    """A template by its parts: the header of a message around its role, what stands before an assistant's content, what
    ends a turn, and what follows."""

    header: tuple[str, str]
    lead: str
    end: str
    after: str
    prompt: str  # the header, all of it but its last character, none, or the header behind whatever is no answer
    footer: str  # behind the last turn, where no answer is asked for
    first: str  # before all, or the system prompt where none is given
    marks: str
    refuses: str  # before a user has spoken, or to ask for an answer to somebody else

    @property
    def asks(self) -> str:
        whole = "assistant".join(self.header)
        return {"whole": whole, "cut": whole[:-1], "none": "", "always": whole}[self.prompt]

    def text(self) -> str:
        say = lambda text: "{{ " + json.dumps(text) + " }}"  # noqa: E731
        parts = {
            "H": f"{say(self.header[0])}{{{{ m.role }}}}{say(self.header[1])}", "L": say(self.lead),
            "C": "{{ m.content }}", "E": say(self.end), "A": say(self.after),
        }  # fmt: skip
        marked = MARKED[self.marks]
        turn = "".join(
            "{% generation %}" * (part == marked[:1]) + text + "{% endgeneration %}" * (part == marked[-1:])
            for part, text in parts.items()
        )
        plain = "".join(text for part, text in parts.items() if part != "L")
        body = f"{{% if m.role == 'assistant' %}}{turn}{{% else %}}{plain}{{% endif %}}"
        footer = f"{{% if not add_generation_prompt %}}{say(self.footer)}{{% endif %}}"
        if self.prompt == "always":
            asks = f"{{% if messages[-1].role != 'assistant' %}}{say(self.asks)}{{% else %}}{footer}{{% endif %}}"
        else:
            asks = f"{{% if add_generation_prompt %}}{say(self.asks)}{{% endif %}}{footer}"
        return f"{self._refusals()}{self._first(say)}{{% for m in messages %}}{body}{{% endfor %}}{asks}"

    def _first(self, say) -> str:
        if self.first != "system":
            return say(self.first)
        system = say(f"{'system'.join(self.header)}Be kind.{self.end}{self.after}")
        return f"{{% if messages[0].role != 'system' %}}{system}{{% endif %}}"

    def _refusals(self) -> str:
        what = {
            "unspoken": "not messages | selectattr('role', 'equalto', 'user') | list",
            "unasked": "add_generation_prompt and messages[-1].role != 'user'",
        }.get(self.refuses)
        return f"{{% if {what} %}}{{{{ raise_exception('no') }}}}{{% endif %}}" if what else ""

    def written(self, content: str) -> str:
        """What the target would write of a turn."""
        end = self.end or self.after  # white space alone ends it
        if self.prompt == "none" and self.marks not in ("", "all"):  # marks alone tell where the header ends
            inside = "L" in MARKED[self.marks]
            return self.lead * inside + content + (end if self.end or self.marks == "what follows, too" else "")
        return ("assistant".join(self.header) + self.lead + content + end).removeprefix(self.asks)


@st.composite
def built(draw):
    end, prompt = draw(st.sampled_from(ENDS)), draw(st.sampled_from(["whole", "cut", "none", "always"]))
    footers = ["", "<|endoftext|>"] if "<|im_end|>" in end and prompt != "none" else [""]
    made = Built(
        draw(st.sampled_from([("<|im_start|>", "\n"), ("", ": "), ("[", "]"), ("\n### ", ":\n")])),
        draw(st.sampled_from(["", " ", "\n", "<think>\n\n</think>\n\n"])), end,
        draw(st.sampled_from(["", "\n", "\n\n", " "])), prompt, draw(st.sampled_from(footers)),
        draw(st.sampled_from(["", "<|endoftext|>", "system"])), draw(st.sampled_from([*MARKED])),
        draw(st.sampled_from(["", "", "unasked", *(["unspoken"] if end else [])])),
    )  # fmt: skip
    roles = draw(st.lists(st.sampled_from(["user", "assistant"]), min_size=1, max_size=5))
    roles = ["system"] * draw(st.booleans()) + roles + ["user"] * (made.refuses == "unspoken")
    contents = ["hi", "a b", " x ", "Q", "Zz", "y\n", *([""] if made.end else [])]
    return made, [{"role": role, "content": draw(st.sampled_from(contents))} for role in roles]


@given(built(), st.booleans())
@settings(max_examples=250, deadline=None, derandomize=True)
def test_supervised_is_what_the_target_would_write(case, trimmed):
    made, messages = case
    bos, end, others = IM
    tokenizer = tokenizer_of(made.text(), (bos, end, others), Kind(trimmed=trimmed, merges=False))
    stops = tokenizer.convert_tokens_to_ids([end, bos])
    want = [made.written(message["content"]) for message in messages if message["role"] == "assistant"]
    assert "".join(spans(tokenizer, row_of(messages), stop_tokens=stops)) == "".join(want)
