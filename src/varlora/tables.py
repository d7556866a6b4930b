"""The paper's tables from evaluated runs: methods by task (Table 1), IVON by τ (Table 2), the settings (Table 3).

A table here is numbers and texts; `varlora.typeset` writes it for the terminal, in Markdown, LaTeX, HTML and JSON. A
change is against the baseline on the seeds and rows that both have, with an interval that tells it from noise.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import compress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from varlora.bootstrap import Difference, paired_differences
from varlora.errors import VarloraError
from varlora.evaluated import EvaluatedRun, Skipped, same_base
from varlora.methods import METHODS
from varlora.metrics import Rule
from varlora.predictions import made_unlike, same_rows
from varlora.results import Row, Stat, rows_of_runs, without_tau
from varlora.table import (
    ALL,
    AVERAGE,
    BEYOND_METRICS,
    PAPER_METRICS,
    TASKS,
    Block,
    Cell,
    Line,
    Metric,
    ResultTable,
)

__all__ = ["average", "beyond", "method_tables", "setting_text", "table1", "table2", "table3", "with_best"]

ORDER = (
    *("adamw", "mc_dropout", "laplace_kfac", "laplace_diag", "swa", "swag"),
    *("tfb", "ensemble", "temperature", "pruned", "blob", "ivon"),
)
"""The paper's methods in its order, with the others before IVON."""
TEMPERED, CALIBRATED = "Tempered", "Calibrated"
OF_ONE_SEED = " Of one seed, it says how far other rows would move the change, and nothing of other seeds."
SETTINGS = ("steps", "batch_size", "accumulation", "calibration_fraction", "lora", "model", "dtype", "quantization")
"""Settings of a run, beside the method's own, that Table 3 shows."""

# --- Table 1


def table1(
    rows: Sequence[Row],
    *,
    failed: Sequence[Skipped] = (),
    baseline: str = "adamw",
    metrics: Sequence[Metric] = PAPER_METRICS,
    replicates: int = 1000,
    seed: int = 0,
) -> ResultTable:
    r"""Return each metric by method and task, and averaged over tasks, with the change against a baseline.

    The average's standard error, and the interval of its change, follow from those of its T tasks, whose runs are
    independent of each other:

    .. math:: s = \frac{1}{T} \sqrt{\sum_t s_t^2}, \qquad l = \bar\Delta - \frac{1}{T} \sqrt{\sum_t (\Delta_t - l_t)^2}

    and the upper end likewise. Of tasks that are evaluated on the same rows, as WG-S and WG-M are, the spreads
    :math:`\Delta_t - l_t` are added before they are squared, as they may go together. Only a line with all tasks has an
    average.

    Args:
        rows: rows of one call of `rows_of_runs`.
        failed: runs that failed; their cells are marked. The reason stands in the notes alone where task or method are
            not known, or the method has lines with several settings.
        baseline: label of the row that changes are against, such as `adamw` or `ivon@mean`.
        metrics: a block for each.
        replicates: bootstrap replicates of each change.
        seed: of the bootstrap.

    Returns:
        The table; a line has no change where the baseline has no row, or several, for the same model and split, or no
        seed in common.

    Raises:
        VarloraError: two rows for one line and task.

    References:
        Cong et al. 2024, Variational Low-Rank Adaptation Using IVON, Table 1; Zou and Donner 2008, Construction of
        confidence limits about effect measures (the average's interval).
    """
    shown = _lines(rows)
    draws = sorted({key.draws for key in shown if key.draws})
    settings_of = defaultdict(set)
    for key in shown:
        settings_of[key.method].add(key.differs)
    failures, unplaced = _failures(failed, {method for method, found in settings_of.items() if len(found) > 1})
    shown |= {_failed_line(method): {} for _, method in failures if method not in {key.method for key in shown}}
    tasks = _in_order({row.task for row in rows} | {task for task, _ in failures})

    cells: dict[str, list[Line]] = {metric.name: [] for metric in metrics}
    notes, paired = [*unplaced], set[int]()  # seeds of the changes
    for key in sorted(shown):
        of_metric: dict[str, dict[str, Cell]] = {metric.name: {} for metric in metrics}
        for task in tasks:
            row, reason = shown[key].get(task), failures.get((task, key.method), "")
            base = _baseline(row, rows, baseline) if row else None
            pair = _on_shared_seeds(base, row) if row and base else None
            intervals = _intervals(*pair, replicates, seed) if pair else {}
            many = len(pair[0].runs) if pair else 0
            paired.add(many)
            if row and base and many < len(row.runs):
                name = _baseline_title(baseline)
                seeds = f"the change is over the {many} of {len(row.runs)} seeds that {name} has too"
                seeds = seeds if many else f"no change, as it shares no seed with {name}"
                notes.append(f"{key.label(draws)} on {ResultTable.heading(task)}: {seeds}.")
            for name, found in of_metric.items():
                found[task] = _cell(name, row, pair, intervals.get(name), reason)
        section = TEMPERED if key.tempered else CALIBRATED if key.calibrated else ""
        evaluated = [_evaluated(shown[key], task) for task in tasks]
        for name, found in of_metric.items():
            if len(tasks) > 1:
                found[AVERAGE] = average([found[task] for task in tasks], evaluated)
            cells[name].append(Line(key.label(draws), found, key.starred and bool(shown[key]), section))
    return ResultTable(
        name="table1",
        title="Accuracy and calibration by method and task",
        caption=_caption(rows, baseline, replicates, of_one_seed=1 in paired),
        head="Method",
        columns=(*tasks, AVERAGE) if len(tasks) > 1 else tasks,
        blocks=tuple(Block(metric.title, tuple(cells[metric.name]), metric) for metric in metrics),
        notes=tuple(notes),
    )


