"""How the package is built: rooms whose imports go one way, no circles, small files, an algorithm's words in its own
folder alone."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "flaxdraft"
# A room imports rooms above it in this list; the doors on the root stand first.
DOORS = ("errors", "config", "interfaces", "progress", "plugins")
ROOMS = (
    "devices", "ops", "nn", "files", "stages", "targets", "decode", "serving", "algorithms", "data", "train",
    "evaluate", "run",
)  # fmt: skip
LEVEL = dict.fromkeys(DOORS, 0) | {room: level for level, room in enumerate(ROOMS, 1)}
MOST_LINES, MOST_FUNCTION_LINES, MOST_PARAMETERS = 400, 70, 8


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def name_of(path: Path) -> str:
    """The dotted name of a module."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def deferred(node: ast.AST) -> bool:
    """What is not executed when a module is imported: functions, and what type checkers alone read."""
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or (
        isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )


def imports(node: ast.AST, *, whole: bool) -> set[str]:
    """Modules of the package that are imported below a node; a name out of a package may be a module of it.

    whole: also what importing the module does not execute.
    """
    found = set()
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ImportFrom):
            inside = {f"{child.module}.{alias.name}" for alias in child.names}
            found |= (inside & MODULES.keys()) | ({child.module} if inside - MODULES.keys() else set())
        elif isinstance(child, ast.Import):
            found |= {alias.name for alias in child.names}
        elif whole or not deferred(child):
            found |= imports(child, whole=whole)
    return found & MODULES.keys()


@cache
def arrows() -> dict[str, set[str]]:
    """What each module imports anywhere in it. A command stands above everything, and has none."""
    return {
        module: imports(tree(path), whole=True) for module, path in MODULES.items() if not module.endswith("__main__")
    }


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def folder_of_algorithm(module: str) -> str | None:
    """None for what the algorithms share."""
    found = re.match(r"flaxdraft\.algorithms\.\w+", module)
    return found[0] if found and MODULES[found[0]].name == "__init__.py" else None


def test_every_module_has_a_room():
    assert {room(module) for module in MODULES} - {""} == set(LEVEL)


def test_the_root_holds_doors_alone():
    assert {path.stem for path in PACKAGE.glob("*.py")} == {"__init__", *DOORS}
    assert len(DOORS) < 6


def test_arrows_point_down():
    # An algorithm's section of the configuration is its own, which is asked for by its name.
    asked = ("flaxdraft.config", "flaxdraft.algorithms")
    wrong = [
        f"{module} imports {target}"
        for module, targets in arrows().items()
        for target in targets
        if room(target) != room(module) and 0 < LEVEL[room(target)] >= LEVEL[room(module)] and (module, target) != asked
    ]
    assert not wrong, "\n".join(wrong)


def test_no_imports_go_round():
    """Depth first, with the way that led there; in a circle nobody can tell which module comes first."""
    executed = {module: sorted(imports(tree(path), whole=False)) for module, path in MODULES.items()}
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join((*way[way.index(module) :], module))
        if module not in done:
            for target in executed[module]:
                visit(target, (*way, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


# An algorithm may build on another one, which does not know it.
BUILDS_ON = {
    **{f"flaxdraft.algorithms.{name}": "flaxdraft.algorithms.dflash" for name in ("dflash2", "domino", "dspark")},
    "flaxdraft.algorithms.peagle": "flaxdraft.algorithms.eagle3",
}


def test_nobody_outside_an_algorithms_folder_knows_that_it_exists():
    wrong = [
        f"{module} imports {target}"
        for module, targets in arrows().items()
        for target in targets
        if folder_of_algorithm(target) not in (None, own := folder_of_algorithm(module), BUILDS_ON.get(own, own))
    ]
    assert not wrong, "\n".join(wrong)


# EAGLE-3's own words, and those of what is built on it. `VocabMap` says how servers write it, and one line names the
# default algorithm; d2t.npy is a file of speculators.
WORDS = re.compile(r"ttt|unroll|eagle|midlayer|d2t(?!\.npy)|t2d", re.IGNORECASE)
HOMES = ("flaxdraft.algorithms.eagle3", "flaxdraft.algorithms.peagle")


def spoken(path: Path) -> Iterator[tuple[int, str]]:
    """Names, comments and documentation of a module with their lines. Other strings are for users, who may read any
    word."""
    for node in ast.walk(tree(path)):
        for field in ("id", "attr", "arg", "name", "asname", "module"):
            if isinstance(word := getattr(node, field, None), str):
                yield node.lineno, word
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if documented and (text := ast.get_docstring(node, clean=False)):
            yield from enumerate(text.splitlines(), node.body[0].lineno)
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def exempt(path: Path) -> set[int]:
    return {
        line
        for node in tree(path).body
        if (isinstance(node, ast.ClassDef) and node.name == "VocabMap")
        or (isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "DEFAULT")
        for line in range(node.lineno, node.end_lineno + 1)
    }


def test_an_algorithms_words_stay_in_its_folder():
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {text}"
        for module, path in MODULES.items()
        if not module.startswith(HOMES)
        for line, text in [(0, module), *spoken(path)]
        if WORDS.search(text) and line not in exempt(path)
    ]
    assert not wrong, "\n".join(wrong)


def test_files_and_functions_are_small():
    wrong = []
    for path in MODULES.values():
        where = path.relative_to(ROOT)
        if (lines := len(path.read_text().splitlines())) > MOST_LINES:
            wrong.append(f"{where} has {lines} lines")
        for node in ast.walk(tree(path)):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if (lines := node.end_lineno - node.lineno + 1) > MOST_FUNCTION_LINES:
                wrong.append(f"{where}: {node.name} has {lines} lines")
            given = {one.arg for one in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)}
            if (count := len(given - {"self", "cls"})) > MOST_PARAMETERS:
                wrong.append(f"{where}: {node.name} takes {count} parameters")
    assert not wrong, "\n".join(wrong)


def test_only_one_file_imports_orbax():
    users = [p.name for p in PACKAGE.rglob("*.py") if re.search(r"^\s*(from|import) orbax", p.read_text(), re.M)]
    assert users == ["checkpoint.py"]


def test_nothing_unpickles_or_reaches_into_private_modules():
    for path in PACKAGE.rglob("*.py"):
        names = {ast.unparse(node.func) for node in ast.walk(tree(path)) if isinstance(node, ast.Call)}
        assert not names & {"pickle.load", "pickle.loads", "torch.load", "yaml.load", "eval", "exec"}, path
        text = path.read_text()
        # The fused kernels' merged backward pass has no public name; that file guards itself.
        assert "jax._src" not in text or path.name == "cudnn_attention.py", path
        assert "flax._" not in text, path
