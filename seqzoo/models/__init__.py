"""Models: an embedding, residual layers of blocks, pooling and a head, built from a `TaskSpec`."""

from .model import ModelConfig, SequenceModel, build_model, task_head

__all__ = ["ModelConfig", "SequenceModel", "build_model", "task_head"]
