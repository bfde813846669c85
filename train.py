"""Train a sequence mixer on a task; `python train.py --help` says how."""

import sys

from seqzoo.training.cli import main

sys.exit(main())
