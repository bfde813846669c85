"""Exponentials inside compiled loops: PyTorch's and the C library's are no vectors there."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

from .loops import compiled


def _declare_power(context, exponent):
    """2 to the power of `exponent` - 127, of exponents from 1 to 254."""

    def generate(target, builder, signature, arguments):
        return builder.bitcast(builder.shl(arguments[0], ir.IntType(32)(23)), ir.FloatType())

    return types.float32(types.int32), generate


_power: Any = intrinsic(_declare_power)

LOWEST, HIGHEST = np.float32(-87.0), np.float32(88.0)  # between them e^x is a normal number of single precision
PER_OCTAVE, BIAS = np.float32(1 / np.log(2)), np.float32(127)
ROUND = np.float32(127.5)
HIGH, LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)  # log 2, in a part of few digits and the rest
FACTORIALS = tuple(np.float32(1 / np.prod(np.arange(1.0, n + 1))) for n in range(8))


@compiled(fastmath={"contract"})
def _parts(x):
    """r, q and s with e^x = s (1 + r q), s a power of 2 and r from -log 2 / 2 to log 2 / 2."""
    near = x if x > LOWEST else LOWEST
    near = near if near < HIGHEST else HIGHEST
    octave = np.int32(near * PER_OCTAVE + ROUND)
    whole = np.float32(octave) - BIAS
    r = (x - whole * HIGH) - whole * LOW
    q = FACTORIALS[7]
    q = q * r + FACTORIALS[6]
    q = q * r + FACTORIALS[5]
    q = q * r + FACTORIALS[4]
    q = q * r + FACTORIALS[3]
    q = q * r + FACTORIALS[2]
    q = q * r + FACTORIALS[1]
    return r, q, _power(octave)


@compiled(fastmath={"contract"})
def _exp_single(x):
    """To the last digits; 0 below e^-87."""
    r, q, s = _parts(x)
    return np.float32(0) if x < LOWEST else (q * r + FACTORIALS[0]) * s


@compiled(fastmath={"contract"})
def _exp_and_less_one_single(x):
    r, q, s = _parts(x)
    e, below = (q * r + FACTORIALS[0]) * s, s * (q * r) + (s - FACTORIALS[0])
    return (np.float32(0), np.float32(-1)) if x < LOWEST else (e, below)


def exp(x):
    """e^x."""
    raise NotImplementedError


def exp_and_less_one(x):
    """e^x and e^x - 1, each to the last digits."""
    raise NotImplementedError


@overload(exp)
def _(x):
    if x == types.float32:
        return lambda x: _exp_single(x)
    return lambda x: np.exp(x)


@overload(exp_and_less_one)
def _(x):
    if x == types.float32:
        return lambda x: _exp_and_less_one_single(x)
    return lambda x: (np.exp(x), np.expm1(x))