def method_tables(rows: Sequence[Row], **settings: Any) -> tuple[ResultTable, ResultTable]:
    """Return Table 1, and the same with metrics that the paper does not have, of one bootstrap.

    Args:
        rows: as `table1`.
        settings: as `table1`, but for `metrics`.

    Raises:
        VarloraError: as `table1`.
    """
    whole = table1(rows, metrics=(*PAPER_METRICS, *BEYOND_METRICS), **settings)
    first, second = (
        tuple(block for block in whole.blocks if block.metric in metrics) for metrics in (PAPER_METRICS, BEYOND_METRICS)
    )
    caption = (
        f"{whole.caption} Adaptive ECE: bins of equal mass. AUROC: how well confidence tells right answers from wrong "
        "ones, not defined where all are right or all wrong. AURC: area under the risk-coverage curve."
    )
    title = "Further metrics by method and task"
    return replace(whole, blocks=first), replace(whole, name="beyond", title=title, caption=caption, blocks=second)


def beyond(rows: Sequence[Row], **settings: Any) -> ResultTable:
    """Return Table 1 with metrics that the paper does not have: Brier score, adaptive ECE, AUROC and AURC.

    Args:
        rows: as `table1`.
        settings: as `table1`, but for `metrics`.

    Raises:
        VarloraError: as `table1`.
    """
    return method_tables(rows, **settings)[1]


class _Key(NamedTuple):
    """What a line is of; sorts as the paper does."""

    calibrated: bool
    tempered: bool
    place: int
    method: str
    builds_on: str  # "", "+ " for AdamW, or "IVON + "
    draws: int
    differs: str
    mean: bool  # of something to draw from

    def label(self, draws: Sequence[int]) -> str:
        """Return what the paper calls it; the number of draws where the table has several."""
        text = f"{self.builds_on}{_title(self.method)}{'@mean' if self.mean else ''}"
        text += f" x{self.draws}" if self.draws and len(draws) > 1 else ""
        text += " +T" if self.tempered else " calibrated" if self.calibrated else ""
        return f"{text}, {self.differs}" if self.differs else text

    @property
    def starred(self) -> bool:
        return not (self.draws or self.tempered or self.calibrated or self.method in ("temperature", "ensemble"))


def _lines(rows: Sequence[Row]) -> dict[_Key, dict[str, Row]]:
    lines: dict[_Key, dict[str, Row]] = {}
    for row in rows:
        mean = row.label.removesuffix(" +T").endswith("@mean")
        where = (_builds_on(row.runs[0]), 0 if row.calibrated else row.draws, row.differs, mean)
        key = _Key(row.calibrated, row.tempered, _place(row.method), row.method, *where)
        if lines.setdefault(key, {}).setdefault(row.task, row) is not row:
            raise VarloraError(
                f"Expected one row of {row.label} for {row.task}, but got two. Make all rows in one call of "
                "`rows_of_runs`, which tells them apart."
            )
    return {key: lines[key] for key in sorted(lines)}


