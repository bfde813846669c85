"""A block in place of the attention of a model of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache

from ..blocks import Block
from .seen import Seen, check_packed
from .state_cache import StateLayer

PARAMETERS = ("hidden_states", "position_embeddings", "attention_mask", "past_key_values")
OF_OTHERS = ("encoder_hidden_states", "key_value_states")
POSITIONS = ("position_ids", "cache_position", "relative_position_embeddings", "rotary_pos_emb", "sinusoidal_pos")
SIZES = ("height", "width")  # of a picture
NEEDLESS = ("use_cache", "encoder_attention_mask", "shared_kv_states", "codebook_idx")  # where a block stands
TAKEN = frozenset((*PARAMETERS, "layer_past", "output_attentions", *OF_OTHERS, *POSITIONS, *SIZES, *NEEDLESS))


class Mixer(nn.Module):
    """A block that is called as a layer's attention is, with the cache that `generate` makes.

    Where that would keep keys and values, the block's state stands, which does not grow unless the block's does.
    Batches with padding, and packed ones, need a mask as `seqzoo.hf.register` makes it, which comes with
    `attn_implementation="seqzoo_softmax"`; other layers then run with it too.

    Args:
        block: what mixes, causal if the attention was.
        layer_idx: the number of the layer, as its attention has it.
        parameters: what it is called with, by position.
    """

    def __init__(self, block: Block, layer_idx: int | None = None, parameters: Sequence[str] = PARAMETERS) -> None:
        super().__init__()
        self.block = block
        self.layer_idx = layer_idx
        self.parameter_names = tuple(parameters)
        self.is_causal = block.causal

    def forward(self, *given: Any, **named: Any) -> tuple[Tensor, None]:
        """The block's outputs [B, T, d_model], and no weights, as a layer of transformers calls its attention.

        Of its arguments, `hidden_states`, `attention_mask` and the cache, whatever its name, are looked at; positions
        are not, which a block has of its own.

        Raises:
            ValueError: a mask or a cache that the block cannot keep to, keys of another sequence, or weights are asked
                for.
        """
        name, asked = type(self.block).__name__, {**dict(zip(self.parameter_names, given, strict=False)), **named}
        if asked.get("output_attentions"):
            raise ValueError(f"{name} has no weights to return; valid: seqzoo.analysis.mixing_matrix, which makes them")
        if any(asked.get(other) is not None for other in OF_OTHERS):
            raise ValueError(f"{name}: keys of another sequence; valid: the attention of a sequence to itself")
        x, cache = asked["hidden_states"], next((value for value in asked.values() if isinstance(value, Cache)), None)
        layer = None if cache is None else self._layer(cache)
        seen = self._seen(asked.get("attention_mask"), x.shape[1], 0 if layer is None else layer.steps)
        check_packed(name, asked.get("position_ids"), seen, x.shape[1])
        counts = seen.new_steps(x.shape[1])
        if layer is None and seen.starts is None:
            return self.block(x, attention_mask=counts), None
        if layer is None:
            return self.block(x.flatten(0, 1)[None], cu_seqlens=seen.starts).view_as(x), None
        y, layer.state = self.block.extend(x, layer.state, attention_mask=counts)
        layer.steps += x.shape[1]
        return y, None

    def _seen(self, mask: Any, T: int, before: int) -> Seen:
        """What a mask says of T steps that follow so many others."""
        name, causal = type(self.block).__name__, self.block.causal
        if mask is None:
            return Seen(causal)
        if isinstance(mask, Tensor) and mask.dim() == 2:
            if mask.shape[1] not in (T, before + T):
                behind = f", or [batch, {before + T}] of those before too" if before else ""
                raise ValueError(f"{name}: a mask {list(mask.shape)} of {T} steps; valid: [batch, {T}]{behind}")
            return Seen(causal, counts=mask == 1, position=mask.shape[1] - T)
        if not isinstance(mask, Seen):
            raise ValueError(
                f"{name}: a mask of all pairs of steps; valid: seqzoo.hf.register(), and then "
                "model.set_attn_implementation('seqzoo_softmax'), whose masks tell what is padding"
            )
        if mask.causal != causal:
            raise ValueError(f"{name} is built with causal={causal}, the layer's mask is of causal={mask.causal}")
        return mask

    def _layer(self, cache: Cache) -> StateLayer:
        """The state's place in a cache, which is made where the cache is still empty."""
        if isinstance(cache, EncoderDecoderCache):
            cache = cache.self_attention_cache
        index = self.layer_idx or 0
        while cache.layer_class_to_replicate is not None and len(cache.layers) <= index:
            cache.layers.append(cache.layer_class_to_replicate())
        layer = cache.layers[index]
        if isinstance(layer, DynamicLayer) and not layer.is_initialized:
            layer = cache.layers[index] = StateLayer()
        if not isinstance(layer, StateLayer):
            raise ValueError(
                f"{type(self.block).__name__}: a {type(layer).__name__} where its state would stand; valid: a new "
                "DynamicCache, which generate makes, or none"
            )
        return layer
