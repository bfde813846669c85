"""The interface of every sequence mixer."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypedDict, Unpack, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.common import check_lengths, zero_padding
from ..kernels.documents import Documents, check_documents
from .learning import Learning
from .masks import check_attn_mask, check_padding
from .parts import Part
from .states import Held, State


class Steps(TypedDict, total=False):
    """Which steps count, for a type checker: see `Block.forward`."""

    lengths: Tensor | None
    cu_seqlens: Tensor | None
    key_padding_mask: Tensor | None
    attention_mask: Tensor | None
    attn_mask: Tensor | None
    is_causal: bool | None


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

    by_depth: ClassVar[str | None] = None
    """An option that a model sets to l / L for layer l = 0, 1, ... of L, where it is not told otherwise."""

    grows: ClassVar[bool]
    """Whether its state can, so that `initial_state` takes a `max_length` to have room for."""

    _packs: ClassVar[bool]  # whether `mix` takes documents
    _parts: ClassVar[bool]  # whether it takes a part of the time
    _options: dict[str, Any]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.grows = "max_length" in inspect.signature(cls.initial_state).parameters
        taken = inspect.signature(cls.mix).parameters
        cls._packs, cls._parts = "documents" in taken, "part" in taken

    def __new__(cls, *arguments: Any, **options: Any) -> Self:
        block = super().__new__(cls)
        try:
            bound = inspect.signature(cls.__init__).bind(block, *arguments, **options)
        except TypeError:  # a copy, which takes its options from the original; or a call that __init__ will refuse
            return block
        bound.apply_defaults()
        _, *given = bound.signature.parameters.values()
        recorded: dict[str, Any] = {}
        block.__dict__["_options"] = recorded
        for parameter in given:
            value = bound.arguments[parameter.name]
            recorded |= value if parameter.kind is parameter.VAR_KEYWORD else {parameter.name: value}
        return block

    def __init__(self, d_model: int, *, causal: bool) -> None:
        super().__init__()
        self.d_model = d_model
        self.causal = causal
        self._observer: Callable[..., None] | None = None

    @property
    def options(self) -> dict[str, Any]:
        """What the block was built with, width, direction and defaults included: `build_block(name, **block.options)`
        builds another of its kind."""
        return dict(self._options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self._options.items())

    @abstractmethod
    def mix(self, x: Tensor, state: Any, lengths: Tensor | None, *where: Any, **named: Any) -> tuple[Tensor, Any]:
        """Outputs for `x` [B, T, d_model], zero past `lengths`, that follow `state`; and the state after them.

        With `documents`, B is 1 and there are no lengths: each document is a sequence of its own, and states have a row
        for each. With `part`, `x` and `lengths` are those of this rank's part of the time, and there is no state. Both
        are given only where there are any, so that a block may do without; it then refuses them.

        Without a state, the sequences begin, and what is returned for it has no meaning.
        """

    def initial_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Any:
        """The state of `batch_size` sequences of which nothing has been seen, by default as parameters are kept.

        Raises:
            ValueError: the block is bidirectional.
            NotImplementedError: the class has none.
        """
        self._require_causal("initial_state")
        raise NotImplementedError(f"{type(self).__name__} has no initial_state, so it cannot be continued; write one")

    def forward(
        self,
        x: Tensor,
        *,
        lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool | None = None,
        state: Any = None,
        part: Part | None = None,
    ) -> Any:
        """Mixes `x` over time.

        At most one of `lengths`, `cu_seqlens` and the masks of padding says which steps count. Outputs at all others
        are zero, and inputs there do nothing. Values are looked at on a CPU, outside compiled graphs; elsewhere they
        are trusted.

        Args:
            x: [B, T, d_model].
            lengths: integers [B], how many steps of each sequence count, from the first on.
            cu_seqlens: int32 or int64 [N + 1], with B = 1: where each of N documents begins that lie one behind the
                other in the T steps, and T. Each is a sequence of its own, and may be empty.
            key_padding_mask: PyTorch's, bool [B, T], true where a step is padding: in front of a sequence, behind it or
                both.
            attention_mask: that of transformers, [B, T], 1 where a step counts and 0 where it is padding, likewise.
            attn_mask, is_causal: what PyTorch and timm give to any attention. They must say what the block is: no mask,
                or the causal one.
            state: what `extend` continues. It calls the module with it, so that hooks see its steps as they do others.
            part: `x` and the outputs are of these steps of sequences, whose others are on other ranks that call this
                too; `lengths` are those of whole sequences.

        Returns:
            [B, T, d_model]; with a state, that and the state after it.

        Raises:
            ValueError: `x` is not [B, T, d_model]; more than one says which steps count, or in a way that is not valid;
                there is padding between steps that count, or another mask than the block's; or the block cannot be
                given parts of the time.
        """
        self._check(x)
        if part is not None:
            self._check_part(part, x, cu_seqlens, key_padding_mask, attention_mask, attn_mask)
            lengths = part.lengths(check_lengths(type(self).__name__, lengths, len(x), part.T))
            return self._mix(x, None, lengths, None, part)[0]
        check_attn_mask(type(self).__name__, self.causal, attn_mask, is_causal, x.shape[1])
        state = Held.of(state)
        if state is not None:
            self._require_causal("a state")
            if not isinstance(getattr(state, "position", None), Tensor):
                raise ValueError(
                    f"{type(self).__name__}: a state is what initial_state or extend gave, or None to begin, "
                    f"got {type(state).__name__}"
                )
        y, after = self._run(x, state, lengths, cu_seqlens, key_padding_mask, attention_mask)
        return y if state is None else (y, after)

    if TYPE_CHECKING:

        @overload
        def __call__(
            self, x: Tensor, *, state: None = None, part: Part | None = None, **steps: Unpack[Steps]
        ) -> Tensor: ...
        @overload
        def __call__(self, x: Tensor, *, state: State | Held, **steps: Unpack[Steps]) -> tuple[Tensor, Any]: ...
        def __call__(self, x: Tensor, **steps: Any) -> Any: ...

    def extend(
        self,
        x: Tensor,
        state: Any,
        *,
        lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Any]:
        """Mixes the next T steps of sequences that stand at `state`: outputs [B, T, d_model] and the new state.

        Where `state` is None, sequences begin. Each takes as many of the T steps as count, by `lengths`, `cu_seqlens`
        or a mask as in `forward`. The documents of a row have a state of N sequences. `state` stays what it was; but
        caches of keys are written into, and copied where an older state, or a fork, is continued.

        Raises:
            ValueError: the block is bidirectional, the state is of another number of sequences, or as in `forward`.
        """
        self._require_causal("extend")
        if state is None:
            self._check(x)
            documents = check_documents(type(self).__name__, cu_seqlens, lengths, *x.shape[:2])
            state = self.initial_state(x.shape[0] if documents is None else documents.N, device=x.device)
        return self(
            x,
            lengths=lengths,
            cu_seqlens=cu_seqlens,
            key_padding_mask=key_padding_mask,
            attention_mask=attention_mask,
            state=Held(state),
        )

    def _run(
        self,
        x: Tensor,
        state: Any,
        lengths: Tensor | None,
        cu_seqlens: Tensor | None,
        key_padding_mask: Tensor | None,
        attention_mask: Tensor | None,
    ) -> tuple[Tensor, Any]:
        """`mix` of what was checked."""
        name, (B, T, _) = type(self).__name__, x.shape
        padding = check_padding(name, key_padding_mask, attention_mask, B, T)
        if padding is not None and not (lengths is None and cu_seqlens is None):
            raise ValueError(f"{name}: got a mask, and lengths or cu_seqlens; valid: one of them")
        documents = check_documents(name, cu_seqlens, lengths, B, T)
        if documents is not None and not self._packs:
            raise ValueError(
                f"{name} knows no documents in one row; valid: lengths or a mask in place of cu_seqlens, or a `mix` "
                "that takes documents"
            )
        sequences = B if documents is None else documents.N
        if state is not None and len(state.position) != sequences:
            given = f"x of {sequences}" if documents is None else f"{sequences} documents"
            raise ValueError(
                f"{name}: a state of {len(state.position)} sequences for {given}; "
                "valid: a state of as many, or None to begin"
            )
        if padding is None:
            return self._mix(x, state, check_lengths(name, lengths, B, T), documents)
        y, state = self._mix(padding.moved_behind(x), state, check_lengths(name, padding.lengths, B, T), None)
        return padding.moved_back(y), state

    def _mix(
        self, x: Tensor, state: Any, lengths: Tensor | None, documents: Documents | None, part: Part | None = None
    ) -> tuple[Tensor, Any]:
        """`mix`, with zeros for padding before and after."""
        if documents is not None:
            return self.mix(x, state, None, documents)
        if part is not None:
            y, _ = self.mix(zero_padding(x, lengths), None, lengths, None, part)
            return zero_padding(y, lengths), None
        if x.shape[0] == 0:  # operations reshape, and nothing has no shape: a sequence without a step stands in
            x = F.pad(x, (0, 0, 0, 0, 0, 1))
            lengths = torch.zeros(1, dtype=torch.int64, device=x.device)
            state = None if state is None else type(state)(*(x.new_zeros(1, *x.shape[1:]) for x in state))
            y, state = self._mix(x, state, lengths, None)
            return y[:0], None if state is None else type(state)(*(x[:0] for x in state))
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
        """What `initial_state` was given, or else as parameters are, those aside that stay in single precision."""
        self._require_causal("initial_state")
        floating = (parameter for parameter in self.parameters() if parameter.is_floating_point())
        own = min(floating, key=lambda parameter: parameter.dtype.itemsize, default=None)
        if own is None:  # layers are quantised
            return device, dtype or torch.get_default_dtype()
        return own.device if device is None else device, dtype or own.dtype

    def require_parts(self) -> None:
        """Raises ValueError where the block cannot be given parts of the time."""
        if not self._parts:
            raise ValueError(
                f"{type(self).__name__} cannot be given parts of the time, as its `mix` takes none; valid: whole "
                "sequences on each rank, or a block whose memory is a recurrence, such as linear_attention, lru, s4d, "
                "retnet, mamba2 or gated_delta_net"
            )

    def _check_part(self, part: Part, x: Tensor, *others: Tensor | None) -> None:
        self.require_parts()
        name = type(self).__name__
        if any(other is not None for other in others):
            raise ValueError(f"{name}: got a part of the time, and a mask or cu_seqlens; valid with it: lengths")
        if x.shape[1] != part.stop - part.start:
            raise ValueError(
                f"{name}: x has {x.shape[1]} steps; valid: part.own(x) of all {part.T}, which has the "
                f"{part.stop - part.start} from {part.start} on"
            )

    def _check(self, x: Tensor) -> None:
        if x.dim() != 3 or x.shape[-1] != self.d_model or x.shape[1] == 0:
            raise ValueError(
                f"{type(self).__name__} takes [batch, time of 1 or more, {self.d_model}], got {list(x.shape)}"
            )


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


def places(x: Tensor, state: Any, documents: Documents | None = None, part: Part | None = None) -> Tensor:
    """How many steps its sequence takes ahead of each step of `x` [B, T, ...]: int64 [T], or [B, T] with a state."""
    T, device = x.shape[1], x.device
    if T == 1 and documents is None and state is not None:
        return state.position[:, None]
    place = torch.arange(T, device=device) if documents is None else documents.positions()
    if part is not None:
        return place + part.start
    if state is None:
        return place
    return place + (state.position[:, None] if documents is None else state.position[documents.of_steps()][None])


def advance(position: Tensor, x: Tensor, lengths: Tensor | None, documents: Documents | None = None) -> Tensor:
    """Where sequences stand after the steps of `x` [B, T, ...], or as many of them as `lengths` or `documents` say."""
    if documents is not None:
        return position + documents.lengths
    return position + (x.shape[1] if lengths is None else lengths)


def last_steps(x: Tensor, before: Tensor, lengths: Tensor | None, documents: Documents | None) -> Tensor:
    """What the last step of each sequence, or document, has of `x` [B, T, ...], or `before` [B, ...] where there is
    none, in the dtype of that."""
    if documents is not None:
        steps, last = documents.lengths, x[0, (documents.starts[1:] - 1).clamp(min=0)]
    elif lengths is not None:
        steps, last = lengths, x[torch.arange(len(x), device=x.device), (lengths - 1).clamp(min=0)]
    else:
        return x[:, -1].to(before.dtype)
    return torch.where((steps > 0).reshape(-1, *[1] * (before.dim() - 1)), last.to(before.dtype), before)
