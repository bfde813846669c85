"""A case, run and judged: values and every gradient beside float64, the same bits in every run, memory full of NaN."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor

from seqzoo.kernels import backends
from seqzoo.kernels.agreement import relative_error
from seqzoo.kernels.common import dtype_name

from . import bounds
from .bounds import Errors
from .case import HALVES, WIDE, Case, Maker, Tensors
from .cases import FULL, TINY, every
from .tables import table

MOVED = 2.0**-20  # by which inputs are moved for the condition: far above float64's rounding, far below 1
NARROW = 32  # channels, up to which there are rows with few warps
REPEATS = 20
# Definitions whose launches would cost more than they do.
STEP_BY_STEP = ("linear_attention", "delta_rule", "diagonal_scan")
FIRST = ("bfloat16", "complex64")  # dtypes that models are trained in


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@cache
def known(rehearse: bool) -> dict[tuple[str, str], Case]:
    """By operation and label."""
    return {(case.operation, case.label): case for case in every(TINY if rehearse else FULL)}


def plan(rehearse: bool) -> list[dict[str, Any]]:
    """The arguments of `check` for all rows, dtypes of training first, and riskiest first in each of both.

    In a rehearsal, each case in one dtype.
    """
    architecture = backends.architecture(device())
    rows = []
    for number, case in enumerate(known(rehearse).values()):
        dtypes = case.dtypes[number % len(case.dtypes) :][:1] if rehearse else case.dtypes
        for dtype in dtypes:
            name = dtype_name(dtype)
            choices = (0, 1) if _has_few_warps(case, name, architecture) else (0,)
            for few_warps in choices[number % len(choices) :][:1] if rehearse else choices:
                row = {"operation": case.operation, "case": case.label, "dtype": name, "width": case.width}
                rows.append({**row, "few_warps": few_warps})
    return sorted(rows, key=lambda row: row["dtype"] not in FIRST)


def _has_few_warps(case: Case, dtype: str, architecture: int) -> bool:
    """Whether the rows that the case takes may have a second choice."""
    return 0 < case.width <= NARROW and any(
        key.few_warps and key.dtype in (dtype, "any") and key.architecture <= architecture
        for key in table(case.operation).rows
    )


def check(
    operation: str, case: str, dtype: str, width: int, few_warps: int, rehearse: bool,
    replaced: dict[str, list[int]] | None = None, repeats: int = REPEATS,
) -> dict[str, Any]:  # fmt: skip
    """A row of `checks.jsonl`, without the arguments.

    Args:
        width: of no matter here: the class that the row counts for.
        replaced: block sizes by kernel, in place of the table's.
        repeats: runs that have to have the same bits as the first.
    """
    began = time.perf_counter()
    chosen = known(rehearse)[operation, case]
    kind = getattr(torch, dtype)
    torch.manual_seed(0)
    x = chosen.make(Maker(kind, device()))
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(backends, "FEW_WARPS", bool(few_warps)))
        for kernel, sizes in (replaced or {}).items():
            own = table(operation)
            stack.enter_context(own.replaced(kernel, own.make(*sizes)))
        with poisoned() as warned, counted() as launches:
            found, w = evaluate(chosen, x, "fused")
            same_bits = all(_same(found, evaluate(chosen, x, "fused", w)[0]) for _ in range(1 if rehearse else repeats))
    row = {"launches": sum(launches.values()), "kernels": sorted(launches), "same_bits": same_bits}
    if warned:
        row["warned"] = warned
    if not launches:  # the fused form refused: what was compared is another one
        return {"status": "not checked", **row}

    truth = Truth.of(chosen, kind, x, w)
    row |= truth.judge(found)
    row["chunked"] = truth.error_of_chunked(x, w, row["worst"])
    passed = same_bits and not row["above"]
    return {"status": "passed" if passed else "above", **row, "seconds": time.perf_counter() - began}


class Truth(NamedTuple):
    """What results are compared with, of the sequences that count, and how it reacts to rounding."""

    case: Case
    dtype: torch.dtype
    expected: Tensors
    linear: dict[str, Errors]  # the conditions of `bounds`
    all: dict[str, Errors]
    single: dict[str, Errors]  # of PyTorch's form on the same inputs in float32

    @classmethod
    def of(cls, case: Case, dtype: torch.dtype, x: Tensors, w: Tensors) -> Truth:
        in_dtype = [name for name, y in x.items() if y.dtype == dtype and name not in case.constant]
        single = evaluate(case, {name: y.float() if y.dtype in HALVES else y for name, y in x.items()}, "chunked", w)[0]
        x = {name: wide(y) if name in case.constant else _some(case, wide(y)) for name, y in x.items()}
        w = {name: _some(case, wide(y)) for name, y in w.items()}
        if case.exact == "reference" and case.operation in STEP_BY_STEP:
            x, w = ({name: y.cpu() for name, y in tensors.items()} for tensors in (x, w))
        expected = evaluate(case, x, case.exact, w)[0]
        conditions = []
        for moved, with_w in ((case.linear, True), (in_dtype, case.roundings > 0)):
            nudged = {name: _moved(y) if name in moved else y for name, y in x.items()}
            nudged_w = {name: _moved(y) if with_w else y for name, y in w.items()}
            near = evaluate(case, nudged, case.exact, nudged_w)[0]
            conditions.append({name: Errors.of(near[name], y).over(MOVED) for name, y in expected.items()})
        errors = {name: Errors.of(_some(case, single[name]), y) for name, y in expected.items()}
        return cls(case, dtype, expected, *conditions, errors)

    @property
    def exact(self) -> str:
        """The form that is right, and where it was run."""
        return f"{self.case.exact} in float64 on {next(iter(self.expected.values())).device.type}"

    def judge(self, found: Tensors) -> dict[str, Any]:
        """Errors beside their bounds, of the tensor that is closest to its bound or furthest beyond it."""
        results = {name: self._judge(name, found[name]) for name in self.expected}
        worst = max(results, key=lambda name: _excess(results[name]))
        above = [name for name, result in results.items() if not _excess(result) <= 1]
        errors = {name: [result["whole"], result["worst_row"]] for name, result in results.items()}
        return {"worst": worst, **results[worst], "above": above, "exact": self.exact, "errors": errors}

    def _judge(self, name: str, found: Tensor) -> dict[str, Any]:
        """`worst_row` is that furthest beyond its own bound, which is `bound_row`."""
        y, linear, all, single = self.expected[name], self.linear[name], self.all[name], self.single[name]
        errors = Errors.of(_some(self.case, found), y)
        size = y.abs().square().mean().sqrt().item()
        bound = bounds.Bound(self.dtype, self.case.roundings, self.case.terms, size)
        cancelled = bounds.of_same_step(single.rows, y.shape).nan_to_num(posinf=0.0) / bounds.UNIT[torch.float32]
        rows = bound.rows(linear.rows, all.rows, cancelled)
        row = int((errors.rows / rows).argmax())
        return {
            "whole": errors.whole, "bound": bound.whole(linear.whole, all.whole),
            "worst_row": errors.rows[row].item(), "bound_row": rows[row].item(),
            "chunked_float32": [single.whole, single.rows[row].item()], "condition": [linear.whole, all.whole],
        }  # fmt: skip

    def error_of_chunked(self, x: Tensors, w: Tensors, name: str) -> Any:
        """What PyTorch makes of the same inputs in their own dtype, for comparison."""
        try:
            found = evaluate(self.case, x, "chunked", w)[0]
            return relative_error(_some(self.case, found[name]), self.expected[name])
        except Exception as error:  # it is not what is checked
            return f"{type(error).__name__}: {error}"[:200]


def _excess(result: dict[str, Any]) -> float:
    return max(result["whole"] / result["bound"], result["worst_row"] / result["bound_row"])


def _some(case: Case, x: Tensor) -> Tensor:
    return x if case.only is None else x[list(case.only)]


def wide(x: Tensor) -> Tensor:
    return x.to(WIDE.get(x.dtype, torch.float64)) if x.is_floating_point() or x.is_complex() else x


def evaluate(case: Case, x: Tensors, form: str, w: Tensors | None = None) -> tuple[Tensors, Tensors]:
    """Outputs by name, and the gradient of each tensor as "d name"; and the gradients that came in, drawn if not given.

    Those are numbers that every dtype has.
    """
    floats = [name for name, y in x.items() if name not in case.constant and (y.is_floating_point() or y.is_complex())]
    leaves = {name: y.detach().clone().requires_grad_(name in floats) for name, y in x.items()}
    home = next(iter(x.values())).device
    with home if form == "reference" else nullcontext():  # definitions make their masks wherever that is
        outputs = case.call(leaves, form)
        if w is None:
            w = {name: drawn(y) for name, y in outputs.items()}
        found = {name: y.detach() for name, y in outputs.items()}
        last = [name for name, y in outputs.items() if y.requires_grad]
        if last:
            gradients = torch.autograd.grad(
                [outputs[name] for name in last],
                [leaves[name] for name in floats],
                [w[name].to(outputs[name].dtype) for name in last],
            )
            found |= {f"d {name}": y for name, y in zip(floats, gradients, strict=True)}
    return found, w


def drawn(like: Tensor) -> Tensor:
    shape = (*like.shape, 2) if like.is_complex() else like.shape
    values = torch.randn(shape, device=like.device).bfloat16().half().float()
    return torch.view_as_complex(values) if like.is_complex() else values


def _moved(x: Tensor) -> Tensor:
    if not (x.is_floating_point() or x.is_complex()):
        return x
    return x * (1 + MOVED * torch.randn(x.shape, dtype=x.real.dtype, device=x.device))


def _same(found: Tensors, again: Tensors) -> bool:
    return all(torch.equal(y.nan_to_num(), again[name].nan_to_num()) for name, y in found.items())


@contextmanager
def poisoned() -> Iterator[list[str]]:
    """Inside, memory that nothing wrote to is full of NaN; what is not deterministic is on the list in the end."""
    said: list[str] = []
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield said
    finally:
        torch.use_deterministic_algorithms(False)
    said += sorted({str(w.message)[:150] for w in caught if "determinis" in str(w.message)})


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Launches inside, by kernel."""
    launches: dict[str, int] = {}
    runner = triton.runtime.interpreter.InterpretedFunction if backends.INTERPRETED else triton.runtime.jit.JITFunction
    start = runner.run

    def run(self: Any, *arguments: Any, **options: Any) -> Any:
        launches[self.fn.__name__] = launches.get(self.fn.__name__, 0) + 1
        return start(self, *arguments, **options)

    with mock.patch.object(runner, "run", run):
        yield launches
