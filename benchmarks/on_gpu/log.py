"""Rows of JSON that outlive whatever happens next."""

from __future__ import annotations

import json
import math
import os
import threading
from collections import defaultdict
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class Log:
    """`<name>.jsonl` in a folder, a row a line, and what they were made with beside them; from any thread."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.rows: dict[str, list[Row]] = defaultdict(list)
        self.lock = threading.Lock()

    def begin(self, *names: str) -> None:
        """Empties files of earlier runs: all rows of a folder are of one run."""
        for name in names:
            (self.folder / f"{name}.jsonl").write_text("")

    def write(self, name: str, row: Row) -> None:
        with self.lock:
            self.rows[name].append(row)
            with (self.folder / f"{name}.jsonl").open("a") as file:
                file.write(json.dumps(_plain(row)) + "\n")

    def describe(self, run: Row, name: str = "run.json") -> None:
        path = self.folder / name
        beside = path.with_suffix(".new")
        beside.write_text(json.dumps(_plain(run), indent=1) + "\n")
        os.replace(beside, path)


def read(folder: Path, name: str) -> list[Row]:
    """Rows as written; a last line that was cut short is left out."""
    path = folder / f"{name}.jsonl"
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _plain(value: Any) -> Any:
    """What JSON has no word for, such as an infinite error, as text; of other numbers five digits."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else str(value)
    return value
