"""Pruning at test time: the weights that the posterior is least sure not to be zero are exactly 0.

A weight's signal-to-noise ratio is |m|/√v; the share of all weights with the lowest ratios loses both its mean and its
variance. Magnitude |m| and chance are the controls. Either this trains the method and then prunes, or it prunes a
finished run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from varlora.methods.base import Plan, Trained, Wrapping
from varlora.posterior import Posterior

__all__ = ["Pruned"]


@dataclass(frozen=True)
class Pruned(Wrapping):
    """Set the weights of any method that have the least signal for their noise to zero.

    Example:
        >>> import torch
        >>> from varlora.posterior import DiagonalGaussian
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> source = DiagonalGaussian({"weight": torch.tensor([[2.0, 1.0]])}, {"weight": torch.tensor([[1.0, 0.1]])})
        >>> end = Trained(layer, rows=(), draw=None, forward=None, sources=[source])
        >>> Pruned(fraction=0.5).posterior(end).mean["weight"]
        tensor([[0., 1.]])

    References:
        the follow-up of the paper (arXiv:2506.14280), pruning at test time.
    """

    name: ClassVar[str] = "pruned"
    title: ClassVar[str] = "Pruned"

    of: str = "ivon"
    """The other method: a key of METHODS."""
    fraction: float = 0.1
    """Share of all the adapter's weights that is pruned."""
    by: Literal["snr", "magnitude", "random"] = "snr"
    """What the lowest are pruned by: |m|/√v, |m| or chance."""

    def problems(self, plan: Plan) -> list[str]:
        """The share is one, and the method has variances to prune by."""
        found = super().problems(plan)
        if found:
            return found
        if not 0 <= self.fraction <= 1 or math.isnan(self.fraction):
            found.append(
                f"Expected `fraction` to be a share within 0 and 1, but got {self.fraction}. "
                f"Set e.g. `method.fraction={Pruned.fraction}`."
            )
        if self.by == "snr" and not self.inner().has_variances():
            found.append(
                f"Expected a method with a variance for each weight to prune by `snr`, but `{self.of}` has none. "
                "Set `by` to magnitude, or take a method such as ivon or swag."
            )
        return found

    def posterior(self, trained: Trained) -> Posterior:
        """Return the method's posterior, or the finished run's, pruned."""
        inner = trained.sources[0] if trained.sources else self.inner().posterior(trained)
        return inner.prune(self.fraction, self.by, trained.generator())
