"""The command line: runs in, tables and a figure out; or one run folder in, its test metrics out; or run folders into a
study and back."""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Sequence
from pathlib import Path

from ..failures import Said, ends, told
from ..files import write_all
from ..messages import printable, printable_lines
from ..plugins import import_plugins
from ..study import SUFFIX, is_packed, named_as_study, pack, read_study, unpack
from .comparison import cells_of, compare
from .results import FIGURES, find_runs, load_results
from .tables import build_report, print_report, to_csv, to_markdown
from .time_to_accuracy import REACH, Accuracies, times_of, with_times
from .time_to_accuracy import to_csv as times_csv

CHECKPOINT = "checkpoint="


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status: 0, or 1 where there was nothing to show. Unusable arguments end
    the process with status 2, like argparse's own."""
    return ends("eval_lra.py", lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    arguments = import_plugins(sys.argv[1:] if arguments is None else arguments)
    if arguments and arguments[0] in COMMANDS:
        return COMMANDS[arguments[0]](arguments[1:])
    parser = argparse.ArgumentParser(
        description="Compare runs (tables, table.md, table.csv, figure.png; with --report, a page with every figure), "
        "or evaluate one on its test set; or put run folders into a study, a file that is read as they are, and back.",
        usage="%(prog)s FOLDER [FOLDER ...] [--out FOLDER] [--report PAGE.html]\n"
        "                   [--reach TASK=PERCENT,PERCENT ...]\n"
        "       %(prog)s checkpoint=RUN_FOLDER\n"
        "       %(prog)s pack FOLDER [FOLDER ...] --into STUDY.jsonl\n"
        "       %(prog)s unpack STUDY.jsonl --into FOLDER",
    )
    parser.add_argument(
        "inputs", nargs="+", metavar="FOLDER", help="folders of runs, studies, or checkpoint=RUN_FOLDER"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="where files are written; default: the first folder, or beside a study one of its name",
    )
    parser.add_argument(
        "--report",
        type=Path,
        metavar="PAGE.html",
        help="also write this page, and PAGE_files/ with each figure's PNG and CSV",
    )
    parser.add_argument(
        "--reach",
        type=_accuracies,
        action="append",
        metavar="TASK=PERCENT,...",
        help="validation accuracies to which time is shown, again for another task; default: "
        + " ".join(f"{task}={','.join(f'{100 * one:g}' for one in wanted)}" for task, wanted in REACH.items()),
    )
    given = parser.parse_args(arguments)

    checkpoints = [text.removeprefix(CHECKPOINT) for text in given.inputs if text.startswith(CHECKPOINT)]
    if checkpoints and (len(given.inputs) > 1 or given.out or given.report or given.reach):
        parser.error(f"{CHECKPOINT}RUN_FOLDER stands alone")
    folders = [Path(text) for text in checkpoints or given.inputs]
    for folder in folders:
        if not (folder.is_dir() or is_packed(folder) or (named_as_study(folder) and not checkpoints)):
            parser.error(f"{str(folder)!r} is not a folder")
    if given.report and (given.report.suffix != ".html" or given.report.is_dir()):
        parser.error(f"--report {given.report}: valid: a file whose name ends in .html")
    if checkpoints:
        return _evaluate(folders[0])
    try:
        reach = {**REACH, **dict(given.reach or ())}
        return _report(folders, given.out or _beside(folders[0]), given.report, reach)
    finally:
        gc.unfreeze()


def _beside(given: Path) -> Path:
    """Where the files of a report go if nobody says: a folder of runs itself, or the folder of a study's name."""
    study = given.parent if is_packed(given) else given
    return study.with_suffix("") if named_as_study(study) else given


def _accuracies(text: str) -> tuple[str, tuple[float, ...]]:
    """ "lra_text=60,65" -> ("lra_text", (0.6, 0.65))."""
    task, _, percents = text.partition("=")
    try:
        accuracies = tuple(float(percent) / 100 for percent in percents.split(","))
    except ValueError:
        accuracies = ()
    if not (task and accuracies and all(0 < accuracy <= 1 for accuracy in accuracies)):
        raise argparse.ArgumentTypeError(f"{text!r}: valid: a task and percentages, such as lra_text=60,65")
    return task, tuple(dict.fromkeys(accuracies))


def _report(folders: list[Path], out: Path, page: Path | None, reach: Accuracies) -> int:
    results, unreadable = load_results(folders)
    gc.freeze()  # they are needed to the end: looking for garbage among them took a fifth of the time
    cells, no_repetitions = cells_of(results)
    left_out = unreadable + no_repetitions
    comparisons = compare(cells)
    times = times_of(cells, reach)
    report = with_times(build_report(comparisons, left_out), times)
    print_report(report)
    if not comparisons:
        return _fail(f"No finished run to report in {', '.join(map(str, folders))}.")

    from .figures import comparison_figure

    tables = {"table.md": to_markdown(report).encode(), "table.csv": to_csv(comparisons).encode()}
    tables["figure.png"] = comparison_figure(comparisons)
    if times:
        tables["time_to_accuracy.csv"] = times_csv(times).encode()
    contents = {out / name: content for name, content in tables.items()}
    if page:
        from .page import page_files

        contents |= page_files(page, cells, left_out, times)
    write_all(contents)  # at once: where there is no room for all of it, an earlier report stays as it is
    print(printable_lines(f"\nWritten to {out}: {', '.join(tables)}"))
    if page:
        print(printable_lines(f"Written: {page}, and its figures to {page.with_name(page.stem + FIGURES)}"))
    return 0


def _evaluate(folder: Path) -> int:
    from ..runs import evaluate_run
    from ..training import TrainingError

    try:
        metrics = evaluate_run(folder)
    except (OSError, Said) as error:
        said = told(error)
        raise error if said is None else TrainingError(f"{folder} cannot be evaluated: {said.message}") from None
    width = max(map(len, metrics))
    for name, value in metrics.items():
        shown = f"{value:.4f}" if isinstance(value, float) else printable(str(value))
        print(f"{name:<{width}} {shown}")
    return 0


def _pack(arguments: Sequence[str]) -> int:
    """Run folders into a study."""
    parser = argparse.ArgumentParser(
        prog="eval_lra.py pack",
        description="Write the records of finished runs into a study, a run a line, in place of lines of that name.",
    )
    parser.add_argument("inputs", nargs="+", type=Path, metavar="FOLDER", help="folders of runs, or other studies")
    parser.add_argument("--into", type=Path, required=True, metavar=f"STUDY{SUFFIX}", help="the file to write")
    given = parser.parse_args(arguments)
    for path in given.inputs:
        if not (path.is_dir() or named_as_study(path)):
            parser.error(f"{str(path)!r} is neither a folder nor a study")
    if given.into.suffix != SUFFIX or given.into.is_dir():
        parser.error(f"--into {given.into}: valid: a file whose name ends in {SUFFIX}")
    _check_folder(parser, given.into.parent)
    runs, unreadable = find_runs(given.inputs)
    kept = given.into.resolve()
    runs = [run for run in runs if run.parent.resolve() != kept]
    try:
        lines, left_out = pack(runs, given.into)
    except (OSError, ValueError) as error:
        return _fail(str(error))
    for path, reason in [*unreadable, *left_out]:
        _fail(f"left out: {path}: {reason}")
    print(printable_lines(f"{given.into}: {lines} runs, {len(runs) - len(left_out)} of them from what was given"))
    return 0 if lines else 1


def _unpack(arguments: Sequence[str]) -> int:
    """A study into run folders."""
    parser = argparse.ArgumentParser(
        prog="eval_lra.py unpack", description="Write the runs of a study as folders; none that is there is touched."
    )
    parser.add_argument("study", type=Path, metavar=f"STUDY{SUFFIX}")
    parser.add_argument("--into", type=Path, required=True, metavar="FOLDER", help="where the run folders are written")
    given = parser.parse_args(arguments)
    if not named_as_study(given.study):
        parser.error(f"{str(given.study)!r} is not a study")
    _check_folder(parser, given.into)
    written = 0
    try:
        for fault in read_study(given.study).faults:
            _fail(f"left out: {given.study}: {fault}")
        for folder, reason in unpack(given.study, given.into):
            written += reason is None
            if reason is not None:
                _fail(f"left as it is: {folder}: {reason}")
    except (OSError, ValueError) as error:
        return _fail(str(error))
    print(printable_lines(f"{given.into}: {written} run folders written"))
    return 0


def _check_folder(parser: argparse.ArgumentParser, folder: Path) -> None:
    there = next(place for place in (folder, *folder.parents) if place.exists())
    if not there.is_dir():
        parser.error(f"--into: {there} is a file; valid: a folder, which is made where there is none")


def _fail(message: str) -> int:
    print(printable_lines(message), file=sys.stderr)
    return 1


COMMANDS = {"pack": _pack, "unpack": _unpack}
