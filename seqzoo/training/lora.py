"""Low-rank changes of linear projections, through peft."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from ..config import ConfigError, LoraConfig
from ..models import Backbone

try:
    import peft
    from peft.tuners.lora import Linear
except ImportError as error:
    raise ConfigError(f"tuning=lora: {error}; pip install 'peft>=0.21', or tuning=full, head or ladder") from None

ADAPTER = "default"


class LowRankLinear(Linear):
    """x -> x (W + alpha / rank · B A)ᵀ, W frozen, for blocks that call the projection and for those that read `weight`.

    peft's own layer gives readers W alone: a recurrence that multiplies by `in_proj.weight` would never see B A.
    """

    lr_factors: dict[str, float]

    @property
    def weight(self) -> Tensor:
        """W + alpha / rank · B A, [out, in]."""
        return cast(nn.Linear, self.get_base_layer()).weight + self.get_delta_weight(ADAPTER)


def add_lora(backbone: Backbone, config: LoraConfig) -> None:
    """Freezes `backbone` and gives each linear projection of its blocks and MLPs a low-rank change, in place.

    A starts at random and B at zero, so that nothing has changed yet. B learns `config.lr_ratio` times as fast as A.

    Source: Hu et al., "LoRA" (2022); for the ratio, Hayou et al., "LoRA+: Efficient Low Rank Adaptation of Large
    Models" (2024).
    """
    backbone.requires_grad_(False)
    layers = backbone.layers.named_modules(prefix="layers")
    projections = [name for name, module in layers if isinstance(module, nn.Linear)]
    options = peft.LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=projections)
    options._register_custom_module({nn.Linear: LowRankLinear})
    peft.inject_adapter_in_model(options, backbone, adapter_name=ADAPTER)
    for module in backbone.modules():
        if isinstance(module, LowRankLinear):
            module.lr_factors = {f"lora_B.{ADAPTER}.weight": config.lr_ratio}
