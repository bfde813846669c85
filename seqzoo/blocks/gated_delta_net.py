from __future__ import annotations

from torch import Tensor

from ..valid import Count, Factor
from .decays import Decay, rates
from .delta import DeltaBlock
from .timescales import step_bias


class GatedDeltaNet(DeltaBlock):
    """The delta rule with one decay a head: S_t = S' + β_t k_t (v_t - S'ᵀ k_t)ᵀ with S' = exp(g_t) S_{t-1}, read by
    q_t / √Dk.

    q, k and v are silu(conv(W x)), q and k divided by their length in each head; β = σ(w x) and
    g = -A softplus(u x + b) are a number a head. What comes out is W (silu(r) ∘ RMSNorm(o)), the norm per head and r a
    projection of x. A and b stay in single precision when the block is cast to half.

    Beside the one call over time, the convolution moves values too: q, k and v see `conv_width` inputs. Bidirectional:
    the same memory also runs from the end, and the two outputs are added ahead of norm and gate; both include the
    present step, and the convolution is centred.

    Args:
        d_model: width.
        causal: see no later step.
        num_heads: heads of values, H, each with a decay.
        num_key_heads: heads of queries and keys, of which each serves as many of values; divides `num_heads`, which it
            is by default.
        expand_k: H Dk by `d_model`; Dk is rounded down.
        expand: H Dv by `d_model`, likewise.
        conv_width: positions of the convolution, its own included; one more where both sides are seen and it is even.
        negative_eigenvalues: β lies in [0, 2], so that what is replaced can also be turned around, rather than [0, 1].
        dt_min, dt_max: softplus(b) starts log-uniformly between them; the smaller, the longer memories last.

    Source: Yang et al., "Gated Delta Networks" (2024, arXiv 2412.06464), equation 10, with the start of its authors'
    code, where A is uniform up to 16; it is 0.01 or more here. Qwen3-Next's b of 1 would forget all in a step.
    """

    gate = "silu"

    def __init__(
        self,
        d_model: int,
        *,
        causal: bool = False,
        num_heads: Count = 4,
        num_key_heads: Count | None = None,
        expand_k: Factor = 0.75,
        expand: Factor = 1.5,
        conv_width: Count = 4,
        negative_eigenvalues: bool = False,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
    ) -> None:
        H, G = num_heads, num_heads if num_key_heads is None else num_key_heads
        key_dim, value_dim = int(expand_k * d_model / H), int(expand * d_model / H)
        if min(key_dim, value_dim) < 1:
            raise ValueError(
                f"GatedDeltaNet: num_heads={H}, expand_k={expand_k} and expand={expand} of d_model={d_model} make "
                f"heads of {key_dim} and {value_dim} channels; valid: 1 or more"
            )
        if H % G:
            raise ValueError(f"GatedDeltaNet: num_key_heads={G} does not divide num_heads={H}")
        super().__init__(
            d_model,
            causal=causal,
            num_heads=H,
            num_key_heads=G,
            key_dim=key_dim,
            value_dim=value_dim,
            gate_dim=H + H * value_dim,
            conv_width=conv_width,
            negative_eigenvalues=negative_eigenvalues,
        )
        self.decay = Decay(rates(H, 0.01, 16), step_bias("GatedDeltaNet", H, dt_min, dt_max))

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        decay, r = x.tensor_split((self.num_heads,), -1)
        _, log_decay = self.decay(decay)
        return log_decay[..., 0], r
