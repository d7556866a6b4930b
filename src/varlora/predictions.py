"""Predictions and their file: all that a report needs, so that it needs neither a model nor a GPU."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from varlora.drawing import Drawing
from varlora.errors import DamagedFileError
from varlora.files import load_tensors, parse_json, save_tensors
from varlora.metrics import Uncertainty, average_probs, uncertainty

__all__ = [
    "CALIBRATED",
    "CALIBRATION",
    "Predictions",
    "Temperatures",
    "load_predictions",
    "made_unlike",
    "meta_of",
    "same_rows",
    "save_predictions",
]

CALIBRATION = "-calibration"
"""End of the names of the held-out rows' files: to choose on; a report never reads them."""
CALIBRATED = "-calibrated"
"""End of the name of the predictions by the calibrated posterior."""
MADE = ("samples", "tau", "seed", *(of.name for of in fields(Drawing)))
"""What of the meta data says how the draws were made."""


class Temperatures(NamedTuple):
    """What the logits are to be divided by, fitted on held-out rows."""

    draws: float
    """Temperature of the draws."""
    mean: float
    """Temperature at the posterior mean."""


@dataclass(frozen=True, eq=False)
class Predictions:
    """Class logits of every draw for N rows with up to C answers."""

    logits: Tensor
    """(S, N, C) float32, -inf where a row does not have the answer; at the mean, S = 1, when nothing was drawn."""
    logits_mean: Tensor
    """(N, C) float32, at the posterior mean."""
    labels: Tensor
    """(N,) int64, -1 where unknown."""
    ids: tuple[str, ...]
    """One id for each row."""
    slices: tuple[str, ...] = ()
    """The part of the data that each row belongs to, or nothing where the task names none."""
    prompts: tuple[str, ...] = ()
    """What each row asks, for people to read; nothing in files of older versions."""
    answers: tuple[tuple[str, ...], ...] = ()
    """The texts of each row's answers, in the order of the logits; nothing in files of older versions."""
    meta: Mapping[str, str] = field(default_factory=dict)
    """Where they come from: samples, tau, seed, and what the caller adds; `temperature` and `temperature_mean` if they
    were fitted."""

    @property
    def probs(self) -> Tensor:
        """(N, C) float64: probabilities averaged over the draws."""
        return average_probs(self.logits)

    @property
    def probs_mean(self) -> Tensor:
        """(N, C) float64: probabilities at the posterior mean."""
        return average_probs(self.logits_mean[None])

    @property
    def temperatures(self) -> Temperatures | None:
        """The temperatures that were fitted on held-out rows, if any were."""
        if "temperature" not in self.meta:
            return None
        return Temperatures(float(self.meta["temperature"]), float(self.meta["temperature_mean"]))

    def tempered(self, drawn: bool) -> Tensor:
        """Return the probabilities with the logits divided by the fitted temperature, (N, C) float64.

        Args:
            drawn: those averaged over the draws, or those at the mean.
        """
        assert self.temperatures is not None
        if drawn:
            return average_probs(self.logits / self.temperatures.draws)
        return average_probs(self.logits_mean[None] / self.temperatures.mean)

    @property
    def uncertainty(self) -> Uncertainty:
        """Total, aleatoric and epistemic uncertainty of each row, (N,) each, in nats."""
        return uncertainty(self.logits)


def save_predictions(predictions: Predictions, path: Path) -> None:
    """Write predictions as safetensors: logits, logits_mean, mask, labels; texts and origin in the metadata."""
    tensors = {
        "logits": predictions.logits,
        "logits_mean": predictions.logits_mean,
        "mask": predictions.logits_mean > -torch.inf,
        "labels": predictions.labels,
    }
    texts = {name: json.dumps(getattr(predictions, name)) for name in ("ids", "slices", "prompts", "answers")}
    save_tensors(path, tensors, {**predictions.meta, **texts})


def made_unlike(one: Mapping[str, str], other: Mapping[str, str], *also: str) -> list[str]:
    """Return in what the draws of two predictions differ, by their meta data; and in what else is named.

    Example:
        >>> made_unlike({"samples": "4", "task": "a"}, {"samples": "8", "task": "b"}, "task")
        ['samples', 'task']
    """
    return [key for key in (*MADE, *also) if one.get(key) != other.get(key)]


