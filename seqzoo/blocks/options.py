"""The options of every block, as a type checker and an editor read them: what `build_block` takes beside a name and a
width. The classes say what they mean; a test holds the two against each other."""

from __future__ import annotations

from typing import Literal, TypedDict

import torch


class Shared(TypedDict, total=False):
    causal: bool
    device: torch.device | str | None
    dtype: torch.dtype | None


class SoftmaxAttentionOptions(Shared, total=False):
    num_heads: int
    num_kv_heads: int | None
    rotary: bool
    entropy_length: int | None
    window: int | None
    bias: bool


class LinearAttentionOptions(Shared, total=False):
    num_heads: int
    feature_map: Literal["elu", "relu", "silu"]
    normalize: bool
    decay: bool
    rotary: bool
    bias: bool


class PerformerOptions(Shared, total=False):
    num_heads: int
    num_features: int | None
    redraw_every: int
    bias: bool


class VQAttentionOptions(Shared, total=False):
    num_heads: int
    expand: float
    codebook_size: int
    block_len: int
    quantizer: Literal["vq", "fsq"]
    ema: float
    commitment: float
    codebook_start: Literal["random", "kmeans"]
    restart: float
    exact_steps: int


class GAUOptions(Shared, total=False):
    attention: Literal["flash", "relu2_n2", "relu2_ns", "softmax"]
    expand: float
    key_dim: int
    chunk_len: int
    distance_bias: bool
    rotary: bool
    bias: bool


class LRUOptions(Shared, total=False):
    state_dim: int | None
    r_min: float
    r_max: float
    max_phase: float
    dropout: float


class S4DOptions(Shared, total=False):
    state_dim: int
    dt_min: float
    dt_max: float
    init: Literal["lin", "ft", "dfout"]
    frequency_scale: float
    dropout: float


class ConvOptions(Shared, total=False):
    width: int
    dropout: float


class RetNetOptions(Shared, total=False):
    num_heads: int
    expand: float


class GLAOptions(Shared, total=False):
    num_heads: int
    gate_rank: int
    gate_temperature: float
    gate_bias: float


class HGRN2Options(Shared, total=False):
    num_heads: int
    lower_bound: float
    gate_bias: float | None


class MLSTMOptions(Shared, total=False):
    num_heads: int
    expand: float
    conv_width: int
    projection_width: int


class Mamba2Options(Shared, total=False):
    num_heads: int
    state_dim: int
    num_groups: int
    expand: float
    conv_width: int
    dt_min: float
    dt_max: float


class Mamba3Options(Shared, total=False):
    num_heads: int
    state_dim: int
    num_groups: int
    expand: float
    dt_min: float
    dt_max: float


class DeltaNetOptions(Shared, total=False):
    num_heads: int
    conv_width: int
    negative_eigenvalues: bool


class GatedDeltaNetOptions(Shared, total=False):
    num_heads: int
    num_key_heads: int | None
    expand_k: float
    expand: float
    conv_width: int
    negative_eigenvalues: bool
    dt_min: float
    dt_max: float


class KDAOptions(Shared, total=False):
    num_heads: int
    conv_width: int
    negative_eigenvalues: bool
    dt_min: float
    dt_max: float


class RWKV7Options(Shared, total=False):
    num_heads: int
    depth: float


class MambaOptions(Shared, total=False):
    state_dim: int
    expand: float
    dt_rank: int | None
    conv_width: int
    dt_min: float
    dt_max: float


class MinGRUOptions(Shared, total=False):
    cell: Literal["gru", "lstm"]
    expand: float
    gate_bias: float | None


class RGLRUOptions(Shared, total=False):
    state_dim: int | None
    num_heads: int
    conv_width: int
    r_min: float
    r_max: float


class S5Options(Shared, total=False):
    state_dim: int | None
    num_blocks: int
    dt_min: float
    dt_max: float
    discretization: Literal["zoh", "bilinear"]
    dropout: float
