"""The protocol of a method: how to reach a posterior."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Protocol

import torch
from torch import nn

from varlora.posterior import Posterior

__all__ = ["Method"]


class Method(Protocol):
    """How to reach a posterior: which optimizer, what to watch, what to conclude.

    A method is a frozen dataclass of its settings, one file, and one entry in `METHODS`.
    """

    name: ClassVar[str]
    """Key in `METHODS`, and what reports call it."""

    def optimizer(
        self, params: Mapping[str, nn.Parameter], num_examples: int, batch_size: int, seed: int
    ) -> torch.optim.Optimizer:
        """Make the optimizer.

        Args:
            params: the trainable parameters by name.
            num_examples: rows of the training set.
            batch_size: rows that one step's gradient averages over.
            seed: seed of whatever the optimizer draws.
        """
        ...

    def after_step(self, params: Mapping[str, nn.Parameter], step: int, total_steps: int) -> None:
        """Look at the parameters after step `step` (from 1) of `total_steps`."""
        ...

    def posterior(self, model: nn.Module, optimizer: torch.optim.Optimizer, loader: Iterable[Any]) -> Posterior:
        """Conclude: the posterior after training.

        Args:
            model: the trained model.
            optimizer: what `optimizer` returned, after its last step.
            loader: batches of the training rows, for methods that need a pass over them.
        """
        ...

    def log(self, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        """What to log beside the loss, by name; empty for most."""
        ...