def same_rows(one: Predictions, other: Predictions) -> bool:
    """Whether two predictions are of the same rows: ids, labels and, as far as both know it, what is asked."""
    asked = one.prompts == other.prompts or not (one.prompts and other.prompts)
    return one.ids == other.ids and torch.equal(one.labels, other.labels) and asked


def meta_of(path: Path) -> dict[str, str]:
    """Return where predictions come from, without reading them; nothing if the file is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError):
        return {}


def load_predictions(path: Path) -> Predictions:
    """Read what `save_predictions` wrote.

    Raises:
        DamagedFileError: the file is absent, cut short, or does not hold predictions: what is returned has the types,
            shapes and numbers that a report goes by.
    """
    tensors, meta = load_tensors(path)
    try:
        logits, mean, mask, labels = (tensors[name] for name in ("logits", "logits_mean", "mask", "labels"))
        ids, slices, prompts, answers = (
            parse_json(meta.pop(name, "[]")) for name in ("ids", "slices", "prompts", "answers")
        )
    except (KeyError, ValueError) as error:
        raise DamagedFileError(
            f"Expected predictions in {path}, but {error} is missing or unreadable. "
            "An older version may have written it, or it is damaged. Run `varlora evaluate` again."
        ) from error
    problem = (
        _problem(logits, mean, mask, labels)
        or _texts_problem(mask, ids, slices, prompts, answers)
        or _numbers_problem(meta, logits, mean)
    )
    if problem:
        raise DamagedFileError(f"Expected predictions in {path}, but {problem}. Run `varlora evaluate` again.")
    return Predictions(
        logits, mean, labels, tuple(ids), tuple(slices), tuple(prompts), tuple(map(tuple, answers)), meta
    )


def _problem(logits: Tensor, mean: Tensor, mask: Tensor, labels: Tensor) -> str | None:
    types = [str(tensor.dtype).removeprefix("torch.") for tensor in (logits, mean, mask, labels)]
    if types != ["float32", "float32", "bool", "int64"]:
        return f"logits, mean, mask and labels are {', '.join(types)}"
    if mean.ndim != 2 or logits.ndim != 3 or logits.shape[1:] != mean.shape or mask.shape != mean.shape:
        return f"the shapes {tuple(logits.shape)}, {tuple(mean.shape)} and {tuple(mask.shape)} do not fit"
    if labels.shape != mean.shape[:1]:
        return f"there are {len(mean)} rows and {len(labels)} labels"
    if not len(logits) or not mean.shape[1]:
        return f"there are {len(logits)} draws of {mean.shape[1]} answers"
    if not ((logits.isfinite() == mask).all() and (mean.isfinite() == mask).all()):
        return "logits are not finite exactly where a row has the answer"
    known = labels >= 0
    if (
        not mask[known].gather(1, labels[known, None].clamp(max=mask.shape[1] - 1)).all()
        or (labels >= mask.shape[1]).any()
    ):
        return "a label is not among its row's answers"
    return None


def _texts_problem(mask: Tensor, ids: Any, slices: Any, prompts: Any, answers: Any) -> str | None:
    of_rows = {"ids": ids, "slices": slices, "prompts": prompts, "lists of answers": answers}
    for name, texts in of_rows.items():
        if not isinstance(texts, list) or (len(texts) != len(mask) and (texts or name == "ids")):
            count = len(texts) if isinstance(texts, list) else "no"
            return f"there are {len(mask)} rows and {count} {name}"
    if not all(isinstance(texts, list) for texts in answers):
        return "its answers are no lists"
    if not all(isinstance(text, str) for texts in (ids, slices, prompts, *answers) for text in texts):
        return "its ids, slices, prompts or answers are not all texts"
    if answers and [len(texts) for texts in answers] != mask.sum(1).tolist():
        return "a row has another number of answers than of logits"
    return None


def _numbers_problem(meta: Mapping[str, str], logits: Tensor, mean: Tensor) -> str | None:
    """Return what is wrong with the numbers of the meta data, as far as they are there."""
    divided = {"temperature": logits, "temperature_mean": mean}
    if ("temperature" in meta) != ("temperature_mean" in meta):
        return "one of its two temperatures is missing"
    for name in meta.keys() & {"samples", "tau", *divided}:
        try:
            number = float(meta[name])
        except ValueError:
            number = math.nan
        of = divided.get(name)
        overflows = of is not None and not torch.equal((of / number).isfinite(), of.isfinite())
        if overflows or not 0 <= number < math.inf:
            return f"its {name} is {meta[name][:40]!r}"
    return None
