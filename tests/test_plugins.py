"""Parts that installed packages bring."""

import pytest

import flaxdraft.algorithms.eagle3.drafts.llama as llama
from flaxdraft.errors import InputError
from flaxdraft.plugins import find_by_architecture, find_by_name

PACKAGE = "flaxdraft.targets"


def install(root, monkeypatch, name, package=PACKAGE, text="FOUND = True\n"):
    """A package with one part of that name, on the path."""
    metadata = root / f"{name}_part-0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-part\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text(f"[{package}]\n{name} = {name}_part\n")
    (root / f"{name}_part.py").write_text(text)
    monkeypatch.syspath_prepend(root)


def test_a_part_of_an_installed_package_is_found(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, "mine")
    assert find_by_name(PACKAGE, "mine", "target").FOUND


def test_two_parts_of_one_name_are_refused(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, "llama")
    with pytest.raises(
        InputError, match=r"'llama' in flaxdraft\.targets: llama_part and flaxdraft\.targets\.llama have"
    ):
        find_by_name(PACKAGE, "llama", "target")


def test_two_parts_of_one_architecture_are_refused_and_no_others(tmp_path, monkeypatch):
    package = "flaxdraft.algorithms.eagle3.drafts"
    install(tmp_path, monkeypatch, "twin", package, 'ARCHITECTURES = ("LlamaForCausalLMEagle3",)\nMODEL_TYPES = ()\n')
    with pytest.raises(InputError, match=r"config.json: .*twin_part.* both declare 'LlamaForCausalLMEagle3'"):
        find_by_architecture([package], {"architectures": ["LlamaForCausalLMEagle3"]}, "config.json")
    found = find_by_architecture([package], {"architectures": ["Eagle3DeepseekV2ForCausalLM"]}, "config.json")
    assert found is not llama


def test_parts_of_one_architecture_may_say_whose_a_config_is(tmp_path, monkeypatch):
    package, named = "flaxdraft.algorithms.eagle3.drafts", {"architectures": ["LlamaForCausalLMEagle3"]}
    claims = "ARCHITECTURES = ('LlamaForCausalLMEagle3',)\nMODEL_TYPES = ()\nclaims = lambda config: 'mine' in config\n"
    install(tmp_path, monkeypatch, "modest", package, claims)
    assert find_by_architecture([package], named, "config.json") is llama
    assert find_by_architecture([package], named | {"mine": 1}, "config.json").__name__ == "modest_part"
