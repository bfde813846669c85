"""Masks that say which steps of padded sequences count, as PyTorch and transformers have them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.common import INTEGERS, can_be_looked_at, future, valid_positions


class Padding(NamedTuple):
    """Padding on either side of sequences."""

    lengths: Tensor  # int64 [B], how many steps of each count
    front: Tensor | None  # int64 [B], behind how many that do not; None: all are seen to begin at once

    def moved_behind(self, x: Tensor) -> Tensor:
        """`x` [B, T, ...], each row rolled until its sequence begins it."""
        return x if self.front is None else _rolled(x, self.front)

    def moved_back(self, y: Tensor) -> Tensor:
        """What `moved_behind` moved."""
        return y if self.front is None else _rolled(y, -self.front)


def check_padding(
    what: str, key_padding_mask: Tensor | None, attention_mask: Tensor | None, B: int, T: int
) -> Padding | None:
    """The padding that one of two masks tells; None where there is no mask.

    Values are looked at where that costs nothing: on a CPU, outside of graphs. Elsewhere they are trusted.

    Args:
        what: whose masks they are, for messages.
        key_padding_mask: [B, T], PyTorch's: bool, true where a step is padding, or -inf there and 0 elsewhere.
        attention_mask: [B, T], that of transformers: bool or of any numbers, 1 where a step counts and 0 elsewhere.

    Raises:
        ValueError: both are given, one is of another shape or dtype, or, on a CPU, holds something else or has padding
            between steps that count.
    """
    if key_padding_mask is None and attention_mask is None:
        return None
    if key_padding_mask is not None and attention_mask is not None:
        raise ValueError(f"{what}: got key_padding_mask and attention_mask; valid: one of them")
    name = "attention_mask" if key_padding_mask is None else "key_padding_mask"
    mask: Any = attention_mask if key_padding_mask is None else key_padding_mask
    valid = "1 or true where a step counts and 0 or false where it is padding"
    if mask is key_padding_mask:
        valid = "true where a step is padding and false elsewhere, or floats of -inf and 0"
    if not isinstance(mask, Tensor) or mask.shape != (B, T) or (mask is key_padding_mask and mask.dtype in INTEGERS):
        given = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"{what}: {name} must be [{B}, {T}], {valid}, got {given}")
    if mask is attention_mask:
        counts, hidden = mask == 1, mask == 0
    elif mask.dtype == torch.bool:
        counts, hidden = ~mask, mask
    else:
        counts, hidden = mask == 0, mask == -torch.inf
    lengths, front = counts.sum(1), counts.int().argmax(1)  # the first of equals: 0 where nothing counts
    if can_be_looked_at(mask):
        if not (counts | hidden).all():
            raise ValueError(f"{what}: {name} must be {valid}, got other numbers too")
        if not (_rolled(counts, front) == valid_positions(lengths, T)).all():
            raise ValueError(
                f"{what}: {name} has padding between steps that count; valid: in front of them, behind them or both. "
                "Sequences in one row have cu_seqlens"
            )
        return Padding(lengths, front if front.any() else None)
    return Padding(lengths, front)


def check_attn_mask(what: str, causal: bool, attn_mask: Tensor | None, is_causal: bool | None, T: int) -> None:
    """That the two say of a block what it is: which step sees which is settled when it is built.

    Raises:
        ValueError: `is_causal` is not what the block is; or there is a mask of pairs of steps that, on a CPU, is not
            the causal mask of a block that is.
    """
    if is_causal is not None and bool(is_causal) != causal:
        raise ValueError(
            f"{what}: is_causal={is_causal} of a block built with causal={causal}; valid: is_causal={causal}, or a "
            f"block built with causal={is_causal}"
        )
    if attn_mask is None:
        return
    if causal and isinstance(attn_mask, Tensor) and attn_mask.shape == (T, T):
        hidden = attn_mask if attn_mask.dtype == torch.bool else attn_mask == -torch.inf
        if not can_be_looked_at(attn_mask) or torch.equal(hidden, future(T, hidden.device)):
            return
    raise ValueError(
        f"{what}: got an attn_mask; valid: None, or the mask of what comes later for a causal block. Which steps count "
        "is said by lengths, cu_seqlens, key_padding_mask or attention_mask"
    )


def _rolled(x: Tensor, by: Tensor) -> Tensor:
    """Row b of `x` [B, T, ...], rolled by `by[b]` towards its begin."""
    T = x.shape[1]
    place = (torch.arange(T, device=x.device) + by[:, None]) % T
    return x[torch.arange(len(x), device=x.device)[:, None], place]
