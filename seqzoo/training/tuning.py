"""What fine-tuning moves: everything, or little beside a frozen backbone. The head always moves."""

from __future__ import annotations

from ..config import Config
from ..models import LadderModel, SequenceModel


def tune(model: SequenceModel, config: Config) -> SequenceModel:
    """`model`, its backbone in place, as `config.tuning` has it trained; `model` itself is used up.

    - "full": all of it.
    - "head": the backbone is frozen.
    - "lora": low-rank changes of the backbone's projections, see `seqzoo.training.lora`.
    - "ladder": a side network beside the frozen backbone, see `seqzoo.models.ladder`.

    A frozen backbone is in eval mode, so codebooks and random features stay as they are. Under "lora" it is in
    training mode and they move as always: they follow keys, and low-rank changes move the keys.

    Raises:
        ConfigError: "lora" needs a package that is not installed.
        ValueError: "ladder" leaves its side network no width.
    """
    if config.tuning == "head":
        model.backbone.freeze()
    elif config.tuning == "lora":
        from .lora import add_lora  # slow to import, and optional

        add_lora(model.backbone, config.lora)
    elif config.tuning == "ladder":
        return LadderModel(model, reduction=config.ladder.reduction)
    return model
