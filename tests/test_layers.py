"""Who imports whom, read from the source: no room imports upward, and `kernels` is `seqzoo.kernels` to everybody."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = {
    "files": 0,
    "records": 0,
    "kernels": 0,
    "blocks": 1,
    "models": 2,
    "tasks": 2,
    "config": 3,
    "objectives": 3,
    "training": 4,
    "report": 5,
    "analysis": 5,
}
SOURCES = sorted(
    path
    for folder in ("kernels", "seqzoo", "tests", "benchmarks", "examples")
    for path in (ROOT / folder).rglob("*.py")
    if not path.is_relative_to(ROOT / "seqzoo" / "kernels")  # the symlink
) + sorted(ROOT.glob("*.py"))


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
    parts = module.split(".")
    return parts[1] if parts[0] == "seqzoo" and len(parts) > 1 and parts[1] in FLOORS else None


def test_relative_imports_are_resolved():
    names = imported(ROOT / "seqzoo" / "report" / "cli.py")
    assert {"pathlib.Path", "seqzoo.report.results.load_results", "seqzoo.runs.evaluate_run"} <= names


def test_kernels_import_nothing_else_of_the_project():
    for path in (ROOT / "kernels").rglob("*.py"):
        project = {name for name in imported(path) if name.split(".")[0] in ("seqzoo", "kernels")}
        assert {name for name in project if not name.startswith("seqzoo.kernels.")} == set(), path


@pytest.mark.parametrize("floor", FLOORS)
def test_no_room_imports_upward(floor):
    files = [ROOT / "seqzoo" / f"{floor}.py", *(ROOT / ("" if floor == "kernels" else "seqzoo") / floor).rglob("*.py")]
    for path in filter(Path.exists, files):
        if path.name == "__main__.py":  # a command, as train.py is, and above all rooms
            continue
        others = {other for name in imported(path) if (other := room(name)) and other != floor}
        assert {other for other in others if FLOORS[other] >= FLOORS[floor]} == set(), path


def test_nothing_imports_top_level_kernels():
    assert ROOT / "kernels" / "common.py" in SOURCES
    for path in SOURCES:
        assert {name for name in imported(path) if name.split(".")[0] == "kernels"} == set(), path
