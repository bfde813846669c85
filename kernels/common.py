"""What every operation shares: padding, dtypes and their names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .cpu import MULTIPLIES_BFLOAT16
from .derivatives import by_hand

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
CACHED = 1 << 18  # numbers; in single precision as much as a core's own cache commonly holds


def valid_positions(lengths: Tensor, T: int) -> Tensor:
    """True where a position lies within its sequence: [B] lengths -> [B, T]."""
    return torch.arange(T, device=lengths.device) < lengths[:, None]


def chunk_of(T: int, longest: int) -> int:
    """Steps of a chunk: `longest`, or all T where those are fewer; in compiled graphs only where T is 1, so that a few
    graphs serve every length."""
    return longest if torch.compiler.is_compiling() and T != 1 else min(T, longest)


def future(n: int, device: torch.device) -> Tensor:
    """Which of `n` keys each of as many queries, of the same steps, does not see: bool [n, n]."""
    return torch.ones(n, n, dtype=torch.bool, device=device).triu(1)


def zero_padding(x: Tensor, lengths: Tensor | None) -> Tensor:
    """`x` [B, T, ...] with zeros past each length, in value and gradient, whatever stood there (NaN included)."""
    if lengths is None:
        return x
    if type(x) is Tensor and can_be_looked_at(lengths) and by_hand():
        return x if (lengths == x.shape[1]).all() else _ZeroPadding.apply(x, lengths)
    valid = valid_positions(lengths, x.shape[1])
    return torch.where(valid.reshape(valid.shape + (1,) * (x.dim() - 2)), x, 0)


class _ZeroPadding(torch.autograd.Function):
    """A copy with zeros behind each sequence: on a CPU a third of what looking at every position costs, and less."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lengths: Tensor) -> Tensor:
        ctx.save_for_backward(lengths)
        y = x.clone(memory_format=torch.contiguous_format)
        for sequence, length in zip(y, lengths.tolist(), strict=True):
            sequence[length:] = 0
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return zero_padding(dy, *ctx.saved_tensors), None


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and carried state for inputs of `dtype`: at least single precision, double stays double."""
    if dtype.is_complex:
        return torch.promote_types(dtype, torch.complex64)
    return torch.promote_types(dtype, torch.float32)


def product_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of matrix products of `tensors`: bfloat16 where all are, which is multiplied into single precision and
    has its range, but on a CPU without instructions for it; otherwise that of their sums."""
    dtype = reduce(torch.promote_types, (x.dtype for x in tensors))
    if dtype == torch.bfloat16 and (tensors[0].device.type != "cpu" or MULTIPLIES_BFLOAT16):
        return dtype
    return accumulation_dtype(dtype)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype of `x`, or, if that is single precision, the one in which autocast multiplies it here."""
    if x.dtype == torch.float32 and x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def dtype_name(dtype: torch.dtype) -> str:
    """As tables have it: float32."""
    return str(dtype).removeprefix("torch.")


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Where sums must not be kept in half precision. Tensors without data ("meta") know no autocast."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


@contextmanager
def full_precision() -> Iterator[None]:
    """Where products of single precision are made in it, whatever `torch.set_float32_matmul_precision` allows."""
    before = torch.get_float32_matmul_precision()
    if before == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def check_lengths(what: str, lengths: Tensor | None, B: int, T: int) -> Tensor | None:
    """`lengths` as int64, or None where there are none or they are seen to be all T: then nothing is padded.

    Values are looked at where that costs nothing: on a CPU, outside of graphs. A GPU would be waited for: there, what
    lies outside [0, T] counts as the nearest end.

    Raises:
        ValueError: they are not integers [B], or lie outside [0, T].
    """
    if lengths is None:
        return None
    if not isinstance(lengths, Tensor) or lengths.dtype not in INTEGERS or lengths.shape != (B,):
        given, hint = type(lengths).__name__, ""
        if isinstance(lengths, Tensor):
            given = f"{lengths.dtype} {list(lengths.shape)}"
            hint = "; a mask [B, T], true where steps count, becomes mask.sum(1)" if lengths.dim() == 2 else ""
        raise ValueError(
            f"{what}: lengths must be int64 [{B}] or narrower integers, how many steps of each sequence count, "
            f"got {given}{hint}"
        )
    if B and can_be_looked_at(lengths):
        low, high = (int(end) for end in torch.aminmax(lengths))
        if low < 0 or high > T:
            raise ValueError(f"{what}: lengths must lie in [0, T] = [0, {T}], got {lengths.tolist()}")
        return None if low == T else lengths.long()
    return lengths.long().clamp(0, T)


def check_log_decay(what: str, log_decay: Tensor | None, lengths: Tensor | None) -> None:
    """Looks at logarithms of decays, [B, T, ...] or of no time, where that costs nothing: on a CPU, outside of graphs.

    NaN is let through, and past `lengths` anything.

    Raises:
        ValueError: one is above 0.
    """
    if log_decay is None or not log_decay.numel() or not can_be_looked_at(log_decay) or bool(log_decay.max() <= 0):
        return
    within = log_decay.detach() if log_decay.dim() < 3 else zero_padding(log_decay.detach(), lengths)
    highest = float(within.nan_to_num(nan=0.0).max())
    if highest > 0:
        raise ValueError(
            f"{what}: log_decay must be at most 0, got {highest:.3g}; valid: logarithms of what is kept from step to "
            "step, such as logsigmoid gives"
        )


def can_be_looked_at(x: Tensor) -> bool:
    """Whether `x` has values on a CPU: in graphs there are none, and under vmap one for each of a batch."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or x.device.type != "cpu" or type(x) is not Tensor:
        return False
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        if torch._C._functorch.is_batchedtensor(x):
            return False
        x = torch._C._functorch.get_unwrapped(x)
    return True


def in_cache(count: int, numbers: int, x: Tensor) -> list[slice]:
    """How to go through `count` items of so many `numbers` each, such that a CPU's cache holds them from pass to pass.

    All at once on devices other than that of a CPU, and in graphs, whose compiler sees to that.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return [slice(0, count)]
    step = max(1, CACHED // max(1, numbers))
    return [slice(start, start + step) for start in range(0, count, step)]


def steps_in_cache(x: Tensor) -> list[slice]:
    """As `in_cache`, through the steps of x [B, T, ...] and of three more tensors of its size."""
    return in_cache(x.shape[1], 4 * x[:, 0].numel(), x)


def query_heads(x: Tensor, H: int) -> Tensor:
    """[B, T, G, D] -> [B, T, H, D], where head h reads h // (H / G)."""
    G = x.shape[2]
    return x if G == H else x[:, :, :, None].expand(-1, -1, -1, H // G, -1).flatten(2, 3)


def contiguous(*tensors: Any) -> list[Any]:
    """As kernels index them, by shape alone; None stays None."""
    return [None if x is None else x.contiguous() for x in tensors]


def pad_channels(x: Tensor) -> Tensor:
    """x with channels of 0 behind its own, as many as loads of 16 bytes want: a multiple of 16."""
    missing = -x.shape[-1] % 16
    return F.pad(x, (0, missing)) if missing else x  # padding by nothing would copy
