"""Numbers on the command line that no command can use, and arguments of a chat template that no folder can record."""

import json

import numpy as np
import pytest
from small_chats import ASKS, BODY, HELLO, HI
from small_targets import MOOD, rows_at, target_at
from tiny import TEMPLATE, write_tiny_gguf
from tiny_runs import make_workspace

from flaxdraft.config import load_config
from flaxdraft.data.__main__ import main, runs
from flaxdraft.errors import InputError
from flaxdraft.run.setup import claim_folders, prepare
from flaxdraft.stages.claims import RECORD
from flaxdraft.targets.__main__ import main as show_target


@pytest.mark.parametrize(
    ("command", "option", "value", "least"),
    [
        ("regenerate", "--rows", "0", 1), ("regenerate", "--seed", "-1", 0), ("regenerate", "--max-new-tokens", "0", 1),
        ("regenerate", "--max-prompt-tokens", "0", 1), ("show", "--rows", "-1", 1), ("show", "--max-length", "0", 8),
        ("check", "--max-length", "-5", 8), ("capture", "--shard-tokens", "0", 1),
        ("capture", "--batch-tokens", "x", 1),
    ],
)  # fmt: skip
def test_numbers_that_are_too_small(command, option, value, least, capsys):
    out = ["out"] if command in ("regenerate", "capture") else []
    with pytest.raises(SystemExit):
        main([command, "file.jsonl", *out, "--target", "t", option, value])
    assert f"{option}: found '{value}', expected a whole number from {least} on" in capsys.readouterr().err


def test_a_sample_of_fewer_than_no_tokens(capsys):
    with pytest.raises(SystemExit):
        show_target(["t", "--new-tokens", "-1"])
    assert "--new-tokens: found '-1', expected a whole number from 0 on" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["nan", "-0.1", "1.5", "x"])
@pytest.mark.parametrize("command", ["check", "capture"])
def test_shares_are_from_0_to_1(command, value, capsys):
    with pytest.raises(SystemExit):
        main([command, "file.jsonl", *["out"] * (command == "capture"), "--target", "t", "--max-silent", value])
    assert f"--max-silent: found '{value}', expected a share from 0 to 1" in capsys.readouterr().err


def test_runs_of_nothing():
    assert runs(np.array([], bool)) == []
    assert runs(np.array([True, False, False])) == [(0, 1, True), (1, 3, False)]


@pytest.mark.parametrize("value", [".nan", "!!binary aGk=", "!!set {a}", "[2026-01-31]", '"\\ud800"'])
def test_template_arguments_that_json_cannot_write(value, tmp_path, tiny_gguf, capsys):
    root = make_workspace(tmp_path, tiny_gguf)
    with pytest.raises(InputError, match=r"data.template: .*mood: found .*, expected what JSON can write"):
        load_config(str(root / "run.yaml"), [f"data.template={{mood: {value}}}"])
    with pytest.raises(SystemExit):
        main(["show", "c.jsonl", "--target", "t", "--template", f"mood={value}"])
    assert "--template: mood: found" in capsys.readouterr().err


def test_a_date_is_an_argument_like_others(tmp_path, capsys):
    path = write_tiny_gguf(tmp_path / "t.gguf", num_layers=8, template=MOOD + TEMPLATE)
    root = make_workspace(tmp_path, path)
    setup = prepare(load_config(str(root / "run.yaml"), ["data.template={mood: 2026-01-31}"]))
    claim_folders(setup)
    assert json.loads((setup.data_dir / RECORD).read_text())["data"]["template"] == {"mood": "2026-01-31"}
    target = target_at(tmp_path / "t", MOOD + BODY + ASKS)
    file = rows_at(tmp_path / "c.jsonl", {"messages": [HI, HELLO]})
    assert main(["show", str(file), "--target", str(target), "--template", "mood=2026-01-31"]) == 0
    assert "Be 2026-01-31." in capsys.readouterr().out
