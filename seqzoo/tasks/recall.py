"""Synthetic sequences that ask a model for what it has read, where an answer can only come from its memory.

Batches are drawn without end. The model reads `tokens` and is asked at every position whose target is not `IGNORED`.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from ..spec import IGNORED


def selective_copying(
    batch_size: int, *, length: int, num_tokens: int = 16, num_symbols: int = 14, generator: Generator
) -> tuple[Tensor, Tensor]:
    """Data tokens scattered among noise, to be given back in their order at the end.

    Where they stand differs from sequence to sequence, so that time alone does not tell data from noise. The last
    `num_tokens` positions hold a marker each, and the k-th of them is asked for the k-th data token.

    Args:
        length: positions in all, T.
        num_tokens: data tokens in a sequence, with repetition.
        num_symbols: different data tokens, ids from 0; the noise is `num_symbols`, the marker `num_symbols + 1`.

    Returns:
        Tokens and targets, int64 [batch_size, T] each.

    Raises:
        ValueError: the tokens and their markers do not fit, or there is no symbol.

    Source: Gu and Dao, "Mamba" (2023), section 4.1.1: 16 data tokens, of 16 ids in all.
    """
    if not 1 <= num_tokens <= length // 2:
        raise ValueError(f"num_tokens={num_tokens} in length={length}; valid: 1 to {length // 2}, half the length")
    if num_symbols < 1:
        raise ValueError(f"num_symbols={num_symbols}; valid: 1 and more")
    noise, marker = num_symbols, num_symbols + 1
    context = length - num_tokens
    data = torch.randint(num_symbols, (batch_size, num_tokens), generator=generator)
    places = _places(batch_size, context, num_tokens, generator)
    tokens = torch.full((batch_size, length), noise).scatter(1, places.sort(1).values, data)
    tokens[:, context:] = marker
    targets = torch.full((batch_size, length), IGNORED)
    targets[:, context:] = data
    return tokens, targets


def associative_recall(
    batch_size: int,
    *,
    length: int,
    num_pairs: int = 8,
    num_queries: int = 64,
    num_symbols: int = 16,
    generator: Generator,
) -> tuple[Tensor, Tensor]:
    """Keys, each followed by its value, and then keys again, each of which is asked for its value (MQAR).

    The pairs come first, side by side. Queries stand at random positions behind them, among noise, and each is one of
    the keys, whichever. They are many because each is an answer to learn from.

    Args:
        length: positions in all, T.
        num_pairs: pairs in a sequence, whose keys all differ; values need not.
        num_queries: queries in a sequence.
        num_symbols: different keys, ids from 0, and as many values, ids from `num_symbols`; the noise is
            `2 · num_symbols`.

    Returns:
        Tokens and targets, int64 [batch_size, T] each.

    Raises:
        ValueError: there are fewer keys than pairs, or pairs and queries do not fit.

    Source: Arora et al., "Zoology" (2023), multi-query associative recall; there each key is asked for once.
    """
    if not 1 <= num_pairs <= num_symbols:
        raise ValueError(f"num_pairs={num_pairs} with num_symbols={num_symbols}; valid: 1 to {num_symbols}")
    left = length - 2 * num_pairs
    if not 1 <= num_queries <= left:
        raise ValueError(
            f"num_queries={num_queries} with length={length}, num_pairs={num_pairs}; valid: 1 to {left}, what is left"
        )
    noise = 2 * num_symbols
    keys = _places(batch_size, num_symbols, num_pairs, generator)
    values = torch.randint(num_symbols, noise, (batch_size, num_pairs), generator=generator)
    asked = torch.randint(num_pairs, (batch_size, num_queries), generator=generator)
    places = 2 * num_pairs + _places(batch_size, left, num_queries, generator)
    tokens = torch.full((batch_size, length), noise).scatter(1, places, keys.gather(1, asked))
    tokens[:, : 2 * num_pairs] = torch.stack([keys, values], -1).flatten(1)
    targets = torch.full((batch_size, length), IGNORED).scatter(1, places, values.gather(1, asked))
    return tokens, targets


def induction_heads(
    batch_size: int, *, length: int, num_symbols: int = 15, generator: Generator
) -> tuple[Tensor, Tensor]:
    """Random symbols, in which one place follows a trigger; at the end the trigger again, asked for what followed it.

    The first trigger stands anywhere with the same probability, up to two positions before the second, so that a symbol
    always lies between them.

    Args:
        length: positions in all, T.
        num_symbols: different symbols, ids from 0; the trigger is `num_symbols`.

    Returns:
        Tokens and targets, int64 [batch_size, T] each.

    Raises:
        ValueError: two triggers and a symbol do not fit, or there is no symbol.

    Source: what Olsson et al., "In-context Learning and Induction Heads" (2022), find that attention does, in the form
    of Gu and Dao, "Mamba" (2023), section 4.1.2: one trigger, 16 ids in all.
    """
    if length < 3:
        raise ValueError(f"length={length}; valid: 3 and more, two triggers and a symbol")
    if num_symbols < 1:
        raise ValueError(f"num_symbols={num_symbols}; valid: 1 and more")
    tokens = torch.randint(num_symbols, (batch_size, length), generator=generator)
    place = torch.randint(length - 2, (batch_size, 1), generator=generator)
    targets = torch.full((batch_size, length), IGNORED)
    targets[:, -1:] = tokens.gather(1, place + 1)
    tokens.scatter_(1, place, num_symbols)
    tokens[:, -1] = num_symbols
    return tokens, targets


def _places(batch_size: int, n: int, k: int, generator: Generator) -> Tensor:
    """`k` different numbers below `n`, in random order: int64 [batch_size, k]."""
    return torch.rand(batch_size, n, generator=generator).topk(k, largest=False).indices