def _failed_line(method: str) -> _Key:
    return _Key(False, False, _place(method), method, "+ " if _on_adamw(method) else "", 0, "", False)


def _failures(failed: Sequence[Skipped], several: Collection[str]) -> tuple[dict[tuple[str, str], str], list[str]]:
    """Return why runs failed, by task and method, and of those whose cells are not known.

    Args:
        failed: runs that failed.
        several: methods that have lines with several settings.
    """
    found: dict[tuple[str, str], str] = {}
    unplaced = []
    for skip in failed:
        reason = f"{skip.run} failed: {skip.reason}"
        where = skip.task, skip.method
        if not all(where) or skip.method in several:
            unplaced.append(reason)
        else:
            found[where] = " ".join(filter(None, (found.get(where), reason)))
    return found, unplaced


def _baseline(row: Row, rows: Sequence[Row], label: str) -> Row | None:
    """Return the row that the change of this one is against; None for itself, or if there is no one such row."""

    def alike(one: Row) -> bool:
        a, b = one.runs[0], row.runs[0]
        return (one.label, one.task, a.meta["split"]) == (label, row.task, b.meta["split"]) and same_base(a, b)

    found = [one for one in rows if alike(one)]
    return found[0] if len(found) == 1 and row not in found else None


def _on_shared_seeds(a: Row, b: Row) -> tuple[Row, Row] | None:
    """Return two rows with the runs and numbers of the seeds that both have; None if they share none."""

    def only(row: Row, other: Row) -> Row:
        theirs = {run.settings["seed"] for run in other.runs}
        keep = [run.settings["seed"] in theirs for run in row.runs]
        stats = {name: Stat(tuple(compress(stat.values, keep))) for name, stat in row.stats.items()}
        return replace(row, runs=tuple(compress(row.runs, keep)), stats=stats)

    shared = only(a, b), only(b, a)
    return shared if shared[0].runs else None


def _intervals(a: Row, b: Row, replicates: int, seed: int) -> dict[str, Difference]:
    """Return the differences b − a with their intervals; none if the rows of a seed are not the same."""
    if not all(same_rows(x.predictions, y.predictions) for x, y in zip(a.runs, b.runs)):
        return {}
    generator = torch.Generator().manual_seed(seed)
    return paired_differences(a.answers, b.answers, **a.reliability.bins, replicates=replicates, generator=generator)


def _cell(name: str, row: Row | None, pair: tuple[Row, Row] | None, interval: Difference | None, failed: str) -> Cell:
    if row is None:
        return Cell(failed=failed)
    stat = row.stats[name]
    return Cell(
        mean=_number(stat.mean),
        stderr=_number(stat.stderr),
        change=_number(pair[1].stats[name].mean - pair[0].stats[name].mean) if pair else None,
        low=_number(interval.low) if interval else None,
        high=_number(interval.high) if interval else None,
        seeds=len(row.runs),
        failed=failed,
    )


def average(cells: Sequence[Cell], rows: Sequence[Any] = ()) -> Cell:
    """Average a line over its tasks; nothing if one of them has no mean.

    Args:
        cells: of each task.
        rows: what each was evaluated on; where two are equal, their intervals may go together. Left out: all differ.

    Example:
        >>> of_tasks = Cell(0.5, 0.03, change=0.2, low=0.1, high=0.4), Cell(0.7, 0.04, change=0.1, low=0, high=0.1)
        >>> found = average(of_tasks)
        >>> [round(value, 3) for value in (found.mean, found.stderr, found.change, found.low, found.high)]
        [0.6, 0.025, 0.15, 0.079, 0.25]
    """
    means, errors, changes, lows, highs = (
        [value for cell in cells if (value := getattr(cell, name)) is not None]
        for name in ("mean", "stderr", "change", "low", "high")
    )
    n = len(cells)
    if len(means) < n:
        return Cell()
    found = Cell(
        mean=math.fsum(means) / n,
        stderr=_root(errors) if len(errors) == n else None,
        seeds=min(cell.seeds for cell in cells),
        failed=" ".join(dict.fromkeys(cell.failed for cell in cells if cell.failed)),
    )
    if len(changes) < n:
        return found
    change = math.fsum(changes) / n
    if len(lows) < n or len(highs) < n:
        return replace(found, change=change)
    low = change - _root([max(0.0, delta - low) for delta, low in zip(changes, lows)], rows)
    high = change + _root([max(0.0, high - delta) for delta, high in zip(changes, highs)], rows)
    return replace(found, change=change, low=low, high=high)


