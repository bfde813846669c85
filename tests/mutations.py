"""Changes the source in one place at a time and asks whether a test notices. Run by hand:

    python tests/mutations.py --seed 0 --count 30 --out results/mutations.jsonl

Places are drawn from kernels, blocks, objectives and training: a comparison loosened or turned round, a sum that is a
difference, a number off by one, a `detach` or a minus that goes. Each runs, in a copy of the repository, against the
tests of its room. A line a mutation is written as soon as it is known, and mutations that have one are not run again.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SEEN = ("kernels", "seqzoo/blocks", "seqzoo/training", "seqzoo/objectives.py")
COMPARISONS = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "=="}
SUMS = {"+": "-", "-": "+"}
OF_ALL = ("tests/kernels/test_derivatives.py", "tests/kernels/test_inputs.py", "tests/kernels/test_resets.py")
OF_BLOCKS = ["tests/blocks", "tests/parity", "tests/models", "tests/analysis"]
NO_TESTS = 5  # the status of pytest where -k leaves none
IGNORED = shutil.ignore_patterns(".git", ".venv", "__pycache__", "*.egg-info")


@dataclass(frozen=True, order=True)
class Mutation:
    file: str
    line: int
    kind: str
    start: int  # characters from the beginning of the file
    end: int
    was: str
    becomes: str

    def apply(self, source: str) -> str:
        return source[: self.start] + self.becomes + source[self.end :]


class Finder(ast.NodeVisitor):
    """The places of one file, apart from annotations, messages and what only type checkers read."""

    def __init__(self, file: str, source: str) -> None:
        self.file, self.source, self.found = file, source, list[Mutation]()
        self.lines = [0]
        for line in source.splitlines(keepends=True):
            self.lines.append(self.lines[-1] + len(line))

    def visit(self, node: ast.AST) -> None:
        match node:
            case ast.Raise() | ast.JoinedStr() | ast.AnnAssign(value=None) | ast.arg():
                return
            case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                return
            case ast.Compare(left=left, ops=[_], comparators=[right]):
                self._operator("comparison", left, right, COMPARISONS)
            case ast.BinOp(left=left, op=ast.Add() | ast.Sub(), right=right) if not _text(left) and not _text(right):
                self._operator("sign", left, right, SUMS)
            case ast.UnaryOp(op=ast.USub()):
                self._add("sign", self._at(node), self._at(node) + 1, "")
            case ast.Constant(value=int(value)) if not isinstance(value, bool):
                self._add("off by one", self._at(node), self._end(node), str(value + 1))
            case ast.Call(func=ast.Attribute(attr="detach", value=value)):
                self._add("detach", self._end(value), self._end(node), "")
        self.generic_visit(node)

    def _operator(self, kind: str, left: ast.expr, right: ast.expr, others: dict[str, str]) -> None:
        between = self.source[self._end(left) : self._at(right)]
        if found := re.search(r"[<>=!]=|[<>+-]", between):
            start = self._end(left) + found.start()
            self._add(kind, start, start + len(found[0]), others[found[0]])

    def _add(self, kind: str, start: int, end: int, becomes: str) -> None:
        line = self.source.count("\n", 0, start) + 1
        self.found.append(Mutation(self.file, line, kind, start, end, self.source[start:end], becomes))

    def _at(self, node: ast.expr) -> int:
        return self._characters(node.lineno, node.col_offset)

    def _end(self, node: ast.expr) -> int:
        return self._characters(node.end_lineno or 0, node.end_col_offset or 0)

    def _characters(self, line: int, octets: int) -> int:
        start, end = self.lines[line - 1 : line + 1]
        return start + len(self.source[start:end].encode()[:octets].decode())


def _text(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def places() -> Iterator[Mutation]:
    for seen in SEEN:
        path = ROOT / seen
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            finder = Finder(str(file.relative_to(ROOT)), source := file.read_text(encoding="utf-8"))
            finder.visit(ast.parse(source))
            yield from finder.found


def draw(seed: int, count: int) -> list[Mutation]:
    """As many of each kind as there are, none twice."""
    generator = random.Random(seed)
    kinds: dict[str, list[Mutation]] = {}
    for mutation in sorted(places()):
        kinds.setdefault(mutation.kind, []).append(mutation)
    for those in kinds.values():
        generator.shuffle(those)
    drawn: list[Mutation] = []
    while len(drawn) < count and any(kinds.values()):
        drawn += [those.pop() for those in kinds.values() if those][: count - len(drawn)]
    return drawn


def tests_of(file: str) -> list[str]:
    """The tests of a file's room, the nearest first."""
    room, *rest = Path(file).parts
    if room == "kernels" and len(rest) == 1:
        return [*_existing(f"tests/kernels/test_{rest[0]}"), "tests/kernels"]
    if room == "kernels":
        names = (rest[0], f"{rest[0]}_per_channel", f"packed_{rest[0]}", f"fused_{rest[0]}")
        tests = [f"tests/kernels/test_{name}.py" for name in names]
        if "nearest" in rest[-1]:
            tests.append("tests/kernels/test_fused_nearest_code.py")
        in_triton = "triton" in (ROOT / file).read_text(encoding="utf-8")
        return [*_existing(*(tests[::-1] if in_triton else tests)), *OF_ALL]
    if rest[0] == "objectives.py":
        return ["tests/test_objectives.py", "tests/training", "tests/runs"]
    return {"blocks": OF_BLOCKS, "training": ["tests/training", "tests/runs"]}[rest[0]]


def _existing(*tests: str) -> list[str]:
    return [test for test in tests if (ROOT / test).exists()]


def run(mutation: Mutation, copy: Path) -> dict[str, object]:
    """What became of it: the first test that failed, or None."""
    path = copy / mutation.file
    source = path.read_text(encoding="utf-8")
    start = time.monotonic()
    path.write_text(mutation.apply(source), encoding="utf-8")
    tests = tests_of(mutation.file)
    try:
        noticed = first_failure(copy, [*tests, "-k", path.stem]) or first_failure(copy, tests)
    finally:
        path.write_text(source, encoding="utf-8")
    return {**asdict(mutation), "noticed_by": noticed, "seconds": round(time.monotonic() - start)}


def first_failure(copy: Path, tests: list[str]) -> str | None:
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "PYTHONPATH": "."}
    try:
        done = subprocess.run(command, cwd=copy, capture_output=True, text=True, env=environment, timeout=3600)
    except subprocess.TimeoutExpired:
        return "pytest: did not end within an hour"
    if failed := re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE):
        return failed[1]
    return None if done.returncode in (0, NO_TESTS) else f"pytest: status {done.returncode}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=30)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    known = options.out.read_text().splitlines() if options.out.exists() else []
    done = {Mutation(*(json.loads(line)[name] for name in Mutation.__dataclass_fields__)) for line in known}
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "seqzoo"
        shutil.copytree(ROOT, copy, symlinks=True, ignore=IGNORED)
        for mutation in draw(options.seed, options.count):
            if mutation in done:
                continue
            row = run(mutation, copy)
            with options.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{mutation.file}:{mutation.line} {mutation.was!r} -> {mutation.becomes!r}: {row['noticed_by']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
