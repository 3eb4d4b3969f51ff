"""What a user says beside conversations: template arguments, dates, named templates; and what is refused before the
first minute is spent."""

import argparse
import json

import pytest
from small_chats import ASKS, BODY, HELLO, HI, IM, Kind, tokenizer_of
from small_drafts import config_of, random_params, vocab_of, write_export
from small_targets import DATED, MOOD, rows_at, said, target_at
from test_contracts import DRAFTS, TARGET_HF, W
from tiny import TEMPLATE, write_tiny_gguf
from tiny_runs import make_workspace

from flaxdraft import targets
from flaxdraft.config import load_config
from flaxdraft.data import chat_template
from flaxdraft.data.__main__ import main
from flaxdraft.data.chat_template import ChatTemplate
from flaxdraft.data.prompts import Prompt, render_messages
from flaxdraft.data.store import PLAN
from flaxdraft.errors import InputError
from flaxdraft.evaluate.__main__ import _template as template_of_draft
from flaxdraft.run.run import run
from flaxdraft.run.setup import claim_folders, prepare
from flaxdraft.run.target import RunTarget
from flaxdraft.serving.card import recorded_template
from flaxdraft.serving.trained_draft import Origin
from flaxdraft.stages.claims import RECORD

# What the chat template is given.


def test_arguments_and_the_date_reach_the_template():
    tokenizer = tokenizer_of(MOOD + DATED + BODY + ASKS, IM, Kind())
    read = lambda **how: tokenizer.decode(render_messages(tokenizer, [HI], "here", template=ChatTemplate(**how)))  # noqa: E731
    assert "Be kind. " in read(arguments={"mood": "kind"})
    assert "Today: 31 Jan 2026 12:05<" in read(date="2026-01-31T12:05")
    assert "Today: Jan '26 100%<" in read(date="2026-01-31", arguments={"form": "%b '%y 100%%"})
    for name, message in (("moot", "knows no 'moot'"), ("tools", "'tools' is no argument of a template's own")):
        with pytest.raises(InputError, match=f"data.template: .*{message}"):
            ChatTemplate({name: 1}).check(tokenizer, "data.template")


def test_a_template_is_what_it_was_whatever_stands_before_it():
    """The clock is put in front of it, and nothing else changes."""
    for text in ("\n  x{{ strftime_now('%Y') }}", "  {%- if true %}\n y{% endif %}{{ strftime_now('%Y') }}\n\n"):
        tokenizer = tokenizer_of(text, IM, Kind())
        now = tokenizer.apply_chat_template([HI], tokenize=False)
        keywords = ChatTemplate().keywords(tokenizer, None)
        assert tokenizer.apply_chat_template([HI], tokenize=False, **keywords) == now


def test_templates_by_name(tmp_path, capsys):
    tools = "{{ '@' }}" + BODY + ASKS
    path = target_at(tmp_path / "t", named={"default": BODY + ASKS, "tool_use": "{{ tools | tojson }}" + tools})
    tool = {"type": "function", "function": {"name": "weather"}}
    rows = {"messages": [HI, HELLO]}, {"messages": [HI, HELLO], "tools": [tool]}
    assert main(["show", str(rows_at(tmp_path / "c.jsonl", *rows)), "--target", str(path)]) == 0
    assert said(capsys).count("@") == 1  # of the second row alone
    file = str(tmp_path / "c.jsonl")
    assert main(["check", file, "--target", str(path)]) == 0
    other = target_at(tmp_path / "other", named={"rag": BODY + ASKS, "tool_use": tools})
    assert main(["show", file, "--target", str(other)]) == 2
    assert "several chat templates (rag, tool_use) and none is called 'default'" in capsys.readouterr().err


# Dates and arguments of runs.


@pytest.fixture
def dated_run(tmp_path, monkeypatch):
    """prepare(), at some minute, of a run whose template writes the date and reads an argument."""
    path = write_tiny_gguf(tmp_path / "dated.gguf", num_layers=8, template=MOOD + DATED + TEMPLATE)
    root = make_workspace(tmp_path, path)

    def at(minute, *overrides):
        monkeypatch.setattr("flaxdraft.run.dates.now", lambda: f"2026-01-31T12:0{minute}")
        return prepare(load_config(str(root / "run.yaml"), [*overrides]))

    return at


