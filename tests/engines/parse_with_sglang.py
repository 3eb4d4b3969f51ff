"""What SGLang's own configuration code makes of drafts, run by a Python that has PyTorch, transformers, msgspec and
SGLang's files: python parse_with_sglang.py FOLDER

SGLang as a whole does not start on a CPU. The two modules that read drafts' config.json need nothing of a GPU: they are
run as they are in the wheel, and every other module of SGLang that they import is an empty one. Which architectures
there are stands in EntryClass of each file of models/, which is read and not run.

The folder holds drafts and asked.json, for each by its folder's name the function of SGLang that reads it. What SGLang
understood, or the error with which it stopped, goes into told.json.
"""

import ast
import dataclasses
import importlib
import importlib.machinery
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from unittest.mock import MagicMock

import msgspec
from transformers import AutoConfig

SPECULATIVE = "sglang.srt.speculative"
READERS = (f"{SPECULATIVE}.dflash_utils", f"{SPECULATIVE}.dspark_components.dspark_config")


class Empty(ModuleType):
    """A module of SGLang that is not run: whatever is imported from it is there, and nothing of it is called."""

    __path__ = ()

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock(name=f"{self.__name__}.{name}")


class Finder:
    """The readers from their files, every other module of SGLang empty."""

    def __init__(self, root: Path):
        self.root = root

    def find_spec(self, name: str, path=None, target=None):
        if name in READERS:
            return importlib.util.spec_from_file_location(
                name, self.root.joinpath(*name.split(".")[1:]).with_suffix(".py")
            )
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split(".")[0] == "sglang" else None

    def create_module(self, spec):
        return Empty(spec.name)

    def exec_module(self, module):
        pass


def architectures(root: Path) -> list[str]:
    """The names that SGLang knows models by."""
    found = []
    for path in sorted((root / "srt" / "models").glob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "EntryClass":
                found += [one.id for one in ast.walk(node.value) if isinstance(one, ast.Name)]
    return found


def fields(parsed) -> dict:
    return dataclasses.asdict(parsed) if dataclasses.is_dataclass(parsed) else msgspec.structs.asdict(parsed)


def told_of(folder: Path, how: str) -> dict:
    dflash, dspark = map(importlib.import_module, READERS)
    config = AutoConfig.from_pretrained(folder)
    try:
        if how == "dspark":
            runtime = dspark.resolve_runtime_config(
                draft_hf_config=config, speculative_num_draft_tokens=None, target_vocab_size=config.vocab_size
            )
            read = fields(dspark.parse_dspark_draft_config(draft_hf_config=config)) | fields(runtime)
            read["sample_from_anchor"] = dspark.get_dspark_sample_from_anchor(config)
        else:
            read = fields(dflash.parse_dflash_draft_config(draft_hf_config=config))
        read["layer_types"] = dflash.get_dflash_layer_types(config)
        read["window_left"] = dflash.get_dflash_attention_sliding_window_size(config)
    except ValueError as error:
        return {"error": str(error)}
    return read | {"architectures": config.architectures}


if __name__ == "__main__":
    root = Path(importlib.util.find_spec("sglang").submodule_search_locations[0])
    sys.meta_path.insert(0, Finder(root))
    folder = Path(sys.argv[1])
    asked = json.loads((folder / "asked.json").read_text())
    told = {draft: told_of(folder / draft, how) for draft, how in asked.items()}
    (folder / "told.json").write_text(json.dumps({"architectures": architectures(root), "drafts": told}))
