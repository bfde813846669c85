"""Blocks of `block_len` queries against their window of key blocks and the codes of all other blocks.

N blocks, L positions in one, W blocks in a window (2 causal, 3 bidirectional), S codes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common import accumulation_dtype, valid_positions, zero_padding
from ..diagonal_scan import diagonal_scan
from .codes import straight_through
from .state import VQState


def vq_attention_chunked(
    q: Tensor,  # [B, T, H, D]
    k: Tensor,
    v: Tensor,  # [B, T, H, Dv]
    codebook: Tensor,  # [H, S, D]
    codes: Tensor,  # [B, T, H]
    *,
    block_len: int,
    bias: Tensor | None,
    causal: bool,
    initial_state: VQState | None,
    output_final_state: bool,
    lengths: Tensor | None,
) -> tuple[Tensor, VQState | None]:
    (B, T, H, _), (S, Dv), L, dtype = q.shape, (codebook.shape[1], v.shape[-1]), block_len, v.dtype
    q, k, v = (zero_padding(x, lengths).to(accumulation_dtype(x.dtype)) for x in (q, k, v))
    codebook = codebook.to(q.dtype)
    khat = straight_through(k, codebook, codes)
    past = initial_state
    if past is None and output_final_state:
        past = VQState.empty(B, H, S, Dv, L, device=q.device, dtype=v.dtype)

    # One block more in front, and behind if bidirectional, so that every block of queries has a whole window.
    N = -(-T // L)
    ahead, behind = N * L - T + (0 if causal else L), L
    valid = torch.ones(B, T, dtype=torch.bool, device=q.device) if lengths is None else valid_positions(lengths, T)
    valid_b = _blocks(valid[..., None], behind, ahead, L)[:, 0]  # [B, N', L]
    khat_b, v_b = _blocks(khat, behind, ahead, L), _blocks(v, behind, ahead, L)  # [B, H, N', L, .]
    codes_b = _blocks(codes, behind, ahead, L)  # [B, H, N', L]
    if past is not None:
        first = torch.arange(-L, 0, device=q.device) >= -past.position[:, None]
        valid_b = torch.cat([first[:, None], valid_b[:, 1:]], 1)
        heads = torch.arange(H, device=q.device)
        khat_b = torch.cat([codebook[heads, past.codes].transpose(1, 2)[:, :, None], khat_b[:, :, 1:]], 2)
        v_b = torch.cat([past.values.to(v.dtype).transpose(1, 2)[:, :, None], v_b[:, :, 1:]], 2)
        codes_b = torch.cat([past.codes.transpose(1, 2)[:, :, None], codes_b[:, :, 1:]], 2)

    W = 2 if causal else 3
    q_b = _blocks(q, 0, N * L - T, L)  # [B, H, N, L, D]
    scores = q_b @ _windows(khat_b, N, W).transpose(-1, -2)  # [B, H, N, L, WL]
    if bias is not None:
        scores += _along_distance(bias, causal, L, N, T)
    never = torch.finfo(scores.dtype).min
    hidden = ~_windows(valid_b[:, None, ..., None], N, W)[..., 0][..., None, :]  # [B, 1, N, 1, WL]
    if causal:
        hidden = hidden | torch.ones(L, W * L, dtype=torch.bool, device=q.device).triu(L + 1)
    scores += scores.new_zeros(hidden.shape).masked_fill(hidden, never)

    counts, sums = _outside_window(codes_b, v_b, valid_b, S, N, W)  # [B, H, N, S], [B, H, N, S, Dv]
    if past is not None:
        counts, sums = counts + past.counts[:, :, None], sums + past.sums.to(v.dtype)[:, :, None]
    log_count = torch.where(counts > 0, counts.clamp(min=1).to(q.dtype).log(), never)
    by_code = q_b @ codebook[:, None].transpose(-1, -2)  # [B, H, N, L, S]
    by_code += log_count[..., None, :]

    weights = torch.cat([scores, by_code], -1).softmax(-1)
    means = sums / counts.clamp(min=1)[..., None]
    y = weights[..., : W * L] @ _windows(v_b, N, W) + weights[..., W * L :] @ means
    y = y.reshape(B, H, N * L, Dv).transpose(1, 2)[:, :T].to(dtype)
    state = past.advance(codes, v, lengths) if past is not None and output_final_state else None
    return zero_padding(y, lengths), state


def _blocks(x: Tensor, before: int, after: int, L: int) -> Tensor:
    """Pads time and cuts it into blocks, heads first: [B, T, H, ...] -> [B, H, N', L, ...]."""
    x = F.pad(x, (0, 0) * (x.dim() - 2) + (before, after)).transpose(1, 2)
    return x.unflatten(2, (-1, L))


def _windows(x_b: Tensor, N: int, W: int) -> Tensor:
    """The W consecutive blocks that each of N blocks of queries sees, side by side: [B, H, N, WL, .]."""
    return torch.cat([x_b[:, :, w : w + N] for w in range(W)], 3)


def _outside_window(codes_b: Tensor, v_b: Tensor, valid_b: Tensor, S: int, N: int, W: int) -> tuple[Tensor, Tensor]:
    """How many keys outside each block's window have each code, and the sum of their values.

    Running sums from the front, and from the back if bidirectional, of the blocks' own: the total less the window
    would cancel. Block i of N has the padded blocks before i in front of its window, and those from i + W on behind it.
    """
    member = (codes_b[..., None] == torch.arange(S, device=codes_b.device)) & valid_b[:, None, :, :, None]
    counts = member.sum(3)  # [B, H, N', S]
    sums = member.to(v_b.dtype).transpose(-1, -2) @ v_b  # [B, H, N', S, Dv]
    rows = sums.flatten(0, 1).flatten(2)  # [BH, N', S Dv]
    one = rows.new_ones(rows.shape[-1])
    outside_counts = F.pad(counts[:, :, : N - 1].cumsum(2), (0, 0, 1, 0))
    outside = F.pad(diagonal_scan(rows[:, : N - 1], one), (0, 0, 1, 0)) if N > 1 else torch.zeros_like(rows[:, :1])
    if W == 3 and N > 1:
        outside_counts = outside_counts + F.pad(counts[:, :, W:].flip(2).cumsum(2).flip(2), (0, 0, 0, 1))
        outside = outside + F.pad(diagonal_scan(rows[:, W:], one, reverse=True), (0, 0, 0, 1))
    return outside_counts, outside.unflatten(-1, sums.shape[-2:]).unflatten(0, sums.shape[:2])


def _along_distance(bias: Tensor, causal: bool, L: int, N: int, T: int) -> Tensor:
    """Biases by distance laid out over the columns of the window: [B or 1, H, N or 1, L, WL].

    Row r of a block stands at column L + r, so distance δ is column r + (L - δ). Rows one entry wider than the window
    and read as if they were not move each row one column further than the row above it.
    """
    W, reach = (2, bias.shape[-1] - 1) if causal else (3, bias.shape[-1] // 2)
    same_for_all = bias.dim() == 2
    rows = bias[None, :, None, None].expand(-1, -1, -1, L, -1) if same_for_all else _blocks(bias, 0, N * L - T, L)
    before = L - reach
    rows = F.pad(rows.flip(-1), (before, W * L + 1 - before - bias.shape[-1]))  # [., H, N, L, WL + 1]
    return rows.flatten(-2)[..., : W * L * L].unflatten(-1, (L, W * L))
