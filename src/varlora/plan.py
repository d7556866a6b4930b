"""A plan of a reproduction: what is to be compared, checked whole, and the settings of every run that it takes.

A plan says model, tasks, methods, seeds and settings. What builds on another method has candidates of its own on each
candidate of that one, and their runs take over that one's settings.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from varlora.config import Settings, assign_all, convert_all, read_recipe, settings_from
from varlora.errors import ConfigError, VarloraError, did_you_mean
from varlora.files import read_json
from varlora.loading import digest_of, load_base, rows_of_split, training_rows
from varlora.methods import ANY, METHODS
from varlora.methods.ensemble import APART, MOST
from varlora.model import base_fingerprint, same_checksum
from varlora.sources import check_taken_over, recipe_on
from varlora.tasks import get_task
from varlora.training import check_unchanged

__all__ = [
    "PAPER_METHODS",
    "TAUS",
    "Candidate",
    "Plan",
    "candidates_of",
    "check",
    "plan_from",
    "planned",
    "reported_rows",
    "run_settings",
    "split_of",
]

PAPER_METHODS = ("adamw", "mc_dropout", "laplace_kfac", "laplace_diag", "swa", "swag", "ivon")
"""The methods of the paper's Table 1, in its order."""
TAUS = (0.25, 0.5, 0.75, 1.25, 1.5)
"""The paper's Table 2, but for 0 (the mean) and 1, which every evaluation has."""
PLANNED = {
    "seed": "name `seeds`",
    "task": "name `tasks`",
    "method": "name `methods`",
    "method_settings": "they stand under `methods`",
    "run_dir": "it lies in `--out`",
    "sources": "methods build on each other",
}
"""Settings of a run that a plan decides, and how."""
BY_ITSELF = "from_scratch"
"""What a plan says of a method that could train on from another's run, and is to train from the beginning."""
RUN = {field.name for field in dataclasses.fields(Settings)}
"""Settings of a run; among a method's they are meant for its runs."""


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
    """Methods, each with the settings that differ from its defaults, and settings of its runs; of `swa` and `swag` also
    `from_scratch`, whether they train from the beginning and not on from AdamW's run."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """A run of each method for each."""
    common: Mapping[str, Any] = field(default_factory=dict)
    """Settings of all runs."""
    search: Mapping[str, Any] = field(default_factory=dict)
    """Values to try, by method and setting of the method or the run."""
    split: str | None = None
    """The split that is reported, if not each task's own; a task may name another one under `tasks`."""
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
    calibrate: bool = False
    """Whether each reported run is calibrated on its held-out rows, and shown so as well."""


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
    known: dict[str, set[str]] = {}
    for name in ("tasks", "methods"):
        values[name] = _by_name(name, values.get(name), problems)
        known[name] = {*values[name]}
        if options.get(name) is not None:
            values[name] = {key: values[name].get(key, {}) for key in _by_name(name, options[name], problems)}
    values |= {name: value for name, value in options.items() if value is not None and name not in ("tasks", "methods")}
    assign_all(values, assignments, problems)
    for name in ("tasks", "methods"):  # whatever was assigned there
        values[name] = _by_name(name, values[name], problems)
    for task, settings in values["tasks"].items():
        if "methods" in settings:
            settings["methods"] = _by_name(f"tasks.{task}.methods", settings["methods"] or {}, problems, listed=False)
    problems += [f"`{name}` is set by the plan: {PLANNED[name]}. Leave it out." for name in values if name in PLANNED]
    own = {field.name for field in dataclasses.fields(Plan)} - {"out", "common"}
    fields = convert_all(Plan, {name: values.pop(name) for name in own & values.keys()}, "", problems)
    for name in ("model", "tasks", "methods", "seeds"):
        if not fields.get(name, name == "seeds"):
            problems.append(f"Expected `{name}`, but it is missing. Pass `--{name}` or put it into the recipe.")
    if not 1 <= fields.get("search_seeds", 1) <= len(fields.get("seeds", (0, 1, 2))):
        problems.append(
            f"Expected `search_seeds` to be from 1 to the number of seeds, but got {fields.get('search_seeds', 1)}."
        )
    problems += [
        f"Expected `{name}` to be {least} or more, but got {value}."
        for name, least, value in (
            ("samples", 1, fields.get("samples", 10)),
            ("token_budget", 1, fields.get("token_budget", 4096)),
            *(("taus", 0, tau) for tau in fields.get("taus", ())),
        )
        if not least <= value < math.inf
    ]
    known_tasks = known["tasks"] | {*fields.get("tasks", {})}  # `--tasks` may leave out what `ood` has rows for
    problems += [
        f"Expected `ood` to name tasks of the plan, but got `{name}`. {did_you_mean(str(name), known_tasks)}"
        for name in fields.get("ood", {})
        if name not in known_tasks
    ]
    problems += [
        f"Expected `ood.{name}` to be one task, by name or task file, but got {other!r}."
        for name, other in fields.get("ood", {}).items()
        if not (isinstance(other, str) and other)
    ]
    if len(set(seeds := fields.get("seeds", ()))) < len(seeds):
        problems.append(f"Expected different `seeds`, but got {', '.join(map(str, seeds))}. Name each once.")
    if problems:
        raise ConfigError(problems)
    return Plan(out=out.resolve(), common=values, **fields)


