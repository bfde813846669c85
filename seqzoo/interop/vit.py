"""Blocks as the attention of vision transformers of timm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..blocks import build_block, check_block

WITH_HEADS = ("softmax_attention", "linear_attention", "performer")  # as timm's attention has them
TAKEN = ("qkv_bias", "proj_bias", "norm_layer")  # the last is of norms that are refused


class ViTMixer(nn.Module):
    """A block where timm has its attention, with the weights that the block begins with.

    timm draws the weights of all linear layers anew, and lets a layer that has `init_weights` have the last word.

    Args:
        name, d_model, options: of the block, which sees in both directions.
    """

    def __init__(self, name: str, d_model: int, **options: Any) -> None:
        super().__init__()
        self.made_of = name, d_model, options
        self.block = build_block(name, d_model, **options)

    def init_weights(self) -> None:
        """Begins anew, as `build_block` does."""
        name, d_model, options = self.made_of
        parameter = next(self.block.parameters())
        with torch.device(parameter.device):
            fresh = build_block(name, d_model, **options).to(parameter.dtype)
        self.block.load_state_dict(fresh.state_dict())

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """[B, T, d_model] -> [B, T, d_model]; masks as in `Block.forward`."""
        return self.block(x, attn_mask=attn_mask, is_causal=is_causal)


def timm_attention(name: str, **options: Any) -> type[nn.Module]:
    """A class for `attn_layer=` of timm's models, which makes blocks of one name.

        timm.create_model("vit_tiny_patch16_224", attn_layer=seqzoo.timm_attention("lru"))

    Heads and biases of attention are those of the model, unless `options` say otherwise; there are no rotary positions,
    as the model adds its own to patches.

    Args:
        name: a key of `BLOCKS`.
        **options: of the block.

    Raises:
        ValueError: as `build_block`; and from the class, where the model asks for what no block has: norms of queries
            and keys or of outputs, a gate, dropout, or heads or outputs of another width.
    """
    check_block(name, options)

    class Attention(nn.Module):
        """Makes a `ViTMixer` from what timm gives to its attention."""

        def __new__(cls, dim: int, num_heads: int = 8, device: Any = None, dtype: Any = None, **asked: Any) -> Any:
            as_usual = {"dim_out": dim, "attn_head_dim": dim // num_heads}
            for option, value in asked.items():
                if value and option not in TAKEN and value != as_usual.get(option):
                    raise ValueError(f"{option}={value}: no block has it; valid: a model of timm without")
            of_model: dict[str, Any] = {}
            if name in WITH_HEADS:
                of_model = {"num_heads": num_heads, "bias": bool(asked.get("qkv_bias") or asked.get("proj_bias", True))}
            if name == "softmax_attention":
                of_model["rotary"] = False
            with torch.device(device or torch.get_default_device()):
                return ViTMixer(name, dim, **{**of_model, **options}).to(dtype)

    return Attention
