from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..documents import Documents
from .packed import PackedBlocks


class VQState(NamedTuple):
    """What causal VQ attention remembers: the last block one by one, everything before it by code.

    Position p of the sequence is entry `block_len - position + p` of `codes` and `values`.
    """

    codes: Tensor  # int64 [B, block_len, H]
    values: Tensor  # [B, block_len, H, Dv]
    counts: Tensor  # int64 [B, H, S], how many older keys have each code
    sums: Tensor  # [B, H, S, Dv], the sum of their values
    position: Tensor  # int64 [B], positions seen

    @classmethod
    def empty(
        cls, B: int, H: int, S: int, Dv: int, block_len: int, *, device: torch.device | str | None, dtype: torch.dtype
    ) -> VQState:
        return cls(
            codes=torch.zeros(B, block_len, H, dtype=torch.int64, device=device),
            values=torch.zeros(B, block_len, H, Dv, device=device, dtype=dtype),
            counts=torch.zeros(B, H, S, dtype=torch.int64, device=device),
            sums=torch.zeros(B, H, S, Dv, device=device, dtype=dtype),
            position=torch.zeros(B, dtype=torch.int64, device=device),
        )

    def advance(self, codes: Tensor, values: Tensor, lengths: Tensor | None) -> VQState:
        """The state after `codes` [B, T, H] and `values` [B, T, H, Dv], of which `lengths` are valid."""
        block_len, H = self.codes.shape[1:]
        T, S = codes.shape[1], self.counts.shape[-1]
        steps = torch.full_like(self.position, T) if lengths is None else lengths
        codes, values = torch.cat([self.codes, codes], 1), torch.cat([self.values, values], 1)

        slot = torch.arange(block_len + T, device=codes.device)
        oldest = block_len - self.position.clamp(max=block_len)  # [B], first slot that was ever filled
        leaves = (slot >= oldest[:, None]) & (slot < steps[:, None])  # [B, block_len + T], out of the last block
        member = (codes[..., None] == torch.arange(S, device=codes.device)) & leaves[:, :, None, None]  # [B, ., H, S]
        stays = steps[:, None] + torch.arange(block_len, device=codes.device)  # [B, block_len]
        return VQState(
            codes=codes.gather(1, stays[..., None].expand(-1, -1, H)),
            values=values.gather(1, stays[..., None, None].expand(-1, -1, *values.shape[2:])),
            counts=self.counts + member.sum(1),
            sums=self.sums + torch.einsum("bths,bthd->bhsd", member.to(values.dtype), values),
            position=self.position + steps,
        )

    def advance_documents(self, codes: Tensor, values: Tensor, documents: Documents) -> VQState:
        """The state after `codes` [1, T, H] and `values` [1, T, H, Dv] of documents, each behind its row."""
        N, block_len, H = self.codes.shape
        S, Dv = self.sums.shape[-2:]
        packed = PackedBlocks(documents, block_len, self.position.clamp(max=block_len))
        codes = packed.row(codes.to(self.codes.dtype), self.codes)[0]
        values, valid = packed.row(values, self.values.to(values.dtype))[0], packed.valid()[0]

        ends = packed.pieces.before[:-1] * block_len + documents.lengths  # [N], where what stays begins
        known = packed.pieces.known.repeat_interleave(block_len)  # the document of each position
        leaves = (valid & (torch.arange(len(codes), device=codes.device) < ends[known]))[:, None]
        cell = ((known[:, None] * H + torch.arange(H, device=codes.device)) * S + codes).flatten()  # of each key
        older = torch.where(leaves[..., None], values, 0).flatten(0, 1).to(self.sums.dtype)
        stays = ends[:, None] + torch.arange(block_len, device=codes.device)  # [N, block_len]
        return VQState(
            codes=codes[stays],
            values=values[stays],
            counts=self.counts.flatten().index_add(0, cell, leaves.expand(-1, H).flatten().long()).view(N, H, S),
            sums=self.sums.flatten(0, 2).index_add(0, cell, older).view(N, H, S, Dv),
            position=self.position + documents.lengths,
        )
