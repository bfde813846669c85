"""Triton's interpreter without what takes two thirds of its time, and with products that are the same on every machine.

It puts its own functions in the place of `triton.language`'s anew in every call of a function inside a kernel, where
once a launch is enough, makes sums and products of integers twice, for an assertion that is off, and a table of all
dtypes whenever it looks one up. It makes the type and the shape of every result anew, and scans a tensor number by
number, where a step takes all lanes at once. Its `tl.dot` is NumPy's, which sums in an order that depends on the
processor and on where in a matrix a column stands.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
from triton.runtime.interpreter import ScanOps, TensorHandle, interpreter_builder

patch_language = interpreter._patch_lang
np_dtype = interpreter._get_np_dtype
block_type = core.block_type.__init__
broadcast = TritonSemantic.broadcast_impl_value
np_dtypes: dict[str, Any] = {}
blocks: dict[tuple[str, tuple[int, ...]], dict[str, Any]] = {}
shapes: dict[tuple[int, ...], tuple[Any, Any]] = {}


class PatchedLanguage:
    """Of all modules that a launch has come by. It lasts until the launch restores it."""

    def __init__(self) -> None:
        self._scopes: dict[str, Any] = {}

    def __call__(self, function: Any) -> PatchedLanguage:
        if function.__module__ not in self._scopes:
            self._scopes[function.__module__] = scope = patch_language(function)
            self.patched(scope)
        return self

    def patched(self, scope: Any) -> None:
        """What else is to be changed, for subclasses."""

    def restore(self) -> None:
        for scope in reversed(self._scopes.values()):
            scope.restore()
        self._scopes.clear()


def quick_np_dtype(kind: Any) -> Any:
    """Of a scalar, a pointer, or a block of them."""
    name = kind.scalar.name
    if name not in np_dtypes:
        np_dtypes[name] = np_dtype(kind)
    return np_dtypes[name]


def sizes(shape: Any) -> tuple[int, ...]:
    """A shape as plain numbers, from whichever of its forms."""
    shape = getattr(shape, "value", shape)
    return tuple([getattr(size, "value", size) for size in getattr(shape, "values", shape)])


def quick_block_type(self: Any, kind: Any, shape: Any) -> None:
    """Of all blocks of one type and shape the same attributes."""
    key = kind.name, sizes(shape)
    if key not in blocks:
        block_type(self, kind, list(key[1]))
        blocks[key] = vars(self).copy()
    vars(self).update(blocks[key])


def quick_tensor(self: Any, handle: Any, kind: Any) -> None:
    shape = tuple(kind.shape.values) if kind.is_block() else ()
    if shape not in shapes:
        shapes[shape] = core.tuple([core.constexpr(size) for size in shape]), core.constexpr(math.prod(shape))
    self.handle, self.type, self.dtype = handle, kind, kind.scalar
    self.shape, self.numel = shapes[shape]


def quick_broadcast(self: Any, *tensors: Any) -> Sequence[Any]:
    """Without a look at shapes that are equal; of one rank by NumPy."""
    a, b = (tensor.shape for tensor in tensors)
    if a is b:
        return tensors
    if len(a.values) != len(b.values):
        return broadcast(self, *tensors)
    shape = np.broadcast_shapes(sizes(a), sizes(b))
    return [
        tensor
        if sizes(tensor.shape) == shape
        else self.tensor(self.builder.create_broadcast(tensor.handle, shape), core.block_type(tensor.dtype, shape))
        for tensor in tensors
    ]


def dot(a: TensorHandle, b: TensorHandle, accumulator: TensorHandle, *_: Any) -> TensorHandle:
    """Summed in double precision and rounded once."""
    dtype = accumulator.data.dtype
    product = np.matmul(a.data, b.data, dtype=np.float64).astype(dtype)
    return TensorHandle(product + accumulator.data, accumulator.dtype.scalar)


def scan(self: ScanOps, tensors: tuple[Any, ...]) -> list[Any]:
    """Of each lane as `ScanOps.generic_scan` does it, first to last along `self.axis`, all lanes in one step."""
    size = tensors[0].handle.data.shape[self.axis]
    lanes = [np.moveaxis(tensor.handle.data, self.axis, 0) for tensor in tensors]
    found = [np.empty_like(data) for data in lanes]
    before: Sequence[Any] = ()
    for i in range(size):
        step = [self.to_tensor(data[i], tensor.dtype) for data, tensor in zip(lanes, tensors, strict=True)]
        if i > 0:
            step = self.combine_fn.fn(*before, *step)
        for data, tensor in zip(found, step, strict=True):
            data[i] = tensor.handle.data.reshape(data.shape[1:])
        before = step
    return [
        self.to_tensor(np.moveaxis(data, 0, self.axis), tensor.dtype)
        for data, tensor in zip(found, tensors, strict=True)
    ]


@contextmanager
def quick() -> Iterator[None]:
    options = replace(interpreter_builder.options, sanitize_overflow=False)
    with (
        mock.patch.object(interpreter, "_patch_lang", PatchedLanguage()),
        mock.patch.object(interpreter, "_get_np_dtype", quick_np_dtype),
        mock.patch.object(interpreter_builder, "options", options),
        mock.patch.object(interpreter_builder, "create_dot", dot),
        mock.patch.object(core.block_type, "__init__", quick_block_type),
        mock.patch.object(core.tensor, "__init__", quick_tensor),
        mock.patch.object(TritonSemantic, "broadcast_impl_value", quick_broadcast),
        mock.patch.object(ScanOps, "generic_scan", scan),
    ):
        yield