def _by_name(what: str, value: Any, problems: list[str], listed: bool = True) -> dict[str, dict[str, Any]]:
    """Return a list of names, if it may be `listed`, or a mapping from names to settings, as a mapping."""
    if isinstance(value, Mapping):
        wrong = [name for name, settings in value.items() if not isinstance(settings or {}, Mapping)]
        problems += [
            f"Expected `{what}.{name}` to be a mapping of settings, but got {value[name]!r}." for name in wrong
        ]
        return {str(name): dict(settings or {}) for name, settings in value.items() if name not in wrong}
    if not (listed and isinstance(value, (str, list, tuple, type(None)))):
        problems.append(f"Expected `{what}` to map names to settings{' or to list names' * listed}, but got {value!r}.")
        return {}
    names = [value] if isinstance(value, str) else [str(name) for name in value or ()]
    problems += [f"`{name}` is named twice under `{what}`." for name in dict.fromkeys(names) if names.count(name) > 1]
    return {name: {} for name in names}


def planned(plan: Plan) -> list[tuple[str, dict[str, Any]]]:
    """Return the settings of every reported run by the task's name, without running anything; candidates are all there.

    Raises:
        ConfigError: with every problem of the plan.
    """
    check(plan)
    return [
        (get_task(task).name, run_settings(plan, candidate, seed).to_dict())
        for task in plan.tasks
        for method in plan.methods
        for candidate in candidates_of(plan, task, method)
        for seed in plan.seeds
    ]


def check(plan: Plan) -> dict[Reported, str]:
    """Refuse a plan that cannot be carried out, or not with the runs that are there.

    Returns:
        The checksums of the rows that are reported on; `reported_rows` says by what.

    Raises:
        ConfigError: with every problem found.
    """
    by_task = [name for settings in plan.tasks.values() for name in settings.get("methods", {})]
    unknown = [name for name in (*plan.methods, *plan.search, *by_task) if name not in METHODS]
    problems = [f"Unknown method `{name}`. {did_you_mean(str(name), METHODS)}" for name in unknown]
    for method, space in plan.search.items():
        good = isinstance(space, Mapping) and all(isinstance(values, list) and values for values in space.values())
        if not good:
            problems.append(f"Expected `search.{method}` to be lists of values by setting, but got {space!r}.")
        elif method not in unknown and METHODS[method].several_sources:
            problems.append(
                f"`search.{method}` would try nothing: {method} follows its members, which are chosen by themselves. "
                f"Search `{METHODS[method].of}`, or give `methods.{method}` the values."
            )
    for method, settings in plan.methods.items():
        if method not in unknown and METHODS[method].concludes_from == ANY:
            of = settings.get("of", METHODS[method].of)
            if not isinstance(of, str) or of not in METHODS or METHODS[of].concludes_from == ANY:
                problems.append(f"Expected `methods.{method}.of` to be a method that trains by itself, but got `{of}`.")
            if METHODS[method].several_sources:
                problems += _member_problems(plan, method)
    problems += [
        f"Expected a split to report on, that nothing was trained or chosen on, but got `{split}`. Leave `split` out "
        "for each task's own."
        for split in (plan.split, *(settings.get("split") for settings in plan.tasks.values()))
        if split in ("train", "calibration") or not isinstance(split, str | None)
    ]
    problems += [
        f"Expected `{BY_ITSELF}` of {method} to be true or false, but got {settings[BY_ITSELF]!r}."
        for of in (plan.methods, *(settings.get("methods", {}) for settings in plan.tasks.values()))
        for method, settings in of.items()
        if not isinstance(settings.get(BY_ITSELF, False), bool)
    ]
    if plan.out.exists() and not plan.out.is_dir():
        problems.append(f"Expected `--out` to be a folder, but {plan.out} is a file. Choose another name.")
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
        raise ConfigError(dict.fromkeys(problems))
    reported: dict[Reported, str] = {}
    begun: list[Settings] = []
    for task in plan.tasks:
        by_data: dict[tuple[Any, ...], list[Settings]] = {}
        for method in plan.methods:
            for candidate in candidates_of(plan, task, method):
                try:
                    for settings in itertools.chain(*(_runs(plan, candidate, seed) for seed in plan.seeds)):
                        by_data.setdefault(_data(settings), []).append(settings)
                        if (settings.folder / "config.json").is_file():
                            check_unchanged(settings)
                            begun.append(settings)
                except VarloraError as error:
                    problems += [f"{get_task(task).name}, {method}: {problem}" for problem in _problems(error)]
        for runs in by_data.values():
            problems += _row_problems(plan, task, runs, [run for run in begun if run in runs], reported)
    if not problems:
        problems += _base_problems(begun)
    if problems:
        raise ConfigError(dict.fromkeys(problems))
    return reported


