"""What training leaves behind: a distribution over the predictors that one base model can become.

Every way of reaching a posterior ends in one of these classes, and prediction knows only the protocol.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from varlora.drawing import Forward
from varlora.errors import DamagedFileError, did_you_mean
from varlora.posterior.base import Posterior
from varlora.posterior.dropout import Dropout
from varlora.posterior.gaussian import DiagonalGaussian
from varlora.posterior.kronecker import KroneckerGaussian
from varlora.posterior.linearised import Linearised
from varlora.posterior.low_rank import LowRankGaussian
from varlora.posterior.mixture import Mixture
from varlora.posterior.point import Point
from varlora.posterior.pruned import Pruned
from varlora.posterior.tempered import Tempered

__all__ = [
    "POSTERIORS",
    "DiagonalGaussian",
    "Dropout",
    "Forward",
    "KroneckerGaussian",
    "Linearised",
    "LowRankGaussian",
    "Mixture",
    "Point",
    "Posterior",
    "Pruned",
    "Tempered",
    "posterior_from_tensors",
]

POSTERIORS: dict[str, Any] = {
    kind.kind: kind
    for kind in (
        Point,
        DiagonalGaussian,
        LowRankGaussian,
        KroneckerGaussian,
        Dropout,
        Linearised,
        Mixture,
        Tempered,
        Pruned,
    )
}
"""Every kind of posterior that a checkpoint can hold, by its name."""


def posterior_from_tensors(kind: str, tensors: Mapping[str, Tensor]) -> Posterior:
    """Rebuild the posterior that a checkpoint holds.

    Args:
        kind: key in `POSTERIORS`.
        tensors: what `tensors()` gave.

    Raises:
        DamagedFileError: the kind is unknown.

    Example:
        >>> import torch
        >>> posterior_from_tensors("point", {"mean.w": torch.zeros(1)}).mean
        {'w': tensor([0.])}
    """
    if kind not in POSTERIORS:
        raise DamagedFileError(
            f"Expected a known kind of posterior, but got {kind!r}. {did_you_mean(kind, POSTERIORS)}"
        )
    return POSTERIORS[kind].from_tensors(tensors)
