"""What every block promises, as checks of any block: `check_block(Own)`. The project's own pass the same ones."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from ..blocks import Block
from .agreement import assert_close
from .cases import parameter_gradients, prepared, sequences
from .contract import CHECKS, PACKED
from .states import BIDIRECTIONAL, CAUSAL, streams

__all__ = ["assert_close", "check_block", "parameter_gradients", "prepared", "sequences"]


def check_block(kind: type[Block], *, d_model: int = 16, **options: Any) -> list[str]:
    """Holds a block to what every block promises, in both directions: shapes, what sees what, padding by lengths and by
    masks, inputs that stay as they are, documents in one row where `mix` takes them, streaming, gradients, autocast,
    saving, determinism.

    A direction that the class refuses with a ValueError is left out; a causal block without `initial_state` is not
    streamed. Some seconds, on the CPU.

    Args:
        kind: the class, built as `kind(d_model, causal=..., **options)`.
        d_model: a small width that its options go with.
        **options: of the class.

    Returns:
        The names of the checks that it passed, with the direction.

    Raises:
        AssertionError: it breaks promises; says which, and how.
        ValueError: it cannot be built in either direction.
    """
    passed, broken, refused = [], [], []
    for causal in (True, False):
        direction = "causal" if causal else "bidirectional"
        build = partial(_build, kind, options, causal, width=d_model)
        try:
            block = build()
        except ValueError as error:
            refused.append(f"{direction}: {error}")
            continue
        checks = list(CHECKS)
        if block._packs:
            checks += PACKED
        if not causal:
            checks += BIDIRECTIONAL
        elif streams(block):
            checks += CAUSAL
        for check in checks:
            name = f"{check.__name__} ({direction})"
            try:
                check(build)
            except Exception as error:  # whatever stops a check breaks what it holds the block to
                broken.append(f"{name}: {error if isinstance(error, AssertionError) else repr(error)}")
            else:
                passed.append(name)
    if broken:
        raise AssertionError(f"{kind.__name__} breaks {len(broken)} promises\n" + "\n".join(broken))
    if not passed:
        raise ValueError(f"{kind.__name__} cannot be built. {'; '.join(refused)}")
    return passed


def _build(
    kind: type[Block],
    options: dict[str, Any],
    causal: bool,
    *,
    width: int,
    d_model: int | None = None,
    dtype: torch.dtype = torch.float64,
    train: bool = False,
) -> Block:
    return prepared(lambda: kind(d_model or width, causal=causal, **options), dtype=dtype, train=train)