def _root(spreads: Sequence[float], rows: Sequence[Any] = ()) -> float:
    """Return the spread of an average; that of the same rows adds up."""
    together = defaultdict[Any, float](float)
    for spread, of in zip(spreads, rows or range(len(spreads)), strict=True):
        together[of] += spread
    return math.sqrt(math.fsum(spread**2 for spread in together.values())) / len(spreads)


def _evaluated(rows: Mapping[str, Row], task: str) -> Any:
    """Return the rows that a line's numbers on a task are of, the same for tasks that share them."""
    if task not in rows:
        return task
    predictions = rows[task].runs[0].predictions
    return predictions.prompts or task, predictions.ids, tuple(predictions.labels.tolist())


def _caption(rows: Sequence[Row], baseline: str, replicates: int, of_one_seed: bool) -> str:
    def listed(values: Iterable[Any]) -> str:
        return ", ".join(map(str, sorted(set(values))))

    if not rows:
        return ""
    firsts = [row.runs[0] for row in rows]
    averaged = len({row.task for row in rows}) > 1
    parts = [
        f"Model: {listed(Path(run.settings['model']).name for run in firsts)}; "
        f"split: {listed(run.meta['split'] for run in firsts)}.",
        _over_seeds(rows) + (" That of the average follows from those of its tasks." if averaged else ""),
        "*: one plain model answers, with nothing extra at inference.",
    ]
    if any(row.label == baseline for row in rows):
        parts.append(
            f"With a sign: the change against {_baseline_title(baseline)}. It is noise if its 95 % interval, by "
            f"Student's t over seeds and {replicates} bootstrap replicates over rows, contains 0"
            + ("; the average's interval follows from those of its tasks." if averaged else ".")
            + (OF_ONE_SEED if of_one_seed else "")
        )
    if any(row.tempered for row in rows):
        parts.append("+T: with the logits divided by a temperature that is fitted on held-out rows.")
    if any(row.calibrated for row in rows):
        parts.append(
            "Calibrated: with the factor of the variance, the share of weights pruned, the temperature and the number "
            "of draws that were chosen on held-out rows."
        )
    return " ".join(parts)


def _over_seeds(rows: Sequence[Row]) -> str:
    """Say what the numbers of a table are."""
    seeds, draws = (
        " or ".join(map(str, sorted(set(values))))
        for values in (
            [len(row.runs) for row in rows],
            [row.draws for row in rows if row.draws and not row.calibrated],
        )
    )
    drawn = f" Methods that draw average the probabilities of {draws} draws." if draws else ""
    over = "One seed." if seeds == "1" else f"Means over seeds ({seeds}) with the standard error."
    return f"ECE with {rows[0].reliability.described}.{drawn} {over}"


# --- Table 2


