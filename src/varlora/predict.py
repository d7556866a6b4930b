"""Predict: class logits of S fixed models for each row, their averaged probabilities and uncertainty.

The draws are made once, so draw s is the same model for every row. Probabilities are averaged, never logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from varlora.data import collate, token_batches
from varlora.drawing import PLAIN, Drawing
from varlora.errors import VarloraError
from varlora.model import class_logits
from varlora.params import trainable
from varlora.posterior import Point, Posterior
from varlora.predictions import Predictions
from varlora.prompt import Encoded

__all__ = ["predict"]


@torch.no_grad()
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
    how: Drawing = PLAIN,
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
        how: how the draws are made and run.
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
    drawing = None
    try:
        generator = torch.Generator(device).manual_seed(seed)
        if samples and scaled.kind != Point.kind:
            drawing = scaled.drawn(samples, generator, how)
        for batch_rows in token_batches([len(row.input_ids) for row in rows], token_budget):
            batch = collate([rows[i] for i in batch_rows], pad_token_id)
            width = batch["label_tokens"].shape[1]
            at_mean = scaled.draw_logits(model, batch, 0, generator, class_logits).cpu()  # (1, B, C)
            mean[batch_rows, :width] = at_mean[0]
            if samples:
                logits = at_mean  # all draws of a point are the mean: no second pass
                if drawing is not None:
                    logits = drawing.logits(model, batch, class_logits).cpu()  # (S, B, C)
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
    if drawing is not None:
        meta |= how.changed()
    if drawing is not None and how.tolerance is not None:
        meta["passes_a_row"] = f"{drawing.passes / len(rows):.4g}"
    ids = tuple(row.id for row in rows)
    return Predictions(mean[None] if drawn is None else drawn, mean, labels, ids, meta=meta)
