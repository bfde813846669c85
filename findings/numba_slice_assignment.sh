#!/usr/bin/env bash
# Numba 0.68.1: row[:] = values between arrays compiles Python's string formatting, which takes longer than all else.
#
# Expected: in compiled code assigning one array to a slice of another compiles about as fast as the loop it stands for.
# Seen: it can raise "cannot assign slice of shape ... from input of shape ...", and to write the two shapes Numba
# compiles its implementations of strings (concatenation, code points of each width), in every process that compiles a
# function with such a line: many times as long as the function itself.
# Output: processor time of both, such as "loop 0.18 s, slice 3.64 s: 20.7 times" (17.6 to 22.3 in five runs).
# Why a user minds: a kernel of ten lines takes seconds at its first call, and nothing in a profile of what it does says
# why; a loop, or a function of one's own that has it, compiles in a fraction of a second and runs as fast.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numba==0.68.1 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import time

import numba
import numpy as np


def by_loop(x, y):
    for t in range(len(x)):
        row = x[t, :]
        for d in range(len(row)):
            y[t, d] = row[d]


def by_slice(x, y):
    for t in range(len(x)):
        y[t, :] = x[t, :]


def seconds(function):
    start = time.process_time()
    numba.njit(function)(np.ones((2, 3)), np.ones((2, 3)))
    return time.process_time() - start


seconds(lambda x, y: None)  # what the first function of all pays for
loop = seconds(by_loop)
slices = seconds(by_slice)
print(f"loop {loop:.2f} s, slice {slices:.2f} s: {slices / loop:.1f} times")
assert slices > 3 * loop
PYTHON
