"""Finished runs that a method is concluded from, or trains on from: what they bring, and what is refused."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from varlora.checkpoint import load_adapter, load_posterior
from varlora.config import Settings, settings_of
from varlora.errors import DamagedFileError, VarloraError, did_you_mean
from varlora.files import file_digest, read_json
from varlora.methods import ANY, METHODS
from varlora.methods.base import AdamWTraining
from varlora.model import same_checksum
from varlora.posterior import Posterior

__all__ = ["check_sources", "check_taken_over", "identities", "load_sources", "recipe_from", "recipe_on", "trains_on"]

SPLIT = ("seed", "calibration_fraction")
"""Settings that decide which training rows are held out."""
FREE = ("run_dir", "data_dir", "model", "batch_size", "checkpoint_every", "method_settings")
"""Settings that a run need not share with those that it is concluded from: where things lie, the batches of a pass over
the data, checkpoints, and the method's, which are compared one by one."""
WHAT = {"base": "the base model", "rows": "the training rows", "held_out": "the held-out rows"}
SAME = ("task", "dtype", "quantization", "revision", "lora", "max_length", "chat", "row_filter", "skip_bad_rows")
"""Settings that the members of an ensemble share."""


def recipe_from(sources: Sequence[Path], method: str) -> dict[str, Any]:
    """Return the settings of a run that builds on finished runs: theirs, but for the method.

    A method that trains on from a finished run takes half as many steps again, and averages in all of them.

    Args:
        sources: run directories, at least one.
        method: key of METHODS.

    Raises:
        VarloraError: a source is no run directory, or there is no such method.
    """
    if method not in METHODS:
        raise VarloraError(f"Unknown method `{method}`. {did_you_mean(method, METHODS)}")
    return recipe_on([settings_of(source) for source in sources], method)


def recipe_on(runs: Sequence[Settings], method: str) -> dict[str, Any]:
    """Return what `recipe_from` does, for runs that need not exist yet."""
    first, made = runs[0].to_dict(), METHODS[method]
    theirs = {"of": first["method"], "settings": first["method_settings"], "size": len(runs)}
    if isinstance(runs[0].build_method(), AdamWTraining):
        theirs |= first["method_settings"]
    if first["method"] in made.continues_from:
        theirs["start"] = 0.0
        first["steps"] = math.ceil(first["steps"] / 2)
    known = {field.name for field in dataclasses.fields(made)}
    own = {name: value for name, value in theirs.items() if name in known}
    if any(getattr(run, name) != first[name] for run in runs for name in SPLIT):
        first["calibration_fraction"] = 0.0  # what one run held out, another was trained on
    paths = [str(run.folder.resolve()) for run in runs]
    return {**first, "method": method, "method_settings": own, "sources": paths, "run_dir": None}


def check_sources(settings: Settings) -> None:
    """Refuse finished runs that a method cannot be concluded from, before the work of loading.

    Raises:
        VarloraError: a source is unfinished, of a method that this one does not build on, or was trained otherwise.
    """
    sources = [Path(source) for source in settings.sources]
    if not sources:
        return
    method = settings.build_method()
    _check_number(sources, settings.method, method.several_sources)
    for source in sources:
        if source.resolve().is_relative_to(settings.folder.resolve()):
            raise VarloraError(
                f"Expected `run_dir` to be a new folder, but {settings.folder} is or holds {source}, which the method "
                "is concluded from. Give another `--run-dir`."
            )
        theirs = settings_of(source)
        takes = method.concludes_from + method.continues_from
        if takes != ANY and theirs.method not in takes:
            raise VarloraError(
                f"`{settings.method}` cannot be concluded from {source}, a run of `{theirs.method}`: it takes "
                f"{' or '.join(takes)}. Train one: `varlora train --method {takes[0]}`."
            )
        if not (source / "adapter").is_dir():
            raise VarloraError(f"{source} is not finished. Go on with `varlora train --resume` first.")
        _check_same(settings.to_dict(), theirs.to_dict(), SAME, source)
    check_taken_over(settings, [settings_of(source) for source in sources])


