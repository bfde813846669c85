"""What a model attends to: the matrix that maps values to outputs, of any block, and what can be said of it."""

from .cost import flops
from .matrix import mixing_matrices, mixing_matrix
from .mixing import LayerMixing, mixing_report
from .run import RunMixing, analyse_run
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
    "LayerMixing",
    "RunMixing",
    "analyse_run",
    "distance_profile",
    "effective_rank",
    "flops",
    "mean_distance",
    "mixing_matrices",
    "mixing_matrix",
    "mixing_report",
    "normalized_entropy",
    "reachable",
    "row_entropy",
    "shares",
    "window_share",
]
