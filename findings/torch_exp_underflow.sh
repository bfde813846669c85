#!/usr/bin/env bash
# torch 2.13.0 (CPU): exp in float32 is many times as slow where its results underflow; exp2 of the same numbers is not.
#
# Expected: what exp costs does not depend on its argument, and softmax-like sums may exponentiate -100 or -600 freely.
# Seen: exp of 262,144 numbers near -600 takes 10 times as long and more as of numbers near -1, on one thread of an AMD
# EPYC with AVX-512; exp2(x / log 2) takes as long for both.
# Why a user minds: decays, masked scores and features relative to a maximum are just such numbers. A linear attention
# that forgets a lot, or one outlier among keys, makes a layer several times slower with nothing to see in a profile
# but "exp".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import math
import time

import torch

torch.set_num_threads(1)


def milliseconds(call):
    call()
    times = []
    for _ in range(30):
        start = time.process_time()
        call()
        times.append(1e3 * (time.process_time() - start))
    return min(times)


noise = torch.rand(1 << 18)
near, far = noise - 1, noise - 600
exp = [milliseconds(lambda x=x: torch.exp(x)) for x in (near, far)]
exp2 = [milliseconds(lambda x=x: torch.exp2(x / math.log(2))) for x in (near, far)]
print(f"exp near -1: {exp[0]:.2f} ms, near -600: {exp[1]:.2f} ms; exp2 of the same: {exp2[0]:.2f} and {exp2[1]:.2f} ms")
assert exp[1] > 5 * exp[0], "exp is as fast where it underflows"
assert exp2[1] < 3 * exp2[0], "exp2 is slow there too"
PYTHON
