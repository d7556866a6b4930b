"""Report: tables and diagrams from run directories alone, without model or GPU.

Each run directory gives its saved predictions; the metrics are computed from them anew. Runs that differ by seed only
are one group, with mean and standard error over seeds. A group has a row at the posterior mean (`ivon@mean`) and one of
its averaged draws (`ivon x10`); where there is nothing to draw from (`adamw`) it has one row. Where
a task names a field to slice its rows by, each slice's accuracy is shown beside its confidence. Nothing in the files
depends on when or where they are written.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text
from torch import Tensor

from varlora import __version__, metrics
from varlora.diagram import reliability_diagram, slices_diagram
from varlora.errors import DamagedFileError, VarloraError
from varlora.predictions import Predictions, load_predictions
from varlora.run import read_json

__all__ = ["EvaluatedRun", "Report", "Row", "Skipped", "Slice", "Stat", "build_report", "read_run", "to_table"]

NOT_METHOD = frozenset({"seed", "data_dir", "run_dir", "run_name", "checkpoint_every", "sources"})
"""Settings in which runs of one group may differ: the seed, and where a run reads and is written."""

COLUMNS = (("accuracy", 100, 1), ("ece", 100, 1), ("nll", 1, 3), ("brier", 1, 3))  # name, factor, decimals
TEMPERED = "+T: with the logits divided by a temperature that is fitted on the held-out rows"
MAX_SLICES = 12  # a field with more values divides the rows too finely to look at
SLICE_COLUMNS = (("accuracy", 100, 1), ("confidence", 100, 1), ("nll", 1, 3))


@dataclass(frozen=True, eq=False)
class EvaluatedRun:
    """A run directory with predictions."""

    run: Path
    """The run directory."""
    config: Mapping[str, Any]
    """Its config.json: settings, versions, commit, task and prompt version."""
    predictions: Predictions
    """Its predictions, with task, split, tau and samples in `meta`."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """The run's resolved settings."""
        return self.config["settings"]

    @property
    def meta(self) -> Mapping[str, str]:
        """Where the predictions come from."""
        return self.predictions.meta

    @property
    def known(self) -> Tensor:
        """(N,) whether a row's label is known."""
        return self.predictions.labels >= 0

    def probs(self, drawn: bool, tempered: bool = False) -> Tensor:
        """(N, C) probabilities averaged over the draws, or at the mean; with the fitted temperature, or without."""
        if tempered:
            return self.predictions.tempered(drawn)
        return self.predictions.probs if drawn else self.predictions.probs_mean

    @property
    def drawn(self) -> bool:
        """Whether the draws are draws: not the mean itself."""
        logits, mean = self.predictions.logits, self.predictions.logits_mean
        return not torch.equal(logits, mean.expand_as(logits))


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
class Slice:
    """A part of a row's data: how sure the method is there, and how right."""

    name: str
    """Value of the field that the task slices by."""
    stats: Mapping[str, Stat]
    """accuracy and confidence from 0 to 1, nll in nats."""
    confidence: Tensor
    """(N,) probability of the likeliest answer, all seeds pooled."""
    size: str
    """Number of rows, as a range where it differs between seeds."""


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
    runs: tuple[EvaluatedRun, ...]
    """The runs, one for each seed, ordered by seed."""
    tempered: bool = False
    """Whether the logits are divided by a temperature that was fitted on held-out rows."""
    slices: tuple[Slice, ...] = ()
    """Parts of the data, in the order of their names; none where the task does not slice."""

    @property
    def several(self) -> bool:
        """Whether there are several seeds."""
        return len(self.runs) > 1

    @property
    def size(self) -> str:
        """Number of rows with a known label, as a range where it differs between seeds."""
        return _range([int(run.known.sum()) for run in self.runs])


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
    """What was written, by file name: report.md, report.json, reliability.png and .svg; slices.png and .svg if a task
    slices its rows."""

    @property
    def tempered(self) -> bool:
        """Whether a row has its logits divided by a temperature."""
        return any(row.tempered for row in self.rows)

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
        numbers = [part.stats[name].text(factor, decimals) for name, factor, decimals in SLICE_COLUMNS]
        return [row.task, row.label, *settings, part.name, part.size, *numbers]


