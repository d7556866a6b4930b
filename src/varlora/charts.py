"""The charts of the report's page, as SVG to be written into it: no file, no script, and the page's own text.

A method has the same colour, marker and dash in every chart; the page's legend shows them once for all.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from varlora.curves import Curve, Series
from varlora.diagram import BLUE, GREY, ORANGE, STYLE, reliability_panel, slice_panel
from varlora.results import Row, Stat

__all__ = ["Look", "accuracy_against_ece", "lines", "looks", "reliability", "slices", "swatch"]

COLOURS = ("#000000", BLUE, "#d55e00", "#009e73", "#cc79a7", "#56b4e9", ORANGE)  # Okabe and Ito's, without the yellow
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p", "<", "h", ">", "*", "d")
DASHES = ("-", "--", ":", "-.")
WIDTH, HEIGHT = 4.0, 3.0  # inches; the page shows them a third larger


@dataclass(frozen=True)
class Look:
    """How a method is drawn."""

    colour: str
    marker: str
    dash: str

    @property
    def line(self) -> dict[str, Any]:
        """What `plot` takes for a line."""
        return {"color": self.colour, "linestyle": self.dash, "linewidth": 1.3}


def looks(names: Sequence[str]) -> dict[str, Look]:
    """Return a look for each name: colours repeat after 7 with another dash, markers after 13."""
    return {
        name: Look(COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)], DASHES[i // len(COLOURS) % len(DASHES)])
        for i, name in enumerate(names)
    }


def swatch(look: Look, name: str) -> str:
    """Return a legend's picture of a look."""

    def draw(axes: Axes) -> None:
        axes.plot([0, 1, 2], [0, 0, 0], marker=look.marker, markevery=[1], markersize=5, clip_on=False, **look.line)
        axes.set(xlim=(-0.2, 2.2), ylim=(-1, 1))
        axes.set_axis_off()

    return _chart(draw, f"{name} {look}", "", (0.45, 0.2))


def reliability(row: Row, bins: int, name: str) -> str:
    """Return a row's reliability diagram."""
    label = f"Reliability diagram of {row.label} on {row.task}"
    return _svg(lambda figure: reliability_panel(figure, row, bins), name, label, (2.5, 3.1), size=9)


def slices(row: Row, name: str) -> str:
    """Return how sure a row is in each slice, one below the other."""

    def draw(figure: Figure) -> None:
        panels = figure.subplots(len(row.slices), 1, sharex=True, squeeze=False)[:, 0]
        for axes, part in zip(panels, row.slices):
            slice_panel(axes, part)
        panels[-1].set_xlabel("confidence")

    label = f"Confidence and accuracy of {row.label} on {row.task}, by slice"
    return _svg(draw, name, label, (WIDTH * 0.9, 0.95 * len(row.slices) + 0.4))


def accuracy_against_ece(series: Sequence[Series], styles: Mapping[str, Look], name: str, label: str) -> str:
    """Return each method's accuracy by its ECE, with standard errors: hollow at the mean, filled with draws."""

    def draw(axes: Axes) -> None:
        for one in series:
            look = styles[one.name]
            rows = list(dict.fromkeys(row for row in (one.mean, one.drawn) if row))
            points = [(100 * row.stats["ece"].mean, 100 * row.stats["accuracy"].mean) for row in rows]
            axes.plot(*zip(*points), color=look.colour, linewidth=0.7, alpha=0.6)
            for row, (x, y) in zip(rows, points):
                axes.errorbar(
                    x,
                    y,
                    xerr=_error(row.stats["ece"]),
                    yerr=_error(row.stats["accuracy"]),
                    color=look.colour,
                    marker=look.marker,
                    markersize=5.5,
                    markerfacecolor="white" if row is not rows[-1] else look.colour,
                    elinewidth=0.8,
                    zorder=2 if row is not rows[-1] else 3,
                )
        axes.margins(0.12)
        axes.grid(alpha=0.25, linewidth=0.5)
        axes.set(xlabel="ECE ×100 (better: to the left)", ylabel="accuracy in % (better: up)")

    return _chart(draw, name, label)


