"""What answers, stores and cards record of a chat template holds for whatever is made of them."""

import argparse
import json

import pytest
from small_chats import ASKS, BODY, HELLO, HI
from small_targets import DATED, MOOD, VOCAB, rows_at, said, target_at
from tiny import TEMPLATE, write_tiny_gguf
from tiny_runs import make_workspace

from flaxdraft import targets
from flaxdraft.config import load_config
from flaxdraft.data.__main__ import main
from flaxdraft.errors import InputError
from flaxdraft.files.template_text import may_write_date
from flaxdraft.run.chat_options import template_of_rows
from flaxdraft.run.run import run
from flaxdraft.run.setup import prepare
from flaxdraft.run.target import RunTarget
from flaxdraft.serving.card import recorded_template
from flaxdraft.stages.claims import RECORD


def answered(tmp_path, **recorded):
    (tmp_path / "answers").mkdir()
    file = rows_at(tmp_path / "answers" / "conversations.jsonl", {"messages": [HI, HELLO]})
    (file.parent / RECORD).write_text(json.dumps({"max_new_tokens": 5, "template": {}} | recorded))
    return file


@pytest.mark.parametrize("command", ["show", "check", "capture"])
def test_answers_are_rendered_as_the_target_was_asked(command, tmp_path, capsys):
    target = target_at(tmp_path / "t", MOOD + BODY + ASKS, num_hidden_layers=8)
    file = answered(tmp_path, template={"mood": "kind"})
    call = [command, str(file), *[str(tmp_path / "out")] * (command == "capture"), "--target", str(target)]
    call += ["--plan"] * (command == "capture")
    assert main(call) == 2
    error = capsys.readouterr().err
    assert f"--template: found {{}}, the target answered {file} with {{'mood': 'kind'}}; give the same" in error
    assert main([*call, "--template", "mood=kind"]) == 0


def test_what_a_target_writes_need_not_stand_in_its_tokenizer(tmp_path, capsys):
    """Embeddings are padded, and a target may well write a row of the padding."""
    target, file = target_at(tmp_path / "t"), answered(tmp_path)
    rows_at(file, {"input_ids": [1, VOCAB - 1], "loss_mask": [0, 1]})
    for command in ("show", "check"):
        assert main([command, str(file), "--target", str(target)]) == 0, capsys.readouterr().err
    root = make_workspace(tmp_path, target_at(tmp_path / "deep", num_hidden_layers=8))
    setup = prepare(load_config(str(root / "run.yaml"), [f"data.conversations={file}"]))
    assert RunTarget(setup).given.lengths.tolist() == [2]
    rows_at(file, {"input_ids": [1, VOCAB], "loss_mask": [0, 1]})
    assert main(["show", str(file), "--target", str(target)]) == 2
    (file.parent / RECORD).unlink()
    rows_at(file, {"input_ids": [1, VOCAB - 1], "loss_mask": [0, 1]})
    assert main(["show", str(file), "--target", str(target)]) == 2


def test_answers_keep_their_date(tmp_path, capsys):
    target = target_at(tmp_path / "t", DATED + BODY + ASKS)
    file = answered(tmp_path, date="2026-01-31T12:05")
    assert main(["show", str(file), "--target", str(target)]) == 0
    assert "Today: 31 Jan 2026 12:05" in said(capsys)
    assert main(["show", str(file), "--target", str(target), "--date", "2026-02-01"]) == 2
    assert f"--date: found 2026-02-01, {file} is of 2026-01-31T12:05; give that one" in capsys.readouterr().err
    asked = argparse.Namespace(file=tmp_path / "other.jsonl", template=[], date="2026-02-01")
    tokenizer = targets.open_target(str(target)).needed_tokenizer()
    assert template_of_rows(asked, tokenizer).date == "2026-02-01"


def test_a_run_does_not_train_on_answers_or_stores_of_another_day(tmp_path, capsys):
    path = write_tiny_gguf(tmp_path / "dated.gguf", num_layers=8, template=DATED + TEMPLATE)
    root, file = make_workspace(tmp_path, path), answered(tmp_path, date="2026-01-31")
    store = tmp_path / "store"
    call = ["capture", str(file), str(store), "--target", str(path), "--dtype", "float32", "--algorithm", "eagle3"]
    assert main(call) == 0, capsys.readouterr().err
    for given in (f"data.conversations={file}", f"data.store={store}"):
        with pytest.raises(InputError, match=r"data.date: found 2026-02-01, .* is of 2026-01-31"):
            run(load_config(str(root / "run.yaml"), [given, "data.date=2026-02-01"]))


def test_the_first_part_of_a_split_model_holds_its_template(tmp_path):
    first, second = (tmp_path / f"m-0000{number}-of-00002.gguf" for number in (1, 2))
    write_tiny_gguf(first, num_layers=1, template=DATED + TEMPLATE)
    second.write_bytes(b"tensors")
    assert may_write_date(second)
    first.unlink()
    with pytest.raises(InputError, match=r"m-00001-of-00002.gguf is not beside it"):
        may_write_date(second)


@pytest.mark.parametrize(
    ("head", "found"),
    [
        ("---\ntags: [flaxdraft]\nchat_template_kwargs:\n  mood: kind\n---\n", {"mood": "kind"}),
        ("---\nchat_template_kwargs: {mood: 2026-01-31}\n---\n", {"mood": "2026-01-31"}),
        ("---\ntags: [flaxdraft, eagle3]\n---\n", {}),
        ("---\ntags: [eagle3]\nlicense: mit\n---\n", None),
        ("---\ntags: [other]\nlibrary_name: like-flaxdraft\n---\n", None),
        ("---\nno: [yaml\n---\n", None),
        ("# A draft\nchat_template_kwargs: {mood: kind}\n", None),
        ("", None),
    ],
)
def test_cards_of_all_kinds(head, found, tmp_path):
    (tmp_path / "README.md").write_text(f"{head}# Draft\n")
    assert recorded_template(tmp_path) == found


@pytest.mark.parametrize("text", ["{", "[]", '{"data": [1]}', '{"data": "x"}', '{"data": {}}', "{}", '{"other": 1}'])
def test_a_file_of_the_same_name_that_is_no_record(text, tmp_path):
    (tmp_path / "inputs.json").write_text(text)
    assert recorded_template(tmp_path) is None


@pytest.mark.parametrize(
    ("value", "words"), [("[1]", r"found \[1\], expected a mapping"), ("{a: .nan}", "expected"), ("[", "are no YAML")]
)
def test_cards_that_are_damaged(value, words, tmp_path):
    (tmp_path / "README.md").write_text(f"---\nchat_template_kwargs: {value}\n---\n")
    with pytest.raises(InputError, match=rf"README.md: .*{words}"):
        recorded_template(tmp_path)
