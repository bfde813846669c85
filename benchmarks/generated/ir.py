"""Triton's intermediate text, TTIR or TTGIR, as operations on values."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

LOCATION = re.compile(r" loc\((?:[^()]|\([^()]*\))*\)")
ALIAS = re.compile(r"^(#\w+) = (.*)$")
VALUE = re.compile(r"%\w+(?:#\d+)?")
ASSIGNED = re.compile(r"^((?:%\w+(?::\d+)?(?:, )?)+) = ")
NAME = re.compile(r'^"?([a-z_]\w*\.[\w.]+)"?')
ARGUMENT = re.compile(r"(%\w+): ([^,{)]+(?:<[^>]*>+)?)")
TENSOR = re.compile(r"tensor<((?:\d+x)+)!?[\w.]+(?:<[^<>]*(?:<[^<>]*>)?[^<>]*>)?(?:, (#\w+(?:<.*?>)?))?>")

READS = {"tt.load", "ttg.async_copy_global_to_local", "tt.atomic_rmw", "tt.atomic_cas"}
WRITES = {"tt.store", "tt.atomic_rmw", "tt.atomic_cas"}
BY_DESCRIPTOR = re.compile(r"tt\.(experimental_)?descriptor_|ttng\.async_tma_|ttg\.buffer_")


@dataclass(eq=False)
class Value:
    name: str  # in the text, which may name an argument after a variable that it was put into
    made_by: Operation | None = None  # None: an argument of the kernel, or of a block
    passed: list[Value] = field(default_factory=list)  # to an argument of a block, or out of one
    pointer: bool = False  # an argument of the kernel that is a pointer


@dataclass(eq=False)
class Operation:
    name: str
    operands: list[Value]
    type: str  # what stands behind the last colon
    text: str  # without names of values
    results: list[Value] = field(default_factory=list)
    arguments: list[Value] = field(default_factory=list)  # of its block, where it has one: those that are carried

    def tensor(self, aliases: dict[str, str]) -> tuple[tuple[int, ...], str]:
        """The shape and the layout of the first tensor in its type; () and "" without one."""
        found = TENSOR.search(self.type)
        if found is None:
            return (), ""
        return tuple(int(n) for n in found[1].split("x") if n), aliases.get(found[2] or "", found[2] or "")


class Kernel:
    """The operations of the one function in `text`, in their order.

    Raises:
        ValueError: it calls functions that were not inlined.
    """

    def __init__(self, text: str) -> None:
        self.operations: list[Operation] = []
        self.arguments: list[Value] = []
        self.aliases: dict[str, str] = {}  # of layouts
        self._scopes: list[dict[str, Value]] = [{}]
        self._owners: list[Operation | None] = [None]  # of open blocks
        self._blocks: dict[str, list[Value]] = {}  # arguments of the blocks of a function
        self._jumps: list[tuple[str, list[Value]]] = []
        for line in text.splitlines():
            self._read(LOCATION.sub("", line.split(" // ")[0]).strip())
        for block, values in self._jumps:
            self._pass(values, self._blocks.get(block, []))

    def accesses(self, kinds: set[str]) -> Iterator[Operation]:
        """Those that read or write the memory of tensors; their first operand is the address.

        Raises:
            ValueError: there is one of a kind that nothing is known about here.
        """
        for operation in self.operations:
            if BY_DESCRIPTOR.match(operation.name):
                raise ValueError(f"{operation.name}: an access of tensors that is not understood")
            if operation.name in kinds:
                yield operation

    def _read(self, line: str) -> None:
        alias = ALIAS.match(line)
        if alias:
            self.aliases[alias[1]] = alias[2]
        elif line.startswith("tt.func"):
            self._function(line)
        elif line.startswith("^"):
            self._block(line)
        elif line.startswith("}"):
            owner = self._owners.pop()
            self._scopes.pop()
            if line.endswith("{"):  # else, do
                self._open(owner)
        elif line and not line.startswith(("module", "#", "{-#")):
            self._operation(line)

    def _function(self, line: str) -> None:
        self._open(None)
        for name, kind in ARGUMENT.findall(line):
            self.arguments.append(self._define(name))
            self.arguments[-1].pointer = kind.startswith("!tt.ptr")

    def _block(self, line: str) -> None:
        arguments = [self._define(name) for name, _ in ARGUMENT.findall(line)]
        owner = self._owners[-1]
        if owner is None:
            self._blocks[line[1:].split("(")[0].rstrip(":")] = arguments
        elif owner.name == "scf.while":
            self._pass(owner.results, arguments)

    def _operation(self, line: str) -> None:
        assigned = ASSIGNED.match(line)
        rest = line[assigned.end() :] if assigned else line
        found = NAME.match(rest)
        if found is None:
            raise ValueError(f"{line}: not understood")
        if found[1] in ("tt.call", "func.call"):
            raise ValueError(f"{line}: a kernel that calls functions is not understood")
        body, _, kind = rest.rpartition(" : ")
        carried = re.findall(r"(%\w+) = (%\w+(?:#\d+)?)", rest) if found[1] in ("scf.for", "scf.while") else []
        new = {name for name, _ in carried}
        operands = [self._find(name) for name in VALUE.findall(rest) if name not in new]
        operation = Operation(found[1], operands, kind, VALUE.sub("", body or rest))
        self.operations.append(operation)
        if assigned:
            for name, _, count in (part.partition(":") for part in assigned[1].split(", ")):
                names = [f"{name}#{n}" for n in range(int(count))] if count else [name]
                operation.results += [self._define(each, operation) for each in names]
        if rest.endswith("{"):
            self._open(operation)
            self._carry(operation, carried)
        elif found[1] in ("scf.yield", "scf.condition") and self._owners[-1] is not None:
            self._hand_on(operation, self._owners[-1])
        elif found[1].startswith("cf."):
            for block, values in re.findall(r"\^(\w+)\(([^):]*)", rest):
                self._jumps.append((block, [self._find(name) for name in VALUE.findall(values)]))

    def _carry(self, operation: Operation, carried: list[tuple[str, str]]) -> None:
        """The arguments of the body of a loop, of which the first of a `for` is its counter."""
        first = [self._define(carried[0][0])] if operation.name == "scf.for" else []
        rest = carried[len(first) :]
        operation.arguments = [self._define(name) for name, _ in rest]
        starts = [self._find(value) for _, value in rest]
        self._pass(starts, operation.arguments)
        if operation.name == "scf.for":
            self._pass([self._find(carried[0][1])], first)
            self._pass(starts, operation.results)

    def _hand_on(self, operation: Operation, owner: Operation) -> None:
        """What a block yields: the results of its loop or branch, and what its next round begins with."""
        if operation.name == "scf.condition":
            self._pass(operation.operands[1:], owner.results)
        else:
            self._pass(operation.operands, owner.arguments)
            if owner.name != "scf.while":
                self._pass(operation.operands, owner.results)

    @staticmethod
    def _pass(values: list[Value], to: list[Value]) -> None:
        for value, into in zip(values, to, strict=False):
            into.passed.append(value)

    def _open(self, owner: Operation | None) -> None:
        self._owners.append(owner)
        self._scopes.append({})

    def _define(self, name: str, made_by: Operation | None = None) -> Value:
        value = self._scopes[-1][name] = Value(name, made_by)
        return value

    def _find(self, name: str) -> Value:
        for scope in reversed(self._scopes):
            if name in scope:
                return scope[name]
        raise ValueError(f"{name} is not defined")


def pointers(value: Value) -> set[Value]:
    """The arguments of the kernel that an address may have come from. What was loaded is no address."""
    found, waiting, seen = set(), [value], set()
    while waiting:
        value = waiting.pop()
        if value in seen:
            continue
        seen.add(value)
        if value.pointer:
            found.add(value)
        waiting += value.passed
        if value.made_by is not None and value.made_by.name not in READS:
            waiting += value.made_by.operands
    return found
