"""The delta rule beside its chunks written plainly, which autograd differentiates, on this machine: two minutes.

    python benchmarks/delta_rule.py
    python benchmarks/delta_rule.py --out results/delta_rule     writes delta_rule.json there too

Forward and backward in single precision, of one thread, timed in turns by the processor's clock: the shortest of several,
each form with the length of chunks that is quickest for it. Then how time grows with T.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seqzoo.kernels import delta_rule
from seqzoo.kernels.delta_rule import chunked
from seqzoo.runs import provenance
from seqzoo.training.memory import keep_freed_memory

B, T, H, D = 4, 1024, 4, 64
LENGTHS = (2048, 4096, 8192, 16384)
CHUNKS = (16, 32, 64, 128)


def plain(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, C: int) -> Tensor:
    """Yang et al. 2024: within all chunks at once by the inverse of a triangle, from chunk to chunk by the state."""
    q, k, v, beta = (x.unflatten(1, (-1, C)).transpose(2, 3).movedim(1, 2) for x in (q, k, v, beta[..., None]))
    return q
