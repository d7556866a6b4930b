"""A Gaussian with a variance for each weight: IVON's posterior, and others'."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from varlora.drawing import Source, normal
from varlora.posterior.base import WeightPosterior, check_fits, check_tau, prefixed, without_prefix

__all__ = ["DiagonalGaussian"]


@dataclass(frozen=True, repr=False)
class DiagonalGaussian(WeightPosterior):
    r"""A Gaussian with a mean and a variance for each weight, `q(θ) = N(m, diag(v))` (the paper, section 2).

    Draws go through the parameters in the order of their names, so they depend on the generator alone.

    Raises:
        VarloraError: `mean` and `std` differ in names or shapes.

    Example:
        >>> from torch import nn
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> posterior = DiagonalGaussian({"weight": torch.tensor([[2.0]])}, {"weight": torch.tensor([[0.5]])})
        >>> with posterior.sampled(layer, torch.Generator().manual_seed(0)):
        ...     drawn = layer.weight.item()
        >>> drawn != 2.0
        True
        >>> posterior.scale(4.0).std["weight"].item()
        1.0

    References:
        Cong et al. 2024, Variational Low-Rank Adaptation Using IVON (arXiv:2411.04421), section 2.
    """

    kind: ClassVar[str] = "diagonal_gaussian"
    entrywise: ClassVar[tuple[str, ...]] = ("mean", "std")

    mean: Mapping[str, Tensor]
    """m by parameter name, float32 (or wider) whatever the parameter's type."""
    std: Mapping[str, Tensor]
    """σ = √v by parameter name, of the mean's shape and type."""

    def __post_init__(self) -> None:
        check_fits(self.mean, "std", {name: value.shape for name, value in self.mean.items()}, self.std)

    def draw(self, generator: Source) -> dict[str, Tensor]:
        """Return one draw of the weights, m + σε with ε ~ N(0, I), by parameter name."""
        drawn = {}
        for name in sorted(self.mean):
            mean, std = self.mean[name], self.std[name]
            drawn[name] = torch.addcmul(mean, std, normal(mean, generator))
        return drawn

    def scale(self, tau: float) -> DiagonalGaussian:
        """Return N(m, τv): the trade between accuracy (small τ) and calibration (large τ) of the paper's Table 2.

        Args:
            tau: factor of the variance, >= 0.

        Raises:
            VarloraError: `tau` is negative or not finite.
        """
        check_tau(tau)
        return DiagonalGaussian(self.mean, {name: std * math.sqrt(tau) for name, std in self.std.items()})

    def marginal_std(self) -> Mapping[str, Tensor]:
        """Return σ."""
        return self.std

    def quadratic(self, name: str, gradients: Tensor) -> Tensor:
        """Return the covariance that one parameter gives to linear functions of it, (B, C, C) float64."""
        scaled = (gradients * self.std[name]).flatten(2).double()
        return scaled @ scaled.mT

    def tensors(self) -> dict[str, Tensor]:
        """Mean and standard deviation, as `mean.<parameter>` and `std.<parameter>`."""
        return prefixed("mean", self.mean) | prefixed("std", self.std)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> DiagonalGaussian:
        """Rebuild from `tensors()`."""
        return cls(without_prefix("mean", tensors), without_prefix("std", tensors))
