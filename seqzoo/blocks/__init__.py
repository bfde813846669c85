"""Sequence mixers behind one interface."""

from __future__ import annotations

import inspect
from typing import Any

from ..messages import unknown
from .base import Block, State, upgraded
from .gau import GAU
from .learning import after_step, attach, auxiliary_loss
from .linear_attention import LinearAttention
from .lru import LRU
from .performer import Performer
from .s4d import S4D
from .softmax_attention import SoftmaxAttention
from .vq_attention import VQAttention
from .wide import Wide

BLOCKS: dict[str, type[Block]] = {
    "softmax_attention": SoftmaxAttention,
    "linear_attention": LinearAttention,
    "performer": Performer,
    "vq_attention": VQAttention,
    "gau": GAU,
    "lru": LRU,
    "s4d": S4D,
}


def build_block(name: str, d_model: int, *, causal: bool = False, **options: Any) -> Block:
    """A block of `BLOCKS` by name.

    Args:
        name: a key of `BLOCKS`.
        d_model: width.
        causal: hide what comes later; only a causal block has a state.
        **options: the keyword arguments of the block's class.

    Raises:
        ValueError: an unknown name or option; the message names the valid ones.
    """
    if name not in BLOCKS:
        raise ValueError(unknown("block", name, BLOCKS))
    valid = [key for key in inspect.signature(BLOCKS[name]).parameters if key not in ("d_model", "causal")]
    for option in options:
        if option not in valid:
            raise ValueError(unknown(f"option of {name}", option, valid))
    return BLOCKS[name](d_model, causal=causal, **options)


__all__ = [
    "BLOCKS",
    "GAU",
    "LRU",
    "S4D",
    "Block",
    "LinearAttention",
    "Performer",
    "SoftmaxAttention",
    "State",
    "VQAttention",
    "Wide",
    "after_step",
    "attach",
    "auxiliary_loss",
    "build_block",
    "upgraded",
]
