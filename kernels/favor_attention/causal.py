"""Causal FAVOR attention on a CPU, one chunk after the other with all heads at once, so that features stay in a cache.

In a chunk all features of keys are relative to one reference r, and the weights of a query to the largest product that
it would have with r. Usually r is what a feature had reached by the first key of this or an earlier chunk: all queries
have seen it, so that their weights sum to 1 or more, and no later key has a part in how they are rounded. Where a
feature rises above that by more than `RISE`, r is what it reaches by the chunk's end. What earlier queries see is the
smaller for it, which is usually nothing that matters. Should a query be left with less than the square root of the
smallest normal number, factors may have underflowed whose product counts, and the chunk is computed by halves.
"""

from __future__ import annotations

from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common import without_autocast
from ..derivatives import by_hand, gradient, pullback
from .features import exp_, on_cache_lines
from .halves import causal_by_halves
from .state import FavorState

CHUNK = 64  # or as long as values are wide, so that states take no more room than features
RISE = 16.0  # of logarithms: exp(RISE) is far from what a product of two such numbers must not reach


def eager(*tensors: Tensor) -> bool:
    """Whether what is computed may depend on values: on a CPU, outside of graphs, function transforms and tangents."""
    return by_hand() and all(type(x) is Tensor and x.device.type == "cpu" for x in tensors)


def causal_by_chunks(
    q: Tensor,  # [B, T, H, D]
    k: Tensor,  # [B, T, H, D]
    v: Tensor,  # [B, T, H, Dv]
    directions: Tensor,  # [H, D, M]
    first: FavorState,
    hidden: Tensor | None,  # [B, 1, T, 1], keys that are padding
    narrow: torch.dtype,
) -> tuple[Tensor, FavorState]:
    """As `causal_by_halves`, with features and their products in `narrow`, but for exponents and the state."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, directions, first.sums)):
        o, *state = _Causal.apply(q, k, v, directions, *first, hidden, narrow)
        return o, FavorState(*state)
    return _forward(q, k, v, directions, first, hidden, narrow)[:2]


class _Causal(torch.autograd.Function):
    """Written out because features are the widest tensors there are: autograd would pass over them more often."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        directions: Tensor,
        sums: Tensor,
        log_scale: Tensor,
        hidden: Tensor | None,
        narrow: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:
        kept: list[_Plain | _Careful] = []
        o, state, scale = _forward(q, k, v, directions, FavorState(sums, log_scale), hidden, narrow, kept)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(state.log_scale)
        ctx.narrow, ctx.kinds = narrow, [type(chunk) for chunk in kept]
        ctx.save_for_backward(q, k, v, directions, sums, log_scale, hidden, scale, *chain.from_iterable(kept))
        return o, *state

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, d_sums: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        q, k, v, directions, sums, log_scale, hidden, scale, *tensors = ctx.saved_tensors
        parts = iter(tensors)
        kept = [kind(*(next(parts) for _ in kind._fields)) for kind in ctx.kinds]
        written = partial(
            _gradients, do, d_sums, q, k, v, directions, hidden, scale, kept, ctx.narrow, ctx.needs_input_grad[3]
        )
        form = partial(_by_halves, log_scale, hidden)
        return *gradient(written, form, (q, k, v, directions, sums), (do, d_sums)), None, None, None


class _Plain(NamedTuple):
    """Of a chunk of C steps, P features with those that are absent, and G = H B."""

    a: Tensor  # [G, C, P]
    b: Tensor  # [G, C, P]
    weights: Tensor  # [G, C, C]
    n: Tensor  # [G, C, 1], the sum of a query's weights
    o: Tensor  # [G, C, Dv]
    S: Tensor  # [G, P, Dv], the state before the chunk, relative to what b is relative to
    z: Tensor  # [G, 1, P], its normaliser
    fade: Tensor | None  # [G, 1, P], by what both were multiplied for that


