"""Layers of other people that blocks are held against, and the weights of each by the block's names."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Original(NamedTuple):
    """A layer that is a causal block of default options under other names."""

    layer: str
    package: str
    block: str
    draw: Callable[[int], nn.Module]  # of the width, to be called as a block is
    weights: Callable[[Any], dict[str, Tensor]]

    @property
    def name(self) -> str:
        return f"{self.layer} of {self.package}"

    @property
    def installed(self) -> bool:
        return find_spec(self.package) is not None

    def build(self, D: int) -> nn.Module:
        """The same layer whenever it is built."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return self.draw(D)


class OfPositions(nn.Module):
    """A recurrent block of Griffin, which asks for positions."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
        return self.layer(x, places, attention_mask=None, use_cache=False)[0]


def mamba2(D: int) -> nn.Module:
    transformers = import_module("transformers")
    config = transformers.Mamba2Config(
        hidden_size=D, num_heads=8, head_dim=2 * D // 8, state_size=64, n_groups=1, num_hidden_layers=1
    )
    return import_module("transformers.models.mamba2.modeling_mamba2").Mamba2Mixer(config, layer_idx=0)


def mamba2_weights(layer: Any) -> dict[str, Tensor]:
    gate, rest = layer.in_proj.weight.tensor_split((layer.intermediate_size,))
    return {
        "gate_proj.weight": gate,
        "in_proj.weight": rest,
        "conv.weight": layer.conv1d.weight[:, 0],
        "conv.bias": layer.conv1d.bias,
        "dynamics.dt_bias": layer.dt_bias,
        "dynamics.A_log": layer.A_log,
        "skip": layer.D,
        "norm.scale": layer.norm.weight,
        "out_proj.weight": layer.out_proj.weight,
    }


def mamba_of_transformers(D: int) -> nn.Module:
    config = import_module("transformers").MambaConfig(hidden_size=D, num_hidden_layers=1)
    return import_module("transformers.models.mamba.modeling_mamba").MambaMixer(config, layer_idx=0)


def mamba_of_mambapy(D: int) -> nn.Module:
    package = import_module("mambapy.mamba")
    return package.MambaBlock(package.MambaConfig(d_model=D, n_layers=1))


def mamba_weights(layer: Any) -> dict[str, Tensor]:
    return {
        "in_proj.weight": layer.in_proj.weight,
        "conv.weight": layer.conv1d.weight[:, 0],
        "conv.bias": layer.conv1d.bias,
        "x_proj.weight": layer.x_proj.weight,
        "dt_proj.weight": layer.dt_proj.weight,
        "dynamics.dt_bias": layer.dt_proj.bias,
        "dynamics.A_log": layer.A_log,
        "skip": layer.D,
        "out_proj.weight": layer.out_proj.weight,
    }


def rg_lru(D: int) -> nn.Module:
    config = import_module("transformers").RecurrentGemmaConfig(
        hidden_size=D, lru_width=D, num_attention_heads=4, num_hidden_layers=1
    )
    package = import_module("transformers.models.recurrent_gemma.modeling_recurrent_gemma")
    layer = package.RecurrentGemmaRecurrentBlock(config, layer_idx=0)
    for weight in layer.rg_lru.parameters():  # which the layer leaves as memory had them
        nn.init.normal_(weight, std=0.1)
    return OfPositions(layer)


def rg_lru_weights(module: Any) -> dict[str, Tensor]:
    layer = module.layer
    return {
        "in_proj.weight": layer.linear_x.weight,
        "in_proj.bias": layer.linear_x.bias,
        "gate_proj.weight": layer.linear_y.weight,
        "gate_proj.bias": layer.linear_y.bias,
        "conv.weight": layer.conv_1d.weight[:, 0],
        "conv.bias": layer.conv_1d.bias,
        "dynamics.Lambda": layer.rg_lru.recurrent_param,
        "recurrence_gate.weight": layer.rg_lru.recurrent_gate_weight,
        "recurrence_gate.bias": layer.rg_lru.recurrent_gate_bias.flatten(),
        "input_gate.weight": layer.rg_lru.input_gate_weight,
        "input_gate.bias": layer.rg_lru.input_gate_bias.flatten(),
        "out_proj.weight": layer.linear_out.weight,
        "out_proj.bias": layer.linear_out.bias,
    }


def in_pytorch(name: str) -> Any:
    """A module of transformers without the kernels of fla, which it takes where they are installed: they need a GPU."""
    module = import_module(f"transformers.models.{name}.modeling_{name}")
    for member, function in inspect.getmembers(module, inspect.isfunction):
        setattr(module, member, inspect.unwrap(function))
    return module


def gated_delta_net(D: int) -> nn.Module:
    config = import_module("transformers").Qwen3NextConfig(
        hidden_size=D,
        num_hidden_layers=1,
        linear_num_key_heads=4,
        linear_num_value_heads=4,
        linear_key_head_dim=3 * D // 16,
        linear_value_head_dim=3 * D // 8,
        rms_norm_eps=1e-5,
        layer_types=["linear_attention"],
    )
    return in_pytorch("qwen3_next").Qwen3NextGatedDeltaNet(config, 0)


def gated_delta_net_weights(layer: Any) -> dict[str, Tensor]:
    H, Dk, Dv = layer.num_k_heads, layer.head_k_dim, layer.head_v_dim
    of_heads = layer.in_proj_qkvz.weight.unflatten(0, (H, -1)).split((Dk, Dk, Dv, Dv), 1)
    q, k, v, gate = (part.flatten(0, 1) for part in of_heads)
    beta, decay = (part.flatten(0, 1) for part in layer.in_proj_ba.weight.unflatten(0, (H, -1)).chunk(2, 1))
    return {
        "in_proj.weight": torch.cat([q, k, v, beta, decay, gate]),
        "conv.weight": layer.conv1d.weight[:, 0],
        "decay.A_log": layer.A_log,
        "decay.dt_bias": layer.dt_bias,
        "norm.weight": layer.norm.weight,
        "out_proj.weight": layer.out_proj.weight,
    }


def kda(D: int) -> nn.Module:
    config = import_module("transformers").KimiLinearConfig(
        hidden_size=D, num_hidden_layers=1, linear_num_heads=4, linear_head_dim=D // 4, layer_types=["linear_attention"]
    )
    layer = in_pytorch("kimi_linear").KimiLinearDeltaAttention(config, 0)
    with torch.no_grad():  # the layer leaves these as memory had them, its model starts them so
        layer.forget_gate.A_log.uniform_(1, 16).log_()
        layer.forget_gate.dt_bias.uniform_(math.log(1e-3), math.log(1e-1))
    return layer


def kda_weights(layer: Any) -> dict[str, Tensor]:
    gate = layer.forget_gate
    first = (layer.q_proj, layer.k_proj, layer.v_proj, layer.b_proj, gate.f_a_proj, layer.g_a_proj)
    return {
        "in_proj.weight": torch.cat([each.weight for each in first]),
        "conv.weight": layer.conv1d.weight[:, 0],
        "decay_proj.weight": gate.f_b_proj.weight,
        "gate_proj.weight": layer.g_b_proj.weight,
        "decay.A_log": gate.A_log.flatten(),
        "decay.dt_bias": gate.dt_bias,
        "norm.weight": layer.o_norm.weight,
        "out_proj.weight": layer.o_proj.weight,
    }


def mlstm(D: int) -> nn.Module:
    package = import_module("xlstm.blocks.mlstm.layer")
    layer = package.mLSTMLayer(package.mLSTMLayerConfig(embedding_dim=D, num_heads=4, context_length=1))
    layer.mlstm_cell.causal_mask = None  # made for the sequence, whatever its length
    return layer


def mlstm_weights(layer: Any) -> dict[str, Tensor]:
    cell = layer.mlstm_cell
    gates = (gate.weight.chunk(3, 1) for gate in (cell.igate, cell.fgate))
    return {
        "in_proj.weight": layer.proj_up.weight,
        "conv.weight": layer.conv1d.conv.weight[:, 0],
        "conv.bias": layer.conv1d.conv.bias,
        **{f"{name}.weight": getattr(layer, name).weight.mT for name in ("q_proj", "k_proj", "v_proj")},
        **{f"gate_proj.{n}.weight": torch.cat(pair) for n, pair in enumerate(zip(*gates, strict=True))},
        "gate_bias.bias": torch.cat([cell.igate.bias, cell.fgate.bias]),
        "norm_weight": 1 + cell.outnorm.weight,
        "skip": layer.learnable_skip,
        "out_proj.weight": layer.proj_down.weight,
    }


ORIGINALS = (
    Original("Mamba", "transformers", "mamba", mamba_of_transformers, mamba_weights),
    Original("Mamba", "mambapy", "mamba", mamba_of_mambapy, mamba_weights),
    Original("Mamba-2", "transformers", "mamba2", mamba2, mamba2_weights),
    Original("RG-LRU", "transformers", "rg_lru", rg_lru, rg_lru_weights),
    Original("Gated DeltaNet", "transformers", "gated_delta_net", gated_delta_net, gated_delta_net_weights),
    Original("KDA", "transformers", "kda", kda, kda_weights),
    Original("mLSTM", "xlstm", "mlstm", mlstm, mlstm_weights),
)
