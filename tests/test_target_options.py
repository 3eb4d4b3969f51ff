"""`--mesh` and `--dtype` of the commands that load a target."""

import argparse

import jax
import pytest
from small_chats import HELLO, HI
from small_drafts import config_of, random_params, vocab_of, write_export
from small_targets import rows_at, target_at
from test_contracts import DRAFTS, TARGET_HF, W
from tiny import write_prompts

from flaxdraft import targets
from flaxdraft.data.__main__ import main as data_main
from flaxdraft.errors import InputError
from flaxdraft.evaluate.__main__ import main as evaluate_main
from flaxdraft.nn.precision import of_both
from flaxdraft.run.target_options import dtype_or_default, mesh_shape, target_mesh
from flaxdraft.targets.__main__ import main as targets_main


def test_a_shape_is_read():
    assert mesh_shape("fsdp=4") == {"fsdp": 4}
    assert mesh_shape("data=2, tensor = 3,expert=1") == {"data": 2, "tensor": 3, "expert": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "found '', expected AXIS=N as in fsdp=4,tensor=2"),
        ("4", "found '4', expected AXIS=N"),
        ("fsdp=0", "found 'fsdp=0', expected AXIS=N"),
        ("fsdp=-2", "found 'fsdp=-2', expected AXIS=N"),
        ("fsdp=two", "found 'fsdp=two', expected AXIS=N"),
        ("fsdp=2,", "found '', expected AXIS=N"),
        ("fspd=2", "no axis 'fspd'; did you mean 'fsdp'"),
        ("sequence=2", "no axis 'sequence'; known keys: data, fsdp, tensor, expert"),
        ("fsdp=2,fsdp=2", "found fsdp twice"),
    ],
)
def test_a_wrong_shape_is_refused(text, message):
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        mesh_shape(text)


def test_every_command_refuses_it_by_name(capsys):
    common = ["--target", "t", "--mesh", "fspd=2"]
    for main, arguments in (
        (data_main, ["regenerate", "a", "b", *common]), (data_main, ["capture", "a", "b", *common]),
        (evaluate_main, ["d", "--prompts", "p", "--out", "o", *common]), (targets_main, ["t", "--mesh", "fspd=2"]),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
        assert "argument --mesh: no axis 'fspd'; did you mean 'fsdp'" in capsys.readouterr().err


class _EnoughError(Exception):
    """What was to be seen is seen."""


@pytest.mark.parametrize("command", ["regenerate", "capture", "evaluate", "targets"])
def test_every_command_loads_its_target_as_it_is_told(command, tmp_path, monkeypatch):
    path, loaded = target_at(tmp_path / "t", num_hidden_layers=8), []
    chats = rows_at(tmp_path / "chats.jsonl", {"messages": [HI, HELLO]})
    write_prompts(tmp_path / "prompts.jsonl")
    config = config_of("llama")
    write_export(
        tmp_path / "draft", DRAFTS["llama"], config, random_params("llama", config), vocab_of(W), tap_layers=(1, 3, 4),
        target=TARGET_HF,
    )  # fmt: skip

    def load(opened, **how):
        loaded.append((opened.path, how["precision"], how["mesh"] and how["mesh"].shape["data"]))
        raise _EnoughError

    monkeypatch.setattr(targets, "load_target", load)
    for number, more in enumerate(((), ("--dtype", "bfloat16", "--mesh", "data=2"))):
        out, target = str(tmp_path / f"out-{number}"), ("--target", str(path))
        main, arguments = {
            "regenerate": (data_main, ("regenerate", str(chats), out, *target, "--max-prompt-tokens", "100")),
            "capture": (data_main, ("capture", str(chats), out, *target)),
            "evaluate": (evaluate_main, (str(tmp_path / "draft"), *target, "--prompts", str(tmp_path / "prompts.jsonl"),
                                         "--out", out)),
            "targets": (targets_main, (str(path), "--new-tokens", "9")),
        }[command]  # fmt: skip
        limit = ("--max-new-tokens", "9") if command in ("regenerate", "evaluate") else ()
        with pytest.raises(_EnoughError):
            main([*arguments, *limit, *more])
    assert loaded == [(path, of_both("float32"), None), (path, of_both("bfloat16"), 2)]


def test_one_process_takes_what_it_is_told():
    assert target_mesh({}) is None
    assert target_mesh({"fsdp": 1}) is None
    mesh = target_mesh({"fsdp": 2, "tensor": 2})
    assert {name: size for name, size in mesh.shape.items() if size > 1} == {"fsdp": 2, "tensor": 2}
    with pytest.raises(InputError, match=r"--mesh: fsdp=3,tensor=3 takes 9 devices, 8 are visible \(cpu\)"):
        target_mesh({"fsdp": 3, "tensor": 3})


def test_several_processes_take_all_their_devices(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert target_mesh({}).shape["data"] == 8
    assert target_mesh({"fsdp": 8}).shape["fsdp"] == 8
    with pytest.raises(InputError, match=r"target.mesh: fsdp=4 takes 4 devices, 8 belong to the 2 processes"):
        target_mesh({"fsdp": 4}, "target.mesh")


def test_the_dtype_depends_on_the_device(monkeypatch):
    assert dtype_or_default(None) == "float32"
    assert dtype_or_default("bfloat16") == "bfloat16"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert dtype_or_default(None) == "bfloat16"
    assert dtype_or_default("float32") == "float32"
