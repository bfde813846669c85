"""What people install for the same operations, in its own words. What is not there is left out."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Call = Callable[..., Tensor]


def sdpa(backend: str, causal: bool) -> Call:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(getattr(SDPBackend, backend)):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)

    return call


def attention(causal: bool) -> Iterator[tuple[str, Call]]:
    if torch.cuda.is_available():
        yield "SDPA flash", sdpa("FLASH_ATTENTION", causal)
        yield "SDPA cuDNN", sdpa("CUDNN_ATTENTION", causal)
    yield from _where_installed(
        "flash-attn", "flash_attn", lambda module: lambda *qkv: module.flash_attn_func(*qkv, causal=causal)
    )


def linear_attention(causal: bool, decay: str) -> Iterator[tuple[str, Call]]:
    """`decay` is "none", or "channel"; of other decays there is none."""

    def plain(module: Any) -> Call:
        return lambda q, k, v: module.chunk_linear_attn(q, k, v, scale=1.0, normalize=False)[0]

    def gated(module: Any) -> Call:
        return lambda q, k, v, g: module.chunk_gla(q, k, v, g, scale=1.0)[0]

    if causal and torch.cuda.is_available():
        if decay == "none":
            yield from _where_installed("fla, not normalised", "fla.ops.linear_attn", plain)
        if decay == "channel":
            yield from _where_installed("fla, gated", "fla.ops.gla", gated)


def delta_rule(decay: str) -> Iterator[tuple[str, Call]]:
    """Their heads of queries and keys are as many as those of values, where `decay` is not "head"."""

    def shared(x: Tensor, v: Tensor) -> Tensor:
        return x.repeat_interleave(v.shape[2] // x.shape[2], 2)

    def plain(module: Any) -> Call:
        return lambda q, k, v, beta: module.chunk_delta_rule(shared(q, v), shared(k, v), v, beta, scale=1.0)[0]

    def gated(module: Any) -> Call:
        return lambda q, k, v, beta, g: module.chunk_gated_delta_rule(q, k, v, g, beta, scale=1.0)[0]

    def by_channel(module: Any) -> Call:
        return lambda q, k, v, beta, g: module.chunk_kda(shared(q, v), shared(k, v), v, g, beta, scale=1.0)[0]

    if torch.cuda.is_available():
        known = {"none": ("delta_rule", plain), "head": ("gated_delta_rule", gated), "channel": ("kda", by_channel)}
        module, call = known[decay]
        yield from _where_installed("fla", f"fla.ops.{module}", call)


def favor_attention(causal: bool, directions: Tensor) -> Iterator[tuple[str, Call]]:
    """It draws one set of directions for all heads; its causal form needs an extension that does not come with it."""

    def call(module: Any) -> Call:
        attend = module.FastAttention(directions.shape[2], directions.shape[1]).to(directions)
        return lambda *qkv: attend(*(x.transpose(1, 2) for x in qkv)).transpose(1, 2)

    if not causal:
        yield from _where_installed("performer-pytorch", "performer_pytorch", call)


def diagonal_scan() -> Iterator[tuple[str, Call]]:
    """Its layout is [B, D, T], its coefficients one for each step."""

    def call(module: Any) -> Call:
        def scan(x: Tensor, a: Tensor) -> Tensor:
            x = x.transpose(1, 2).contiguous()
            return module.scan(a[:, None].expand_as(x).contiguous(), x).transpose(1, 2)

        return scan

    if torch.cuda.is_available():
        yield from _where_installed("accelerated-scan", "accelerated_scan.complex", call)


def _where_installed(name: str, module: str, call: Callable[[Any], Call]) -> Iterator[tuple[str, Call]]:
    try:
        yield name, call(importlib.import_module(module))
    except Exception:  # some fail in other ways than ImportError where a compiler or a version does not suit them
        return
