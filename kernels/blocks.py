"""Block sizes of kernels, read from the tables beside them.

A table has a row for every kernel, architecture, dtype and width of heads. The rows that are there were chosen for what
the compiler makes of them, without a spill (`benchmarks/compile.py`); what is measured to be faster takes their place
(`benchmarks/gpu.py --apply`).
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import torch

from . import backends, measured
from .common import dtype_name

C = TypeVar("C", bound=tuple[Any, ...])
ANY = 0  # width


class Key(NamedTuple):
    architecture: int  # 90 for sm_90; newer ones take the row too, until there is one of their own
    dtype: str  # of what the kernel computes with, or "any"
    width: int  # channels of a head, at most, or ANY
    few_warps: int  # 1: at most two warps, taken where `backends.FEW_WARPS` is on, or nothing else passed its checks
    kernel: str


class Blocks(Generic[C]):
    """The table of an operation.

    Args:
        operation: whose they are.
        path: a CSV file whose columns are the fields of `Key`, then those of `config`.
        config: a NamedTuple of integers.
    """

    def __init__(self, operation: str, path: Path, config: type[C]) -> None:
        self.operation, self.path = operation, path
        self.make: Callable[..., C] = config
        self.fields: tuple[str, ...] = config._fields  # type: ignore[attr-defined]
        self._replaced: dict[str, C] = {}
        self._found: dict[tuple[Any, ...], C] = {}

    @cached_property
    def rows(self) -> dict[Key, C]:
        with self.path.open(newline="") as file:
            return dict(self._read(row) for row in csv.DictReader(file))

    def _read(self, row: dict[str, str]) -> tuple[Key, C]:
        architecture, width, few_warps = (int(row[name]) for name in ("architecture", "width", "few_warps"))
        sizes = [int(row[name]) for name in self.fields]
        return Key(architecture, row["dtype"], width, few_warps, row["kernel"]), self.make(*sizes)

    def write(self) -> None:
        """The rows as they stand now, in their order, over the file they were read from."""
        rows = self.rows
        with self.path.open("w", newline="") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow((*Key._fields, *self.fields))
            table.writerows((*key, *config) for key, config in rows.items())

    def of(self, kernel: str, device: torch.device, dtype: torch.dtype, width: int = ANY) -> C:
        """The sizes for heads of `width` channels on `device`.

        Raises:
            ValueError: the table has no row for them.
        """
        if kernel in self._replaced:
            return self._replaced[kernel]
        architecture, name = backends.architecture(device), dtype_name(dtype)
        few_warps = backends.FEW_WARPS or measured.few_warps(architecture, self.operation, name)
        asked = (kernel, architecture, name, width, few_warps)
        if asked not in self._found:
            self._found[asked] = self.rows[self._best(*asked)]
        return self._found[asked]

    def _best(self, kernel: str, architecture: int, dtype: str, width: int, few_warps: bool) -> Key:
        """Of the newest architecture that is not newer, the narrowest row that is wide enough."""
        fitting = [
            key
            for key in self.rows
            if key.kernel == kernel
            and key.architecture <= architecture
            and key.dtype in (dtype, "any")
            and (key.width == ANY or key.width >= width)
            and key.few_warps <= few_warps
        ]
        if not fitting:
            raise ValueError(f"{self.operation}: no block sizes of {kernel!r} for {width} channels of {dtype}")
        return min(fitting, key=lambda key: (-key.few_warps, -key.architecture, key.width == ANY, key.width))

    @contextmanager
    def replaced(self, kernel: str, config: C) -> Iterator[None]:
        """Inside, `kernel` has these sizes, whatever it is called with."""
        before = self._replaced
        self._replaced = {**before, kernel: config}
        try:
            yield
        finally:
            self._replaced = before
