"""The language of ListOps: its symbols, the grammar expressions are drawn from, and what an expression is worth.

An expression is a digit, or an operator applied to 2 to `max_args` expressions, written `[MAX 4 3 [MIN 2 3 ] ]`. MED is
the integer part of the median, SM the sum modulo 10. From Tay et al. 2021 (arXiv 2011.04006, section 2.2.1), after
Nangia and Bowman 2018 (arXiv 1804.06028). The published generator keeps 500 < length < 2000, where length counts
digits, operators and closing brackets.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SYMBOLS = ("<mask>", "<pad>", "<unk>", "<eos>", *"0123456789", "[MIN", "[MAX", "[MED", "[SM", "]")
MASK, PAD, UNK, EOS, DIGIT = range(5)  # DIGIT is the id of 0; the other digits follow
MIN, MAX, MED, SM, CLOSE = range(SYMBOLS.index("[MIN"), len(SYMBOLS))

_IDS = {symbol: token for token, symbol in enumerate(SYMBOLS)}


@dataclass(frozen=True)
class Grammar:
    """How expressions are drawn; kept are those with `min_length < length < length_bound`.

    A node is an operator with probability 1/4 where its depth (the root's is 1) is below `max_depth`, and a digit
    otherwise; the number of arguments, the operator and the digit are uniform.
    """

    max_depth: int = 10
    max_args: int = 10
    min_length: int = 500
    length_bound: int = 2000

    def __post_init__(self) -> None:
        if self.max_depth < 2 or self.max_args < 2:
            raise ValueError(
                f"ListOps: max_depth {self.max_depth} and max_args {self.max_args} must both be at least 2, "
                "or there is no operator to draw"
            )
        if not 0 <= self.min_length < self.length_bound - 1:
            raise ValueError(
                f"ListOps: no length lies between min_length {self.min_length} and length_bound {self.length_bound}, "
                "both excluded; valid: 0 <= min_length < length_bound - 1"
            )


def tokenise(expression: str) -> np.ndarray:
    """The ids (uint8) of an expression in the published notation, `( ( ( [MAX 4 ) 3 ) ] )`, or without parentheses.

    Parentheses only say again what the brackets say, and are dropped; nothing else is.

    Raises:
        ValueError: a symbol is not one of ListOps.
    """
    symbols = expression.replace("(", " ").replace(")", " ").split()
    try:
        return np.array([_IDS[symbol] for symbol in symbols], dtype=np.uint8)
    except KeyError as unknown:
        valid = " ".join(SYMBOLS[DIGIT:])
        raise ValueError(f"{unknown} is no symbol of ListOps; valid: {valid} and parentheses") from None


def evaluate(tokens: np.ndarray) -> int:
    """The value, 0 to 9, of an expression given as ids without <eos>.

    Raises:
        ValueError: the ids are not one well-formed expression.
    """
    nodes: list[list[int]] = [[]]  # of each open node the operator and the values so far; first what lies at the top
    for position, token in enumerate(tokens.tolist()):
        if DIGIT <= token < DIGIT + 10:
            nodes[-1].append(token - DIGIT)
        elif MIN <= token <= SM:
            nodes.append([token])
        elif token == CLOSE and len(nodes) > 1 and len(nodes[-1]) > 1:
            operator, *values = nodes.pop()
            nodes[-1].append(_apply(operator, values))
        else:
            symbol = SYMBOLS[token] if token < len(SYMBOLS) else token
            raise ValueError(f"not a ListOps expression: {symbol} cannot stand at position {position}")
    if len(nodes) > 1 or len(nodes[0]) != 1:
        raise ValueError(f"not a ListOps expression: {len(nodes) - 1} brackets open, {len(nodes[0])} values at the top")
    return nodes[0][0]


def _apply(operator: int, values: list[int]) -> int:
    if operator == MIN:
        return min(values)
    if operator == MAX:
        return max(values)
    if operator == MED:
        return int(np.median(values))
    return sum(values) % 10