def lines(
    curves: Mapping[str, Curve],
    styles: Mapping[str, Look],
    name: str,
    label: str,
    *,
    x: str,
    y: str,
    factors: tuple[float, float] = (1, 1),
    log: str = "",
    markers: bool = False,
) -> str:
    """Return a line for each curve.

    Args:
        curves: by the name of the method.
        styles: how methods are drawn.
        name: tells this chart from the page's others.
        label: what it shows, read to those who cannot see it.
        x: label of the horizontal axis.
        y: label of the vertical axis.
        factors: what x and y are multiplied by.
        log: axes with a logarithmic scale: "x", "y" or both; y only where its values span a factor of 5.
        markers: draw each point.
    """

    def draw(axes: Axes) -> None:
        for method, curve in curves.items():
            points = [[factor * value for value in values] for factor, values in zip(factors, (curve.x, curve.y))]
            shape: dict[str, Any] = {"marker": styles[method].marker, "markersize": 3} if markers else {}
            axes.plot(*points, **styles[method].line, **shape)
        axes.grid(alpha=0.25, linewidth=0.5)
        axes.set(xlabel=x, ylabel=y)
        values = [value for curve in curves.values() for value in curve.y]
        if "y" in log and 0 < 5 * min(values) < max(values):
            axes.set_yscale("log")
            _plain_ticks(axes.yaxis)
        if "x" in log:
            axes.set_xscale("log")
            _plain_ticks(axes.xaxis)
        else:
            axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 2.5, 5, 10], integer=True))

    return _chart(draw, name, label)


def _plain_ticks(axis: Axis) -> None:
    """Write 0.02, 0.05, 0.1 and not powers of ten."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def _error(stat: Stat) -> float | None:
    return 100 * stat.stderr if stat.stderr == stat.stderr else None


def _chart(draw: Callable[[Axes], None], name: str, label: str, size: tuple[float, float] = (WIDTH, HEIGHT)) -> str:
    def alone(figure: Figure) -> None:
        axes = figure.subplots()
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes)

    return _svg(alone, name, label, size)


def _svg(draw: Callable[[Figure], object], name: str, label: str, inches: tuple[float, float], size: int = 8) -> str:
    """Return what `draw` draws as an SVG element; `name` makes its ids its own, as many charts share a page."""
    settings = {"svg.fonttype": "none", "svg.hashsalt": name, "font.size": size, "axes.edgecolor": GREY}
    with matplotlib.style.context([*STYLE, settings]):
        figure = Figure(figsize=inches, layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return _small(file.getvalue(), label)


def _small(svg: str, label: str) -> str:
    """Return an SVG file as an element without what a page does not need: size, groups' names, fonts, long numbers."""
    svg = re.sub(
        r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg[svg.index("<svg") :], flags=re.DOTALL
    )
    svg = re.sub(r"<[^>]*>", lambda tag: _short(tag[0]), svg)
    svg = re.sub(r"\s*\n\s*", " ", svg).replace("> <", "><").replace("<defs></defs>", "").strip()
    role = f'role="img" aria-label="{escape(label)}"' if label else 'aria-hidden="true"'
    return re.sub(r'<svg[^>]*(viewBox="[^"]*")[^>]*>', lambda found: f"<svg {found[1]} {role}>", svg, count=1)


def _short(tag: str) -> str:
    tag = re.sub(r' id="[\w.]+_\d+"', "", tag)  # those that something refers to are hashes
    tag = tag.replace("xlink:href", "href")
    tag = re.sub(r"font-family: [^;\"]*", "font-family: inherit", tag)
    tag = re.sub(r"font: (\S+) [^;\"]*", r"font-size: \1", tag)
    return re.sub(r"(?<![#\w])-?\d+\.\d{2,}", lambda number: f"{float(number[0]):.1f}", tag)
