"""The command line of the analysis: `python -m seqzoo.analysis runs/<folder>`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..failures import Said, ends, told
from ..files import to_json, write_all
from ..messages import printable_lines
from ..plugins import import_plugins
from ..study import is_packed
from ..training import TrainingError
from .figure import picture_of
from .run import RunMixing, analyse_run

HEADINGS = ("stage", "block", "entropy", "of uniform", "rank", "distance", "near")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status: 0, or 1 where a run cannot be analysed. Unusable arguments end the
    process with status 2, like argparse's own."""
    return ends("seqzoo.analysis", lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m seqzoo.analysis",
        description="What a run's model attends to at initialisation, after pretraining and after fine-tuning: "
        "mixing.json and mixing.png in the run folder.",
    )
    parser.add_argument("run", type=Path, metavar="RUN_FOLDER", help="a finished run")
    parser.add_argument("-n", type=int, default=8, metavar="EXAMPLES", help="of the test set; 8 unless given")
    parser.add_argument("--data-dir", metavar="FOLDER", help="where the data lie, if not where the run found them")
    parser.add_argument("--cache-dir", metavar="FOLDER", help="where prepared data are kept")
    given = parser.parse_args(import_plugins(sys.argv[1:] if arguments is None else arguments))
    if not given.run.is_dir() and not is_packed(given.run):
        parser.error(f"{str(given.run)!r} is not a folder")
    try:
        found = analyse_run(given.run, n=given.n, data_dir=given.data_dir, cache_dir=given.cache_dir)
        write_all(
            {
                given.run / "mixing.json": to_json(found.to_json()),
                given.run / "mixing.png": picture_of(found),
            }
        )
    except (OSError, Said) as error:
        said = told(error)
        raise error if said is None else TrainingError(f"{given.run} cannot be analysed: {said.message}") from None
    _print(found)
    print(printable_lines(f"\nWritten to {given.run}: mixing.json, mixing.png"))
    return 0


def _print(found: RunMixing) -> None:
    """A line for each stage and block, means over heads."""
    print("{:<9} {:>5} {:>8} {:>10} {:>7} {:>8} {:>6}".format(*HEADINGS))
    for stage, layers in found.stages.items():
        for number, layer in enumerate(layers, 1):
            values = (
                sum(each) / len(each)
                for each in (
                    layer.entropy,
                    layer.normalized_entropy,
                    layer.effective_rank,
                    layer.mean_distance,
                    layer.window_share,
                )
            )
            print("{:<9} {:>5} {:>8.3f} {:>10.3f} {:>7.1f} {:>8.1f} {:>6.3f}".format(stage, number, *values))


if __name__ == "__main__":
    sys.exit(main())
