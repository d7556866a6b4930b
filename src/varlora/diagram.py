"""The report's diagrams: accuracy by confidence for each row, and how sure each row is in each slice of the data."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib
import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

if TYPE_CHECKING:
    from varlora.results import Row, Slice

__all__ = [
    "BLUE",
    "GREY",
    "ORANGE",
    "STYLE",
    "reliability_diagram",
    "reliability_panel",
    "scale_diagram",
    "slice_panel",
    "slices_diagram",
]

STYLE: list[Any] = [
    "default",
    {"font.size": 8, "axes.linewidth": 0.6, "hatch.linewidth": 0.6, "svg.hashsalt": "varlora"},
]
BLUE, ORANGE, GREY = "#0072b2", "#e69f00", "#555555"  # Okabe and Ito's colours, told apart by colour-blind readers


def scale_diagram(trials: Sequence[Mapping[str, float]], bound: float, sigma: float) -> dict[str, bytes]:
    """Return what noise of each scale that was tried does to the predictions, as `png` and `svg`.

    Args:
        trials: `sigma` and `kl` of each.
        bound: the KL that is borne, in nats.
        sigma: what was found.
    """
    shown = sorted((trial["sigma"], trial["kl"]) for trial in trials if 0 < trial["kl"] < math.inf)
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(4.2, 3.0), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        axes.loglog(*zip(*shown), "o", color=BLUE, label="tried") if shown else axes.loglog()
        axes.axhline(bound, color=GREY, linewidth=0.8, linestyle="--", label="bound")
        axes.plot([sigma], [bound], "D", color=ORANGE, label=f"found: {sigma:.3g}")
        axes.set_xlabel("σ of the noise in every weight")
        axes.set_ylabel("change of the predictions, KL in nats")
        axes.grid(alpha=0.3, linewidth=0.5)
        axes.legend(frameon=False)
        return _images(figure)


def reliability_diagram(rows: Sequence[Row], bins: int) -> dict[str, bytes]:
    """Return the diagram as `png` and `svg`; the same rows give the same bytes.

    Args:
        rows: a panel each.
        bins: equal-width bins that the rows' reliability was computed with.
    """
    columns = len(rows) if len(rows) <= 4 else 3
    lines = math.ceil(len(rows) / columns)
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(2.6 * columns + 0.2, 3.3 * lines + 0.5), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subfigures(lines, columns, squeeze=False).ravel()
        for panel, row in zip(panels, rows):
            top = reliability_panel(panel, row, bins)
            lines_of = [row.task, row.label, row.differs, f"ECE {row.stats['ece'].text(100, 1)} (x100)"]
            title = [part for line in lines_of for part in textwrap.wrap(line, 34, max_lines=2, placeholder="…")]
            top.set_title("\n".join(title), fontsize=8, parse_math=False)
        handles = [
            Patch(facecolor=BLUE, edgecolor="white", label="accuracy"),
            Patch(facecolor="none", edgecolor=ORANGE, hatch="////", label="gap to mean confidence"),
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
        return _images(figure)


def slices_diagram(rows: Sequence[Row]) -> dict[str, bytes]:
    """Return how sure each row is in each slice, against how right, as `png` and `svg`.

    Args:
        rows: a line of panels each, a panel for each slice; rows without slices are left out.
    """
    rows = [row for row in rows if row.slices]
    columns = max(len(row.slices) for row in rows)
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(3.2 * columns + 0.6, 1.25 * len(rows) + 0.9), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(len(rows), columns, sharex=True, squeeze=False)
        tasks = {row.task for row in rows}
        for line, row in zip(panels, rows):
            parts = (row.task if len(tasks) > 1 else "", row.label, row.differs)
            name = "\n".join(wrapped for part in parts for wrapped in textwrap.wrap(part, 24))
            line[0].set_ylabel(name, rotation=0, ha="right", va="center", parse_math=False)
            for axes in line[len(row.slices) :]:
                axes.set_visible(False)
            for axes, part in zip(line, row.slices):
                slice_panel(axes, part)
        for column in range(columns):
            lowest = max(i for i, row in enumerate(rows) if len(row.slices) > column)
            panels[lowest, column].set_xlabel("confidence: probability of the likeliest answer")
            panels[lowest, column].tick_params(labelbottom=True)
        handles = [
            Patch(facecolor=GREY, alpha=0.4, label="share of rows"),
            Line2D([], [], color=BLUE, linewidth=2, label="how right: accuracy"),
            Line2D([], [], color=ORANGE, linewidth=2, label="how sure: mean confidence"),
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
        return _images(figure)


def slice_panel(axes: Axes, part: Slice) -> None:
    """Draw how sure a row is in a slice, as a histogram and its mean, and how right."""
    shares, edges = np.histogram(part.confidence.numpy(), bins=20, range=(0, 1))
    axes.stairs(shares / max(1, shares.sum()), edges, fill=True, color=GREY, alpha=0.4)
    right, sure = part.stats["accuracy"].mean, part.stats["confidence"].mean
    axes.axvspan(min(right, sure), max(right, sure), facecolor="none", edgecolor=ORANGE, hatch="////", linewidth=0)
    axes.axvline(right, color=BLUE, linewidth=2)
    axes.axvline(sure, color=ORANGE, linewidth=2)
    axes.set(xlim=(0, 1), ylim=(0, 1), yticks=[], xticks=[0, 0.25, 0.5, 0.75, 1])
    title = f"{textwrap.shorten(part.name, 30, placeholder='…')}: {sure:.0%} sure, {right:.0%} right"
    axes.set_title(title, fontsize=8, parse_math=False)


def _images(figure: Figure) -> dict[str, bytes]:
    images = {}
    for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
        image = io.BytesIO()
        figure.savefig(image, format=kind, dpi=150, metadata=metadata)
        images[kind] = image.getvalue()
        figure.set_layout_engine("none")  # places stay: finding them takes as long as drawing
    return images


def reliability_panel(panel: Figure | SubFigure, row: Row, bins: int) -> Axes:
    """Draw a row's accuracy by confidence, and below it the number of rows; return the upper axes, without a title."""
    axes: tuple[Axes, Axes] = panel.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    top, bottom = axes
    count = row.reliability.count.numpy()
    used = count > 0
    left, width = np.arange(bins)[used] / bins, 1 / bins
    right, confidence = row.reliability.accuracy.numpy()[used], row.reliability.confidence.numpy()[used]
    top.bar(left, right, width, align="edge", color=BLUE, edgecolor="white", linewidth=0.5)
    top.bar(
        left,
        confidence - right,
        width,
        bottom=right,
        align="edge",
        fill=False,
        edgecolor=ORANGE,
        hatch="////",
        linewidth=0.8,
    )
    top.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1.0)
    top.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy", yticks=[0, 0.25, 0.5, 0.75, 1])
    bottom.bar(left, count[used], width, align="edge", color=GREY, edgecolor="white", linewidth=0.5)
    bottom.set(xlabel="confidence", ylabel="rows", xticks=[0, 0.25, 0.5, 0.75, 1], yticks=[0, int(count.max())])
    panel.align_ylabels(axes)
    return top
