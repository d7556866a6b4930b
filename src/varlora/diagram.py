"""The reliability diagram: accuracy by confidence, a panel for each row of a report."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import matplotlib
import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Patch

if TYPE_CHECKING:
    from varlora.report import Row

__all__ = ["reliability_diagram"]

BLUE, ORANGE, GREY = "#0072b2", "#e69f00", "#555555"  # Okabe and Ito's colours, told apart by colour-blind readers


def reliability_diagram(rows: Sequence[Row], bins: int) -> dict[str, bytes]:
    """Return the diagram as `png` and `svg`; the same rows give the same bytes.

    Args:
        rows: a panel each.
        bins: equal-width bins that the rows' reliability was computed with.
    """
    style = {"font.size": 8, "axes.linewidth": 0.6, "hatch.linewidth": 0.6, "svg.hashsalt": "varlora"}
    columns = len(rows) if len(rows) <= 4 else 3
    lines = math.ceil(len(rows) / columns)
    with matplotlib.style.context(["default", style]):
        figure = Figure(figsize=(2.6 * columns + 0.2, 3.3 * lines + 0.5), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subfigures(lines, columns, squeeze=False).ravel()
        for panel, row in zip(panels, rows):
            _panel(panel, row, bins)
        handles = [
            Patch(facecolor=BLUE, edgecolor="white", label="accuracy"),
            Patch(facecolor="none", edgecolor=ORANGE, hatch="////", label="gap to mean confidence"),
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
        images = {}
        for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
            image = io.BytesIO()
            figure.savefig(image, format=kind, dpi=150, metadata=metadata)
            images[kind] = image.getvalue()
    return images


def _panel(panel: SubFigure, row: Row, bins: int) -> None:
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
    lines = [row.task, row.label, row.differs, f"ECE {row.stats['ece'].text(100, 1)} (x100)"]
    title = "\n".join(part for line in lines for part in textwrap.wrap(line, 34, max_lines=2, placeholder="…"))
    top.set_title(title, fontsize=8, parse_math=False)
    bottom.bar(left, count[used], width, align="edge", color=GREY, edgecolor="white", linewidth=0.5)
    bottom.set(xlabel="confidence", ylabel="rows", xticks=[0, 0.25, 0.5, 0.75, 1], yticks=[0, int(count.max())])
    panel.align_ylabels(axes)
