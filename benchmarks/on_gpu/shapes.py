"""What is timed: operations at shapes of Long Range Arena, then at long ones, in our forms and other people's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seqzoo import kernels
from seqzoo.kernels.measured import width_class

from . import peers
from .case import Maker
from .cases import CAUSAL
from .checks import NARROW
from .peers import Call
from .tables import table

OURS = {"fused": "fused", "chunked": "chunked"}  # form, by the name of an alternative
FEW_WARPS = "fused, few warps"


@dataclass(frozen=True)
class Shape:
    operation: str
    label: str
    dtype: torch.dtype
    width: int
    lra: bool  # what "auto" is decided by
    make: Callable[[Maker], list[Tensor]]  # all of them get gradients
    call: Callable[[list[Tensor], str], Tensor]  # in one of our forms
    flops: float  # of forward alone, and bytes: each input read once, each output written once
    bytes: float
    others: Callable[[Maker], Iterator[tuple[str, Call]]] = lambda m: iter(())
    differentiable: bool = True

    def names(self, maker: Maker) -> list[str]:
        """Of the alternatives, ours first."""
        found = list(OURS)
        if 0 < self.width <= NARROW and any(key.few_warps for key in table(self.operation).rows):
            found.append(FEW_WARPS)
        return found + [name for name, _ in self.others(maker)]

    def alternative(self, name: str, maker: Maker) -> Call:
        if name in (*OURS, FEW_WARPS):
            return lambda *x: self.call(list(x), OURS.get(name, "fused"))
        return dict(self.others(maker))[name]


def every(rehearse: bool) -> list[Shape]:
    """What "auto" is decided by, the most common dtype and widths first; then long sequences."""
    rooms = (
        attention, linear_attention, delta_rule, favor_attention, vq_attention, gated_attention, diagonal_scan,
        nearest_code,
    )  # fmt: skip
    shapes = [(rank, shape) for room in rooms for rank, shape in room(rehearse)]
    return [shape for _, shape in sorted(shapes, key=lambda ranked: (not ranked[1].lra, ranked[0]))]


BF16 = torch.bfloat16
LRA = ((32, 1024, 8, 64), (32, 1024, 8, 32), (32, 4096, 4, 64))
LONG = ((2, 16384, 8, 64), (1, 65536, 8, 64))
OTHERS = (
    *((32, 1024, 4, D, BF16) for D in (128, 16)),
    *((32, 1024, 8, D, dtype) for D in (64, 32) for dtype in (torch.float16, torch.float32)),
    (32, 1024, 2, 256, BF16),
)
LINEAR = {  # by name, whether causal, and the decay
    "causal": (True, "none"), "both ways": (False, "none"), "causal, decays": (True, "head"),
    "causal, decays per channel": (True, "channel"),
}  # fmt: skip
Ranked = Iterator[tuple[int, Shape]]
Sized = tuple[int, int, int, int, int, torch.dtype]


def _heads(rehearse: bool) -> Iterator[Sized]:
    """Rank, B, T, H, D and dtype."""
    if rehearse:
        yield 0, 1, 16, 1, 16, BF16
        return
    for rank, shapes in ((0, LRA), (1, LONG)):
        for shape in shapes:
            yield rank, *shape, BF16
    for *shape, dtype in OTHERS:
        yield 2, *shape, dtype  # type: ignore[misc]


def _label(way: str, **sizes: int) -> str:
    return " ".join([*(f"{name}={size}" for name, size in sizes.items()), way])


def attention(rehearse: bool) -> Ranked:
    def call(x: list[Tensor], form: str, causal: bool) -> Tensor:
        return kernels.attention(*x, causal=causal, backend=form)

    for rank, B, T, H, D, dtype in _heads(rehearse):
        for way, causal in CAUSAL.items():
            yield rank, Shape(
                "attention", _label(way, B=B, T=T, H=H, D=D), dtype, width_class(D), rank != 1,
                lambda m, B=B, T=T, H=H, D=D: [m.normal(B, T, H, D) for _ in range(3)], partial(call, causal=causal),
                flops=4.0 * B * H * T * T * D / (2 if causal else 1), bytes=4.0 * dtype.itemsize * B * T * H * D,
                others=partial(_peers, peers.attention, rank, causal),
            )  # fmt: skip


def _peers(room: Any, rank: int, causal: bool, m: Maker) -> Iterator[tuple[str, Call]]:
    return room(causal) if rank < 2 else iter(())


def linear_attention(rehearse: bool) -> Ranked:
    def make(B: int, T: int, H: int, D: int, decay: str, m: Maker) -> list[Tensor]:
        q, k, v = (m.normal(B, T, H, D) for _ in range(3))
        g = [-0.1 * m.uniform(B, T, H, D)] if decay == "channel" else []
        return [(q / D**0.5).sigmoid(), k.sigmoid(), v, *g]

    def call(x: list[Tensor], form: str, causal: bool, decay: str) -> Tensor:
        q, k, v, *of_channels = x
        g = q.new_full((q.shape[2],), -0.01, dtype=torch.float32) if decay == "head" else next(iter(of_channels), None)
        return kernels.linear_attention(q, k, v, log_decay=g, causal=causal, normalize=decay == "none", backend=form)

    for rank, B, T, H, D, dtype in _heads(rehearse):
        if (dtype == torch.float32 and D > 64) or (dtype == torch.float16 and D > 128):
            continue
        for way, (causal, decay) in LINEAR.items():
            numbers = 4 * dtype.itemsize + (4 if decay == "channel" else 0)
            yield rank, Shape(
                "linear_attention", _label(way, B=B, T=T, H=H, D=D), dtype, width_class(D), rank != 1,
                partial(make, B, T, H, D, decay), partial(call, causal=causal, decay=decay),
                flops=4.0 * B * T * H * D * (D + (64 if causal else 0)), bytes=1.0 * numbers * B * T * H * D,
                others=partial(_peers, partial(peers.linear_attention, decay=decay), rank, causal),
            )  # fmt: skip


def delta_rule(rehearse: bool) -> Ranked:
    """The longest is Qwen3-Next's, with queries and keys shared by four heads of values."""

    def make(B: int, T: int, G: int, H: int, D: int, decay: str, m: Maker) -> list[Tensor]:
        q, k = (F.normalize(m.normal(B, T, G, D).float(), dim=-1).to(m.dtype) for _ in range(2))
        beta = m.uniform(B, T, H).to(m.dtype)
        g = [] if decay == "none" else [-0.1 * m.uniform(B, T, H, *([D] if decay == "channel" else []))]
        return [q, k, m.normal(B, T, H, D), beta, *g]

    def call(x: list[Tensor], form: str) -> Tensor:
        return kernels.delta_rule(*x[:4], log_decay=next(iter(x[4:]), None), backend=form)

    sized = [(rank, B, T, H, H, D, dtype) for rank, B, T, H, D, dtype in _heads(rehearse)]
    for rank, B, T, G, H, D, dtype in sized if rehearse else [*sized, (1, 1, 32768, 8, 32, 128, BF16)]:
        if (64 if dtype == torch.float32 else 128) < D:
            continue
        for decay in ("none", "head", "channel"):
            way = {"none": "no decay", "head": "decays", "channel": "decays per channel"}[decay]
            numbers = dtype.itemsize * (2 * G + 2 * H) * D + 4 * H * {"none": 0, "head": 1, "channel": D}[decay]
            yield rank, Shape(
                "delta_rule", _label(way, B=B, T=T, H=H, D=D) if G == H else _label(way, B=B, T=T, G=G, H=H, D=D),
                dtype, width_class(D), rank != 1, partial(make, B, T, G, H, D, decay), call,
                flops=2.0 * B * T * H * D * (7 * 32 + 3 * D), bytes=1.0 * numbers * B * T,
                others=lambda m, rank=rank, decay=decay: peers.delta_rule(decay) if rank < 2 else iter(()),
            )  # fmt: skip


