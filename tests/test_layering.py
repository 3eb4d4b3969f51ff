"""Imports point one way, and siblings leave each other alone."""

import ast
import re
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "flaxdraft"

# Lower layers first; a module may import its own layer's earlier names only where the table says so.
LAYERS = (
    ("errors", "peers", "retention", "continuing", "provenance", "reads"),
    ("interfaces", "config", "mesh", "precision", "progress", "lock"),
    ("hosts", "digests"),
    ("ops",),
    ("nn", "weights", "fetch", "safetensors_file"),
    ("gguf_file", "hf_directory", "stages"),
    ("serving",),
    ("targets", "drafts", "generate"),
    ("algorithms",),
    ("data", "checkpoint"),
    ("evaluate", "export", "report", "foreign"),
    ("train",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
ALONE = ("targets", "drafts", "algorithms")  # their modules never import each other


def imports(path: Path) -> list[str]:
    """Dotted flaxdraft modules that a file imports, anywhere in it."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "flaxdraft":
            found += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] == "flaxdraft"]
    return found


def arrows():
    for path in sorted(PACKAGE.rglob("*.py")):
        source = path.relative_to(PACKAGE).with_suffix("").parts
        for target in imports(path):
            if source[-1] != "__main__":  # a command stands above everything
                yield source, tuple(target.split(".")[1:])


def test_every_module_has_a_layer():
    parts = {path.relative_to(PACKAGE).with_suffix("").parts[0] for path in PACKAGE.rglob("*.py")}
    assert parts - {"__init__"} == set(LEVEL)


def test_arrows_point_down():
    for source, target in arrows():
        if source[0] == target[0]:
            continue
        assert LEVEL[target[0]] < LEVEL[source[0]], f"{'/'.join(source)} imports {'.'.join(target)}"


def test_siblings_do_not_import_each_other():
    siblings = [(source, target) for source, target in arrows() if source[0] == target[0] and source[0] in ALONE]
    assert siblings == []


def test_only_one_file_imports_orbax():
    users = [p.name for p in PACKAGE.rglob("*.py") if re.search(r"^\s*(from|import) orbax", p.read_text(), re.M)]
    assert users == ["checkpoint.py"]


def test_nothing_unpickles_or_reaches_into_private_modules():
    for path in PACKAGE.rglob("*.py"):
        names = {ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)}
        assert not names & {"pickle.load", "pickle.loads", "torch.load", "yaml.load", "eval", "exec"}, path
        text = path.read_text()
        # The fused kernels' merged backward pass has no public name; that file guards itself.
        assert "jax._src" not in text or path.name == "cudnn_attention.py", path
        assert "flax._" not in text, path
