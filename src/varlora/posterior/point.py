"""A point: what an optimizer without a posterior ends with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from varlora.drawing import Source
from varlora.posterior.base import WeightPosterior, check_tau, prefixed, without_prefix

__all__ = ["Point"]


@dataclass(frozen=True, repr=False)
class Point(WeightPosterior):
    """All mass on one value of the weights: what AdamW ends with. Every draw is the mean.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(1, 1, bias=False)
        >>> with Point({"weight": torch.tensor([[2.0]])}).at_mean(layer):
        ...     layer(torch.tensor([3.0])).item()
        6.0
    """

    kind: ClassVar[str] = "point"

    mean: Mapping[str, Tensor]
    """The weights by parameter name."""

    @property
    def varies(self) -> bool:
        """Draws of a point are all the same."""
        return False

    def draw(self, generator: Source) -> dict[str, Tensor]:
        """Return the mean, whatever the generator."""
        return dict(self.mean)

    def scale(self, tau: float) -> Point:
        """A point has no variance to scale."""
        check_tau(tau)
        return self

    def tensors(self) -> dict[str, Tensor]:
        """The mean, as `mean.<parameter>`."""
        return prefixed("mean", self.mean)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Point:
        """Rebuild from `tensors()`."""
        return cls(without_prefix("mean", tensors))
