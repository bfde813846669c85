from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.common import valid_positions
from ..kernels.derivatives import by_hand
from ..kernels.documents import Documents
from .base import advance
from .states import state_of


@state_of("keys", "values")
class KeyValueCache(NamedTuple):
    """Keys and values of all steps, in buffers with room for more of them, into which the next ones are written.

    Entries are only ever added, behind all that any state knows of. So a state may write into its buffers as long as
    nobody has written behind it: where `written`, which the states of the same buffers share, stands where it does. Any
    other, older than its buffers or a fork of what has been continued, copies them first.
    """

    keys: Tensor  # [B, S, ...], S of them have room; the first `position` of each sequence are filled
    values: Tensor  # [B, S, ...]
    position: Tensor  # int64 [B]
    written: Tensor  # int64 [B], how many entries of the buffers are taken; -1: nobody may write into them

    @classmethod
    def empty(
        cls,
        B: int,
        room: int,
        keys: tuple[int, ...],
        values: tuple[int, ...],
        *,
        device: torch.device | str | None,
        dtype: torch.dtype,
    ) -> KeyValueCache:
        """Of B sequences of which nothing has been seen, with room for so many entries of these shapes."""
        position, written = (torch.zeros(B, dtype=torch.int64, device=device) for _ in range(2))
        empty = partial(_zeros, B, room, device=device, dtype=dtype)
        return cls(empty(keys), empty(values), position, written)

    def append(
        self, k: Tensor, v: Tensor, lengths: Tensor | None, documents: Documents | None
    ) -> tuple[Tensor, Tensor, Tensor | None, KeyValueCache]:
        """Keys and values of all steps so far, how many those are, and the state then.

        Args:
            k, v: of the present steps, [B, T, ...], or in a row [1, T, ...] those of documents.
            lengths, documents: as in `Block.mix`.

        Returns:
            [B, S, ...] each in the dtype of k and v, with S no more than the longest has; int64 [B], or None for S; and
            the state. A GPU is waited for: once, and twice where sequences differ in length. In graphs, in
            transforms of functions and where there is to be a gradient, buffers are made anew, with room for T more,
            and S is all of it.
        """
        keys, values, position, written = self
        end = advance(position, k, lengths, documents)
        if not _can_write(k, v, keys, values):
            keys, values = grow(keys, k, position, documents), grow(values, v, position, documents)
            cache = KeyValueCache(keys, values, end, torch.full_like(end, -1))
            return keys.to(k.dtype), values.to(v.dtype), end, cache
        places, taken, ends = torch.stack([position, written, end]).tolist()
        first = places[0] if lengths is None and documents is None and places.count(places[0]) == len(places) else None
        S = max(ends) if first is None else first + k.shape[1]
        if not (places == taken and self._mine(S)):
            keys, values, _, written = self._moved(S, max(places))
        held_keys, held_values = keys[:, :S], values[:, :S]
        if first is None:
            where = _where(k.shape[1], position, lengths, documents)
            _scatter(k, held_keys, *where)
            _scatter(v, held_values, *where)
        else:
            held_keys[:, first:] = k
            held_values[:, first:] = v
        written.copy_(end)
        cache = KeyValueCache(keys, values, end, written)
        return held_keys.to(k.dtype), held_values.to(v.dtype), end if first is None else None, cache

    def _mine(self, S: int) -> bool:
        """Whether the buffers have room for S entries, and can be written into here."""
        if self.keys.shape[1] < S:
            return False
        return torch.is_inference_mode_enabled() or not (self.keys.is_inference() or self.written.is_inference())

    def _moved(self, S: int, used: int) -> KeyValueCache:
        """The same in buffers of its own, twice as large if there is not room for S entries."""
        room = self.keys.shape[1]
        room = room if room >= S else max(S, 2 * room)

        def moved(old: Tensor) -> Tensor:
            new = _zeros(len(old), room, old.shape[2:], device=old.device, dtype=old.dtype)
            new[:, :used] = old[:, :used]
            return new

        return KeyValueCache(moved(self.keys), moved(self.values), self.position, torch.empty_like(self.position))