def check_taken_over(settings: Settings, runs: Sequence[Settings]) -> None:
    """Refuse settings that differ from those which a run has to take over from the runs that it builds on.

    Args:
        settings: of the run.
        runs: settings of the others, which need not exist yet.

    Raises:
        VarloraError: some differ.
    """
    expected, here = recipe_on(runs, settings.method), settings.to_dict()
    free = (*FREE, "steps") if runs[0].method in METHODS[settings.method].continues_from else FREE
    source = runs[0].folder
    _check_same(here, expected, [name for name in here if name not in free], source)
    _check_same(here["method_settings"], expected["method_settings"], list(expected["method_settings"]), source)


def _check_number(sources: Sequence[Path], method: str, several: bool) -> None:
    if not several and len(sources) > 1:
        raise VarloraError(f"Expected one run to conclude {method} from, but got {len(sources)}. Name one.")
    if several and len({source.resolve() for source in sources}) < len(sources):
        raise VarloraError(f"Expected different runs for {method}, but one is named twice. Name each once.")
    if several and len(sources) < 2:
        raise VarloraError(f"Expected two runs or more for {method}, but got 1. Name more of them.")


def _check_same(here: Mapping[str, Any], there: Mapping[str, Any], names: Sequence[str], source: Path) -> None:
    differ = [name for name in names if here[name] != there[name]]
    if differ:
        difference = "; ".join(f"`{name}` is {here[name]!r} and was {there[name]!r}" for name in differ)
        raise VarloraError(
            f"Expected the settings that {source} was trained with, but {difference}. Leave them out: a run that "
            "builds on another has that one's."
        )


def trains_on(settings: Settings) -> bool:
    """Whether the run goes on training where a finished one ended."""
    continues_from = METHODS[settings.method].continues_from
    return any(settings_of(Path(source)).method in continues_from for source in settings.sources)


def identities(settings: Settings) -> list[dict[str, Any]]:
    """Return for each source what config.json remembers of it.

    That is its method, settings and seed, the checksum of its adapter, and what it was concluded from itself.
    """
    found = []
    for source in settings.sources:
        theirs = settings_of(Path(source)).to_dict()
        facts = {name: theirs[name] for name in ("method", "method_settings", "seed")}
        facts |= {"settings": {name: value for name, value in theirs.items() if name not in facts}}
        facts["concluded_from"] = read_json(Path(source) / "config.json").get("concluded_from") or []
        found.append({"run": source, **facts, "adapter": file_digest(Path(source) / "adapter" / "manifest.json")})
    return found


def load_sources(model: nn.Module, settings: Settings, checksums: Mapping[str, str]) -> list[Posterior]:
    """Return the posteriors of the finished runs, none if there are none, with the model at the first one's mean.

    Args:
        model: base and adapter.
        settings: of the run that is concluded from them.
        checksums: `base`, `rows` (trained on) and `held_out` of this run, as config.json has them. Rows may differ in
            an ensemble of which nothing is held out.

    Raises:
        DamagedFileError: a source was trained on another base or other rows.
    """
    if len(settings.sources) > 1 and not settings.calibration_fraction:
        checksums = {"base": checksums["base"]}
    posteriors = []
    for source in map(Path, settings.sources):
        theirs = read_json(source / "config.json")
        for key, checksum in checksums.items():
            if not same_checksum(theirs.get(key, checksum), checksum):
                raise DamagedFileError(
                    f"Expected {WHAT[key]} to be what {source} was trained with, but the checksum differs. "
                    "Pass the original, or train a new run."
                )
        posteriors.append(load_posterior(model, source / "adapter"))
    if posteriors:
        load_adapter(model, Path(settings.sources[0]) / "adapter")
    return posteriors
