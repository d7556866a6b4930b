"""Report: a table and a reliability diagram from run directories alone, without model or GPU.

Each run directory gives its saved predictions; the metrics are computed from them anew. Runs that differ by seed only
are one group, with mean and standard error over seeds. A group has a row at the posterior mean (`ivon@mean`) and one of
its averaged draws (`ivon x10`); where there is nothing to draw from (`adamw`) it has one row. Nothing in the files
depends on when or where they are written.
"""

from __future__ import annotations

import io
import json
import math
import os
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.style
import numpy as np
import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Patch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text
from safetensors import SafetensorError, safe_open
from torch import Tensor

from varlora import __version__, metrics
from varlora.errors import DamagedFileError, VarloraError

__all__ = ["Predictions", "Report", "Row", "Skipped", "Stat", "build_report", "read_predictions", "to_table"]

NOT_METHOD = frozenset({"seed", "data_seed", "out", "output", "output_dir", "run_dir", "run_name", "name"})
"""Settings in which runs of one group may differ: the seed, and where a run was written."""

COLUMNS = (("accuracy", 100, 1), ("ece", 100, 1), ("nll", 1, 3), ("brier", 1, 3))  # name, factor, decimals


@dataclass(frozen=True, eq=False)
class Predictions:
    """The saved predictions of one run, and where they come from."""

    run: Path
    """The run directory."""
    config: Mapping[str, Any]
    """Its config.json: settings, versions, commit, task and prompt version."""
    meta: Mapping[str, str]
    """Metadata of predictions.safetensors: task, split, seed, tau, samples."""
    ids: tuple[str, ...]
    """One id for each row."""
    logits: Tensor
    """(S, N, C), -inf where a row does not have the class."""
    logits_mean: Tensor
    """(N, C), logits at the posterior mean."""
    labels: Tensor
    """(N,), -1 where unknown."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """The run's resolved settings."""
        return self.config["settings"]

    @property
    def drawn(self) -> bool:
        """Whether the draws are draws: not the mean itself."""
        return not torch.equal(self.logits, self.logits_mean.expand_as(self.logits))


@dataclass(frozen=True)
class Stat:
    """A metric over the seeds of a group."""

    values: tuple[float, ...]
    """One value for each seed."""

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return math.fsum(self.values) / len(self.values)

    @property
    def stderr(self) -> float:
        """Standard error over seeds; NaN for one seed."""
        return metrics.standard_error(self.values)

    def text(self, factor: float, decimals: int) -> str:
        """Return `mean ± standard error`, or the value alone for one seed."""
        error = "" if math.isnan(self.stderr) else f" ± {factor * self.stderr:.{decimals}f}"
        return f"{factor * self.mean:.{decimals}f}{error}"


@dataclass(frozen=True, eq=False)
class Row:
    """A line of the table: a method on a task, at the mean or with draws, over seeds."""

    task: str
    """Task that was evaluated."""
    label: str
    """What the table calls the method, such as `ivon@mean` or `ivon x10`."""
    differs: str
    """Settings that tell this row from others of the same task and method, such as `lr=0.1`; often empty."""
    draws: int
    """Draws whose probabilities were averaged; 0 at the mean."""
    stats: Mapping[str, Stat]
    """accuracy, nll, ece, brier, each from 0 to 1 except nll (nats) and brier (0 to 2)."""
    reliability: metrics.Reliability
    """Bins of confidence, all seeds pooled."""
    runs: tuple[Predictions, ...]
    """The runs, one for each seed, ordered by seed."""

    @property
    def several(self) -> bool:
        """Whether there are several seeds."""
        return len(self.runs) > 1

    @property
    def size(self) -> str:
        """Number of rows with a known label, as a range where it differs between seeds."""
        sizes = sorted({int((run.labels >= 0).sum()) for run in self.runs})
        return str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]}-{sizes[-1]}"


@dataclass(frozen=True)
class Skipped:
    """A run directory that the report leaves out."""

    run: str
    """The run directory."""
    reason: str
    """Why, and what to do about it."""


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
    """Bins of the ECE and the diagram, equal-width, (lo, hi]."""
    files: Mapping[str, Path]
    """What was written, by file name: report.md, report.json, reliability.png, reliability.svg."""

    @property
    def settings_shown(self) -> bool:
        """Whether the table needs the settings column."""
        return any(row.differs for row in self.rows)

    def cells(self, row: Row) -> list[str]:
        """Return the texts of a line of the table."""
        settings = [row.differs] if self.settings_shown else []
        numbers = [row.stats[name].text(factor, decimals) for name, factor, decimals in COLUMNS]
        return [row.task, row.label, *settings, str(len(row.runs)), row.size, str(row.draws or "-"), *numbers]


