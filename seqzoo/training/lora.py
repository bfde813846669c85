"""Low-rank changes of linear projections, through peft."""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from ..config import ConfigError, LoraConfig
from ..models import Backbone

try:
    import peft
    from peft.tuners.lora import Linear
except ImportError as error:
    raise ConfigError(f"tuning=lora: {error}; pip install 'peft>=0.21', or tuning=full, head or ladder") from None

ADAPTER = "default"


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
    peft.inject_adapter_in_model(options, backbone, adapter_name=ADAPTER)
    for module in backbone.modules():
        if isinstance(module, Linear):
            cast(Any, module).lr_factors = {f"lora_B.{ADAPTER}.weight": config.lr_ratio}  # for `parameter_groups`
