"""The tables of block sizes, by operation."""

from __future__ import annotations

import importlib
from typing import Any

from seqzoo.kernels.blocks import Blocks


def table(operation: str) -> Blocks[Any]:
    module = "vq_attention.nearest" if operation == "nearest_code" else f"{operation}.fused"
    return importlib.import_module(f"seqzoo.kernels.{module}").BLOCKS