def build_report(run_dirs: Sequence[Path], out_dir: Path, bins: int = 10) -> Report:
    """Write report.md, report.json, reliability.png and reliability.svg from run directories.

    A run that cannot be used is listed as skipped, with the reason.

    Args:
        run_dirs: run directories with predictions.
        out_dir: folder to write to, made if absent; files of an earlier report are replaced.
        bins: number of equal-width bins (lo, hi] of ECE and diagram.

    Returns:
        Rows, skipped runs, notes and the paths of the files.

    Raises:
        DamagedFileError: the only run has a damaged file.
        VarloraError: no run, none that can be used, or `out_dir` cannot be written to.

    References:
        Guo et al., On calibration of modern neural networks, 2017 (reliability diagrams).
    """
    paths: dict[Path, Path] = {}
    for run_dir in map(Path, run_dirs):
        paths.setdefault(run_dir.resolve(), run_dir)  # a directory named twice counts once
    if not paths:
        raise VarloraError("Expected at least one run directory, but got none. Pass what `varlora train` wrote.")
    runs: list[Predictions] = []
    skipped: list[Skipped] = []
    for path in paths.values():
        try:
            run = read_predictions(path)
            if not (run.labels >= 0).any():
                raise VarloraError(
                    f"Expected rows with labels, but all {len(run.labels)} labels of {path} are unknown. "
                    "Evaluate a split that has labels: `varlora evaluate RUN`."
                )
            runs.append(run)
        except VarloraError as error:
            if len(paths) == 1:
                raise
            skipped.append(Skipped(str(path), str(error)))
    if not runs:
        reasons = "\n".join(f"  - {skip.run}: {skip.reason}" for skip in skipped)
        raise VarloraError(f"None of the {len(paths)} run directories can be reported on:\n{reasons}")

    groups, repeated = _groups(runs)
    rows = tuple(row for group, differs in zip(groups, _differences(groups)) for row in _rows(group, differs, bins))
    out_dir = Path(out_dir)
    names = ("report.md", "report.json", "reliability.png", "reliability.svg")
    files = {name: out_dir / name for name in names}
    report = Report(rows, (*skipped, *repeated), _notes(groups), bins, files)
    figures = {f"reliability.{kind}": image for kind, image in _diagram(rows, bins).items()}
    contents = {"report.md": _markdown(report).encode(), "report.json": _json(report).encode(), **figures}
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            _write(files[name], content)
    except OSError as error:
        raise VarloraError(f"Expected `out_dir` to be a folder that can be written to, but: {error}.") from error
    return report


def to_table(report: Report) -> Table:
    """Return the report as a table for the terminal."""
    table = Table(
        box=SIMPLE_HEAD,
        show_edge=False,  # edge, padding and folding: readable in terminals of 80 columns
        pad_edge=False,
        padding=0,
        caption=f"ECE with {report.bins} equal-width bins (lo, hi]; ± standard error over seeds",
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


# --- reading


def read_predictions(run_dir: Path) -> Predictions:
    """Read config.json and predictions.safetensors of a run directory.

    Args:
        run_dir: run directory.

    Raises:
        VarloraError: no such directory, or it has no predictions yet.
        DamagedFileError: a file is cut short, altered or lacks something; names it.
    """
    if not run_dir.is_dir():
        raise VarloraError(f"Expected a run directory, but {run_dir} is not a directory.")
    config = _read_json(run_dir / "config.json")
    settings = config.get("settings")
    missing = [k for k in ("task", "model", "method", "seed") if not isinstance(settings, dict) or k not in settings]
    if missing:
        raise DamagedFileError(f"Expected {run_dir / 'config.json'} to have settings {', '.join(missing)}.")

    path = run_dir / "predictions.safetensors"
    if not path.is_file():
        raise VarloraError(f"{run_dir} has no predictions: run `varlora evaluate {run_dir}` first.")
    again = f"Run `varlora evaluate {run_dir}` again."
    try:
        with safe_open(path, framework="pt") as file:
            meta = file.metadata() or {}
            logits, logits_mean, mask, labels = (
                file.get_tensor(name) for name in ("logits", "logits_mean", "mask", "labels")
            )
        ids = tuple(map(str, json.loads(meta["ids"])))
        int(meta["samples"]), float(meta["tau"]), meta["task"], meta["split"]
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise DamagedFileError(f"{path} is damaged ({type(error).__name__}: {error}). {again}") from error
    n, c = mask.shape if mask.ndim == 2 else (-1, -1)
    if (
        (logits.shape, logits_mean.shape, labels.shape) != ((*logits.shape[:1], n, c), (n, c), (n,))
        or 0 in logits.shape
        or len(ids) != n
    ):
        raise DamagedFileError(
            f"{path} is damaged: expected logits (S, N, C), logits_mean (N, C), mask (N, C), labels (N,) and N ids, "
            f"but got {[tuple(t.shape) for t in (logits, logits_mean, mask, labels)]} and {len(ids)} ids. {again}"
        )
    present = mask.bool()
    if not (torch.equal(logits.isfinite(), present.expand_as(logits)) and torch.equal(logits_mean.isfinite(), present)):
        raise DamagedFileError(f"{path} is damaged: logits have to be finite where `mask` says so, else -inf. {again}")
    known = labels >= 0
    if (labels >= c).any() or not present[known].gather(1, labels[known].long()[:, None]).all():
        raise DamagedFileError(f"{path} is damaged: a label is none of its row's answers. {again}")
    return Predictions(run_dir, config, meta, ids, logits, logits_mean, labels)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=str)  # "Infinity": report.json is strict
    except FileNotFoundError as error:
        raise VarloraError(f"{path.parent} is not a run directory: it has no {path.name}.") from error
    except (OSError, ValueError) as error:
        raise DamagedFileError(f"{path} is damaged ({error}).") from error
    if not isinstance(value, dict):
        raise DamagedFileError(f"{path} is damaged: expected a JSON object.")
    return value


