"""The command lines of tools/, which is no package."""

import importlib.util
from pathlib import Path

TOOLS = Path(__file__).parents[1] / "tools"


def tool(name: str):
    """The module at tools/NAME.py."""
    spec = importlib.util.spec_from_file_location(name.replace("/", "_"), TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
