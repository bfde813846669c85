from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .base import Block


class _NoWeight:
    """What stands where weights of attention would, and tells PyTorch to compute nothing from it."""

    weight = bias = None

    @classmethod
    def __torch_function__(cls, *_: Any) -> Any:
        return NotImplemented


class AsSelfAttention(nn.Module):
    """A block that is called as PyTorch's `nn.MultiheadAttention(..., batch_first=True)` is, on itself.

    In `nn.TransformerEncoderLayer` and `nn.TransformerDecoderLayer` it takes the place of `self_attn`:

        layer.self_attn = AsSelfAttention(build_block("lru", d_model, causal=True))

    Steps of a causal block that are told of a mask must be told of the causal one, and `is_causal=True` with it.

    Args:
        block: what mixes.
    """

    # What PyTorch looks at before it would compute the layer from the weights of an attention of its own.
    batch_first = True
    in_proj_bias = None
    in_proj_weight = out_proj = _NoWeight()
    _qkv_same_embed_dim = False

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *, need_weights: bool = False, **masks: Any
    ) -> tuple[Tensor, None]:
        """The block's outputs [B, T, d_model], and no weights.

        Args:
            query, key, value: the same [B, T, d_model], or nested, as PyTorch makes padded batches, B of [T_i, D].
            masks: `key_padding_mask`, `attn_mask` and `is_causal`, as `Block.forward` takes them.

        Raises:
            ValueError: weights are asked for, keys or values are others, or as `Block.forward`.
        """
        if key is not query or value is not query:
            raise ValueError(
                f"{type(self.block).__name__}: keys and values are others than the queries; valid: self_attn, in which "
                "a sequence looks at itself"
            )
        if need_weights:
            raise ValueError(
                f"{type(self.block).__name__} has no weights to return; valid: need_weights=False, and "
                "seqzoo.analysis.mixing_matrix, which computes them"
            )
        if not query.is_nested:
            return self.block(query, **masks), None
        lengths = [len(each) for each in query.unbind()]
        padded = torch.nested.to_padded_tensor(query, 0.0)
        y = self.block(padded, lengths=torch.tensor(lengths, device=padded.device), **masks)
        return torch.nested.as_nested_tensor([row[:length] for row, length in zip(y, lengths, strict=True)]), None
