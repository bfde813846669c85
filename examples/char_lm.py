"""Trains a model on the characters of a text, and lets it go on with it: about a minute on two CPU cores.

    python examples/char_lm.py                     on the texts of this repository
    python examples/char_lm.py my.txt --model mamba2 --prompt "The "

The run lies in runs/, and `python -m seqzoo.generate runs/<folder>` writes more.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import seqzoo
from seqzoo.config import compose
from seqzoo.generate import Writer

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="?", type=Path, help="a UTF-8 file; the pages of this repository unless given")
    parser.add_argument("--model", default="lru", help="model= of train.py; lru unless given")
    parser.add_argument("--tokens", type=int, default=600_000, help="characters to train on; 600,000 unless given")
    parser.add_argument("--prompt", default="The ", help="what the text begins with")
    parser.add_argument("--runs-dir", default="runs")
    given = parser.parse_args()
    with TemporaryDirectory() as folder:
        text = given.text
        if text is None:
            text = Path(folder) / "pages.txt"
            pages = [
                ROOT / "README.md",
                ROOT / "CONTRIBUTING.md",
                ROOT / "CHANGELOG.md",
                *sorted(ROOT.glob("docs/*.md")),
            ]
            lines = [line for page in pages for line in page.read_text().splitlines()]
            text.write_text("\n".join(line for line in lines if not line.startswith("|")))  # no tables
        result = seqzoo.run(
            compose(
                [
                    *(f"model={given.model}", "task=char_lm", "recipe=tiny", "finetuning.lr=3e-3"),
                    *(f"task.text={text.resolve()}", f"finetuning.tokens={given.tokens}", "finetuning.evaluations=3"),
                    *(f"runs_dir={given.runs_dir}", "wandb.mode=disabled", "device=cpu"),
                ]
            )
        )
    print(f"{result['test']['bits_per_character']:.2f} bits per character of text that it has not seen\n")
    print(given.prompt, end="", flush=True)
    for character in Writer(result["folder"]).write(given.prompt, 400, temperature=0.7, seed=0):
        print(character, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
