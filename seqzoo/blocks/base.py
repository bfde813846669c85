"""The interface of every sequence mixer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.common import check_lengths, zero_padding
from .learning import Learning


class State(Protocol):
    """What a causal block remembers: a NamedTuple of tensors, batch first."""

    @property
    def position(self) -> Tensor:
        """int64 [B], how many steps each sequence has taken."""


class Block(Learning, ABC):
    """A sequence mixer, [B, T, d_model] -> [B, T, d_model].

    A subclass writes `mix`, whose operation over time goes through `over_time`, and, if it can be causal,
    `initial_state`; padding is replaced by zeros before `mix` is called and after. Any split of a sequence over calls
    of `extend` gives what `forward` gives over the whole.
    """

    recurrence: ClassVar[tuple[str, ...]] = ()
    """Names of the parameters that set the recurrence: trained at a smaller rate and never decayed."""

    undecayed: ClassVar[tuple[str, ...]] = ()
    """Names of parameters that are scales or shifts in spite of having two dimensions: never decayed either."""

    convolves: ClassVar[bool] = False
    """Whether it moves values by distance alone, whatever they are, and each channel in its own way."""

    reach: int | None = None
    """How many positions away an output sees at most; None: however far there is something to see."""

    def __init__(self, d_model: int, *, causal: bool) -> None:
        super().__init__()
        self.d_model = d_model
        self.causal = causal
        self._observer: Callable[..., None] | None = None

    @abstractmethod
    def mix(self, x: Tensor, state: Any, lengths: Tensor | None) -> tuple[Tensor, Any]:
        """Outputs for `x` [B, T, d_model], zero past `lengths`, that follow `state`; and the state after them.

        Without a state, the sequences begin, and what is returned for it has no meaning.
        """

    def initial_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Any:
        """The state of `batch_size` sequences of which nothing has been seen, by default as parameters are kept.

        Raises:
            ValueError: the block is bidirectional.
        """
        raise NotImplementedError

    def forward(self, x: Tensor, *, lengths: Tensor | None = None) -> Tensor:
        """Mixes `x` [B, T, d_model] over time. `lengths`, integers [B]: outputs past them are zero, inputs do nothing.

        Raises:
            ValueError: `x` is not [B, T, d_model], or `lengths` are not integers [B] or, on a CPU, not in [0, T].
        """
        lengths = self._check(x, lengths)
        y, _ = self._mix(x, None, lengths)
        return y

    def extend(self, x: Tensor, state: Any, *, lengths: Tensor | None = None) -> tuple[Tensor, Any]:
        """Mixes the next T steps of sequences that stand at `state`: outputs [B, T, d_model] and the new state.

        Where `state` is None, sequences begin. With `lengths`, each sequence takes as many of the T steps.

        Raises:
            ValueError: the block is bidirectional, the state is of another number of sequences, or as in `forward`.
        """
        self._require_causal("extend")
        lengths = self._check(x, lengths)
        if state is None:
            state = self.initial_state(x.shape[0], device=x.device)
        elif not isinstance(getattr(state, "position", None), Tensor):
            raise ValueError(
                f"{type(self).__name__}: a state is what initial_state or extend gave, or None to begin, "
                f"got {type(state).__name__}"
            )
        elif len(state.position) != x.shape[0]:
            raise ValueError(
                f"{type(self).__name__}: a state of {len(state.position)} sequences for x of {x.shape[0]}; "
                "valid: a state of as many, or None to begin"
            )
        return self._mix(x, state, lengths)

    def _mix(self, x: Tensor, state: Any, lengths: Tensor | None) -> tuple[Tensor, Any]:
        """`mix`, with zeros for padding before and after."""
        if x.shape[0] == 0:  # operations reshape, and nothing has no shape: a sequence without a step stands in
            x = F.pad(x, (0, 0, 0, 0, 0, 1))
            lengths = torch.zeros(1, dtype=torch.int64, device=x.device)
            state = None if state is None else type(state)(*(part.new_zeros(1, *part.shape[1:]) for part in state))
            y, state = self._mix(x, state, lengths)
            return y[:0], None if state is None else type(state)(*(part[:0] for part in state))
        y, state = self.mix(zero_padding(x, lengths), state, lengths)
        return zero_padding(y, lengths), state

    def over_time(self, operation: Callable[..., Any], values: Tensor, *gates: Tensor) -> Any:
        """`operation(values, *gates)`, the one call in `mix` that moves anything from one position to another.

        Args:
            operation: linear in `values`, multiplied by `gates`; gives outputs [B, T, ...], or a tuple that begins
                with them. It takes values of any last size, unless the block `convolves`.
            values: [B, T, E], or [B, T, H, E] with heads.
            gates: shaped as the outputs.
        """
        if self._observer is not None:
            self._observer(operation, values, *gates)
        return operation(values, *gates)

    @contextmanager
    def observed(self, observer: Callable[..., None]) -> Iterator[None]:
        """Within it, `observer` is given what `over_time` is, before it runs."""
        self._observer = observer
        try:
            yield
        finally:
            self._observer = None

    def metrics(self) -> dict[str, float]:
        """Figures of the block's own worth logging."""
        return {}

    def upgrade(self, weights: dict[str, Any], prefix: str) -> None:
        """Renames what earlier versions saved under other names, in a state dict that has this block at `prefix`."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        self.upgrade(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def _require_causal(self, what: str) -> None:
        if not self.causal:
            raise ValueError(f"{type(self).__name__}: {what} needs a causal block; valid: causal=True")

    def _state_options(
        self, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> tuple[torch.device | str | None, torch.dtype]:
        """What `initial_state` was given, or else the device and dtype of the parameters."""
        self._require_causal("initial_state")
        own = next((parameter for parameter in self.parameters() if parameter.is_floating_point()), None)
        if own is None:  # layers are quantised
            return device, dtype or torch.get_default_dtype()
        return own.device if device is None else device, dtype or own.dtype

    def _check(self, x: Tensor, lengths: Tensor | None) -> Tensor | None:
        name = type(self).__name__
        if x.dim() != 3 or x.shape[-1] != self.d_model or x.shape[1] == 0:
            raise ValueError(f"{name} takes [batch, time of 1 or more, {self.d_model}], got {list(x.shape)}")
        return check_lengths(name, lengths, x.shape[0], x.shape[1])


def head_dim(block: str, d_model: int, num_heads: int) -> int:
    """d_model / num_heads.

    Raises:
        ValueError: the heads do not divide the width.
    """
    if not 1 <= num_heads <= d_model or d_model % num_heads:
        divisors = [n for n in range(1, d_model + 1) if d_model % n == 0]
        raise ValueError(f"{block}: num_heads={num_heads} does not divide d_model={d_model}; valid: {divisors}")
    return d_model // num_heads


def upgraded(module: nn.Module, weights: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict of `module` that any version may have saved, by the names of this one. Loading does so by itself."""
    named = dict(weights)
    for name, block in module.named_modules():
        if isinstance(block, Block):
            block.upgrade(named, f"{name}." if name else "")
    return named


def advance(position: Tensor, x: Tensor, lengths: Tensor | None) -> Tensor:
    """Where sequences stand after the steps of `x` [B, T, ...], or as many of them as `lengths` says."""
    return position + (x.shape[1] if lengths is None else lengths)


def grow(cache: Tensor, new: Tensor, position: Tensor) -> Tensor:
    """Writes `new` [B, T, ...] behind the first `position` entries of each sequence of `cache` [B, N, ...].

    Returns [B, N + T, ...] in the cache's dtype; what lies behind the new entries has no meaning.
    """
    slot = position[:, None] + torch.arange(new.shape[1], device=new.device)  # [B, T]
    slot = slot.reshape(slot.shape + (1,) * (new.dim() - 2)).expand_as(new)
    room = torch.zeros_like(new, dtype=cache.dtype)
    return torch.cat([cache, room], 1).scatter(1, slot, new.to(cache.dtype))
