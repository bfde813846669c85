from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import linear_attention
from ..kernels.common import accumulation_dtype
from ..kernels.documents import Documents
from ..valid import BelowOne, Bias
from .base import Block, advance, head_dim
from .directions import Directions
from .gates import GateBias
from .states import MemoryState
from .wide import default_dtype

NORM_EPS = 1e-5


class HGRN2(Block):
    """Gated linear recurrence with outer products: S_t = diag(f_t) S_{t-1} + (1 - f_t) v_tᵀ, read by q_t = silu(W_q x).

    f = β + (1 - β) σ(W_f x), per channel: what is forgotten makes room for what is written, and β, which `lower_bound`
    says, keeps a layer from forgetting all at once. A model gives its layers l = 0, 1, ... of L the bounds l / L, so
    that lower ones look at what is near; the paper's are learnt, and start there. What comes out is W RMSNorm(o), the
    norm over all heads together.

    Bidirectional: the same memory also runs from the end, and the two outputs are added ahead of the norm; both include
    the present step.

    Args:
        d_model: width.
        causal: see no later step.
        num_heads: heads, H; divides `d_model`.
        lower_bound: β; what a model is not told it sets by depth.
        gate_bias: start of a bias that is learnt within σ; None: there is none. With β = 0, a memory is halved in one
            step without, in 38 with 4.

    Source: Qin et al., "HGRN2: Gated Linear RNNs with State Expansion" (2024, arXiv 2404.07904), section 3.
    """

    by_depth = "lower_bound"

    def __init__(
        self,
        d_model: int,
        *,
        causal: bool = False,
        num_heads: int = 4,
        lower_bound: BelowOne = 0.0,
        gate_bias: Bias | None = None,
    ) -> None:
        super().__init__(d_model, causal=causal)
        if not 0 <= lower_bound < 1:
            raise ValueError(f"HGRN2: lower_bound={lower_bound}; valid: 0 or more, and below 1")
        self.num_heads = num_heads
        self.head_dim = head_dim("HGRN2", d_model, num_heads)
        self.lower_bound = lower_bound
        self.in_proj = nn.Linear(d_model, 3 * d_model, bias=False)  # q, f and v
        self.gate_bias = (
            None if gate_bias is None else GateBias(torch.full((d_model,), gate_bias, dtype=default_dtype()))
        )
        self.norm = nn.RMSNorm(d_model, eps=NORM_EPS)
        self.out_proj = nn.Linear(d_model, d_model, bias=False)

    def initial_state(self, batch_size, *, device=None, dtype=None) -> MemoryState:
        device, dtype = self._state_options(device, dtype)
        memory = self.num_heads, self.head_dim, self.head_dim
        return MemoryState.empty(batch_size, *memory, device=device, dtype=dtype)

    def mix(
        self, x: Tensor, state: MemoryState | None, lengths: Tensor | None, documents: Documents | None = None
    ) -> tuple[Tensor, MemoryState | None]:
        q, f, v = self.in_proj(x).chunk(3, -1)
        log_decay = self._log_decay(f)
        k = log_decay.expm1().neg().to(f.dtype)
        q, k, v, log_decay = (y.unflatten(-1, (self.num_heads, self.head_dim)) for y in (F.silu(q), k, v, log_decay))
        ways = Directions(x, lengths, documents, both=not self.causal)
        q, k, log_decay = (ways.doubled(y) for y in (q, k, log_decay))

        before = None if state is None else state.memory
        remember = partial(linear_attention, q, k, log_decay=log_decay, causal=True)
        o = self.over_time(lambda v: ways.through(remember, v, before), v)
        if state is not None:
            o, memory = o
            state = MemoryState(memory, advance(state.position, x, lengths, documents))
        return self.out_proj(self.norm(o.flatten(2))), state

    def _log_decay(self, f: Tensor) -> Tensor:
        """log(β + (1 - β) σ(f)), right where σ is all but 0: [B, T, d_model], in single precision at least."""
        f = f.to(accumulation_dtype(f.dtype)) if self.gate_bias is None else self.gate_bias(f)
        if not self.lower_bound:
            return F.logsigmoid(f)
        low = f.new_tensor(math.log(self.lower_bound))
        decay = torch.logaddexp(low, math.log1p(-self.lower_bound) + F.logsigmoid(f))
        return decay.clamp(max=0)  # which rounding may pass where nothing is forgotten
