"""Who imports whom, read from the source: no room imports upward, no modules import each other, and `kernels` is
`seqzoo.kernels` to everybody."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STOREYS = (  # from the ground up; rooms of one storey do not know each other either
    ("draws", "extras", "kernels", "messages", "names", "settings", "spec", "valid", "version"),
    ("failures", "metrics", "records"),
    ("files", "plugins"),
    ("blocks", "groups", "precision", "study", "tasks.store"),
    ("tasks.listops", "tasks.pathfinder"),
    ("models", "tasks", "testing"),
    ("entries",),
    ("config", "objectives"),
    ("training",),
    ("runs",),
    ("analysis", "interop", "report"),
    ("commands", "doctor", "generate", "hf"),
)
FLOORS = {room: floor for floor, rooms in enumerate(STOREYS) for room in rooms}
SOURCES = sorted(
    path
    for folder in ("kernels", "seqzoo", "tests", "benchmarks", "examples")
    for path in (ROOT / folder).rglob("*.py")
    if not path.is_relative_to(ROOT / "seqzoo" / "kernels")  # the symlink
) + sorted(ROOT.glob("*.py"))


def name_of(path: Path) -> str:
    """The dotted name of a file's module."""
    parts = [*path.relative_to(ROOT).parent.parts, *([] if path.name == "__init__.py" else [path.stem])]
    return ".".join(["seqzoo", *parts] if parts[:1] == ["kernels"] else parts)


MODULES = {name: path for path in SOURCES if (name := name_of(path)).split(".")[0] == "seqzoo"}


def imported(path: Path) -> set[str]:
    """The absolute names of all modules a file imports, at its top or inside a function, with the names it takes."""
    package = list(path.relative_to(ROOT).parent.parts)
    if package[:1] == ["kernels"]:
        package = ["seqzoo", *package]
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def room(module: str) -> str | None:
    """The room that a module, or a name in it, belongs to; None: it stands above all rooms."""
    parts = module.split(".")
    if parts[0] != "seqzoo" or parts[-1] == "__main__":  # a command, as train.py is
        return None
    return next((name for name in (".".join(parts[1:3]), ".".join(parts[1:2])) if name in FLOORS), None)


def owner(name: str) -> str | None:
    """The module of the project that an imported name is, or is in."""
    return next((module for module in (name, name.rpartition(".")[0]) if module in MODULES), None)


def test_relative_imports_are_resolved():
    names = imported(ROOT / "seqzoo" / "report" / "cli.py")
    assert {"pathlib.Path", "seqzoo.report.results.load_results", "seqzoo.runs.evaluate_run"} <= names


def test_kernels_import_nothing_else_of_the_project():
    for path in (ROOT / "kernels").rglob("*.py"):
        project = {name for name in imported(path) if name.split(".")[0] in ("seqzoo", "kernels")}
        assert {name for name in project if not name.startswith("seqzoo.kernels.")} == set(), path


def test_every_module_is_in_a_room():
    above = {name for name in MODULES if room(name) is None}
    commands = ("analysis", "blocks", "doctor", "tasks")
    assert above == {"seqzoo", *(f"seqzoo.{command}.__main__" for command in commands)}
    assert {room(name) for name in MODULES.keys() - above} == FLOORS.keys()


@pytest.mark.parametrize("floor", FLOORS)
def test_no_room_imports_upward(floor):
    for module, path in MODULES.items():
        if room(module) == floor:
            others = {other for name in imported(path) if (other := room(name)) and other != floor}
            assert {other for other in others if FLOORS[other] >= FLOORS[floor]} == set(), path


def test_no_modules_import_each_other():
    imports = {
        module: {other for name in imported(path) if (other := owner(name)) and other != module}
        for module, path in MODULES.items()
    }
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_nothing_imports_top_level_kernels():
    assert ROOT / "kernels" / "common.py" in SOURCES
    for path in SOURCES:
        assert {name for name in imported(path) if name.split(".")[0] == "kernels"} == set(), path