def check_room(block: str, max_length: int | None) -> int:
    """`max_length`, or 0 for None.

    Raises:
        ValueError: it is no number of steps.
    """
    if max_length is None:
        return 0
    if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 0:
        raise ValueError(f"{block}: max_length={max_length!r}; valid: for how many steps there is to be room, or None")
    return max_length


def _can_write(*tensors: Tensor) -> bool:
    """Whether tensors have values that can be looked at, and nothing else is to be made of them."""
    device = tensors[0].device.type
    captured = device == "cuda" and torch.cuda.is_current_stream_capturing()
    here = by_hand() and not torch.jit.is_tracing() and not captured and device != "meta"
    recorded = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    return here and not recorded and all(type(x) is Tensor for x in tensors)


def _zeros(B: int, room: int, entry: Iterable[int], *, device: torch.device | str | None, dtype: torch.dtype) -> Tensor:
    """[B, room, ...], of heads [B, room, H, D] each of which lies in memory by itself."""
    *heads, channels = entry
    return torch.zeros(B, *heads, room, channels, device=device, dtype=dtype).transpose(1, -2)


def _where(
    T: int, position: Tensor, lengths: Tensor | None, documents: Documents | None
) -> tuple[tuple[Tensor, Tensor] | None, tuple[Tensor, Tensor]]:
    """Which of T steps of each sequence count, by row and step, and by row and entry where they belong in a buffer. Of
    documents, all steps of the one row do: None."""
    if documents is not None:
        row = documents.of_steps()
        return None, (row, position[row] + documents.positions())
    counts = valid_positions(torch.full_like(position, T) if lengths is None else lengths, T)
    row, step = counts.nonzero(as_tuple=True)
    return (row, step), (row, position[row] + step)


def _scatter(new: Tensor, buffer: Tensor, taken: tuple[Tensor, Tensor] | None, put: tuple[Tensor, Tensor]) -> None:
    """Puts what `_where` says of `new` [B, T, ...] into `buffer` [B, S, ...]."""
    buffer[put] = (new[0] if taken is None else new[taken]).to(buffer.dtype)


def grow(cache: Tensor, new: Tensor, position: Tensor, documents: Documents | None = None) -> Tensor:
    """Writes `new` [B, T, ...] behind the first `position` entries of each sequence of `cache` [B, S, ...].

    Returns [B, S + T, ...] in the cache's dtype; what lies behind the new entries has no meaning. Of `documents`, N in
    place of B, there are as many new entries as the longest has steps: a GPU is waited for.
    """
    if documents is not None:
        new = documents.padded(new)
    slot = position[:, None] + torch.arange(new.shape[1], device=new.device)  # [B, T]
    slot = slot.reshape(slot.shape + (1,) * (new.dim() - 2)).expand_as(new)
    room = torch.zeros_like(new, dtype=cache.dtype)
    return torch.cat([cache, room], 1).scatter(1, slot, new.to(cache.dtype))


def in_a_row(caches: Iterable[Tensor], filled: Tensor, documents: Documents) -> tuple[list[Tensor], dict[str, Any]]:
    """Caches of documents as `attention` takes them.

    Args:
        caches: [N, S, ...].
        filled: int64 [N], how many entries of each there are, those of the present steps included.
        documents: of the present steps.

    Returns:
        [1, N · S, ...] each, and `cu_seqlens` and `query_cu_seqlens`: entries that are not filled are documents of
        their own, in between, of which nothing is asked.
    """
    rows = list(caches)
    steps = documents.lengths
    keys, queries = (filled, rows[0].shape[1] - filled), (steps, torch.zeros_like(steps))
    keys_end, queries_end = (F.pad(torch.stack(pair, 1).flatten().cumsum(0), (1, 0)) for pair in (keys, queries))
    return [row.flatten(0, 1)[None] for row in rows], {"cu_seqlens": keys_end, "query_cu_seqlens": queries_end}