def table2(
    runs: Sequence[EvaluatedRun],
    *,
    failed: Sequence[Skipped] = (),
    method: str = "ivon",
    metrics: Sequence[Metric] = PAPER_METRICS,
    bins: int = 10,
    rule: Rule = "right",
) -> ResultTable:
    """Return each metric by factor τ of the posterior's variance, from a method's predictions and their `tau` files.

    τ = 0 is the posterior's mean, τ = 1 the posterior.

    Args:
        runs: evaluated runs; those of other methods are left out.
        failed: runs that failed; as `table1`, those of other methods are left out.
        method: key in METHODS.
        metrics: a block for each.
        bins: number of bins of the ECE.
        rule: rule of these bins; see `metrics.bin_of`.

    Returns:
        The table; the best of each column is marked. Damaged files, and those that were predicted otherwise than the
        run's main ones, are left out and noted.

    References:
        Cong et al. 2024, Variational Low-Rank Adaptation Using IVON, Table 2.
    """
    scaled, notes = _scaled([run for run in runs if run.settings["method"] == method])
    rows, _, _ = rows_of_runs(scaled, bins, rule)
    lines: dict[tuple[str, float], dict[str, Row]] = defaultdict(dict)
    for row in sorted((row for row in rows if not (row.tempered or row.calibrated)), key=lambda row: -len(row.runs)):
        differs = without_tau(row.differs)
        tau = float(row.runs[0].meta["tau"]) if row.draws else 0.0
        lines[differs, tau].setdefault(row.task, row)  # the mean is the same at every τ: take that of most seeds

    title = _title(method)
    names = {0.0: f"0 ({title}@mean)", 1.0: f"1 ({title})"}
    ours = [skip for skip in failed if skip.method in (method, "")]
    failures, unplaced = _failures(ours, {method} if len({differs for differs, _ in lines}) != 1 else ())
    tasks = _in_order({row.task for row in rows} | {task for task, _ in failures})
    blocks = []
    for metric in metrics:
        found = [
            Line(
                names.get(tau, f"{tau:g}") + (f", {differs}" if differs else ""),
                {
                    task: _cell(metric.name, of_task.get(task), None, None, failures.get((task, method), ""))
                    for task in tasks
                },
            )
            for (differs, tau), of_task in sorted(lines.items())
        ]
        blocks.append(Block(metric.title, with_best(found, metric), metric))
    return ResultTable(
        name="table2",
        title=f"{title} with its variance scaled by τ",
        caption=f"τ = 0 is the posterior mean. Bold: the best of each column. {_over_seeds(rows)}" if rows else "",
        head="τ",
        columns=tasks,
        blocks=tuple(blocks),
        notes=(*notes, *unplaced),
    )


def _scaled(runs: Sequence[EvaluatedRun]) -> tuple[list[EvaluatedRun], list[str]]:
    """Return the runs, and once more at every other τ that they were evaluated at; and what was left out."""
    found, notes = list(runs), []
    for run in runs:
        try:
            others = run.extra("tau")
        except VarloraError as error:
            notes.append(f"{run.run}: left out at other τ: {error}")
            continue
        for name, predictions in others.items():
            unlike = made_unlike(predictions.meta, run.meta, "task", "split")
            differ = [key for key in unlike if key != "tau"]
            differ += [] if same_rows(predictions, run.predictions) else ["rows"]
            if differ or "tau" not in predictions.meta:
                notes.append(
                    f"{run.run}: left out at τ = {name}: {' and '.join(differ) or 'tau'} differ. Evaluate again."
                )
            else:
                found.append(replace(run, predictions=predictions))
    return found, notes


def with_best(lines: Sequence[Line], metric: Metric) -> tuple[Line, ...]:
    """Mark the best number of each column, as it is printed: equal ones are all best."""
    sign = 1 if metric.larger_is_better else -1

    def printed(cell: Cell) -> float:
        return -math.inf if cell.mean is None else sign * float(metric.text(cell.mean))

    best = {column: max(printed(line.cells[column]) for line in lines) for column in lines[0].cells} if lines else {}
    return tuple(
        replace(
            line,
            cells={
                column: replace(cell, best=cell.mean is not None and printed(cell) == best[column])
                for column, cell in line.cells.items()
            },
        )
        for line in lines
    )


# --- Table 3


def table3(runs: Sequence[tuple[str, Mapping[str, Any]]]) -> ResultTable:
    """Return the settings by task: first those of the runs on which all methods agree, then each method's own.

    What is the same for all tasks stands once, under `ALL`. The runs of a method and task may differ in their settings,
    and do in their seeds: their values are listed.

    Args:
        runs: for each run the task's name and the run's settings.

    References:
        Cong et al. 2024, Variational Low-Rank Adaptation Using IVON, Table 3.
    """
    methods = sorted({str(settings["method"]) for _, settings in runs}, key=lambda method: (_place(method), method))
    tasks = _in_order({task for task, _ in runs})
    found = {method: _settings_of([run for run in runs if run[1]["method"] == method]) for method in methods}
    common: dict[str, dict[str, str]] = {}
    for name in dict.fromkeys(name for own in found.values() for name in own.of_run):
        each = [own.of_run.get(name, {}) for own in found.values()]
        if all(len({texts[task] for texts in each if task in texts}) <= 1 for task in tasks):
            common[name] = {task: texts[task] for texts in each for task in texts}

    blocks = [("All methods", common)] if len(methods) > 1 else []
    for method, own in found.items():
        left = {name: texts for name, texts in own.of_run.items() if len(methods) == 1 or name not in common}
        blocks.append((_title(method), own.of_method | left))
    return ResultTable(
        name="table3",
        title="Hyperparameters",
        caption="Settings have the names that recipes give them.",
        head="Setting",
        columns=(*tasks, ALL) if len(tasks) > 1 else tasks,
        blocks=tuple(
            Block(title, tuple(_settings_line(name, texts, tasks) for name, texts in settings.items()))
            for title, settings in blocks
            if settings
        ),
    )


