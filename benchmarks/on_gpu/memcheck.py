"""One call of an operation, forward and backward, for a tool to look over: `compute-sanitizer`, `ncu`."""

from __future__ import annotations

from typing import Any

import torch

from . import checks
from .case import Maker

LABELS = {
    "attention": "D={} causal",
    "linear_attention": "D={} decay=none causal",
    "delta_rule": "D={} decay=channel",
    "favor_attention": "D={} M=",
    "vq_attention": "D={0} Dv={0}",
    "gated_attention": "S={} E=",
    "nearest_code": "D={} S=",
    "diagonal_scan": "constant up",
}


def plan(rehearse: bool) -> list[dict[str, Any]]:
    """Narrow heads, of which illegal accesses have been reported, and the scan."""
    rows = []
    for width in (16,) if rehearse else (16, 32):
        for operation, label in LABELS.items():
            if operation == "diagonal_scan" and width == 32:
                continue
            start = label.format(width)
            case = next((c for op, c in checks.known(rehearse) if op == operation and c.startswith(start)), None)
            if case:
                dtype = "complex64" if operation == "diagonal_scan" else "bfloat16"
                rows.append({"operation": operation, "case": case, "dtype": dtype})
    return rows[:2] if rehearse else rows


def call(operation: str, case: str, dtype: str, rehearse: bool) -> None:
    chosen = checks.known(rehearse)[operation, case]
    torch.manual_seed(0)
    x = chosen.make(Maker(getattr(torch, dtype), checks.device()))
    with checks.counted() as launches:
        checks.evaluate(chosen, x, "fused")
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    if not launches:
        raise SystemExit("no kernel ran")
    print(f"{sum(launches.values())} launches")
