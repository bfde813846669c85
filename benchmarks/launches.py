"""The launches that the operations make, noted down in place of being made.

The operations run on tensors without data, at widths, dtypes and options that users give: the heads of 16 to 256
channels of `gpu.py`, keys narrower than values and the reverse, few sequences and many, with lengths, states, biases.
What is noted is what a GPU would be given, with the same alignment and the same arguments that are constants.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from typing import Any
from unittest import mock

import passes
import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from seqzoo.kernels import backends
from seqzoo.kernels.blocks import Blocks, Key
from seqzoo.kernels.common import dtype_name

MULTIPROCESSORS = 132
EVERY_ROW = (80, 86, 89, 90)  # architectures of which every row of the tables is in a covering
WORDS = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "i1",
}
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
Calls = Iterator[Callable[[], Any]]


@dataclass(frozen=True)
class Launch:
    """A kernel with everything that shapes its code."""

    kernel: Any
    types: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[int, ...]  # arguments that are multiples of 16
    options: tuple[tuple[str, Any], ...]
    row: Key | None = field(compare=False, default=None)  # of the table, that its sizes were read from
    spilled: bool = field(compare=False, default=False)  # once

    @property
    def arguments(self) -> list[str]:
        """Those that are no constants."""
        return [name for name, kind in self.types if kind != "constexpr"]

    @property
    def width(self) -> int:
        """The sizes that it is compiled for, added up."""
        return sum(value for _, value in self.constants if _is_size(value))

    @property
    def precision(self) -> str | None:
        """Of its products, nothing if it makes none."""
        return dict(self.constants).get("PRECISION")

    def __str__(self) -> str:
        pointers = [f"{name}={kind[1:]}" for name, kind in self.types if kind.startswith("*") and "i" not in kind]
        return " ".join([*pointers, *(f"{name}={value}" for name, value in (*self.constants, *self.options))])


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


class Spilled(partial):
    """A call of which a kernel had more values than registers, with the sizes of its time: always compiled again."""

    kernel: str


def spilled(kernel: str, *call: Any) -> Spilled:
    found = Spilled(*call)
    found.kernel = kernel
    return found


def of_operation(operation: str, architecture: int) -> list[Launch]:
    """Each kind of launch once, those of `backends.FEW_WARPS` behind the others."""
    found: dict[Launch, Launch] = {}
    for few_warps in (False, True):
        for call in CALLS[operation]():
            with noting(architecture, few_warps) as launches:
                call()
            for launch in launches:
                once = isinstance(call, Spilled) and call.kernel == launch.kernel.__name__
                found.setdefault(launch, replace(launch, spilled=once))
    return list(found.values())


@contextmanager
def noting(architecture: int, few_warps: bool = False) -> Iterator[list[Launch]]:
    """Launches inside are put on the list, and none is made."""
    rows: list[Key] = []
    best = Blocks._best

    def noted(kernel: Any, programs: int, given: dict[str, Any]) -> Launch:
        return note(kernel, given, rows[-1] if rows else None)

    def of(self: Any, kernel: str, device: torch.device, dtype: torch.dtype, width: int = 0) -> Any:
        rows.append(best(self, kernel, architecture, dtype_name(dtype), width, few_warps))
        return self._replaced.get(kernel, self.rows[rows[-1]])

    with (
        passes.caught(JITFunction, noted, MULTIPROCESSORS) as found,
        mock.patch.object(Blocks, "of", of),
        mock.patch.object(backends, "architecture", return_value=architecture),
    ):
        yield found


def note(kernel: Any, given: dict[str, Any], row: Key | None = None) -> Launch:
    """What Triton would specialise the kernel for."""
    given = dict(given)
    types, constants, divisible = [], [], []
    for index, parameter in enumerate(kernel.params):
        value = given.pop(parameter.name)
        fixed = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1 and fixed):
            types.append((parameter.name, "constexpr"))
            constants.append((parameter.name, value))
        elif isinstance(value, Tensor):
            types.append((parameter.name, f"*{WORDS[value.dtype]}"))
            divisible.append(index)
        elif isinstance(value, float):
            types.append((parameter.name, "fp32"))
        else:
            types.append((parameter.name, "i32" if abs(value) < 2**31 else "i64"))
            if fixed and value % 16 == 0:
                divisible.append(index)
    return Launch(kernel, tuple(types), tuple(constants), tuple(divisible), tuple(sorted(given.items())), row)


def covering(launches: list[Launch], architecture: int) -> list[Launch]:
    """Some of them: of each kernel the widest heads of each row of its table, or of each dtype where that has to do.

    For sm_90 also what spilled once, each switch, each argument with it and without, and the rows with few warps, which
    all architectures have in common.
    """
    every_row = architecture in EVERY_ROW
    return _chosen(launches, architecture, lambda launch: launch.row if every_row else launch.precision)


def widest(launches: list[Launch], architecture: int) -> list[Launch]:
    """Fewer yet: of each kernel the widest heads in float32, and in a dtype of 16 bits.

    For sm_90 also what spilled once, each switch, and each argument with it and without.
    """
    return _chosen(launches, architecture, lambda launch: launch.precision == "tf32x3")


def _few_warps(launch: Launch) -> bool:
    return launch.row is not None and bool(launch.row.few_warps)


def _chosen(launches: list[Launch], architecture: int, kind: Callable[[Launch], Any]) -> list[Launch]:
    """The widest of each kernel and kind; for sm_90 also few warps, what spilled once, and each setting."""
    hopper = architecture == 90
    launches = [launch for launch in launches if hopper or not _few_warps(launch)]

    def single(launch: Launch) -> Any:
        return launch if hopper and launch.spilled else (launch.kernel, kind(launch))

    def settings(launch: Launch) -> set[tuple[Any, ...]]:
        switches = [(name, value) for name, value in launch.constants if not _is_size(value)]
        given = [(name, "given") for name in launch.arguments]
        return {(launch.kernel, *setting) for setting in (*switches, *given)}

    chosen = list({single(launch): launch for launch in sorted(launches, key=lambda launch: launch.width)}.values())
    wanted = set().union(*map(settings, launches)) - set().union(*map(settings, chosen)) if hopper else set()
    while wanted:
        chosen.append(max(launches, key=lambda launch: len(settings(launch) & wanted)))
        wanted -= settings(chosen[-1])
    return chosen


def scans() -> Calls:
    """Both passes of the diagonal scan, few rows and many, wide and narrow."""

    def one_way(B: int, T: int, D: int, dtype: torch.dtype, constant: bool, reverse: bool, padded: bool) -> Calls:
        for scaled in (False, True):
            yield partial(passes.scan, B, T, D, dtype, constant, reverse, padded, padded, scaled)

    def two_ways(B: int, T: int, D: int, dtype: torch.dtype, padded: bool) -> Calls:
        for scaled in (False, True):
            yield partial(passes.both_scans, B, T, D, dtype, padded, scaled)

    yield from two_ways(64, 1024, 1024, torch.complex64, False)
    yield from two_ways(2, 16384, 256, torch.float32, False)
    for dtype, constant in ((torch.complex64, True), (torch.complex64, False), (torch.float32, False)):
        yield from one_way(64, 1024, 1024, dtype, constant, False, False)
        yield from one_way(2, 16384, 256, dtype, constant, True, True)
    yield from one_way(2, 16384, 256, torch.bfloat16, True, True, True)
    yield from one_way(3, 100, 24, torch.complex64, True, False, True)
    yield from one_way(3, 100, 5, torch.float32, False, True, False)
    for T in (16384, 300):  # documents that are cut, and not
        yield partial(passes.scan, 1, T, 256, torch.complex64, True, False, state=True, scaled=True, documents=8)
        yield partial(passes.scan, 1, T, 256, torch.float32, False, True, documents=8)
        yield partial(passes.both_scans, 1, T, 256, torch.complex64, scaled=True, documents=8)
    for dtype in (torch.complex64, *FLOATS):
        yield from two_ways(3, 700, 200, dtype, True)
        for constant, reverse in product((True, False), repeat=2):
            yield partial(passes.scan, 3, 700, 200, dtype, constant, reverse, True, True)


def attentions() -> Calls:
    """Both passes of softmax attention: plain, padded, and with every option."""

    def both(D: int, Dv: int, dtype: torch.dtype, causal: bool, padded: bool = False, every: bool = False) -> None:
        passes.attention(8, 1024, 8, 2 if every else 8, D, Dv, dtype, causal, padded or every, every, every)

    for dtype, D in widths({torch.bfloat16: 256, torch.float16: 256, torch.float32: 64}):
        yield partial(both, D, D, dtype, True)
        yield partial(both, D, D, dtype, False, padded=True)
        yield partial(both, D, D, dtype, True, every=True)
    for dtype, D in ((torch.bfloat16, 64), (torch.float32, 64)):
        for causal, scaled in ((True, False), (False, True)):
            for others in (False, True):
                call = partial(passes.attention, 1, 8192, 8, 2, D, D, dtype, causal, scaled=scaled)
                yield partial(call, documents=8, others=others)
        yield partial(passes.attention, 8, 1024, 8, 8, D, D, dtype, True, True, True, window=100)
        yield partial(passes.attention, 1, 8192, 8, 8, D, D, dtype, False, documents=8, window=100)
    for D, Dv in ((16, 64), (64, 128), (128, 64), (112, 112), (64, 256)):
        yield partial(both, D, Dv, torch.bfloat16, False)
        yield partial(both, D, Dv, torch.float16, True, every=True)


def linear_attentions() -> Calls:
    """Both passes of linear attention, few heads and many, with each kind of decay."""
    both = passes.linear_attention
    yield spilled("_linear_kernel", both, 64, 1024, 2, 256, 256, torch.bfloat16, "none", True, True)
    yield spilled("_linear_kernel", both, 64, 1024, 8, 16, 256, torch.bfloat16, "head", True, False)
    yield spilled("_linear_kernel", both, 64, 1024, 8, 16, 128, torch.bfloat16, "step", True, False)
    most = {torch.bfloat16: 256, torch.float16: 128, torch.float32: 64}
    for dtype, D in widths(most):
        for decay, causal, normalize in (
            ("none", True, True), ("none", False, True), ("head", True, False), ("step", True, False),
            ("channel", True, True),
        ):  # fmt: skip
            if decay != "step" or D <= 128:
                yield partial(both, 2, 300, 3, D, D, dtype, decay, causal, normalize, False, True)
    for dtype in (torch.bfloat16, torch.float32):
        yield partial(both, 64, 1024, 8, 64, 64, dtype, "none", True, True)
        yield partial(both, 64, 1024, 8, 64, 64, dtype, "none", False, True)
        yield partial(both, 2, 16384, 4, 64, 64, dtype, "step", True, False, True)
    for dtype, D in ((torch.bfloat16, 64), (torch.bfloat16, 128), (torch.float16, 32)):
        yield partial(both, 2, 16384, 4, D, D, dtype, "none", True, True, True, True)
    for dtype, D in ((torch.bfloat16, 64), (torch.bfloat16, 128), (torch.float32, 64)):
        yield partial(both, 2, 16384, 4, D, D, dtype, "channel", True, True, True)
    for dtype, wide in most.items():
        yield partial(both, 64, 1024, 8, 16, wide, dtype, "none", True, True)
        yield partial(both, 64, 1024, 8, 16, wide, dtype, "head", True, False)
        yield partial(both, 64, 1024, 8, 8, min(wide, 128), dtype, "step", True, False)
        yield partial(both, 64, 1024, 8, 16, wide, dtype, "channel", True, False)
    for dtype in (torch.bfloat16, torch.float32):
        for decay, causal, normalize in (
            ("none", True, True), ("none", False, True), ("step", True, False), ("channel", True, False),
        ):  # fmt: skip
            yield partial(both, 16, 1024, 4, 64, 64, dtype, decay, causal, normalize, causal, packed=True)
    yield partial(both, 64, 1024, 2, 256, 256, torch.bfloat16, "none", True, False)
    yield partial(both, 64, 1024, 2, 100, 100, torch.bfloat16, "none", False, False)


def delta_rules() -> Calls:
    """Both passes of the delta rule, with each kind of decay, from a state or not, of rows or documents."""
    both = passes.delta_rule
    for dtype, D in widths({torch.bfloat16: 128, torch.float16: 128, torch.float32: 64}):
        for decay, erase in (("none", False), ("head", True), ("channel", False)):
            yield partial(both, 2, 300, 4, 2, D, D, dtype, decay, erase, True, True)
    yield partial(both, 1, 32768, 32, 8, 128, 128, torch.bfloat16, "head")
    for dtype in FLOATS:
        yield partial(both, 16, 1024, 4, 4, 64, 64, dtype, "none", True)
        yield partial(both, 16, 1024, 4, 4, 64, 64, dtype, "channel", True, True, packed=True)
    for D, Dv in ((16, 128), (128, 16), (96, 128)):
        yield partial(both, 16, 1024, 4, 4, D, Dv, torch.bfloat16, "head", packed=True)


def favor_attentions() -> Calls:
    """Both passes of FAVOR attention, causal from a state and not, with time in one segment and in several."""

    def both(B: int, T: int, H: int, D: int, M: int, dtype: torch.dtype, causal: bool, options: bool) -> None:
        passes.favor_attention(B, T, H, D, M, dtype, causal, options and causal, options)

    yield spilled("_key_kernel", both, 2, 300, 2, 128, 100, torch.float16, True, True)
    for dtype, causal in product((torch.bfloat16, torch.float32), (False, True)):
        yield partial(passes.favor_attention, 16, 1024, 4, 64, 266, dtype, causal, causal, packed=True)
    for dtype, D in widths({torch.bfloat16: 128, torch.float16: 128, torch.float32: 64}):
        yield partial(both, 2, 300, 2, D, 100, dtype, True, True)
    for dtype, causal in product((torch.bfloat16, torch.float32), (False, True)):
        yield partial(both, 32, 1024, 8, 64, 266, dtype, causal, False)
    yield partial(both, 1, 16384, 4, 32, 110, torch.bfloat16, False, True)
    for dtype in (torch.bfloat16, torch.float16):
        yield partial(both, 2, 4096, 4, 128, 256, dtype, True, True)
    yield partial(both, 2, 1100, 2, 16, 24, torch.float16, True, True)
    yield partial(both, 2, 4096, 4, 112, 300, torch.float16, False, False)


def vq_attentions() -> Calls:
    """Codes, and both passes of VQ attention, narrow and wide, with and without each option."""

    def both(
        D: int, Dv: int, dtype: torch.dtype, causal: bool, options: bool, S: int = 128, L: int = 64, H: int = 1
    ) -> None:
        bias = "step" if options else "none"
        passes.vq_attention(8, 1024, H, D, Dv, S, L, dtype, causal, bias, options and causal, options)

    for dtype in (torch.bfloat16, torch.float16):
        yield spilled("_forward_kernel", both, 16, 32, dtype, True, True, 40, 33, 2)
    for dtype, D in (*product(FLOATS, (16, 32, 64, 128, 256)), (torch.bfloat16, 512)):
        yield partial(passes.nearest_code, 32, 1024, 1, D, 512, dtype)
        yield partial(passes.nearest_code, 32, 1024, 1, D, 512, dtype, padded=True)
    for dtype, causal in product(FLOATS, (True, False)):
        yield partial(both, 128, 256, dtype, causal, True)
        yield partial(both, 64, 64, dtype, causal, False)
        yield partial(both, 16, 32, dtype, causal, True, 40, 33, 2)
        yield partial(both, 32, 32, dtype, causal, False, 128, 64, 4)
        yield partial(both, 256, 512, dtype, causal, True, 64, 128, 2)
    yield partial(both, 256, 512, torch.float16, True, True, 512, 512)
    yield partial(both, 128, 256, torch.bfloat16, True, False, 512, 512)
    yield partial(both, 16, 16, torch.float16, False, False, 16, 16)
    for causal in (True, False):
        packed = partial(passes.vq_attention, 1, 8192, 1, 128, 256, 128, 64, torch.bfloat16, causal)
        yield partial(packed, "step", state=causal, documents=20)


def gated_attentions() -> Calls:
    """Both passes of gated attention, few sequences and many, narrow and wide, with and without each option."""
    both = passes.gated_attention
    for dtype in FLOATS:
        yield partial(both, 64, 1024, 128, 256, 256, dtype, True, True)
        yield partial(both, 64, 1024, 64, 512, 200, dtype, False, True)
        yield partial(both, 64, 1024, 128, 256, 256, dtype, True, True, True)
        for S, E in ((16, 48), (64, 128), (128, 512), *([(256, 320)] if dtype == torch.bfloat16 else [])):
            yield partial(both, 2, 700, S, E, 200, dtype, S >= 64, True)
        yield partial(both, 2, 800, 32, 64, 200, dtype, True, True, True)
    yield partial(both, 2, 16384, 128, 1536, 256, torch.bfloat16, True, False)
    yield partial(both, 64, 200, 128, 256, 256, torch.bfloat16, True, True)
    yield partial(both, 2, 16384, 256, 512, 256, torch.bfloat16, True, True)
    yield partial(both, 2, 16384, 256, 512, 256, torch.bfloat16, True, True, True)
    yield partial(both, 4, 4096, 32, 64, 64, torch.bfloat16, True, False)
    for causal in (True, False):  # chunks of documents
        yield partial(both, 64, 256, 128, 256, 256, torch.bfloat16, causal, True, True)


def widths(most: dict[torch.dtype, int]) -> Iterator[tuple[torch.dtype, int]]:
    """The widths of heads of `gpu.py` that a kernel takes in each dtype."""
    for dtype, channels in most.items():
        for D in (16, 32, 64, 128, 256):
            if channels >= D:
                yield dtype, D


CALLS = {
    "attention": attentions,
    "delta_rule": delta_rules,
    "diagonal_scan": scans,
    "favor_attention": favor_attentions,
    "gated_attention": gated_attentions,
    "linear_attention": linear_attentions,
    "vq_attention": vq_attentions,
}
