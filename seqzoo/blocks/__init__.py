"""Sequence mixers behind one interface."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from ..messages import unknown
from ..valid import Range, check_options
from .base import Block, State, upgraded
from .conv import Conv
from .delta_net import DeltaNet
from .gated_delta_net import GatedDeltaNet
from .gau import GAU
from .gla import GLA
from .hgrn2 import HGRN2
from .kda import KDA
from .learning import after_step, attach, auxiliary_loss
from .linear_attention import LinearAttention
from .lru import LRU
from .mamba import Mamba
from .mamba2 import Mamba2
from .mamba3 import Mamba3
from .min_gru import MinGRU
from .mlstm import MLSTM
from .parts import Part
from .performer import Performer
from .retnet import RetNet
from .rg_lru import RGLRU
from .rwkv7 import RWKV7
from .s4d import S4D
from .s5 import S5
from .self_attention import AsSelfAttention
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
    "conv": Conv,
    "retnet": RetNet,
    "gla": GLA,
    "hgrn2": HGRN2,
    "mlstm": MLSTM,
    "mamba2": Mamba2,
    "mamba3": Mamba3,
    "delta_net": DeltaNet,
    "gated_delta_net": GatedDeltaNet,
    "kda": KDA,
    "rwkv7": RWKV7,
    "mamba": Mamba,
    "min_gru": MinGRU,
    "rg_lru": RGLRU,
    "s5": S5,
}

NUMBERS = {int: Range(0, 1 << 20), float: Range(0, 1_000_000)}  # of options that say nothing narrower


def build_block(name: str, d_model: int, *, causal: bool = False, **options: Any) -> Block:
    """A block of `BLOCKS` by name.

    Args:
        name: a key of `BLOCKS`.
        d_model: width.
        causal: hide what comes later; only a causal block has a state.
        **options: the keyword arguments of the block's class.

    Raises:
        ValueError: as `check_block` does, or options that do not go together; the message says what is valid.
    """
    check_block(name, options)
    return BLOCKS[name](d_model, causal=causal, **options)


def check_block(name: str, options: Mapping[str, Any]) -> None:
    """Raises ValueError where a block or one of its options does not exist, or is of the wrong type or out of range."""
    if name not in BLOCKS:
        raise ValueError(unknown("block", name, BLOCKS))
    valid = [key for key in inspect.signature(BLOCKS[name]).parameters if key not in ("d_model", "causal")]
    for option in options:
        if option not in valid:
            raise ValueError(unknown(f"option of {name}", option, valid))
    check_options(BLOCKS[name].__init__, options, default=NUMBERS)


__all__ = [
    "BLOCKS",
    "GAU",
    "GLA",
    "HGRN2",
    "KDA",
    "LRU",
    "MLSTM",
    "RGLRU",
    "RWKV7",
    "S4D",
    "S5",
    "AsSelfAttention",
    "Block",
    "Conv",
    "DeltaNet",
    "GatedDeltaNet",
    "LinearAttention",
    "Mamba",
    "Mamba2",
    "Mamba3",
    "MinGRU",
    "Part",
    "Performer",
    "RetNet",
    "SoftmaxAttention",
    "State",
    "VQAttention",
    "Wide",
    "after_step",
    "attach",
    "auxiliary_loss",
    "build_block",
    "check_block",
    "upgraded",
]
