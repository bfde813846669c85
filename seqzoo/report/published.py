"""Published Long Range Arena accuracies, each with its source, to stand beside measured ones.

What could not be read in the source named is marked as recalled: a target to verify, not a quotation.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

TASKS = ("lra_listops", "lra_text", "lra_retrieval", "lra_image", "lra_pathfinder", "lra_pathx")

_TAY = "Tay et al. 2021 (arXiv 2011.04006), revised figures in the README of google-research/long-range-arena"
_AMOS = "Amos, Berant and Gupta 2024 (arXiv 2310.02980)"
_RTF = "Parnichkun et al. 2024 (arXiv 2405.06147), table of Long Range Arena results"
_CAUSAL = f"{_AMOS}, as quoted by {_RTF}"
_BIASED = "Yu and Erichson 2025 (arXiv 2505.09022), tables 3 and 4"
_LRU = f"Orvieto et al. 2023 (arXiv 2303.06349); its image task is in colour and not shown; quoted by {_BIASED}"
_SCALED = f"Yu et al. 2025 (arXiv 2410.02035), as quoted by {_BIASED}"
_DFOUT = "Solozabal et al. 2025 (arXiv 2508.20441), table 1"
_HGRN = "Qin et al. 2024 (arXiv 2404.07904), table in the README of OpenNLPLab/HGRN2 at b154c39"
_S5 = f"Smith et al. 2023 (arXiv 2208.04933), as quoted by {_HGRN}"
_GRIFFIN = f"{_HGRN}, a run of its authors"
_MAMBA = f"{_BIASED}, and {_HGRN}; figures of others (fluderm/MLRA) differ by up to 14 points"
_IN_2D = f"{_HGRN}; its scripts scan pictures along rows and columns, in four directions: these are no sequences"
_ABSOLUTE = "absolute positions"  # where ours turn queries and keys


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
    _Row("transformer", "scratch", (36.37, 64.27, 57.46, 42.44, 71.40, "x"), _TAY, label=_ABSOLUTE),
    _Row("linear_transformer", "scratch", (16.13, 65.90, 53.09, 42.34, 75.30, "x"), _TAY),
    _Row("performer", "scratch", (18.01, 65.40, 53.82, 42.77, 77.05, "x"), _TAY),
    _Row("s4d", "scratch", (60.74, 87.03, 90.68, 89.18, 95.42, 97.32), _RTF),
    _Row("lru", "scratch", (60.2, 89.4, 89.9, None, 95.1, 94.2), _LRU, recalled=True),
    _Row("s4d_ft", "scratch", (62.75, 89.76, 92.45, 90.89, 95.89, 97.84), _SCALED),
    _Row("s4d_dfout", "scratch", (61.89, 87.41, 90.95, 88.48, 94.30, 94.17), _DFOUT),
    _Row("b2s6", "scratch", (63.85, 88.32, 91.44, 88.81, 95.93, 97.90), _BIASED),
    _Row("s5", "scratch", (62.15, 89.31, 91.40, 88.00, 95.33, 98.56), _S5),
    _Row("hgrn", "scratch", (59.95, 88.14, 94.23, None, None, None), _HGRN, label="HGRN1"),
    _Row("hgrn", "scratch", (None, None, None, 88.69, 92.92, 97.50), _IN_2D, label="HGRN1 in two dimensions"),
    _Row("hgrn2", "scratch", (60.52, 88.97, 95.07, None, None, None), _HGRN),
    _Row("hgrn2", "scratch", (None, None, None, 89.33, 93.95, 98.12), _IN_2D, label="in two dimensions"),
    _Row("rg_lru", "scratch", (32.34, 71.75, 66.58, 61.15, 73.38, 69.53), _GRIFFIN, label="Griffin"),
    _Row("mamba", "scratch", (38.02, 82.98, 72.14, 69.82, 69.26, 67.32), _MAMBA),
    _Row("mamba2", "scratch", (41.45, 86.09, 79.23, 71.96, 75.45, 69.07), _BIASED),
    _Row("transformer", "masked", (59.75, 89.27, 88.64, 74.22, 88.45, 87.73), _AMOS, recalled=True, label=_ABSOLUTE),
    _Row("transformer", "causal", (59.15, 88.81, 90.38, 76.0, 88.49, 88.05), _CAUSAL, label=_ABSOLUTE),
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
        percent = row.percents[TASKS.index(task)]
        if percent is not None and (row.model, row.objective) == (model, objective or "scratch"):
            return Figure(percent, row.source, row.recalled, row.label)
    return None
