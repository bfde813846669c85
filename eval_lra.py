"""Compare runs: `python eval_lra.py runs/`, or evaluate one: `python eval_lra.py checkpoint=<run folder>`."""

from seqzoo.report.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
