from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.common import accumulation_dtype


class Wide(nn.Module):
    """A module whose own parameters and buffers stay in single precision at least, whatever it is cast to.

    `.half()`, `.to(torch.bfloat16)`, a default dtype while it is built and a file in half precision leave them as wide
    as they were, and nothing is rounded on the way; moves to other devices and `.double()` act as on any module.

    FSDP2 wants one dtype in a group of parameters: shard such a module as a group of its own, and without a policy of
    mixed precision, before what it is part of.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Wide:
        def wide(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype == widened(result.dtype) else tensor.to(result.device)

        super()._apply(wide, recurse)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        for name, value in state_dict.items():  # with assign=True these become the parameters
            if name.startswith(prefix) and isinstance(value, Tensor):
                state_dict[name] = value.to(widened(value.dtype))
        super()._load_from_state_dict(state_dict, prefix, *arguments)


def default_dtype() -> torch.dtype:
    """What the parameters of such a module start in."""
    return widened(torch.get_default_dtype())


def widened(dtype: torch.dtype) -> torch.dtype:
    """What a tensor of `dtype` is kept in: integers as they are."""
    return accumulation_dtype(dtype) if dtype.is_floating_point or dtype.is_complex else dtype
