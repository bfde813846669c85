"""Models: an embedding, residual layers of blocks, pooling and a head, built from a `TaskSpec`."""

from .ladder import LadderModel
from .model import Backbone, JointModel, ModelConfig, Plan, SequenceModel, build_model, task_head
from .streaming import ModelState

__all__ = [
    "Backbone",
    "JointModel",
    "LadderModel",
    "ModelConfig",
    "ModelState",
    "Plan",
    "SequenceModel",
    "build_model",
    "task_head",
]
