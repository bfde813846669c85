"""What parts of the time cost: a block's step on its part beside its step on as many steps alone, and what is sent.

    OMP_NUM_THREADS=1 python benchmarks/parts.py --out results/parts

Two processes of a thread each compute a block, forward and backward, on the halves of sequences of `--steps` steps, and
in turns with it the same block on half as many steps and nothing else. Of both the processor time is taken, in which a
process that waits for another, or for a core that others use, has no share; the least of `--rounds`. What a rank waits
for on a quiet machine is in the wall clock's, which is given beside. Bytes are those handed to torch.distributed,
counted at `--counted` processes and four lengths; `docs/scale.md` has the formula they are held against.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from seqzoo.blocks import build_block
from seqzoo.blocks.parts import Part
from seqzoo.files import write_json
from seqzoo.runs import provenance
from seqzoo.training.memory import keep_freed_memory

BLOCKS = "linear_attention,lru,s4d,retnet,mamba2,gated_delta_net"
LENGTHS = (256, 509, 1024, 2048)
B, D = 4, 64


def step(block: torch.nn.Module, x: Tensor, part: Part | None) -> tuple[float, float]:
    """Processor and wall seconds of a forward and a backward pass."""
    dist.barrier()
    x = x.detach().requires_grad_()
    ran, passed = time.process_time(), time.perf_counter()
    y = block(x) if part is None else block(x, part=part)
    y.backward(torch.ones_like(y))
    return time.process_time() - ran, time.perf_counter() - passed


def timed(name: str, causal: bool, steps: int, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    block, part = build_block(name, D, causal=causal), Part(steps)
    x = part.own(torch.randn(B, steps, D))
    ways = {"alone": None, "part": part}
    seconds: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for _ in range(rounds + 1):
        for way, given in ways.items():
            seconds[way].append(step(block, x, given))
    of_ranks: list[Any] = [None] * part.ranks
    least = {way: [min(times) for times in zip(*taken[1:], strict=True)] for way, taken in seconds.items()}
    dist.all_gather_object(of_ranks, least)
    slowest = {way: [max(each) for each in zip(*(rank[way] for rank in of_ranks), strict=True)] for way in ways}
    return {
        "block": name,
        "causal": causal,
        "steps": steps,
        "milliseconds": {way: round(1e3 * ran, 2) for way, (ran, _) in slowest.items()},
        "ratio": round(slowest["part"][0] / slowest["alone"][0], 3),
        "wall_ratio": round(slowest["part"][1] / slowest["alone"][1], 3),
    }


def counted(name: str, causal: bool, steps: int) -> dict[str, Any]:
    """Bytes that each rank sends in one step of a layer."""
    sent, real = 0, dist.isend

    def isend(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        nonlocal sent
        sent += tensor.nbytes
        return real(tensor, *arguments, **options)

    block, part = build_block(name, D, causal=causal), Part(steps)
    dist.isend = isend
    try:
        step(block, part.own(torch.randn(B, steps, D)), part)
    finally:
        dist.isend = real
    of_ranks: list[Any] = [None] * part.ranks
    dist.all_gather_object(of_ranks, sent)
    return {"block": name, "causal": causal, "ranks": part.ranks, "steps": steps, "bytes": of_ranks}


def work(rank: int, ranks: int, port: int, arguments: argparse.Namespace, file: str) -> None:
    torch.set_num_threads(1)
    keep_freed_memory()  # as training does
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    found = json.loads(Path(file).read_text()) if rank == 0 and Path(file).exists() else {"times": [], "bytes": []}
    for name in arguments.only.split(","):
        for causal in (True, False):
            if ranks == 2:
                found["times"].append(timed(name, causal, arguments.steps, arguments.rounds))
            if ranks in arguments.counted:
                found["bytes"] += [counted(name, causal, steps) for steps in LENGTHS]
            if rank == 0 and ranks == 2:
                print(found["times"][-1], flush=True)
    if rank == 0:
        Path(file).write_text(json.dumps(found))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", default=BLOCKS, help="blocks")
    parser.add_argument("--steps", type=int, default=8192, help="of the sequences that two processes share")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--counted", type=int, nargs="*", default=[2, 4], help="processes, for bytes")
    arguments = parser.parse_args()
    file = Path(os.environ.get("TMPDIR", "/tmp")) / f"parts-{os.getpid()}.json"
    for ranks in sorted({2, *arguments.counted}):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        mp.spawn(work, (ranks, port, arguments, str(file)), nprocs=ranks)
    found = json.loads(file.read_text())
    file.unlink()
    if arguments.out:
        setting = {"batch": B, "width": D, "rounds": arguments.rounds, "load_average": os.getloadavg()}
        write_json(arguments.out / "parts.json", {**provenance.of_benchmark(setting), **found})


if __name__ == "__main__":
    main()
