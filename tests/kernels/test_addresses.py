"""No kernel touches what is not its own, or counts in too few bits, whatever the sizes and the lengths."""

from __future__ import annotations

from itertools import product
from unittest import mock

import pytest
import triton
import triton.language as tl
from addresses import Launch, faults, noting
from fused_calls import CALLS, HALF, MODULES, RAGGED, SINGLE, Size
from often import others_slow
from passes import integers, meta

from seqzoo.kernels import backends

pytestmark = pytest.mark.skipif(not backends.INTERPRETED, reason="runs in Triton's interpreter")

HUGE = {  # more than 2^32 numbers in q, k and v
    "many sequences": Size(2**17 + 1, 257, 2, 64, HALF),
    "long sequences": Size(3, 2**25 + 5, 1, 50, SINGLE),
    "many heads": Size(2, 2**12 + 5, 2**13, 64, HALF),
}


def launches(operation: str, size: Size, multiprocessors: int = 1) -> list[Launch]:
    with (
        noting(multiprocessors) as found,
        mock.patch.object(backends, "architecture", return_value=90),
    ):
        for call in CALLS[operation](size):
            call()
    return found


def found_in(launch: Launch, program: int, length: int, position: int = 3) -> list[str]:
    """Its faults where every sequence has this length, whatever an argument calls it, and queries stand there."""
    loaded = dict.fromkeys(("lengths", "last"), length)
    loaded |= {"position": position, "first": 3, "earlier": 2**40, "valid": 1, "starts": 0}
    loaded |= {"steep": int(launch.arguments.get("CAREFUL", False))}  # what the launch is for
    return faults(launch, program, loaded)


OFTEN = {(operation, [*HUGE][n % len(HUGE)]) for n, operation in enumerate(CALLS)}


@pytest.mark.parametrize(("operation", "size"), others_slow(product(CALLS, HUGE), OFTEN))
def test_beyond_two_to_the_31st(operation, size):
    for launch in launches(operation, HUGE[size], multiprocessors=132):
        assert launch.programs < 2**31, launch.name
        for program in {0, launch.programs // 2, launch.programs - 1}:
            assert not found_in(launch, program, HUGE[size].T)


@pytest.mark.parametrize(
    "operation", others_slow(CALLS, ["attention", "delta_rule", "diagonal_scan", "gated_attention", "nearest_code"])
)
def test_lengths_that_no_sequence_has(operation):
    """They are not looked at on a GPU: a caller's slip must stay one."""
    for launch in launches(operation, RAGGED):
        for program in range(max(0, launch.programs - 4), launch.programs):  # of the last sequence
            for length in (RAGGED.T + 1, 2**40, -1):
                assert not found_in(launch, program, length), length


def test_positions_that_no_key_has():
    for launch in launches("attention", RAGGED):
        for program in range(launch.programs):
            for position in (RAGGED.T + 1, 2**40, -70, -(2**40)):
                assert not found_in(launch, program, RAGGED.T, position), position


def test_every_kernel_is_among_them():
    kernels = {name for module in MODULES for name in vars(module) if name.endswith("_kernel")}
    assert {launch.name for operation in CALLS for launch in launches(operation, RAGGED, 1000)} == kernels


@triton.jit
def short_rows(x, y, T, stride, n, BLOCK: tl.constexpr):
    """Rows are found in 32 bits, and up to n of them read, however many there are."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x_t = tl.load(x + row * stride, mask=row < tl.load(n), other=0.0)
    tl.store(y + row.to(tl.int64) * stride, x_t, mask=row < T)


def toy(T: int, stride: int, length: int) -> list[str]:
    x = meta(T, stride)
    with noting() as found:
        short_rows[(triton.cdiv(T, 16),)](x, x, T, stride, integers(1), BLOCK=16)
    return faults(found[0], found[0].programs - 1, {"n": length})


def test_faults_are_found():
    assert toy(1000, 2**10, 1000) == []
    assert toy(2**22, 2**9 - 1, 2**22) == []
    line = f"test_addresses.py:{short_rows.fn.__code__.co_firstlineno + 4}"
    where = f"short_rows, program 262143 of 262144, {line}"
    before = 4 * (2**32 - (2**22 - 16) * (2**9 + 1))
    wrapped = [f"{where} mul leaves int32", f"{where} reads x {before} bytes before it begins"]
    assert toy(2**22, 2**9 + 1, 2**22) == wrapped
    behind = f"{line} reads x {7 * 2**12 + 4} bytes behind its end"
    assert toy(1000, 2**10, 1008) == [f"short_rows, program 62 of 63, {behind}"]
