"""How near blocks come to their originals. The extra `parity` installs these; tests of what is not there are skipped.

    python -m pytest tests/parity --record-parity results/parity.json

also writes down what they find.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from seqzoo.runs import provenance

COMMAND = "python -m pytest tests/parity --record-parity results/parity.json"


@pytest.fixture
def record_parity(record_property) -> Callable[..., None]:
    """`record_parity("mamba2", "Mamba2Mixer of transformers", "5.23.0", error)`: what the test found, for the record.

    The error is the largest relative one that it saw, in values and, where it compares them, in gradients.
    """

    def record(block: str, original: str, version: str, error: float | torch.Tensor) -> None:
        record_property("parity", {"block": block, "original": original, "version": version, "error": float(error)})

    return record


class Record:
    """Gathers what tests recorded, in any number of processes, and writes it."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.rows: list[dict[str, Any]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            test = report.nodeid.rpartition("/")[2]
            self.rows += [{**row, "test": test} for name, row in report.user_properties if name == "parity"]

    def pytest_sessionfinish(self) -> None:
        rows = sorted(self.rows, key=lambda row: (row["block"], row["original"], row["test"]))
        record = {"command": COMMAND, **provenance.made_with(torch.device("cpu"), 1), "rows": rows}
        self.file.write_text(json.dumps(record, indent=1) + "\n")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record-parity", type=Path, metavar="FILE", help="write what tests of parity found to FILE")


def pytest_configure(config: pytest.Config) -> None:
    file = config.getoption("--record-parity")
    if file is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Record(file))
