"""Does a program read what other threads of it have yet to write? The interpreter has one thread, a test has luck.

Tensors: Triton puts no barrier between a store and a load of the same tensor, so that who reads an element that another
thread wrote needs `tl.debug_barrier()`.

    TTIR   lists the arguments that a kernel both writes to and reads from
    PTX    shows paths, loops included, with no barrier on them, from a write to a read, and from a read to a write
    TTGIR  shows where none is needed: the thread that reads an element is the one that wrote it

Shared memory: a warpgroup waits for its own matrix products only. Where it lets some go on, two warpgroups need a
barrier between the wait and the next copy, which may go where the other one's product still reads.

    TTGIR  lists kernels of two warpgroups that wait so and copy
    PTX    shows paths from wait to copy with no barrier on them

What different programs do to each other, and arguments that share memory, are not looked at.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from . import ir, owners, ptx

OPERANDS = "operands of matrix products"
WARPGROUP = 4  # warps


@dataclass(frozen=True)
class Shared:
    """What threads of a program have in common, and must come to in order."""

    name: str  # an argument, or OPERANDS
    unordered: str  # which accesses no barrier holds apart, nothing if all are in order
    exempt: str = ""  # why these need none

    @property
    def wrong(self) -> bool:
        return bool(self.unordered) and not self.exempt


def of_kernel(arguments: list[str], asm: dict[str, str], num_warps: int) -> list[Shared]:
    """What the threads of a compiled kernel share.

    Args:
        arguments: those that are no constants, in their order.
        asm: its `ttir`, `ttgir` and `ptx`.

    Raises:
        ValueError: it does something that is not understood here.
    """
    listed = both_ways(asm["ttir"])
    waits = num_warps > WARPGROUP and waits_for_some(asm["ttgir"])
    if not listed and not waits:
        return []
    program = ptx.Program(asm["ptx"])
    found = []
    for index in listed:
        unordered = accesses(program, index)
        found.append(Shared(arguments[index], unordered, owners.one_thread(asm["ttgir"], index) if unordered else ""))
    if waits:
        found.append(Shared(OPERANDS, copies(program)))
    return found


def both_ways(ttir: str) -> list[int]:
    """Which arguments are both written to and read from."""
    kernel = ir.Kernel(ttir)
    read, written = (
        set().union(*(ir.pointers(operation.operands[0]) for operation in kernel.accesses(kinds)))
        for kinds in (ir.READS, ir.WRITES)
    )
    return [index for index, argument in enumerate(kernel.arguments) if argument in read & written]


def accesses(program: ptx.Program, parameter: int) -> str:
    """Which accesses to a parameter may come before all threads are through with earlier ones, nothing if none.

    Raises:
        ValueError: it is not both written to and read from, or something is, nobody knows where.
    """
    reads, writes = set(), set()
    for index, instruction in enumerate(program.instructions):
        if instruction.address and not program.sources[index]:
            raise ValueError(f"{instruction}: an address that comes from no argument")
        if parameter in program.sources[index]:
            reads |= {index} if instruction.reads else set()
            writes |= {index} if instruction.writes else set()
    if not reads or not writes:
        raise ValueError(f"parameter {parameter} is written to and read from in TTIR, but not in PTX")
    orders = {"a read after a write": (writes, reads), "a write after a read": (reads, writes)}
    return ", ".join(order for order, pair in orders.items() if _meet(program, *pair))


def waits_for_some(ttgir: str) -> bool:
    """Whether matrix products may go on behind a wait, while something is copied to where they read."""
    return "ttg.async_copy_global_to_local" in ttgir and re.search(r"pendings = [1-9]", ttgir) is not None


def copies(program: ptx.Program) -> str:
    instructions = list(enumerate(program.instructions))
    waits = {i for i, one in instructions if one.name.startswith("wgmma.wait_group") and one.operands != ("0",)}
    if not waits:
        raise ValueError("products go on behind a wait in TTGIR, but not in PTX")
    into_shared = {i for i, one in instructions if one.address and one.name.startswith("cp.async")}
    return "a copy after a wait for some" if _meet(program, waits, into_shared) else ""


def _meet(program: ptx.Program, before: set[int], after: set[int]) -> bool:
    return any(program.reached(index) & after for index in before)
