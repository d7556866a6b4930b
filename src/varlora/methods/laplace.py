"""Laplace: a Gaussian around AdamW's optimum, from the curvature of the loss there (Yang et al. 2024, Laplace-LoRA).

The curvature is the generalised Gauss-Newton matrix of the C answers' logits, summed over the N training rows:

    H = Σₙ JₙᵀΛₙJₙ,  Λₙ = diag(pₙ) − pₙpₙᵀ,   posterior N(θ*, (H + δI)⁻¹)

with Jₙ (C, P) the logits' gradients and δ the precision of the prior. Of H either the diagonal is kept, or for each
weight matrix a Kronecker product of small factors (KFAC), whose large sides are of low rank. Λ = LLᵀ has rank C − 1, so
C − 1 backward passes a batch are exact; the Fisher estimate takes one, at answers that the model draws.

δ maximises the evidence `½ (P log δ − Σᵢ log(hᵢ + δ) − δ‖θ*‖²)`, with hᵢ the eigenvalues of H, or minimises the NLL of
the calibration split.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from varlora.curvature import RANGE, Curvature, Diagonal, Kronecker, best_evidence, root, sampled_root
from varlora.errors import VarloraError
from varlora.gradients import one_pass, trained_layers
from varlora.methods.base import AdamWTraining, Plan, Trained
from varlora.params import copied
from varlora.posterior import Linearised, Posterior
from varlora.prompt import Encoded

__all__ = ["LaplaceDiag", "LaplaceKfac"]

CANDIDATES = tuple(10 ** (power / 2) for power in range(-2, 13))
"""Prior precisions whose NLL on the calibration split is compared: half a decade apart, 0.1 to a million."""
DRAWS = 10
"""Draws for that, where weights are drawn."""


@dataclass(frozen=True)
class _Laplace(AdamWTraining):
    """What both have in common: all but the form of the curvature."""

    concludes_from: ClassVar[tuple[str, ...]] = ("adamw",)

    curvature: Literal["ggn", "fisher"] = "ggn"
    """The exact matrix, or its estimate from one answer a row that the model draws: one backward pass a batch."""
    prior_precision: float | None = None
    """δ; left out: chosen as `choose_by` says."""
    choose_by: Literal["evidence", "calibration"] = "evidence"
    """Choose δ by the evidence on the training rows, or by the NLL of the held-out rows."""
    predictive: Literal["linearised", "weights"] = "linearised"
    """Predict with the linearised model, or draw weights."""

    def problems(self, plan: Plan) -> list[str]:
        found = []
        if self.prior_precision is not None and not 0 < self.prior_precision < math.inf:
            found.append(
                f"Expected `prior_precision` to be a number > 0, but got {self.prior_precision}. "
                "Leave it out to have it chosen."
            )
        if self.choose_by == "calibration" and self.prior_precision is None and not plan.calibration:
            found.append(
                "Expected rows that are held out for `choose_by: calibration`, but there are none. "
                "Train with `calibration_fraction`, e.g. 0.1, or set `choose_by: evidence`."
            )
        return found

    def check_model(self, model: nn.Module) -> None:
        """Raise if there is no curvature of a parameter that trains."""
        super().check_model(model)
        trained_layers(model)

    @abstractmethod
    def collector(self, trained: Trained) -> Curvature:
        """Make what collects the curvature."""

    def posterior(self, trained: Trained) -> Posterior:
        """Go once through the training rows for the curvature, choose the prior's precision, and conclude."""
        trained.say(f"Going through {len(trained.rows)} training rows for the curvature.")
        mean = {name: p.float() for name, p in copied(trained.model).items()}
        found = self.collector(trained)
        for inputs, gradients, tokens in self.passes(trained):
            found.add(inputs, gradients, tokens)
        precision = self.prior_precision or self.chosen(found, mean, trained)
        at_end = not self.prior_precision and not 1.01 * RANGE[0] < precision < RANGE[1] / 1.01
        doubt = "; it is at the end of its range, so the training rows do not set it. Give `prior_precision`"
        trained.say(f"The prior precision is {precision:.4g}{doubt if at_end else ''}.")
        return self.concluded(found, mean, precision)

    def chosen(self, found: Curvature, mean: Mapping[str, Tensor], trained: Trained) -> float:
        """Choose the prior precision."""
        if self.choose_by == "calibration":
            rows, _ = trained.at_mean(self.concluded(found, mean, CANDIDATES[-1]), trained.calibration)
            nll = {c: trained.nll(self.concluded(found, mean, c), rows, DRAWS) for c in CANDIDATES} if rows else {}
            if math.isfinite(min(nll.values(), default=math.inf)):
                return min(nll, key=nll.__getitem__)
            trained.say("No prior precision gives finite probabilities on the held-out rows: chosen by the evidence.")
        return best_evidence(found.eigenvalues(), sum(p.double().square().sum().item() for p in mean.values()))

    def concluded(self, found: Curvature, mean: Mapping[str, Tensor], precision: float) -> Posterior:
        """Return the posterior with this prior precision."""
        gaussian = found.gaussian(mean, precision)
        return Linearised(gaussian) if self.predictive == "linearised" else gaussian

    def passes(self, trained: Trained) -> Iterator[tuple[dict[str, Tensor], list[dict[str, Tensor]], dict[str, int]]]:
        """Yield each batch's layer inputs, their outputs' gradients at each column of Λ's root, and its tokens.

        Rows that are not finite are left out: their inputs, gradients and tokens are 0.
        """
        generator, left_out = trained.generator(), 0
        batches = [trained.rows[at : at + trained.batch_size] for at in range(0, len(trained.rows), trained.batch_size)]
        batches.reverse()
        while batches:
            rows = batches.pop()
            try:
                inputs, gradients, tokens, bad = self.one_pass(trained, rows, generator)
            except torch.OutOfMemoryError:
                if len(rows) == 1:
                    raise
                batches += [rows[len(rows) // 2 :], rows[: len(rows) // 2]]  # the first half is next
                continue
            left_out += bad
            yield inputs, gradients, tokens
        if left_out == len(trained.rows):
            raise VarloraError(
                "Expected training rows with finite gradients for the curvature, but there are none. "
                "Load the base in float32 or bfloat16."
            )
        if left_out:
            trained.say(f"{left_out} training rows were left out of the curvature: their gradients are not finite.")

    def one_pass(
        self, trained: Trained, rows: Sequence[Encoded], generator: torch.Generator
    ) -> tuple[dict[str, Tensor], list[dict[str, Tensor]], dict[str, int], int]:
        """Return inputs, gradients and numbers of tokens of some rows, and how many of the rows are not finite."""
        batch = trained.batch(rows)
        with one_pass(trained.model, batch, trained.forward) as found:
            logits, answers = found.logits.detach(), batch["answer_mask"].to(found.logits.device)
            bad = (logits.isfinite() != answers).any(1)  # (B,)
            probs = torch.where(bad[:, None], answers.double(), logits.double()).softmax(-1)
            columns = sampled_root(probs, generator) if self.curvature == "fisher" else root(probs)
            gradients = [found.backward(column.float()) for column in columns]
        for values in (found.inputs, *gradients):
            for value in values.values():
                bad = bad | ~value.flatten(1).isfinite().all(1).to(bad.device)
        good = ~bad[:, None]
        mask = batch["attention_mask"].to(bad.device).bool() & good  # (B, T)
        # the output layer sees the last position alone, (B, 1, in); layers may be on several devices
        kept = {name: mask if a.shape[1] == mask.shape[1] else good for name, a in found.inputs.items()}
        inputs = {name: a.where(kept[name][:, :, None].to(a.device), 0) for name, a in found.inputs.items()}
        gradients = [{name: g.where(good[:, :, None].to(g.device), 0) for name, g in of.items()} for of in gradients]
        return inputs, gradients, {name: int(of.sum()) for name, of in kept.items()}, int(bad.sum())


@dataclass(frozen=True)
class LaplaceDiag(_Laplace):
    """Train with AdamW, then take the curvature's diagonal for the posterior's precision.

    Example:
        >>> layer = nn.Linear(2, 2, bias=False)
        >>> _ = nn.init.zeros_(layer.weight)
        >>> rows = [Encoded("1", (0, 1), (8, 9), 0, False), Encoded("2", (1, 0), (8, 9), 1, False)]
        >>> forward = lambda model, batch: model(nn.functional.one_hot(batch["input_ids"]).float())[:, -1]
        >>> end = Trained(layer, rows, draw=None, forward=forward, say=lambda words: None)
        >>> posterior = LaplaceDiag(prior_precision=1.0, predictive="weights").posterior(end)
        >>> posterior.std["weight"].unique()  # each weight counts in one row: 1/√(p(1 − p) + 1), p = ½
        tensor([0.8944])

    References:
        Yang et al. 2024, Bayesian Low-rank Adaptation for Large Language Models; Daxberger et al. 2021, Laplace Redux.
    """

    name: ClassVar[str] = "laplace_diag"
    title: ClassVar[str] = "LA (diag)"

    def collector(self, trained: Trained) -> Curvature:
        """Collect the diagonal."""
        return Diagonal()


@dataclass(frozen=True)
class LaplaceKfac(_Laplace):
    """Train with AdamW, then take a Kronecker-factored curvature for the posterior's precision.

    Example:
        >>> layer = nn.Linear(2, 2, bias=False)
        >>> _ = nn.init.zeros_(layer.weight)
        >>> rows = [Encoded("1", (0, 1), (8, 9), 0, False), Encoded("2", (1, 0), (8, 9), 1, False)]
        >>> forward = lambda model, batch: model(nn.functional.one_hot(batch["input_ids"]).float())[:, -1]
        >>> end = Trained(layer, rows, draw=None, forward=forward, say=lambda words: None)
        >>> posterior = LaplaceKfac(prior_precision=1.0, predictive="weights").posterior(end)
        >>> posterior.marginal_std()["weight"].mean()  # with the covariance of a row's two logits: √(½ + ½/(½ + 1))
        tensor(0.9129)

    References:
        Yang et al. 2024, Bayesian Low-rank Adaptation for Large Language Models; Ritter et al. 2018, A Scalable Laplace
        Approximation for Neural Networks.
    """

    name: ClassVar[str] = "laplace_kfac"
    title: ClassVar[str] = "LA (KFAC)"

    rank: int = 10
    """Rank of what is kept of each matrix's larger side."""

    def problems(self, plan: Plan) -> list[str]:
        """A factor of rank 0 is none."""
        found = super().problems(plan)
        if self.rank < 1:
            found.append(
                f"Expected `rank` to be a whole number >= 1, but got {self.rank}. "
                f"Set e.g. `method.rank={LaplaceKfac.rank}`."
            )
        return found

    def collector(self, trained: Trained) -> Curvature:
        """Collect Kronecker factors."""
        return Kronecker(self.rank, trained.generator(), trained.say)
