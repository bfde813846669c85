"""Triton's interpreter without what takes two thirds of its time, and with products that are the same on every machine.

It puts its own functions in the place of `triton.language`'s anew in every call of a function inside a kernel, where
once a launch is enough, makes sums and products of integers twice, for an assertion that is off, and a table of all
dtypes whenever it looks one up. Its `tl.dot` is NumPy's, which sums in an order that depends on the processor and on
where in a matrix a column stands.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle, interpreter_builder

patch_language = interpreter._patch_lang
np_dtype = interpreter._get_np_dtype
np_dtypes: dict[str, Any] = {}


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


def dot(a: TensorHandle, b: TensorHandle, accumulator: TensorHandle, *_: Any) -> TensorHandle:
    """Summed in double precision and rounded once."""
    dtype = accumulator.data.dtype
    product = np.matmul(a.data, b.data, dtype=np.float64).astype(dtype)
    return TensorHandle(product + accumulator.data, accumulator.dtype.scalar)


@contextmanager
def quick() -> Iterator[None]:
    options = replace(interpreter_builder.options, sanitize_overflow=False)
    with (
        mock.patch.object(interpreter, "_patch_lang", PatchedLanguage()),
        mock.patch.object(interpreter, "_get_np_dtype", quick_np_dtype),
        mock.patch.object(interpreter_builder, "options", options),
        mock.patch.object(interpreter_builder, "create_dot", dot),
    ):
        yield
