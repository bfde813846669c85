"""Random numbers for compiled loops: SplitMix64 (Steele et al. 2014), the same on every machine.

A stream is its state, uint64 [1], made by `stream` and advanced by each draw; every key has a stream of its own.
"""

from __future__ import annotations

import numpy as np
from numba import njit

_INCREMENT, _MULTIPLY_1, _MULTIPLY_2 = map(np.uint64, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
_11, _27, _30, _31, _32 = map(np.uint64, (11, 27, 30, 31, 32))  # Numba makes a float of a uint64 and an int


def stream(*key: int) -> np.ndarray:
    """The stream of a key, such as a seed and the number of a shard."""
    return np.random.SeedSequence(key).generate_state(1, np.uint64)


@njit(nogil=True)
def _bits(state):
    state[0] += _INCREMENT
    bits = state[0]
    bits = (bits ^ (bits >> _30)) * _MULTIPLY_1
    bits = (bits ^ (bits >> _27)) * _MULTIPLY_2
    return bits ^ (bits >> _31)


@njit(nogil=True)
def below(state, n):
    """A uniform integer in [0, n), up to a bias of n / 2^32."""
    return np.int64(((_bits(state) >> _32) * np.uint64(n)) >> _32)


@njit(nogil=True)
def uniform(state):
    """A uniform double in [0, 1)."""
    return np.float64(_bits(state) >> _11) * 2.0**-53
