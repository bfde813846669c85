"""Compare runs: `python eval_lra.py runs/`, or evaluate one: `python eval_lra.py checkpoint=<run folder>`."""

import sys

from seqzoo.commands import evaluate

if __name__ == "__main__":
    sys.exit(evaluate())
