"""What a target's files and a user say beside conversations: end tokens, template arguments, dates, named templates,
context, the head; and what commands make of a file of rows."""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from small_drafts import config_of, random_params, vocab_of, write_export
from test_contracts import DRAFTS, TARGET_HF, W
from test_turns import ASKS, BODY, HELLO, HI, IM, Kind, tokenizer_of
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
from flaxdraft.files.fetch import content_of
from flaxdraft.files.gguf_file import GGUFCheckpoint
from flaxdraft.run.run import run
from flaxdraft.run.setup import claim_folders, prepare
from flaxdraft.run.target import RunTarget
from flaxdraft.serving.card import recorded_template
from flaxdraft.serving.trained_draft import Origin
from flaxdraft.stages.claims import RECORD

WIDTH, VOCAB = 8, 300
DATED = "{{'<|im_start|>system\nToday: ' + strftime_now(form or '%d %b %Y %H:%M') + '<|im_end|>\n'}}"
MOOD = "{% if mood is defined %}{{ 'Be ' + mood + '. ' }}{% endif %}"


def target_at(directory: Path, template=BODY + ASKS, kind=Kind(), named=None, **config) -> Path:  # noqa: B008
    """A Llama of one layer, of which the embedding alone is there; nothing computes with it."""
    directory.mkdir(parents=True)
    tokenizer = tokenizer_of(template, IM, kind)
    tokenizer.save_pretrained(directory)
    if named is not None:
        (directory / "chat_template.jinja").unlink(missing_ok=True)
        path = directory / "tokenizer_config.json"
        held = json.loads(path.read_text())
        held["chat_template"] = [{"name": name, "template": text} for name, text in named.items()]
        path.write_text(json.dumps(held))
    hf = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB, "hidden_size": WIDTH,
        "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "max_position_embeddings": 512,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(hf | config))
    embedding = np.arange(VOCAB * WIDTH, dtype=np.float32).reshape(VOCAB, WIDTH)
    save_file({"model.embed_tokens.weight": embedding}, directory / "model.safetensors")
    return directory


def rows_at(path: Path, *rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def said(capsys) -> str:
    return " ".join(capsys.readouterr().out.split())


def packed(text: str) -> str:
    """Without the breaks of a narrow table."""
    return "".join(text.split())


# End tokens.


def test_end_tokens_are_those_of_all_who_name_them(tmp_path):
    kind = Kind(named=False)
    ids = tokenizer_of(BODY + ASKS, IM, kind).get_vocab()
    path = target_at(tmp_path / "t", kind=kind, eos_token_id=[3, VOCAB + 5])
    assert targets.open_target(str(path)).stop_tokens == [3, ids["<eos>"]]  # what it has no row for it never writes
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [ids["<eos>"], ids["<|im_end|>"]]}))
    opened = targets.open_target(str(path))
    assert opened.stop_tokens == sorted([3, ids["<eos>"], ids["<|im_end|>"]])
    assert {*opened.special_tokens} >= {*opened.stop_tokens}
    for wrong in ({"eos_token_id": "<eos>"}, {"eos_token_id": [True]}):
        (path / "generation_config.json").write_text(json.dumps(wrong))
        with pytest.raises(InputError, match=r"generation_config.json: eos_token_id: found"):
            targets.open_target(str(path)).stop_tokens  # noqa: B018
    (path / "generation_config.json").write_text("{")
    with pytest.raises(InputError, match=r"generation_config.json: not valid JSON"):
        targets.open_target(str(path)).stop_tokens  # noqa: B018


def without_eos(path: Path) -> Path:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (path / name).exists():
            held = json.loads((path / name).read_text())
            held.pop("eos_token", None)
            (path / name).write_text(json.dumps(held))
    return path


def test_no_end_token_is_refused_before_anything_is_loaded(tmp_path, capsys, monkeypatch):
    path = without_eos(target_at(tmp_path / "t"))
    file = rows_at(tmp_path / "c.jsonl", {"messages": [HI, HELLO]})
    monkeypatch.setattr(targets, "from_pretrained", lambda *args, **how: pytest.fail("it was loaded"))
    assert main(["regenerate", str(file), str(tmp_path / "out"), "--target", str(path)]) == 2
    assert "names no token that ends an answer" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def gguf_with(path, monkeypatch, add=(), drop=()):
    """A tiny model with other metadata."""
    import gguf

    real = gguf.GGUFWriter.write_header_to_file

    def header(self, *args, **how):
        for name, value in add:
            getattr(self, name)(value)
        return real(self, *args, **how)

    with monkeypatch.context() as patched:
        patched.setattr(gguf.GGUFWriter, "write_header_to_file", header)
        for name in drop:
            patched.setattr(gguf.GGUFWriter, name, lambda self, *args: None)
        return write_tiny_gguf(path, num_layers=1)


