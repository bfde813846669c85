from __future__ import annotations

from typing import NamedTuple

OK, BAD, UNKNOWN = "ok", "bad", "unknown"


class Finding(NamedTuple):
    """What was looked at, how it is, and what to say of it, in less than a line."""

    state: str  # OK, BAD or UNKNOWN
    what: str
    said: str


def status(findings: list[Finding]) -> int:
    """The exit status: 0 healthy, 1 not, 2 cannot be told."""
    states = {finding.state for finding in findings}
    return 1 if BAD in states else 2 if UNKNOWN in states else 0
