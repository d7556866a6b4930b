"""Reproduce: the paper's tables for one's own model and tasks, every method on equal terms.

A plan says model, tasks, methods, seeds and settings. It becomes cells of a grid that share what they can: what builds
on AdamW takes the one AdamW run of its seed. With a search, each method tries its candidates (learning rates, numbers
of steps, ...) with the first seeds and takes the one with the lowest mean NLL on the held-out rows; only that one is
trained with the other seeds and evaluated on the rows that are reported.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from rich.table import Table

from varlora.config import Settings, assign_all, convert_all, read_recipe, settings_from
from varlora.errors import ConfigError, DamagedFileError, VarloraError, did_you_mean
from varlora.grid import Cell, Launcher, run_cells
from varlora.methods import ANY, METHODS
from varlora.overhead import to_table
from varlora.paper import beside_paper
from varlora.report import build_report
from varlora.results import Skipped
from varlora.run import origin, read_json, write_json, write_text
from varlora.sources import check_taken_over, recipe_on
from varlora.tables import ResultTable, table3
from varlora.tasks import get_task
from varlora.typeset import to_html, to_json, to_latex, to_markdown
from varlora.workflow import check_unchanged, rows_of_split, training_costs, training_rows

__all__ = [
    "PAPER_METHODS",
    "TAUS",
    "Made",
    "Plan",
    "Reproduced",
    "overhead_of",
    "plan_from",
    "planned",
    "reproduce",
    "tables_of",
]

PAPER_METHODS = ("adamw", "mc_dropout", "laplace_kfac", "laplace_diag", "swa", "swag", "ivon")
"""The methods of the paper's Table 1, in its order."""
TAUS = (0.25, 0.5, 0.75, 1.25, 1.5)
"""The paper's Table 2, but for 0 (the mean) and 1, which every evaluation has."""
RUN = {field.name for field in dataclasses.fields(Settings)}
"""Settings of a run; among a method's they are meant for its runs."""
MEMBER = 1000
"""Between the seeds of an ensemble's members, so that the ensembles of different seeds share none."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What to reproduce."""

    out: Path
    """Folder of the runs."""
    model: str
    """The base model: a folder, or a name on the hub."""
    tasks: Mapping[str, Any]
    """Tasks by name or task file, each with the settings that differ there; those of methods stand under `methods`."""
    methods: Mapping[str, Any]
    """Methods, each with the settings that differ from its defaults, and settings of its runs."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """A run of each method for each."""
    common: Mapping[str, Any] = field(default_factory=dict)
    """Settings of all runs."""
    search: Mapping[str, Any] = field(default_factory=dict)
    """Values to try, by method and setting of the method or the run."""
    search_seeds: int = 1
    """How many of the seeds, the first ones, the search takes; one seed alone may be lucky."""
    samples: int = 10
    """Draws."""
    taus: tuple[float, ...] = ()
    """Further factors of the variance at which IVON is evaluated."""
    ood: Mapping[str, str] = field(default_factory=dict)
    """For a task another one, whose rows are shown to its models as well."""
    token_budget: int = 4096
    """Tokens a batch of the evaluation."""


@dataclass(frozen=True)
class Candidate:
    """A method on a task with settings that are tried or reported."""

    task: str
    """Name or task file."""
    method: str
    """Key of METHODS."""
    tried: Mapping[str, Any]
    """What the search tries, the base's included; empty without a search."""
    own: Mapping[str, Any]
    """Of that, what is this method's."""
    base: Candidate | None
    """What it builds on."""

    @property
    def variant(self) -> str:
        """Folder that tells candidates apart, whatever the values are; empty without a search."""
        return quote(",".join(f"{name}={value}" for name, value in self.tried.items()), safe="=,+[]' ")


@dataclass(frozen=True)
class Reproduced:
    """What a reproduction ended with."""

    runs: tuple[Path, ...]
    """The evaluated run directories, to report on."""
    failed: tuple[Skipped, ...]
    """Runs that failed, and why."""
    chosen: Mapping[str, Mapping[str, str]]
    """What the search chose, by task and method; empty without a search."""


