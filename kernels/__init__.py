"""Sequence-mixing operations on tensors laid out [batch, time, heads, channels]; imported as `seqzoo.kernels`.

Every operation has `backend="auto" | "fused" | "chunked" | "reference"` and `lengths: [B]` for padded batches: what
lies past a sequence's length never changes its outputs or gradients, and outputs past it are zero.
"""

if __name__ == "kernels":
    # Somebody looks for another package of that name, as transformers does, and finds this folder of a checkout. A
    # second import would register the operators anew, and the first ones would crash: it is as if there were none.
    __file__ = None  # type: ignore[assignment]
else:
    from .attention import attention
    from .delta_rule import delta_rule
    from .diagonal_scan import diagonal_scan
    from .favor_attention import FavorState, favor_attention
    from .gated_attention import GatedAttentionState, gated_attention
    from .linear_attention import linear_attention
    from .vq_attention import VQState, nearest_code, vq_attention

__all__ = [
    "FavorState",
    "GatedAttentionState",
    "VQState",
    "attention",
    "delta_rule",
    "diagonal_scan",
    "favor_attention",
    "gated_attention",
    "linear_attention",
    "nearest_code",
    "vq_attention",
]