def favor_attention(rehearse: bool) -> Ranked:
    def directions(H: int, M: int, D: int, m: Maker) -> Tensor:
        return torch.randn(H, M, D, generator=torch.Generator().manual_seed(1)).to(m.device, m.dtype)

    def make(B: int, T: int, H: int, D: int, m: Maker) -> list[Tensor]:
        q, k, v = (m.normal(B, T, H, D) for _ in range(3))
        return [q * D**-0.25, k * D**-0.25, v]

    def call(x: list[Tensor], form: str, causal: bool, M: int) -> Tensor:
        H, D = x[0].shape[2:]
        maker = Maker(x[0].dtype, x[0].device)
        W = _kept(("directions", H, M, D, maker), lambda: directions(H, M, D, maker))
        return kernels.favor_attention(*x, W, causal=causal, backend=form)

    def others(rank: int, causal: bool, H: int, M: int, D: int, m: Maker) -> Iterator[tuple[str, Call]]:
        return peers.favor_attention(causal, directions(H, M, D, m)) if rank < 2 else iter(())

    for rank, B, T, H, D, dtype in _heads(rehearse):
        if (64 if dtype == torch.float32 else 128) < D:
            continue
        M = int(D * math.log(D))
        for way, causal in CAUSAL.items():
            yield rank, Shape(
                "favor_attention", _label(way, B=B, T=T, H=H, D=D, M=M), dtype, width_class(D), rank != 1,
                partial(make, B, T, H, D), partial(call, causal=causal, M=M),
                flops=8.0 * B * T * H * D * M, bytes=4.0 * dtype.itemsize * B * T * H * D,
                others=partial(others, rank, causal, H, M, D),
            )  # fmt: skip


