"""PTX as a graph of instructions: what can follow what, and which argument an address comes from."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import cached_property

COMMENT = re.compile(r"//[^\n]*")
DIRECTIVE = re.compile(r"^\s*\.(loc|file|pragma|branchtargets)\b[^\n]*$", re.MULTILINE)
SOURCE = re.compile(  # what says which files and lines it was made from
    r"//[^\n]*|^\s*\.(loc|file)\b[^\n]*|^\s*\.section\s+\.debug_[\s\S]*|^\$L__(tmp|func_begin|func_end)\d+:$",
    re.MULTILINE,
)
LABEL = re.compile(r"^([$\w]+):(?!:)\s*")
STATEMENT = re.compile(r"(@!?[%\w]+\s+)?([\w.:]+)\s*(.*)", re.DOTALL)
REGISTER = re.compile(r"%[a-z]+\d+")
PARAMETER = re.compile(r"_param_(\d+)\]")
ELSEWHERE = (".param", ".shared", ".local", ".const")  # memory that is no tensor's


@dataclass(frozen=True)
class Instruction:
    name: str  # with its suffixes, such as ld.global.v4.b32
    operands: tuple[str, ...]
    conditional: bool

    @property
    def joins_threads(self) -> bool:
        """Whether all threads of a program wait here for each other, and see what the others wrote before."""
        return self.name in ("bar.sync", "barrier.sync", "barrier.sync.aligned") and self.operands == ("0",)

    @property
    def address(self) -> str:
        """In the memory of tensors that it reads or writes, nothing if it does neither.

        Raises:
            ValueError: it is an access of a kind that nothing is known about here.
        """
        kind = self.name.split(".")[0]
        if kind in ("ld", "ldu", "st", "atom", "red") and not any(space in self.name for space in ELSEWHERE):
            return self.operands[0 if kind in ("st", "red") else 1]
        if self.name.startswith(("cp.async.ca.shared.global", "cp.async.cg.shared.global")):
            return self.operands[1]
        if re.match(r"cp\.(async\.bulk\.(?!commit|wait)|reduce)|st\.(async|bulk)|multimem", self.name):
            raise ValueError(f"{self.name}: an access of tensors that is not understood")
        return ""

    @property
    def reads(self) -> bool:
        return bool(self.address) and self.name.split(".")[0] not in ("st", "red")

    @property
    def writes(self) -> bool:
        return bool(self.address) and self.name.split(".")[0] in ("st", "red", "atom")


class Program:
    """The instructions of the one kernel in `text`, in their order.

    Raises:
        ValueError: it calls functions, or branches to where there is no label.
    """

    def __init__(self, text: str) -> None:
        self.instructions: list[Instruction] = []
        self._labels: dict[str, list[int]] = {}
        for statement in _body(text).split(";"):
            self._add(statement.strip())

    def _add(self, statement: str) -> None:
        while True:
            statement = statement.lstrip("{} \t\n")
            label = LABEL.match(statement)
            if label is None:
                break
            self._labels.setdefault(label[1], []).append(len(self.instructions))
            statement = statement[label.end() :]
        if statement and not statement.startswith("."):
            condition, name, rest = STATEMENT.fullmatch(statement).groups()  # type: ignore[union-attr]
            if name.startswith("call"):
                raise ValueError(f"{statement}: a kernel that calls functions is not understood")
            self.instructions.append(Instruction(name, _operands(rest), condition is not None))

    @cached_property
    def following(self) -> list[tuple[int, ...]]:
        """Of each instruction, those that may run next."""
        end = len(self.instructions)
        found = []
        for index, instruction in enumerate(self.instructions):
            ahead = (index + 1,) if index + 1 < end else ()
            if instruction.name in ("bra", "bra.uni"):
                target = self._target(index, instruction.operands[0])
                found.append((*ahead, target) if instruction.conditional else (target,))
            elif instruction.name.startswith("brx"):
                raise ValueError("a table of branches is not understood")
            elif instruction.name in ("ret", "exit", "trap") and not instruction.conditional:
                found.append(())
            else:
                found.append(ahead)
        return found

    def _target(self, index: int, label: str) -> int:
        """Labels of inline assembly have a scope, and may occur again: the nearest one is meant."""
        if label not in self._labels:
            raise ValueError(f"no label {label}")
        return min(self._labels[label], key=lambda at: abs(at - index))

    def reached(self, start: int) -> set[int]:
        """Instructions that may run after `start` with no point in between at which all threads wait."""
        found: set[int] = set()
        waiting = list(self.following[start])
        while waiting:
            index = waiting.pop()
            if index < len(self.instructions) and index not in found and not self.instructions[index].joins_threads:
                found.add(index)
                waiting += self.following[index]
        return found

    @cached_property
    def sources(self) -> list[frozenset[int]]:
        """Of each instruction, the parameters that its address may have come from. What was loaded comes from none."""
        carried: dict[str, frozenset[int]] = {}

        def of(operand: str) -> frozenset[int]:
            return frozenset().union(*(carried.get(name, frozenset()) for name in REGISTER.findall(operand)))

        moves: list[tuple[list[str], str]] = []
        for instruction in self.instructions:
            kind = instruction.name.split(".")[0]
            if not instruction.operands or instruction.operands[0].startswith("[") or kind == "setp":
                continue
            into, *others = instruction.operands
            parameter = PARAMETER.search(others[0]) if others else None
            if parameter and "64" in instruction.name:
                carried[into] = frozenset({int(parameter[1])})
            elif kind not in ("ld", "ldu", "atom", "ldmatrix"):
                moves.append((REGISTER.findall(into), " ".join(others)))
        changed = True
        while changed:
            changed = False
            for names, from_where in moves:
                added = of(from_where)
                for name in names:
                    if not added <= carried.get(name, frozenset()):
                        carried[name] = carried.get(name, frozenset()) | added
                        changed = True
        return [of(instruction.address) for instruction in self.instructions]


def digest(text: str) -> str:
    """Of the code, wherever its source stands: equal, if two compilations made the same."""
    lines = (" ".join(line.split()) for line in SOURCE.sub("", text).splitlines())
    return hashlib.sha256("\n".join(filter(None, lines)).encode()).hexdigest()[:12]


def _body(text: str) -> str:
    """What stands between the braces of the kernel."""
    text = DIRECTIVE.sub("", COMMENT.sub("", text))
    start = text.index("{", text.index(".entry"))
    depth = 0
    for at in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if depth == 0:
            return text[start + 1 : at]
    raise ValueError("no end of the kernel")


def _operands(text: str) -> tuple[str, ...]:
    """Split at commas, but not inside of a vector or an address."""
    found, depth = [""], 0
    for letter in text:
        depth += {"{": 1, "[": 1, "(": 1, "}": -1, "]": -1, ")": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            found.append("")
        else:
            found[-1] += letter
    return tuple(operand.strip() for operand in found if operand.strip())