Reported = tuple[Any, ...]


def _data(settings: Settings) -> tuple[Any, ...]:
    """Return the settings that decide which rows a task has."""
    return settings.data_dir, settings.skip_bad_rows, settings.row_filter


def reported_rows(settings: Settings, task: str, split: str) -> Reported:
    """Return by what `check` knows the rows of a task's split, as a run with these settings reads them."""
    return get_task(task).name, split, *_data(settings)


def _base_problems(begun: Sequence[Settings]) -> Iterable[str]:
    """Yield whether runs that are there have another base than the plan's; one that was moved is the same."""
    found: dict[tuple[Any, ...], str] = {}
    others: list[Settings] = []
    for settings in begun:
        stored = read_json(settings.folder / "config.json")
        if stored["settings"]["model"] == settings.model or "base" not in stored:
            continue
        key = (settings.model, settings.revision, settings.dtype, settings.quantization)
        try:
            if key not in found:
                found[key] = base_fingerprint(load_base(settings, device="cpu")[0])
        except VarloraError as error:
            yield str(error)
            return
        if not same_checksum(stored["base"], found[key]):
            others.append(settings)
    if others:
        yield (
            f"Expected the base that {others[0].folder} was trained on, but {others[0].model} is another one "
            f"({len({run.folder for run in others})} runs). Give another `--out`, or the model that it was."
        )


def _member_problems(plan: Plan, method: str) -> Iterable[str]:
    """Yield what is wrong with the members of a method that has several."""
    for size in [_own(plan, task, method).get("size", METHODS[method].size) for task in plan.tasks]:
        if isinstance(size, bool) or not isinstance(size, int) or not 2 <= size <= MOST:
            yield (
                f"Expected `methods.{method}.size` to be a number of members >= 2 and at most {MOST}, but got {size!r}."
            )
            continue
        members = [seed + APART * member for seed in plan.seeds for member in range(size)]
        if len(set(members)) < len(members):
            yield (
                f"Expected `seeds` whose runs of {method} share no members, which are {APART} seeds apart, but got "
                f"{', '.join(map(str, plan.seeds))}."
            )


def _problems(error: VarloraError) -> Sequence[str]:
    return error.problems if isinstance(error, ConfigError) else [str(error)]


def _row_problems(
    plan: Plan, task: str, runs: Sequence[Settings], begun: Sequence[Settings], reported: dict[Reported, str]
) -> Iterable[str]:
    """Yield what is wrong with the rows that some runs need, or have begun with; put checksums into `reported`."""
    settings = next((run for run in runs if not run.sources), runs[0])  # an ensemble holds no rows out: its members do
    name = get_task(task).name
    if plan.search and not settings.calibration_fraction:
        yield f"{name}: Expected held-out rows to search on. Set `calibration_fraction`, e.g. 0.1."
    try:
        now = digest_of(list(itertools.chain(*training_rows(get_task(task), settings, _unheard))))
    except VarloraError as error:
        yield f"{name}: {error}"
    else:
        folders = {run.folder for run in begun}
        others = sorted(folder for folder in folders if read_json(folder / "config.json").get("data", now) != now)
        if others:
            yield (
                f"{name}: Expected the training rows, and their prompts, that {others[0]} was trained on, but they are "
                f"others now ({len(others)} of {len(folders)} runs). Give another `--out`, or the rows as they were."
            )
    splits = [(task, split_of(plan, task))]
    splits += [(plan.ood[task], get_task(plan.ood[task]).evaluation)] if task in plan.ood else []
    for other, split in splits:
        try:
            rows = rows_of_split(get_task(other), split, settings, _unheard)
        except VarloraError as error:
            yield f"{get_task(other).name}: {error}"
        else:
            reported[reported_rows(settings, other, split)] = digest_of(rows)


