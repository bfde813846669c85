"""Which keys each query sees, as seqzoo's operations take it, made where transformers makes its masks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import masking_utils as masks

from ..blocks.masks import Padding, check_padding
from ..kernels.common import can_be_looked_at

ALL_OF = masks.and_masks(masks.causal_mask_function).__code__
CAUSAL_WINDOW = masks.sliding_window_overlay(1).__code__
WINDOW = masks.sliding_window_bidirectional_overlay(1).__code__
SAME_SEQUENCE = masks.packed_sequence_mask_function(torch.zeros(1, 1)).__code__
REMAPPED = masks.remap_positions_for_packed_sequence(masks.causal_mask_function, torch.zeros(1, 1)).__code__


@dataclass(frozen=True)
class Seen:
    """What takes the place of a mask: query i stands at `position + i` and key j at j.

    It has what transformers asks of a mask that is ready.
    """

    causal: bool
    reach: tuple[int, int] | None = None  # how many keys ahead of a query's place and behind it; None: all
    counts: Tensor | None = None  # bool [B, S], which keys are no padding; None: all
    position: int | Tensor = 0
    starts: Tensor | None = None  # int64 [N + 1], of the documents of all rows, one row behind the other

    ndim = 4

    @property
    def shape(self) -> tuple[int, ...]:
        return (1, 1, 1, 1) if self.counts is None else (self.counts.shape[0], 1, 1, self.counts.shape[1])

    def contiguous(self) -> Seen:
        """As of a tensor, for `generate`."""
        return self

    def to(self, device: Any, **options: Any) -> Seen:
        """As of a tensor, for those who spread a model over devices."""
        parts = {name: getattr(self, name) for name in ("counts", "position", "starts")}
        moved: Any = {name: part.to(device, **options) for name, part in parts.items() if isinstance(part, Tensor)}
        return replace(self, **moved)

    def new_steps(self, T: int) -> Tensor | None:
        """Which of the T queries are no padding, bool [B, T]; None: all."""
        if self.counts is None:
            return None
        new = self.counts[:, self.places(T, self.counts.device)]
        return None if can_be_looked_at(new) and new.all() else new

    def places(self, T: int, device: torch.device) -> Tensor:
        """Where the T queries stand: int64 [T]."""
        return self.position + torch.arange(T, device=device)

    def padding(self, what: str) -> Padding | None:
        """The padding of the keys; None where there is none.

        Raises:
            ValueError: there is padding between keys that count (looked at on a CPU only).
        """
        return None if self.counts is None else check_padding(what, None, self.counts, *self.counts.shape)


def check_packed(what: str, position_ids: Any, seen: Seen, T: int) -> None:
    """That positions begin anew in the documents of `seen` only; they are looked at on a CPU, outside of graphs.

    transformers looks for packed sequences where there is neither a cache nor an attention_mask, and only there.

    Raises:
        ValueError: a row has several sequences, of which `seen` does not know.
    """
    if seen.starts is not None or not isinstance(position_ids, Tensor) or position_ids.dim() != 2:
        return
    if position_ids.shape[1] != T or not can_be_looked_at(position_ids):
        return
    back, counts = position_ids[:, 1:] <= position_ids[:, :-1], seen.new_steps(T)
    if (back if counts is None else back & counts[:, 1:] & counts[:, :-1]).any():
        raise ValueError(
            f"{what}: position_ids begin anew within a row, as of packed sequences, which transformers tells no mask "
            "where there is a cache or an attention_mask; valid: use_cache=False, and no attention_mask"
        )


def seen_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    mask_function: Callable[..., Any] = masks.causal_mask_function,
    attention_mask: Any = None,
    **_: Any,
) -> Seen:
    """The mask function of every implementation of seqzoo's, with the arguments that transformers gives to any.

    Raises:
        ValueError: the mask is none of causal, bidirectional, sliding windows of either, and packed sequences.
    """
    if isinstance(attention_mask, Seen):  # made ahead, for a graph
        return attention_mask
    if mask_function is masks.causal_mask_function or mask_function is masks.bidirectional_mask_function:
        seen = Seen(mask_function is masks.causal_mask_function)
    else:
        seen = (_outside_of_graphs if torch.compiler.is_compiling() else _read)(mask_function, batch_size)
    if seen.starts is not None:
        return seen
    position: Any = q_offset - kv_offset
    if attention_mask is None:
        return replace(seen, position=position)
    counts: Any = masks.prepare_padding_mask(attention_mask, kv_length, kv_offset)  # type: ignore[arg-type]
    counts = counts[:, kv_offset + torch.arange(kv_length, device=counts.device)]
    within = counts[:, : position + q_length] if seen.causal and isinstance(position, int) else counts
    if can_be_looked_at(within) and within.all():
        return replace(seen, position=position)
    return replace(seen, position=position, counts=counts)


def _read(mask_function: Callable[..., Any], rows: int) -> Seen:
    """Direction, window and documents of a mask that transformers has put together."""
    causal, reach, sequence = False, None, None
    for part in _parts(mask_function):
        code, inside = part.__code__, inspect.getclosurevars(part).nonlocals
        if part is masks.causal_mask_function:
            causal = True
        elif code is CAUSAL_WINDOW:
            reach = (inside["sliding_window"] - 1, 0)
        elif code is WINDOW:
            reach = (inside["sliding_window"],) * 2
        elif code is SAME_SEQUENCE:
            sequence = inside["packed_sequence_mask"]
        elif part is not masks.bidirectional_mask_function:
            raise ValueError(
                f"seqzoo's attention got a mask of transformers that it cannot keep, {part.__qualname__.split('.')[0]}"
                "; valid: causal, bidirectional, a sliding window, packed sequences; for this model, "
                "attn_implementation='sdpa' or 'eager'"
            )
    if causal and reach is not None:
        reach = (reach[0], 0)
    return Seen(causal, reach, starts=None if sequence is None else _starts(sequence, rows))


_outside_of_graphs = torch.compiler.disable(
    _read,
    reason="seqzoo reads masks that transformers has put together outside of compiled graphs; valid: fullgraph=False, "
    "or an attention_mask, of ones where nothing is padded, so that transformers does not look for packed sequences",
)


def _parts(mask_function: Callable[..., Any]) -> Iterator[Any]:
    """The masks that hold at once, as transformers builds them from each other."""
    code = getattr(mask_function, "__code__", None)
    if code is ALL_OF:
        for part in inspect.getclosurevars(mask_function).nonlocals["mask_functions"]:
            yield from _parts(part)
    elif code is REMAPPED:  # counts from the begin of each sequence, as documents do
        yield from _parts(inspect.getclosurevars(mask_function).nonlocals["mask_function"])
    else:
        yield mask_function


def _starts(sequence: Tensor, rows: int) -> Tensor | None:
    """Where documents begin in all rows behind each other, and the end, from which sequence of its row each step is of.

    None: each row is one, as transformers does not see before a graph runs.
    """
    sequence = sequence.expand(rows, -1)
    begins = sequence[:, 1:] != sequence[:, :-1]
    if not begins.any():
        return None
    begins = F.pad(begins, (1, 0), value=True).flatten()
    return F.pad(begins.nonzero()[:, 0], (0, 1), value=len(begins))