def test_a_run_keeps_the_date_of_its_start(dated_run):
    first = dated_run(0)
    claim_folders(first)
    later = dated_run(1)
    claim_folders(later)
    assert later.config.data.date == "2026-01-31T12:00"
    texts = [setup_text(setup) for setup in (first, later)]
    assert texts[0] == texts[1]
    assert "Today: 31 Jan 2026 12:00" in texts[0]
    other = dated_run(2, "name=other")  # another draft beside it shares the answers
    claim_folders(other)
    assert other.config.data.date == first.config.data.date
    (later.data_dir / "result").touch()
    with pytest.raises(InputError, match=r"data.date: there '2026-01-31T12:00', here '2026-02-01'"):
        claim_folders(dated_run(3, "data.date=2026-02-01"))


def setup_text(setup) -> str:
    target = RunTarget(setup)
    return target.tokenizer.decode(render_messages(target.tokenizer, [HI], "here", template=target.template))


def test_template_arguments_are_inputs_of_a_run(dated_run):
    setup = dated_run(0, "data.template={mood: kind}", "data.date=2026-01-31")
    assert "Be kind. " in setup_text(setup)
    claim_folders(setup)
    for folder in (setup.data_dir, setup.draft_dir):
        recorded = json.loads((folder / RECORD).read_text())["data"]
        assert (recorded["template"], recorded["date"]) == ({"mood": "kind"}, "2026-01-31")
        (folder / "result").touch()
    assert recorded_template(setup.draft_dir) == {"mood": "kind"}
    with pytest.raises(InputError, match=r"data.template.mood: there 'kind', here None"):
        claim_folders(dated_run(0))
    with pytest.raises(InputError, match=r"data.template: the target's chat template knows no 'moot'"):
        setup_text(dated_run(0, "data.template={moot: kind}"))


def test_a_template_without_the_date_records_none(tmp_path, tiny_gguf):
    root = make_workspace(tmp_path, tiny_gguf)
    setup = prepare(load_config(str(root / "run.yaml"), []))
    assert setup.config.data.date is None
    assert "date" not in setup.draft_inputs["data"]  # folders of earlier versions do not name it


def test_a_capture_of_two_days_has_one_date(tmp_path, monkeypatch, capsys):
    path = write_tiny_gguf(tmp_path / "dated.gguf", num_layers=8, template=DATED + TEMPLATE)
    file, out = rows_at(tmp_path / "c.jsonl", *[{"messages": [HI, HELLO]}] * 4), tmp_path / "store"
    call = ["capture", str(file), str(out), "--target", str(path), "--dtype", "float32", "--shard-tokens", "100"]
    for part, minute in (("0/2", 0), ("1/2", 1)):
        monkeypatch.setattr(chat_template, "now", lambda minute=minute: f"2026-01-31T12:0{minute}")
        assert main([*call, "--part", part]) == 0, capsys.readouterr().err
    assert json.loads((out / PLAN).read_text())["date"] == "2026-01-31T12:00"
    assert main([*call, "--date", "2026-02-01"]) == 2
    assert "date: there '2026-01-31T12:00', here '2026-02-01'" in capsys.readouterr().err.replace("\n", " ")


def test_answers_with_other_arguments_are_refused(tmp_path, tiny_gguf):
    root = make_workspace(tmp_path, tiny_gguf)
    (tmp_path / "answers").mkdir()
    file = rows_at(tmp_path / "answers" / "conversations.jsonl", {"messages": [HI, HELLO]})
    (file.parent / RECORD).write_text(json.dumps({"max_new_tokens": 5, "template": {"mood": "kind"}}))
    with pytest.raises(InputError, match=r"data.template: found {}, the target answered .* with {'mood': 'kind'}"):
        run(load_config(str(root / "run.yaml"), [f"data.conversations={file}"]))


