from __future__ import annotations

from torch import Tensor, nn

from ..valid import Count
from .base import head_dim
from .decays import Decay, rates
from .delta import DeltaBlock
from .timescales import step_bias


class KDA(DeltaBlock):
    """Kimi Delta Attention: the delta rule with a decay for each channel of k, S_t = S' + β_t k_t (v_t - S'ᵀ k_t)ᵀ with
    S' = diag(exp(g_t)) S_{t-1}, read by q_t / √Dk.

    q, k and v are silu(conv(W x)), q and k divided by their length in each head; β = σ(w x) is a number a head, and
    g = -A softplus(W₂ W₁ x + b), of rank Dk, with an A a head and a b a channel. What comes out is
    W (σ(W₄ W₃ x) ∘ RMSNorm(o)), of rank Dv and the norm per head. A and b stay in single precision when the block is
    cast to half.

    Beside the one call over time, the convolution moves values too: q, k and v see `conv_width` inputs. Bidirectional:
    the same memory also runs from the end, and the two outputs are added ahead of norm and gate; both include the
    present step, and the convolution is centred.

    In fla W₄ has a bias, in the published model and here it has none.

    Args:
        d_model: width.
        causal: see no later step.
        num_heads: heads, H; divides `d_model`.
        conv_width: positions of the convolution, its own included; one more where both sides are seen and it is even.
        negative_eigenvalues: β lies in [0, 2], so that what is replaced can also be turned around, rather than [0, 1].
        dt_min, dt_max: softplus(b) starts log-uniformly between them; the smaller, the longer memories last.

    Source: Kimi Team, "Kimi Linear" (2025, arXiv 2510.26692), equation 1, where A starts uniformly in [1, 16].
    """

    gate = "sigmoid"

    def __init__(
        self,
        d_model: int,
        *,
        causal: bool = False,
        num_heads: int = 4,
        conv_width: Count = 4,
        negative_eigenvalues: bool = False,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
    ) -> None:
        D = head_dim("KDA", d_model, num_heads)
        super().__init__(
            d_model,
            causal=causal,
            num_heads=num_heads,
            num_key_heads=num_heads,
            key_dim=D,
            value_dim=D,
            gate_dim=2 * D,  # W₁ x and W₃ x
            conv_width=conv_width,
            negative_eigenvalues=negative_eigenvalues,
        )
        self.decay_proj = nn.Linear(D, d_model, bias=False)
        self.gate_proj = nn.Linear(D, d_model, bias=False)
        self.decay = Decay(rates(num_heads, 1, 16), step_bias("KDA", d_model, dt_min, dt_max))

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        decay, gate = x.chunk(2, -1)
        _, log_decay = self.decay(self.decay_proj(decay))
        return log_decay, self.gate_proj(gate)
