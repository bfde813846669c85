"""Is each element of an argument written and read by one thread? Then no other has to be waited for."""

from __future__ import annotations

import re
from typing import Any

from . import ir

CONVERTED = {"arith.extsi", "tt.splat", "ttg.convert_layout"}  # the same numbers
MASK = {"tt.load": 1, "tt.store": 2}  # which operand, where there is one


def one_thread(ttgir: str, argument: int) -> str:
    """Why every element of an argument is one thread's, nothing if that cannot be shown.

    It is so if all accesses have one layout, in which an element has one owner, and go to base + offset with an offset
    for each element, and all of these the same in all accesses and at all times: then an address has one offset, which
    has one owner. Bases may be different multiples of an extent that offsets, from 0 on, are below.
    """
    kernel = ir.Kernel(ttgir)
    accesses = [
        operation
        for operation in kernel.accesses(ir.READS | ir.WRITES)
        if kernel.arguments[argument] in ir.pointers(operation.operands[0])
    ]
    if any(operation.name not in MASK for operation in accesses):
        return ""  # a copy is not in order with what the thread that starts it wrote
    places = [Place(operation, kernel) for operation in accesses]
    first = places[0]
    if first.owned and first.cell is not None and all(place.cell == first.cell for place in places):
        return f"one thread writes and reads an element, {first.layout}"
    return ""


class Place:
    """Where an access goes."""

    cell: tuple[Any, ...] | None = None  # equal where elements have equal addresses but for multiples; None: not known

    def __init__(self, access: ir.Operation, kernel: ir.Kernel) -> None:
        self.shape, self.layout = access.tensor(kernel.aliases)
        self._access, self._kernel = access, kernel
        address = made(access.operands[0], "tt.addptr")  # addptr(splat(base), offset)
        splat = made(address.operands[0], "tt.splat") if address else None
        if address is None or splat is None:
            return
        base, offset = splat.operands[0], address.operands[1]
        if not self._counts(offset) or not self._fixed(offset):
            return
        where = term(base) if self._fixed(base) else self._extent(base, offset)
        if where is not None:
            self.cell = self.shape, self.layout, term(offset), where

    @property
    def owned(self) -> bool:
        """Whether an element has one owner: a blocked layout that the tensor fills at least once."""
        sizes = [[int(n) for n in found.split(",")] for found in re.findall(r"= \[([\d, ]+)\]", self.layout)]
        if not self.layout.startswith("#ttg.blocked") or len(sizes) != 4:
            return False
        return all(extent >= a * b * c for extent, a, b, c in zip(self.shape, *sizes[:3], strict=True))

    def _fixed(self, value: ir.Value) -> bool:
        """Whether it is the same at all times: made of the kernel's arguments and constants alone."""
        operation = value.made_by
        if operation is None:
            return value in self._kernel.arguments
        if operation.name in ir.READS or operation.name.startswith("scf."):
            return False
        return all(map(self._fixed, operation.operands))

    def _counts(self, value: ir.Value) -> bool:
        """Whether it is different in every element: a range, with the same number added to all of it."""
        operation = value.made_by
        if operation is None:
            return False
        if operation.name in ("arith.extsi", "ttg.convert_layout"):
            return self._counts(operation.operands[0])
        if operation.name == "arith.addi":
            pair = operation.operands
            return any(self._counts(one) and made(other, "tt.splat") for one, other in (pair, pair[::-1]))
        return operation.name == "tt.make_range"

    def _extent(self, base: ir.Value, offset: ir.Value) -> Any:
        """What the base, addptr(argument, multiple · extent), is a multiple of, if offsets are from 0 to below that."""
        address = made(base, "tt.addptr")
        product = made(address.operands[1], "arith.muli") if address and self._fixed(address.operands[0]) else None
        if address is None or product is None or not never_negative(offset):
            return None
        factors = [term(value) for value in product.operands if self._fixed(value)]
        bounds = (bound for bound in self._bounds(offset) if bound in factors)
        return next(bounds, None)

    def _bounds(self, offset: ir.Value) -> list[Any]:
        """What the mask says that the offset is below."""
        waiting, found = self._access.operands[MASK[self._access.name] :][:1], []
        while waiting:
            operation = waiting.pop().made_by
            if operation is None:
                continue
            if operation.name == "arith.andi":
                waiting += operation.operands
            elif operation.text.startswith("arith.cmpi slt") and term(operation.operands[0]) == term(offset):
                found.append(term(operation.operands[1]))
        return found


def made(value: ir.Value, name: str) -> ir.Operation | None:
    """The operation that a value is the result of, if it is of that name."""
    return value.made_by if value.made_by is not None and value.made_by.name == name else None


def term(value: ir.Value) -> Any:
    """Equal for values that are computed alike."""
    operation = value.made_by
    if operation is None or operation.name in ir.READS or operation.name.startswith("scf."):
        return value
    if operation.name in CONVERTED:
        return term(operation.operands[0])
    return operation.text, *map(term, operation.operands)


def never_negative(value: ir.Value) -> bool:
    operation = value.made_by
    if operation is None:
        return False
    if operation.name == "arith.constant":
        return re.search(r"constant (dense<)?-", operation.text) is None
    if operation.name == "arith.remsi":
        return never_negative(operation.operands[0])
    if operation.name in CONVERTED | {"arith.addi", "arith.muli", "arith.divsi"}:
        return all(map(never_negative, operation.operands))
    return operation.name in ("tt.make_range", "tt.get_program_id")