def plan_from(recipe: Path | None, out: Path, options: Mapping[str, Any], assignments: Sequence[str] = ()) -> Plan:
    """Combine a recipe of a plan with options and `key=value` assignments; later ones win.

    Args:
        recipe: a YAML file with the fields of `Plan`; settings of all runs stand beside them.
        out: folder of the runs.
        options: fields of `Plan` (`tasks` and `methods` as lists select from the recipe's) and settings of all runs;
            None is left out.
        assignments: `key=value` with dots for nesting and the value in YAML, such as `methods.ivon.ess=1e6`.

    Raises:
        ConfigError: with every problem found.

    Example:
        >>> plan = plan_from(None, Path("runs"), {"model": "m", "tasks": ["boolq"], "methods": ["ivon"], "steps": 5})
        >>> plan.tasks, plan.methods, plan.common
        ({'boolq': {}}, {'ivon': {}}, {'steps': 5})
    """
    values = {"methods": list(PAPER_METHODS), **(read_recipe(recipe) if recipe else {})}
    problems: list[str] = []
    for name in ("tasks", "methods"):
        values[name] = _by_name(name, values.get(name), problems)
        if options.get(name) is not None:
            values[name] = {key: values[name].get(key, {}) for key in _by_name(name, options[name], problems)}
    values |= {name: value for name, value in options.items() if value is not None and name not in ("tasks", "methods")}
    assign_all(values, assignments, problems)
    own = {field.name for field in dataclasses.fields(Plan)} - {"out", "common"}
    fields = convert_all(Plan, {name: values.pop(name) for name in own & values.keys()}, "", problems)
    for name in ("model", "tasks", "methods", "seeds"):
        if not fields.get(name, name == "seeds"):
            problems.append(f"Expected `{name}`, but it is missing. Pass `--{name}` or put it into the recipe.")
    if not 1 <= fields.get("search_seeds", 1) <= len(fields.get("seeds", (0, 1, 2))):
        problems.append(
            f"Expected `search_seeds` to be from 1 to the number of seeds, but got {fields['search_seeds']}."
        )
    if len(set(seeds := fields.get("seeds", ()))) < len(seeds):
        problems.append(f"Expected different `seeds`, but got {', '.join(map(str, seeds))}. Name each once.")
    if problems:
        raise ConfigError(problems)
    return Plan(out=out.resolve(), common=values, **fields)


