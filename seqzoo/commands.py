"""`train.py` and `eval_lra.py`, and the commands that are installed: Ctrl-C while they still import is quiet, too."""

from __future__ import annotations

from .failures import leave_while_importing


def train() -> int:
    """`train.py`; returns its exit status."""
    leave_while_importing()
    from .runs.cli import main

    return main()


def evaluate() -> int:
    """`eval_lra.py`; returns its exit status."""
    leave_while_importing()
    from .report.cli import main

    return main()
