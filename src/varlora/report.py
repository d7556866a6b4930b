"""Report: tables and diagrams from run directories alone, without model or GPU.

The numbers are those of `varlora.results`. Nothing in the files depends on when or where they are written.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from varlora import __version__
from varlora.curves import logged
from varlora.diagnosis import signs_of
from varlora.diagram import reliability_diagram, slices_diagram
from varlora.errors import VarloraError
from varlora.evaluated import EvaluatedRun, Skipped, read_runs
from varlora.files import write_bytes
from varlora.metrics import RULES, Rule
from varlora.page import html_page
from varlora.paper import beside_paper
from varlora.results import Row, Slice, Stat, origin_cells, rows_of_runs
from varlora.table import ResultTable
from varlora.tables import method_tables, table2, table3
from varlora.templating import environment
from varlora.typeset import to_latex, to_markdown

__all__ = ["CALIBRATED", "TEMPERED", "Report", "build_report", "paper_tables", "to_table"]

BEGINS = b'{\n  "varlora": '
"""What a report.json begins with."""

COLUMNS = (("accuracy", 100, 1), ("ece", 100, 1), ("nll", 1, 3), ("brier", 1, 3))  # name, factor, decimals
TEMPERED = "+T: with the logits divided by a temperature that is fitted on the held-out rows"
CALIBRATED = "calibrated: variance, pruning, temperature and number of draws as chosen on the held-out rows"


@dataclass(frozen=True, eq=False)
class Report:
    """What `build_report` found and wrote."""

    rows: tuple[Row, ...]
    """Lines of the table, ordered by task and method."""
    skipped: tuple[Skipped, ...]
    """Run directories left out."""
    notes: tuple[str, ...]
    """What a reader should know about the numbers: rows without label, seeds with different rows."""
    bins: int
    """Bins of the ECE and the diagram, of equal width."""
    rule: Rule
    """Which bin a confidence on a border goes to."""
    files: Mapping[str, Path]
    """What was written, by file name: report.html, report.md, report.json, table1.tex, reliability.png and .svg;
    slices.png and .svg if a task slices its rows."""
    tables: tuple[ResultTable, ...]
    """The paper's tables, Table 1 first."""
    signs: tuple[tuple[str, str, str], ...] = ()
    """Task, method and sentence of each sign that a scale does not suit."""

    @property
    def tempered(self) -> bool:
        """Whether a row has its logits divided by a temperature."""
        return any(row.tempered for row in self.rows)

    @property
    def footnotes(self) -> list[str]:
        """What the additions to the methods' names mean, of those that are there."""
        return [TEMPERED] * self.tempered + [CALIBRATED] * any(row.calibrated for row in self.rows)

    @property
    def settings_shown(self) -> bool:
        """Whether the table needs the settings column."""
        return any(row.differs for row in self.rows)

    def cells(self, row: Row) -> list[str]:
        """Return the texts of a line of the table."""
        settings = [row.differs] if self.settings_shown else []
        numbers = [row.stats[name].text(factor, decimals) for name, factor, decimals in COLUMNS]
        return [row.task, row.label, *settings, str(len(row.runs)), row.size, str(row.draws or "-"), *numbers]

    def slice_cells(self, row: Row, part: Slice) -> list[str]:
        """Return the texts of a line of the table of slices."""
        settings = [row.differs] if self.settings_shown else []
        return [row.task, row.label, *settings, *part.texts]