def _by_name(what: str, value: Any, problems: list[str]) -> dict[str, dict[str, Any]]:
    """Return a list of names, or a mapping from names to settings, as a mapping."""
    if isinstance(value, Mapping):
        return {str(name): dict(settings or {}) for name, settings in value.items()}
    names = [str(name) for name in value or ()]
    problems += [f"`{name}` is named twice under `{what}`." for name in dict.fromkeys(names) if names.count(name) > 1]
    return {name: {} for name in names}


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
        Interrupted: stopped; the same command goes on.
    """
    check(plan)
    candidates = {(task, method): _candidates(plan, task, method) for task in plan.tasks for method in plan.methods}
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

    chosen: dict[str, dict[str, str]] = {}
    lost: list[Candidate] = []
    if any(len(found) > 1 for found in candidates.values()):
        tried = [one for found in candidates.values() for one in found if not METHODS[one.method].several_sources]
        launch(
            "Search",
            _cells(plan, tried, plan.seeds[: plan.search_seeds], {"split": "calibration", **_evaluation(plan)}),
        )
        for (task, method), found in candidates.items():
            best = min(found, key=lambda one: _score(plan, one))
            if _score(plan, best) == math.inf:
                candidates[task, method] = []
                lost += found
                say(f"Nothing is chosen for {method} on {get_task(task).name}: every candidate failed.")
                continue
            candidates[task, method] = [best]
            chosen.setdefault(get_task(task).name, {})[method] = best.variant
            if len(found) > 1:
                say(f"Chosen for {method} on {get_task(task).name}: {best.variant} of {len(found)}.")
        # A candidate that fails has lost; it is a failure only where every one of the method's has.
        without = {str(_settings(plan, one, seed).folder) for one in lost for seed in plan.seeds[: plan.search_seeds]}
        failed = {run: skip for run, skip in failed.items() if run in without}
    reported = [one for found in candidates.values() for one in found]
    launch("Runs", _cells(plan, reported, plan.seeds, _evaluation(plan)))
    runs = [_settings(plan, one, seed).folder for one in reported for seed in plan.seeds]
    ended = Reproduced(
        tuple(run for run in runs if str(run) not in failed),
        tuple(failed.values()),
        chosen,
    )
    plain = {**dataclasses.asdict(plan), "out": str(plan.out)}
    reasons = {run: skip.reason for run, skip in failed.items()}
    write_json(plan.out / "grid.json", {"plan": plain, "failed": reasons, "chosen": chosen, **origin()})
    return ended


def planned(plan: Plan) -> list[tuple[str, dict[str, Any]]]:
    """Return the settings of every reported run by the task's name, without running anything; candidates are all there.

    Raises:
        ConfigError: with every problem of the plan.
    """
    check(plan)
    return [
        (get_task(task).name, _settings(plan, candidate, seed).to_dict())
        for task in plan.tasks
        for method in plan.methods
        for candidate in _candidates(plan, task, method)
        for seed in plan.seeds
    ]


def check(plan: Plan) -> None:
    """Refuse a plan that cannot be carried out.

    Raises:
        ConfigError: with every problem found.
    """
    unknown = [name for name in (*plan.methods, *plan.search) if name not in METHODS]
    problems = [f"Unknown method `{name}`. {did_you_mean(name, METHODS)}" for name in unknown]
    for method, space in plan.search.items():
        good = isinstance(space, Mapping) and all(isinstance(values, list) and values for values in space.values())
        if not good:
            problems.append(f"Expected `search.{method}` to be lists of values by setting, but got {space!r}.")
    for method, settings in plan.methods.items():
        if method not in unknown and METHODS[method].concludes_from == ANY:
            of = settings.get("of", "adamw")
            if of not in METHODS or METHODS[of].concludes_from == ANY:
                problems.append(f"Expected `methods.{method}.of` to be a method that trains by itself, but got `{of}`.")
    names: dict[str, str] = {}
    for task in [*plan.tasks, *plan.ood.values()]:
        try:
            other = names.setdefault(get_task(task).name, task)
        except VarloraError as error:
            problems += _problems(error)
            continue
        if other != task:
            problems.append(f"{task} and {other} have the same `name`. Give each task file another one.")
    if problems:
        raise ConfigError(problems)
    for task in plan.tasks:
        first = None
        for method in plan.methods:
            for candidate in _candidates(plan, task, method):
                try:
                    made = [_settings(plan, candidate, seed) for seed in plan.seeds]
                    first = first or made[0]
                    for settings in made:
                        if (settings.folder / "config.json").is_file():
                            check_unchanged(settings)
                except VarloraError as error:
                    problems += [f"{get_task(task).name}, {method}: {problem}" for problem in _problems(error)]
        if first is not None:
            problems += _row_problems(task, first, plan.ood.get(task), bool(plan.search))
    if problems:
        raise ConfigError(dict.fromkeys(problems))


def _problems(error: VarloraError) -> Sequence[str]:
    return error.problems if isinstance(error, ConfigError) else [str(error)]


def _row_problems(task: str, settings: Settings, ood: str | None, search: bool) -> Iterable[str]:
    """Yield what is wrong with the rows of the splits that are needed."""
    if search and not settings.calibration_fraction:
        yield f"{get_task(task).name}: Expected held-out rows to search on. Set `calibration_fraction`, e.g. 0.1."
    try:
        training_rows(get_task(task), settings, _unheard)
    except VarloraError as error:
        yield f"{get_task(task).name}: {error}"
    for other in map(get_task, [task, *([ood] if ood else [])]):
        try:
            rows_of_split(other, other.evaluation, settings, _unheard)
        except VarloraError as error:
            yield f"{other.name}: {error}"


def _unheard(text: str) -> None:
    pass


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
    what: str, plan: Plan, launcher: Callable[[], Launcher], *, beside: bool = False, say: Say = print
) -> Made:
    """Run what a table needs, and write it as Markdown, LaTeX, HTML and JSON, with a report of the runs.

    Args:
        what: `table1`, `table2` or `table3`; the last one runs nothing.
        plan: what to do.
        launcher: makes where the runs go.
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
        report = build_report(ended.runs, folder, failed=failed, compare="paper" if beside else None)
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


def overhead_of(plan: Plan, rounds: int, progress: Callable[[int], Any]) -> tuple[Table, Path]:
    """Time AdamW's and IVON's training steps on the plan's model and its first task; return the table and its file.

    Args:
        plan: model, task and settings; of the methods only AdamW and IVON count.
        rounds: timed steps of each.
        progress: given the number of rounds, a context that gives a function to call with the rounds done.
    """
    task = next(iter(plan.tasks))
    names = ("adamw", "ivon")
    first = {name: _settings(plan, _candidates(plan, task, name)[0], plan.seeds[0]) for name in names}
    found = training_costs(first, rounds, progress=progress)
    path = plan.out / "overhead.json"
    write_json(path, {"model": plan.model, "task": get_task(task).name, **found.to_dict(), **origin()})
    return to_table(found), path


