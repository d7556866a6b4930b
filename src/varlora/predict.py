"""Predict: class logits of S fixed models for each row, their averaged probabilities and uncertainty.

The draws are made once, so draw s is the same model for every row. Probabilities are averaged, never logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from varlora.data import Batch, collate, token_batches
from varlora.drawing import PLAIN, Drawing, Drawn
from varlora.draws import holds
from varlora.errors import VarloraError
from varlora.model import class_logits
from varlora.params import trainable
from varlora.posterior import Mixture, Point, Posterior
from varlora.posterior.base import check_draws
from varlora.predictions import Predictions
from varlora.prefix import Beginning, begun, continued
from varlora.prompt import Encoded
from varlora.stack import can_stack, out_of_memory

__all__ = ["Predictor", "predict"]


class Predictor:
    """A posterior whose draws are made, to be asked batch after batch.

    Args:
        model: the model that the posterior is of, in evaluation mode while it is asked.
        posterior: what to draw from.
        samples: draws S; 0: only the mean.
        tau: factor of the posterior variance.
        seed: seed of the draws.
        how: how the draws are made and run.

    Raises:
        VarloraError: `samples` or `tau` is out of its range; or nothing in the model is trainable, or its adapter is
            merged.
    """

    def __init__(
        self,
        model: nn.Module,
        posterior: Posterior,
        samples: int = 10,
        tau: float = 1.0,
        seed: int = 0,
        how: Drawing = PLAIN,
    ) -> None:
        check_draws(samples, what="samples")
        _check_adapter(model)
        self.model, self.posterior, self.samples = model, posterior.scale(tau), samples
        self.meta = {"samples": str(samples), "tau": repr(float(tau)), "seed": str(seed)}
        """How the draws were made, as predictions tell it."""
        self._generator = torch.Generator(next(iter(trainable(model).values())).device).manual_seed(seed)
        self._divides = how.stacked and not holds(self.posterior, Mixture)  # whose means are several models
        self._beginning = Beginning(draws=1)
        self._room = math.inf  # tokens that a batch may have, once memory has run out
        self.draws: Drawn | None = None
        """The draws, if they differ from the mean."""
        if samples and self.posterior.kind != Point.kind:
            self.draws = self.posterior.drawn(samples, self._generator, how)
            self.meta |= self.draws.how.changed()

    @torch.no_grad()
    def at_mean(self, batch: Batch) -> Tensor:
        """Return the class logits at the mean, (1, B, C), on the CPU."""
        return self.posterior.draw_logits(self.model, batch, 0, self._generator, self._of_the_mean).cpu()

    def _of_the_mean(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the class logits of the model, which is at the mean, (B, C); what rows begin with is run once."""
        parts = self._beginning.divided(model, batch) if self._divides and can_stack(model, batch) else None
        if parts is None:
            return class_logits(model, batch)
        first, rest = parts
        cache = self._beginning.cache(0, 1, lambda start, stop: begun(model, first, 1), at_once=1)
        with continued(model, cache, len(rest["input_ids"])):
            return class_logits(model, rest)

    @torch.no_grad()
    def logits(self, batch: Batch) -> Tensor:
        """Return the class logits of the draws, (S, B, C), on the CPU; at the mean where there are none."""
        return self.at_mean(batch) if self.draws is None else self.draws.logits(self.model, batch, class_logits).cpu()

    def predictions(
        self,
        rows: Sequence[Encoded],
        *,
        pad_token_id: int,
        token_budget: int = 4096,
        progress: Callable[[int], None] | None = None,
    ) -> Predictions:
        """Return the predictions of rows; see `predict`."""
        before = self.draws.passes if self.draws else 0

        def both(batch: Batch) -> Tensor:
            at_mean = self.at_mean(batch)  # all draws of a point are it: no second pass
            return at_mean if self.draws is None else torch.cat([at_mean, self.logits(batch)])

        found = self._of_rows(both, rows, pad_token_id, token_budget, progress)
        mean, drawn = found[0], found if self.draws is None else found[1:]
        labels = torch.tensor([-1 if row.label is None else row.label for row in rows])
        meta = dict(self.meta)
        if self.draws is not None and self.draws.how.tolerance is not None:
            meta["passes_a_row"] = f"{(self.draws.passes - before) / len(rows):.4g}"
        ids = tuple(row.id for row in rows)
        return Predictions(drawn, mean, labels, ids, meta=meta)

    def logits_of(
        self,
        rows: Sequence[Encoded],
        *,
        pad_token_id: int,
        token_budget: int = 4096,
        progress: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Return the class logits of the draws, (S, N, C), without a pass at the mean but where there are no draws."""
        return self._of_rows(self.logits, rows, pad_token_id, token_budget, progress)

    def _of_rows(
        self,
        forward: Callable[[Batch], Tensor],
        rows: Sequence[Encoded],
        pad_token_id: int,
        token_budget: int,
        progress: Callable[[int], None] | None,
    ) -> Tensor:
        """Return what `forward` gives for batches of the rows, (S, N, C), -inf where a row has fewer answers.

        Where memory runs out for a batch, half as many rows go on.
        """
        if not rows:
            raise VarloraError("Expected `rows` to hold rows to predict, but got none.")
        classes = max(len(row.label_tokens) for row in rows)
        lengths = [len(row.input_ids) for row in rows]
        batches = token_batches(lengths, token_budget)[::-1]  # the next one is the last
        found: Tensor | None = None
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            while batches:
                batch_rows = batches.pop()
                longest, half = lengths[batch_rows[0]], (len(batch_rows) + 1) // 2
                if len(batch_rows) > 1 and len(batch_rows) * longest > self._room:
                    batches += [batch_rows[half:], batch_rows[:half]]
                    continue
                try:
                    logits = forward(collate([rows[i] for i in batch_rows], pad_token_id))  # (S, B, C)
                except Exception as error:
                    if len(batch_rows) == 1 or not out_of_memory(error):
                        raise
                    self._room = half * longest
                    batches.append(batch_rows)
                    continue  # the frames that held the tensors are gone with the error
                if found is None:
                    found = torch.full((len(logits), len(rows), classes), -torch.inf, dtype=torch.float32)
                found[:, batch_rows, : logits.shape[2]] = logits
                if progress:
                    progress(len(batch_rows))
        finally:
            for module, training in modes:
                module.training = training
        assert found is not None
        return found


def _check_adapter(model: nn.Module) -> None:
    """Raise if other weights in the adapter would change nothing."""
    if not trainable(model):
        raise VarloraError(
            "Expected a model whose adapter is trainable, as its draws go there, but no parameter requires gradients. "
            "Load it with `varlora.from_pretrained`, or with peft's `is_trainable=True`, and outside of "
            "`disable_adapter()`."
        )
    if any(getattr(part, "merged", False) is True for part in model.modules()):
        raise VarloraError(
            "Expected an adapter beside the base, but it is merged into it, where draws do not reach. Call "
            "`model.unmerge_adapter()` first."
        )


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
        token_budget: tokens a batch, padding included; rows of similar length go together. Where memory runs out, half
            as many from then on.
        how: how the draws are made and run.
        progress: called with the number of rows done after each batch.

    Returns:
        Predictions in the order of `rows`.

    Raises:
        VarloraError: there are no rows, or `samples`, `tau` or `token_budget` is out of its range; or nothing in the
            model is trainable, or its adapter is merged.
        torch.OutOfMemoryError, RuntimeError or MemoryError: memory runs out for one draw of a single row.
    """
    predictor = Predictor(model, posterior, samples, tau, seed, how)
    return predictor.predictions(rows, pad_token_id=pad_token_id, token_budget=token_budget, progress=progress)
