"""Whether a block computes what the attention layer computed whose weights it has."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks import Block
from ..blocks.modes import evaluating

STEPS = 6
NEAR = {torch.float64: 1e-4, torch.float32: 1e-4}  # relative; of other dtypes:
NEAR_IN_HALF = 5e-2


def difference(old: nn.Module, block: Block, model: nn.Module) -> str:
    """How far the outputs of `block` lie from those of `old`, in words; empty: they are the same but for rounding.

    Both are given random inputs for which queries are of size one, so that what scales, clips, turns or norms them
    shows.

    Args:
        old: attention with queries, keys and values.
        block: `SoftmaxAttention`, of the same width, on the same device.
        model: that `old` is in; its rotary embedding is asked for positions.
    """
    weight = next(block.parameters())
    if weight.is_meta:
        return "no weights to compare outputs by"
    x = torch.randn(1, STEPS, block.d_model, generator=torch.Generator().manual_seed(0))
    x = x.to(weight.device, weight.dtype)
    with torch.no_grad(), evaluating(old), evaluating(block), _written_out(old):
        queries = block.qkv_proj(x)[..., : block.d_model]  # type: ignore[operator]
        x = x / queries.float().square().mean().sqrt().clamp(min=1e-6).to(x.dtype)
        try:
            there = _outputs(old, x, causal=block.causal, model=model)
        except Exception as error:  # a layer's own, of any kind
            return f"outputs were not compared: {type(error).__name__}"
        here = block(x)
    if there.shape != here.shape:
        return f"outputs are {list(there.shape)} there and {list(here.shape)} here"
    off = ((here - there).float().norm() / there.float().norm().clamp(min=1e-6)).item()
    return "" if off <= NEAR.get(x.dtype, NEAR_IN_HALF) else f"outputs differ by {off:.2g} of their size"


@contextmanager
def _written_out(old: nn.Module) -> Iterator[None]:
    """Within it a layer of transformers takes masks of numbers, whatever it calls otherwise."""
    config = getattr(old, "config", None)
    before = getattr(config, "_attn_implementation", None)
    if before is None:
        yield
        return
    config._attn_implementation = "eager"  # type: ignore[union-attr]
    try:
        yield
    finally:
        config._attn_implementation = before  # type: ignore[union-attr]


def _outputs(old: nn.Module, x: Tensor, *, causal: bool, model: nn.Module) -> Tensor:
    hidden = torch.ones(STEPS, STEPS, dtype=torch.bool, device=x.device).triu(1) if causal else None
    if isinstance(old, nn.MultiheadAttention):
        return old(x, x, x, attn_mask=hidden, need_weights=False)[0]
    taken = inspect.signature(old.forward).parameters
    asked: dict[str, Any] = {}
    if "position_embeddings" in taken:
        rotary = next(each for name, each in model.named_modules() if name.rpartition(".")[2] == "rotary_emb")
        asked["position_embeddings"] = rotary(x, torch.arange(STEPS, device=x.device)[None])
    if "attention_mask" in taken:
        mask = None if hidden is None else torch.zeros_like(hidden, dtype=x.dtype).masked_fill(hidden, float("-inf"))
        asked["attention_mask"] = None if mask is None else mask[None, None]
    found = old(x, **asked)
    return found[0] if isinstance(found, tuple) else found
