"""Where the fused form of an operation was measured to be right and faster: what "auto" goes by on a GPU.

`measured.csv` has a row for each architecture, operation, dtype and width whose every check passed, forward and
backward, and whose time was below the chunked form's. `benchmarks/gpu.py --apply` writes it. What is not in it was not
measured, and compilers have been wrong about gradients before.
"""

from __future__ import annotations

import csv
from functools import cache
from pathlib import Path
from typing import NamedTuple

PATH = Path(__file__).with_name("measured.csv")


class Key(NamedTuple):
    architecture: int  # exactly this one, 90 for sm_90
    operation: str
    dtype: str
    width: int  # as `width_class` has it


class Measured(NamedTuple):
    few_warps: int  # 1: only with at most two warps
    card: str
    source: str  # the run that it was measured in


def width_class(channels: int) -> int:
    """Heads of up to 16, 32, 64, ... channels run the same kernels: the number that stands for all of them."""
    width = 16
    while width < channels:
        width *= 2
    return width


def read(path: Path = PATH) -> dict[Key, Measured]:
    with path.open(newline="") as file:
        return {
            Key(int(row["architecture"]), row["operation"], row["dtype"], int(row["width"])): Measured(
                int(row["few_warps"]), row["card"], row["source"]
            )
            for row in csv.DictReader(file)
        }


def write(rows: dict[Key, Measured], path: Path = PATH) -> None:
    with path.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow((*Key._fields, *Measured._fields))
        table.writerows((*key, *found) for key, found in rows.items())


FASTER = read()


@cache
def few_warps(architecture: int, operation: str, dtype: str) -> bool:
    """Whether narrow heads passed their checks with at most two warps only."""
    return any(found.few_warps for key, found in FASTER.items() if key[:3] == (architecture, operation, dtype))
