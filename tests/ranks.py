"""Work for several processes, and what each of them made of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def on_ranks(work: Callable[..., Any], ranks: int, folder: Path, *arguments: Any) -> list[Any]:
    """What work(*arguments) returns in each of so many processes, which share a group."""
    mp.spawn(_run, (work, ranks, folder, arguments), nprocs=ranks)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


def _run(rank: int, work: Callable[..., Any], ranks: int, folder: Path, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=ranks)
    try:
        torch.save(work(*arguments), folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def summed(x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    dist.all_reduce(x)
    return x
