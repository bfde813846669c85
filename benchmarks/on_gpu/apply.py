"""What a run says of the tables: where "auto" takes the fused form, and which block sizes are faster.

The fused form is taken for an architecture, operation, dtype and width if every check of them has passed, and the
median of its times at shapes of Long Range Arena, forward and backward, is below the chunked form's, both as a graph
and launched one by one. Heads of up to 32 channels are taken with few warps where only those have passed.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from . import log
from .log import Row
from .summary import by_kernel, time

GAIN = 0.97  # of the table's own time, at most, for other sizes to take its place
NARROW = 32  # channels, up to which few warps are another choice
FEW_WARPS = "fused, few warps"
Class = tuple[str, str, int]  # operation, dtype, width


def main(folder: Path) -> int:
    """Rewrites `kernels/measured.csv` and the tables of block sizes from the rows in `folder`.

    Raises:
        SystemExit: it was a rehearsal, or there is no run.
    """
    from seqzoo.kernels import measured

    run, checks, bench, sweep = load(folder)
    rows = decide(measured.read(), run, checks, bench, source=f"{folder.as_posix()} {run['began'][:10]}")
    measured.write(rows)
    for key in rows:
        print(*key)
    for sentence in resize(run, sweep):
        print(sentence)
    print("Now: python benchmarks/compile.py, and the tests.")
    return 0


def load(folder: Path) -> tuple[Row, list[Row], list[Row], list[Row]]:
    import json

    path = folder / "run.json"
    if not path.exists():
        raise SystemExit(f"{folder} has no run.json; valid: the --out of a run on a GPU")
    run = json.loads(path.read_text())
    tables = [log.read(folder, name) for name in ("checks", "bench", "sweep")]
    if run.get("sham") or any(row.get("sham") for rows in tables for row in rows):
        raise SystemExit(f"{folder} holds a rehearsal, whose times were not measured; valid: a run on a GPU")
    if "architecture" not in run or "card" not in run:
        raise SystemExit(f"{folder}: the run did not get as far as knowing its card")
    return run, *tables  # type: ignore[return-value]


def decide(known: dict[Any, Any], run: Row, checks: list[Row], bench: list[Row], source: str) -> dict[Any, Any]:
    """`known` rows of `measured`, but for the classes that this run has checked or timed, which it decides alone."""
    from seqzoo.kernels.measured import Key, Measured

    classes = sorted({_class(row) for row in (*checks, *bench)})
    architecture = run["architecture"]
    rows = {key: row for key, row in known.items() if key[0] != architecture or key[1:] not in classes}
    for kind in classes:
        operation, dtype, width = kind
        few = 0 < width <= NARROW and _needs_few_warps([c for c in classes if c[:2] == kind[:2]], checks, bench)
        if _taken(kind, few, checks, bench):
            rows[Key(architecture, operation, dtype, width)] = Measured(int(few), run["card"], source)
    return rows


def _class(row: Row) -> Class:
    return row["operation"], row["dtype"], row["width"]


def _needs_few_warps(classes: list[Class], checks: list[Row], bench: list[Row]) -> bool:
    """The choice is one for all narrow heads of an operation and dtype."""
    narrow = [kind for kind in classes if 0 < kind[2] <= NARROW]
    return any(
        _passed(kind, True, checks) and not _passed(kind, False, checks) and _faster(kind, True, bench)
        for kind in narrow
    )


def _taken(kind: Class, few_warps: bool, checks: list[Row], bench: list[Row]) -> bool:
    return _passed(kind, few_warps, checks) and _faster(kind, few_warps, bench)


def _passed(kind: Class, few_warps: bool, checks: list[Row]) -> bool:
    statuses = [row["status"] for row in checks if _class(row) == kind and bool(row["few_warps"]) == few_warps]
    return bool(statuses) and all(status == "passed" for status in statuses)


def _faster(kind: Class, few_warps: bool, bench: list[Row]) -> bool:
    """At every shape where the fused form was reached it must have run in both ways of launching; it is compared where
    the other form has run in the same."""
    shapes: dict[str, dict[str, Row]] = defaultdict(dict)
    for row in bench:
        if _class(row) == kind and row["lra"]:
            shapes[row["shape"]][row["name"]] = row
    ratios: dict[str, list[float]] = {"": [], "_eager": []}
    for found in shapes.values():
        ours, other = found.get(FEW_WARPS if few_warps else "fused"), found.get("chunked", {})
        if ours is None or ours.get("status") == "not reached":
            continue
        for way, seen in ratios.items():
            own, others = time(ours, way), time(other, way)
            if own is None:
                return False
            if others is not None:
                seen.append(own / others)
    return all(seen and statistics.median(seen) < 1 for seen in ratios.values())


def resize(run: Row, sweep: list[Row]) -> list[str]:
    """Writes what is faster into the tables of block sizes, for this architecture; a sentence for each kernel."""
    from seqzoo.kernels.blocks import Key

    from .tables import table

    said = []
    for (operation, kernel), rows in by_kernel(sweep).items():
        timed = [row for row in rows if row.get("status") == "passed" and "ms" in row]
        own = next((row for row in timed if row["own"]), None)
        best = min(timed, key=lambda row: row["ms"], default=None)
        if own is None or best is None or best["ms"] > GAIN * own["ms"]:
            continue
        blocks = table(operation)
        key = Key(*best["row"])._replace(architecture=run["architecture"])
        blocks.rows[key] = blocks.make(*best["sizes"])
        blocks.write()
        said.append(
            f"{operation} {kernel}: {own['sizes']} -> {best['sizes']}, {own['ms'] / best['ms']:.2f} times as fast"
        )
    return said
