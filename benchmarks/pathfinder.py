"""Pathfinder images of this project beside those of the original generator: rates, statistics, labels and a picture.

    python benchmarks/pathfinder.py --samples upstream_generator_pf32_hard_1000.npz
    python benchmarks/pathfinder.py --samples <file> --out results/pathfinder --picture docs/pathfinder.png
    python benchmarks/pathfinder.py --small --out results/pathfinder

The samples are 32 x 32 images of contours of 14 paddles: arrays `images`, uint8 [N, 32, 32], and `labels`, [N]. Rates
are images a second of processor time, on one thread. A few minutes. With `--small`, what a tracer tells of images of
32 x 32 pixels and of this project's smaller ones, at each difficulty that they have room for; that needs no samples.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from seqzoo.runs import provenance
from seqzoo.tasks.pathfinder.generator import generate
from seqzoo.tasks.pathfinder.parameters import (
    DIFFICULTIES,
    SIZES,
    SMALLER_SIZES,
    Parameters,
    parameters_of,
    published,
)
from seqzoo.tasks.pathfinder.statistics import histogram, largest_gap, measure
from seqzoo.tasks.pathfinder.tracer import connected

SHOWN = 8  # images of each set
SMALL = 1000  # images of each size and difficulty

Measures = dict[str, np.ndarray]  # of a set, as `measure` returns them


def draw(parameters: Parameters, n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, float]:
    """Images, labels, and seconds of processor time."""
    size = parameters.size
    images, labels = np.empty((n, size, size), np.uint8), np.empty(n, np.int64)
    start = time.process_time()
    generate(parameters, images, labels, seed=(seed,), workers=1)
    return images, labels, time.process_time() - start


def agreement(images: np.ndarray, labels: np.ndarray, parameters: Parameters) -> dict[str, float]:
    """Shares of the connected and of the others that the tracer says are connected."""
    found = connected(images, parameters)
    return {
        "images": len(images),
        "agreement": float((found == labels).mean()),
        "connected_found": float(found[labels == 1].mean()),
        "others_taken_for_connected": float(found[labels == 0].mean()),
    }


def small(out: Path | None) -> None:
    """What the tracer tells of `SMALL` images of each size and difficulty."""
    rows = []
    for size, difficulty in itertools.product((32, *SMALLER_SIZES), DIFFICULTIES):
        try:
            parameters = parameters_of(size, difficulty)
        except ValueError:  # there is no room for it
            continue
        images, labels, _ = draw(parameters, SMALL)
        rows.append({"size": size, "difficulty": difficulty, **agreement(images, labels, parameters)})
        print(rows[-1], flush=True)
    if out is not None:
        write(out, {"small": {**provenance.of_benchmark({"images": SMALL}), "tracer": rows}})


def write(out: Path, found: dict[str, Any]) -> None:
    """Puts what was found into `pathfinder.json`, beside what is there already."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "pathfinder.json"
    there = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**there, **found}, indent=1) + "\n")


def compare(theirs: Measures, ours: Measures) -> list[dict[str, Any]]:
    """A row for each measure: means, their distance in standard errors, and whether the distributions could be one."""
    rows = []
    for name in theirs:
        a, b = theirs[name], ours[name]
        error = np.sqrt(a.var() / len(a) + b.var() / len(b))
        gap, probability = largest_gap(a, b)
        row = {"measure": name, "samples": a.mean(), "ours": b.mean()}
        row |= {"z": (b.mean() - a.mean()) / error, "ks": gap, "ks_p": probability}
        rows.append({key: value if isinstance(value, str) else float(value) for key, value in row.items()})
    return rows


def picture(
    path: Path, theirs: np.ndarray, ours: np.ndarray, measured: tuple[Measures, Measures], larger: list[np.ndarray]
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(5, SHOWN, figsize=(2 * SHOWN, 10.5), layout="constrained")
    rows = [("original, 32 x 32", theirs), ("ours, 32 x 32", ours)]
    rows += [(f"ours, {len(images[0])} x {len(images[0])}", images) for images in larger]
    for row, (title, images) in zip(axes, rows, strict=False):
        for axis, image in zip(row, images, strict=False):
            axis.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
        row[0].set_ylabel(title)
    grid = axes[0, 0].get_gridspec()
    for axis in axes[4]:
        axis.remove()
    plots = [("ink", "mean brightness"), ("lit_pixels", "lit pixels"), ("components", "components")]
    for i, (name, label) in enumerate(plots):
        axis = figure.add_subplot(grid[4, 2 * i : 2 * i + 2])
        values = np.concatenate([measures[name] for measures in measured])
        width = max(1, round((values.max() - values.min()) / 25)) if name != "ink" else 0.5
        bins = np.arange(values.min() - width / 2, values.max() + width, width)
        for measures, legend in zip(measured, ("original", "ours"), strict=True):
            axis.hist(measures[name], bins=bins, density=True, histtype="step", label=legend)
        axis.set_xlabel(label)
        axis.set_yticks([])
        axis.legend(fontsize="small")
    axis = figure.add_subplot(grid[4, 6:8])
    for images, legend in ((theirs, "original"), (ours, "ours")):
        axis.plot(np.arange(20, 256), histogram(images)[20:], linewidth=0.7, label=legend)
    axis.set_xlabel("brightness of pixels")
    axis.set_yticks([])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    of = parser.add_mutually_exclusive_group(required=True)
    of.add_argument("--samples", type=Path, metavar="FILE")
    of.add_argument("--small", action="store_true")
    parser.add_argument("--images", type=int, default=8000, help="how many of ours are held against the samples")
    parser.add_argument("--out", type=Path, metavar="FOLDER")
    parser.add_argument("--picture", type=Path, metavar="FILE")
    options = parser.parse_args()
    if options.small:
        small(options.out)
        return

    made = provenance.of_benchmark({"samples": options.samples.name, "images": options.images})
    with np.load(options.samples) as stored:
        theirs, their_labels = stored["images"], stored["labels"].astype(np.int64)
    rates, traced = [], [{"set": "samples", "size": 32, **agreement(theirs, their_labels, published(32))}]
    larger = []
    for size in SIZES:
        draw(published(size), 1)  # compiles
        n = {32: options.images, 64: 1000, 128: 1000, 256: 500}[size]
        images, labels, seconds = draw(published(size), n)
        rates.append({"size": size, "images": n, "images_per_second": n / seconds})
        some = slice(0, 2000 if size == 32 else 500)
        traced.append({"set": "ours", "size": size, **agreement(images[some], labels[some], published(size))})
        print(f"{size:>4} x {size:<4} {n / seconds:7.0f} images a second   {traced[-1]}", flush=True)
        if size == 32:
            ours, our_labels = images, labels
        elif size != 64:
            larger.append(images[:SHOWN])
    measured = measure(theirs, published(32)), measure(ours, published(32))
    rows = compare(*measured)
    print("samples", traced[0])
    for row in rows:
        print("  ".join(f"{value:<18}" if isinstance(value, str) else f"{value:8.3f}" for value in row.values()))
    distance = float(np.abs(histogram(theirs) - histogram(ours)).sum() / 2)
    print(f"brightness: total variation {distance:.4f}")
    if options.picture is not None:
        picture(options.picture, theirs, ours, measured, larger)
    if options.out is not None:
        record = {
            **made,
            "rates": rates,
            "labels": {"samples": float(their_labels.mean()), "ours": float(our_labels.mean())},
            "tracer": traced,
            "measures": rows,
            "brightness_total_variation": distance,
        }
        write(options.out, record)


if __name__ == "__main__":
    main()
