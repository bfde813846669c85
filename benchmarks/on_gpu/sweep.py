"""Block sizes around those of the tables: half and double of each, other numbers of warps and stages, one at a time.

Each is checked as the table's own are, and timed at a shape of Long Range Arena beside them.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch

from seqzoo.kernels import backends
from seqzoo.kernels.blocks import Key

from . import bench, checks, timing
from .tables import table

MOST = 10  # configurations of a kernel, the table's own among them
CHOICES = {"num_warps": (2, 4, 8), "num_stages": (2, 3, 4)}
REPEATS = 3  # whose bits have to be the same
LEAST_SIZE = 16  # of a matrix product's side
FIXED = {  # sizes of launches that hardly occur, and what a kernel has no use for
    ("favor_attention", "output"): ("partners",),
    ("linear_attention", "channels"): ("num_stages",),
}


class Swept(NamedTuple):
    """A kernel, what it is timed in, and cases of all widths that its row of the table serves."""

    operation: str
    kernel: str
    width: int
    backward: bool
    shape: str  # a label of `shapes`
    cases: tuple[str, ...]  # labels of `cases`
    dtype: str = "bfloat16"


HEADS = "B=32 T=1024 H=8 D=64"
ATTENDED = ("D=64 causal", "D=32 both ways", "D=16 causal, odd lengths")
PASSED = ("D=64 decay=none causal", "D=32 decay=none both ways", "D=16 decay=none causal, odd lengths")
DECAYED = ("D=64 decay=channel causal", "D=32 decay=channel causal", "D=16 decay=channel causal, odd lengths")
RULED = tuple(f"D={D} decay={decay}" for decay in ("head", "channel") for D in (64, 128))
QUANTISED = ("D=128 Dv=256 S=128 L=64 both ways", "D=16 Dv=16 S=40 L=33 causal", "D=256 Dv=512 S=64 L=128 causal")
ESTIMATED = ("D=64 M=100 causal", "D=32 M=24 both ways", "D=16 M=24 causal, steep")
GATED = ("S=128 E=512 causal", "S=64 E=128 both ways", "S=16 E=40 causal, odd lengths")
SCANNED = ("constant up T=700, odd lengths", "varying down T=700", "constant both ways T=1100 B=1")
SWEPT = (
    Swept("attention", "forward", 64, False, f"{HEADS} causal", ATTENDED),
    Swept("attention", "query", 64, True, f"{HEADS} causal", ATTENDED),
    Swept("attention", "key", 64, True, f"{HEADS} causal", ATTENDED),
    Swept("linear_attention", "pass", 64, True, f"{HEADS} causal", PASSED),
    Swept("linear_attention", "channels", 64, True, f"{HEADS} causal, decays per channel", DECAYED),
    Swept("delta_rule", "forward", 64, False, f"{HEADS} decays", RULED),
    Swept("delta_rule", "outer", 64, True, f"{HEADS} decays", RULED),
    Swept("diagonal_scan", "scan", 0, True, "B=32 T=1024 D=512 up", SCANNED, "complex64"),
    Swept("vq_attention", "forward", 256, False, "B=32 T=1024 H=1 D=128 Dv=256 S=128 L=64 causal", QUANTISED),
    Swept("favor_attention", "output", 64, False, f"{HEADS} M=266 causal", ESTIMATED),
    Swept("gated_attention", "values", 128, False, "B=32 T=1024 S=128 E=256 C=256 causal", GATED),
)
TINY = (Swept("linear_attention", "pass", 16, True, "B=1 T=16 H=1 D=16 causal", ("D=16 decay=none causal",)),)


def plan(rehearse: bool) -> list[dict[str, Any]]:
    """The arguments of `verify` and `measure` for all rows: of each kernel first the table's own sizes.

    The kernels take turns, so that each has had some of its sizes tried whenever the time is over.
    """
    rows = []
    for number, swept in enumerate(TINY if rehearse else SWEPT):
        own = table(swept.operation)
        key = _row(swept)
        names, sizes = own.fields, list(own.rows[key])
        candidates = neighbours(names, sizes, FIXED.get((swept.operation, swept.kernel), ()))[: 2 if rehearse else MOST]
        for turn, candidate in enumerate(candidates):
            at = {"operation": swept.operation, "kernel": swept.kernel, "dtype": swept.dtype, "width": swept.width}
            row = {**at, "row": list(key), "names": list(names), "sizes": candidate, "own": candidate == sizes}
            rows.append((turn, number, row))
    return [row for _, _, row in sorted(rows, key=lambda ranked: ranked[:2])]


def _row(swept: Swept) -> Key:
    """Of the table, the one that the shape's launches take."""
    own = table(swept.operation)
    architecture = backends.architecture(torch.device(timing.DEVICE))
    return own._best(swept.kernel, architecture, swept.dtype, swept.width, False)


