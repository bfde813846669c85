from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks import Part
from ..blocks.forward_mode import LayerNorm
from .model import Residual, SequenceModel, mlp
from .streaming import ModelState

TEMPERATURE = 0.1  # of the gates: the smaller, the faster they move


class Ladder(nn.Module):
    """A narrow network beside a frozen one, a residual MLP for each of its layers.

    Layer i reads μ_i W_i h_i + (1 - μ_i) s_{i-1}: h_i the output of the frozen layer, s the side network's own, and
    μ_i = sigmoid(α_i / 0.1) a learned gate, which starts half open. s_0 = W_0 h_0 is of the embedding. What the last
    layer puts out is normed and widened to what the head reads; gradients never enter the frozen network.

    Args:
        d_model: width of the frozen layers.
        num_layers: how many there are.
        reduction: the side network's width is `d_model // reduction`.

    Raises:
        ValueError: no width is left.

    Source: Sung et al., "LST: Ladder Side-Tuning for Parameter and Memory Efficient Transfer Learning" (2022), section
    3; there, side layers are Transformer layers, cut out of the frozen ones to begin with.
    """

    def __init__(self, d_model: int, num_layers: int, *, reduction: int) -> None:
        super().__init__()
        if not 1 <= reduction <= d_model:
            raise ValueError(f"ladder.reduction={reduction}: valid: 1 to d_model, {d_model}")
        width = d_model // reduction
        self.down = nn.ModuleList(nn.Linear(d_model, width) for _ in range(num_layers + 1))
        self.gates = nn.Parameter(torch.zeros(num_layers))
        self.layers = nn.ModuleList(Residual(mlp(width, 4 * width), width, 0.0, mixes=False) for _ in range(num_layers))
        self.norm = LayerNorm(width)
        self.up = nn.Linear(width, d_model)

    def forward(self, outputs: Sequence[Tensor]) -> Tensor:
        """Outputs of the embedding and of each layer, [B, T, d_model] each -> [B, T, d_model]."""
        gates = torch.sigmoid(self.gates / TEMPERATURE)
        side = self.down[0](outputs[0])
        for gate, down, layer, x in zip(gates, self.down[1:], self.layers, outputs[1:], strict=True):
            side = layer(gate * down(x) + (1 - gate) * side, None)
        return self.up(self.norm(side))


class LadderModel(SequenceModel):
    """`model` with its backbone frozen and its head reading a `Ladder` beside it."""

    def __init__(self, model: SequenceModel, *, reduction: int) -> None:
        super().__init__(model.backbone, model.head, num_inputs=model.num_inputs)
        self.backbone.freeze()
        layers = self.backbone.layers
        self.ladder = Ladder(self.backbone.norm.normalized_shape[0], len(layers), reduction=reduction)

    def features(
        self,
        inputs: Tensor,
        lengths: Tensor | None,
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
        state: ModelState | None = None,
        part: Part | None = None,
    ) -> Any:
        found = self.backbone.layer_outputs(inputs, lengths, mask, cu_seqlens, state, part)
        return self.ladder(found) if state is None else (self.ladder(found[0]), found[1])
