"""Where kernels read and write, found without memory: their index arithmetic alone, on tensors of any size.

Launches are noted in place of being made, on tensors without data; Triton's interpreter then runs single programs of
them, in which loads give numbers that are named and stores do nothing. It is a fault when an address that is not masked
lies outside its tensor, and when an integer leaves its type on the way there: the interpreter wraps around in silence,
as a GPU does.

Of each loop only the first two steps and the last are taken: an address is never carried from one step to the next, and
whatever is linear in a counter is furthest out at its ends.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton
import triton.language as tl
from passes import caught
from quick_interpreter import PatchedLanguage, quick
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, TensorHandle, interpreter_builder

from seqzoo.kernels.common import dtype_name

APART = 1 << 48  # bytes between two tensors: an address tells which one it belongs to
EXACT = {"create_add": np.add, "create_sub": np.subtract, "create_mul": np.multiply, "create_shl": np.left_shift}
ELSEWHERE = (str(Path(triton.__file__).parent), __file__)


@dataclass(frozen=True)
class Launch:
    kernel: InterpretedFunction
    programs: int
    arguments: Mapping[str, Any]  # by name

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__


def noting(multiprocessors: int = 1) -> AbstractContextManager[list[Launch]]:
    """Launches inside are put on the list, and none is made."""
    return caught(InterpretedFunction, _noted, multiprocessors)


def _noted(kernel: InterpretedFunction, programs: int, given: dict[str, Any]) -> Launch:
    return Launch(kernel, programs, {name: given[name] for name in kernel.arg_names})


def faults(launch: Launch, program: int, loaded: Mapping[str, int]) -> list[str]:
    """What goes wrong in a program: where, and what.

    Args:
        launch: of a kernel.
        program: its number.
        loaded: what is read from integer tensors, by the name of the argument; everything else is 0.
    """
    tensors = {name: x for name, x in launch.arguments.items() if isinstance(x, Tensor)}
    seen = _Seen(list(tensors), [x.numel() * x.element_size() for x in tensors.values()], loaded)
    fixed = interpreter.GridExecutor(launch.kernel.fn, launch.kernel.arg_names, ()).constexprs
    pointers = {name: _pointer(x.dtype, (1 + index) * APART) for index, (name, x) in enumerate(tensors.items())}
    plain = {
        name: x if name in fixed else interpreter._implicit_cvt(x)
        for name, x in launch.arguments.items()
        if name not in tensors
    }
    with _patched(seen, launch.kernel):
        kernel = launch.kernel.rewrite()
        interpreter_builder.set_grid_dim(launch.programs, 1, 1)
        interpreter_builder.set_grid_idx(program, 0, 0)
        kernel(**pointers, **plain)
    return [f"{launch.name}, program {program} of {launch.programs}, {fault}" for fault in dict.fromkeys(seen.faults)]


class _Seen:
    """What stands in for the interpreter's memory and for its integers."""

    def __init__(self, names: list[str], sizes: list[int], loaded: Mapping[str, int]) -> None:
        self.names, self.sizes, self.loaded = names, sizes, loaded
        self.faults: list[str] = []

    def load(self, pointers: TensorHandle, mask: TensorHandle, other: TensorHandle | None, *_: Any) -> TensorHandle:
        kind = pointers.get_element_ty()
        dtype = interpreter._get_np_dtype(kind)
        value = self._look(pointers, mask, "reads")
        return TensorHandle(np.where(mask.data != 0, value, 0 if other is None else other.data).astype(dtype), kind)

    def store(self, pointers: TensorHandle, value: TensorHandle, mask: TensorHandle, *_: Any) -> None:
        self._look(pointers, mask, "writes")

    def _look(self, pointers: TensorHandle, mask: TensorHandle, does: str) -> int:
        """What lies there, if it is a number with a name."""
        address = np.broadcast_to(pointers.data, np.broadcast_shapes(pointers.data.shape, mask.data.shape))
        address = address[np.broadcast_to(mask.data != 0, address.shape)]
        if not address.size:
            return 0
        width = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        low, high = int(address.min()), int(address.max())
        index = min(max((low + APART // 2) // APART, 1), len(self.names))
        start, name = index * APART, self.names[index - 1]
        size = self.sizes[index - 1]
        if low < start:
            self._say(f"{does} {name} {start - low} bytes before it begins")
        if high + width > start + size:
            self._say(f"{does} {name} {high + width - start - size} bytes behind its end")
        return self.loaded.get(name, 0)

    def checked(self, does: str, exact: Any) -> Callable[..., TensorHandle]:
        """An operation of the builder on integers, wrapped."""
        operation = getattr(interpreter_builder, does)

        def run(left: TensorHandle, right: TensorHandle) -> TensorHandle:
            result = operation(left, right)
            if _narrow(result) and np.any(
                result.data != exact(left.data.astype(np.int64), right.data.astype(np.int64))
            ):
                self._say(f"{does.removeprefix('create_')} leaves {result.dtype}")
            return result

        return run

    def cast(self, x: TensorHandle, kind: Any, signed: bool) -> TensorHandle:
        result = interpreter_builder.cast_impl(x, kind)
        if _narrow(result) and np.any(result.data != x.data):
            self._say(f"a cast to {result.dtype} loses digits")
        return result

    def _say(self, fault: str) -> None:
        frame: FrameType | None = sys._getframe()
        while frame is not None and frame.f_code.co_filename.startswith(ELSEWHERE):
            frame = frame.f_back
        assert frame is not None
        self.faults.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {fault}")


def _narrow(x: TensorHandle) -> bool:
    return x.dtype.scalar.is_int() and 8 <= x.dtype.scalar.int_bitwidth < 64


def _pointer(dtype: torch.dtype, address: int) -> tl.tensor:
    kind = tl.pointer_type(tl.int1 if dtype == torch.bool else getattr(tl, dtype_name(dtype)))
    return tl.tensor(TensorHandle(np.array([address], dtype=np.uint64), kind), kind)


def _ends(*bounds: Any, num_stages: Any = None, **_: Any) -> list[int]:
    """`range`, without the middle."""
    steps = range(*bounds)
    return [*steps[:2], *steps[2:][-1:]]


class _ShortenedLanguage(PatchedLanguage):
    def patched(self, scope: Any) -> None:
        scope.set_attr(tl, "range", _ends)
        scope.set_attr(tl, "associative_scan", lambda x, *_, **__: x)  # of numbers, not of addresses; and slow


@contextmanager
def _patched(seen: _Seen, kernel: InterpretedFunction) -> Iterator[None]:
    replaced = {"create_masked_load": seen.load, "create_masked_store": seen.store, "create_int_cast": seen.cast}
    replaced |= {name: seen.checked(name, exact) for name, exact in EXACT.items()}
    with ExitStack() as stack:
        stack.enter_context(quick())
        for name, new in replaced.items():
            stack.enter_context(mock.patch.object(interpreter_builder, name, new))
        language = _ShortenedLanguage()
        stack.enter_context(mock.patch.object(interpreter, "_patch_lang", language))
        stack.callback(language(kernel.fn).restore)
        kernel.fn.__globals__["range"] = _ends  # the interpreter puts names of its own there too, which must stay
        stack.callback(kernel.fn.__globals__.pop, "range")
        stack.enter_context(np.errstate(all="ignore"))
        yield
