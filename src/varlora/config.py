"""Settings of a training run: a frozen dataclass, read from YAML recipes and the command line.

All problems of a configuration are reported together.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import types
import typing
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch.utils.data import DataLoader
from transformers import TrainingArguments, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks

from varlora.errors import ConfigError, DamagedFileError, VarloraError, did_you_mean
from varlora.files import check_name, read_json
from varlora.fit import check_method, check_training_arguments
from varlora.methods import METHODS, Method, Plan
from varlora.model import LoRA
from varlora.plain_yaml import read_yaml
from varlora.tasks import get_task, is_task_file

__all__ = [
    "TASK_FILE",
    "Settings",
    "assign_all",
    "convert_all",
    "load_settings",
    "read_recipe",
    "recipe_of",
    "settings_from",
    "settings_of",
]

TASK_FILE = "task.yaml"
"""In a run directory: the task file that it was trained with, for when that is no longer where it was."""


@dataclass(frozen=True)
class Settings:
    """Everything that decides a training run, with the paper's values as defaults, but for five.

    The base is not quantised (the paper: 8 bit), so that no further package is needed. The adapter is float32 (16 bit),
    in which AdamW's small updates are not lost. A tenth of the training rows is held out (none), to calibrate on. All
    rows are kept (those with four answers), as other data are not like ARC. IVON finds its `lr`, `ess` and `hess_init`
    (Table 3), which have to suit model and data. `recipes/llama2-7b` has the paper's.

    Example:
        >>> settings = Settings(task="boolq", model="models/my-model", seed=21)
        >>> settings.steps, settings.batch_size, settings.folder.as_posix()
        (10000, 4, 'runs/boolq-my-model-ivon-seed21')
    """

    task: str
    """A task's name, or the path of a task file for your own data."""
    model: str
    """The base model: a folder, or a name on the Hugging Face hub."""
    method: str = "ivon"
    """How to reach a posterior: a key of METHODS."""
    method_settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the method; in a recipe they stand under `method:`, beside `name:`."""
    sources: tuple[str, ...] = ()
    """Run directories to conclude the method from, or to train on from; left out: train from the beginning."""
    data_dir: str | None = None
    """Folder with the task's files, by the names that `varlora.tasks.TASKS` has; left out: from the hub."""
    run_dir: str | None = None
    """Where the run is written; left out: runs/<task>-<model>-<method>-seed<seed>."""
    seed: int = 0
    """Seed of the adapter's start, the order of rows, dropout and the method's noise."""
    steps: int = 10_000
    """Optimizer steps."""
    batch_size: int = 4
    """Rows a micro-batch."""
    accumulation: int = 1
    """Micro-batches a step."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the base's weights."""
    quantization: Literal["8bit", "4bit"] | None = None
    """Keep the base's weights in 8bit or 4bit (bitsandbytes)."""
    revision: str | None = None
    """Branch, tag or commit of the base on the hub."""
    lora: LoRA = field(default_factory=LoRA)
    """The adapter."""
    max_length: int | None = None
    """Longest prompt in tokens; left out: what the model can read."""
    chat: bool = False
    """Put prompts through the tokenizer's chat template; one that writes the date gets the same one every day."""
    row_filter: bool = False
    """Keep only the rows that the paper keeps (four answers, for ARC and OpenBookQA)."""
    skip_bad_rows: bool = False
    """Leave out malformed rows and count them, rather than stop."""
    calibration_fraction: float = 0.1
    """Share of the training rows that is held out to choose a scale on (`--split calibration`): neither they nor copies
    of their prompts are trained on."""
    checkpoint_every: int = 500
    """Steps between checkpoints."""
    max_not_finite: int = 25
    """Stop after so many steps in a row whose loss or gradient is not finite."""
    training_arguments: Mapping[str, Any] = field(default_factory=dict)
    """Any other fields of `transformers.TrainingArguments`."""

    @property
    def folder(self) -> Path:
        """The run directory."""
        if self.run_dir is not None:
            return Path(self.run_dir)
        names = (Path(self.task).stem, Path(self.model).name, self.method)
        return Path("runs") / f"{'-'.join(names)}-seed{self.seed}"

    def build_method(self) -> Method:
        """Make the method from its settings."""
        return METHODS[self.method](**self.method_settings)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for `config.json`, the method's defaults filled in, and the Trainer's tokens left out."""
        plain = dataclasses.asdict(self)
        arguments = plain["training_arguments"].items()
        plain["training_arguments"] = {name: value for name, value in arguments if not name.endswith("_token")}
        plain["method_settings"] = dataclasses.asdict(self.build_method())  # type: ignore[call-overload]
        plain["run_dir"] = str(self.folder)
        plain["sources"] = list(self.sources)
        return plain


def recipe_of(settings: Settings, seeds: Sequence[int] = ()) -> str:
    """Return settings as a recipe in YAML: those that differ from the defaults, so that the same run can be made again.

    Args:
        settings: of the run; with several seeds, of the first one's as `load_settings` makes them.
        seeds: those to run with; fewer than two: the settings' own.

    Example:
        >>> print(recipe_of(Settings(task="boolq", model="m", steps=5, method_settings={"lr": 0.1})).strip())
        task: boolq
        model: m
        steps: 5
        method:
          name: ivon
          lr: 0.1
    """
    plain, bare = settings.to_dict(), dataclasses.asdict(METHODS[settings.method]())
    own = {name: value for name, value in plain.pop("method_settings").items() if value != bare[name]}
    method = {"name": plain.pop("method"), **own}
    defaults = dataclasses.asdict(Settings(task="", model=""))
    defaults |= {"sources": [], "run_dir": plain["run_dir"] if settings.run_dir is None else None}
    changed = {name: value for name, value in plain.items() if value != defaults[name]}
    if len(seeds) > 1:
        changed = {name: value for name, value in changed.items() if name != "seed"} | {"seeds": list(seeds)}
        if settings.run_dir is not None:
            changed["run_dir"] = str(settings.folder.parent)
    return yaml.safe_dump({**changed, "method": method}, sort_keys=False, allow_unicode=True)


def read_recipe(path: Path) -> dict[str, Any]:
    """Read a recipe: a YAML mapping of settings.

    Raises:
        ConfigError: the file is absent, no YAML, no mapping, or more than `read_yaml` reads.
    """
    try:
        recipe = read_yaml(path)
    except FileNotFoundError:
        near = did_you_mean(path.name, [p.name for p in path.parent.glob("*.y*ml")]) if path.parent.is_dir() else ""
        cure = near or "Give the path of a YAML file, or leave it out and give settings by options such as `--model`."
        raise ConfigError([f"There is no recipe {path}. {cure}"]) from None
    except ConfigError:
        raise
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError([f"{path} cannot be read as YAML: {' '.join(str(error).split())}"]) from error
    if not isinstance(recipe, dict):
        raise ConfigError([f"Expected a mapping of settings in {path}, but got {type(recipe).__name__}."])
    if {"prompt", "label", "files"} <= recipe.keys():
        raise ConfigError([f"Expected a recipe, but {path} is a task file. Pass it by `--task {path}`."])
    return recipe


def load_settings(
    recipe: Path | Mapping[str, Any] | None = None,
    overrides: Mapping[str, Any] | None = None,
    assignments: Sequence[str] = (),
) -> list[Settings]:
    """Combine a recipe, named settings and `key=value` assignments; later ones win.

    Besides the fields of `Settings` there is `seeds`, a list: one run for each seed. Several seeds with one `run_dir`
    each get a folder in it.

    Args:
        recipe: a YAML file, or what it would hold.
        overrides: settings by name; None values are left out.
        assignments: `key=value` with dots for nesting and the value in YAML, such as `method.ess=1e6`.

    Returns:
        Settings of each run: one, or one for each of `seeds`.

    Raises:
        ConfigError: with every problem found.

    Example:
        >>> runs = load_settings({"task": "boolq", "model": "m", "seeds": [21, 42]}, {"run_dir": "runs/b"}, ["steps=5"])
        >>> [(run.seed, run.steps, run.folder.as_posix()) for run in runs]
        [(21, 5, 'runs/b/seed21'), (42, 5, 'runs/b/seed42')]
    """
    problems: list[str] = []
    values = read_recipe(recipe) if isinstance(recipe, Path) else copy.deepcopy(dict(recipe or {}))
    if "seed" in values and "seeds" in values:
        problems.append("Expected `seed` or `seeds`, but got both. Leave one of them out.")
    values = _method_as_mapping(values, problems)
    for name, value in (overrides or {}).items():
        if value is not None:
            _assign(values, name, value, problems)
    assign_all(values, assignments, problems)
    if "seeds" not in values:
        return [settings_from(values, problems)]
    seeds = values.pop("seeds")
    if not isinstance(seeds, list) or not seeds or len({str(seed) for seed in seeds}) < len(seeds):
        problems.append(f"Expected `seeds` to be a list of different whole numbers, but got {seeds!r}.")
        seeds = [0]
    run_dir = values.get("run_dir")
    own = [run_dir and f"{run_dir}/seed{seed}" if len(seeds) > 1 else run_dir for seed in seeds]
    return [settings_from({**values, "seed": seed, "run_dir": path}, problems) for seed, path in zip(seeds, own)]


def assign_all(values: dict[str, Any], assignments: Sequence[str], problems: list[str]) -> None:
    """Set `a.b.c=value` in nested mappings, the value in YAML; what is wrong becomes problems."""
    method_first = sorted(assignments, key=lambda text: not text.startswith(("method=", "method.name=")))
    for assignment in method_first:
        key, equals, text = assignment.partition("=")
        if not equals or not key.strip():
            problems.append(f"Expected `key=value`, but got `{assignment}`. Write e.g. `steps=500`.")
            continue
        try:
            _assign(values, key.strip(), yaml.safe_load(text), problems)
        except (yaml.YAMLError, ValueError):  # ValueError: a date that there is not
            problems.append(f"The value of `{assignment}` is not YAML. Put quotes around it.")


def settings_from(values: Mapping[str, Any], problems: Sequence[str] = (), *, stored: bool = False) -> Settings:
    """Check plain values and make settings of them.

    Args:
        values: settings by name; `method` may be a name, or a mapping with `name` and the method's settings.
        problems: what was found wrong already, to be reported with the rest.
        stored: of a run that exists: this machine need not be able to train with its `training_arguments`.

    Raises:
        ConfigError: with every problem found.

    Example:
        >>> settings_from({"task": "boolq", "model": "m", "method": {"name": "ivon", "ess": "1e7"}}).method_settings
        {'ess': 10000000.0}
        >>> settings_from({"task": "boolq", "model": "m", "stepps": 5, "batch_size": "many"})
        Traceback (most recent call last):
            ...
        varlora.errors.ConfigError: 2 problems in the configuration:
          - Unknown setting `stepps`. Did you mean `steps`?
          - Expected `batch_size` to be a whole number, but got 'many'.
    """
    found = list(problems)
    values = _method_as_mapping(values, found)
    method_values = dict(values.pop("method"))
    name = str(method_values.pop("name", "ivon"))
    lora = values.pop("lora", None)
    for required in ("task", "model"):
        if values.get(required) in (None, ""):
            values.pop(required, None)
            found.append(f"Expected `{required}`, but it is missing. Pass `--{required}` or put it into the recipe.")
    known = convert_all(Settings, values, "", found)
    if name not in METHODS:
        found.append(f"Unknown method `{name}`. {did_you_mean(name, METHODS)}")
    else:
        known["method"] = name
        method_class: Any = METHODS[name]
        known["method_settings"] = convert_all(method_class, method_values, "method.", found, of=f" of {name}")
        inner: Any = METHODS.get(known["method_settings"].get("of", getattr(method_class, "of", "")))
        if inner is not None:  # of a method that works on another one
            inner_values = known["method_settings"].get("settings", {})
            converted = convert_all(inner, inner_values, "method.settings.", found, of=f" of {inner.name}")
            known["method_settings"]["settings"] = _try(lambda: dataclasses.asdict(inner(**converted)), found) or {}
    if lora is not None:
        if isinstance(lora, LoRA):
            known["lora"] = lora
        elif isinstance(lora, Mapping):
            lora_values = convert_all(LoRA, lora, "lora.", found)
            known["lora"] = _try(lambda: LoRA(**lora_values), found, "`lora`: ")
        else:
            found.append(f"Expected `lora` to be a mapping, but got {lora!r}. Write e.g. `lora: {{rank: 8}}`.")
    _check(known, found, stored)
    if "method" in known and (method := _try(lambda: METHODS[name](**known["method_settings"]), found, "`method`: ")):
        arguments = {} if stored else known["training_arguments"]  # which were right for the version that trained
        found += _try(lambda: check_method(method, _plan(known), arguments), found, "`method`: ") or []
    if found:
        raise ConfigError(found)
    known |= _absolute(known)
    for path in (known["task"], known["model"], known.get("data_dir") or "", *known.get("sources", ())):
        check_name(path)
    return Settings(**known)


def settings_of(run_dir: Path) -> Settings:
    """Return the settings that a run was started with.

    Raises:
        VarloraError: there is no such run directory, or its config.json is damaged.
    """
    if not run_dir.is_dir():
        raise VarloraError(f"There is no run directory {run_dir}. `varlora ls runs` lists those under runs/.")
    config = read_json(run_dir / "config.json")
    if not isinstance(config, Mapping) or not isinstance(config.get("settings"), Mapping):
        raise DamagedFileError(f"Expected settings in {run_dir / 'config.json'}, but there are none.")
    stored = {**config["settings"], "run_dir": str(run_dir)}
    kept, task = run_dir / TASK_FILE, str(stored.get("task"))
    if is_task_file(task) and kept.is_file() and not _is_readable(task):
        stored["task"] = str(kept)
    try:
        return settings_from(stored, stored=True)
    except ConfigError as error:
        versions = config.get("versions")
        version = versions.get("varlora") if isinstance(versions, Mapping) else None
        by = f"{run_dir} was written by varlora {version} and cannot be read"
        raise ConfigError(f"{by}: {problem}" for problem in error.problems) from error


def _is_readable(task: str) -> bool:
    try:
        get_task(task)
    except VarloraError:
        return False
    return True


def _plan(known: Mapping[str, Any]) -> Plan:
    """Return what a run with these settings is going to do, as far as its method has to know."""
    defaults = {f.name: f.default for f in dataclasses.fields(Settings)}

    def value(name: str) -> Any:
        return known.get(name, defaults[name])

    dropout = (known.get("lora") or LoRA()).dropout
    calibration = value("calibration_fraction") > 0
    finished = bool(value("sources")) and not METHODS[known["method"]].continues_from
    return Plan(value("steps"), value("accumulation"), dropout, calibration, finished)


def _absolute(known: Mapping[str, Any]) -> dict[str, Any]:
    """Paths as a run has to remember them, to be found from any folder."""
    paths = {name: Path(known[name]) for name in ("task", "model", "data_dir") if known.get(name)}
    if not is_task_file(paths["task"]):
        del paths["task"]  # a name
    found: dict[str, Any] = {name: str(path.resolve()) for name, path in paths.items() if path.exists()}
    if known.get("sources"):
        found["sources"] = tuple(str(Path(source).resolve()) for source in known["sources"])
    return found


def _check(known: dict[str, Any], problems: list[str], stored: bool) -> None:
    if "task" in known:
        _try(lambda: get_task(known["task"]), problems)
    at_least = {
        "seed": 0,
        "steps": 1,
        "batch_size": 1,
        "accumulation": 1,
        "checkpoint_every": 1,
        "max_not_finite": 1,
        "max_length": 8,
    }
    for name, least in at_least.items():
        if known.get(name) is not None and known[name] < least:
            cure = "Raise it, or leave it out."
            problems.append(f"Expected `{name}` to be at least {least}, but got {known[name]}. {cure}")
    if known.get("seed", 0) >= 2**32:
        problems.append(f"Expected `seed` to be less than 2**32, but got {known['seed']}. Set e.g. `seed=0`.")
    fraction = known.get("calibration_fraction", 0.0)
    if not 0 <= fraction < 1:
        cure = "Set e.g. `calibration_fraction=0.1`."
        problems.append(f"Expected `calibration_fraction` to be within 0 and 1, but got {fraction}. {cure}")
    arguments = known.setdefault("training_arguments", {})
    hints = typing.get_type_hints(TrainingArguments)
    texts = {name: value for name, value in arguments.items() if isinstance(value, str) and _is_number(hints.get(name))}
    arguments |= convert_all(TrainingArguments, texts, "training_arguments.", problems)
    if stored:
        return
    problems += check_training_arguments(arguments)
    problems += _not_json(arguments)
    if arguments.get("save_only_model"):
        problems.append("`training_arguments.save_only_model` leaves no checkpoint to go on from. Leave it out.")
    if arguments and not problems:
        problems += _value_problems(arguments)


def _not_json(arguments: Mapping[str, Any]) -> list[str]:
    """Return which fields of `TrainingArguments` could not be written to config.json, such as a date of YAML's."""
    problems = []
    for name, value in arguments.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError):
            expected = f"Expected `training_arguments.{name}` to be what JSON has"
            problems.append(f"{expected}, but got {value!r}. Put quotes around it.")
    return problems


