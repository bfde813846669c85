"""Published Long Range Arena accuracies, each with its source, to stand beside measured ones.

What could not be read in the source named is marked as recalled: a target to verify, not a quotation.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

TASKS = ("lra_listops", "lra_text", "lra_retrieval", "lra_image", "lra_pathfinder", "lra_pathx")

_TAY = "Tay et al. 2021 (arXiv 2011.04006), revised figures in the README of google-research/long-range-arena"
_AMOS = "Amos, Berant and Gupta 2024 (arXiv 2310.02980)"
_RTF = "Parnichkun et al. 2024 (arXiv 2405.06147), table of Long Range Arena results"
_LRU = "Orvieto et al. 2023 (arXiv 2303.06349); its image task is in colour and not shown"


class Figure(NamedTuple):
    """A published test accuracy."""

    percent: float | Literal["x"]  # "x": reported as no better than chance
    source: str
    recalled: bool
    label: str  # the model it belongs to, where that is not quite the one it stands beside

    @property
    def reference(self) -> str:
        """The source, saying so where the figure was not read there."""
        caution = "; recalled, not read there, and to be verified" if self.recalled else ""
        return self.source + caution


class _Row(NamedTuple):
    model: str
    objective: Literal["scratch", "masked", "causal"]
    percents: tuple[float | Literal["x"] | None, ...]  # in the order of TASKS; None: no comparable figure
    source: str
    recalled: bool = False
    label: str = ""


_ROWS = (
    _Row("transformer", "scratch", (36.37, 64.27, 57.46, 42.44, 71.40, "x"), _TAY),
    _Row("linear_transformer", "scratch", (16.13, 65.90, 53.09, 42.34, 75.30, "x"), _TAY),
    _Row("performer", "scratch", (18.01, 65.40, 53.82, 42.77, 77.05, "x"), _TAY),
    _Row("s4d", "scratch", (60.74, 87.03, 90.68, 89.18, 95.42, 97.32), _RTF),
    _Row("lru", "scratch", (60.2, 89.4, 89.9, None, 95.1, 94.2), _LRU, recalled=True),
    _Row("transformer", "masked", (59.75, 89.27, 88.64, 74.22, 88.45, 87.73), _AMOS, recalled=True),
    _Row("transformer", "causal", (59.15, 88.81, 90.38, 76.0, 88.49, 88.05), f"{_AMOS}, as quoted by {_RTF}"),
    _Row("s4d", "masked", (61.25, 90.34, 88.74, 89.36, 94.92, 96.94), _AMOS, recalled=True, label="S4"),
)


def published(model: str, task: str, objective: str | None, *, causal: bool) -> Figure | None:
    """The published accuracy of `model` on `task`, or None where there is no comparable one.

    `objective` is that of self-pretraining, None from scratch. Figures from scratch and after masked pretraining are
    of bidirectional models, those after causal pretraining of causal ones.
    """
    if task not in TASKS or causal != (objective == "causal"):
        return None
    for row in _ROWS:
        if row.model == model and row.objective == (objective or "scratch"):
            percent = row.percents[TASKS.index(task)]
            return None if percent is None else Figure(percent, row.source, row.recalled, row.label)
    return None
