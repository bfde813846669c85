"""Sequence mixers behind one interface."""

from __future__ import annotations

from .base import Block, upgraded
from .build import build_block
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
from .registry import BLOCKS, block_name, check_block, register_block
from .retnet import RetNet
from .rg_lru import RGLRU
from .rwkv7 import RWKV7
from .s4d import S4D
from .s5 import S5
from .self_attention import AsSelfAttention
from .softmax_attention import SoftmaxAttention
from .states import State, state_of
from .vq_attention import VQAttention
from .wide import Wide

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
    "block_name",
    "build_block",
    "check_block",
    "register_block",
    "state_of",
    "upgraded",
]
