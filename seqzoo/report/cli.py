"""The command line: run folders in, tables and a figure out; or one run folder in, its test metrics out."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..files import LinkError, write_text
from ..messages import printable, printable_lines
from .comparison import cells_of, compare
from .results import load_results
from .tables import build_report, print_report, to_csv, to_markdown

CHECKPOINT = "checkpoint="


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status: 0, or 1 where there was nothing to show. Unusable arguments end
    the process with status 2, like argparse's own."""
    parser = argparse.ArgumentParser(
        description="Compare runs (tables, table.md, table.csv, figure.png; with --report, a page with every figure), "
        "or evaluate one on its test set.",
        usage="%(prog)s FOLDER [FOLDER ...] [--out FOLDER] [--report PAGE.html]\n       %(prog)s checkpoint=RUN_FOLDER",
    )
    parser.add_argument("inputs", nargs="+", metavar="FOLDER", help="folders of runs, or checkpoint=RUN_FOLDER")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where files are written; default: the first folder")
    parser.add_argument(
        "--report",
        type=Path,
        metavar="PAGE.html",
        help="also write this page, and PAGE_files/ with each figure's PNG and CSV",
    )
    given = parser.parse_args(arguments)

    checkpoints = [text.removeprefix(CHECKPOINT) for text in given.inputs if text.startswith(CHECKPOINT)]
    if checkpoints and (len(given.inputs) > 1 or given.out or given.report):
        parser.error(f"{CHECKPOINT}RUN_FOLDER stands alone")
    folders = [Path(text) for text in checkpoints or given.inputs]
    for folder in folders:
        if not folder.is_dir():
            parser.error(f"{str(folder)!r} is not a folder")
    if given.report and (given.report.suffix != ".html" or given.report.is_dir()):
        parser.error(f"--report {given.report}: valid: a file whose name ends in .html")
    if checkpoints:
        return _evaluate(folders[0])
    try:
        return _report(folders, given.out or folders[0], given.report)
    except LinkError as error:
        return _fail(str(error))


def _report(folders: list[Path], out: Path, page: Path | None) -> int:
    results, unreadable = load_results(folders)
    cells, no_repetitions = cells_of(results)
    left_out = unreadable + no_repetitions
    comparisons = compare(cells)
    report = build_report(comparisons, left_out)
    print_report(report)
    if not comparisons:
        return _fail(f"No finished run to report in {', '.join(map(str, folders))}.")

    from .figures import save_figure

    write_text(out / "table.md", to_markdown(report))
    write_text(out / "table.csv", to_csv(comparisons))
    save_figure(comparisons, out / "figure.png")
    print(printable_lines(f"\nWritten to {out}: table.md, table.csv, figure.png"))
    if page:
        from .page import write_page

        files = write_page(page, cells, left_out)
        print(printable_lines(f"Written: {page}, and its figures to {files}"))
    return 0


def _evaluate(folder: Path) -> int:
    from ..runs import evaluate_run
    from ..tasks import DataError
    from ..training import TrainingError

    try:
        metrics = evaluate_run(folder)
    except (OSError, ValueError, DataError, TrainingError) as error:
        return _fail(f"{folder} cannot be evaluated: {error}")
    width = max(map(len, metrics))
    for name, value in metrics.items():
        shown = f"{value:.4f}" if isinstance(value, float) else printable(str(value))
        print(f"{name:<{width}} {shown}")
    return 0


def _fail(message: str) -> int:
    print(printable_lines(message), file=sys.stderr)
    return 1