def neighbours(names: tuple[str, ...], sizes: list[int], fixed: tuple[str, ...]) -> list[list[int]]:
    """`sizes`, then what differs from them in one place, warps and stages first and smaller before larger."""
    found = [sizes]
    order = sorted(range(len(names)), key=lambda place: names[place] not in CHOICES)
    for place in order:
        name, size = names[place], sizes[place]
        if name in fixed:
            continue
        others = CHOICES.get(name, (size // 2, size * 2))
        for other in others:
            if other != size and (name in CHOICES or other >= min(size, LEAST_SIZE)):
                found.append([*sizes[:place], other, *sizes[place + 1 :]])
    return found


def _swept(operation: str, kernel: str, rehearse: bool) -> Swept:
    return next(s for s in (TINY if rehearse else SWEPT) if (s.operation, s.kernel) == (operation, kernel))


def _shape(swept: Swept, rehearse: bool) -> dict[str, Any]:
    rows = [row for row in bench.plan(rehearse) if row["operation"] == swept.operation and row["name"] == "fused"]
    return next(row for row in rows if row["shape"] == swept.shape and row["dtype"] == swept.dtype)


def verify(operation: str, kernel: str, sizes: list[int], rehearse: bool, **_: Any) -> dict[str, Any]:
    """Whether the sizes pass the checks of all cases, by label; what is timed is compiled on the way."""
    swept = _swept(operation, kernel, rehearse)
    own = table(operation)
    with own.replaced(kernel, own.make(*sizes)):
        bench.warm(**_shape(swept, rehearse), rehearse=rehearse)
    statuses = {}
    for label in swept.cases:
        case = {"operation": operation, "case": label, "dtype": swept.dtype, "width": swept.width, "few_warps": 0}
        found = checks.check(**case, rehearse=rehearse, replaced={kernel: sizes}, repeats=REPEATS)
        statuses[label] = found["status"]
    passed = all(status == "passed" for status in statuses.values())
    return {"status": "passed" if passed else "above", "checks": statuses}


def measure(operation: str, kernel: str, sizes: list[int], rehearse: bool, **_: Any) -> dict[str, Any]:
    """Milliseconds of forward, or of forward and backward for a kernel of backward, as a graph."""
    swept = _swept(operation, kernel, rehearse)
    own = table(operation)
    where = _shape(swept, rehearse)
    row = {"shape": where["shape"], "part": "both" if swept.backward else "forward"}
    with warnings.catch_warnings(), own.replaced(kernel, own.make(*sizes)):
        warnings.simplefilter("ignore")
        calls = bench.calls_of(**where, rehearse=rehearse)
        with calls as (forward, both, _, _), torch.set_grad_enabled(swept.backward):
            try:
                found = timing.graphed(both if swept.backward else forward)
            except RuntimeError as error:
                return {**row, "status": "failed", "no_graph": timing.said(error)}
    return {**row, "ms": found.median, "spread": [found.low, found.high], **({"sham": True} if timing.SHAM else {})}
