"""The numbers behind the report's curves: over coverage, over the number of draws, over training, and on other rows."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch

from varlora import metrics
from varlora.files import parse_json
from varlora.predictions import Predictions, made_unlike
from varlora.results import Row, Stat

__all__ = [
    "Curve",
    "Outside",
    "Series",
    "Training",
    "out_of_distribution",
    "over_draws",
    "risk_by_coverage",
    "series_of",
    "training",
]

POINTS = 100  # of a curve, at most: more cannot be told apart on a screen
LARGEST = torch.finfo(torch.float32).max
"""Of what is logged: more no training computes, and no average of it or length on a chart would be finite."""
LAYER, KIND = re.compile(r"sigma/layer_([0-9]{2,4})"), re.compile(r"sigma/(?!layer_).*")


@dataclass(frozen=True, eq=False)
class Curve:
    """Points of a line, in order."""

    x: tuple[float, ...]
    y: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Series:
    """A method with its settings on a task: what one line or one point of a chart shows."""

    name: str
    """The method, and the settings that tell it from others of its task."""
    mean: Row
    """At the posterior mean; with draws where that row is left out, as it repeats another one."""
    drawn: Row | None
    """With averaged draws, where there are draws."""

    @property
    def shown(self) -> Row:
        """The draws where there are any, else the mean: what the method is meant to be used with."""
        return self.drawn or self.mean


@dataclass(frozen=True, eq=False)
class Training:
    """What was logged while training, averaged over seeds."""

    loss: Curve
    """Training loss by step."""
    sigma: Curve | None
    """Mean standard deviation of the posterior by step, where the method logs it."""
    layers: Curve | None
    """The same by layer, where training ended."""
    signal: Curve | None = None
    """Share of weights whose mean exceeds their standard deviation, by step."""
    rise: Curve | None = None
    """Loss under noise less that at the mean, of training rows, by step."""
    hessian: Curve | None = None
    """Mean Hessian over its first value, by step."""
    held: Curve | None = None
    """Share of σ that is drawn, where noise is held back, by step."""
    matrices: Mapping[str, Curve] = field(default_factory=dict)
    """Mean σ by step, for each kind of matrix."""
    end: Mapping[str, float] = field(default_factory=dict)
    """What was logged last, by name."""


@dataclass(frozen=True, eq=False)
class Outside:
    """How well a method's uncertainty separates another task's rows from the run's own."""

    task: str
    """The other task."""
    rows: int
    """Its number of rows, in the first seed."""
    total: Stat
    """AUROC of the total uncertainty; 0.5 says nothing, 1 separates them."""
    epistemic: Stat
    """AUROC of the epistemic uncertainty; NaN for a method without draws, which has none."""


def series_of(rows: Sequence[Row]) -> dict[str, list[Series]]:
    """Return the series of each task, in the order of the rows, without those calibrated by a temperature or more."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if not (row.tempered or row.calibrated):
            found.setdefault((row.task, f"{row.method} {row.differs}".strip()), []).append(row)
    tasks: dict[str, list[Series]] = {}
    for (task, name), own in found.items():
        drawn = next((row for row in own if row.draws), None)
        tasks.setdefault(task, []).append(Series(name, own[0], drawn))
    return tasks


def risk_by_coverage(row: Row) -> Curve:
    """Return the error rate among the most confident rows by the share that is answered, averaged over seeds."""
    found = [metrics.risk_coverage(probs, labels) for probs, labels in row.answers]
    grid = np.linspace(1 / POINTS, 1, POINTS)
    risks = [np.interp(grid, one.coverage.numpy(), one.risk.numpy()) for one in found]
    return Curve(tuple(grid), tuple(np.mean(risks, axis=0)))


def over_draws(row: Row) -> dict[str, Curve]:
    """Return accuracy, ECE and NLL of the first S draws, averaged in probability, by S; averaged over seeds."""
    ece = partial(metrics.ece, **row.reliability.bins)  # as in the table
    measures: dict[str, Callable[..., float]] = {"accuracy": metrics.accuracy, "ece": ece, "nll": metrics.nll}
    found: dict[str, list[list[float]]] = {name: [] for name in measures}
    for run in row.runs:
        probs = run.predictions.logits[:, run.known].double().softmax(dim=-1).cumsum(dim=0)
        labels = run.predictions.labels[run.known]
        means = [total / s for s, total in enumerate(probs, start=1)]
        for name, measure in measures.items():
            found[name].append([measure(mean, labels) for mean in means])
    draws = min(map(len, found["nll"]))
    chosen = range(1, draws + 1) if draws <= POINTS else sorted({round(s) for s in np.geomspace(1, draws, POINTS)})
    return {
        name: Curve(tuple(map(float, chosen)), tuple(float(np.mean([v[s - 1] for v in values])) for s in chosen))
        for name, values in found.items()
    }


def logged(rows: Sequence[Row]) -> dict[str, dict[str, Training]]:
    """Return by task and method what was logged in training, where there is a log."""
    return {
        task: {one.name: log for one in series if (log := training([run.run for run in one.mean.runs]))}
        for task, series in series_of(rows).items()
    }


def training(runs: Sequence[Path]) -> Training | None:
    """Return what training.jsonl says, averaged over the seeds that have one; an ensemble's members count as seeds.

    Lines that cannot be read are left out: a run that was interrupted may have half a line.

    Args:
        runs: run directories, one for each seed.
    """
    logs = [log for run in runs for path in _logs(run) if (log := _log(path))]
    if not logs:
        return None
    loss = _mean_by_step(logs, "loss")
    sigma = _mean_by_step(logs, "sigma")
    ends = [log[-1] for log in logs]
    for log in logs:
        for entry in log:
            noisy, at_mean = entry.get("loss_under_noise"), entry.get("loss_at_mean")
            if _is_number(noisy) and _is_number(at_mean):
                entry["rise"] = noisy - at_mean
    end = {name: _average([entry[name] for entry in ends if name in entry]) for name in _numbers(ends)}
    by_layer = sorted((int(found[1]), end[name]) for name in end if (found := LAYER.fullmatch(name)))
    by_matrix = sorted({name for entry in ends for name in entry if KIND.fullmatch(name)})
    matrices = {name.removeprefix("sigma/"): _mean_by_step(logs, name) for name in by_matrix}
    return Training(
        loss,
        _if_any(sigma),
        Curve(*zip(*by_layer)) if by_layer else None,
        signal=_if_any(_mean_by_step(logs, "signal_above_noise")),
        rise=_if_any(_mean_by_step(logs, "rise")),
        hessian=_if_any(_mean_by_step(logs, "hessian_over_first")),
        held=_if_any(_mean_by_step(logs, "held_back")),
        matrices={kind: curve for kind, curve in matrices.items() if curve.x},
        end=end,
    )


def _if_any(curve: Curve) -> Curve | None:
    return curve if curve.x else None


def _numbers(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names under which entries have numbers alone."""
    names = {name for entry in entries for name in entry}
    values = {name: [entry[name] for entry in entries if name in entry] for name in names}
    return sorted(n for n in names if all(map(_is_number, values[n])))


