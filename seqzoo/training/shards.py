"""Models whose parameters lie in shards on the ranks (FSDP2), and their tensors made whole and cut again.

A shard is a rank's rows of a tensor. A rank gathers the whole of a block's parameters for the time of its passes, and
of its gradients keeps its own rows. What is kept in single precision, a `Wide` module, is a group of its own: one group
has one dtype. Buffers, such as codebooks, are no shards: `after_step` keeps them equal on all ranks.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks import Wide
from ..models.model import Residual


def shard(model: nn.Module, device: torch.device) -> None:
    """Shards `model` in place among all ranks: each block, each MLP, and the rest as one group.

    Blocks can `extend` sequences all the same, on every rank at the same time.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    # Nothing is done in place to what a module gives.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    branches = [layer.branch for layer in model.modules() if isinstance(layer, Residual)]
    wide = [module for module in model.modules() if isinstance(module, Wide) and any(True for _ in module.parameters())]
    for module in (*wide, *branches, model):
        fully_shard(module, mesh=mesh)
    for module in (*branches, model):
        if hasattr(module, "extend"):
            register_fsdp_forward_method(module, "extend")


def whole(tensor: Any) -> Tensor:
    """All of a tensor that may lie in shards; then every rank asks for it."""
    return tensor.full_tensor() if _is_shard(tensor) else tensor


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of `model`, of whole tensors; every rank asks for it."""
    return {name: whole(tensor) for name, tensor in model.state_dict().items()}


def load_whole(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Loads whole tensors into `model`, which may lie in shards."""
    own = model.state_dict()
    model.load_state_dict(
        {name: cut_as(own[name], tensor) if name in own else tensor for name, tensor in weights.items()}
    )


def cut_as(own: Any, tensor: Tensor) -> Tensor:
    """A whole tensor as `own` is: this rank's shard of it, where that is one of a tensor of its shape."""
    if not _is_shard(own) or tensor.shape != own.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(own.device), own.device_mesh, own.placements, src_data_rank=None)


def own_rows(tensors: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """This rank's rows of what lies in shards, and what does not."""
    rows = {name: tensor.to_local() for name, tensor in tensors.items() if _is_shard(tensor)}
    return rows, {name: tensor for name, tensor in tensors.items() if name not in rows}


def _is_shard(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")  # of a DTensor, whose module takes half a second to import