def vq_attention(rehearse: bool) -> Ranked:
    """Beside attention over all keys, where values are as wide as keys."""

    def call(x: list[Tensor], form: str, causal: bool, S: int, L: int) -> Tensor:
        q, k, v = x
        draw = torch.Generator().manual_seed(1)
        (B, T, H, D), device = q.shape, q.device
        codebook = _kept(("codebook", H, S, D, q.dtype), lambda: torch.randn(H, S, D, generator=draw).to(q))
        codes = _kept(("codes", B, T, H, S), lambda: torch.randint(S, (B, T, H), generator=draw).to(device))
        options = {"block_len": L, "codes": codes, "causal": causal, "backend": form}
        return kernels.vq_attention(q / D**0.5, k, v, codebook, **options)

    sizes: list[tuple[int, int, int, int, int, int, int, int, torch.dtype]] = [
        (0, 32, 1024, 1, 128, 256, 128, 64, BF16), (0, 32, 1024, 1, 128, 128, 128, 64, BF16),
        (0, 32, 4096, 1, 128, 256, 128, 64, BF16), (1, 4, 16384, 1, 128, 128, 512, 512, BF16),
        (1, 1, 65536, 1, 128, 128, 512, 512, BF16), (2, 32, 1024, 4, 64, 64, 128, 64, BF16),
        (2, 32, 1024, 4, 32, 32, 128, 64, BF16), (2, 32, 1024, 4, 16, 16, 128, 64, BF16),
        (2, 32, 1024, 1, 128, 256, 128, 64, torch.float16), (2, 32, 1024, 1, 128, 256, 128, 64, torch.float32),
    ]  # fmt: skip
    for rank, B, T, H, D, Dv, S, L, dtype in [(0, 1, 16, 1, 16, 16, 8, 8, BF16)] if rehearse else sizes:
        for way, causal in CAUSAL.items():
            yield rank, Shape(
                "vq_attention", _label(way, B=B, T=T, H=H, D=D, Dv=Dv, S=S, L=L), dtype, width_class(Dv), rank != 1,
                lambda m, B=B, T=T, H=H, D=D, Dv=Dv: [m.normal(B, T, H, n) for n in (D, D, Dv)],
                partial(call, causal=causal, S=S, L=L),
                flops=2.0 * B * T * H * (D + Dv) * (S + (1.5 if causal else 3) * L),
                bytes=2.0 * dtype.itemsize * B * T * H * (D + Dv),
                others=partial(_peers, peers.attention, rank if Dv == D else 2, causal),
            )  # fmt: skip


