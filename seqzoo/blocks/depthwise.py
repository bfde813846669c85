from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.common import accumulation_dtype, chunk_of, in_cache, without_autocast
from ..kernels.derivatives import gradient, transformed
from ..kernels.documents import Documents
from ..valid import Count
from .parts import Part, with_neighbours

CHANNELS = 64  # at a time, at least
CHUNK = 32
FEW = 8  # positions of a kernel, whose gradient is a sum of products for each


class Window(nn.Module):
    """What sees W inputs around each step of a sequence: a subclass says in `_over` what it makes of them.

    Args:
        width: W.
        causal: they are a step's own and the W - 1 before it, or else as many on either side.
    """

    def __init__(self, width: Count, *, causal: bool) -> None:
        super().__init__()
        if not causal and width % 2 == 0:
            raise ValueError(f"width={width} has no middle; valid: an odd number, or causal=True")
        self.width = width
        self.past = width - 1 if causal else width // 2

    def _over(self, x: Tensor) -> Tensor:
        """[B, T + W - 1, D] -> [B, T, D], of the inputs from t to t + W - 1."""
        raise NotImplementedError

    def _alone(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D], with zeros on either side."""
        return self._over(F.pad(x, (0, 0, self.past, self.width - 1 - self.past)))

    def forward(
        self,
        x: Tensor,
        before: Tensor | None,
        lengths: Tensor | None,
        documents: Documents | None = None,
        part: Part | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """What `_over` makes of the inputs around each step.

        Args:
            x: [B, T, D], zero past `lengths`.
            before: the W - 1 inputs ahead of `x`, [B, W - 1, D]; None is zeros, and then none are returned.
            lengths: int64 [B], after how many steps the returned inputs are the last; None is T.
            documents: N of them in the one row of x, in place of `lengths`: none sees another, and the inputs ahead of
                each and the last ones are [N, W - 1, D].
            part: x is of this part of the time, and other ranks have the inputs around it.

        Returns:
            y [B, T, D], and the last W - 1 inputs [B, W - 1, D] in the dtype of `before`.
        """
        T, W = x.shape[1], self.width
        if documents is not None:
            return self._of_documents(x, before, documents)
        if part is not None:
            return self._over(with_neighbours(part, x, self.past, W - 1 - self.past)), None
        if before is None:
            return self._alone(x), None
        seen = torch.cat([before.to(x.dtype), x], 1)
        if lengths is None:
            after = seen[:, T:]
        else:
            last = lengths[:, None] + torch.arange(W - 1, device=x.device)
            after = seen.gather(1, last[..., None].expand(-1, -1, x.shape[2]))
        return self._over(seen), after.to(before.dtype)

    def _of_documents(self, x: Tensor, before: Tensor | None, documents: Documents) -> tuple[Tensor, Tensor | None]:
        """Of a row in which W - 1 inputs, zeros where there are none, stand between documents."""
        N, W = documents.N, self.width
        gaps = torch.arange(N, device=x.device) * (W - 1)
        place = torch.arange(x.shape[1], device=x.device) + gaps[documents.of_steps()]  # of each step's output
        row = x.new_zeros(1, x.shape[1] + N * (W - 1), x.shape[2]).index_copy(1, place + self.past, x)
        if before is None:
            return self._over(row).index_select(1, place), None
        ahead = (documents.starts[:-1] + gaps)[:, None] + torch.arange(W - 1, device=x.device)  # [N, W - 1]
        row = row.index_copy(1, ahead.flatten(), before.to(x.dtype).flatten(0, 1)[None])
        after = row[0, ahead + documents.lengths[:, None]]
        return self._over(row).index_select(1, place), after.to(before.dtype)


class Depthwise(Window):
    """A convolution over time of each channel with a kernel of its own: y_t = Σ_j weight_j ∘ x_{t - past + j}.

    Args:
        d_model: channels, D.
        width: of the kernels, W positions.
        causal: an output sees its own position and the W - 1 before it, or else as many on either side.
        bias: add a number of its own to each channel.
        silu: put what comes out through SiLU.
    """

    def __init__(self, d_model: int, width: Count, *, causal: bool, bias: bool = False, silu: bool = False) -> None:
        super().__init__(width, causal=causal)
        self.weight = nn.Parameter(torch.empty(d_model, width).uniform_(-1, 1) / math.sqrt(width))
        self.bias = nn.Parameter(torch.empty(d_model).uniform_(-1, 1) / math.sqrt(width)) if bias else None
        self.silu = silu

    def _over(self, x: Tensor) -> Tensor:
        return convolve(x, self.weight, self.bias, (0, 0), self.silu)

    def _alone(self, x: Tensor) -> Tensor:
        return convolve(x, self.weight, self.bias, (self.past, self.width - 1 - self.past), self.silu)


def short_convolution(D: int, width: Count, *, causal: bool, bias: bool, silu: bool = False) -> Depthwise:
    """The one ahead of a recurrence: where it sees both sides and `width` has no middle, one position wider."""
    return Depthwise(D, width if causal else width // 2 * 2 + 1, causal=causal, bias=bias, silu=silu)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, zeros: tuple[int, int], silu: bool) -> Tensor:
    """y_td = Σ_j weight_dj x_{t+j,d}, and the bias, through SiLU if that is asked for.

    Args:
        x: [B, T, D].
        weight: [D, W].
        bias: [D].
        zeros: how many steps of zeros there are ahead of x and behind it, P and Q.

    Returns:
        [B, T + P + Q - W + 1, D].
    """
    if x.device.type != "cpu":
        return _convolve(x, weight, bias, zeros, silu)
    # In single precision at least: PyTorch's products in half precision can fail to end on a CPU.
    dtype = accumulation_dtype(x.dtype)
    with without_autocast(x.device):
        if not transformed():
            return _Convolution.apply(x, weight, bias, zeros, silu)
        bias = None if bias is None else bias.to(dtype)
        return _convolve(x.to(dtype), weight.to(dtype), bias, zeros, silu).to(x.dtype)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, zeros: tuple[int, int], silu: bool) -> Tensor:
    x = F.pad(x, (0, 0, *zeros)) if any(zeros) else x
    # In one dimension a CPU would lay its channels out anew first.
    y = F.conv2d(x.mT[:, :, None], weight[:, None, None], groups=len(weight))[:, :, 0].mT
    y = y if bias is None else y + bias.to(y.dtype)
    return F.silu(y) if silu else y


class _Convolution(torch.autograd.Function):
    """PyTorch's on a CPU, whose gradient of the kernels takes far longer than the rest. It keeps the inputs alone,
    convolves them once more for the slope of SiLU, and does so in parts that are cached: rows, or channels of one."""

    @staticmethod
    def forward(ctx, x, weight, bias, zeros, silu):
        ctx.save_for_backward(x, weight, bias)
        ctx.options = zeros, silu
        x_wide, weight, bias = _wide(x, weight, bias)
        return _convolve(x_wide, weight, bias, zeros, silu).to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        inputs, (zeros, silu) = ctx.saved_tensors, ctx.options

        def form(x, weight, bias):
            with without_autocast(dy.device):
                x_wide, weight, bias = _wide(x, weight, bias)
                return (_convolve(x_wide, weight, bias, zeros, silu).to(x.dtype),)

        def written():
            x, weight, bias = inputs
            (B, T, D), W, dx = x.shape, weight.shape[1], torch.empty_like(x)
            d_weight, d_bias = _wide(torch.zeros_like(weight), None if bias is None else torch.zeros_like(bias))
            beyond = W - 1 - zeros[0], W - 1 - zeros[1]
            with without_autocast(dy.device):  # whatever `backward` is called under
                for rows in in_cache(B, T * D, x):
                    for at in in_cache(-(-D // CHANNELS), CHANNELS * T * (rows.stop - rows.start), x):
                        c = slice(at.start * CHANNELS, at.stop * CHANNELS)
                        x_c, weight_c, bias_c = _wide(x[rows, :, c], weight[c], None if bias is None else bias[c])
                        x_c, d = F.pad(x_c, (0, 0, *zeros)), dy[rows, :, c].to(x_c.dtype)
                        if silu:
                            d = torch.ops.aten.silu_backward(d, _convolve(x_c, weight_c, bias_c, (0, 0), False))
                        dx[rows, :, c] = _convolve(d, weight_c.flip(1), None, beyond, False)
                        d_weight[c] += _kernel_gradient(x_c, d, W)
                        if d_bias is not None:
                            d_bias[c] += d.sum((0, 1))
            return dx, d_weight.to(weight.dtype), None if bias is None else d_bias.to(bias.dtype)

        return *gradient(written, form, inputs, (dy,)), None, None


def _wide(x: Tensor, *others: Tensor | None) -> Any:
    dtype = accumulation_dtype(x.dtype)
    return [None if y is None else y.to(dtype) for y in (x, *others)]


def _kernel_gradient(x: Tensor, dy: Tensor, W: int) -> Tensor:
    """Σ_bt dy_btd x_b,t+j,d: [B, T + W - 1, D] and [B, T, D] -> [D, W]."""
    B, T, D = dy.shape
    if W <= FEW:
        return torch.stack([(dy * x[:, j : j + T]).sum((0, 1)) for j in range(W)], 1)
    L = chunk_of(T, CHUNK)
    N = -(-T // L)
    x, dy = (F.pad(tensor, (0, 0, 0, N * L - T)).flatten(0, 1).t().contiguous() for tensor in (x, dy))
    reached = x.view(D, B, -1).unfold(-1, L + W - 1, L).flatten(1, 2)  # by each chunk of outputs
    products = dy.view(D, B * N, L).mT @ reached  # [D, L, L + W - 1]; those of j stand j right of the diagonal
    return F.pad(products.flatten(1), (0, L)).view(D, L, L + W)[..., :W].sum(1)
