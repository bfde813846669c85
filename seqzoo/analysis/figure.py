"""The mixing of a run as one picture: a row for each stage, a column for each block, and distances below."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from ..files import write_bytes
from ..messages import printable
from .mixing import LayerMixing
from .run import RunMixing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLES = {"initial": "random\ninitialisation", "pretrain": "after\npretraining", "finetune": "after\nfine-tuning"}
COLOURS = {"initial": "#9aa5b1", "pretrain": "#1f5fa8", "finetune": "#d1732b"}
PALETTE = 256  # colours: a third of the bytes
SIDE = 2.3  # inches, of a matrix
FAINTEST, STRONGEST = 0.1, 100  # times what uniform weights would be
STYLES = {"initial": "-", "pretrain": "-", "finetune": "--"}  # fine-tuning often leaves what pretraining made
NEAREST = 0.5  # where a logarithmic axis shows the distance 0


def save_figure(found: RunMixing, path: Path) -> None:
    """Writes `picture_of` a run to `path`."""
    write_bytes(path, picture_of(found))


def picture_of(found: RunMixing) -> bytes:
    """Mixing matrices and distance profiles, drawn: the bytes of a PNG file.

    Colours are a weight's share of its row times the number of positions the row can reach, 1 where weights are
    uniform. Distances: a thin line for each block, a thick one for their mean.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from PIL import Image

    stages, columns = list(found.stages), len(found.stages["initial"])
    width, height = max(6.5, SIDE * columns + 1.6), (SIDE + 0.45) * len(stages)
    figure = Figure(figsize=(width, height + 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    parts = figure.subfigures(2, 1, squeeze=False, height_ratios=[height + 0.4, 3.0])
    above, below = parts[:, 0]
    grid = above.subplots(len(stages), columns, squeeze=False)
    norm = LogNorm(FAINTEST, STRONGEST, clip=True)
    for row, stage in zip(grid, stages, strict=True):
        for column, (axes, layer) in enumerate(zip(row, found.stages[stage], strict=True), 1):
            image = axes.imshow(layer.picture.numpy(), norm=norm, cmap="magma", interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.set_xlabel(_summary(layer), fontsize=7)
            if stage == "initial":
                axes.set_title(f"block {column}", fontsize=9)
        row[0].set_ylabel(TITLES[stage], fontsize=9)
    above.colorbar(image, ax=grid, shrink=0.6, label="weight, times uniform (output down, input across)")
    direction = "causal" if found.causal else "bidirectional"
    title = f"{found.task} · {found.model} ({found.stages['initial'][0].block}, {direction})"
    above.suptitle(printable(title), fontsize=10, parse_math=False)
    _draw_profiles(below.subplots(), found)
    drawn, reduced = BytesIO(), BytesIO()
    figure.savefig(drawn, dpi=130)
    Image.open(drawn).convert("RGB").quantize(PALETTE).save(reduced, format="PNG", optimize=True)
    return reduced.getvalue()


def _summary(layer: LayerMixing) -> str:
    entropy, rank, distance = (
        sum(values) / len(values) for values in (layer.normalized_entropy, layer.effective_rank, layer.mean_distance)
    )
    return f"entropy {entropy:.2f} · rank {rank:.3g} · distance {distance:.3g}"


def _draw_profiles(axes: Axes, found: RunMixing) -> None:
    for stage, layers in found.stages.items():
        profiles = [layer.distance_profile for layer in layers]
        distances = [NEAREST, *range(1, len(profiles[0]))]
        for profile in profiles:
            axes.plot(distances, profile, color=COLOURS[stage], linewidth=0.6, alpha=0.5)
        mean = [sum(values) / len(values) for values in zip(*profiles, strict=True)]
        label = TITLES[stage].replace("\n", " ")
        axes.plot(distances, mean, STYLES[stage], color=COLOURS[stage], linewidth=1.6, label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    ticks = [4**power for power in range(8) if 4**power < len(found.stages["initial"][0].distance_profile)]
    axes.set_xticks([NEAREST, *ticks], ["0", *map(str, ticks)])
    axes.minorticks_off()
    axes.set_ylim(bottom=max(axes.get_ylim()[0], 1e-6))
    axes.set_xlabel("distance |t - s|, positions")
    axes.set_ylabel("share of weight")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
