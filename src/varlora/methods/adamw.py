"""AdamW: the point estimate that every other method is compared with.

The paper's baseline: learning rate 5e-5 with linear decay to zero, no weight decay (its supplement, Hyperparameters).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from varlora.params import trainable
from varlora.posterior import Point

__all__ = ["AdamW"]


@dataclass(frozen=True)
class AdamW:
    """Train with AdamW and keep the last iterate.

    References:
        Loshchilov and Hutter 2019, Decoupled Weight Decay Regularization.
    """

    name: ClassVar[str] = "adamw"

    lr: float = 5e-5
    """Learning rate at the first step."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    beta1: float = 0.9
    """Decay of the gradient's average."""
    beta2: float = 0.999
    """Decay of the squared gradient's average."""
    eps: float = 1e-8
    """Added to the root of the squared gradient's average."""

    def optimizer(
        self, params: Mapping[str, nn.Parameter], num_examples: int, batch_size: int, seed: int
    ) -> torch.optim.Optimizer:
        """Return torch's AdamW."""
        return torch.optim.AdamW(
            list(params.items()),
            lr=self.lr,
            weight_decay=self.weight_decay,
            betas=(self.beta1, self.beta2),
            eps=self.eps,
        )

    def after_step(self, params: Mapping[str, nn.Parameter], step: int, total_steps: int) -> None:
        """Watch nothing."""

    def posterior(self, model: nn.Module, optimizer: torch.optim.Optimizer, loader: Iterable[Any]) -> Point:
        """Return the last iterate."""
        return Point({name: p.detach().clone() for name, p in trainable(model).items()})

    def log(self, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        """Log nothing beside the loss."""
        return {}
