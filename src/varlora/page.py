"""The report's page: one HTML file that holds all it shows, and loads nothing."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from markupsafe import Markup, escape

from varlora import __version__, charts, typeset
from varlora.charts import Look
from varlora.curves import Curve, Series, Training, logged, out_of_distribution, over_draws, risk_by_coverage, series_of
from varlora.diagnosis import signs_of
from varlora.disagreement import Answered, disagreement
from varlora.errors import VarloraError
from varlora.evaluated import Skipped
from varlora.metrics import RULES, Rule
from varlora.results import Row, origin_cells
from varlora.table import ResultTable
from varlora.templating import environment

__all__ = ["ROWS", "html_page"]

ROWS = 200
"""Rows of a task that the page shows, at most."""
LONGEST = 500  # characters of a prompt that are shown
METRICS: tuple[tuple[str, str, float, int, Callable[[list[float]], float] | None], ...] = (
    # name, heading, factor, decimals, which is better
    ("accuracy", "ACC (%)", 100, 1, max),
    ("ece", "ECE ×100", 100, 1, min),
    ("ece_if_calibrated", "if calibrated", 100, 1, None),
    ("adaptive_ece", "adaptive ECE ×100", 100, 1, min),
    ("nll", "NLL", 1, 3, min),
    ("brier", "Brier", 1, 3, min),
    ("auroc", "AUROC", 1, 3, max),
    ("aurc", "AURC ×100", 100, 1, min),
)


@dataclass(frozen=True)
class Cell:
    """A cell of a table."""

    text: str
    value: str = ""
    """What it is sorted by, where that is not the text."""
    best: bool = False
    """Whether it is the best of its column and task."""


@dataclass(frozen=True)
class Chart:
    """A chart with what is written above it."""

    title: str
    note: str
    svg: Markup


Charts = Mapping[str, Sequence[Chart]]  # by task; under "" where the charts themselves are by task


def html_page(
    rows: Sequence[Row],
    skipped: Sequence[Skipped],
    notes: Sequence[str],
    bins: int,
    rule: Rule,
    tables: Sequence[ResultTable] = (),
    limit: int = ROWS,
    logs: Mapping[str, Mapping[str, Training]] | None = None,
) -> str:
    """Return the page.

    Args:
        rows: lines of the tables, ordered by task and method.
        skipped: runs that are left out, with the reason.
        notes: what a reader should know about the numbers.
        bins: number of bins of ECE and reliability diagrams.
        rule: rule of these bins.
        tables: the paper's tables.
        limit: rows of a task to list with their probabilities, at most.
        logs: what `logged` returns for the rows, if that is known.
    """
    tasks = series_of(rows)
    names = list(dict.fromkeys(one.name for series in tasks.values() for one in series))
    styles = charts.looks(names)
    logs = logged(rows) if logs is None else logs
    outside, problems = _outside(rows)
    matrices, kinds = _matrices(logs)
    templates = environment(autoescape=True)
    templates.filters |= {"short": _short, "breakable": _breakable, "percent": lambda value: f"{100 * value:.0f}"}
    runs = list({run.run: run for row in rows for run in row.runs}.values())
    return templates.get_template("report.html.jinja").render(
        version=__version__,
        tasks=list(tasks),
        methods=list(dict.fromkeys(row.method for row in rows)),
        seeds=len({str(run.settings["seed"]) for run in runs}),
        runs=runs,
        legends={section: _legend(section, shown, styles) for section, shown in _legends(tasks, logs).items()}
        | {"matrices": kinds},
        bins=bins,
        intervals=RULES[rule],
        results=_typeset([table for table in tables if table.name != "table3"]),
        settings_tables=_typeset([table for table in tables if table.name == "table3"]),
        tables_css=Markup(typeset.STYLE),
        settings=any(row.differs for row in rows),
        several=any(row.several for row in rows),
        tempered=any(row.tempered for row in rows),
        calibrated=any(row.calibrated for row in rows),
        metrics=[heading for _, heading, *_ in METRICS],
        numbers=[[*_names(row), *_numbers(row, rows)] for row in rows],
        reliability=_reliability(rows, bins),
        trade_off=_trade_off(tasks, styles),
        coverage=_coverage(tasks, styles),
        draws=_draws(tasks, styles),
        training=_training(logs, styles),
        matrices=matrices,
        signs=signs_of(logs),
        outside=outside,
        slices=_slices(rows),
        slice_rows=[_slice_cells(row) for row in rows if row.slices],
        questions={task: _questions(series, limit) for task, series in tasks.items()},
        origin=[origin_cells(run) for run in runs],
        notes=[*notes, *problems],
        skipped=skipped,
    )


# --- tables


def _typeset(tables: Sequence[ResultTable]) -> list[tuple[str, Markup]]:
    """Return title and HTML of each table; what the first one says below it is not said again."""
    found = []
    for i, table in enumerate(tables):
        if i and table.caption.startswith(tables[0].caption):
            caption = "As the table above." + table.caption.removeprefix(tables[0].caption)
            notes = tuple(note for note in table.notes if note not in tables[0].notes)
            table = replace(table, caption=caption, notes=notes)
        found.append((table.title, Markup(typeset.to_html(table))))
    return found


def _names(row: Row) -> list[Cell]:
    """Return the cells that say what a row is; the third is shown where settings are."""
    return [Cell(row.task), Cell(row.label), Cell(row.differs)]


def _numbers(row: Row, rows: Sequence[Row]) -> list[Cell]:
    cells = [Cell(str(len(row.runs))), Cell(row.size), Cell(str(row.draws or "–"))]
    for name, _, factor, decimals, better in METRICS:
        shown = [_rounded(other, name, factor, decimals) for other in rows if other.task == row.task]
        known = [value for value in shown if not math.isnan(value)]
        best = better is not None and bool(known) and _rounded(row, name, factor, decimals) == better(known)
        mean = row.stats[name].mean
        value = "" if math.isnan(mean) else repr(mean)
        cells.append(Cell(row.stats[name].text(factor, decimals), value, best))
    return cells


def _rounded(row: Row, name: str, factor: float, decimals: int) -> float:
    return round(factor * row.stats[name].mean, decimals)


def _slice_cells(row: Row) -> list[list[str]]:
    return [[*(cell.text for cell in _names(row)), *part.texts] for part in row.slices]


def _outside(rows: Sequence[Row]) -> tuple[list[list[Cell]], list[str]]:
    """Return the lines of the table of other tasks' rows, and what is wrong with the files that are left out."""
    found: list[list[Cell]] = []
    problems: list[str] = []
    for row in rows:
        if not (row.tempered or row.calibrated):  # a temperature changes no order of rows by much, and says nothing new
            try:
                others, left_out = out_of_distribution(row)
            except VarloraError as error:
                problems.append(f"{row.task}, {row.label}: no numbers out of distribution. {error}")
                continue
            for other in others:
                numbers = [
                    Cell(stat.text(1, 3), "" if math.isnan(stat.mean) else repr(stat.mean))
                    for stat in (other.total, other.epistemic)
                ]
                found.append([*_names(row), Cell(other.task), Cell(str(other.rows)), *numbers])
            problems += [note for note in left_out if note not in problems]
    return found, problems