def test_the_card_records_the_arguments_and_evaluation_takes_them(tmp_path):
    config = config_of("llama")
    write_export(
        tmp_path / "draft", DRAFTS["llama"], config, random_params("llama", config), vocab_of(W), tap_layers=(1, 3, 4),
        target=TARGET_HF, origin=Origin("T", None, None, {"mood": "kind"}),
    )  # fmt: skip
    card = (tmp_path / "draft" / "README.md").read_text()
    assert card.count('"chat_template_kwargs": {"mood": "kind"}') == 1  # in requests
    assert recorded_template(tmp_path / "draft") == {"mood": "kind"}
    opened = targets.open_target(str(target_at(tmp_path / "t", MOOD + BODY + ASKS)))
    asked = lambda *given: argparse.Namespace(  # noqa: E731
        draft=tmp_path / "draft", template=[*given], date=None, out=tmp_path / "out", max_new_tokens=500
    )
    assert template_of_draft(asked(), opened, [])[0].arguments == {"mood": "kind"}
    assert template_of_draft(asked(("mood", "kind")), opened, [])[1] == {"template": {"mood": "kind"}}
    with pytest.raises(InputError, match=r"--template: found {'mood': 'bad'}, the draft was trained with"):
        template_of_draft(asked(("mood", "bad")), opened, [])
    with pytest.raises(InputError, match=r"--max-new-tokens: found 500; after turn 1 of prompt 'x' .* context of 512"):
        template_of_draft(asked(), opened, [Prompt("x", "c", "held_out", ("hi",))])


# What is refused before the first minute is spent.


def test_bad_conversations_are_refused_before_the_target_is_asked(tmp_path, tiny_gguf, monkeypatch):
    root = make_workspace(tmp_path, tiny_gguf)
    rows_at(tmp_path / "chats.jsonl", {"messages": [HI, HELLO]}, {"messages": []})
    monkeypatch.setattr(RunTarget, "loaded", property(lambda target: pytest.fail("it was loaded")))
    config = load_config(str(root / "run.yaml"), [f"data.conversations={tmp_path / 'chats.jsonl'}"])
    with pytest.raises(InputError, match=r"1 bad row; mend them, or leave them out with data.on_bad_row=skip"):
        run(config)


def test_conversations_that_cannot_be_asked_are_refused_before_the_target_is_loaded(tmp_path, capsys, monkeypatch):
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    path = target_at(tmp_path / "t", refusing + BODY + ASKS)
    monkeypatch.setattr(targets, "load_target", lambda *args, **how: pytest.fail("it was loaded"))
    system = {"role": "system", "content": "s"}
    tokens = {"input_ids": [1, 2], "loss_mask": [0, 1]}
    rows = {"id": "a", "messages": [HI]}, {"messages": [system, HI]}, tokens, {"id": "a", "messages": [HI]}
    file, out = rows_at(tmp_path / "c.jsonl", *rows), str(tmp_path / "out")
    limits = ["--max-prompt-tokens", "100", "--max-new-tokens", "9"]
    assert main(["regenerate", str(file), out, "--target", str(path), *limits]) == 2
    error = capsys.readouterr().err
    for words in ("3 bad rows", "row 2: the chat template refuses", "row 3: is tokenised already",
                  "row 4: id 'a' stands in"):  # fmt: skip
        assert words in error
    assert f"{file} row 1 already" in error


def test_every_turn_can_be_asked(tmp_path, capsys, monkeypatch):
    refusing = "{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ raise_exception('late') }}"
    path = target_at(tmp_path / "t", refusing + "{% endif %}{% endfor %}" + BODY + ASKS)
    monkeypatch.setattr(targets, "load_target", lambda *args, **how: pytest.fail("it was loaded"))
    tool = {"role": "tool", "content": "3"}  # such are left out, whatever the template makes of them
    system = {"role": "system", "content": "s"}
    rows = {"messages": [HI, HELLO, system, HI]}, {"messages": [HI, tool, HELLO, system, HI]}
    file, out = rows_at(tmp_path / "c.jsonl", *rows), str(tmp_path / "out")
    limits = ["--max-prompt-tokens", "100", "--max-new-tokens", "9"]
    assert main(["regenerate", str(file), out, "--target", str(path), *limits]) == 2
    assert "1 bad row; " in (error := capsys.readouterr().err)
    assert "row 1: the chat template refuses this conversation: late" in error