def _is_number(value: Any) -> TypeGuard[float]:
    """Whether a value is a finite number, and none that only a damaged line has."""
    return isinstance(value, int | float) and abs(value) <= LARGEST


def out_of_distribution(row: Row) -> tuple[list[Outside], list[str]]:
    """Return what each other task's rows say, for the tasks that all of the row's runs were shown, by the same draws.

    Args:
        row: total uncertainty is of its probabilities: at the mean, or of its draws.

    Returns:
        What they say; and in words what was left out, of other draws.
    """
    extras, notes = [run.extra("ood") for run in row.runs], []
    for run, extra in zip(row.runs, extras):
        for task in list(extra):
            if differ := made_unlike(extra[task].meta, run.meta):
                del extra[task]
                why = f"other draws than the run's own were shown them ({', '.join(differ)})"
                notes.append(f"{run.run}: rows of {task} are left out, as {why}. Evaluate again with `--ood`.")
    found = []
    for task in sorted(set.intersection(*(set(extra) for extra in extras))):
        total, epistemic = [], []
        for run, extra in zip(row.runs, extras):
            own, other = _uncertainty(run.predictions, row.draws), _uncertainty(extra[task], row.draws)
            outside = torch.cat([torch.zeros(len(own.total)), torch.ones(len(other.total))]).bool()
            total.append(metrics.auroc(torch.cat([own.total, other.total]), outside))
            both = torch.cat([own.epistemic, other.epistemic])
            epistemic.append(metrics.auroc(both, outside) if row.draws else math.nan)
        found.append(Outside(task, len(extras[0][task].ids), Stat(tuple(total)), Stat(tuple(epistemic))))
    return found, notes


def _uncertainty(predictions: Predictions, draws: int) -> metrics.Uncertainty:
    """Return the uncertainties in units of ln C, the most that a row of C answers can have: C differs between tasks."""
    found = predictions.uncertainty if draws else metrics.uncertainty(predictions.logits_mean[None])
    most = (predictions.logits_mean > -math.inf).sum(1).clamp(min=2).double().log()
    return metrics.Uncertainty(*(of / most for of in found))


def _logs(run_dir: Path) -> list[Path]:
    members = sorted(run_dir.glob("member-*/training.jsonl"))
    return members or [run_dir / "training.jsonl"]


def _log(path: Path) -> list[dict[str, Any]]:
    """Return the lines that have a loss, by step."""
    if not path.is_file():
        return []
    found = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = parse_json(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and "loss" in entry and _is_number(entry.get("step")):
            found[int(entry["step"])] = entry  # of a step logged twice, by a resumed run, the last counts
    return [found[step] for step in sorted(found)]


def _mean_by_step(logs: Sequence[Sequence[Mapping[str, Any]]], name: str) -> Curve:
    """Return the average over the logs that have a step; neighbouring steps are averaged where they are many."""
    values: dict[int, list[float]] = {}
    for log in logs:
        for entry in log:
            value = entry.get(name)
            if _is_number(value):
                values.setdefault(int(entry["step"]), []).append(value)
    steps = sorted(values)
    size = math.ceil(len(steps) / POINTS)
    parts = [steps[i : i + size] for i in range(0, len(steps), size)] if steps else []
    return Curve(
        tuple(_average(part) for part in parts),
        tuple(_average([_average(values[step]) for step in part]) for part in parts),
    )


def _average(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