def gated_attention(rehearse: bool) -> Ranked:
    def call(x: list[Tensor], form: str, causal: bool, C: int) -> Tensor:
        return kernels.gated_attention(*x[:6], bias=x[6], chunk_len=C, causal=causal, backend=form)

    def make(B: int, T: int, S: int, E: int, n: int, m: Maker) -> list[Tensor]:
        inputs = [m.normal(B, T, width) for width in (E, S, S, S, S, E)]
        return [*inputs, m.normal(n, dtype=torch.float32)]

    sizes: list[tuple[int, int, int, int, int, int, torch.dtype]] = [
        (0, 32, 1024, 128, 256, 256, BF16), (0, 32, 4096, 128, 256, 256, BF16), (0, 8, 4096, 128, 1024, 256, BF16),
        (1, 2, 16384, 128, 1024, 256, BF16), (1, 1, 65536, 128, 1024, 256, BF16),
        *((2, 32, 1024, S, 256, 256, BF16) for S in (64, 32, 16, 256)),
        *((2, 32, 1024, 128, 256, 256, dtype) for dtype in (torch.float16, torch.float32)),
    ]  # fmt: skip
    for rank, B, T, S, E, C, dtype in [(0, 1, 16, 16, 16, 16, BF16)] if rehearse else sizes:
        for way, causal in CAUSAL.items():
            yield rank, Shape(
                "gated_attention", _label(way, B=B, T=T, S=S, E=E, C=C), dtype, width_class(S), rank != 1,
                partial(make, B, T, S, E, C if causal else 2 * C - 1), partial(call, causal=causal, C=C),
                flops=B * T * ((1.0 if causal else 2.0) * C * (S + E) + 4.0 * S * E),
                bytes=1.0 * dtype.itemsize * B * T * (4 * S + 3 * E),
            )  # fmt: skip


def diagonal_scan(rehearse: bool) -> Ranked:
    def make(B: int, T: int, D: int, m: Maker) -> list[Tensor]:
        a = m.normal(D)
        return [m.normal(B, T, D), a / (1 + a.abs())]

    def call(x: list[Tensor], form: str, reverse: bool | str) -> Tensor:
        h = kernels.diagonal_scan(*x, reverse=reverse, backend=form)
        return h[0] + h[1] if reverse == "both" else h

    C64 = torch.complex64
    sizes: list[tuple[int, int, int, int, torch.dtype]] = [
        (0, 32, 1024, 512, C64), (0, 64, 1024, 256, C64), (0, 32, 4096, 256, C64), (1, 8, 16384, 1024, C64),
        (1, 1, 65536, 1024, C64), *((2, 32, 1024, 512, dtype) for dtype in (torch.float32, BF16, torch.float16)),
    ]  # fmt: skip
    for rank, B, T, D, dtype in [(0, 1, 16, 8, C64)] if rehearse else sizes:
        for way, reverse in (("up", False), ("both ways", "both")):
            yield rank, Shape(
                "diagonal_scan", _label(way, B=B, T=T, D=D), dtype, 0, rank != 1,
                partial(make, B, T, D), partial(call, reverse=reverse),
                flops=(8.0 if dtype.is_complex else 2.0) * B * T * D * (2 if reverse else 1),
                bytes=(3.0 if reverse else 2.0) * dtype.itemsize * B * T * D,
                others=lambda m, up=not reverse and rank < 2: peers.diagonal_scan() if up else iter(()),
            )  # fmt: skip


def nearest_code(rehearse: bool) -> Ranked:
    def call(x: list[Tensor], form: str) -> Tensor:
        return kernels.nearest_code(*x, backend=form)

    sizes: list[tuple[int, int, int, int, int, int, torch.dtype]] = [
        *((0, 32, 1024, 1, 128, S, torch.float32) for S in (128, 512)),
        *((2, 32, 1024, 1, 128, 512, dtype) for dtype in (BF16, torch.float16)),
        *((2, 32, 1024, 4, D, 512, dtype) for D in (64, 32) for dtype in (BF16, torch.float32)),
    ]
    for rank, B, T, H, D, S, dtype in [(0, 1, 16, 1, 16, 8, BF16)] if rehearse else sizes:
        yield rank, Shape(
            "nearest_code", _label("", B=B, T=T, H=H, D=D, S=S).strip(), dtype, width_class(D), rank != 1,
            lambda m, B=B, T=T, H=H, D=D, S=S: [m.normal(B, T, H, D), m.normal(H, S, D)], call,
            flops=2.0 * B * T * H * D * S, bytes=1.0 * dtype.itemsize * B * T * H * D, differentiable=False,
        )  # fmt: skip


_KEPT: dict[tuple[Any, ...], Tensor] = {}


def _kept(key: tuple[Any, ...], make: Callable[[], Tensor]) -> Tensor:
    """Made in the first call: drawing is no part of what is timed, and cannot be captured in a graph."""
    if key not in _KEPT:
        _KEPT[key] = make()
    return _KEPT[key]
