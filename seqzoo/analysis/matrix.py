"""The matrix that maps values to outputs, of any block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks import Block
from ..blocks.masks import check_padding
from ..blocks.modes import evaluating
from ..blocks.states import Held
from ..kernels.common import accumulation_dtype, valid_positions, zero_padding

CHANNELS = 16  # of an input, tried at a time: what bounds memory


def mixing_matrices(module: nn.Module, *inputs: Any, **options: Any) -> dict[str, Tensor]:
    """The mixing matrix of every block inside any module, when the module is given `inputs` and `options`.

    The module is run once, in evaluation mode, and each block then on what it was given, padding included, which may
    stand on either side. See `mixing_matrix`.

    Returns:
        [B, H, T, T] by the block's path in the module ("" where it is itself the block); calls of it after the first
        are named "<path>#2" and so on.

    Raises:
        ValueError: there is no block inside; or a block was given documents in one row, a part of the time or a state.
    """
    blocks = {path: each for path, each in module.named_modules() if isinstance(each, Block)}
    if not blocks:
        raise ValueError(f"{type(module).__name__} has no block inside; valid: a module with a seqzoo.Block in it")
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
    hooks = [
        block.register_forward_pre_hook(
            lambda _, arguments, given, path=path: calls.append((path, arguments, given)), with_kwargs=True
        )
        for path, block in blocks.items()
    ]
    try:
        with evaluating(module), torch.no_grad():
            module(*inputs, **options)
    finally:
        for hook in hooks:
            hook.remove()
    found: dict[str, Tensor] = {}
    with evaluating(module):
        for path, arguments, given in calls:
            number = sum(name.partition("#")[0] == path for name in found) + 1
            found[path if number == 1 else f"{path}#{number}"] = _of_call(blocks[path], *arguments, **given)
    return found


def _of_call(
    block: Block,
    x: Tensor,
    *,
    lengths: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    attention_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool | None = None,
    state: Any = None,
    **others: Any,
) -> Tensor:
    if (held := Held.of(state)) is not None and held.position.any():
        raise ValueError(
            f"{type(block).__name__} was given a state with steps in it; valid: sequences from their beginning, which "
            "use_cache=False gives in transformers"
        )
    if refused := [name for name, value in others.items() if value is not None]:
        raise ValueError(
            f"{type(block).__name__} was given {', '.join(refused)}; valid: padded sequences from their beginning"
        )
    padding = check_padding(type(block).__name__, key_padding_mask, attention_mask, *x.shape[:2])
    if padding is None:
        return mixing_matrix(block, x, lengths)
    weights = mixing_matrix(block, padding.moved_behind(x), padding.lengths)
    for _ in range(2):  # outputs, then inputs
        weights = padding.moved_back(weights.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).mT
    return weights


def mixing_matrix(block: Block, x: Tensor, lengths: Tensor | None = None, *, grad: bool = False) -> Tensor:
    """How much of each position's value every position's output holds, when `block` is given `x`.

    Between a block's projections stands an operation that is linear in the values v: y_t = Σ_s J[t, s] v_s, J[t, s] a
    matrix over the E channels of a head. It takes in all that acts over time and nothing else: queries, keys, codes,
    decays and normalisers are those of `x`; projections, gates, norms of the output and the skip D∘x are left out. The
    operation itself is run, as `block` runs it on `x`, on values of 1 at one position and 0 at the others.

    - Attention of every kind gives all channels of a head the same weight: J[t, s] = A[t, s] I, and A is returned.
      Signs are kept. Softmax, normalised linear, Performer and VQ attention: rows sum to one. GAU: the part inside a
      chunk and the linear part over all chunks together, before the gate u; the linear part can be negative.
    - Of blocks that convolve, v is the input x and J[t, s] no multiple of I: diagonal for S4D, Re(C diag(λ^(t-s)) γ B)
      for LRU. What is returned is the gain √(Σ_r ‖J[t, s] x_r‖² / Σ_r ‖x_r‖²) over all inputs x_r of the call: how long
      what reaches t is, relative to what left s, for inputs that point where these do. It is what |A| is where J is
      A I. Directions that inputs never take would hide the others: those of pixels are few. Both directions of time of
      a bidirectional block are in it, added where t = s.

    Args:
        block: of any kind, causal or not.
        x: [B, T, d_model], the block's input.
        lengths: int64 [B]; rows and columns past them are zero.
        grad: keep the graph, for a loss on what is returned.

    Returns:
        [B, H, T, T] in x's dtype, output position before input position; H is 1 where a block has no heads.

    Raises:
        ValueError: `x` does not fit the block, or the block does not mix through `Block.over_time`.
    """
    with torch.set_grad_enabled(grad and torch.is_grad_enabled()):
        return _mixing_matrix(block, x, lengths)


def _mixing_matrix(block: Block, x: Tensor, lengths: Tensor | None) -> Tensor:
    if block.convolves:
        gain = _gain_by_lag(block, zero_padding(x, lengths))
        here = torch.arange(x.shape[1], device=x.device)
        weights = gain[here[:, None] - here + x.shape[1] - 1].expand(len(x), 1, -1, -1)
    else:
        weights = _observe(block, x, lengths, _on_unit_values)
    if lengths is None:
        return weights
    valid = valid_positions(lengths, x.shape[1])
    return torch.where(valid[:, None, :, None] & valid[:, None, None, :], weights, 0)


def _on_unit_values(operation: Callable[..., Any], values: Tensor, *gates: Tensor) -> Tensor:
    """The outputs for values that are 1 at position s in channel s, of all heads: [B, H, T, T]."""
    B, T, *heads, _ = values.shape
    basis = torch.eye(T, dtype=values.dtype, device=values.device).view(1, T, *[1] * len(heads), T)
    basis = basis.expand(B, T, *heads, T)
    y = operation(basis, *(torch.ones_like(basis) for _ in gates))
    return y.reshape(B, T, -1, T).transpose(1, 2)


def _gain_by_lag(block: Block, x: Tensor) -> Tensor:
    """The gain for inputs like `x` [B, T, D] by t - s, from 1 - T to T - 1: [2T - 1].

    Σ_r ‖J x_r‖² is a sum over the rows of any R with RᵀR = xᵀx, of which there are D and not B T; and what happens at
    every distance is in the responses to impulses at either end.
    """
    _, T, D = x.shape
    operation = _observe(block, x[:1, :1], None, lambda operation, values: operation)
    wide = accumulation_dtype(x.dtype)
    _, sigma, directions = torch.linalg.svd(x.flatten(0, 1).to(wide), full_matrices=False)
    energy = x.new_zeros(2, T, dtype=wide)
    for rows in (sigma[:, None] * directions).split(CHANNELS):
        impulses = x.new_zeros(2, len(rows), T, D)
        impulses[0, :, 0] = impulses[1, :, -1] = rows
        responses, *_ = operation(impulses.flatten(0, 1))
        energy += responses.to(wide).unflatten(0, (2, -1)).square().sum((1, 3))
    first, last = (energy / sigma.square().sum()).sqrt()
    return torch.cat([last[:-1], first])


def _observe(block: Block, x: Tensor, lengths: Tensor | None, measure: Callable[..., Any]) -> Any:
    """What `measure` makes of the operation over time that `block` runs on `x`."""
    found: list[Any] = []
    with block.observed(lambda *given: found.append(measure(*given))):
        block(x, lengths=lengths)
    if len(found) != 1:
        raise ValueError(
            f"{type(block).__name__} calls over_time {len(found)} times; valid: once, for all that mixes over time"
        )
    return found[0]
