"""A block by its name."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, Literal, Unpack, overload

import torch

from ..valid import Width, check_options
from .base import Block
from .conv import Conv
from .delta_net import DeltaNet
from .gated_delta_net import GatedDeltaNet
from .gau import GAU
from .gla import GLA
from .hgrn2 import HGRN2
from .kda import KDA
from .linear_attention import LinearAttention
from .lru import LRU
from .mamba import Mamba
from .mamba2 import Mamba2
from .mamba3 import Mamba3
from .min_gru import MinGRU
from .mlstm import MLSTM
from .options import (
    ConvOptions,
    DeltaNetOptions,
    GatedDeltaNetOptions,
    GAUOptions,
    GLAOptions,
    HGRN2Options,
    KDAOptions,
    LinearAttentionOptions,
    LRUOptions,
    Mamba2Options,
    Mamba3Options,
    MambaOptions,
    MinGRUOptions,
    MLSTMOptions,
    PerformerOptions,
    RetNetOptions,
    RGLRUOptions,
    RWKV7Options,
    S4DOptions,
    S5Options,
    SoftmaxAttentionOptions,
    VQAttentionOptions,
)
from .performer import Performer
from .registry import BLOCKS, NUMBERS, check_block
from .retnet import RetNet
from .rg_lru import RGLRU
from .rwkv7 import RWKV7
from .s4d import S4D
from .s5 import S5
from .softmax_attention import SoftmaxAttention
from .vq_attention import VQAttention


@overload
def build_block(
    name: Literal["softmax_attention"], d_model: int, **options: Unpack[SoftmaxAttentionOptions]
) -> SoftmaxAttention: ...
@overload
def build_block(
    name: Literal["linear_attention"], d_model: int, **options: Unpack[LinearAttentionOptions]
) -> LinearAttention: ...
@overload
def build_block(name: Literal["performer"], d_model: int, **options: Unpack[PerformerOptions]) -> Performer: ...
@overload
def build_block(name: Literal["vq_attention"], d_model: int, **options: Unpack[VQAttentionOptions]) -> VQAttention: ...
@overload
def build_block(name: Literal["gau"], d_model: int, **options: Unpack[GAUOptions]) -> GAU: ...
@overload
def build_block(name: Literal["lru"], d_model: int, **options: Unpack[LRUOptions]) -> LRU: ...
@overload
def build_block(name: Literal["s4d"], d_model: int, **options: Unpack[S4DOptions]) -> S4D: ...
@overload
def build_block(name: Literal["conv"], d_model: int, **options: Unpack[ConvOptions]) -> Conv: ...
@overload
def build_block(name: Literal["retnet"], d_model: int, **options: Unpack[RetNetOptions]) -> RetNet: ...
@overload
def build_block(name: Literal["gla"], d_model: int, **options: Unpack[GLAOptions]) -> GLA: ...
@overload
def build_block(name: Literal["hgrn2"], d_model: int, **options: Unpack[HGRN2Options]) -> HGRN2: ...
@overload
def build_block(name: Literal["mlstm"], d_model: int, **options: Unpack[MLSTMOptions]) -> MLSTM: ...
@overload
def build_block(name: Literal["mamba2"], d_model: int, **options: Unpack[Mamba2Options]) -> Mamba2: ...
@overload
def build_block(name: Literal["mamba3"], d_model: int, **options: Unpack[Mamba3Options]) -> Mamba3: ...
@overload
def build_block(name: Literal["delta_net"], d_model: int, **options: Unpack[DeltaNetOptions]) -> DeltaNet: ...
@overload
def build_block(
    name: Literal["gated_delta_net"], d_model: int, **options: Unpack[GatedDeltaNetOptions]
) -> GatedDeltaNet: ...
@overload
def build_block(name: Literal["kda"], d_model: int, **options: Unpack[KDAOptions]) -> KDA: ...
@overload
def build_block(name: Literal["rwkv7"], d_model: int, **options: Unpack[RWKV7Options]) -> RWKV7: ...
@overload
def build_block(name: Literal["mamba"], d_model: int, **options: Unpack[MambaOptions]) -> Mamba: ...
@overload
def build_block(name: Literal["min_gru"], d_model: int, **options: Unpack[MinGRUOptions]) -> MinGRU: ...
@overload
def build_block(name: Literal["rg_lru"], d_model: int, **options: Unpack[RGLRUOptions]) -> RGLRU: ...
@overload
def build_block(name: Literal["s5"], d_model: int, **options: Unpack[S5Options]) -> S5: ...
@overload
def build_block(
    name: str,
    d_model: int,
    *,
    causal: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Block: ...
def build_block(
    name: str,
    d_model: Width,
    *,
    causal: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> Block:
    """A block of `BLOCKS` by name.

    A type checker knows each block's class and options by its name, and without options takes any name.

    Args:
        name: a key of `BLOCKS`; `python -m seqzoo.blocks` lists them with their options.
        d_model: width.
        causal: hide what comes later; only a causal block has a state.
        device: where the block is made; PyTorch's default where it is None.
        dtype: of parameters, likewise. What sets a recurrence stays in single precision at least.
        **options: the keyword arguments of the block's class.

    Raises:
        ValueError: a width out of range, a direction that is neither True nor False, or as `check_block` does, or
            options that do not go together; the message says what is valid.
    """
    check_block(name, options)
    check_options(build_block, {"d_model": d_model, "causal": causal}, default=NUMBERS)
    with nullcontext() if device is None else torch.device(device):
        block = BLOCKS[name](d_model, causal=causal, **options)
    return block if dtype is None else block.to(dtype)
