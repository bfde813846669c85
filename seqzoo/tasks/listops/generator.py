"""ListOps expressions drawn from the published grammar, straight into arrays and evaluated on the way.

The work is cut into shards of a fixed number of draws, each with a random stream of its own, and shards are taken in
order: a seed gives the same rows on any machine, with any number of workers. Workers are threads: the compiled loop
holds no interpreter lock, so processes would only compile it once more each.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import count

import numpy as np
from numba import njit

from ..store.random_stream import below, stream
from .grammar import CLOSE, DIGIT, MAX, MED, MIN, Grammar

DRAWS_PER_SHARD = 4096
FRUITLESS_SHARDS = 64  # so many in a row without a new row, and there are no more to be had


def generate(
    grammar: Grammar, num_rows: int, *, seed: int, workers: int | None, advance: Callable[[int], object]
) -> tuple[list[np.ndarray], np.ndarray]:
    """Draw `num_rows` distinct expressions.

    Args:
        workers: how many threads, None for one a core; the rows do not depend on it.
        advance: called with the number of new rows whenever there are some.

    Returns:
        The rows, ids (uint8) without <eos>, and their values (int64 [num_rows]).

    Raises:
        ValueError: the grammar has too few distinct expressions of such lengths.
    """
    rows: list[np.ndarray] = []
    labels: list[int] = []
    seen: set[bytes] = set()
    fruitless = 0
    workers = (os.cpu_count() or 1) if workers is None else workers
    with closing(_shards(grammar, seed, workers)) as shards:
        for shard_rows, shard_labels in shards:
            before = len(rows)
            for row, label in zip(shard_rows, shard_labels, strict=True):
                digest = hashlib.blake2b(row.tobytes(), digest_size=16).digest()
                if digest not in seen and len(rows) < num_rows:
                    seen.add(digest)
                    rows.append(row)
                    labels.append(label)
            advance(len(rows) - before)
            if len(rows) == num_rows:
                break
            fruitless = fruitless + 1 if len(rows) == before else 0
            if fruitless == FRUITLESS_SHARDS:
                raise ValueError(
                    f"ListOps: {num_rows:,} rows were asked for and only {len(rows):,} distinct ones found with "
                    f"{grammar}; ask for fewer, or widen the lengths, the depth or the number of arguments"
                )
    return rows, np.array(labels, dtype=np.int64)


def _shards(grammar: Grammar, seed: int, workers: int) -> Generator[tuple[list[np.ndarray], list[int]], None, None]:
    """Shard 0, 1, 2, ... without end, a few of them under way at a time."""

    def draw(shard: int) -> tuple[list[np.ndarray], list[int]]:
        state = stream(seed, shard)
        tokens, ends, values = _draw_shard(
            state, DRAWS_PER_SHARD, grammar.max_depth, grammar.max_args, grammar.min_length, grammar.length_bound
        )
        return np.split(tokens, ends[:-1]) if len(ends) else [], values.tolist()

    with ThreadPoolExecutor(workers) as pool:
        pending = deque(pool.submit(draw, shard) for shard in range(2 * workers))
        for shard in count(len(pending)):
            yield pending.popleft().result()
            pending.append(pool.submit(draw, shard))


@njit(nogil=True)
def _apply(operator, values):
    if operator == MIN:
        return values.min()
    if operator == MAX:
        return values.max()
    if operator == MED:
        values.sort()
        half = values.size // 2
        return values[half] if values.size % 2 else (values[half - 1] + values[half]) // 2
    return values.sum() % 10


@njit(nogil=True)
def _draw(state, row, max_depth, max_args, operators, missing, values):
    """Draw one expression into `row` and return its length and value, or -1, -1 where it does not fit.

    `operators`, `missing` and `values` have a row for each depth: the open operator, how many arguments it still lacks,
    and those it has.
    """
    length = 0
    depth = 0  # of the innermost open operator; 0 is above the root
    while length < row.size:
        if depth + 1 < max_depth and below(state, 4) == 0:
            depth += 1
            operators[depth] = MIN + below(state, 4)
            missing[depth, 1] = missing[depth, 0] = 2 + below(state, max_args - 1)
            row[length] = operators[depth]
            length += 1
            continue
        value = below(state, 10)
        row[length] = DIGIT + value
        length += 1
        while depth > 0:
            total, left = missing[depth]
            values[depth, total - left] = value
            missing[depth, 1] = left - 1
            if left > 1:
                break
            if length == row.size:
                return -1, -1
            row[length] = CLOSE
            length += 1
            value = _apply(operators[depth], values[depth, :total])
            depth -= 1
        if depth == 0:
            return length, value
    return -1, -1


@njit(nogil=True)
def _draw_shard(state, draws, max_depth, max_args, min_length, length_bound):
    """The expressions of fitting length among `draws`: ids one after another, where each ends, and their values."""
    tokens = np.empty(draws * (length_bound - 1), np.uint8)
    ends = np.empty(draws, np.int64)
    labels = np.empty(draws, np.int64)
    operators = np.empty(max_depth + 1, np.int64)
    missing = np.empty((max_depth + 1, 2), np.int64)
    values = np.empty((max_depth + 1, max_args), np.int64)
    kept = 0
    start = 0
    for _ in range(draws):
        row = tokens[start : start + length_bound - 1]
        length, value = _draw(state, row, max_depth, max_args, operators, missing, values)
        if length > min_length:
            start += length
            ends[kept] = start
            labels[kept] = value
            kept += 1
    return tokens[:start].copy(), ends[:kept].copy(), labels[:kept].copy()