def build_report(
    run_dirs: Sequence[Path],
    out_dir: Path,
    bins: int = 10,
    failed: Sequence[Skipped] = (),
    rule: Rule = "right",
    compare: Literal["paper"] | None = None,
) -> Report:
    """Write report.html, report.md, report.json, table1.tex and the diagrams from run directories.

    A run that cannot be used is listed as skipped, with the reason.

    Args:
        run_dirs: run directories with predictions.
        out_dir: folder to write to, made if absent; files of an earlier report are replaced.
        bins: number of equal-width bins of ECE and diagram.
        failed: runs that came to no end, with the reason; they are listed, and marked in the tables.
        rule: `right` for bins (lo, hi], `left` for [lo, hi).
        compare: `paper` lays the paper's numbers beside ours in the tables.

    Returns:
        Rows, skipped runs, notes and the paths of the files.

    Raises:
        DamagedFileError: the only run has a damaged file.
        VarloraError: no run, none that can be used, or `out_dir` cannot be written to, or holds files of the same names
            that are of no report.

    Example:
        >>> from varlora import evaluate
        >>> _ = evaluate(run_dir, samples=0, say=lambda words: None)  # of a run that `train` made
        >>> report = build_report([run_dir], scratch / "report")
        >>> [row.label for row in report.rows][0], report.files["report.html"].is_file()
        ('adamw', True)

    References:
        Guo et al., On calibration of modern neural networks, 2017 (reliability diagrams).
    """
    out_dir = Path(out_dir)
    _check_replaceable(out_dir)
    runs, skipped = read_runs(run_dirs)
    rows, repeated, notes = rows_of_runs(runs, bins, rule)
    figures = {f"reliability.{kind}": image for kind, image in reliability_diagram(rows, bins).items()}
    if any(row.slices for row in rows):
        figures |= {f"slices.{kind}": image for kind, image in slices_diagram(rows).items()}
    files = {name: out_dir / name for name in ("report.html", "report.md", "report.json", "table1.tex", *figures)}
    tables = paper_tables(rows, failed, bins, rule)
    if compare == "paper":
        tables = [beside_paper(table) for table in tables]
    logs = logged(rows)
    left_out = (*skipped, *repeated, *failed)
    report = Report(tuple(rows), left_out, tuple(notes), bins, rule, files, tuple(tables), tuple(signs_of(logs)))
    texts = {
        "report.json": _json(report),  # first: it tells what is written after it for a report's
        "report.html": html_page(report.rows, report.skipped, notes, bins, rule, tables, logs=logs),
        "report.md": _markdown(report),
        "table1.tex": to_latex(tables[0]),
    }
    # a path that is not UTF-8, as one that was left out may be, has a ? there
    contents = {name: text.encode(errors="replace") for name, text in texts.items()} | figures
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            write_bytes(files[name], content)
        for name in {"slices.png", "slices.svg"} - contents.keys():  # of an earlier report
            (out_dir / name).unlink(missing_ok=True)
    except OSError as error:
        raise VarloraError(f"Expected `out_dir` to be a folder that can be written to, but: {error}.") from error
    return report


def _check_replaceable(out_dir: Path) -> None:
    """Raise where files of a report's names are there, but no report."""
    pictures = [f"{name}.{form}" for name in ("reliability", "slices") for form in ("png", "svg")]
    ours = ("report.html", "report.md", "report.json", "table1.tex", *pictures)
    there = [name for name in ours if (out_dir / name).exists()]
    if not there:
        return
    path = out_dir / "report.json"
    begins = b""
    if path.is_file():
        with path.open("rb") as file:
            begins = file.read(len(BEGINS))
    if begins != BEGINS:
        raise VarloraError(
            f"{out_dir} has a file {there[0]}, but no earlier report, so it is not replaced. Give another folder."
        )


def to_table(report: Report) -> Table:
    """Return the report as a table for the terminal."""
    table = Table(
        box=SIMPLE_HEAD,
        show_edge=False,  # edge, padding and folding: readable in terminals of 80 columns
        pad_edge=False,
        padding=0,
        caption=f"ECE with {report.bins} equal-width bins {RULES[report.rule]}; ± standard error over seeds"
        + "".join(f"\n{note}" for note in report.footnotes),
        caption_justify="left",
    )
    for name in ("task", "method", *(["settings"] if report.settings_shown else [])):
        table.add_column(name, overflow="fold")
    for name in ("seeds", "rows", "draws", "ACC (%)", "ECE x100", "NLL", "Brier"):
        table.add_column(name, justify="right", overflow="fold")
    previous = ""
    for row in report.rows:
        if previous and row.task != previous:
            table.add_section()
        previous = row.task
        table.add_row(*map(Text, report.cells(row)))  # Text: names are shown as they are, never read as markup
    return table


