"""A posterior for the model linearised in its weights: logits are Gaussian, and their covariance is exact."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from varlora.drawing import PLAIN, Draw, Drawing, Drawn, Forward, normal
from varlora.gradients import one_pass
from varlora.posterior.base import Gaussian, check_draws, pack, unpack

__all__ = ["Linearised"]

DRAWS = 256
MAX_NUMBERS = 2**27
"""Numbers that the Jacobians of one chunk of rows may hold: half a gigabyte."""


@dataclass(frozen=True)
class Linearised:
    r"""The linearised model's predictive: `logits ~ N(f(x, θ*), J(x) Σ J(x)ᵀ)`, with a full C×C covariance per row.

    J (C, P) holds the gradients of the C answers' logits at the mean. One forward pass and C backward passes give the
    covariance; drawing logits from it costs nothing beside them, so there are at least 256 draws, in antithetic pairs,
    whose mean is f(x, θ*). A draw's noise is the same for every row.

    References:
        Immer et al. 2021, Improving predictions of Bayesian neural nets via local linearization, equation 10; Yang et
        al. 2024, Bayesian Low-rank Adaptation for Large Language Models, equation 12.
    """

    kind: ClassVar[str] = "linearised"

    weights: Gaussian
    """The Gaussian N(θ*, Σ) over the weights."""

    @property
    def mean(self) -> Mapping[str, Tensor]:
        """θ* by parameter name."""
        return self.weights.mean

    def sampled(self, model: nn.Module, generator: torch.Generator) -> AbstractContextManager[None]:
        """Within the context `model` has weights drawn from the Gaussian: without the linearisation."""
        return self.weights.sampled(model, generator)

    def at_mean(self, model: nn.Module) -> AbstractContextManager[None]:
        """Within the context `model` is at θ*."""
        return self.weights.at_mean(model)

    def covariance(self, model: nn.Module, batch: Any, forward: Forward) -> tuple[Tensor, Tensor]:
        """Return the logits at θ*, (B, C), and their covariance, (B, C, C) float64.

        Entries of answers that a row does not have are -inf and 0.
        """
        with self.at_mean(model):
            logits, covariances = [], []
            for rows in _chunks(batch, sum(value.numel() for value in self.mean.values())):
                with one_pass(model, rows, forward) as found:
                    jacobian = found.jacobian()
                    logits.append(found.logits.detach())
                parts = [self.weights.quadratic(name, of_layer) for name, of_layer in jacobian.items()]
                covariances.append(torch.stack([part.to(parts[0].device) for part in parts]).sum(0))
            return torch.cat(logits), torch.cat(covariances)

    def draw_logits(self, model: nn.Module, batch: Any, n: int, generator: torch.Generator, forward: Forward) -> Tensor:
        """Class logits of max(n, 256) draws, (S, B, C); with `n = 0` at θ*, S = 1."""
        check_draws(n)
        if n == 0:
            return self.weights.draw_logits(model, batch, 0, generator, forward)
        return self.drawn(n, generator).logits(model, batch, forward)

    def drawn(self, n: int, generator: torch.Generator, how: Drawing = PLAIN) -> Drawn:
        """The predictive with the noise of max(n, 256) draws fixed; they are antithetic, whatever `how` says."""
        check_draws(n, 1)
        state = generator.get_state()
        torch.rand(1, generator=generator, device=generator.device)  # so that the next draws are others
        return _LinearisedDraws(self, n, generator.device, state)

    def scale(self, tau: float) -> Linearised:
        """Return the predictive with `tau` times the covariance."""
        return Linearised(self.weights.scale(tau))

    def prune(self, fraction: float, by: str = "snr", generator: torch.Generator | None = None) -> Linearised:
        """Prune the Gaussian: what is pruned has no gradient that counts."""
        return Linearised(cast(Gaussian, self.weights.prune(fraction, by, generator)))

    def tensors(self) -> dict[str, Tensor]:
        """The Gaussian's tensors, as `0/<kind>/<tensor>`."""
        return pack([self.weights])

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Linearised:
        """Rebuild from `tensors()`."""
        (weights,) = unpack(tensors)
        return cls(cast(Gaussian, weights))


class _LinearisedDraws:
    """Draws of the logits, from the same noise for every batch: that of a generator in a given state."""

    how = PLAIN

    def __init__(self, of: Linearised, n: int, device: torch.device, state: Tensor) -> None:
        self.of, self.n, self.device, self.state = of, n, device, state
        self.passes = 0
        """Rows that went through a model so far: once each, whatever the draws."""

    def logits(self, model: nn.Module, batch: Any, forward: Forward) -> Tensor:
        """Class logits of each draw, (S, B, C)."""
        logits, covariance = self.of.covariance(model, batch, forward)
        self.passes += len(logits)
        return gaussian_logits(logits, covariance, max(self.n, DRAWS), self._source())

    def models(self) -> list[Draw]:
        """Draws of the Gaussian's weights, as many as were asked for: what the linearised model is near to."""
        return self.of.weights.drawn(self.n, self._source()).models()

    def _source(self) -> torch.Generator:
        generator = torch.Generator(self.device)
        generator.set_state(self.state)
        return generator


def gaussian_logits(logits: Tensor, covariance: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Draw logits, (S, B, C), from N(logits, covariance) in antithetic pairs; the noise is shared by the rows.

    S is n, or n + 1 if n is odd.

    Args:
        logits: (B, C), -inf where a row does not have the answer.
        covariance: (B, C, C), positive semi-definite but for rounding.
        n: draws.
        generator: source of the noise.
    """
    covariance = covariance.double()
    finite = covariance.isfinite().all(-1).all(-1)  # (B,): of a model that overflows there are no roots
    values, vectors = torch.linalg.eigh(torch.where(finite[:, None, None], covariance, 0.0))
    # the symmetric root: unlike a Cholesky factor it needs no damping where an answer has no variance
    root = vectors * values.clamp(min=0).sqrt()[:, None] @ vectors.mT  # (B, C, C)
    root[~finite] = torch.nan
    # class by class, so that a class's noise does not depend on how many answers the batch's other rows have
    half = torch.stack([normal(values, generator, (n + 1) // 2) for _ in range(logits.shape[1])], -1)
    noise = torch.cat([half, -half])  # (S, C)
    return logits + torch.einsum("bcd,sd->sbc", root, noise).to(logits)


def _chunks(batch: Any, parameters: int) -> list[Any]:
    """Divide a batch so that the Jacobians of each part fit into memory."""
    if not isinstance(batch, Mapping):
        return [batch]
    size, classes = batch["answer_mask"].shape
    at_once = max(1, MAX_NUMBERS // (classes * parameters))
    return [{key: value[at : at + at_once] for key, value in batch.items()} for at in range(0, size, at_once)]
