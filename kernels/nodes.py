"""Forms of an operation as one node: of an exported graph, and to torch.vmap.

What cuts time into chunks asks a length how many it has, and in a graph for any length there is no answer; and to other
formats the name of an operation says more than hundreds of products. So what is exported has one operator there, which
runs the form as it is, and to which a mapped dimension is so much more batch. Compiled graphs have the form itself, for
their compiler to fuse.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef, custom_op, infer_schema

from .derivatives import mapped

NAMESPACE = "seqzoo_nodes"  # beside seqzoo::<name>, which those run
Form = Callable[..., tuple[Tensor, ...]]


def exporting() -> bool:
    """Whether a graph is made that is to run without this Python code: by torch.export or torch.jit.trace."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def as_one() -> bool:
    """Whether an operation is to be a node here."""
    return exporting() or mapped()


def or_as_one(form: Callable[..., Any], node: Callable[..., Any]) -> Callable[..., Any]:
    """`form`, or `node` where an operation is to be one."""
    return lambda *arguments, **options: (node if as_one() else form)(*arguments, **options)


def as_node(name: str, form: Form, empty: Form, shared: Mapping[str, int]) -> CustomOpDef:
    """`form` as the operator seqzoo_nodes::<name>, with a first derivative, for which it runs again.

    Args:
        form: of annotated tensors, None among them, and numbers, to tensors.
        empty: from the same arguments, outputs of the same shapes and dtypes, of any value.
        shared: names of those that have no batch in front, where they are tensors of so many dimensions at most.
    """
    schema = infer_schema(form, mutates_args=())
    forward = custom_op(
        f"{NAMESPACE}::{name}", lambda *given: _by_themselves(form(*given), given), mutates_args=(), schema=schema
    )
    forward.register_fake(empty)
    names = [argument.name for argument in forward._opoverload._schema.arguments]
    forward.register_vmap(partial(_folded, forward, [shared.get(name, 0) for name in names], names.index("starts")))
    arguments = schema.partition(" -> ")[0]
    backward = custom_op(
        f"{NAMESPACE}::{name}_backward",
        lambda cotangents, *given: _gradients(form, cotangents, given),
        mutates_args=(),
        schema=f"(Tensor[] cotangents, {arguments[1:]} -> Tensor[]",
    )
    backward.register_fake(lambda cotangents, *given: [x.new_empty(x.shape) for x in given if _continuous(x)])

    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*(y for y in output if not _continuous(y)))
        ctx.numbers = [None if isinstance(x, Tensor) else x for x in inputs]
        ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in inputs))

    def gradient(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        given = [y if x is None else x for x, y in zip(ctx.saved_tensors, ctx.numbers, strict=True)]
        found = iter(backward(list(cotangents), *given))
        return tuple(next(found) if _continuous(x) else None for x in given)

    forward.register_autograd(gradient, setup_context=keep)
    return forward


def _folded(
    operator: CustomOpDef, shared: Sequence[int], starts: int, info: Any, dims: tuple[int | None, ...], *given: Any
) -> tuple[Any, Any]:
    """The operator over a mapped dimension, as part of its batch; over one at a time where what is shared is mapped, or
    where documents are the batch."""
    V = info.batch_size
    single = given[starts] is not None
    for x, dim, rank in zip(given, dims, shared, strict=True):
        single |= dim is not None and x.dim() - 1 <= rank
    if single:
        each = [
            operator(*(x if dim is None else x.select(dim, i) for x, dim in zip(given, dims, strict=True)))
            for i in range(V)
        ]
        made = tuple(torch.stack(y) for y in zip(*each, strict=True))
    else:
        folded = []
        for x, dim, rank in zip(given, dims, shared, strict=True):
            if isinstance(x, Tensor) and (dim is not None or x.dim() > rank):
                x = x.expand(V, *x.shape) if dim is None else x.movedim(dim, 0)
                x = x.flatten(0, 1)
            folded.append(x)
        made = tuple(y.unflatten(0, (V, len(y) // max(V, 1))) for y in operator(*folded))
    return made, (0,) * len(made)


def _by_themselves(outputs: Sequence[Tensor], given: Sequence[Any]) -> tuple[Tensor, ...]:
    """In memory of their own, as those of operators have to be."""
    taken, made = {x.untyped_storage().data_ptr() for x in given if isinstance(x, Tensor)}, []
    for y in outputs:
        y = y.clone() if y.untyped_storage().data_ptr() in taken else y
        taken.add(y.untyped_storage().data_ptr())
        made.append(y)
    return tuple(made)


def _continuous(x: Any) -> bool:
    return isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())


def _gradients(form: Form, cotangents: Sequence[Tensor], given: Sequence[Any]) -> list[Tensor]:
    """Of each tensor that can have one."""
    keys, excluded = torch._C.DispatchKey, torch._C._SetExcludeDispatchKeyGuard
    # Inside an operator PyTorch records nothing, unless it is told to.
    with excluded(keys.AutogradFunctionality, False), excluded(keys.ADInplaceOrView, False), torch.enable_grad():
        uses = [x.detach().requires_grad_() if _continuous(x) else x for x in given]
        leaves = [x for x in uses if _continuous(x)]
        pairs = [(y, dy) for y, dy in zip(form(*uses), cotangents, strict=True) if y.requires_grad]
        ends, weights = zip(*pairs, strict=True)
        found = torch.autograd.grad(ends, leaves, weights, allow_unused=True, materialize_grads=True)
    return [dx.contiguous() for dx in found]
