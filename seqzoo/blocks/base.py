"""The interface of every sequence mixer, and the two functions through which training reaches inside one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from ..kernels.common import zero_padding


class State(Protocol):
    """What a causal block remembers: a NamedTuple of tensors, batch first."""

    @property
    def position(self) -> Tensor:
        """int64 [B], how many steps each sequence has taken."""


class Block(nn.Module, ABC):
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

    def __init__(self, d_model: int, *, causal: bool) -> None:
        super().__init__()
        self.d_model = d_model
        self.causal = causal
        self._auxiliary: Tensor | None = None
        self._observer: Callable[..., None] | None = None

    @abstractmethod
    def mix(self, x: Tensor, state: Any, lengths: Tensor | None) -> tuple[Tensor, Any]:
        """Outputs for `x` [B, T, d_model], zero past `lengths`, that follow `state`; and the state after them.

        Without a state, the sequences begin, and what is returned for it has no meaning.
        """

    def initial_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Any:
        """The state of `batch_size` sequences of which nothing has been seen.

        Raises:
            ValueError: the block is bidirectional.
        """
        raise NotImplementedError

    def forward(self, x: Tensor, *, lengths: Tensor | None = None) -> Tensor:
        """Mixes `x` [B, T, d_model] over time. `lengths` int64 [B]: outputs past them are zero, inputs have no effect.

        Raises:
            ValueError: `x` is not [B, T, d_model].
        """
        self._check(x)
        y, _ = self.mix(zero_padding(x, lengths), None, lengths)
        return zero_padding(y, lengths)

    def extend(self, x: Tensor, state: Any, *, lengths: Tensor | None = None) -> tuple[Tensor, Any]:
        """Mixes the next T steps of sequences that stand at `state`: outputs [B, T, d_model] and the new state.

        With `lengths`, each sequence takes as many of the T steps.

        Raises:
            ValueError: the block is bidirectional, or `x` is not [B, T, d_model].
        """
        self._require_causal("extend")
        self._check(x)
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

    def after_step(self) -> None:
        """What the block does once an optimiser step is taken."""

    def recording(self) -> bool:
        """Whether this forward pass is one to learn from: training, with gradients, not a recomputation in backward."""
        if not (self.training and torch.is_grad_enabled()):
            return False
        return torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1

    def _require_causal(self, what: str) -> None:
        if not self.causal:
            raise ValueError(f"{type(self).__name__}: {what} needs a causal block; valid: causal=True")

    def _check(self, x: Tensor) -> None:
        if x.dim() != 3 or x.shape[-1] != self.d_model or x.shape[1] == 0:
            raise ValueError(
                f"{type(self).__name__} takes [batch, time of 1 or more, {self.d_model}], got {list(x.shape)}"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_auxiliary": None}


def head_dim(block: str, d_model: int, num_heads: int) -> int:
    """d_model / num_heads.

    Raises:
        ValueError: the heads do not divide the width.
    """
    if not 1 <= num_heads <= d_model or d_model % num_heads:
        divisors = [n for n in range(1, d_model + 1) if d_model % n == 0]
        raise ValueError(f"{block}: num_heads={num_heads} does not divide d_model={d_model}; valid: {divisors}")
    return d_model // num_heads


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


def auxiliary_loss(module: nn.Module) -> Tensor:
    """The sum of the losses that blocks inside `module` have of their own in the last forward pass, a scalar.

    Zero if there are none. Reading clears them, so that no loss is counted twice.
    """
    total = torch.zeros(())
    for block in module.modules():
        if isinstance(block, Block) and block._auxiliary is not None:
            total = block._auxiliary + total  # the first is on the CPU; as a scalar it is not copied
            block._auxiliary = None
    return total


def after_step(module: nn.Module) -> None:
    """Lets every block inside `module` apply what it gathered since the last optimiser step (codebooks, features).

    A block none of whose parameters is trained stays as it is. Call it after each `optimizer.step()`; under
    torch.distributed on every rank.
    """
    for block in module.modules():
        if isinstance(block, Block) and any(parameter.requires_grad for parameter in block.parameters()):
            block.after_step()
