"""Derivatives beyond the first, and in forward mode, of gradients that are written out by hand.

Such a gradient computes with what its forward pass kept, which to PyTorch are constants, or in a kernel, which it does
not see into: a second derivative through either would be wrong without a word, and a tangent zero. So each has a plain
PyTorch form beside it. That one runs where a second derivative is really asked for, on inputs that were kept anyway,
and takes the place of the fast one inside forward mode.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack
from torch.autograd import forward_ad
from torch.library import CustomOpDef


def forward_mode() -> bool:
    """Whether tensors may carry tangents here: in torch.func.jvp and torch.autograd.forward_ad, outside of graphs."""
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0


def by_hand() -> bool:
    """Whether an `autograd.Function` may stand in for operations here: not in forward mode or other transforms of
    functions, which it knows no rule of, nor in graphs, where compilers do what it would, or in a trace."""
    return not (torch.compiler.is_compiling() or torch.jit.is_tracing() or transformed())


def transformed() -> bool:
    """Whether a transform of functions is at work here, forward mode among them, outside of graphs: registered
    operators know no rule of it."""
    return forward_mode() or (not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active())


def mapped() -> bool:
    """Whether torch.vmap is at work here, and no other transform of functions."""
    if forward_mode() or not transformed():
        return False
    return all(level.key() == TransformType.Vmap for level in get_interpreter_stack())


def differentiable_twice(*tensors: Tensor) -> bool:
    """Whether a second derivative may be asked for: of a gradient that torch.func makes, by itself or by autograd."""
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return False
    levels = sum(level.key() == TransformType.Grad for level in get_interpreter_stack())
    return levels > 1 or (levels == 1 and any(_unwrapped(x).requires_grad for x in tensors))


def _unwrapped(x: Tensor) -> Tensor:
    """As it is outside of transforms of functions."""
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x


def gradient(
    written: Callable[[], Sequence[Tensor | None]],
    form: Callable[..., Sequence[Tensor | None]],
    inputs: Sequence[Tensor | None],
    cotangents: Sequence[Tensor | None],
) -> Sequence[Tensor | None]:
    """The gradients of `inputs`, for the body of `torch.autograd.Function.backward`.

    Args:
        written: makes them by hand.
        form: makes the outputs from the inputs alone, in operations that PyTorch can differentiate.
        inputs: what the outputs depend on, None where there is no such input.
        cotangents: the gradient of each output.
    """
    n = len(inputs)

    def plain(*arguments: Tensor | None) -> Sequence[Tensor | None]:
        return pullback(form, arguments[:n], arguments[n:])

    if forward_mode():
        return plain(*inputs, *cotangents)
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return written()
    return _Differentiable.apply(written, plain, *inputs, *cotangents)


def pullback(
    form: Callable[..., Sequence[Tensor | None]], inputs: Sequence[Tensor | None], cotangents: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """The gradients that PyTorch makes of form(*inputs), None where an input is, and differentiable themselves."""
    with torch.enable_grad():
        # Of these very uses of the inputs, not of what else may lead from one input to another.
        uses = [None if x is None else x.view_as(x) if x.requires_grad else x.detach().requires_grad_() for x in inputs]
        gradients = _gradients(form(*uses), uses, cotangents, create_graph=True)
    return tuple(gradients)


def differentiable(operator: CustomOpDef, plain: Callable[..., Sequence[Tensor | None]]) -> Callable[..., Any]:
    """`operator`, a registered gradient, with the derivatives of `plain`.

    Args:
        operator: gives a tuple of tensors.
        plain: takes the same arguments and gives the same, or None where the operator gives something empty, in
            operations that PyTorch can differentiate.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        ctx.others = tuple(None if isinstance(x, Tensor) else x for x in inputs)
        ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in inputs))

    def gradient_of_gradient(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        arguments = [y if x is None else x for x, y in zip(ctx.saved_tensors, ctx.others, strict=True)]
        # What is as by default at the end of a call, PyTorch does not count.
        needed = *ctx.needs_input_grad, *(False,) * (len(arguments) - len(ctx.needs_input_grad))
        return _second(plain, arguments, needed, upstream)

    operator.register_autograd(gradient_of_gradient, setup_context=setup_context)
    return lambda *arguments: plain(*arguments) if forward_mode() else operator(*arguments)


class Outline(torch.autograd.Function):
    """A tensor's shape and place in the graph, without its values and their memory.

    What is kept for a gradient of the gradient must lead back to each input, and is not to hold it a second time.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.new_zeros(()).expand(x.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class _Differentiable(torch.autograd.Function):
    """A gradient made by hand, with the derivatives of the plain one."""

    @staticmethod
    def forward(ctx: Any, written: Any, plain: Any, *arguments: Any) -> Any:
        ctx.plain = plain
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*arguments)
        return tuple(written())

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, None, *_second(ctx.plain, ctx.saved_tensors, ctx.needs_input_grad[2:], upstream)


def _second(
    plain: Callable[..., Sequence[Tensor | None]],
    arguments: Sequence[Any],
    needed: Sequence[bool],
    upstream: Sequence[Tensor | None],
) -> tuple[Tensor | None, ...]:
    """The gradients of the `arguments` that are `needed`, given those of what plain(*arguments) returns."""
    with torch.enable_grad():
        uses = [x.view_as(x) if need else x for x, need in zip(arguments, needed, strict=True)]
        outputs = plain(*uses)
    wanted = [x if need else None for x, need in zip(uses, needed, strict=True)]
    return tuple(_gradients(outputs, wanted, upstream, create_graph=torch.is_grad_enabled()))


def _gradients(
    outputs: Sequence[Tensor | None],
    inputs: Sequence[Tensor | None],
    cotangents: Sequence[Tensor | None],
    *,
    create_graph: bool,
) -> list[Tensor | None]:
    pairs = [
        (y, w) for y, w in zip(outputs, cotangents, strict=True) if y is not None and w is not None and y.requires_grad
    ]
    wanted = [x for x in inputs if x is not None]
    if not pairs or not wanted:
        return [None] * len(inputs)
    ends, weights = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(ends, wanted, weights, create_graph=create_graph, allow_unused=True))
    return [None if x is None else next(found) for x in inputs]
