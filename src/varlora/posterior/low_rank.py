"""A Gaussian of low rank plus a diagonal: SWAG's posterior."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from varlora.drawing import Source, normal
from varlora.errors import VarloraError
from varlora.posterior.base import WeightPosterior, check_fits, check_tau, prefixed, without_prefix

__all__ = ["LowRankGaussian"]


@dataclass(frozen=True, repr=False)
class LowRankGaussian(WeightPosterior):
    r"""SWAG's Gaussian, `N(θ̄, ½ (diag(σ²) + D Dᵀ/(K − 1)))`, half of it diagonal and half of rank K.

    A draw is `θ̄ + σ z₁/√2 + D z₂/√(2(K − 1))` with z₁ ~ N(0, I) and z₂ ~ N(0, I_K), z₂ shared by all parameters.

    Example:
        >>> one = torch.ones(1)
        >>> posterior = LowRankGaussian({"w": one}, {"w": one}, {"w": torch.tensor([[1.0], [-1.0]])})
        >>> generator = torch.Generator().manual_seed(0)
        >>> values = torch.cat([posterior.draw(generator)["w"] for _ in range(10_000)])
        >>> round(values.var().item(), 1)  # ½ (1 + (1 + 1)/1)
        1.5

    References:
        Maddox et al. 2019, A Simple Baseline for Bayesian Uncertainty in Deep Learning, equation 1.
    """

    kind: ClassVar[str] = "low_rank_gaussian"
    entrywise: ClassVar[tuple[str, ...]] = ("mean", "std", "deviations")

    mean: Mapping[str, Tensor]
    """θ̄ by parameter name, float32 (or wider) whatever the parameter's type."""
    std: Mapping[str, Tensor]
    """σ by parameter name, of the mean's shape and type."""
    deviations: Mapping[str, Tensor]
    """D by parameter name, (K, *shape); K >= 2, the same for all."""

    def __post_init__(self) -> None:
        ranks = {len(value) for value in self.deviations.values()}
        if len(ranks) != 1 or min(ranks) < 2:
            raise VarloraError(
                f"Expected `deviations` of K >= 2 snapshots, as many for each parameter, but got {sorted(ranks)}."
            )
        shapes = {name: value.shape for name, value in self.mean.items()}
        check_fits(self.mean, "std", shapes, self.std)
        check_fits(self.mean, "deviations", {n: (min(ranks), *shape) for n, shape in shapes.items()}, self.deviations)

    def draw(self, generator: Source) -> dict[str, Tensor]:
        """Return one draw of the weights by parameter name."""
        first = next(iter(self.deviations.values()))
        rank = len(first)
        z2 = normal(first, generator, rank) / math.sqrt(2 * (rank - 1))  # (K,)
        drawn = {}
        for name in sorted(self.mean):
            mean, std, deviations = self.mean[name], self.std[name], self.deviations[name]
            z1 = normal(mean, generator) / math.sqrt(2)
            drawn[name] = torch.addcmul(mean, std, z1) + torch.tensordot(z2.to(mean.device), deviations, 1)
        return drawn

    def marginal_std(self) -> dict[str, Tensor]:
        """Return the root of the covariance's diagonal, ½ (σ² + Σₖ Dₖ²/(K − 1)), by parameter name."""
        return {
            name: ((std.square() + d.square().sum(0) / (len(d) - 1)) / 2).sqrt()
            for name, std, d in ((name, self.std[name], self.deviations[name]) for name in self.mean)
        }

    def scale(self, tau: float) -> LowRankGaussian:
        """Return the Gaussian with `tau` times the covariance."""
        check_tau(tau)
        std = {name: value * math.sqrt(tau) for name, value in self.std.items()}
        return LowRankGaussian(self.mean, std, {name: d * math.sqrt(tau) for name, d in self.deviations.items()})

    def tensors(self) -> dict[str, Tensor]:
        """Mean, diagonal and deviations, as `mean.`, `std.` and `deviations.<parameter>`."""
        return prefixed("mean", self.mean) | prefixed("std", self.std) | prefixed("deviations", self.deviations)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> LowRankGaussian:
        """Rebuild from `tensors()`."""
        return cls(*(without_prefix(prefix, tensors) for prefix in ("mean", "std", "deviations")))
