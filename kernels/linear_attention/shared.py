"""Linear attention of heads that share queries and keys and have decays of their own, in PyTorch.

What all heads of a group share is made once: the products of queries and keys in a chunk, and their gradients. States
of the heads lie beside each other, so that what they take of keys, and what queries read of them, is one product of a
group. The gradient is written out: it keeps states where chunks begin, and neither outputs nor weights of pairs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common import accumulation_dtype, query_heads, without_autocast, zero_padding
from ..derivatives import gradient, transformed
from ..documents import Documents
from .carry import carried
from .chunked import MIN_CHUNK, linear_attention_chunked, segment_sums


def linear_attention_shared(
    q: Tensor,  # [B, T, G, Dk]
    k: Tensor,  # [B, T, G, Dk]
    v: Tensor,  # [B, T, H, Dv]
    log_decay: Tensor | None,  # [H], [B, T, H] or [B, T, H, Dk]
    causal: bool,
    normalize: bool,
    initial_state: Tensor | None,  # [B or N, H, Dk, Dv (+ 1)]
    lengths: Tensor | None,  # [B]
    documents: Documents | None,
    output_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    (B, T, _, Dk), (H, Dv) = q.shape, v.shape[2:]
    states = initial_state is not None or output_final_state
    channels = log_decay is not None and log_decay.dim() == 4
    if not (B and causal) or normalize or log_decay is None or channels or (documents is not None and states):
        q, k = query_heads(q, H), query_heads(k, H)
        return linear_attention_chunked(
            q, k, v, log_decay, causal, normalize, initial_state, lengths, documents, output_final_state
        )
    out_dtype, dtype = v.dtype, accumulation_dtype(v.dtype)
    log_decay = log_decay.expand(B, T, H)
    if documents is not None:
        log_decay = log_decay.masked_fill((documents.positions() == 0)[:, None], -torch.inf)
    # Autocast would keep the sums in half precision.
    with without_autocast(q.device):
        q, k, v, g = (zero_padding(x, lengths).to(dtype) for x in (q, k, v, log_decay))
        first = q.new_zeros(B, H, Dk, Dv) if initial_state is None else initial_state.to(dtype)
        o, final_state = (_plain if transformed() else _Shared.apply)(q, k, v, g, first)
    return zero_padding(o, lengths).to(out_dtype), final_state if output_final_state else None


def _plain(q: Tensor, k: Tensor, v: Tensor, g: Tensor, first: Tensor) -> tuple[Tensor, Tensor | None]:
    """`_Shared` for PyTorch to differentiate."""
    with without_autocast(q.device):
        q, k = query_heads(q, v.shape[2]), query_heads(k, v.shape[2])
        return linear_attention_chunked(q, k, v, g, True, False, first, None, None, True)


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,  # [B, T, G, Dk]
        k: Tensor,  # [B, T, G, Dk]
        v: Tensor,  # [B, T, H, Dv]
        g: Tensor,  # [B, T, H]
        first: Tensor,  # [B, H, Dk, Dv]
    ) -> tuple[Tensor, Tensor]:  # [B, T, H, Dv], and the state after the last step
        cut = _Cut.of(q, v)
        q_c, k_c, v_c = (cut.rows(x) for x in (q, k, v))
        weights, head, tail = _decays(cut.gates(g))
        weights.mul_((q_c @ k_c.mT)[:, None])
        inside = weights.flatten(0, 1) @ cut.by_head(v_c)
        del weights
        states = k_c.mT @ cut.scaled(v_c, tail)  # [J, Dk, R · Dv]
        last = cut.carry_(states, head[..., -1], cut.state(first))
        o = cut.scaled(q_c @ states, head)
        cut.add_by_head_(o, inside)
        ctx.save_for_backward(q, k, v, g, first, states)
        return cut.joined(o, v.shape[2]), cut.of_state(last)

    @staticmethod
    def backward(ctx: Any, do: Tensor, d_last: Tensor) -> Any:
        saved = ctx.saved_tensors  # once: a checkpoint makes them anew for each look
        return gradient(lambda: _gradients(do, d_last, *saved), _plain, saved[:5], (do, d_last))


def _gradients(
    do: Tensor, d_last: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, first: Tensor, states: Tensor
) -> tuple[Tensor, ...]:
    with without_autocast(do.device):  # whatever `backward` is called under
        cut = _Cut.of(q, v)
        q_c, k_c, v_c, do_c = (cut.rows(x) for x in (q, k, v, do))
        decays, head, tail = _decays(cut.gates(g))
        later = torch.ones(cut.C, cut.C, dtype=q.dtype, device=q.device).triu(1)  # [s, t], s < t

        do_h, pairs = cut.by_head(do_c), (q_c @ k_c.mT)[:, None]  # [J, 1, C, C]
        d_pairs = (do_h @ cut.by_head(v_c).mT).view_as(decays).mul_(decays)
        inside = decays.mul_(pairs).flatten(0, 1).mT @ do_h
        del decays, do_h
        d_shared = d_pairs.sum(1)
        dg = (d_pairs.mul_(pairs) @ later).tril_().sum(-2)  # over pairs s < t <= r: [J, R, C]
        del d_pairs

        do_c = cut.scaled(do_c, head)
        read = cut.dot(q_c @ states, do_c)
        d_states = q_c.mT @ do_c
        d_first = cut.carry_(d_states, head[..., -1], cut.state(d_last), reverse=True)
        dq = torch.baddbmm(d_shared @ k_c, do_c, states.mT)
        dk = torch.baddbmm(d_shared.mT @ q_c, cut.scaled(v_c, tail), d_states.mT)
        dv = cut.scaled(k_c @ d_states, tail)
        through = cut.dot(states, d_states).sum(-1, keepdim=True)
        dg += read @ (1 - later) + cut.dot(v_c, dv) @ later + head[..., -1:] * through
        cut.add_by_head_(dv, inside)
        H = v.shape[2]
        dq, dk, dv = cut.joined(dq, cut.G), cut.joined(dk, cut.G), cut.joined(dv, H)
        return dq, dk, dv, cut.joined(dg.mT.contiguous(), H)[..., 0], cut.of_state(d_first)


class _Cut(NamedTuple):
    """N chunks of C steps, of G groups of R heads; J = B · N · G."""

    B: int
    T: int
    N: int
    C: int
    G: int
    R: int

    @classmethod
    def of(cls, q: Tensor, v: Tensor) -> _Cut:
        B, T, G, Dk = q.shape
        N = -(-T // max(MIN_CHUNK, Dk, v.shape[-1]))
        return cls(B, T, N, -(-T // N), G, v.shape[2] // G)

    def rows(self, x: Tensor) -> Tensor:
        """[B, T, heads, D] -> [J, C, heads of a group · D]."""
        x = x.reshape(self.B, self.T, self.G, -1)
        missing = self.N * self.C - self.T
        x = F.pad(x, (0, 0, 0, 0, 0, missing)) if missing else x  # padding by nothing would copy
        return x.unflatten(1, (self.N, self.C)).transpose(2, 3).reshape(-1, self.C, x.shape[-1])

    def joined(self, x: Tensor, heads: int) -> Tensor:
        """What `rows` cut, of `heads`: [B, T, heads, D]."""
        x = x.view(self.B, self.N, self.G, self.C, -1).transpose(2, 3)
        return x.reshape(self.B, self.N * self.C, heads, -1)[:, : self.T]

    def gates(self, g: Tensor) -> Tensor:
        """[B, T, H] -> [J, R, C]."""
        return self.rows(g[..., None]).mT.contiguous()

    def by_head(self, x: Tensor) -> Tensor:
        """[J, C, R · D] -> [J · R, C, D]."""
        return x.unflatten(-1, (self.R, -1)).transpose(1, 2).flatten(0, 1)

    def add_by_head_(self, x: Tensor, y: Tensor) -> None:
        """Adds y [J · R, C, D] to x [J, C, R · D]."""
        x.unflatten(-1, (self.R, -1)).add_(y.unflatten(0, (-1, self.R)).transpose(1, 2))

    def scaled(self, x: Tensor, decay: Tensor) -> Tensor:
        """x [J, C, R · D] times `decay` [J, R, C]."""
        return (x.unflatten(-1, (self.R, -1)) * decay.mT[..., None]).flatten(-2)

    def dot(self, x: Tensor, y: Tensor) -> Tensor:
        """Of each head, products of x and y [J, rows, R · D]: [J, R, rows]."""
        return (x * y).unflatten(-1, (self.R, -1)).sum(-1).mT

    def state(self, x: Tensor) -> Tensor:
        """[B, H, Dk, Dv] -> [B, G, Dk, R, Dv]."""
        return x.unflatten(1, (self.G, self.R)).transpose(2, 3)

    def of_state(self, x: Tensor) -> Tensor:
        """What `state` laid out: [B, H, Dk, Dv]."""
        return x.transpose(2, 3).flatten(1, 2)

    def carry_(self, updates: Tensor, decays: Tensor, state: Tensor, reverse: bool = False) -> Tensor:
        """Puts the state that reaches each chunk in the place of what the chunk adds, and returns the one after all.

        Updates [J, Dk, R · Dv], decays [J, R]; with `reverse`, the last chunk is the first that is reached.
        """
        updates = updates.view(self.B, self.N, self.G, -1, self.R, state.shape[-1])
        decays = decays.view(self.B, self.N, self.G, 1, self.R, 1)
        if torch.compiler.is_compiling():
            reached, state = carried(updates, decays, state, 1, reverse)
            updates.copy_(reached)
            return state
        steps = list(zip(updates.unbind(1), decays.unbind(1), strict=True))
        for update, decay in reversed(steps) if reverse else steps:
            state, _ = torch.addcmul(update, decay, state), update.copy_(state)
        return state


def _decays(g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of log decays [J, R, C]: from each step to each later one [J, R, C, C], 0 above the diagonal; over all steps of a
    chunk up to each, and over all behind it, [J, R, C]."""
    between = segment_sums(g)
    tail = between[..., -1, :].exp()
    return between.exp_().tril_(), g.cumsum(-1).exp(), tail
