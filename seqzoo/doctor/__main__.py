"""The command line of the doctor: `python -m seqzoo.doctor`, a minute at most and one screen."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..failures import ends
from ..messages import printable
from .finding import BAD, OK, UNKNOWN, Finding, status
from .machine import cores, room, versions

LIMIT = 55.0  # seconds, for all of it
VERDICTS = ("healthy", "not healthy", "cannot tell: see what is unknown")


def main(arguments: Sequence[str] | None = None) -> int:
    """Looks at the machine and prints what is found; returns 0 where it is healthy, 1 where it is not, 2 where that
    cannot be told."""
    return ends("seqzoo.doctor", lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m seqzoo.doctor",
        description="Looks at versions, devices, compilers, room and data, and holds every operation, values and "
        "gradients, against its definition on this machine's device; a minute at most. Status 0: healthy, 1: not, 2: "
        "cannot tell.",
    )
    parser.add_argument(
        "--data-dir", type=Path, metavar="FOLDER", help="where published data lie; data_dir= of train.py"
    )
    parser.add_argument("--cache-dir", type=Path, metavar="FOLDER", help="where prepared data are kept; cache_dir=")
    parser.add_argument(
        "--runs-dir", type=Path, metavar="FOLDER", default=Path("runs"), help="runs_dir=; runs unless given"
    )
    given = parser.parse_args(arguments)
    until = time.monotonic() + LIMIT
    cache = given.cache_dir or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "seqzoo"
    findings = [*versions(), cores(), *room({"runs": given.runs_dir, "cache": cache})]
    _show(findings)
    options = [f"--{name}={path}" for name, path in (("data-dir", given.data_dir), ("cache-dir", cache)) if path]
    lines, ended = _ask("examination", options, until)
    plan: dict[str, Any] = next((line for line in lines if isinstance(line, dict)), {"device": "cpu", "operations": []})
    found = [Finding(*line) for line in lines if isinstance(line, list)]
    operations = [finding for finding in found if finding.what in plan["operations"]]
    later = [finding for finding in found if finding not in operations]
    later += _of_operations(plan["operations"], operations, ended)
    if plan["device"] == "cuda":
        later.append(_canary(until))
    _show(later)
    verdict = status(findings + later)
    print(VERDICTS[verdict])
    return verdict


def _of_operations(planned: list[str], found: list[Finding], ended: str) -> list[Finding]:
    """A line for all that are right, and one for each that is not."""
    wrong = [finding for finding in found if finding.state != OK]
    missing = planned[len(found) :]
    if not planned:
        return [Finding(BAD, "operations", f"PyTorch or the package cannot be loaded: {ended}")]
    right = f"{len(found) - len(wrong)} of {len(planned)} right, values and gradients"
    if missing and ended == "late":
        return [*wrong, Finding(UNKNOWN, "operations", f"{right}; no time for {missing[0]} and what follows")]
    if missing:
        return [*wrong, Finding(BAD, "operations", f"{right}; {missing[0]} died: {ended}")]
    return [*wrong, Finding(BAD if wrong else OK, "operations", right)]


def _canary(until: float) -> Finding:
    """What Triton makes of a pattern that some versions compile wrongly; no kernel of the package has it."""
    _, ended = _ask("canary", [], until)
    if ended == "late":
        return Finding(UNKNOWN, "canary", "no time for it")
    return Finding(OK, "canary", "right" if not ended else f"wrong, as known of this Triton on Hopper ({ended})")


def _ask(module: str, options: list[str], until: float) -> tuple[list[Any], str]:
    """The lines of JSON that a module of this package prints, and how it ended: "" well, "late", or else in words."""
    command = [sys.executable, "-m", f"seqzoo.doctor.{module}", *options]
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stdout=output, stderr=errors)
        try:
            process.wait(max(0.0, until - time.monotonic()))
            ended = "" if process.returncode == 0 else f"status {process.returncode}"
        except subprocess.TimeoutExpired:
            ended = "late"
        finally:
            process.kill()
            process.wait()
        output.seek(0)
        errors.seek(0)
        lines, said = output.read().decode(errors="replace"), errors.read().decode(errors="replace").strip()
    if ended not in ("", "late") and said:
        ended = said.splitlines()[-1]
    return [json.loads(line) for line in lines.splitlines() if line.endswith(("]", "}"))], ended


def _show(findings: list[Finding]) -> None:
    width = max(60, min(shutil.get_terminal_size((110, 24)).columns, 110))
    for finding in findings:
        line = printable(f"{finding.state:<8}{finding.what:<12}{finding.said}")
        print(textwrap.fill(line, width, subsequent_indent=20 * " ", break_on_hyphens=False), flush=True)


if __name__ == "__main__":
    sys.exit(main())
