"""What a model attends to: the matrix that maps values to outputs, of any block, and what can be said of it."""

from .matrix import mixing_matrix
from .statistics import (
    distance_profile,
    effective_rank,
    mean_distance,
    normalized_entropy,
    reachable,
    row_entropy,
    shares,
    window_share,
)

__all__ = [
    "distance_profile",
    "effective_rank",
    "mean_distance",
    "mixing_matrix",
    "normalized_entropy",
    "reachable",
    "row_entropy",
    "shares",
    "window_share",
]