# --- grouping


def _traits(run: Predictions) -> dict[str, str]:
    """Return all by which a run is told from others, apart from its seed; nested settings by dotted name."""

    def flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
        for key, value in values.items():
            if key in NOT_METHOD:
                continue
            if isinstance(value, dict):
                yield from flat(value, f"{prefix}{key}.")
            else:
                yield prefix + key, value if isinstance(value, str) else json.dumps(value)

    origin = {key: str(run.config.get(key)) for key in ("task_version", "prompt_version")}
    evaluated = {key: run.meta[key] for key in ("split", "tau", "samples")}
    return {**dict(flat(run.settings)), "task evaluated": run.meta["task"], **evaluated, **origin}


def _groups(runs: Iterable[Predictions]) -> tuple[list[list[Predictions]], list[Skipped]]:
    """Return the runs by what they have in common, each group ordered by seed, and the repetitions left out."""
    groups: dict[tuple[str, ...], dict[str, Predictions]] = {}
    repeated = []
    for run in runs:
        key = (run.meta["task"], str(run.settings["method"]), json.dumps(_traits(run), sort_keys=True))
        seed = json.dumps(run.settings["seed"])
        first = groups.setdefault(key, {}).setdefault(seed, run)
        if first is not run:  # counted twice it would make the standard error too small
            repeated.append(Skipped(str(run.run), f"repeats {first.run}: same settings, same seed {seed}"))
    ordered = [groups[key] for key in sorted(groups)]
    return [[group[seed] for seed in sorted(group, key=lambda s: (len(s), s))] for group in ordered], repeated


def _differences(groups: Sequence[Sequence[Predictions]]) -> list[str]:
    """Return for each group the traits that tell it from others: of its task and method, or (model, split) its task."""
    traits = [_traits(group[0]) for group in groups]
    found = []
    for mine, group in zip(traits, groups):
        rivals = [(t, g[0]) for t, g in zip(traits, groups) if g[0].meta["task"] == group[0].meta["task"]]
        same = [t for t, rival in rivals if rival.settings["method"] == group[0].settings["method"]]
        names = {n for n in ("model", "split") if any(t.get(n) != mine.get(n) for t, _ in rivals)}
        names |= {n for t in same for n in {*t, *mine} if t.get(n) != mine.get(n)}
        found.append(", ".join(f"{name}={mine.get(name, 'unset')}" for name in sorted(names)))
    return found