def build_report(run_dirs: Sequence[Path], out_dir: Path, bins: int = 10) -> Report:
    """Write report.md, report.json and the diagrams from run directories.

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
    runs: list[EvaluatedRun] = []
    skipped: list[Skipped] = []
    for path in paths.values():
        try:
            run = read_run(path)
            if not run.known.any():
                raise VarloraError(
                    f"Expected rows with labels, but all {len(run.known)} labels of {path} are unknown. "
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
    figures = {f"reliability.{kind}": image for kind, image in reliability_diagram(rows, bins).items()}
    if any(row.slices for row in rows):
        figures |= {f"slices.{kind}": image for kind, image in slices_diagram(rows).items()}
    files = {name: out_dir / name for name in ("report.md", "report.json", *figures)}
    report = Report(rows, (*skipped, *repeated), _notes(groups), bins, files)
    contents = {"report.md": _markdown(report).encode(), "report.json": _json(report).encode(), **figures}
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            _write(files[name], content)
        for name in {"slices.png", "slices.svg"} - contents.keys():  # of an earlier report
            (out_dir / name).unlink(missing_ok=True)
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
        caption=f"ECE with {report.bins} equal-width bins (lo, hi]; ± standard error over seeds"
        + ("\n" + TEMPERED if report.tempered else ""),
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


def read_run(run_dir: Path) -> EvaluatedRun:
    """Read config.json and predictions.safetensors of a run directory.

    Args:
        run_dir: run directory.

    Raises:
        VarloraError: no such directory, or it has no predictions yet.
        DamagedFileError: a file is cut short, altered or lacks something; names it.
    """
    if not run_dir.is_dir():
        raise VarloraError(f"Expected a run directory, but {run_dir} is not a directory.")
    if not (run_dir / "config.json").is_file():
        raise VarloraError(f"{run_dir} is not a run directory: it has no config.json.")
    config = read_json(run_dir / "config.json")
    settings = config.get("settings") if isinstance(config, dict) else None
    missing = [k for k in ("task", "model", "method", "seed") if not isinstance(settings, dict) or k not in settings]
    if missing:
        raise DamagedFileError(f"Expected {run_dir / 'config.json'} to have settings {', '.join(missing)}.")
    path = run_dir / "predictions.safetensors"
    if not path.is_file():
        raise VarloraError(f"{run_dir} has no predictions: run `varlora evaluate {run_dir}` first.")
    predictions = load_predictions(path)
    try:
        (
            int(predictions.meta["samples"]),
            float(predictions.meta["tau"]),
            predictions.meta["task"],
            predictions.meta["split"],
        )
    except (KeyError, ValueError) as error:
        raise DamagedFileError(f"{path} is damaged ({error}). Run `varlora evaluate {run_dir}` again.") from error
    return EvaluatedRun(run_dir, config, predictions)


# --- grouping


def _traits(run: EvaluatedRun) -> dict[str, str]:
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
    if len(members := run.config.get("concluded_from") or []) > 1:  # an ensemble
        origin["members"] = "+".join(member["method"] for member in members)
        origin["members' settings"] = json.dumps([member["method_settings"] for member in members])
    evaluated = {key: run.meta[key] for key in ("split", "tau", "samples")}
    return {**dict(flat(run.settings)), "task evaluated": run.meta["task"], **evaluated, **origin}


def _groups(runs: Iterable[EvaluatedRun]) -> tuple[list[list[EvaluatedRun]], list[Skipped]]:
    """Return the runs by what they have in common, each group ordered by seed, and the repetitions left out."""
    groups: dict[tuple[str, ...], dict[str, EvaluatedRun]] = {}
    repeated = []
    for run in runs:
        key = (run.meta["task"], str(run.settings["method"]), json.dumps(_traits(run), sort_keys=True))
        seed = json.dumps(run.settings["seed"])
        first = groups.setdefault(key, {}).setdefault(seed, run)
        if first is not run:  # counted twice it would make the standard error too small
            repeated.append(Skipped(str(run.run), f"repeats {first.run}: same settings, same seed {seed}"))
    ordered = [groups[key] for key in sorted(groups)]
    return [[group[seed] for seed in sorted(group, key=lambda s: (len(s), s))] for group in ordered], repeated


def _differences(groups: Sequence[Sequence[EvaluatedRun]]) -> list[str]:
    """Return for each group the traits that tell it from others: of its task and method, or (model, split) its task."""
    traits = [_traits(group[0]) for group in groups]
    found = []
    for mine, group in zip(traits, groups):
        rivals = [(t, g[0]) for t, g in zip(traits, groups) if g[0].meta["task"] == group[0].meta["task"]]
        same = [t for t, rival in rivals if rival.settings["method"] == group[0].settings["method"]]
        names = {n for n in ("model", "split") if any(t.get(n) != mine.get(n) for t, _ in rivals)}
        names |= {n for t in same for n in {*t, *mine} if t.get(n) != mine.get(n)}
        shown = {name.removeprefix("method_settings."): mine.get(name, "unset") for name in sorted(names)}
        found.append(", ".join(f"{name}={value}" for name, value in shown.items()))
    return found


def _rows(group: Sequence[EvaluatedRun], differs: str, bins: int) -> Iterable[Row]:
    method = str(group[0].settings["method"])
    drawn = any(run.drawn for run in group)
    names = _slice_names(group)
    names = names if len(names) <= MAX_SLICES else []
    parts = [_known_slices(run) for run in group]
    # Draws that all equal the mean come from a point; without draws the adapter's kind of posterior says.
    point = not drawn and all(int(run.meta["samples"]) > 0 or _is_point(run.run) for run in group)
    variants = [(method if point else f"{method}@mean", 0, False)]
    if drawn:
        samples = len(group[0].predictions.logits)
        variants.append((f"{method} x{samples}", samples, False))
    if all(run.predictions.temperatures for run in group):
        variants = [
            one for label, draws, _ in variants for one in ((label, draws, False), (f"{label} +T", draws, True))
        ]
    for label, draws, tempered in variants:
        labels = [run.predictions.labels[run.known] for run in group]
        probs = [run.probs(draws > 0, tempered)[run.known] for run in group]
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
            tempered=tempered,
            slices=tuple(_slice(name, parts, probs, labels) for name in names),
        )


def _slice_names(group: Sequence[EvaluatedRun]) -> list[str]:
    return sorted({part for run in group for part in _known_slices(run) if part})


def _known_slices(run: EvaluatedRun) -> list[str]:
    """Return the slice of each row with a known label; empty texts where the rows are not sliced."""
    slices = run.predictions.slices or ("",) * len(run.known)
    return [part for part, known in zip(slices, run.known.tolist()) if known]


def _slice(name: str, parts: Sequence[Sequence[str]], probs: Sequence[Tensor], labels: Sequence[Tensor]) -> Slice:
    """Return one slice; `parts`, `probs` and `labels` are of the rows with a known label, one entry for each seed."""
    confidence, values, sizes = [], [], []
    for of_rows, all_probs, all_labels in zip(parts, probs, labels):
        inside = torch.tensor([part == name for part in of_rows])
        p, y = all_probs[inside], all_labels[inside]
        sure = p.amax(dim=1)
        confidence.append(sure)
        sizes.append(len(sure))
        if len(sure):
            right, nll = metrics.accuracy(p, y), metrics.nll(p, y)
            values.append({"accuracy": right, "confidence": sure.mean().item(), "nll": nll})
    stats = {key: Stat(tuple(value[key] for value in values)) for key, _, _ in SLICE_COLUMNS}
    return Slice(name, stats, torch.cat(confidence), _range(sizes))


def _range(sizes: Sequence[int]) -> str:
    low, high = min(sizes), max(sizes)
    return str(low) if low == high else f"{low}-{high}"


def _is_point(run_dir: Path) -> bool:
    try:
        return read_json(run_dir / "adapter" / "posterior_config.json").get("kind") == "point"
    except VarloraError:  # without the adapter's files the predictions still stand
        return False


def _notes(groups: Sequence[Sequence[EvaluatedRun]]) -> tuple[str, ...]:
    notes = []
    for group in groups:
        for run in group:
            unknown = int((~run.known).sum())
            if unknown:
                notes.append(f"{run.run}: {unknown} of {len(run.known)} rows have no label and are left out.")
        if len({frozenset(run.predictions.ids) for run in group}) > 1:
            name = f"{group[0].meta['task']}, {group[0].settings['method']}"
            notes.append(f"{name}: the seeds were evaluated on different rows.")
        slices = len(_slice_names(group))
        if slices > MAX_SLICES:
            task = group[0].meta["task"]
            notes.append(f"{task}: its {slices} slices are not shown; up to {MAX_SLICES} are.")
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
        slices=[report.slice_cells(row, part) for row in report.rows for part in row.slices],
        settings=report.settings_shown,
        bins=report.bins,
        tempered=TEMPERED if report.tempered else "",
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
        "metrics": _stats_json(row.stats),
        "slices": {part.name: _stats_json(part.stats) for part in row.slices},
        "reliability": {
            "confidence": numbers(row.reliability.confidence),
            "accuracy": numbers(row.reliability.accuracy),
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
        name: {
            "mean": stat.mean,
            "stderr": None if math.isnan(stat.stderr) else stat.stderr,
            "values": list(stat.values),
        }
        for name, stat in stats.items()
    }


def _strict(value: Any) -> Any:
    """JSON has no infinity; a setting may be one."""
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    return json.dumps(value) if isinstance(value, float) and not math.isfinite(value) else value


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