# --- charts


def _reliability(rows: Sequence[Row], bins: int) -> Charts:
    found: dict[str, list[Chart]] = {}
    for i, row in enumerate(rows):
        svg = charts.reliability(row, bins, f"reliability {i}")
        ece = f"ECE {row.stats['ece'].text(100, 1)}"
        found.setdefault(row.task, []).append(_chart(_title(row), ece, svg))
    return found


def _trade_off(tasks: Mapping[str, Sequence[Series]], styles: Mapping[str, Look]) -> Charts:
    found = []
    for task, series in tasks.items():
        svg = charts.accuracy_against_ece(series, styles, f"ece {task}", f"Accuracy by ECE on {task}")
        found.append(_chart(task, "", svg))
    return {"": found}


def _coverage(tasks: Mapping[str, Sequence[Series]], styles: Mapping[str, Look]) -> Charts:
    axes: dict[str, Any] = {"x": "answered, the surest first (%)", "y": "errors among these (%)", "factors": (100, 100)}
    found = []
    for task, series in tasks.items():
        curves = {one.name: risk_by_coverage(one.shown) for one in series}
        svg = charts.lines(curves, styles, f"coverage {task}", f"Risk-coverage curves on {task}", **axes)
        found.append(_chart(task, "", svg))
    return {"": found}


def _draws(tasks: Mapping[str, Sequence[Series]], styles: Mapping[str, Look]) -> Charts:
    found = {}
    for task, series in tasks.items():
        curves = {one.name: over_draws(one.drawn) for one in series if one.drawn}
        if curves:
            found[task] = [
                _lines(
                    curves, key, title, f"draws {key} {task}", styles, x="draws S", y=y, factors=(1, factor), log=log
                )
                for key, title, y, factor, log in (
                    ("accuracy", "Accuracy", "accuracy (%)", 100, "x"),
                    ("ece", "ECE", "ECE (%)", 100, "x"),
                    ("nll", "NLL", "NLL (nats)", 1, "xy"),
                )
            ]
    return found


