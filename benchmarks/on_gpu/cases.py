"""Calls of every operation with everything that shapes what its kernels do: widths, lengths, states, cuts of time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seqzoo import kernels
from seqzoo.kernels.measured import width_class

from .case import FLOATS, Case, Maker, Sizes, Tensors, ends, in_two_calls, spoilt

CAUSAL = {"causal": True, "both ways": False}
FULL = Sizes(widths=(16, 32, 64, 128, 256), short=300, long=1100, batch=32, steps=1024, heads=2)
TINY = Sizes(widths=(16,), short=24, long=40, batch=2, steps=24, heads=1, extras=False)


def every(sizes: Sizes) -> list[Case]:
    """Riskiest first, and within that in the order of this file."""
    rooms = (
        attention, linear_attention, delta_rule, favor_attention, vq_attention, nearest_code, gated_attention,
        diagonal_scan,
    )  # fmt: skip
    cases = [case for room in rooms for case in room(sizes)]
    return sorted(cases, key=lambda case: case.risk)


def attention(sizes: Sizes) -> Iterator[Case]:
    def make(D: int, B: int, T: int, S: int, H: int, G: int, m: Maker) -> Tensors:
        return {"q": m.normal(B, T, H, D), "k": m.normal(B, S, G, D), "v": m.normal(B, S, G, D)}

    def call(x: Tensors, backend: str, more: Callable[[Tensors, str], dict[str, Any]], causal: bool) -> Tensors:
        options = {"causal": causal, "backend": backend, **more(x, backend)}
        return {"o": kernels.attention(x["q"], x["k"], x["v"], **options)}

    def case(
        label: str, D: int, shape: tuple[int, ...], more: Any, causal: bool, stop: tuple[int, ...] | None = None,
        **fields: Any,
    ) -> Case:  # fmt: skip
        def making(m: Maker) -> Tensors:
            x = make(D, *shape, m)
            return spoilt(x, x, *stop) if stop else x

        return Case(
            "attention", label, width_class(D), making, partial(call, more=more, causal=causal),
            terms=shape[2], linear=("v",), risk=0 if D <= 32 else 1 if D == 64 else 3, **fields,
        )  # fmt: skip

    T, long = sizes.short, sizes.long
    S = T * 2 // 3
    for D in sizes.widths:
        for way, causal in CAUSAL.items():
            more = lambda x, form: {"lengths": ends(x["q"], T, S)}  # noqa: E731
            yield case(f"D={D} {way}", D, (2, T, T, 4, 2), more, causal)
            yield case(f"D={D} {way}, odd lengths", D, (2, T, T, 2, 2), odd_lengths(T, S), causal, (T, S))
        by_query = lambda x, form: {"scale": torch.linspace(0.1, 0.5, x["q"].shape[1], device=x["q"].device)}  # noqa: E731
        yield case(f"D={D} a scale for each query", D, (2, T, T, 4, 2), by_query, True)
        new = T // 4
        late = lambda x, form, new=new: {"position": ends(x["q"], T - new, T // 3)}  # noqa: E731
        yield case(f"D={D} new queries of old keys", D, (2, new, T, 4, 2), late, True)
        yield case(f"D={D} of another sequence", D, (2, new, T, 4, 2), of_another(T, S, new), False)
    if sizes.extras:
        B, steps = sizes.batch, sizes.steps
        for D in (32, 64):
            for way, causal in CAUSAL.items():
                shape, label = (B, steps, steps, 8, 8), f"D={D} {way} B={B} T={steps} H=8"
                yield case(label, D, shape, lambda x, form: {}, causal, exact="chunked", only=(0, B - 1))
        yield case(f"D=64 T={long}", 64, (1, long, long, 2, 2), lambda x, form: {}, True)


def of_another(T: int, S: int, new: int) -> Callable[[Tensors, str], dict[str, Any]]:
    return lambda x, form: {"lengths": ends(x["q"], T, S), "query_lengths": ends(x["q"], new, 1)}


def odd_lengths(T: int, S: int) -> Callable[[Tensors, str], dict[str, Any]]:
    """NaN past them, which nothing may read, let alone give on."""

    def more(x: Tensors, form: str) -> dict[str, Any]:
        return {"lengths": ends(next(iter(x.values())), T, S, form=form, most=T)}

    return more


def linear_attention(sizes: Sizes) -> Iterator[Case]:
    def make(D: int, Dv: int, B: int, T: int, H: int, decay: str, m: Maker) -> Tensors:
        q, k, v = m.normal(B, T, H, D), m.normal(B, T, H, D), m.normal(B, T, H, Dv)
        g = {"none": None, "head": (H,), "step": (B, T, H), "channel": (B, T, H, D)}[decay]
        x = {"q": (q / D**0.5).sigmoid(), "k": k.sigmoid(), "v": v}
        return x if g is None else {**x, "log_decay": -0.1 * m.uniform(*g)}

    def call(x: Tensors, backend: str, causal: bool, stop: tuple[int, ...] | None, odd: bool, cut: int) -> Tensors:
        T = x["q"].shape[1]
        options: dict[str, Any] = {"causal": causal, "normalize": "log_decay" not in x, "backend": backend}
        if cut:
            steps = [name for name, y in x.items() if y.dim() > 1]
            return in_two_calls(kernels.linear_attention, x, steps, cut, **options)
        if stop:
            options["lengths"] = ends(x["q"], *stop, form=backend, most=T if odd else 0)
        return {"o": kernels.linear_attention(**x, **options)}

    def case(
        label: str, D: int, shape: tuple[int, ...], decay: str = "none", causal: bool = True, Dv: int = 0,
        stop: tuple[int, ...] | None = None, odd: bool = False, cut: int = 0, **fields: Any,
    ) -> Case:  # fmt: skip
        def making(m: Maker) -> Tensors:
            x = make(D, Dv or D, *shape, decay, m)
            return spoilt(x, [name for name, y in x.items() if y.dim() > 1], *stop) if odd and stop else x

        return Case(
            "linear_attention", label, width_class(max(D, Dv)), making,
            partial(call, causal=causal, stop=stop, odd=odd, cut=cut),
            terms=shape[1], linear=("v",),
            **{"risk": 0 if D <= 32 else 2, "exact": "reference" if D <= 64 else "chunked", **fields},
        )  # fmt: skip

    T, long, B = sizes.short, sizes.long, sizes.batch
    stop = (T, T * 2 // 3)
    for D in sizes.widths:
        for decay, causal in (("none", True), ("none", False), ("head", True), ("step", True), ("channel", True)):
            if decay == "step" and D > 128:  # none takes them
                continue
            way = "causal" if causal else "both ways"
            yield case(f"D={D} decay={decay} {way}", D, (2, T, 3), decay, causal, stop=stop)
            yield case(f"D={D} decay={decay} {way}, odd lengths", D, (2, T, 3), decay, causal, stop=stop, odd=True)
            if causal:
                yield case(f"D={D} decay={decay} in two calls", D, (2, T, 3), decay, cut=T // 3)
    for decay in ("none", "head", "step", "channel"):
        yield case(f"D=16 decay={decay} T={long}", 16, (1, long, 2), decay)
    if sizes.extras:
        for decay in ("none", "head", "step", "channel"):
            yield case(f"D=64 decay={decay} T={long}", 64, (1, long, 2), decay)
            yield case(f"D=64 decay={decay} T={long} in two calls", 64, (1, long, 2), decay, cut=long // 2 + 5)
        yield case(f"D=64 both ways T={long}", 64, (1, long, 2), causal=False)
        for D, Dv in ((16, 256), (16, 64), (128, 32)):
            yield case(f"D={D} Dv={Dv} decay=head", D, (2, T, 3), "head", Dv=Dv, risk=3)
        for D in (32, 64):
            for way, causal in CAUSAL.items():
                label, few = f"D={D} {way} B={B} T={sizes.steps} H=8", {"exact": "chunked", "only": (0, B - 1)}
                yield case(label, D, (B, sizes.steps, 8), causal=causal, **few)


def delta_rule(sizes: Sizes) -> Iterator[Case]:
    """Keys of length 1; "alike", such that each step takes away most of what the last one wrote."""

    def make(
        D: int, Dv: int, G: int, B: int, T: int, H: int, decay: str, erase: bool, spread: float, m: Maker
    ) -> Tensors:
        q, k, v, beta = (
            m.normal(B, T, G, D),
            m.normal(B, T, G, D).float(),
            m.normal(B, T, H, Dv),
            2 * m.uniform(B, T, H),
        )
        k = F.normalize(k if spread == 1 else k[:, :1] + spread * k, dim=-1).to(m.dtype)
        x = {"q": q / D**0.5, "k": k, "v": v, "beta": beta}
        if decay != "none":
            x["log_decay"] = -0.1 * m.uniform(B, T, H, *([D] if decay == "channel" else []))
        return {**x, "erase": F.normalize(m.normal(B, T, H, D), dim=-1)} if erase else x

    def call(x: Tensors, backend: str, stop: tuple[int, ...] | None, odd: bool, cut: int) -> Tensors:
        T = x["q"].shape[1]
        options: dict[str, Any] = {"backend": backend}
        if cut:
            return in_two_calls(kernels.delta_rule, x, [*x], cut, **options)
        if stop:
            options["lengths"] = ends(x["q"], *stop, form=backend, most=T if odd else 0)
        return {"o": kernels.delta_rule(**x, **options)}

    def case(
        label: str, D: int, shape: tuple[int, ...], decay: str = "none", erase: bool = False, Dv: int = 0, G: int = 0,
        spread: float = 1, stop: tuple[int, ...] | None = None, odd: bool = False, cut: int = 0, **fields: Any,
    ) -> Case:  # fmt: skip
        def making(m: Maker) -> Tensors:
            x = make(D, Dv or D, G or shape[2], *shape, decay, erase, spread, m)
            return spoilt(x, [*x], *stop) if odd and stop else x

        return Case(
            "delta_rule", label, width_class(max(D, Dv)), making, partial(call, stop=stop, odd=odd, cut=cut),
            terms=shape[1], linear=("v",),
            **{"risk": 0 if D <= 32 else 2, "exact": "reference" if D <= 64 else "chunked", **fields},
        )  # fmt: skip

    T, B = sizes.short, sizes.batch
    stop = (T, T * 2 // 3)
    for D in sizes.widths[:4]:
        for decay, erase in (("none", False), ("head", True), ("channel", False)):
            yield case(f"D={D} decay={decay}", D, (2, T, 4), decay, erase, G=2, stop=stop)
            yield case(f"D={D} decay={decay}, odd lengths", D, (2, T, 2), decay, not erase, stop=stop, odd=True)
            yield case(f"D={D} decay={decay} in two calls", D, (2, T, 2), decay, erase, cut=T // 3)
    for decay in ("none", "head", "channel"):
        yield case(f"D=16 decay={decay}, keys alike", 16, (1, T, 2), decay, spread=0.3)
    if sizes.extras:
        for D, Dv in ((16, 128), (128, 16)):
            yield case(f"D={D} Dv={Dv} decay=head", D, (2, T, 3), "head", Dv=Dv, risk=3)
        for D in (32, 64):
            for decay in ("head", "channel"):
                label, few = f"D={D} decay={decay} B={B} T={sizes.steps} H=8", {"exact": "chunked", "only": (0, B - 1)}
                yield case(label, D, (B, sizes.steps, 8), decay, **few)


def favor_attention(sizes: Sizes) -> Iterator[Case]:
    """Steep: keys so long that their features outgrow those of the keys before, whose pairs are made one by one."""

    def make(D: int, M: int, B: int, T: int, H: int, size: float, m: Maker) -> Tensors:
        q, k, v = (m.normal(B, T, H, D) for _ in range(3))
        return {"q": q * D**-0.25, "k": k * (size * D**-0.5), "v": v, "projection": directions(H, M, D, m)}

    def call(x: Tensors, backend: str, causal: bool, stop: tuple[int, ...] | None, odd: bool, cut: int) -> Tensors:
        options: dict[str, Any] = {"causal": causal, "backend": backend}
        if cut:
            return in_two_calls(kernels.favor_attention, x, ("q", "k", "v"), cut, **options)
        if stop:
            options["lengths"] = ends(x["q"], *stop, form=backend, most=x["q"].shape[1] if odd else 0)
        return {"o": kernels.favor_attention(**x, **options)}

    def case(
        label: str, D: int, M: int, shape: tuple[int, ...], causal: bool = True, size: float = 1,
        stop: tuple[int, ...] | None = None, odd: bool = False, cut: int = 0, **fields: Any,
    ) -> Case:  # fmt: skip
        def making(m: Maker) -> Tensors:
            x = make(D, M, *shape, size, m)
            return spoilt(x, ("q", "k", "v"), *stop) if odd and stop else x

        return Case(
            "favor_attention", label, width_class(D), making,
            partial(call, causal=causal, stop=stop, odd=odd, cut=cut),
            terms=max(shape[1], M), linear=("v",), constant=("projection",), **{"risk": 0 if D <= 32 else 2, **fields},
        )  # fmt: skip

    T, long, B, H = sizes.short, sizes.long, sizes.batch, sizes.heads
    stop = (T, T * 2 // 3)
    for D in sizes.widths[:4]:
        M = 12 * H if D <= 32 else 100
        for label, causal, size in (("causal", True, 1), ("both ways", False, 1), ("causal, steep", True, 8)):
            yield case(f"D={D} M={M} {label}", D, M, (2, T, H), causal, size, stop)
        for way, causal in CAUSAL.items():
            yield case(f"D={D} M={M} {way}, odd lengths", D, M, (2, T, H), causal, 1, stop, odd=True)
        yield case(f"D={D} M={M} in two calls", D, M, (2, T, H), cut=T // 3)
    yield case(f"D=16 M={12 * H} T={long}", 16, 12 * H, (1, long, H), exact="chunked")
    if sizes.extras:
        yield case(f"D=16 M=24 T={long} steep", 16, 24, (1, long, H), size=8, exact="chunked")
        yield case(f"D=64 M=266 T={long} in two calls", 64, 266, (1, long, H), cut=long // 2 + 5, exact="chunked")
        for D in (32, 64):
            for way, causal in CAUSAL.items():
                label, few = f"D={D} M={4 * D} {way} B={B} T={sizes.steps} H=8", {"exact": "chunked"}
                yield case(label, D, 4 * D, (B, sizes.steps, 8), causal, only=(0, B - 1), **few)


def directions(H: int, M: int, D: int, m: Maker) -> Tensor:
    """Numbers that every dtype has."""
    return torch.randn(H, M, D, generator=torch.Generator().manual_seed(1)).bfloat16().to(m.device, m.dtype)


def vq_attention(sizes: Sizes) -> Iterator[Case]:
    def make(D: int, Dv: int, S: int, B: int, T: int, H: int, n: int, m: Maker) -> Tensors:
        x = {"q": m.normal(B, T, H, D) / D**0.5, "k": m.normal(B, T, H, D), "v": m.normal(B, T, H, Dv)}
        codes = torch.randint(S, (B, T, H), generator=torch.Generator().manual_seed(0)).to(m.device)
        bias = {"bias": m.normal(B, T, H, n)} if n else {}
        return {**x, **bias, "codebook": directions(H, S, D, m), "codes": codes}

    def call(
        x: Tensors, backend: str, causal: bool, L: int, stop: tuple[int, ...] | None, odd: bool, cut: int
    ) -> Tensors:
        options: dict[str, Any] = {"causal": causal, "block_len": L, "backend": backend}
        if cut:
            return in_two_calls(kernels.vq_attention, x, [name for name in x if name != "codebook"], cut, **options)
        if stop:
            options["lengths"] = ends(x["q"], *stop, form=backend, most=x["q"].shape[1] if odd else 0)
        return {"o": kernels.vq_attention(**x, **options)}

    def case(
        label: str, D: int, Dv: int, S: int, L: int, shape: tuple[int, ...], causal: bool, bias: bool = True,
        stop: tuple[int, ...] | None = None, odd: bool = False, cut: int = 0, **fields: Any,
    ) -> Case:  # fmt: skip
        n = (L + 1 if causal else 2 * L + 1) if bias else 0

        def making(m: Maker) -> Tensors:
            x = make(D, Dv, S, *shape, n, m)
            return spoilt(x, ("q", "k", "v"), *stop) if odd and stop else x

        return Case(
            "vq_attention", label, width_class(max(D, Dv)), making,
            partial(call, causal=causal, L=L, stop=stop, odd=odd, cut=cut),
            terms=shape[1], linear=("v",), constant=("codebook",), **{"risk": 0 if not causal else 1, **fields},
        )  # fmt: skip

    T, long, B, H = sizes.short, sizes.long, sizes.batch, sizes.heads
    stop = (T, T * 2 // 3)
    known = ((16, 16, 40, 33), (16, 32, 40, 33), (32, 32, 64, 64), (64, 64, 128, 64), (128, 256, 128, 64))
    for D, Dv, S, L in (*known, (128, 128, 128, 64), (256, 512, 64, 128)) if sizes.extras else ((16, 16, 20, 9),):
        for way, causal in CAUSAL.items():
            label = f"D={D} Dv={Dv} S={S} L={L} {way}"
            yield case(label, D, Dv, S, L, (2, T, H), causal, stop=stop)
            yield case(f"{label}, odd lengths", D, Dv, S, L, (2, T, H), causal, stop=stop, odd=True)
        yield case(f"D={D} Dv={Dv} S={S} L={L} in two calls", D, Dv, S, L, (2, T, H), True, cut=T // 2 + 3)
    if sizes.extras:
        yield case(f"D=64 Dv=64 S=64 L=32 T={long} in two calls", 64, 64, 64, 32, (1, long, 1), True, cut=500)
        for way, causal in CAUSAL.items():
            label, few = f"D=128 Dv=256 S=128 L=64 {way} B={B} T={sizes.steps}", {"exact": "chunked"}
            shape, fields = (B, sizes.steps, 1), {"bias": False, "only": (0, B - 1), **few}
            yield case(label, 128, 256, 128, 64, shape, causal, **fields)


def nearest_code(sizes: Sizes) -> Iterator[Case]:
    """Judged by how far the chosen code lies from its key: of two that are as near, either is right."""

    def make(D: int, S: int, B: int, T: int, m: Maker) -> Tensors:
        return {"k": m.normal(B, T, 2, D), "codebook": m.normal(2, S, D)}

    def call(x: Tensors, backend: str) -> Tensors:
        T = x["k"].shape[1]
        lengths = ends(x["k"], *[T] * (x["k"].shape[0] - 1), T // 2, form=backend, most=T)
        codes = kernels.nearest_code(x["k"], x["codebook"], lengths=lengths, backend=backend)
        k, codebook = x["k"].double(), x["codebook"].double()
        chosen = codebook[torch.arange(codebook.shape[0], device=codes.device), codes]
        valid = torch.arange(T, device=codes.device) < lengths[:, None]
        return {"distance": torch.where(valid[..., None], (k - chosen).square().sum(-1).sqrt(), 0)}

    for D in sizes.widths:
        for S in (20, 512) if sizes.extras else (20,):
            yield Case(
                "nearest_code", f"D={D} S={S}", width_class(D), partial(make, D, S, 3, sizes.short), call, terms=D,
                linear=(), constant=("k", "codebook"), exact="chunked", roundings=0, risk=0 if D <= 32 else 1,
            )  # fmt: skip


def gated_attention(sizes: Sizes) -> Iterator[Case]:
    over_time = ("u", "q_quad", "k_quad", "q_lin", "k_lin", "v")

    def make(S: int, E: int, B: int, T: int, n: int, m: Maker) -> Tensors:
        widths = (E, S, S, S, S, E)
        x = {name: m.normal(B, T, width) for name, width in zip(over_time, widths, strict=True)}
        return {**x, "bias": m.normal(n)} if n else x

    def call(
        x: Tensors, backend: str, causal: bool, C: int, stop: tuple[int, ...] | None, odd: bool, cut: int
    ) -> Tensors:
        options: dict[str, Any] = {"causal": causal, "chunk_len": C, "backend": backend}
        if cut:  # inside a chunk
            return in_two_calls(kernels.gated_attention, x, over_time, cut, **options)
        if stop:
            options["lengths"] = ends(x["u"], *stop, form=backend, most=x["u"].shape[1] if odd else 0)
        return {"o": kernels.gated_attention(**x, **options)}

    def case(
        label: str, S: int, E: int, C: int, shape: tuple[int, ...], causal: bool = True, bias: bool = True,
        stop: tuple[int, ...] | None = None, odd: bool = False, cut: int = 0, **fields: Any,
    ) -> Case:  # fmt: skip
        n = (C if causal else 2 * C - 1) if bias else 0

        def making(m: Maker) -> Tensors:
            x = make(S, E, *shape, n, m)
            return spoilt(x, over_time, *stop) if odd and stop else x

        return Case(
            "gated_attention", label, width_class(S), making,
            partial(call, causal=causal, C=C, stop=stop, odd=odd, cut=cut),
            terms=shape[1], linear=("u", "v"), **{"risk": 0 if S <= 32 else 2, **fields},
        )  # fmt: skip

    T, C, B = (700, 200, sizes.batch) if sizes.extras else (sizes.short, 16, sizes.batch)
    stop = (T, T * 3 // 5)
    known = ((16, 40), (32, 64), (64, 128), (128, 512), (256, 320))
    for S, E in known if sizes.extras else known[:1]:
        for way, causal in CAUSAL.items():
            yield case(f"S={S} E={E} {way}", S, E, C, (2, T), causal, stop=stop)
            yield case(f"S={S} E={E} {way}, odd lengths", S, E, C, (2, T), causal, stop=stop, odd=True)
        yield case(f"S={S} E={E} in two calls", S, E, C, (2, T), cut=T * 3 // 7)
    if sizes.extras:
        for way, causal in CAUSAL.items():
            label, few = f"S=128 E=256 {way} B={B} T={sizes.steps}", {"exact": "chunked", "only": (0, B - 1)}
            yield case(label, 128, 256, 256, (B, sizes.steps), causal, bias=False, **few)


def diagonal_scan(sizes: Sizes) -> Iterator[Case]:
    def make(B: int, T: int, D: int, constant: bool, stop: tuple[int, ...] | None, more: bool, m: Maker) -> Tensors:
        a = m.normal(*((D,) if constant else (B, T, D)))
        x = {"x": m.normal(B, T, D), "a": a / (1 + a.abs())}
        if more:
            x["factor"] = 0.5 + m.uniform(D)
            x["initial_state"] = m.normal(B, D, dtype=torch.promote_types(m.dtype, torch.float32))
        return x if stop is None else spoilt(x, ("x",) if constant else ("x", "a"), *stop)

    def call(x: Tensors, backend: str, reverse: bool | str, stop: tuple[int, ...] | None) -> Tensors:
        options: dict[str, Any] = {"reverse": reverse, "backend": backend}
        if stop:
            options["lengths"] = ends(x["x"], *stop, form=backend, most=x["x"].shape[1])
        if "initial_state" in x:
            h, state = kernels.diagonal_scan(**x, output_final_state=True, **options)
            return {"h": h, "state": state}
        h = kernels.diagonal_scan(**x, **options)
        return {"up": h[0], "down": h[1]} if reverse == "both" else {"h": h}

    ways: dict[str, bool | str] = {"up": False, "down": True, "both ways": "both"}
    T, D = (700, 200) if sizes.extras else (sizes.short, 10)
    shapes = {f"T={T}": (3, T, D)}
    if sizes.extras:
        shapes |= {f"T={sizes.long} B=1": (1, sizes.long, 96), f"B={sizes.batch}": (sizes.batch, sizes.steps, 128)}
    for label, shape in shapes.items():
        for kind, constant in (("constant", True), ("varying", False)):
            for way, reverse in ways.items():
                for stop in (None, (T, 0, T * 3 // 5)) if shape[0] == 3 else (None,):
                    for more in (False, True) if reverse != "both" and stop is None else (False,):
                        extras = (", odd lengths" if stop else "") + (", states and factor" if more else "")
                        yield Case(
                            "diagonal_scan", f"{kind} {way} {label}{extras}", 0,
                            partial(make, *shape, constant, stop, more), partial(call, reverse=reverse, stop=stop),
                            terms=shape[1] * (shape[0] if constant else 1), linear=("x",),
                            dtypes=(torch.complex64, *FLOATS), exact="chunked" if shape[0] > 3 else "reference",
                            roundings=4,
                        )  # fmt: skip
