"""Covering arrays: few cases, in which every combination of the values of any two factors still occurs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations, product
from typing import Any

Case = dict[str, Any]
Needs = Mapping[tuple[str, Any], Mapping[str, Sequence[Any]]]


def covering(
    factors: Mapping[str, Sequence[Any]], *, strength: int = 2, needs: Needs | None = None, include: Sequence[Case] = ()
) -> list[Case]:
    """Cases, greedily: each begins as a combination that is missing, then takes what adds the most missing ones.

    Args:
        factors: the values of each.
        strength: of how many factors all combinations are wanted.
        needs: for a factor's value, the values of other factors that it goes with; it goes with all of those not named.
        include: values of some factors that must occur together too.
    """
    needs = {} if needs is None else needs

    def fit(case: Case) -> bool:
        wanted = (needs[item] for item in case.items() if item in needs)
        return all(case[name] in values for need in wanted for name, values in need.items() if name in case)

    order = {name: index for index, name in enumerate(factors)}
    missing = {
        tuple(zip(names, values, strict=True)): None
        for names in combinations(factors, strength)
        for values in product(*(factors[name] for name in names))
        if fit(dict(zip(names, values, strict=True)))
    }
    begun, cases = list(include), []
    while begun or missing:
        case = dict(begun.pop(0) if begun else next(iter(missing)))
        for name in [name for name in factors if name not in case]:
            others = [*combinations(case.items(), strength - 1)]

            def adds(value: Any, name: str = name, others: list[Any] = others) -> int:
                full = (tuple(sorted((*some, (name, value)), key=lambda item: order[item[0]])) for some in others)
                return sum(combination in missing for combination in full)

            case[name] = max((value for value in factors[name] if fit(case | {name: value})), key=adds)
        case = {name: case[name] for name in factors}
        for found in combinations(case.items(), strength):
            missing.pop(found, None)
        cases.append(case)
    return cases
