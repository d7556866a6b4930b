"""A point: what an optimizer without a posterior ends with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from varlora.posterior.base import (
    Forward,
    WeightPosterior,
    check_draws,
    check_tau,
    draw_logits_by_loop,
    prefixed,
    without_prefix,
)

__all__ = ["Point"]


@dataclass(frozen=True)
class Point(WeightPosterior):
    """All mass on one value of the weights: what AdamW ends with. Every draw is the mean.

    Example:
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> with Point({"weight": torch.tensor([[2.0]])}).at_mean(layer):
        ...     layer(torch.tensor([3.0])).item()
        6.0
    """

    kind: ClassVar[str] = "point"

    mean: Mapping[str, Tensor]
    """The weights by parameter name."""

    def draw(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Return the mean, whatever the generator."""
        return dict(self.mean)

    def draw_logits(self, model: nn.Module, batch: Any, n: int, generator: torch.Generator, forward: Forward) -> Tensor:
        """Class logits at the mean, (1, B, C) whatever `n`: draws of a point are all the same."""
        check_draws(n)
        return draw_logits_by_loop(self, model, batch, 0, generator, forward)

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