# --- from a plan to cells --------------------------------------------------------------------------------------------


def _base(plan: Plan, method: str) -> str | None:
    """Return the method that another one builds on, if any."""
    takes = METHODS[method].concludes_from + METHODS[method].continues_from
    if takes == ANY:
        return str(plan.methods.get(method, {}).get("of", "adamw"))
    return next((name for name in takes if name in ("adamw", *plan.methods)), None)


def _candidates(plan: Plan, task: str, method: str) -> list[Candidate]:
    """Return what the search tries for a method: all combinations of its values, on each candidate of its base."""
    space = plan.search.get(method, {})
    own = [dict(zip(space, values)) for values in itertools.product(*space.values())]
    base = _base(plan, method)
    if base is None:
        return [Candidate(task, method, tried, tried, None) for tried in own]
    return [
        Candidate(task, method, {**below.tried, **tried}, tried, below)
        for below in _candidates(plan, task, base)
        for tried in own
    ]


def _settings(plan: Plan, candidate: Candidate, seed: int) -> Settings:
    """Return the settings of a candidate's run with a seed.

    Raises:
        ConfigError: with every problem found.
    """
    method = candidate.method
    here = dict(plan.tasks[candidate.task])
    own = {**plan.methods.get(method, {}), **here.pop("methods", {}).get(method, {}), **candidate.own}
    ours = {field.name for field in dataclasses.fields(METHODS[method])}
    run = {name: own.pop(name) for name in [*own] if name in RUN and name not in ours}
    folder = plan.out / get_task(candidate.task).name / method / candidate.variant / f"seed{seed}"
    if candidate.base is None:
        values = {**plan.common, **here, **run, "task": candidate.task, "model": plan.model, "seed": seed}
        return settings_from({**values, "run_dir": str(folder), "method": {"name": method, **own}})
    size = int(own.get("size", METHODS[method].size)) if METHODS[method].several_sources else 1
    bases = [_settings(plan, candidate.base, seed + MEMBER * member) for member in range(size)]
    recipe = recipe_on(bases, method)
    method_settings = {**recipe.pop("method_settings"), **own}
    values = {**recipe, **run, "run_dir": str(folder), "method": {"name": method, **method_settings}}
    made = settings_from(values)
    check_taken_over(made, bases)
    return made


def _cells(
    plan: Plan, candidates: Iterable[Candidate], seeds: Sequence[int], evaluation: Mapping[str, Any]
) -> list[Cell]:
    """Return the cells of some candidates and of what they build on, seed by seed."""
    found: dict[Path, Cell] = {}

    def add(candidate: Candidate, seed: int, evaluation: Mapping[str, Any]) -> None:
        settings = _settings(plan, candidate, seed)
        if candidate.base is not None:
            for source in settings.sources:
                add(candidate.base, int(Path(source).name.removeprefix("seed")), {})
        if evaluation or settings.folder not in found:
            found[settings.folder] = Cell(settings.to_dict(), evaluation)

    for seed, candidate in itertools.product(seeds, candidates):
        special: dict[str, Any] = {}
        if "split" not in evaluation:
            special = {"ood": [plan.ood[candidate.task]]} if candidate.task in plan.ood else {}
            special |= {"taus": list(plan.taus)} if plan.taus and candidate.method == "ivon" else {}
        add(candidate, seed, {**evaluation, **special})
    return list(found.values())


def _evaluation(plan: Plan) -> dict[str, Any]:
    return {"samples": plan.samples, "token_budget": plan.token_budget}


def _score(plan: Plan, candidate: Candidate) -> float:
    """Return the NLL on the held-out rows, the mean over the search's seeds; infinity where a run failed.

    An ensemble follows its members' method.
    """
    if METHODS[candidate.method].several_sources and candidate.base is not None:
        return _score(plan, candidate.base)
    found = []
    for seed in plan.seeds[: plan.search_seeds]:
        try:
            results = read_json(_settings(plan, candidate, seed).folder / "metrics-calibration.json")
        except DamagedFileError:
            return math.inf
        found.append(float((results["draws"] or results["mean"])["nll"]))
    return math.fsum(found) / len(found)
