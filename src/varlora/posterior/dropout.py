"""Dropout as a posterior: a draw keeps a random part of each adapter's inputs (Gal and Ghahramani 2016)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from varlora.drawing import Source, uniform
from varlora.errors import VarloraError
from varlora.posterior.base import WeightPosterior, check_tau, prefixed, without_prefix

__all__ = ["Dropout"]


@dataclass(frozen=True, repr=False)
class Dropout(WeightPosterior):
    r"""Bernoulli masks over the inputs of some weight matrices: `W diag(z)/(1 − p)` with z ~ Bernoulli(1 − p).

    A mask belongs to a draw, not to a token: dropping an input of a linear layer is dropping a column of its weights,
    so a draw is one model, the same for every row, which `nn.Dropout` in training mode is not.

    Example:
        >>> from torch import nn
        >>> layer = nn.Linear(4, 1, bias=False)
        >>> posterior = Dropout({"weight": torch.ones(1, 4)}, {"weight": torch.tensor(0.5)})
        >>> with posterior.sampled(layer, torch.Generator().manual_seed(0)):
        ...     layer.weight.tolist()
        [[0.0, 2.0, 0.0, 0.0]]

    References:
        Gal and Ghahramani 2016, Dropout as a Bayesian Approximation, equation 2 (a mask over the rows of a weight).
    """

    kind: ClassVar[str] = "dropout"
    symmetric: ClassVar[bool] = False

    mean: Mapping[str, Tensor]
    """The weights by parameter name."""
    rate: Mapping[str, Tensor]
    """p by name of those weights, (out, in), whose inputs are dropped; tensors without dimensions."""
    tau: float = 1.0
    """Factor of the variance of z/(1 − p)."""

    def __post_init__(self) -> None:
        check_tau(self.tau)
        for name, rate in self.rate.items():
            if name not in self.mean or self.mean[name].dim() != 2:
                raise VarloraError(f"Expected `rate` to name weight matrices of `mean`, but got `{name}`.")
            if rate.dim() or not 0 <= rate.item() < 1:
                raise VarloraError(
                    f"Expected `rate` of `{name}` to be a share within 0 and 1, but got {rate.tolist()}."
                )

    def draw(self, generator: Source) -> dict[str, Tensor]:
        """Return one draw of the weights by parameter name."""
        drawn = dict(self.mean)
        for name in sorted(self.rate):
            weight, rate = self.mean[name], self.rate[name].item()
            kept = (uniform(generator, weight.shape[1]).to(weight.device) >= rate).float() / (1 - rate)  # (in,)
            drawn[name] = weight * (1 + math.sqrt(self.tau) * (kept - 1))
        return drawn

    def scale(self, tau: float) -> Dropout:
        """Return the masks with `tau` times the variance around 1; 0 is no dropout."""
        check_tau(tau)
        return Dropout(self.mean, self.rate, self.tau * tau)

    def tensors(self) -> dict[str, Tensor]:
        """The weights as `mean.<parameter>`, the rates as `rate.<parameter>`, and `tau`."""
        tau = torch.tensor(self.tau, dtype=torch.float64)
        return prefixed("mean", self.mean) | prefixed("rate", self.rate) | {"tau": tau}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Dropout:
        """Rebuild from `tensors()`."""
        return cls(without_prefix("mean", tensors), without_prefix("rate", tensors), tensors["tau"].item())
