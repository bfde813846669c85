from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import linear_attention
from ..kernels.common import accumulation_dtype
from ..kernels.documents import Documents, starts_of
from ..kernels.nodes import as_node, as_one
from ..valid import Count, Factor
from .base import Block, advance, last_steps
from .block_diagonal import BlockDiagonal
from .depthwise import short_convolution
from .directions import Directions
from .forward_mode import layer_norm
from .gates import GateBias
from .states import state_of
from .wide import default_dtype

NORM_EPS = 1e-5


class Memory(NamedTuple):
    """exp(-m) times the memory and its normaliser, so that no input gate is too large for them."""

    memory: Tensor  # [B, H, Dk, Dv + 1], the normaliser in the last column
    largest: Tensor  # [B, H], m


@state_of("inputs")
class MLSTMState(NamedTuple):
    memory: Tensor  # as in Memory
    largest: Tensor
    inputs: Tensor  # [B, conv_width - 1, E], the last ones of the convolution
    position: Tensor  # int64 [B]


class MLSTM(Block):
    """xLSTM's matrix memory: C_t = σ(f_t) C_{t-1} + exp(i_t) k_t v_tᵀ, read by q_t and divided by what it has summed.

    n_t = σ(f_t) n_{t-1} + exp(i_t) k_t, and h_t = C_tᵀ q_t / max(|n_t · q_t|, 1), per head. Around it stands the block
    of the first paper: x and z are two projections of the input; q and √Dk k are projections of u = silu(conv(x)), v of
    x, block by block of `projection_width` channels; i and f are one number a head, linear in q, k and v; and what
    comes out is W (silu(z) ∘ (LayerNorm(h) + skip ∘ u)), the norm per head.

    Beside the one call over time, the convolution moves values too: q and k see `conv_width` inputs. Bidirectional:
    the same memory also runs from the end, each direction divided by its own sum, and the two are added ahead of the
    norm; both include the present step, and the convolution is centred. Input gates have no upper bound, and need none.

    The published code adds 1e-6 to the divisor after it was scaled by exp(-m), so that what it adds depends on the
    gates; here nothing is added.

    Args:
        d_model: width.
        causal: see no later step.
        num_heads: heads, H; divides the inner width.
        expand: inner width E, times `d_model`.
        conv_width: positions of the convolution, its own included; one more where both sides are seen and it is even.
        projection_width: channels of a block of the projections to q, k and v; divides the inner width.

    Source: Beck et al., "xLSTM: Extended Long Short-Term Memory" (2024, arXiv 2405.04517), equations 19 to 27 and the
    block of pre up-projection, with the starts of gates of its code: f at 3 to 6 over the heads, i at N(0, 0.1²).
    """

    def __init__(
        self,
        d_model: int,
        *,
        causal: bool = False,
        num_heads: Count = 4,
        expand: Factor = 2.0,
        conv_width: Count = 4,
        projection_width: Count = 4,
    ) -> None:
        super().__init__(d_model, causal=causal)
        E = self.inner_dim = int(expand * d_model)
        if E < 1 or E % num_heads or E % projection_width:
            raise ValueError(
                f"MLSTM: expand={expand} of d_model={d_model} makes an inner width of {E}, num_heads={num_heads}, "
                f"projection_width={projection_width}; valid: heads and blocks that divide it"
            )
        self.num_heads = num_heads
        self.head_dim = E // num_heads
        self.in_proj = nn.Linear(d_model, 2 * E, bias=False)
        self.conv = short_convolution(E, conv_width, causal=causal, bias=True, silu=True)
        self.q_proj, self.k_proj, self.v_proj = (BlockDiagonal(E, E // projection_width, bias=False) for _ in range(3))
        gates = [nn.Linear(E, 2 * num_heads, bias=False) for _ in range(3)]  # of q, k and v
        for layer in gates:
            nn.init.zeros_(layer.weight)
        self.gate_proj = nn.ModuleList(gates)
        dtype = default_dtype()
        i, f = 0.1 * torch.randn(num_heads, dtype=dtype), torch.linspace(3, 6, num_heads, dtype=dtype)
        self.gate_bias = GateBias(torch.cat([i, f]))
        self.norm_weight = nn.Parameter(torch.ones(E))
        self.skip = nn.Parameter(torch.ones(E))
        self.out_proj = nn.Linear(E, d_model, bias=False)

    def initial_state(self, batch_size, *, device=None, dtype=None) -> MLSTMState:
        device, dtype = self._state_options(device, dtype)
        wide, H, D = accumulation_dtype(dtype), self.num_heads, self.head_dim
        return MLSTMState(
            torch.zeros(batch_size, H, D, D + 1, device=device, dtype=wide),
            torch.zeros(batch_size, H, device=device, dtype=wide),
            torch.zeros(batch_size, self.conv.width - 1, self.inner_dim, device=device, dtype=dtype),
            torch.zeros(batch_size, dtype=torch.int64, device=device),
        )

    def mix(
        self, x: Tensor, state: MLSTMState | None, lengths: Tensor | None, documents: Documents | None = None
    ) -> tuple[Tensor, MLSTMState | None]:
        x, z = self.in_proj(x).chunk(2, -1)  # [B, T, E]
        u, inputs = self.conv(x, None if state is None else state.inputs, lengths, documents)
        q, k, v = self.q_proj(u), self.k_proj(u), self.v_proj(x)
        gates = self.gate_bias(sum(layer(y) for layer, y in zip(self.gate_proj, (q, k, v), strict=True)))
        ways = Directions(x, lengths, documents, both=not self.causal)
        q, k, v = (y.unflatten(-1, (self.num_heads, self.head_dim)) for y in (q, k, v))
        i, f = ways.doubled(gates).chunk(2, -1)
        q, k = ways.doubled(q), ways.doubled(k)
        before = None if state is None else Memory(state.memory, state.largest)

        def remember(v: Tensor) -> Any:
            h, after = mlstm(q, k, ways.doubled(v), i, f, before, ways.lengths, ways.documents)
            return ways.summed(h) if state is None else (h, after)

        h = self.over_time(remember, v)
        if state is not None:
            h, after = h
            state = MLSTMState(after.memory, after.largest, inputs, advance(state.position, x, lengths, documents))
        h = layer_norm(h, NORM_EPS).flatten(2)
        return self.out_proj((h * self.norm_weight + self.skip * u) * F.silu(z)), state


def mlstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    before: Memory | None = None,
    lengths: Tensor | None = None,
    documents: Documents | None = None,
) -> tuple[Tensor, Memory | None]:
    """h of the equations of `MLSTM`, with k / √Dk for k, as one linear attention of which all is scaled by exp(-m).

    m_t = max(log σ(f_t) + m_{t-1}, i_t), so that no exponential is above 1. What comes out does not depend on it: m is
    taken for a constant, and gradients are exact.

    Args:
        q, k: [B, T, H, Dk].
        v: [B, T, H, Dv].
        i, f: [B, T, H], ahead of exponential and sigmoid.
        before: what is remembered ahead of the first step; None is nothing, and then none is returned.
        lengths: int64 [B], the valid steps of each sequence.
        documents: in place of `lengths`, with B = 1; memories have a row for each.

    Returns:
        h [B, T, H, Dv], zero past `lengths`, and what is remembered after the last valid step.
    """
    (B, _, H, Dk), wide = q.shape, accumulation_dtype(q.dtype)
    # In double precision: where nothing new is larger, m must fall by exactly as much as what it scales.
    i, log_f = i.double(), F.logsigmoid(f.double())
    start = i.new_zeros(B if documents is None else documents.N, H) if before is None else before.largest.double()
    # In compiled graphs too, of which there would be one for every doubling of T.
    form = _node if as_one() or torch.compiler.is_compiling() else _largest
    m, m_before = form(i.detach(), log_f.detach(), start, starts_of(documents))
    decay = log_f + torch.minimum(m_before - m, -log_f.detach())  # rounding never lets it be above 0
    scale = (i - m).exp() / math.sqrt(Dk)
    o = linear_attention(
        q,
        k * scale.to(k.dtype)[..., None],
        F.pad(v, (0, 1), value=1.0),
        log_decay=decay.to(wide),
        causal=True,
        initial_state=None if before is None else before.memory,
        output_final_state=before is not None,
        lengths=lengths,
        cu_seqlens=starts_of(documents),
    )
    after = None
    if before is not None:
        o, memory = o
        last = last_steps(m, start, lengths, documents)
        largest = last.to(wide)
        after = Memory(memory * (last - largest).exp().to(wide)[..., None, None], largest)
    least = m.neg().exp().to(wide).clamp(min=torch.finfo(wide).tiny)  # 0 over 0 is 0
    divisor = torch.maximum(o[..., -1:].abs(), least[..., None])
    return (o[..., :-1] / divisor).to(v.dtype), after


def _largest(i: Tensor, log_f: Tensor, start: Tensor, starts: Tensor | None) -> tuple[Tensor, Tensor]:
    """m at each step, and ahead of it: [B, T, H] each, from m = `start` [B, H], of documents that `starts` [N, H].

    Maxima over one step, then over two, four and so on, of sums of the steps between: no difference of long sums.
    """
    T = i.shape[1]
    if starts is None:
        ahead, longest, start = torch.arange(T, device=i.device), T, start[:, None]
    else:
        documents = Documents(starts, T)
        ahead, longest, start = documents.positions(), documents.longest, start[documents.of_steps()][None]
    first = (ahead == 0)[:, None]
    m = torch.where(first, torch.maximum(i, log_f + start), i)
    decay, distance = log_f, 1
    while distance < longest:
        reaches = (ahead >= distance)[:, None]
        m = torch.maximum(m, torch.where(reaches, m.roll(distance, 1) + decay, -torch.inf))
        decay = decay + torch.where(reaches, decay.roll(distance, 1), 0)
        distance *= 2
    return m, torch.where(first, start, m.roll(1, 1))


_node = as_node("mlstm_largest", _largest, lambda i, *_: (i.new_empty(i.shape), i.new_empty(i.shape)), shared={})
