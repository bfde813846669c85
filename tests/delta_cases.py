"""Calls of delta_rule."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from seqzoo.kernels import delta_rule
from seqzoo.kernels.delta_rule import chunked

NAMES = ("q", "k", "v", "beta", "log_decay", "erase", "initial_state")
TIMED = ("o", *NAMES[:6], *(f"d{name}" for name in NAMES[:6]))
DECAYS = ("none", "head", "channel")
FORMS = ("loop", "chunks")  # of `backend="chunked"`: on a CPU, and on other devices


@contextmanager
def computed(form: str) -> Iterator[None]:
    """Inside, `form` is that of tensors on a CPU."""
    with ExitStack() as stack:
        for operator in (chunked._forward, chunked._backward) if form == "chunks" else ():
            stack.enter_context(operator.set_kernel_enabled("cpu", False))
        yield


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def make(B, T, H, Dk, Dv, *, G=None, decay="none", scale=0.3, erase=False, state=False, dtype=torch.float64, seed=0):
    """Inputs by name, those there are: keys of length 1 and beta of 0 to 2."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    q, k, v = randn(B, T, G or H, Dk) / Dk**0.5, unit(randn(B, T, G or H, Dk)), randn(B, T, H, Dv)
    beta = 2 * randn(B, T, H).sigmoid()
    g = {"none": None, "head": randn(B, T, H), "channel": randn(B, T, H, Dk)}[decay]
    g = None if g is None else -scale * g.abs()
    r = unit(randn(B, T, H, Dk)) * randn(B, T, H, 1).sigmoid() if erase else None
    S = randn(B, H, Dk, Dv) if state else None
    inputs = dict(zip(NAMES, (q, k, v, beta, g, r, S), strict=True))
    return {name: x.to(dtype) for name, x in inputs.items() if x is not None}


def run(inputs: dict[str, Tensor], w: Tensor, w_state: Tensor | None = None, **options) -> dict[str, Tensor]:
    """The output, the final state if there is a w_state, and the gradient of each input."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    outputs = delta_rule(**leaves, output_final_state=w_state is not None, **options)
    outputs, weights = ((outputs,), (w,)) if w_state is None else (outputs, (w, w_state))
    gradients = torch.autograd.grad(outputs, list(leaves.values()), weights)
    return dict(zip(("o", "state"), outputs, strict=False)) | dict(
        zip((f"d{name}" for name in leaves), gradients, strict=True)
    )


def weights(inputs, rows=None):
    """Of the output, and of the final state of `rows` sequences."""
    v, k = inputs["v"], inputs["k"]
    state = torch.randn(rows or len(v), v.shape[2], k.shape[3], v.shape[3], dtype=v.dtype)
    return torch.randn(v.shape, dtype=v.dtype), state


def wide(inputs):
    return {name: x.double() for name, x in inputs.items()}
