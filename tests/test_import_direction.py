"""Which part of the package may import which, and that nothing imports in a circle."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import auxkern

PACKAGE = Path(auxkern.__file__).parent
# Lowest first. A part imports from itself and from lines above it; parts of one line do not know each other.
LEVELS = (
    {"core"},
    {"backends"},
    {"ops"},
    {"nn"},
    {"model"},
    {"generation", "tasks"},
    {"training"},
    {"evaluation"},
    {"machine", "terminal"},
    {"commands", "bench"},
)
# Part of no level, and imported by none but each other. The package itself may be, by the last two levels:
# it hands out its public names lazily.
TOP = {"auxkern", "__main__", "cli", "env", "inspect"}


def _modules() -> dict[str, Path]:
    """Path of every module by its dotted name; a package's is that of its __init__.py."""
    paths = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        paths[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return paths


MODULES = _modules()


def _imported(name: str) -> set[str]:
    """Modules of the package that a module imports anywhere: in functions and for type checkers too."""
    targets = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name}, line {node.lineno}: a relative import; write the whole name"
            names = {f"{node.module}.{one.name}" for one in node.names}
            targets |= {one if one in MODULES else node.module for one in names}
        elif isinstance(node, ast.Import):
            targets |= {one.name for one in node.names}
    return {one for one in targets if one == "auxkern" or (one or "").startswith("auxkern.")}


IMPORTS = {name: _imported(name) for name in MODULES}


def _part(module: str) -> str:
    return [*module.split("."), "auxkern"][1]


def _level(part: str) -> int:
    return next((level for level, parts in enumerate(LEVELS) if part in parts), len(LEVELS))


def test_every_part_has_its_level():
    parts = {_part(module) for module in MODULES if _part(module) not in ("_native", *TOP)}
    assert parts <= set().union(*LEVELS)


@pytest.mark.parametrize("part", sorted(set().union(*LEVELS)))
def test_imports_go_down(part):
    wrong = [
        f"{module} imports {target}"
        for module, targets in IMPORTS.items()
        if _part(module) == part
        for target in sorted(targets)
        if not _may_import(part, _part(target))
    ]
    assert not wrong


def _may_import(part: str, target: str) -> bool:
    if target == "auxkern":
        return _level(part) >= len(LEVELS) - 2
    return target == part or _level(target) < _level(part)


def test_nothing_imports_in_a_circle():
    try:
        TopologicalSorter(IMPORTS).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))