def test_gguf_ids(tmp_path, monkeypatch):
    more = (("add_eot_token_id", 0), ("add_eom_token_id", 1))
    assert targets.open_target(str(gguf_with(tmp_path / "a.gguf", monkeypatch, more))).stop_tokens == [0, 1, 2]
    less = ("add_pad_token_id", "add_bos_token_id", "add_eos_token_id", "add_chat_template", "add_token_types")
    tokenizer = GGUFCheckpoint(gguf_with(tmp_path / "b.gguf", monkeypatch, drop=less)).tokenizer()
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (None, None, None)
    assert tokenizer.chat_template is None
    named = [{"name": "default", "template": TEMPLATE}, {"name": "tool_use", "template": "tools"}]
    both = gguf_with(tmp_path / "c.gguf", monkeypatch, (("add_chat_template", named),), drop=())
    assert GGUFCheckpoint(both).tokenizer().chat_template == {"default": TEMPLATE, "tool_use": "tools"}


def test_gguf_parts(tmp_path):
    import gguf

    whole = write_tiny_gguf(tmp_path / "whole.gguf", num_layers=1)
    reader = gguf.GGUFReader(whole)
    names = [tensor.name for tensor in reader.tensors]
    for number in (1, 2):
        part = tmp_path / f"m-{number:05d}-of-00002.gguf"
        writer = gguf.GGUFWriter(part, "llama")
        if number == 1:
            for field in reader.fields.values():
                if not field.name.startswith(("GGUF.", "general.architecture")):
                    kind, *inner = field.types
                    writer.add_key_value(field.name, field.contents(), kind, inner[-1] if inner else None)
        writer.add_uint16("split.no", number - 1)
        writer.add_uint16("split.count", 2)
        writer.add_int32("split.tensors.count", len(names))
        for tensor in reader.tensors[number - 1 :: 2]:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    one, parts = GGUFCheckpoint(whole), [GGUFCheckpoint(tmp_path / f"m-0000{n}-of-00002.gguf") for n in (1, 2)]
    for split in parts:
        assert (split.config, {*split.names()}) == (one.config, {*one.names()})
        for name in one.names():
            index = tuple(slice(None) for _ in one.shape(name))
            np.testing.assert_array_equal(split.read(name, index), one.read(name, index))
    first = tmp_path / "m-00001-of-00002.gguf"
    digest = content_of(str(first), None)
    second = tmp_path / "m-00002-of-00002.gguf"
    second.write_bytes(second.read_bytes()[:-1] + b"x")
    assert content_of(str(first), None) != digest
    shutil.copy(first, tmp_path / "renamed.gguf")
    with pytest.raises(InputError, match=r"renamed.gguf: is one of 2 parts, found 1; keep the names"):
        GGUFCheckpoint(tmp_path / "renamed.gguf")
    second.unlink()
    with pytest.raises(InputError, match=r"m-00002-of-00002.gguf is not beside it"):
        targets.open_target(str(first))


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
    path = target_at(tmp_path / "t", MOOD + BODY + ASKS)
    asked = lambda *given: argparse.Namespace(  # noqa: E731
        draft=tmp_path / "draft", target=str(path), template=[*given], date=None, out=tmp_path / "out",
        max_new_tokens=500,
    )  # fmt: skip
    assert template_of_draft(asked(), [])[0].arguments == {"mood": "kind"}
    assert template_of_draft(asked(("mood", "kind")), [])[1] == {"template": {"mood": "kind"}}
    with pytest.raises(InputError, match=r"--template: found {'mood': 'bad'}, the draft was trained with"):
        template_of_draft(asked(("mood", "bad")), [])
    with pytest.raises(InputError, match=r"--max-new-tokens: found 500; after turn 1 of prompt 'x' .* context of 512"):
        template_of_draft(asked(), [Prompt("x", "c", "held_out", ("hi",))])


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
    monkeypatch.setattr(targets, "from_pretrained", lambda *args, **how: pytest.fail("it was loaded"))
    system = {"role": "system", "content": "s"}
    rows = {"messages": [HI]}, {"messages": [system, HI]}, {"input_ids": [1, 2], "loss_mask": [0, 1]}
    file, out = rows_at(tmp_path / "c.jsonl", *rows), str(tmp_path / "out")
    limits = ["--max-prompt-tokens", "100", "--max-new-tokens", "9"]
    assert main(["regenerate", str(file), out, "--target", str(path), *limits]) == 2
    error = capsys.readouterr().err
    for words in ("2 bad rows", "row 2: the chat template refuses", "row 3: is tokenised already"):
        assert words in error


# The target itself.


def test_a_tied_head_that_differs_is_said(tmp_path, capsys):
    path = target_at(tmp_path / "t", tie_word_embeddings=True)
    embedding = np.arange(VOCAB * WIDTH, dtype=np.float32).reshape(VOCAB, WIDTH)
    for change, words in ((0.0, False), (1.0, True)):
        head = embedding.copy()
        head[-1, -1] += change
        save_file({"model.embed_tokens.weight": embedding, "lm_head.weight": head}, path / "model.safetensors")
        targets.say_which_head(targets.open_target(str(path)))
        assert ("lm_head.weight differs from model.embed_tokens.weight. The embedding is used" in said(capsys)) == words


