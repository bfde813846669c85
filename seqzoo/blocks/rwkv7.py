from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..kernels import delta_rule
from ..kernels.common import accumulation_dtype
from ..kernels.documents import Documents, starts_of
from ..valid import BelowOne
from .base import Block, advance, head_dim
from .delta import unit
from .depthwise import Window
from .directions import Directions
from .forward_mode import layer_norm
from .gates import GateBias
from .states import state_of
from .wide import default_dtype

NORM_EPS = 1e-5  # times the channels of a head
FASTEST = -math.exp(-0.5)  # the logarithm of the strongest decay, 0.545


@state_of("previous")
class RWKV7State(NamedTuple):
    memory: Tensor  # [B, H, D, D]
    previous: Tensor  # [B, 1, d_model], the last input
    position: Tensor  # int64 [B]


class RWKV7(Block):
    """RWKV-7's time mixing: S_t = diag(w_t) S_{t-1} - (a_t ∘ κ_t) (S_{t-1}ᵀ κ_t)ᵀ + k̃_t v_tᵀ, read by r_t.

    A decay w for each channel, and a delta rule that erases at a ∘ κ what is known of κ, and writes elsewhere:

    - r, k and v are projections; w = exp(-exp(-½) σ(w₀ + W₂ tanh(W₁ x))), a = σ(a₀ + A₂ A₁ x) and the gate
      G₂ σ(G₁ x) are of low rank; κ = k ∘ k_κ, divided by its length in each head, and k̃ = k ∘ (1 + (a - 1) ∘ k_a).
    - Each of the six projects inputs of its own, x_t + μ ∘ (x_{t-1} - x_t): the token shift.
    - What comes out is W_o ((GroupNorm(o) + (Σ r ∘ k̃ ∘ r_k) v) ∘ gate), norm and sum per head.

    Beside the one call over time, the token shift moves values too. Bidirectional: the same memory also runs from the
    end, and the two outputs are added ahead of norm and gate; both include the present step, and tokens are shifted
    from both sides, (x_{t-1} + x_{t+1}) / 2 in the place of x_{t-1}. A step is two of `delta_rule`, which erases, then
    writes. w₀ and a₀ stay in single precision when the block is cast to half.

    The published model adds values of its first layer to those of the others. A block knows no other, and has no such
    residual. W_o starts as PyTorch's layers do rather than at 0, where a block by itself would show nothing.

    Args:
        d_model: width.
        causal: see no later step.
        num_heads: heads, H; divides `d_model`. The published have 64 channels.
        depth: l / L for layer l = 0, 1, ... of L, by which μ and w₀ start; what a model is not told it sets.

    Source: Peng et al., "RWKV-7 'Goose' with Expressive Dynamic State Evolution" (2025, arXiv 2503.14456), with the
    ranks and starts of BlinkDL/RWKV-LM, but that w₀ has l / (L - 1) there for `depth`.
    """

    by_depth = "depth"
    undecayed = ("mu",)

    def __init__(self, d_model: int, *, causal: bool = False, num_heads: int = 4, depth: BelowOne = 0.5) -> None:
        super().__init__(d_model, causal=causal)
        self.num_heads = num_heads
        self.head_dim = head_dim("RWKV7", d_model, num_heads)
        if not 0 <= depth < 1:
            raise ValueError(f"RWKV7: depth={depth}; valid: 0 or more, and below 1")
        self.shift = TokenShift(causal=causal)
        self.mu = nn.Parameter(_shares(d_model, depth))
        self.r_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(d_model, d_model, bias=False) for _ in range(4)
        )
        self.decay_proj = _low_rank(d_model, 2.5, nn.Tanh())
        self.rate_proj = _low_rank(d_model, 2.5, nn.Identity())
        self.gate_proj = _low_rank(d_model, 5.0, nn.Sigmoid())
        place = torch.linspace(0, 1, d_model, dtype=default_dtype())
        zigzag = torch.linspace(-1, 1, self.head_dim, dtype=default_dtype())
        zigzag = (zigzag * zigzag.abs()).repeat(num_heads)
        self.decay_bias = GateBias(-5.5 + 6 * place ** (1 + depth**0.3) + 2.5 * zigzag)  # w₀
        self.rate_bias = GateBias(-0.19 + 0.3 * zigzag + 0.4 * (place - 0.5))  # a₀
        self.k_k = nn.Parameter(0.71 - 0.1 * (torch.linspace(0, 1, d_model) - 0.5))  # k_κ
        self.k_a = nn.Parameter(torch.full((d_model,), 1.02))
        self.r_k = nn.Parameter(torch.full((d_model,), -0.04))
        self.norm_weight = nn.Parameter(torch.ones(d_model))
        self.norm_bias = nn.Parameter(torch.zeros(d_model))
        for layer, size in ((self.r_proj, 0.5), (self.k_proj, 0.05), (self.v_proj, 0.5)):
            nn.init.uniform_(layer.weight, -size / math.sqrt(d_model), size / math.sqrt(d_model))

    def initial_state(self, batch_size, *, device=None, dtype=None) -> RWKV7State:
        device, dtype = self._state_options(device, dtype)
        shape = batch_size, self.num_heads, self.head_dim, self.head_dim
        return RWKV7State(
            torch.zeros(shape, device=device, dtype=accumulation_dtype(dtype)),
            torch.zeros(batch_size, 1, self.d_model, device=device, dtype=dtype),
            torch.zeros(batch_size, dtype=torch.int64, device=device),
        )

    def mix(
        self, x: Tensor, state: RWKV7State | None, lengths: Tensor | None, documents: Documents | None = None
    ) -> tuple[Tensor, RWKV7State | None]:
        near, previous = self.shift(x, None if state is None else state.previous, lengths, documents)
        x_r, x_w, x_k, x_v, x_a, x_g = (torch.addcmul(x, near - x, mu) for mu in self.mu.to(x.dtype))
        r, k, v = self.r_proj(x_r), self.k_proj(x_k), self.v_proj(x_v)
        log_decay = FASTEST * self.decay_bias(self.decay_proj(x_w)).sigmoid()
        a = self.rate_bias(self.rate_proj(x_a)).sigmoid()
        kappa, k = k * self.k_k, (k * (1 + (a - 1) * self.k_a)).to(v.dtype)
        r, kappa, k, v, a, log_decay = (y.unflatten(-1, (self.num_heads, -1)) for y in (r, kappa, k, v, a, log_decay))
        kappa = unit(kappa, eps=1e-12)  # keys start small
        ways = Directions(x, lengths, documents, both=not self.causal)
        gates = {"r": r, "k": k, "kappa": kappa, "a": a, "log_decay": log_decay}
        gates = {name: ways.doubled(y) for name, y in gates.items()}

        def remember(v: Tensor) -> Any:
            before = None if state is None else state.memory
            o = rwkv7(v=ways.doubled(v), **gates, before=before, lengths=ways.lengths, documents=ways.documents)
            return ways.summed(o) if state is None else o

        o = self.over_time(remember, v)
        if state is not None:
            o, memory = o
            state = RWKV7State(memory, previous, advance(state.position, x, lengths, documents))
        o = layer_norm(o, NORM_EPS * self.head_dim).flatten(2) * self.norm_weight + self.norm_bias
        present = (r * k * self.r_k.view(self.num_heads, -1)).sum(-1, keepdim=True) * v
        return self.out_proj((o + present.flatten(2)) * self.gate_proj(x_g)), state