def _value_problems(arguments: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with the values of `TrainingArguments`, by the field where one alone is wrong."""
    problems: list[str] = []
    _try(lambda: _check_values(arguments), problems)
    of_one: list[str] = []
    for name, value in arguments.items() if problems else ():
        alone: list[str] = []
        _try(partial(_check_values, {name: value}), alone)
        if alone == problems:
            of_one.append(f"`training_arguments.{name}` cannot be {value!r}: {alone[0]}")
    return of_one or [f"`training_arguments`: {problem}" for problem in problems]


def _check_values(arguments: Mapping[str, Any]) -> None:
    """Let those who will use the values of `TrainingArguments` check them, the loggers among them."""
    made = TrainingArguments(output_dir="unused", **{"use_cpu": not torch.cuda.is_available(), **arguments})
    for logger in get_reporting_integration_callbacks(made.report_to if "report_to" in arguments else "none"):
        logger()
    specific: Any = made.lr_scheduler_kwargs
    get_scheduler(
        made.lr_scheduler_type,
        optimizer=torch.optim.SGD([torch.zeros(1)], lr=1.0),  # the run's own may not be known yet
        num_warmup_steps=made.get_warmup_steps(100),
        num_training_steps=100,
        scheduler_specific_kwargs=specific,
    )
    rows: Any = [0]
    with warnings.catch_warnings(action="ignore"):  # which are for the run
        DataLoader(
            rows,
            num_workers=made.dataloader_num_workers,
            prefetch_factor=made.dataloader_prefetch_factor,
            persistent_workers=made.dataloader_persistent_workers,
        )


def _try(make: Callable[[], Any], problems: list[str], where: str = "") -> Any:
    """Call `make`; what it raises becomes problems."""
    try:
        return make()
    except ConfigError as error:
        problems += [where + problem for problem in error.problems]
    except (ValueError, TypeError, OverflowError, OSError, RuntimeError, ImportError) as error:
        # OverflowError: an infinity; OSError: a file that is not there; RuntimeError, ImportError: not installed
        problems.append(where + " ".join(str(error).split()))
    return None


def _method_as_mapping(values: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """Return the values with `method` a mapping of its name and its settings, which config.json keeps apart."""
    method, settings = values.get("method") or {}, values.get("method_settings") or {}
    method = {"name": method} if isinstance(method, str) else method
    for wrong in (part for part in (method, settings) if not isinstance(part, Mapping)):
        problems.append(f"Expected `method` to be a name or a mapping, but got {wrong!r}. Write e.g. `method: ivon`.")
        method = settings = {}
    others = {name: value for name, value in values.items() if name != "method_settings"}
    return {**others, "method": {**settings, **method}}


def _assign(values: dict[str, Any], key: str, value: Any, problems: list[str]) -> None:
    """Set `a.b.c` in nested mappings; a bare `method` is its name, and `seed` and `seeds` replace each other."""
    key = "method.name" if key == "method" else key
    if key.startswith("method.") and not isinstance(values.get("method"), Mapping):
        values["method"] = {"name": values["method"]} if values.get("method") else {}
    if key == "method.name" and values["method"].get("name", "ivon") != value:
        values["method"] = {}  # settings of one method mean nothing to another
    if key in ("seed", "seeds"):
        values.pop("seeds" if key == "seed" else "seed", None)
    *path, last = key.split(".")
    here = values
    for part in path:
        inner = here.setdefault(part, {})
        if not isinstance(inner, dict):
            problems.append(f"`{key}` cannot be set: `{part}` is no mapping.")
            return
        here = inner
    here[last] = value


def convert_all(cls: Any, values: Mapping[str, Any], prefix: str, problems: list[str], of: str = "") -> dict[str, Any]:
    """Convert values to the types of a dataclass's fields; unknown names and wrong types become problems."""
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    converted = {}
    for name, value in values.items():
        if name not in names:
            problems.append(f"Unknown setting `{prefix}{name}`{of}. {did_you_mean(str(name), names)}")
            continue
        try:
            converted[name] = _convert(value, hints[name])
        except (TypeError, ValueError, OverflowError):
            problems.append(f"Expected `{prefix}{name}` to be {_in_words(hints[name])}, but got {value!r}.")
    return converted


def _is_number(hint: Any) -> bool:
    """Whether the type is a number, with None or without: a text in its place is a number as YAML reads 1e-3."""
    return {arg for arg in typing.get_args(hint) or (hint,) if arg is not type(None)} in ({int}, {float})


def _in_words(hint: Any) -> str:
    """Name a type as a person would."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("nothing" if arg is type(None) else _in_words(arg) for arg in args)
    if origin is Literal:
        return ("one of " if len(args) > 1 else "") + ", ".join(map(str, args))
    if origin is tuple:
        return "a list"
    return {bool: "true or false", int: "a whole number", float: "a number", str: "text"}.get(hint, "a mapping")


def _convert(value: Any, hint: Any) -> Any:
    """Convert a YAML value to a type; `1e6`, a string to YAML, is taken for the number that is meant."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        *words, kind = sorted(
            (arg for arg in args if arg is not type(None)),
            key=lambda arg: typing.get_origin(arg) is Literal,
            reverse=True,
        )
        return value if any(value in typing.get_args(word) for word in words) else _convert(value, kind)
    if origin is Literal:
        if value not in args:
            raise ValueError
        return value
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise TypeError
        return tuple(_convert(item, args[0]) for item in value)
    if origin is not None or hint is Mapping:
        if not isinstance(value, Mapping):
            raise TypeError
        return {str(key): item for key, item in value.items()}  # as config.json has them: JSON has no other keys
    if hint is bool:
        if not isinstance(value, bool):
            raise TypeError
        return value
    if isinstance(value, bool):
        raise TypeError
    if hint is int:
        number = float(value)
        if number != int(number):
            raise ValueError
        return int(number)
    if hint is float:
        number = float(value)
        if math.isnan(number):
            raise ValueError
        return number
    if hint is str:
        if not isinstance(value, (str, Path, int, float)):
            raise TypeError
        return str(value)
    return value