def paper_tables(
    rows: Sequence[Row], failed: Sequence[Skipped] = (), bins: int = 10, rule: Rule = "right"
) -> list[ResultTable]:
    """Return the paper's tables, Table 1 first; the second only where runs were evaluated at other variances.

    Args:
        rows: rows of one call of `rows_of_runs`.
        failed: runs that failed.
        bins: bins of the ECE, as of the rows.
        rule: rule of these bins, as of the rows.
    """
    runs = _runs(rows)
    tables = [*method_tables(rows, failed=failed)]
    if any(any(run.run.glob("predictions-tau-*.safetensors")) for run in runs):
        tables.append(table2(runs, failed=failed, bins=bins, rule=rule))
    return [*tables, table3([(run.meta["task"], run.settings) for run in runs])]


def _runs(rows: Sequence[Row]) -> list[EvaluatedRun]:
    return list({run.run: run for row in rows for run in row.runs}.values())


# --- writing


def _markdown(report: Report) -> str:
    templates = environment(autoescape=False)  # the cell filter escapes what Markdown would read
    templates.filters["cell"] = _cell
    return templates.get_template("report.md.jinja").render(
        table1=to_markdown(report.tables[0]),
        rows=[{"cells": report.cells(row), "several": row.several} for row in report.rows],
        slices=[report.slice_cells(row, part) for row in report.rows for part in row.slices],
        settings=report.settings_shown,
        bins=f"{report.bins} equal-width bins {RULES[report.rule]}",
        footnotes=report.footnotes,
        diagram="reliability.png",
        notes=report.notes,
        signs=report.signs,
        skipped=report.skipped,
        runs=[origin_cells(run) for run in _runs(report.rows)],
    )


def _cell(value: object) -> str:
    """Return a text as one line that Markdown shows as it is."""
    text = " ".join(str(value).split())
    return "".join(f"\\{char}" if char in "\\`*|<>[]" else char for char in text)


def _json(report: Report) -> str:
    content = {
        "varlora": __version__,
        "ece": {"bins": report.bins, "rule": report.rule, "intervals": RULES[report.rule]},
        "rows": [_row_json(row) for row in report.rows],
        "skipped": [{"run": skip.run, "reason": skip.reason} for skip in report.skipped],
        "notes": report.notes,
        "signs": [{"task": task, "method": method, "sign": sentence} for task, method, sentence in report.signs],
    }
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _row_json(row: Row) -> dict[str, Any]:
    first = row.runs[0]
    return {
        "task": row.task,
        "method": first.settings["method"],
        "model": first.settings["model"],
        "label": row.label,
        "differs": row.differs,
        "split": first.meta["split"],
        "tau": float(first.meta["tau"]),
        "draws": row.draws,
        "seeds": [run.settings["seed"] for run in row.runs],
        "metrics": _stats_json(row.stats),
        "slices": {part.name: _stats_json(part.stats) for part in row.slices},
        "reliability": {
            "confidence": _numbers(row.reliability.confidence.tolist()),
            "accuracy": _numbers(row.reliability.accuracy.tolist()),
            "count": row.reliability.count.tolist(),
        },
        "runs": [
            {
                "run": str(run.run),
                "rows": len(run.known),
                "labelled": int(run.known.sum()),
                "predictions": dict(sorted(run.meta.items())),
                "config": _strict(run.config),
            }
            for run in row.runs
        ],
    }


def _stats_json(stats: Mapping[str, Stat]) -> dict[str, Any]:
    return {
        name: dict(zip(("mean", "stderr"), _numbers([stat.mean, stat.stderr]))) | {"values": _numbers(stat.values)}
        for name, stat in stats.items()
    }


def _numbers(values: Sequence[float]) -> list[float | None]:
    """JSON has no NaN: what is not defined is null."""
    return [None if math.isnan(value) else value for value in values]


def _strict(value: Any) -> Any:
    """JSON has no infinity, which a setting may be; a token, which a run of an older version may have, is left out."""
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items() if not str(key).endswith("_token")}
    if isinstance(value, list):
        return [_strict(item) for item in value]
    return json.dumps(value) if isinstance(value, float) and not math.isfinite(value) else value