class _Careful(NamedTuple):
    """Of a chunk that is computed by halves, the state before it."""

    sums: Tensor  # [B, H, M, Dv + 1]
    log_scale: Tensor  # [B, H, M]
    scale: Tensor  # [G, 1, P], by what S and z were multiplied for that


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    directions: Tensor,
    first: FavorState,
    hidden: Tensor | None,
    narrow: torch.dtype,
    kept: list[_Plain | _Careful] | None = None,
) -> tuple[Tensor, FavorState, Tensor]:
    (B, _, H, Dv), M, padded = v.shape, directions.shape[-1], on_cache_lines(directions)
    G, P, lowest, enough = B * H, padded.shape[-1], torch.finfo(q.dtype).min, torch.finfo(q.dtype).tiny ** 0.5
    absent = F.pad(q.new_zeros(M), (0, P - M), value=-torch.inf)
    o, (S, z, R) = v.new_empty(v.shape), _by_head(first, P)
    r = R  # what S and z are relative to
    for steps in _chunks(v):
        given, hidden_c = (q[:, steps], k[:, steps], v[:, steps]), None if hidden is None else hidden[:, :, steps]
        q_c, k_c, v_c = map(_heads_first, given)
        C, v_c, half = v_c.shape[2], v_c.flatten(0, 1), k_c.square().sum(-1, keepdim=True).div_(2)
        if hidden_c is not None:
            half.masked_fill_(hidden_c.transpose(0, 1), torch.inf)
        b = torch.bmm(k_c.flatten(1, 2), padded).view(G, C, P).sub_(half.view(G, C, 1))
        seen_by_all, top = torch.maximum(R, b[:, :1]), torch.maximum(R, b.amax(1, keepdim=True))
        r_c = seen_by_all if (seen_by_all - r > RISE / 2).any() else r
        r_c = torch.where(top - r_c <= RISE, r_c, top)
        least = r_c.clamp(min=lowest)  # no key at all has -inf, and relative to this still
        fade = None if steps.start and torch.equal(r_c, r) else exp_(r - least)
        S_0, z_0 = (S, z) if fade is None else (S * fade.mT, z * fade)
        b = exp_(b.sub_(least))
        a = torch.bmm(q_c.flatten(1, 2), padded).view(G, C, P).add_(least + absent).softmax(-1)
        a_n, b_n, S_n, v_n = (x.to(narrow) for x in (a, b, S_0, v_c))
        weights = torch.bmm(a_n, b_n.mT).tril_()
        n = weights.sum(-1, keepdim=True, dtype=a.dtype).baddbmm_(a, z_0.mT)
        if hidden_c is not None:
            n.view(H, B, C, 1).masked_fill_(hidden_c.transpose(0, 1), 1)  # nobody asks what padding sees
        if (n >= enough).all():
            o_c = torch.bmm(a_n, S_n).baddbmm_(weights, v_n) / n
            o[:, steps] = _steps_first(o_c.view(H, B, C, Dv))
            chunk: _Plain | _Careful = _Plain(a_n, b_n, weights, n, o_c, S_n, z_0, fade)
            S, z, R, r = torch.baddbmm(S_0, b.mT, v_c), z_0 + b.sum(1, keepdim=True), top, r_c
        else:
            scale = exp_(r - R.clamp(min=lowest))
            before = _state(S * scale.mT, z * scale, R, B, H, M)
            chunk = _Careful(*before, scale)
            o[:, steps], after = causal_by_halves(*given, directions, before, hidden_c)
            S, z, R = _by_head(after, P)
            r = R
        if kept is not None:
            kept.append(chunk)
    scale = exp_(r - R.clamp(min=lowest))
    return o, _state(S * scale.mT, z * scale, R, B, H, M), scale


