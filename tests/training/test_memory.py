"""What one step frees, the next one takes, without the system faulting it in anew."""

from __future__ import annotations

import subprocess
import sys

import pytest

STEPS = """
import resource, sys
import torch
from seqzoo.training.memory import keep_freed_memory

def step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    x = torch.ones(1 << 24)
    y = x + 1
    del x, y
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if sys.argv[1] == "kept":
    keep_freed_memory()
print(min(step() for _ in range(5)))  # the system may take pages back at any time
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_memory_of_a_step_is_kept_for_the_next():
    faults = {
        how: int(subprocess.run([sys.executable, "-c", STEPS, how], capture_output=True, text=True, check=True).stdout)
        for how in ("kept", "returned")
    }
    assert faults["kept"] < 16 < faults["returned"]  # of 128 MB: 64 where pages are huge
