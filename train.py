"""Train a sequence mixer on a task; `python train.py --help` says how."""

import os
import sys

# PyTorch's OpenMP threads wait for work by spinning, on cores that the compiled scan, or another process, could use.
# After so many turns, some tens of microseconds, they sleep. This is read when PyTorch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

from seqzoo.commands import train

sys.exit(train())