class _Settings(NamedTuple):
    """Texts by setting and task."""

    of_method: dict[str, dict[str, str]]
    of_run: dict[str, dict[str, str]]


def _settings_of(runs: Sequence[tuple[str, Mapping[str, Any]]]) -> _Settings:
    def texts(values: Iterable[tuple[str, str, Any]]) -> dict[str, dict[str, str]]:
        found: dict[str, dict[str, list[str]]] = {}
        for task, name, value in values:
            found.setdefault(name, {}).setdefault(task, []).append(setting_text(value))
        return {
            name: {task: ", ".join(dict.fromkeys(listed)) for task, listed in of_task.items()}
            for name, of_task in found.items()
        }

    def of_run(settings: Mapping[str, Any]) -> dict[str, Any]:
        shown = {name: settings[name] for name in SETTINGS if name in settings}
        return {**shown, "model": Path(settings["model"]).name, "seeds": settings["seed"]}

    return _Settings(
        texts((task, *pair) for task, settings in runs for pair in _flat(settings.get("method_settings") or {})),
        texts((task, *pair) for task, settings in runs for pair in _flat(of_run(settings))),
    )


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Yield name and value, of nested settings by dotted name."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _settings_line(name: str, of_task: Mapping[str, str], tasks: Sequence[str]) -> Line:
    texts = {task: of_task[task] for task in tasks if task in of_task}
    if len(tasks) > 1 and len(texts) == len(tasks) and len(set(texts.values())) == 1:
        texts = {ALL: texts[tasks[0]]}
    return Line(name, {column: Cell(text=text) for column, text in texts.items()})


def setting_text(value: Any) -> str:
    """Return a setting as one writes it: 1e7, 0.99999, 8bit."""
    if isinstance(value, float):
        short = f"{value:g}"
        mantissa, e, exponent = (short if float(short) == value else repr(value)).partition("e")
        return f"{mantissa}{e}{int(exponent)}" if e else mantissa
    return "none" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# --- names and order


def _takes(method: str) -> tuple[str, ...]:
    """Return the methods whose finished runs this one can build on."""
    known = METHODS.get(method)
    return (*known.concludes_from, *known.continues_from) if known else ()


def _on_adamw(method: str) -> bool:
    return "adamw" in _takes(method)


def _builds_on(run: EvaluatedRun) -> str:
    """Return what stands before the method's name: `+ ` if it builds on AdamW, `IVON + ` if on IVON."""
    method = str(run.settings["method"])
    sources = {source["method"] for source in run.config.get("concluded_from") or []}
    sources = sources or {(run.settings.get("method_settings") or {}).get("of")} - {None}
    others = sorted(source for source in sources if source != "adamw" and not _on_adamw(source))
    if others:
        return " & ".join(map(_title, others)) + " + "
    return "+ " if _on_adamw(method) else ""


def _baseline_title(label: str) -> str:
    """Return what the baseline's row, such as `ivon@mean`, is called."""
    method, mean, _ = label.partition("@mean")
    return f"{_title(method)}{mean}"


def _title(method: str) -> str:
    return getattr(METHODS.get(method), "title", "") or method


def _place(method: str) -> int:
    return ORDER.index(method) if method in ORDER else len(ORDER)


def _in_order(tasks: Iterable[str]) -> tuple[str, ...]:
    known = list(TASKS)
    return tuple(sorted(tasks, key=lambda task: (known.index(task) if task in known else len(known), task)))


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
