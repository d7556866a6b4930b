"""Reproduce: the paper's tables for one's own model and tasks, every method on equal terms.

A plan becomes cells of a grid that share what they can: what builds on AdamW takes the one AdamW run of its seed. With
a search, each method tries its candidates (learning rates, numbers of steps, ...) with the first seeds and takes the
one with the lowest mean NLL on the held-out rows; only that one is trained with the other seeds and evaluated on the
rows that are reported.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from varlora.config import Settings
from varlora.errors import DamagedFileError, VarloraError
from varlora.evaluated import Skipped
from varlora.files import read_json, write_json, write_text
from varlora.grid import Cell, Launcher, run_cells
from varlora.methods import METHODS
from varlora.metrics import Rule
from varlora.overhead import to_table
from varlora.paper import beside_paper
from varlora.plan import TAUS, Candidate, Plan, candidates_of, check, planned, reported_rows, run_settings, split_of
from varlora.report import build_report
from varlora.run import alone, origin
from varlora.table import ResultTable
from varlora.tables import table3
from varlora.tasks import get_task
from varlora.training import training_costs
from varlora.typeset import to_html, to_json, to_latex, to_markdown

__all__ = ["Made", "Reproduced", "overhead_of", "reproduce", "tables_of"]

Say = Callable[[str], None]


@dataclass(frozen=True)
class Reproduced:
    """What a reproduction ended with."""

    runs: tuple[Path, ...]
    """The evaluated run directories, to report on."""
    failed: tuple[Skipped, ...]
    """Runs that failed, and why."""
    chosen: Mapping[str, Mapping[str, str]]
    """What the search chose, by task and method; empty without a search."""


def reproduce(plan: Plan, launcher: Callable[[], Launcher], say: Say = print) -> Reproduced:
    """Train and evaluate what a plan says and is not done yet.

    Everything is checked before anything trains: settings, names, the rows of all splits, run directories that exist.

    Args:
        plan: what to do.
        launcher: makes where the cells run.
        say: told how each run ended, and what the search chose.

    Returns:
        The run directories to report on, what failed, and what was chosen.

    Raises:
        ConfigError: with every problem of the plan.
        VarloraError: another process works on the same folder.
        Interrupted: stopped; the same command goes on.
    """
    rows = check(plan)
    with alone(plan.out):
        return _reproduce(plan, rows, launcher, say)


def _reproduce(plan: Plan, rows: Mapping[Any, str], launcher: Callable[[], Launcher], say: Say) -> Reproduced:
    """Do so; `rows` is what `check` returned."""
    candidates = {(task, method): candidates_of(plan, task, method) for task in plan.tasks for method in plan.methods}
    failed: dict[str, Skipped] = {}

    def launch(what: str, cells: Sequence[Cell]) -> None:
        left = sum(cell.missing() for cell in cells)
        say(f"{what}: {len(cells)} runs, {left} to go.")
        by_folder = {str(cell.run_dir): cell.settings for cell in cells}
        for done, outcome in enumerate(run_cells(cells, launcher), 1):
            name = Path(outcome.run_dir).relative_to(plan.out)
            say(f"[{done}/{left}] {name}: {outcome.failed or f'{outcome.seconds:.0f} s'}")
            if outcome.failed:
                settings = by_folder[outcome.run_dir]
                task = get_task(settings["task"]).name
                failed[outcome.run_dir] = Skipped(outcome.run_dir, outcome.failed, task, settings["method"])

    first_seeds = plan.seeds[: plan.search_seeds]
    chosen: dict[str, dict[str, str]] = {}
    lost: list[Candidate] = []
    if any(len(found) > 1 for found in candidates.values()):
        tried = [one for found in candidates.values() for one in found if not METHODS[one.method].several_sources]
        launch("Search", _cells(plan, tried, first_seeds))
        for (task, method), found in candidates.items():
            best = min(found, key=lambda one: _score(plan, one, failed))
            if _score(plan, best, failed) == math.inf:
                candidates[task, method] = []
                lost += found
                say(f"Nothing is chosen for {method} on {get_task(task).name}: every candidate failed.")
                continue
            candidates[task, method] = [best]
            chosen.setdefault(get_task(task).name, {})[method] = best.variant
            if len(found) > 1:
                say(f"Chosen for {method} on {get_task(task).name}: {best.variant} of {len(found)}.")
        # A candidate that fails has lost; it is a failure only where every one of the method's has.
        without = {
            str(run_settings(plan, one, seed).folder) for one in lost for seed in plan.seeds[: plan.search_seeds]
        }
        failed = {run: skip for run, skip in failed.items() if run in without}
    reported = [one for found in candidates.values() for one in found]
    launch("Runs", _cells(plan, reported, plan.seeds, rows))
    runs = [run_settings(plan, one, seed).folder for one in reported for seed in plan.seeds]
    ended = Reproduced(
        tuple(run for run in runs if str(run) not in failed),
        tuple(failed.values()),
        chosen,
    )
    plain = {**dataclasses.asdict(plan), "out": str(plan.out)}
    reasons = {run: skip.reason for run, skip in failed.items()}
    write_json(plan.out / "grid.json", {"plan": plain, "failed": reasons, "chosen": chosen, **origin()})
    return ended


# --- tables ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Made:
    """Tables that were made."""

    tables: tuple[ResultTable, ...]
    """The one that was asked for."""
    files: tuple[Path, ...]
    """What was written."""
    failed: tuple[Skipped, ...] = ()
    """Runs that failed."""


def tables_of(
    what: str,
    plan: Plan,
    launcher: Callable[[], Launcher],
    *,
    bins: int = 10,
    rule: Rule = "right",
    beside: bool = False,
    say: Say = print,
) -> Made:
    """Run what a table needs, and write it as Markdown, LaTeX, HTML and JSON, with a report of the runs.

    Args:
        what: `table1`, `table2` or `table3`; the last one runs nothing.
        plan: what to do.
        launcher: makes where the runs go.
        bins: number of equal-width bins of the ECE.
        rule: rule of these bins: `right`, (lo, hi], or `left`, [lo, hi).
        beside: lay the paper's numbers beside.
        say: told in words what happens.

    Raises:
        ConfigError: with every problem of the plan.
        VarloraError: every run failed.
    """
    if what == "table2":
        plan = dataclasses.replace(plan, methods={"ivon": plan.methods.get("ivon", {})}, taus=plan.taus or TAUS)
    failed: tuple[Skipped, ...] = ()
    written: list[Path] = []
    if what == "table3":
        table = table3(planned(plan))
        table = beside_paper(table) if beside else table
    else:
        ended = reproduce(plan, launcher, say)
        failed = ended.failed
        if not ended.runs:
            reasons = "\n".join(f"  - {skip.run}: {skip.reason}" for skip in failed)
            raise VarloraError(f"All {len(failed)} runs failed; the same command tries them again:\n{reasons}")
        folder = plan.out / ("report" if what == "table1" else f"report-{what}")
        how: dict[str, Any] = {"bins": bins, "rule": rule, "compare": "paper" if beside else None}
        report = build_report(ended.runs, folder, failed=failed, **how)
        if unread := [skip for skip in report.skipped if skip not in failed]:  # a damaged file: marked as a failure is
            failed += tuple(unread)
            lost = {skip.run for skip in unread}
            for run in lost:  # so that the same command evaluates it again
                (Path(run) / "metrics.json").unlink(missing_ok=True)
            report = build_report([run for run in ended.runs if str(run) not in lost], folder, failed=failed, **how)
        table = next(table for table in report.tables if table.name == what)
        written = [report.files["report.html"]]
    texts = {
        "md": to_markdown(table),
        "tex": to_latex(table, document=True),
        "html": to_html(table),
        "json": json.dumps(to_json(table), indent=2, ensure_ascii=False, allow_nan=False) + "\n",
    }
    for suffix, text in texts.items():
        written.append(plan.out / f"{what}.{suffix}")
        write_text(written[-1], text)
    return Made((table,), tuple(written), failed)


def overhead_of(
    plan: Plan, rounds: int, progress: Callable[[int], Any], beside_paper: bool = False
) -> tuple[Table, Path]:
    """Time AdamW's and IVON's training steps on the plan's model and its first task; return the table and its file.

    Args:
        plan: model, task and settings; of the methods only AdamW and IVON count.
        rounds: timed steps of each.
        progress: given the number of rounds, a context that gives a function to call with the rounds done.
        beside_paper: whether the table has the paper's times too.
    """
    task = next(iter(plan.tasks))
    names = ("adamw", "ivon")
    first = {name: run_settings(plan, candidates_of(plan, task, name)[0], plan.seeds[0]) for name in names}
    found = training_costs(first, rounds, progress=progress)
    path = plan.out / "overhead.json"
    write_json(path, {"model": plan.model, "task": get_task(task).name, **found.to_dict(), **origin()})
    return to_table(found, beside_paper), path


# --- from a plan to cells --------------------------------------------------------------------------------------------


def _cells(
    plan: Plan, candidates: Iterable[Candidate], seeds: Sequence[int], rows: Mapping[Any, str] | None = None
) -> list[Cell]:
    """Return the cells of some candidates and of what they build on, seed by seed.

    They are evaluated on the held-out rows, or on those that are reported, whose checksums `check` returned.
    """
    found: dict[Path, Cell] = {}

    def add(candidate: Candidate, seed: int, reported: bool = True) -> None:
        settings = run_settings(plan, candidate, seed)
        if candidate.base is not None:
            for source in settings.sources:
                add(candidate.base, int(Path(source).name.removeprefix("seed")), reported=False)
        if reported or settings.folder not in found:
            evaluation, known = _evaluation(plan, candidate, settings, rows) if reported else ({}, {})
            found[settings.folder] = Cell(settings.to_dict(), evaluation, known)

    for seed, candidate in itertools.product(seeds, candidates):
        add(candidate, seed)
    return list(found.values())


def _evaluation(
    plan: Plan, candidate: Candidate, settings: Settings, rows: Mapping[Any, str] | None
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return how a run is evaluated, and the checksums of the rows by task; held-out rows have none."""
    how: dict[str, Any] = {"samples": plan.samples, "token_budget": plan.token_budget}
    if rows is None:
        return how | {"split": "calibration"}, {}
    split = split_of(plan, candidate.task)
    splits = {candidate.task: split}
    how |= {"split": split} | ({"calibrated": True} if plan.calibrate else {})
    if (ood := plan.ood.get(candidate.task)) is not None:
        how |= {"ood": [ood]}
        splits[ood] = get_task(ood).evaluation
    if plan.taus and candidate.method == "ivon":
        how |= {"taus": list(plan.taus)}
    return how, {get_task(task).name: rows[reported_rows(settings, task, split)] for task, split in splits.items()}


def _score(plan: Plan, candidate: Candidate, failed: Collection[str]) -> float:
    """Return the NLL on the held-out rows, the mean over the search's seeds; infinity where a run failed just now.

    An ensemble follows its members' method.
    """
    if METHODS[candidate.method].several_sources and candidate.base is not None:
        return _score(plan, candidate.base, failed)
    found = []
    for seed in plan.seeds[: plan.search_seeds]:
        folder = run_settings(plan, candidate, seed).folder
        if str(folder) in failed:  # what is there is older
            return math.inf
        try:
            results = read_json(folder / "metrics-calibration.json")
        except DamagedFileError:
            return math.inf
        found.append(float((results["draws"] or results["mean"])["nll"]))
    return math.fsum(found) / len(found)
