"""Caches of transformers that hold a state of constant size for a layer, in place of its keys and values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin

LAYER = "_seqzoo_state_layer"


class StateLayer(CacheLayerMixin):
    """What one layer remembers: `state`, a tensor or a NamedTuple of tensors, batch first, and of how many steps."""

    is_sliding = False
    supports_early_init = False

    def __init__(self, **_: Any) -> None:
        super().__init__()
        self.state: Any = None
        self.steps = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """There is nothing to allocate: whoever makes the state knows how large it is."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The new keys and values alone; the keys lead attention functions to this layer."""
        self.steps += key_states.shape[-2]
        key_states = key_states.view_as(key_states)
        setattr(key_states, LAYER, self)
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.steps + query_length, 0

    def get_seq_length(self) -> int:
        return self.steps

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.state, self.steps = None, 0

    def offload(self) -> None:
        """A state is small: it stays where it is."""

    def prefetch(self) -> None:
        """It never left."""

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise ValueError(
                "a state cannot forget its last steps, as assisted generation asks; valid: the stock cache, or "
                "generation without an assistant"
            )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state is not None:
            part = self.state if isinstance(self.state, Tensor) else self.state[0]
            self.batch_select_indices(torch.arange(len(part), device=part.device).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if isinstance(self.state, Tensor):
            self.state = self.state[indices.to(self.state.device)]
        elif hasattr(self.state, "select"):  # of a block
            self.state = self.state.select(indices)
        elif self.state is not None:
            self.state = type(self.state)(*(part[indices.to(part.device)] for part in self.state))


class StateCache(Cache):
    """A state for each layer, for `generate` with attn_implementation="seqzoo_linear" or "seqzoo_favor".

        model.generate(ids, past_key_values=seqzoo.hf.StateCache(model.config))

    A step then takes the time and memory of one step, however many came before.

    Args:
        config: of the model.
    """

    def __init__(self, config: PretrainedConfig) -> None:
        layers = config.get_text_config(decoder=True).num_hidden_layers
        super().__init__(layers=[StateLayer() for _ in range(layers)])


def layer_of(keys: Tensor) -> StateLayer | None:
    """The layer that gave these keys out, if they are without those before."""
    return getattr(keys, LAYER, None)
