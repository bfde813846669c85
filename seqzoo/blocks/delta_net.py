from __future__ import annotations

from ..valid import Count
from .base import head_dim
from .delta import DeltaBlock


class DeltaNet(DeltaBlock):
    """The delta rule: S_t = S_{t-1} + β_t k_t (v_t - S_{t-1}ᵀ k_t)ᵀ, read by q_t / √Dk, so that a key's value replaces
    what was there under that key.

    q, k and v are silu(conv(W x)), q and k divided by their length in each head; β = σ(w x), a number a head, is how
    much is replaced. What comes out is W RMSNorm(o), the norm per head.

    Beside the one call over time, the convolution moves values too: q, k and v see `conv_width` inputs. Bidirectional:
    the same memory also runs from the end, and the two outputs are added ahead of the norm; both include the present
    step, and the convolution is centred.

    Args:
        d_model: width.
        causal: see no later step.
        num_heads: heads, H; divides `d_model`.
        conv_width: positions of the convolution, its own included; one more where both sides are seen and it is even.
        negative_eigenvalues: β lies in [0, 2], so that what is replaced can also be turned around, rather than [0, 1].

    Source: Schlag et al., "Linear Transformers Are Secretly Fast Weight Programmers" (2021, arXiv 2102.11174), and the
    layer of Yang et al., "Parallelizing Linear Transformers with the Delta Rule over Sequence Length" (2024, arXiv
    2406.06484); eigenvalues below 0: Grazzi et al. (2024, arXiv 2411.12537).
    """

    def __init__(
        self,
        d_model: int,
        *,
        causal: bool = False,
        num_heads: int = 4,
        conv_width: Count = 4,
        negative_eigenvalues: bool = False,
    ) -> None:
        D = head_dim("DeltaNet", d_model, num_heads)
        super().__init__(
            d_model,
            causal=causal,
            num_heads=num_heads,
            num_key_heads=num_heads,
            key_dim=D,
            value_dim=D,
            gate_dim=0,
            conv_width=conv_width,
            negative_eigenvalues=negative_eigenvalues,
        )
