"""What is valid for a key beside its type, said where the key is declared: `lr: Positive = 1e-3`, `runs_dir: Text`.

Upper bounds are far above what anybody has used, and below what no machine holds or what would never begin.
"""

from __future__ import annotations

import os
import types
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints


class Range(NamedTuple):
    """Numbers from `low` to `high`, which belong to it unless it is said to be open there. NaN lies in none."""

    low: float
    high: float
    open_low: bool = False
    open_high: bool = False

    def holds(self, value: float) -> bool:
        """Whether `value` lies in it."""
        above = value > self.low if self.open_low else value >= self.low
        return above and (value < self.high if self.open_high else value <= self.high)

    def __str__(self) -> str:
        low = f"above {self.low:,}" if self.open_low else f"{self.low:,} or more"
        return f"{low} and {'below' if self.open_high else 'up to'} {self.high:,}"


LARGEST = 2**63 - 1  # int64
PLAIN = frozenset((bool, int, float, str, types.NoneType))

Count = Annotated[int, Range(1, 1 << 20)]  # of what memory holds
Width = Annotated[int, Range(1, 1 << 16)]  # of a layer, or a batch
Length = Annotated[int, Range(2, 1 << 20)]  # of a sequence
Examples = Annotated[int, Range(1, 10_000_000)]
Limit = Annotated[int, Range(1, LARGEST)]  # on what there is: more than that is all of it
Number = Annotated[int, Range(0, LARGEST)]  # that costs nothing: a seed, a threshold
Tokens = Annotated[int, Range(0, 10**24)]  # of a budget, which may take for ever
Epochs = Annotated[float, Range(0, 10**12)]
Positive = Annotated[float, Range(0, 1_000_000, open_low=True)]
NotNegative = Annotated[float, Range(0, 1_000_000)]
Bias = Annotated[float, Range(-100, 100)]  # of a gate: beyond, its sigmoid is 0 or 1
Factor = Annotated[float, Range(0, 64, open_low=True)]  # of a width
Fraction = Annotated[float, Range(0, 1, open_low=True)]
BelowOne = Annotated[float, Range(0, 1, open_high=True)]  # a share, or a probability, that leaves something
Between = Annotated[float, Range(0, 1, open_low=True, open_high=True)]

AS_IT_STANDS = "as it stands"
Text = Annotated[str, AS_IT_STANDS]  # anything, such as a path: no grammar reads it


def physical_memory() -> int:
    """Bytes of memory of this machine, in use or not."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_ranges(group: Any, prefix: str = "", *, absent: bool = False) -> None:
    """Raises ValueError, which names the key and what is valid, where a number of a dataclass is out of its range.

    Args:
        group: the dataclass; those inside it are looked at too.
        prefix: of its keys, such as "model.".
        absent: None stands for a key that does not apply, and is nothing to advise.
    """
    declared: Any = type(group)
    hints = hints_of(declared)
    for field in fields(group):
        key, value = prefix + field.name, getattr(group, field.name)
        if is_dataclass(value):
            check_ranges(value, f"{key}.")
        elif value is not None and (valid := range_of(hints[field.name])) and not valid.holds(value):
            null = types.NoneType in kinds_of(hints[field.name]) and not absent
            raise ValueError(f"{key}={value}: valid: {'null, or ' if null else ''}{valid}")


def check_options(function: Callable[..., Any], options: Mapping[str, Any], *, default: Mapping[type, Range]) -> None:
    """Raises ValueError where an argument for `function` is not of the type it is annotated with, or out of its range.

    Args:
        options: the arguments by name. One that is not annotated, or with more than plain types, may be anything.
        default: the range of numbers for which the function gives none.
    """
    hints = hints_of(function)
    for name, value in options.items():
        kinds = kinds_of(hints.get(name))
        if not PLAIN.issuperset(kinds):
            continue
        kind = float if type(value) is int and int not in kinds else type(value)
        if kind not in kinds:
            named = ("null" if kind is types.NoneType else kind.__name__ for kind in kinds)
            raise ValueError(f"{name}={value!r}: valid: {' or '.join(named)}")
        valid = range_of(hints[name]) or default.get(kind)
        if value is not None and valid and not valid.holds(value):
            raise ValueError(f"{name}={value}: valid: {valid}")


@cache
def hints_of(declared: Any) -> dict[str, Any]:
    """The annotations of a class or function, with what `Annotated` says beside the types."""
    return get_type_hints(declared, include_extras=True)


def kinds_of(hint: Any) -> tuple[type, ...]:
    """The types that a hint allows: `Count | None` -> (int, NoneType), and of `Literal["a", "b"]` (str,)."""
    return tuple(_kind_of(part) for part in _parts(hint))


def range_of(hint: Any) -> Range | None:
    """The range that a hint gives numbers: `Count | None` -> Range(1, 1048576)."""
    return next((mark for mark in marks_of(hint) if isinstance(mark, Range)), None)


def marks_of(hint: Any) -> list[Any]:
    """What `Annotated` says in a hint beside the types: `Text | None` -> [AS_IT_STANDS]."""
    return [mark for part in _parts(hint) if get_origin(part) is Annotated for mark in part.__metadata__]


def _kind_of(part: Any) -> type:
    if get_origin(part) is Literal:
        return type(get_args(part)[0])
    return get_args(part)[0] if get_origin(part) is Annotated else part


def _parts(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
