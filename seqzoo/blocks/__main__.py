"""Which blocks there are: `python -m seqzoo.blocks`, and what one of them is: `python -m seqzoo.blocks lru`."""

from __future__ import annotations

import argparse
import inspect
import sys
import textwrap
from collections.abc import Sequence

import torch
from torch import Tensor

from . import BLOCKS, build_block, check_block
from .base import Block

WIDTH = 64
COLUMNS = "{:<18} {:>10} {:>9}  {}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status, 0. Unusable arguments end the process with status 2."""
    parser = argparse.ArgumentParser(
        prog="python -m seqzoo.blocks",
        description="Every block of build_block: parameters, numbers in a causal block's state, and options with their "
        "defaults.",
    )
    parser.add_argument("name", nargs="?", metavar="BLOCK", help="what one block is")
    parser.add_argument("--d-model", type=int, default=WIDTH, metavar="D", help=f"width; {WIDTH} unless given")
    given = parser.parse_args(arguments)
    try:
        if given.name is not None:
            check_block(given.name, {})
            print(_described(given.name, given.d_model))
            return 0
        print(COLUMNS.format("block", "parameters", "state", f"options, at d_model={given.d_model}"))
        for name in BLOCKS:
            options = " ".join(f"{key}={value!r}" for key, value in _options(BLOCKS[name]).items())
            first, *others = textwrap.wrap(options, 100) or [""]
            print(COLUMNS.format(name, *_sizes(name, given.d_model), first))
            for line in others:
                print(COLUMNS.format("", "", "", line))
    except ValueError as error:
        parser.error(str(error))
    return 0


def _described(name: str, d_model: int) -> str:
    kind = BLOCKS[name]
    parameters, state = _sizes(name, d_model)
    options = "\n".join(f"  {key}={value!r}" for key, value in _options(kind).items())
    sizes = f"At d_model={d_model}: {parameters} parameters, and a state of {state} numbers."
    return f"{name}, seqzoo.{kind.__name__}\n\n{inspect.getdoc(kind)}\n\n{sizes}\n\nOptions:\n{options}"


def _options(kind: type[Block]) -> dict[str, object]:
    parameters = inspect.signature(kind).parameters.items()
    return {key: parameter.default for key, parameter in parameters if key not in ("d_model", "causal")}


def _sizes(name: str, d_model: int) -> tuple[str, str]:
    """Parameters, and what a causal block remembers of a sequence beside the count of steps; a step, where it grows."""
    block = build_block(name, d_model, causal=True, device="meta")
    short, long = (_held(block, T) for T in (64, 128))
    state = f"{short:,}" if short == long else f"{(long - short) // 64:,} T"
    return f"{sum(parameter.numel() for parameter in block.parameters()):,}", state


def _held(block: Block, T: int) -> int:
    """Numbers in the state of a sequence of T steps, beside their count."""
    _, state = block.extend(torch.zeros(1, T, block.d_model, device="meta"), None)
    return sum(part.numel() for part in state if isinstance(part, Tensor)) - 1


if __name__ == "__main__":
    sys.exit(main())
