"""A run in one screen of text."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

from .log import Row

MOST = 12_000  # characters
MOST_FAULTS = 20  # rows
STATUSES = ("passed", "above", "failed", "died", "not checked", "not reached")
SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "complex64": "c64"}


def of(run: Row, rows: dict[str, list[Row]]) -> str:
    """Markdown; where it is too long, the end is left out, which is the times that were measured last."""
    sections = (_run(run), _checks(rows["checks"]), _sweep(rows["sweep"]), _rest(rows), _times(run, rows["bench"]))
    text = "\n".join(line for section in sections for line in (*section, "")).strip() + "\n"
    return text if len(text) <= MOST else text[: MOST - 40].rsplit("\n", 1)[0] + "\n… the rest is in the files\n"


def _run(run: Row) -> Iterator[str]:
    versions = run.get("versions", {})
    said = ", ".join(f"{name} {version}" for name, version in versions.items())
    yield f"# {run.get('card', 'no card')}, {run.get('began', '')}"
    if run.get("sham"):
        yield "\n**A rehearsal on a CPU: no time in it was measured.**"
    if run.get("interrupted"):
        yield "\n**Interrupted.**"
    yield f"\n`{run.get('command', '')}` at {run.get('commit', 'an unknown commit')}; {said}"
    if "copy_gbs" in run:
        copy, product = run["copy_gbs"], run["product_tflops"]
        yield f"copy {copy:,.0f} GB/s, bfloat16 product {product:,.0f} TFLOP/s, first kernel {run.get('first_kernel')}"
    phases = run.get("phases", {}).items()
    yield "phases: " + ", ".join(
        f"{name} {phase['seconds']:.0f} s{_missed(phase.get('not_reached', 0))}" for name, phase in phases
    )
    for name, phase in phases:
        if "fault" in phase:
            yield f"\n**{name} broke off: {phase['fault'].strip().splitlines()[-1][:200]}**"


def _missed(count: int) -> str:
    return f" ({count} not reached)" if count else ""


def _checks(rows: list[Row]) -> Iterator[str]:
    yield "## Checks\n"
    counts: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for row in rows:
        counts[row["operation"], row["dtype"]][row["status"]] += 1
    yield f"| operation | dtype | {' | '.join(STATUSES)} |"
    yield f"|---|---|{'---:|' * len(STATUSES)}"
    for (operation, dtype), count in sorted(counts.items()):
        cells = " | ".join(str(count[status] or "") for status in STATUSES)
        yield f"| {operation} | {SHORT.get(dtype, dtype)} | {cells} |"
    faults = [row for row in rows if row["status"] not in ("passed", "not checked", "not reached")]
    if faults:
        yield "\nNot passed:\n"
    for row in faults[:MOST_FAULTS]:
        few = " few warps" if row["few_warps"] else ""
        head = f"- {row['operation']} {row['case']} {SHORT.get(row['dtype'], row['dtype'])}{few}: {row['status']}"
        yield f"{head}, {_why(row)}"
    if len(faults) > MOST_FAULTS:
        yield f"- and {len(faults) - MOST_FAULTS} more"


def _why(row: Row) -> str:
    if "said" in row:
        return str(row["said"])[:120]
    bits = "" if row["same_bits"] else "; other bits in another run"
    errors = f"{_number(row['whole'])} of {_number(row['bound'])}"
    rows = f"{_number(row['worst_row'])} of {_number(row['bound_row'])}"
    return f"{row['worst']}: {errors} whole, {rows} in a row{bits}"


def _number(value: Any) -> str:
    return f"{float(value):.1e}"


def _times(run: Row, rows: list[Row]) -> Iterator[str]:
    yield "## Times\n"
    yield "Milliseconds as a graph (launched one by one), forward + backward; share of the ceilings, forward.\n"
    yield "| | dtype | fused | chunked | best other | fused / chunked | bytes | flops |"
    yield "|---|---|---:|---:|---:|---:|---:|---:|"
    shapes: dict[tuple[str, str, str], dict[str, Row]] = defaultdict(dict)
    for row in rows:
        if "status" not in row:
            shapes[row["operation"], row["shape"], row["dtype"]][row["name"]] = row
    lost = Counter(row["status"] for row in rows if "status" in row)
    if lost:
        yield (
            "| without a time: " + ", ".join(f"{count} {status}" for status, count in lost.items()) + " | | | | | | | |"
        )
    for (operation, shape, dtype), found in shapes.items():
        fused, chunked = found.get("fused", {}), found.get("chunked", {})
        others = {name: time(row) for name, row in found.items() if not name.startswith(("fused", "chunked"))}
        best = min((name for name, ms in others.items() if ms), key=lambda name: others[name] or 0, default=None)
        ratio = f"{time(fused) / time(chunked):.2f}" if time(fused) and time(chunked) else ""  # type: ignore[operator]
        bandwidth = _share(fused.get("gbs"), run.get("copy_gbs"))
        rate = _share(fused.get("tflops"), run.get("product_tflops"))
        yield (
            f"| {operation} {shape} | {SHORT.get(dtype, dtype)} | {_cell(fused)} | {_cell(chunked)} "
            f"| {f'{best} {others[best]:.3f}' if best else ''} | {ratio} | {bandwidth} | {rate} |"
        )


def time(row: Row, way: str = "") -> float | None:
    """Of forward and backward, where there is one, in milliseconds; `way` is "_eager" for launches one by one."""
    has_backward = any(name.startswith("both") for name in row)
    return row.get(f"{'both' if has_backward else 'forward'}{way}_ms")


def _cell(row: Row) -> str:
    graph, eager = time(row), time(row, "_eager")
    return f"{'-' if graph is None else f'{graph:.3f}'} ({eager:.3f})" if eager is not None else ""


def _share(found: float | None, most: float | None) -> str:
    return f"{found / most:.0%}" if found and most else ""


def _sweep(rows: list[Row]) -> Iterator[str]:
    yield "## Block sizes\n"
    for (operation, kernel), tried in by_kernel(rows).items():
        own = next((row["ms"] for row in tried if row["own"] and "ms" in row), None)
        timed = [row for row in tried if "ms" in row]
        if own is None or not timed:
            yield f"- {operation} {kernel}: the table's own sizes have no time"
            continue
        best = min(timed, key=lambda row: row["ms"])
        sizes = ", ".join(f"{name} {size}" for name, size in zip(best["names"], best["sizes"], strict=True))
        kept = "the table's own" if best["own"] else f"{sizes}, {own / best['ms']:.2f} times as fast"
        median = statistics.median(row["ms"] for row in timed)
        counts = f"of {len(timed)} ({len(tried)} tried)"
        yield f"- {operation} {kernel}: {counts} best {kept}; {own:.3f} ms, median {median:.3f}"


def by_kernel(rows: list[Row]) -> dict[tuple[str, str], list[Row]]:
    kernels: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        kernels[row["operation"], row["kernel"]].append(row)
    return kernels


def _rest(rows: dict[str, list[Row]]) -> Iterator[str]:
    yield "## Memory and the canary\n"
    for row in rows["memcheck"]:
        what = f"{row.get('operation', '')} {row.get('case', '')}"
        yield f"- memcheck {what}: {row['status']} {str(row.get('said', ''))[:100]}"
    for row in rows["canary"]:
        found = _number(row["whole"]) if "whole" in row else f"{row['status']} {str(row['said'])[:100]}"
        yield f"- canary, block {row['block']}, {row['num_warps']} warps: {found}"