def _gradients(
    do: Tensor | None,
    d_sums: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    directions: Tensor,
    hidden: Tensor | None,
    scale: Tensor,
    kept: list[_Plain | _Careful],
    narrow: torch.dtype,
    learnt: bool,
) -> tuple[Tensor | None, ...]:
    (B, _, H, _), M, padded = q.shape, directions.shape[-1], on_cache_lines(directions)
    P = padded.shape[-1]
    do = torch.zeros_like(v) if do is None else do
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    d_sums = v.new_zeros(B, H, M, v.shape[-1] + 1) if d_sums is None else d_sums
    dS, dz = _sums_by_head(d_sums, P)
    dS, dz = dS * scale.mT, dz * scale
    d_directions, back = torch.zeros_like(padded), padded.mT.to(narrow)
    with without_autocast(do.device):  # whatever `backward` is called under
        for steps, chunk in zip(reversed(_chunks(v)), reversed(kept), strict=True):
            if isinstance(chunk, _Careful):
                form = partial(_by_halves, chunk.log_scale, None if hidden is None else hidden[:, :, steps])
                inputs = (q[:, steps], k[:, steps], v[:, steps], directions, chunk.sums)
                found: tuple[Any, ...] = pullback(form, inputs, (do[:, steps], _sums(dS, dz, B, H, M)))
                dq[:, steps], dk[:, steps], dv[:, steps], d_directions_c, d_before = found
                d_directions[..., :M] += d_directions_c
                dS, dz = _sums_by_head(d_before, P)
                dS, dz = dS * chunk.scale.mT, dz * chunk.scale
                continue
            a, b, C = chunk.a, chunk.b, chunk.a.shape[1]
            q_c, k_c, v_c, do_c = (_heads_first(x[:, steps]) for x in (q, k, v, do))
            g = do_c.flatten(0, 1) / chunk.n
            gn = (g * chunk.o).sum(-1, keepdim=True).neg_()
            v_n, g, gn, z, dS_n, dz_n = (x.to(narrow) for x in (v_c.flatten(0, 1), g, gn, chunk.z, dS, dz))
            d_weights = torch.bmm(g, v_n.mT).add_(gn).tril_()
            da = torch.bmm(g, chunk.S.mT).baddbmm_(d_weights, b).addcmul_(gn, z).mul_(a)
            db = torch.bmm(d_weights.mT, a).baddbmm_(v_n, dS_n.mT).add_(dz_n).mul_(b)
            dv_c = torch.bmm(chunk.weights.mT, g).baddbmm_(b, dS_n)
            dS, dz = _plus(dS, a.mT, g), _plus(dz, gn.mT, a)
            if chunk.fade is not None:
                dS.mul_(chunk.fade.mT)
                dz.mul_(chunk.fade)
            d_half = db.sum(-1, dtype=k.dtype).view(H, B, C, 1)
            da, db = da.view(H, B * C, P), db.view(H, B * C, P)
            dq[:, steps] = _steps_first(torch.bmm(da, back).view_as(q_c))
            dk[:, steps] = _steps_first(torch.bmm(db, back).view_as(k_c) - k_c * d_half)
            dv[:, steps] = _steps_first(dv_c.view_as(do_c))
            if learnt:
                q_n, k_n = (x.flatten(1, 2).mT.to(narrow) for x in (q_c, k_c))
                d_directions = _plus(_plus(d_directions, q_n, da), k_n, db)
    return dq, dk, dv, d_directions[..., :M] if learnt else None, _sums(dS, dz, B, H, M)


def _plus(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """x + y z in place, in the precision of x."""
    return x.baddbmm_(y, z) if x.dtype == y.dtype else x.add_(torch.bmm(y, z))


def _by_halves(
    log_scale: Tensor, hidden: Tensor | None, q: Tensor, k: Tensor, v: Tensor, directions: Tensor, sums: Tensor
) -> tuple[Tensor, Tensor]:
    o, state = causal_by_halves(q, k, v, directions, FavorState(sums, log_scale), hidden)
    return o, state.sums


def _chunks(v: Tensor) -> list[slice]:
    C = max(CHUNK, v.shape[-1])
    return [slice(start, start + C) for start in range(0, v.shape[1], C)]


def _heads_first(x: Tensor) -> Tensor:
    """[B, C, H, D] -> [H, B, C, D]: sequences share the features of a head."""
    return x.permute(2, 0, 1, 3).contiguous()


def _steps_first(x: Tensor) -> Tensor:
    """[H, B, C, D] -> [B, C, H, D]."""
    return x.permute(1, 2, 0, 3)


def _by_head(state: FavorState, P: int) -> tuple[Tensor, Tensor, Tensor]:
    """S [G, P, Dv], z [G, 1, P] and R [G, 1, P]."""
    R = F.pad(state.log_scale.transpose(0, 1), (0, P - state.log_scale.shape[-1])).flatten(0, 1)[:, None]
    return *_sums_by_head(state.sums, P), R


def _sums_by_head(sums: Tensor, P: int) -> tuple[Tensor, Tensor]:
    padded = F.pad(sums.transpose(0, 1), (0, 0, 0, P - sums.shape[2])).flatten(0, 1)
    return padded[..., :-1].contiguous(), padded[..., -1:].mT.contiguous()


def _state(S: Tensor, z: Tensor, R: Tensor, B: int, H: int, M: int) -> FavorState:
    return FavorState(_sums(S, z, B, H, M), R[:, 0, :M].unflatten(0, (H, B)).transpose(0, 1))


def _sums(S: Tensor, z: Tensor, B: int, H: int, M: int) -> Tensor:
    """[B, H, M, Dv + 1]."""
    return torch.cat([S, z.mT], -1)[:, :M].unflatten(0, (H, B)).transpose(0, 1)