def _training(by_task: Mapping[str, Mapping[str, Training]], styles: Mapping[str, Look]) -> Charts:
    found = {}
    for task, of_task in by_task.items():
        logs = {name: vars(log) for name, log in of_task.items()}
        parts = (
            ("loss", "Loss", "step", "loss (nats)", "", False),
            ("sigma", "Mean σ", "step", "σ", "y", False),
            ("layers", "σ by layer, at the end", "layer", "σ", "y", True),
            ("signal", "Weights whose signal exceeds their noise", "step", "share", "", False),
            ("rise", "What noise costs", "step", "loss under noise − at the mean (nats)", "", False),
            ("held", "How far noise is held back", "step", "share of σ that is drawn", "", False),
            ("hessian", "How far the Hessian has moved", "step", "mean Hessian / h₀", "", False),
        )
        figures = []
        for key, title, x, y, scale, markers in parts:
            curves = {name: {key: entry[key]} for name, entry in logs.items() if entry[key]}
            if curves:
                names = f"{key} {task}"
                figures.append(_lines(curves, key, title, names, styles, x=x, y=y, log=scale, markers=markers))
        if figures:
            found[task] = figures
    return found


def _matrices(by_task: Mapping[str, Mapping[str, Training]]) -> tuple[Charts, list[tuple[str, Markup]]]:
    """Return σ of each kind of matrix by step, a chart for each method, and what the lines are."""
    names = list(
        dict.fromkeys(name for of_task in by_task.values() for log in of_task.values() for name in log.matrices)
    )
    styles, found = charts.looks(names), {}
    for task, of_task in by_task.items():
        figures = [
            _chart(method, "", charts.lines(log.matrices, styles, f"matrices {method} {task}", f"{method}: σ by step",
                                            x="step", y="σ", log="y", markers=False))
            for method, log in of_task.items()
            if log.matrices
        ]  # fmt: skip
        if figures:
            found[task] = figures
    return found, _legend("matrices", set(names), styles)


def _legends(
    tasks: Mapping[str, Sequence[Series]], by_task: Mapping[str, Mapping[str, Training]]
) -> dict[str, set[str]]:
    """Return the methods that the charts of each section show."""
    every = [one for series in tasks.values() for one in series]
    names = {one.name for one in every}
    return {
        "trade-off": names,
        "coverage": names,
        "draws": {one.name for one in every if one.drawn},
        "training": {name for of_task in by_task.values() for name in of_task},
    }


def _legend(section: str, shown: set[str], styles: Mapping[str, Look]) -> list[tuple[str, Markup]]:
    return [(name, Markup(charts.swatch(look, section))) for name, look in styles.items() if name in shown]


def _lines(
    curves: Mapping[str, Mapping[str, Curve]], key: str, title: str, name: str, styles: Mapping[str, Look], **axes: Any
) -> Chart:
    label = f"{title}: {axes['y']} by {axes['x']}"
    return _chart(
        title, "", charts.lines({method: curve[key] for method, curve in curves.items()}, styles, name, label, **axes)
    )


def _slices(rows: Sequence[Row]) -> Charts:
    found: dict[str, list[Chart]] = {}
    for i, row in enumerate(rows):
        if row.slices:
            found.setdefault(row.task, []).append(_chart(_title(row), "", charts.slices(row, f"slices {i}")))
    return found


def _chart(title: str, note: str, svg: str) -> Chart:
    return Chart(title, note, Markup(svg))


def _title(row: Row) -> str:
    return f"{row.label} {row.differs}".strip()


# --- rows


def _questions(series: Sequence[Series], limit: int) -> dict[str, Any]:
    found = disagreement(series, limit)
    labels = [f"{one.shown.label} {one.shown.differs}".strip() for one in series]
    return {
        "columns": labels,
        "total": found.total,
        "texts": any(row.prompt for row in found.rows),
        "score": "disagreement" if len(series) > 1 else "uncertainty",
        "rows": [(row, [_answer(row, probs) for probs in row.probs]) for row in found.rows],
    }


def _answer(row: Answered, probs: Sequence[float]) -> dict[str, Any]:
    """Return what a cell shows: the probability of the right answer and whether it is given, and a bar for each."""
    top = max(range(len(probs)), key=lambda i: probs[i])
    known = row.label >= 0
    kinds = ["k" if i == row.label else "x" if known and i == top else "" for i in range(len(probs))]
    return {
        "verdict": ("r" if top == row.label else "w") if known else "",
        "value": probs[row.label] if known else probs[top],
        "bars": list(zip(probs, kinds)),
    }


def _short(text: str) -> str:
    """Return a prompt's beginning and end, where it is long."""
    text = "\n".join(" ".join(line.split()) for line in text.strip().splitlines() if line.strip())
    if len(text) <= LONGEST:
        return text
    return f"{text[: LONGEST // 2].rstrip()} […] {text[-LONGEST // 2 :].lstrip()}"


def _breakable(name: str) -> Markup:
    """Return a name that a line may break in behind its underscores and equals signs."""
    return Markup(re.sub(r"(?<=[_=,@])(?=\w)", "<wbr>", str(escape(name))))