def _rows(group: Sequence[Predictions], differs: str, bins: int) -> Iterable[Row]:
    method = str(group[0].settings["method"])
    drawn = any(run.drawn for run in group)
    # Draws that all equal the mean come from a point; without draws the adapter's kind of posterior says.
    point = not drawn and all(int(run.meta["samples"]) > 0 or _is_point(run.run) for run in group)
    variants = [(method if point else f"{method}@mean", 0)]
    if drawn:
        samples = len(group[0].logits)
        variants.append((f"{method} x{samples}", samples))
    for label, draws in variants:
        known = [run.labels >= 0 for run in group]
        labels = [run.labels[k].long() for run, k in zip(group, known)]
        probs = [
            metrics.average_probs(run.logits if draws else run.logits_mean[None])[k] for run, k in zip(group, known)
        ]
        values = [metrics.evaluate(p, y, bins) for p, y in zip(probs, labels)]
        width = max(p.shape[1] for p in probs)
        pooled = torch.cat([torch.nn.functional.pad(p, (0, width - p.shape[1])) for p in probs])
        yield Row(
            task=group[0].meta["task"],
            label=label,
            differs=differs,
            draws=draws,
            stats={name: Stat(tuple(value[name] for value in values)) for name in values[0]},
            reliability=metrics.reliability(pooled, torch.cat(labels), bins),
            runs=tuple(group),
        )


def _is_point(run_dir: Path) -> bool:
    try:
        return _read_json(run_dir / "adapter" / "posterior_config.json").get("kind") == "point"
    except VarloraError:  # without the adapter's files the predictions still stand
        return False


def _notes(groups: Sequence[Sequence[Predictions]]) -> tuple[str, ...]:
    notes = []
    for group in groups:
        for run in group:
            unknown = int((run.labels < 0).sum())
            if unknown:
                notes.append(f"{run.run}: {unknown} of {len(run.labels)} rows have no label and are left out.")
        if len({frozenset(run.ids) for run in group}) > 1:
            name = f"{group[0].meta['task']}, {group[0].settings['method']}"
            notes.append(f"{name}: the seeds were evaluated on different rows.")
    return tuple(notes)


# --- writing


def _markdown(report: Report) -> str:
    environment = Environment(
        loader=PackageLoader("varlora"),
        autoescape=False,  # the cell filter escapes what Markdown would read
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["cell"] = _cell
    origins = {
        run.run: [
            str(run.run),
            run.meta["task"],
            run.settings["method"],
            run.meta["split"],
            run.settings["seed"],
            run.meta["tau"],
            run.meta["samples"],
            (run.config.get("versions") or {}).get("varlora", "-"),
            str(run.config.get("commit") or "-")[:12],
        ]
        for row in report.rows
        for run in row.runs
    }
    return environment.get_template("report.md.jinja").render(
        rows=[{"cells": report.cells(row), "several": row.several} for row in report.rows],
        settings=report.settings_shown,
        bins=report.bins,
        diagram="reliability.png",
        notes=report.notes,
        skipped=report.skipped,
        runs=list(origins.values()),
    )


def _cell(value: object) -> str:
    """Return a text as one line that Markdown shows as it is."""
    text = " ".join(str(value).split())
    return "".join(f"\\{char}" if char in "\\`*|<>[]" else char for char in text)


def _json(report: Report) -> str:
    content = {
        "varlora": __version__,
        "ece": {"bins": report.bins, "rule": "right", "intervals": "(lo, hi]"},
        "rows": [_row_json(row) for row in report.rows],
        "skipped": [{"run": skip.run, "reason": skip.reason} for skip in report.skipped],
        "notes": report.notes,
    }
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _row_json(row: Row) -> dict[str, Any]:
    def numbers(values: Tensor) -> list[float | None]:
        return [None if math.isnan(value) else value for value in values.tolist()]

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
        "metrics": {
            name: {
                "mean": stat.mean,
                "stderr": None if math.isnan(stat.stderr) else stat.stderr,
                "values": list(stat.values),
            }
            for name, stat in row.stats.items()
        },
        "reliability": {
            "confidence": numbers(row.reliability.confidence),
            "accuracy": numbers(row.reliability.accuracy),
            "count": row.reliability.count.tolist(),
        },
        "runs": [
            {
                "run": str(run.run),
                "rows": len(run.labels),
                "labelled": int((run.labels >= 0).sum()),
                "predictions": {key: value for key, value in sorted(run.meta.items()) if key != "ids"},
                "config": run.config,
            }
            for run in row.runs
        ],
    }


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# --- the diagram

BLUE, ORANGE, GREY = "#0072b2", "#e69f00", "#555555"  # Okabe and Ito's colours, told apart by colour-blind readers


def _diagram(rows: Sequence[Row], bins: int) -> dict[str, bytes]:
    """Return the reliability diagram as PNG and SVG, a panel for each row."""
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
