"""transformers 5: seqzoo's operations as attention, and its blocks as layers, of stock models."""

from __future__ import annotations

try:
    from transformers import AttentionInterface, AttentionMaskInterface
except ImportError as error:
    raise ImportError(f"seqzoo.hf needs transformers 5 ({error}): pip install 'seqzoo[hf]'") from None

from .interop.attention import favor, linear, softmax
from .interop.mixer import Mixer
from .interop.quantize import Quantized, quantize_keys, quantized, set_codebooks
from .interop.seen import seen_mask
from .interop.state_cache import StateCache, StateLayer

__all__ = ["Mixer", "Quantized", "StateCache", "StateLayer", "quantize_keys", "register", "set_codebooks"]


def register(*, num_features: int | None = None, seed: int = 0) -> None:
    """From now on every model takes `attn_implementation="seqzoo_softmax" | "seqzoo_linear" | "seqzoo_favor"`.

        seqzoo.hf.register()
        model.set_attn_implementation("seqzoo_linear")

    Keys may have fewer heads than queries. Padding in front or behind, packed sequences and, of softmax, sliding
    windows are kept; what is not is refused in words, as are dropout of weights, caps on scores, sinks, biases by
    position, and weights to return.

    Args:
        num_features: of "seqzoo_favor", for each head; None: D ln D of heads with D channels.
        seed: from which its features are drawn, layer by layer: the same in every process.
    """
    functions = {
        "seqzoo_softmax": softmax,
        "seqzoo_linear": linear,
        "seqzoo_favor": favor(num_features, seed),
        "seqzoo_vq": quantized,
    }
    for name, function in functions.items():
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, seen_mask)
