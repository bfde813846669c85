"""Is each element of an argument written and read by one thread? Then no other has to be waited for."""

from __future__ import annotations

import re
from typing import Any

from . import ir

CONVERTED = {"arith.extsi", "tt.splat", "ttg.convert_layout"}  # the same numbers


def one_thread(ttgir: str, argument: int) -> str:
    """Why every element of an argument is one thread's, nothing if that cannot be shown.

    It is so if all accesses have one layout, in which an element has one owner, and go to base + multiple · extent +
    offset, with an offset for each element, the same in all, from 0 to below the extent, the same in all: then an
    address has one offset, which has one owner. Or if even the base is the same in all.
    """
    kernel = ir.Kernel(ttgir)
    accesses = [
        operation
        for operation in kernel.accesses(ir.READS | ir.WRITES)
        if kernel.arguments[argument] in ir.pointers(operation.operands[0])
    ]
    if any(operation.name not in ("tt.load", "tt.store") for operation in accesses):
        return ""  # a copy is not in order with what the thread that starts it wrote
    places = [Place(operation, kernel.aliases) for operation in accesses]
    first = places[0]
    if not first.owned or not first.counts or any(place.cell != first.cell for place in places):
        return ""
    if all(place.base == first.base for place in places) or (
        first.extent is not None and all(place.extent == first.extent for place in places)
    ):
        return f"one thread writes and reads an element, {first.layout}"
    return ""


class Place:
    """Where an access goes: addptr(splat(addptr(argument, base)), offset), where it has that form."""

    def __init__(self, access: ir.Operation, aliases: dict[str, str]) -> None:
        self.shape, self.layout = access.tensor(aliases)
        self.counts = False  # whether each element has an offset of its own
        self.offset = self.base = self.extent = None
        address = access.operands[0].made_by
        if address is None or address.name != "tt.addptr" or not _is(address.operands[0], "tt.splat"):
            return
        start, offset = address.operands[0].made_by.operands[0], address.operands[1]  # type: ignore[union-attr]
        self.base, self.offset = term(start), term(offset)
        self.counts = _counts(offset)
        if _is(start, "tt.addptr") and start.made_by.operands[0].pointer and _from_zero(offset):  # type: ignore[union-attr]
            self.extent = self._extent(start.made_by.operands[1], access)  # type: ignore[union-attr]

    @property
    def cell(self) -> tuple[Any, ...]:
        return self.shape, self.layout, self.offset

    @property
    def owned(self) -> bool:
        """Whether an element has one owner: a blocked layout that the tensor fills at least once."""
        sizes = [[int(n) for n in found.split(",")] for found in re.findall(r"= \[([\d, ]+)\]", self.layout)]
        if not self.layout.startswith("#ttg.blocked") or len(sizes) != 4:
            return False
        return all(extent >= a * b * c for extent, a, b, c in zip(self.shape, *sizes[:3], strict=True))

    def _extent(self, base: ir.Value, access: ir.Operation) -> Any:
        """What `base` is a multiple of, if the mask keeps offsets below it."""
        if not _is(base, "arith.muli") or len(access.operands) < 2:
            return None
        factors = [term(value) for value in base.made_by.operands]  # type: ignore[union-attr]
        for bound in self._bounds(access):
            if bound in factors:
                return bound
        return None

    def _bounds(self, access: ir.Operation) -> list[Any]:
        """What the mask says that the offset is below."""
        waiting, found = [operand.made_by for operand in access.operands[1:]], []
        while waiting:
            operation = waiting.pop()
            if operation is None:
                continue
            if operation.name == "arith.andi":
                waiting += [value.made_by for value in operation.operands]
            elif operation.text.startswith("arith.cmpi slt") and term(operation.operands[0]) == self.offset:
                found.append(term(operation.operands[1]))
        return found


def term(value: ir.Value) -> Any:
    """Equal for values that are computed alike."""
    operation = value.made_by
    if operation is None or operation.name in ir.READS or operation.name.startswith("scf."):
        return value
    if operation.name in CONVERTED:
        return term(operation.operands[0])
    return operation.text, *map(term, operation.operands)


def _is(value: ir.Value, name: str) -> bool:
    return value.made_by is not None and value.made_by.name == name


def _counts(value: ir.Value) -> bool:
    """Whether it is different in every element: a range, with the same number added to all of it."""
    operation = value.made_by
    if operation is None:
        return False
    if operation.name in CONVERTED - {"tt.splat"}:
        return _counts(operation.operands[0])
    if operation.name == "arith.addi":
        one, other = operation.operands
        return (_counts(one) and _is(other, "tt.splat")) or (_counts(other) and _is(one, "tt.splat"))
    return operation.name == "tt.make_range"


def _from_zero(value: ir.Value) -> bool:
    """Whether it is never negative."""
    operation = value.made_by
    if operation is None:
        return False
    if operation.name == "arith.constant":
        return re.search(r"constant (dense<)?-", operation.text) is None
    if operation.name == "arith.remsi":
        return _from_zero(operation.operands[0])
    if operation.name in CONVERTED | {"arith.addi", "arith.muli", "arith.divsi"}:
        return all(map(_from_zero, operation.operands))
    return operation.name in ("tt.make_range", "tt.get_program_id")
