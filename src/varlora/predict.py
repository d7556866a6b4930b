"""Predict: class logits of S fixed models for each row, their averaged probabilities and uncertainty.

Every batch starts its draws from the same seed, so draw s is the same model for every row. Probabilities are averaged,
never logits.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from varlora.data import collate, token_batches
from varlora.errors import DamagedFileError, VarloraError
from varlora.metrics import Uncertainty, average_probs, uncertainty
from varlora.model import class_logits
from varlora.params import trainable
from varlora.posterior import Posterior
from varlora.prompt import Encoded
from varlora.run import load_tensors, save_tensors

__all__ = ["Predictions", "load_predictions", "predict", "save_predictions"]


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
    meta: Mapping[str, str] = field(default_factory=dict)
    """Where they come from: samples, tau, seed, and what the caller adds."""

    @property
    def probs(self) -> Tensor:
        """(N, C) float64: probabilities averaged over the draws."""
        return average_probs(self.logits)

    @property
    def probs_mean(self) -> Tensor:
        """(N, C) float64: probabilities at the posterior mean."""
        return average_probs(self.logits_mean[None])

    @property
    def uncertainty(self) -> Uncertainty:
        """Total, aleatoric and epistemic uncertainty of each row, (N,) each, in nats."""
        return uncertainty(self.logits)


@torch.inference_mode()
def predict(
    model: nn.Module,
    posterior: Posterior,
    rows: Sequence[Encoded],
    *,
    pad_token_id: int,
    samples: int = 10,
    tau: float = 1.0,
    seed: int = 0,
    token_budget: int = 4096,
    progress: Callable[[int], None] | None = None,
) -> Predictions:
    """Run S draws and the mean on every row.

    Args:
        model: the model that the posterior is of; afterwards it is bit for bit and mode for mode what it was.
        posterior: what to draw from.
        rows: N encoded rows.
        pad_token_id: token to pad with.
        samples: draws S; 0: only the mean.
        tau: factor of the posterior variance.
        seed: seed of the draws.
        token_budget: tokens a batch, padding included; rows of similar length go together.
        progress: called with the number of rows done after each batch.

    Returns:
        Predictions in the order of `rows`.

    Raises:
        VarloraError: there are no rows, or `samples`, `tau` or `token_budget` is out of its range.
    """
    if not rows:
        raise VarloraError("Expected `rows` to hold rows to predict, but got none.")
    if samples < 0:
        raise VarloraError(f"Expected `samples` to be a number of draws >= 0, but got {samples}. Pass 0 for the mean.")
    scaled = posterior.scale(tau)
    device = next(iter(trainable(model).values())).device
    classes = max(len(row.label_tokens) for row in rows)
    drawn: Tensor | None = None
    mean = torch.full((len(rows), classes), -torch.inf)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        for batch_rows in token_batches([len(row.input_ids) for row in rows], token_budget):
            batch = collate([rows[i] for i in batch_rows], pad_token_id)
            generator = torch.Generator(device).manual_seed(seed)
            width = batch["label_tokens"].shape[1]
            mean[batch_rows, :width] = scaled.draw_logits(model, batch, 0, generator, class_logits)[0].cpu()
            if samples:
                logits = scaled.draw_logits(model, batch, samples, generator, class_logits).cpu()  # (S, B, C)
                if drawn is None:
                    drawn = torch.full((len(logits), len(rows), classes), -torch.inf)
                drawn[:, batch_rows, :width] = logits
            if progress:
                progress(len(batch_rows))
    finally:
        for module, training in modes:
            module.training = training
    labels = torch.tensor([-1 if row.label is None else row.label for row in rows])
    meta = {"samples": str(samples), "tau": repr(float(tau)), "seed": str(seed)}
    return Predictions(mean[None] if drawn is None else drawn, mean, labels, tuple(row.id for row in rows), meta)


def save_predictions(predictions: Predictions, path: Path) -> None:
    """Write predictions as safetensors: logits, logits_mean, mask, labels; row ids and origin in the metadata."""
    tensors = {
        "logits": predictions.logits,
        "logits_mean": predictions.logits_mean,
        "mask": predictions.logits_mean > -torch.inf,
        "labels": predictions.labels,
    }
    save_tensors(path, tensors, {**predictions.meta, "ids": json.dumps(predictions.ids)})


def load_predictions(path: Path) -> Predictions:
    """Read what `save_predictions` wrote.

    Raises:
        DamagedFileError: the file is absent, cut short, or does not hold predictions.
    """
    tensors, meta = load_tensors(path)
    try:
        logits, mean, mask, labels = (tensors[name] for name in ("logits", "logits_mean", "mask", "labels"))
        ids = tuple(json.loads(meta.pop("ids")))
    except (KeyError, ValueError) as error:
        raise DamagedFileError(f"Expected predictions in {path}, but {error} is missing or unreadable.") from error
    problem = _problem(logits, mean, mask, labels, ids)
    if problem:
        raise DamagedFileError(f"Expected predictions in {path}, but {problem}. Run `varlora evaluate` again.")
    return Predictions(logits, mean, labels, ids, meta)


def _problem(logits: Tensor, mean: Tensor, mask: Tensor, labels: Tensor, ids: tuple[Any, ...]) -> str | None:
    if mean.ndim != 2 or logits.ndim != 3 or logits.shape[1:] != mean.shape or mask.shape != mean.shape:
        return f"the shapes {tuple(logits.shape)}, {tuple(mean.shape)} and {tuple(mask.shape)} do not fit"
    if labels.shape != mean.shape[:1] or len(ids) != len(mean):
        return f"there are {len(mean)} rows, {len(labels)} labels and {len(ids)} ids"
    if not ((logits.isfinite() == mask).all() and (mean.isfinite() == mask).all()):
        return "logits are not finite exactly where a row has the answer"
    known = labels >= 0
    if (
        not mask[known].gather(1, labels[known, None].clamp(max=mask.shape[1] - 1)).all()
        or (labels >= mask.shape[1]).any()
    ):
        return "a label is not among its row's answers"
    return None