@pytest.mark.parametrize(
    ("config", "context"),
    [
        ({}, 512),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, 2048),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}}, 2048),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}}, 512),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                           "original_max_position_embeddings": 64}}, 512),
    ],
)  # fmt: skip
def test_the_context_considers_rope_scaling(tmp_path, config, context):
    assert targets.open_target(str(target_at(tmp_path / "t", **config))).config().context == context


def test_rows_are_cut_at_the_targets_context(tmp_path, capsys):
    path = target_at(tmp_path / "t", max_position_embeddings=40)
    file = rows_at(tmp_path / "c.jsonl", {"messages": [HI, {**HELLO, "content": "hello " * 50}]})
    assert main(["show", str(file), "--target", str(path)]) == 0
    assert "1 rows, 40 tokens, 19 supervised; 1 rows cut at 40 tokens" in said(capsys)
    assert main(["check", str(file), "--target", str(path)]) == 0
    assert "cut 1 rows at 40 tokens" in said(capsys)


@pytest.mark.parametrize(("name", "words"), [
    ("tiktoken.model", "TikTokenConverter("), ("tokenizer.model", "AutoTokenizer.from_pretrained("),
])  # fmt: skip
def test_how_a_missing_tokenizer_is_made(tmp_path, capsys, name, words):
    path = target_at(tmp_path / "t")
    (path / "tokenizer.json").unlink()
    (path / name).write_text("YQ== 0\n")
    assert main(["show", str(rows_at(tmp_path / "c.jsonl", {"messages": [HI]})), "--target", str(path)]) == 2
    error = capsys.readouterr().err
    assert "has no tokenizer" in error
    assert words in error


# A file of rows.

GOOD = {"messages": [HI, HELLO]}


def test_all_bad_rows_of_a_file_are_counted(tmp_path, capsys):
    path = target_at(tmp_path / "t")
    bad = [{"messages": []}, {"text": "x"}, *[{"messages": [{"role": "bot", "content": str(i)}]} for i in range(10)]]
    file = rows_at(tmp_path / "c.jsonl", GOOD, *bad, GOOD)
    file.write_text(file.read_text() + "{\n")
    assert main(["show", str(file), "--target", str(path)]) == 2
    error = capsys.readouterr().err
    assert "13 bad rows; mend them, or leave them out with --on-bad-row skip" in error
    assert error.count("\n  /") == 10
    assert "and 3 more" in error
    assert main(["show", str(file), "--target", str(path), "--on-bad-row", "skip"]) == 0
    out = said(capsys)
    assert "2 rows," in out
    assert "13 bad rows left out" in out


@pytest.mark.parametrize("indent", [None, 1])
def test_a_json_array_is_read(tmp_path, capsys, indent):
    file, path = tmp_path / "c.json", target_at(tmp_path / "t")
    file.write_text(json.dumps([GOOD, {**GOOD, "tools": ""}], indent=indent))
    assert main(["show", str(file), "--target", str(path)]) == 0
    assert "2 rows," in said(capsys)
    file.write_text(json.dumps([GOOD], indent=1)[:-3])
    assert main(["show", str(file), "--target", str(path)]) == 2
    assert "begins like a JSON array and is none" in capsys.readouterr().err


def test_a_file_is_checked_in_one_table(tmp_path, capsys):
    path = target_at(tmp_path / "t", BODY.replace("m['content']", "m['content'].split('</think>')[-1]") + ASKS)
    picture = tmp_path / "lengths.png"
    file = rows_at(tmp_path / "c.jsonl", GOOD, {"messages": [HI]}, {"messages": [HI, HELLO, HI]})
    call = ["check", str(file), "--target", str(path)]
    assert main([*call, "--out", str(picture)]) == 0
    out = said(capsys)
    for words in ("rows 3, 0 of them bad", "tokens 76", "supervised 12, 15.8% of all", "256 tokens hold 100.0%",
                  f"supervise nothing 1 rows, first {file} row 2", "16 - 31 1 ###"):  # fmt: skip
        assert packed(words) in packed(out), (words, out)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main([*call, "--max-silent", "0.1"]) == 1
    thought = {"messages": [HI, {**HELLO, "content": "<think>hm</think>yes"}]}
    lost = {"messages": [{**HI, "content": "a</think>"}, HELLO]}
    rows_at(file, GOOD, {"messages": []}, {"messages": []}, thought, lost)
    capsys.readouterr()
    assert main(call) == 1
    out = said(capsys)
    for words in (
        f"bad 2 x {file} row 2: messages: expected a non-empty list",
        f"dropped reasoning of an assistant, by the chat template, in 1 rows, first {file} row 4",
        f"dropped what a user says, by the chat template, in 1 rows, first {file} row 5",
    ):
        assert packed(words) in packed(out), (words, out)
    assert main([*call, "--on-bad-row", "skip"]) == 1  # what a user said is lost all the same