def rwkv7(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    kappa: Tensor,
    a: Tensor,
    log_decay: Tensor,
    before: Tensor | None = None,
    lengths: Tensor | None = None,
    documents: Documents | None = None,
) -> Any:
    """o_t = S_tᵀ r_t of S_t = diag(w_t) S_{t-1} - (a_t ∘ κ_t) (S_{t-1}ᵀ κ_t)ᵀ + k_t v_tᵀ.

    Each step is two of `delta_rule`: one decays, and erases what the memory ahead of it says of κ, which of the decayed
    one is κ / w; the other writes.

    Args:
        r, k, kappa, a: [B, T, H, Dk].
        v: [B, T, H, Dv].
        log_decay: log w, finite, [B, T, H, Dk].
        before: S_0 [B, H, Dk, Dv]; None is nothing.
        lengths: int64 [B], the valid steps of each sequence.
        documents: in place of `lengths`, with B = 1; memories have a row for each.

    Returns:
        o [B, T, H, Dv], zero past `lengths`; with `before`, (o, the memory after the last valid step).
    """
    (B, T, H, _), starts = v.shape, starts_of(documents)
    o = delta_rule(
        _halves(torch.zeros_like(r), r),
        _halves((a * kappa).to(k.dtype), k),
        _halves(torch.zeros_like(v), v),
        v.new_ones(B, 2 * T, H),
        log_decay=_halves(log_decay, torch.zeros_like(log_decay)),
        erase=_halves(kappa * log_decay.neg().exp(), torch.zeros_like(log_decay)),
        initial_state=before,
        output_final_state=before is not None,
        lengths=None if lengths is None else 2 * lengths,
        cu_seqlens=None if starts is None else 2 * starts,
    )
    return o[:, 1::2] if before is None else (o[0][:, 1::2], o[1])


def _halves(first: Tensor, second: Tensor) -> Tensor:
    """The two halves of every step, one behind the other: [B, T, ...] -> [B, 2T, ...]."""
    return torch.stack([first, second], 2).flatten(1, 2)


class TokenShift(Window):
    """The input ahead of each step, or where both sides are seen the mean of those on either side."""

    def __init__(self, *, causal: bool) -> None:
        super().__init__(2 if causal else 3, causal=causal)

    def _over(self, x: Tensor) -> Tensor:
        return x[:, :-1] if self.width == 2 else (x[:, :-2] + x[:, 2:]) / 2


def _shares(D: int, depth: float) -> Tensor:
    """μ of r, w, k, v, a and g at the start: [6, D]."""
    place = torch.arange(D) / D
    return torch.stack([1 - place ** (power * (1 - depth)) for power in (0.2, 0.9, 0.7, 0.7, 0.9, 0.2)])


def _low_rank(D: int, roots: float, activation: nn.Module) -> nn.Sequential:
    """Two layers whose product starts at 0, with a rank of about `roots` √D, a multiple of 32."""
    rank = max(32, 32 * round(roots * math.sqrt(D) / 32))
    first, second = nn.Linear(D, rank, bias=False), nn.Linear(rank, D, bias=False)
    nn.init.zeros_(first.weight)
    start = nn.init.orthogonal_(torch.empty(D, rank, dtype=default_dtype()), gain=0.1 * math.sqrt(max(1, rank / D)))
    with torch.no_grad():
        second.weight.copy_(start)
    return nn.Sequential(first, activation, second)
