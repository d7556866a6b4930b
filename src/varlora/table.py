"""A table of results, whatever it is written as: lines of a method, τ or setting, blocks of a metric, cells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

__all__ = [
    "ALL",
    "AVERAGE",
    "BEYOND_METRICS",
    "PAPER_METRICS",
    "TASKS",
    "Block",
    "Cell",
    "Line",
    "Metric",
    "ResultTable",
    "Verdict",
]

TASKS = {
    "winogrande_s": "WG-S",
    "arc_challenge": "ARC-C",
    "arc_easy": "ARC-E",
    "winogrande_m": "WG-M",
    "openbookqa": "OBQA",
    "boolq": "BoolQ",
}
"""The paper's tasks, in its order, and what it calls them."""
AVERAGE = "Average"
ALL = "All tasks"

Verdict = Literal["", "better", "worse", "noise", "untested"]


@dataclass(frozen=True)
class Metric:
    """How a metric is shown."""

    name: str
    """Key in `Row.stats`."""
    title: str
    """Its heading, unit included."""
    larger_is_better: bool
    factor: float
    """What numbers are multiplied by."""
    decimals: int
    """Places after the point."""

    def text(self, value: float, sign: str = "") -> str:
        """Return a value as it is printed; with `sign="+"` the sign always stands before it.

        Example:
            >>> PAPER_METRICS[0].text(0.721), PAPER_METRICS[2].text(0.13, "+")
            ('72.1', '+0.13')
        """
        return f"{round(self.factor * value, self.decimals) + 0.0:{sign}.{self.decimals}f}"  # + 0.0: no minus zero

    def verdict(self, cell: Cell) -> Verdict:
        """Say what a cell's change is worth; `untested` where it has no interval, nothing where there is no change.

        Example:
            >>> [PAPER_METRICS[0].verdict(Cell(0.7, change=0.1, low=low, high=0.2)) for low in (0.05, -0.05, None)]
            ['better', 'noise', 'untested']
        """
        if cell.change is None:
            return ""
        if cell.low is None or cell.high is None:
            return "untested"
        if cell.low <= 0 <= cell.high:
            return "noise"
        return "better" if (cell.low > 0) == self.larger_is_better else "worse"


PAPER_METRICS = (
    Metric("accuracy", "ACC (%)", True, 100, 1),
    Metric("ece", "ECE ×100", False, 100, 1),
    Metric("nll", "NLL", False, 1, 2),
)
"""Those of the paper's tables."""
BEYOND_METRICS = (
    Metric("brier", "Brier", False, 1, 3),
    Metric("adaptive_ece", "Adaptive ECE ×100", False, 100, 1),
    Metric("auroc", "AUROC ×100", True, 100, 1),
    Metric("aurc", "AURC ×100", False, 100, 1),
)
"""Further ones; the last three have no bootstrap interval."""


@dataclass(frozen=True)
class Cell:
    """A number of a table, in the metric's own unit, or a text."""

    mean: float | None = None
    """Mean over seeds; None where there is none."""
    stderr: float | None = None
    """Standard error over seeds; None for one seed."""
    change: float | None = None
    """Mean less the baseline's on the same task, over the seeds that both have."""
    low: float | None = None
    """Lower end of the change's interval; None where rows are not paired, or one alone, or there is no bootstrap."""
    high: float | None = None
    """Upper end of the change's interval."""
    seeds: int = 0
    """Number of seeds; for an average the smallest of its tasks."""
    failed: str = ""
    """Which runs failed and why, whether others gave a mean or not."""
    best: bool = False
    """Whether no other line of the block has a better number in this column, as it is printed."""
    text: str = ""
    """What to show in place of a number (Table 3)."""


@dataclass(frozen=True)
class Line:
    """A line of a block."""

    label: str
    """Method, τ or setting."""
    cells: Mapping[str, Cell]
    """By column; what is absent is shown as absent."""
    starred: bool = False
    """Whether one plain model answers, with nothing extra at inference."""
    section: str = ""
    """Heading that lines with the same one stand under, after those without."""


@dataclass(frozen=True)
class Block:
    """Lines of one metric, or of one method's settings."""

    title: str
    """The metric's heading, or the method."""
    lines: tuple[Line, ...]
    metric: Metric | None = None
    """None: cells are texts."""


@dataclass(frozen=True)
class ResultTable:
    """A table, whatever it is written as."""

    name: str
    """`table1`, `table2`, `table3` or `beyond`."""
    title: str
    caption: str
    """What the numbers are."""
    head: str
    """Heading of the labels."""
    columns: tuple[str, ...]
    """Names of tasks, then `AVERAGE` or `ALL`; `heading` says what is written above them."""
    blocks: tuple[Block, ...]
    notes: tuple[str, ...] = ()
    """What was left out or went wrong, a sentence or more each."""

    @staticmethod
    def heading(column: str) -> str:
        """Return what is written above a column."""
        return TASKS.get(column, column)
