"""A model in shards beside itself in whole, in one of several processes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from parts_cases import block_errors, bytes_sent, model_errors, relative
from torch import Tensor, nn

from seqzoo.config import StageConfig
from seqzoo.models import ModelConfig, build_model
from seqzoo.spec import TaskSpec
from seqzoo.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from seqzoo.training.optimizer import build_optimizer, restore
from seqzoo.training.shards import load_whole, shard, whole, whole_weights

SPEC = TaskSpec(name="toy", kind="tokens", vocab_size=7, max_length=12, num_classes=3)
CONFIG = ModelConfig(
    name="toy",
    d_model=12,
    num_layers=3,
    layers=["lru", {"name": "performer", "num_heads": 2}, {"name": "gated_delta_net", "num_heads": 2}],
    mlp_ratio=1.0,
)
STEPS = 3
BATCH = 12  # as many for each of 2, 3 or 4 ranks


def everything(cases: Any, shapes: Any, folder: Path) -> dict[str, Any]:
    """All that is asked of several processes, in one of them: starting them takes longer."""
    return {
        "blocks": block_errors(cases, shapes),
        "models": model_errors(),
        "bytes": bytes_sent(),
        "shards": shard_errors(folder),
    }


def build() -> nn.Module:
    torch.manual_seed(0)
    return build_model(CONFIG, SPEC, head="classify", causal=True)


def take_steps(model: nn.Module, optimizer: Any, rows: slice, steps: range) -> None:
    """On the examples `rows` of batches, of which steps have their own."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        inputs, labels = (torch.randint(n, size, generator=generator) for n, size in ((7, (BATCH, 12)), (3, (BATCH,))))
        scores = model(inputs[rows], torch.full((BATCH,), 12)[rows])
        nn.functional.cross_entropy(scores, labels[rows]).backward()
        parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
        norm = whole(nn.utils.get_total_norm([parameter.grad for parameter in parameters]))
        nn.utils.clip_grads_with_norm_(parameters, 0.1, norm)
        optimizer.step()
        optimizer.zero_grad()


def shard_errors(folder: Path) -> dict[str, float]:
    """The largest relative error of weights, what an optimiser keeps, and what a block extends to."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    stage = StageConfig(tokens=1, lr=1e-2, weight_decay=0.1)
    alone = build()
    own_optimizer = build_optimizer(alone, stage)
    take_steps(alone, own_optimizer, slice(None), range(STEPS))

    model = build()
    shard(model, torch.device("cpu"))
    optimizer = build_optimizer(model, stage)
    take_steps(model, optimizer, slice(rank, None, ranks), range(STEPS))
    errors = {"weights": largest(whole_weights(model), alone.state_dict())}

    x = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        for n in (0, 2, 4):
            ours, theirs = model.backbone.layers[n].branch, alone.backbone.layers[n].branch
            errors[f"extend {n}"] = relative(ours.extend(x, None)[0], theirs.extend(x, None)[0])

    path = folder / "last.safetensors"
    fabric: Any = SimpleNamespace(
        global_rank=rank, world_size=ranks, is_global_zero=rank == 0, barrier=lambda: dist.barrier()
    )
    kept = optimizer.state_dict()["state"]
    for step in (STEPS - 1, STEPS):  # the first of which is to go
        save_checkpoint(path, Checkpoint(model.state_dict(), kept, {"step": step}), fabric)
    names = sorted(file.name for file in folder.glob("last*"))
    assert names == [f"last-{STEPS}.{n}of{ranks}.safetensors" for n in range(ranks)] + ["last.safetensors"]
    loaded = load_checkpoint(path)
    errors["saved weights"] = largest(loaded.weights, whole_weights(model))
    own = own_optimizer.state_dict()["state"]
    assert loaded.optimizer.keys() == own.keys()
    errors["saved moments"] = max(largest(loaded.optimizer[index], own[index]) for index in own)

    again = build()
    shard(again, torch.device("cpu"))
    load_whole(again, loaded.weights)
    other = build_optimizer(again, stage)
    restore(other, loaded.optimizer)
    take_steps(again, other, slice(rank, None, ranks), range(STEPS, STEPS + 1))
    take_steps(model, optimizer, slice(rank, None, ranks), range(STEPS, STEPS + 1))
    errors["continued"] = largest(whole_weights(again), whole_weights(model))
    return errors


def largest(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(relative(found[name].double(), expected[name].double()) for name in found)
