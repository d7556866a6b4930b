"""AdamW: the point estimate that every other method is compared with.

The paper's baseline: learning rate 5e-5 with linear decay to zero, no weight decay (its supplement, Hyperparameters).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from varlora.methods.base import AdamWTraining, Trained
from varlora.params import copied
from varlora.posterior import Point

__all__ = ["AdamW"]


@dataclass(frozen=True)
class AdamW(AdamWTraining):
    """Train with AdamW and keep the last iterate.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 1)
        >>> end = Trained(layer, rows=(), draw=None, forward=None)
        >>> AdamW().posterior(end)
        Point(3 weights)

    References:
        Loshchilov and Hutter 2019, Decoupled Weight Decay Regularization.
    """

    name: ClassVar[str] = "adamw"
    title: ClassVar[str] = "AdamW"

    def has_variances(self) -> bool:
        """A point has none."""
        return False

    def posterior(self, trained: Trained) -> Point:
        """Return the last iterate."""
        return Point(copied(trained.model))
