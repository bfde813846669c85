"""Models: an embedding, residual layers of blocks, pooling and a head, built from a `TaskSpec`."""

from .ladder import LadderModel
from .model import Backbone, ModelConfig, SequenceModel, build_model, task_head

__all__ = ["Backbone", "LadderModel", "ModelConfig", "SequenceModel", "build_model", "task_head"]
