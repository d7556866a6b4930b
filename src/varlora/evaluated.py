"""Evaluated runs: run directories with predictions, read and checked before anything is computed from them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from varlora.errors import DamagedFileError, VarloraError
from varlora.files import read_json
from varlora.model import same_checksum
from varlora.predictions import CALIBRATED, Predictions, load_predictions, same_rows
from varlora.tasks import get_task

__all__ = ["COUNTS", "EvaluatedRun", "Skipped", "read_run", "read_runs", "same_base"]

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""What would move a terminal's cursor, or turn the text that follows."""
COUNTS = ("training_rows", "held_out_rows")
"""How many rows a run had, in its config.json; the second is not in files of older versions."""


@dataclass(frozen=True, eq=False)
class EvaluatedRun:
    """A run directory with predictions."""

    run: Path
    """The run directory."""
    config: Mapping[str, Any]
    """Its config.json: settings, versions, commit, task and prompt version."""
    predictions: Predictions
    """Its predictions, with task, split, tau and samples in `meta`."""
    tuned: Predictions | None = None
    """Predictions of the same rows by its calibrated posterior, if it has them."""

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

    def extra(self, kind: str) -> dict[str, Predictions]:
        """Return the run's further predictions of one kind, by name, sorted.

        Args:
            kind: `tau`, of the same rows at other factors of the variance, or `ood`, of another task's rows.

        Raises:
            DamagedFileError: a file is cut short or altered.
        """
        start = f"predictions-{kind}-"
        paths = sorted(self.run.glob(f"{start}*.safetensors"))
        return {path.stem.removeprefix(start): load_predictions(path) for path in paths}

    def calibrated(self) -> EvaluatedRun | None:
        """Return the run with the predictions of its calibrated posterior in place of its own, if it has them."""
        return None if self.tuned is None else dataclasses.replace(self, predictions=self.tuned)

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


def same_base(one: EvaluatedRun, other: EvaluatedRun) -> bool:
    """Whether two runs have one base, wherever it lay; where a checksum is not known, whether it lay in one place."""
    bases = [str(run.config.get("base") or "") for run in (one, other)]
    if not all(bases):
        return bool(one.settings["model"] == other.settings["model"])
    return same_checksum(*sorted(bases, key=len))


@dataclass(frozen=True)
class Skipped:
    """A run directory that the report leaves out."""

    run: str
    """The run directory."""
    reason: str
    """Why, and what to do about it."""
    task: str = ""
    """Name of the run's task, if it is known."""
    method: str = ""
    """Key of the run's method, if it is known."""


# --- verbs


def read_runs(run_dirs: Sequence[Path]) -> tuple[list[EvaluatedRun], list[Skipped]]:
    """Read run directories; a directory named twice counts once.

    Returns:
        The runs, and those that cannot be used, with the reason.

    Raises:
        DamagedFileError: the only run has a damaged file.
        VarloraError: no run, or none that can be used.
    """
    paths: dict[Path, Path] = {}
    for run_dir in map(Path, run_dirs):
        paths.setdefault(run_dir.resolve(), run_dir)
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
            skipped.append(Skipped(str(path), str(error), *_what(path)))
    if not runs:
        reasons = "\n".join(f"  - {skip.run}: {skip.reason}" for skip in skipped)
        raise VarloraError(f"None of the {len(paths)} run directories can be reported on:\n{reasons}")
    return runs, skipped


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
        raise DamagedFileError(
            f"Expected {run_dir / 'config.json'} to have settings {', '.join(missing)}: it is damaged, or of an older "
            "version than this report reads. Train the run again."
        )
    if wrong := _wrong_types(config):
        raise DamagedFileError(
            f"Expected {run_dir / 'config.json'} to be of a run, but its {', '.join(wrong)} cannot be: it is damaged. "
            "Train the run again."
        )
    if not (run_dir / "adapter").is_dir() and not (run_dir / "predictions.safetensors").is_file():
        raise VarloraError(f"{run_dir} is not trained yet: go on with `varlora train --resume --run-dir {run_dir}`.")
    path = run_dir / "predictions.safetensors"
    if not path.is_file():
        raise VarloraError(f"{run_dir} has no predictions: run `varlora evaluate {run_dir}` first.")
    predictions = _read_predictions(path)
    tuned_path = run_dir / f"predictions{CALIBRATED}.safetensors"
    tuned = _read_predictions(tuned_path) if tuned_path.is_file() else None
    if tuned and not same_rows(tuned, predictions):
        raise DamagedFileError(
            f"Expected predictions of the same rows in {path} and {tuned_path.name}, but they differ. Run "
            f"`varlora evaluate --calibrate {run_dir}` again."
        )
    of = (run_dir / "config.json", config), (path, [*predictions.meta.values(), *predictions.slices])
    for file, content in of:
        if bad := next((text for text in _texts(content) if CONTROL.search(text)), None):
            raise DamagedFileError(f"Expected {file} to hold names that can be printed, but it has {bad[:80]!r}.")
    return EvaluatedRun(run_dir, config, predictions, tuned)


def _read_predictions(path: Path) -> Predictions:
    """Read predictions that say how they were made."""
    predictions = load_predictions(path)
    meta = predictions.meta
    try:
        int(meta["samples"]), float(meta["tau"]), meta["task"], meta["split"]
    except (KeyError, ValueError) as error:
        raise DamagedFileError(
            f"{path} does not say how it was made ({error}): it is damaged, or of an older version than this report "
            f"reads. Run `varlora evaluate {path.parent}` again."
        ) from error
    return predictions


# --- checks


def _what(run_dir: Path) -> tuple[str, str]:
    """Return task and method of a run that cannot be used, as far as its config.json says."""
    try:
        settings = read_json(run_dir / "config.json")["settings"]
        task, method = get_task(settings["task"]).name, str(settings["method"])
        return ("", "") if CONTROL.search(task + method) else (task, method)
    except (VarloraError, KeyError, TypeError):
        return "", ""


def _texts(content: Any) -> Iterator[str]:
    """Yield the texts in a JSON value, names of fields included."""
    if isinstance(content, str):
        yield content
    elif isinstance(content, Mapping):
        yield from _texts([*content, *content.values()])
    elif isinstance(content, list):
        for item in content:
            yield from _texts(item)


def _wrong_types(config: Mapping[str, Any]) -> list[str]:
    """Return what of a config.json is of a type that it never has."""
    settings, members = config["settings"], config.get("concluded_from") or []
    own = settings.get("method_settings") or {}
    right = {
        **{f"settings.{name}": isinstance(settings[name], str) for name in ("task", "model", "method")},
        "settings.seed": isinstance(settings["seed"], int),
        "settings.method_settings": isinstance(own, Mapping) and isinstance(own.get("of"), str | None),
        "versions": isinstance(config.get("versions") or {}, Mapping),
        **{name: isinstance(config.get(name, 0), int) for name in COUNTS},
        "concluded_from": _are_sources(members),
        "base and data": all(isinstance(config.get(name, ""), str) for name in ("base", "data")),
    }
    return [name for name, is_right in right.items() if not is_right]


def _are_sources(members: Any) -> bool:
    """Whether this may be what config.json says of the runs that a run was concluded from."""
    return isinstance(members, list) and all(
        isinstance(member, Mapping)
        and isinstance(member.get("method"), str)
        and "method_settings" in member
        and isinstance(member.get("settings", {}), Mapping)
        and _are_sources(member.get("concluded_from") or [])
        for member in members
    )
