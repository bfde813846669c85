from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.common import accumulation_dtype, without_autocast
from ..kernels.derivatives import gradient, transformed
from ..kernels.documents import Documents
from ..valid import Count
from .parts import Part, with_neighbours

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
            return self._over(F.pad(x, (0, 0, self.past, W - 1 - self.past))), None
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
    """

    def __init__(self, d_model: int, width: Count, *, causal: bool, bias: bool = False) -> None:
        super().__init__(width, causal=causal)
        self.weight = nn.Parameter(torch.empty(d_model, width).uniform_(-1, 1) / math.sqrt(width))
        self.bias = nn.Parameter(torch.empty(d_model).uniform_(-1, 1) / math.sqrt(width)) if bias else None

    def _over(self, x: Tensor) -> Tensor:
        y = convolve(x, self.weight)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def short_convolution(D: int, width: Count, *, causal: bool, bias: bool) -> Depthwise:
    """The one ahead of a recurrence: where it sees both sides and `width` has no middle, one position wider."""
    return Depthwise(D, width if causal else width // 2 * 2 + 1, causal=causal, bias=bias)


def convolve(x: Tensor, weight: Tensor) -> Tensor:
    """y_td = Σ_j weight_dj x_{t+j,d}: [B, T + W - 1, D] and [D, W] -> [B, T, D]."""
    if x.device.type != "cpu":
        return _convolve(x, weight)
    # In single precision at least: PyTorch's products in half precision can fail to end on a CPU.
    dtype = accumulation_dtype(x.dtype)
    with without_autocast(x.device):
        convolution = _convolve if transformed() else _Convolution.apply
        return convolution(x.to(dtype), weight.to(dtype)).to(x.dtype)


def _convolve(x: Tensor, weight: Tensor) -> Tensor:
    # In one dimension a CPU would lay its channels out anew first.
    return F.conv2d(x.mT[:, :, None], weight[:, None, None], groups=len(weight))[:, :, 0].mT


class _Convolution(torch.autograd.Function):
    """PyTorch's on a CPU, whose gradient of the kernels takes far longer than the rest."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return _convolve(x, weight)

    @staticmethod
    def backward(ctx, dy):
        inputs = ctx.saved_tensors

        def form(x, weight):
            with without_autocast(dy.device):
                return (_convolve(x, weight),)

        def written():
            x, weight = inputs
            W = weight.shape[1]
            with without_autocast(dy.device):  # whatever `backward` is called under
                dx = _convolve(F.pad(dy, (0, 0, W - 1, W - 1)), weight.flip(1))
                return dx, _kernel_gradient(x, dy, W)

        return gradient(written, form, inputs, (dy,))


def _kernel_gradient(x: Tensor, dy: Tensor, W: int) -> Tensor:
    """Σ_bt dy_btd x_b,t+j,d: [B, T + W - 1, D] and [B, T, D] -> [D, W]."""
    B, T, D = dy.shape
    if W <= FEW:
        return torch.stack([(dy * x[:, j : j + T]).sum((0, 1)) for j in range(W)], 1)
    L = min(CHUNK, T)
    N = -(-T // L)
    x, dy = (F.pad(tensor, (0, 0, 0, N * L - T)).flatten(0, 1).t().contiguous() for tensor in (x, dy))
    reached = x.view(D, B, -1).unfold(-1, L + W - 1, L).flatten(1, 2)  # by each chunk of outputs
    products = dy.view(D, B * N, L).mT @ reached  # [D, L, L + W - 1]; those of j stand j right of the diagonal
    return F.pad(products.flatten(1), (0, L)).view(D, L, L + W)[..., :W].sum(1)
