"""Text from a finished run, as it is made: `python -m seqzoo.generate runs/<folder>`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from .config import ConfigError
from .failures import Said, ends
from .messages import printable_lines
from .models import SequenceModel
from .runs import load
from .runs.folder import checked_task, read_config, read_spec, read_symbols, require_weights
from .tasks import build_task
from .tasks.characters import MASK, PAD, SPECIALS, ids_of


class Writer:
    """The trained model of a run, and the characters that its ids stand for.

    Args:
        run_folder: of a run that tells the next character, as those of task=char_lm do.
        data_dir: where the data are, for a folder of an earlier version, which does not hold its characters.

    Raises:
        ConfigError: it is no run folder, or one of another kind of task; or its characters are not known.
        DataError: the data are missing or damaged.
        TrainingError: its weights are missing or damaged.
    """

    def __init__(self, run_folder: str | Path, *, data_dir: str | Path | None = None) -> None:
        folder = Path(run_folder)
        require_weights(folder)
        spec = read_spec(folder)
        if spec.answer != "next":
            raise ConfigError(
                f"{folder} was trained on {spec.name}, which does not ask for the next symbol; valid: a run of "
                "task=char_lm"
            )
        symbols = read_symbols(folder)
        if symbols is None and data_dir is None:
            raise ConfigError(
                f"{folder} does not say what its ids stand for, being of an earlier version or of a task of one's own "
                "without symbols; valid: --data-dir=<where its text lies>, or the same run trained again elsewhere"
            )
        if symbols is None:
            config = read_config(folder)
            task = checked_task(
                folder,
                config,
                None,
                lambda: build_task(config.task, data_dir=data_dir, cache_dir=None, filled=config.cache_dir),
            )
            symbols = task.symbols
        self.symbols = symbols
        self.model = cast(SequenceModel, load(folder))

    def write(self, prompt: str, characters: int, **options: Any) -> Iterator[str]:
        """The characters that follow `prompt`, one by one; `options` as of `SequenceModel.generate`.

        What no text has, a mask or padding, is never drawn.

        Raises:
            ValueError: the prompt has a character that the model does not know; or as `generate` does.
        """
        none = [id for id, symbol in enumerate(self.symbols) if symbol in (SPECIALS[MASK], SPECIALS[PAD])]
        for (symbol,) in self.model.stream([ids_of(prompt, self.symbols)], characters, never=none, **options):
            assert symbol is not None
            yield self.symbols[symbol]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status: 0, or 1 where there is nothing to be made of the run."""
    return ends("seqzoo.generate", lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m seqzoo.generate",
        description="Goes on with a text as the model of a run does, character by character.",
    )
    option = parser.add_argument
    option("run", type=Path, metavar="RUN_FOLDER", help="a run that tells the next character, of task=char_lm")
    option("--prompt", default="\n", metavar="TEXT", help="what to go on with; a new line unless given")
    option("--tokens", type=int, default=500, metavar="N", help="how many characters; 500 unless given")
    option("--temperature", type=float, default=1.0, help="0: always the likeliest; 1 unless given")
    option("--top-k", type=int, metavar="K", help="draw from the K likeliest")
    option("--top-p", type=float, metavar="P", help="draw from the likeliest that have P of all probability")
    option("--stop", default="", metavar="CHARACTERS", help="end behind any of these")
    option("--seed", type=int, help="the same seed, the same text; another each time unless given")
    option("--data-dir", metavar="FOLDER", help="where the text lies, for a run folder of an earlier version")
    given = parser.parse_args(arguments)
    if not given.run.is_dir():
        parser.error(f"{str(given.run)!r} is not a folder")
    writer = Writer(given.run, data_dir=given.data_dir)
    options = {name: getattr(given, name) for name in ("temperature", "top_k", "top_p", "seed")}
    try:
        stop = ids_of(given.stop, writer.symbols)
        text = writer.write(given.prompt, given.tokens, **options, stop=stop)
        print(printable_lines(given.prompt), end="", flush=True)
        for character in text:
            print(printable_lines(character), end="", flush=True)
    except ValueError as error:
        raise Said(f"{given.run}: {error}") from None
    finally:
        print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