def _unheard(text: str) -> None:
    pass


# --- runs of a plan --------------------------------------------------------------------------------------------------


def split_of(plan: Plan, task: str) -> str:
    """Return the split on which a task is reported."""
    return str(plan.tasks[task].get("split") or plan.split or get_task(task).evaluation)


def _base(plan: Plan, task: str, method: str) -> str | None:
    """Return the method that another one builds on, if any; what could train on trains by itself if that is asked."""
    takes = METHODS[method].concludes_from + METHODS[method].continues_from
    if METHODS[method].continues_from and _own(plan, task, method).get(BY_ITSELF):
        return None
    if takes == ANY:
        return str(plan.methods.get(method, {}).get("of", METHODS[method].of))
    return next((name for name in takes if name in ("adamw", *plan.methods)), None)


def candidates_of(plan: Plan, task: str, method: str) -> list[Candidate]:
    """Return what the search tries for a method: all combinations of its values, on each candidate of its base."""
    space = plan.search.get(method, {})
    own = [dict(zip(space, values)) for values in itertools.product(*space.values())]
    base = _base(plan, task, method)
    if base is None:
        return [Candidate(task, method, tried, tried, None) for tried in own]
    return [
        Candidate(task, method, _named_apart(below, space) | tried, tried, below)
        for below in candidates_of(plan, task, base)
        for tried in own
    ]


def _named_apart(base: Candidate, names: Collection[str]) -> dict[str, Any]:
    """Return what the base tries; settings that the method on it tries too have the base's name before theirs."""
    return {f"{base.method}.{name}" if name in names else name: value for name, value in base.tried.items()}


def _own(plan: Plan, task: str, method: str) -> dict[str, Any]:
    """Return what the plan says of a method on a task."""
    return {**plan.methods.get(method, {}), **plan.tasks[task].get("methods", {}).get(method, {})}


def _base_seeds(plan: Plan, candidate: Candidate, seed: int) -> Iterable[int]:
    """Return the seeds of the runs that a candidate's run builds on."""
    several = METHODS[candidate.method].several_sources
    own = {**_own(plan, candidate.task, candidate.method), **candidate.own}
    size = own.get("size", METHODS[candidate.method].size) if several else 1
    return range(seed, seed + APART * size, APART)


def _runs(plan: Plan, candidate: Candidate, seed: int) -> Iterable[Settings]:
    """Yield the settings of a candidate's run with a seed, and of all that it builds on."""
    yield run_settings(plan, candidate, seed)
    if candidate.base is not None:
        for other in _base_seeds(plan, candidate, seed):
            yield from _runs(plan, candidate.base, other)


def run_settings(plan: Plan, candidate: Candidate, seed: int) -> Settings:
    """Return the settings of a candidate's run with a seed.

    Raises:
        ConfigError: with every problem found.
    """
    method = candidate.method
    here = {name: value for name, value in plan.tasks[candidate.task].items() if name not in ("methods", "split")}
    own = {**_own(plan, candidate.task, method), **candidate.own}
    if METHODS[method].continues_from:
        own.pop(BY_ITSELF, None)
    ours = {field.name for field in dataclasses.fields(METHODS[method])}
    run = {name: own.pop(name) for name in [*own] if name in RUN and name not in ours}
    folder = plan.out / get_task(candidate.task).name / method / candidate.variant / f"seed{seed}"
    if candidate.base is None:
        values = {**plan.common, **here, **run, "task": candidate.task, "model": plan.model, "seed": seed}
        return settings_from({**values, "run_dir": str(folder), "method": {"name": method, **own}})
    bases = [run_settings(plan, candidate.base, other) for other in _base_seeds(plan, candidate, seed)]
    recipe = recipe_on(bases, method)
    method_settings = {**recipe.pop("method_settings"), **own}
    values = {**recipe, **run, "run_dir": str(folder), "method": {"name": method, **method_settings}}
    made = settings_from(values)
    check_taken_over(made, bases)
    return made
