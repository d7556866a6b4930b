"""What training leaves behind: a distribution over the predictors that one base model can become.

Every way of reaching a posterior ends in one of these classes, and prediction knows only the protocol.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
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
DRAWN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""The types of numbers that torch makes noise of."""


def posterior_from_tensors(kind: str, tensors: Mapping[str, Tensor]) -> Posterior:
    """Rebuild the posterior that a checkpoint holds.

    Args:
        kind: key in `POSTERIORS`.
        tensors: what `tensors()` gave.

    Raises:
        DamagedFileError: the kind is unknown, or the tensors' types are none that can be drawn from.

    Example:
        >>> import torch
        >>> posterior_from_tensors("point", {"mean.w": torch.zeros(1)}).mean
        {'w': tensor([0.])}
    """
    if kind not in POSTERIORS:
        raise DamagedFileError(
            f"Expected a known kind of posterior, but got {kind!r}. {did_you_mean(kind, POSTERIORS)}"
        )
    for name, value in tensors.items():
        bits_or_within = kind == Pruned.kind or "/" in name  # posteriors within this one come here by themselves
        if not bits_or_within and value.dtype not in DRAWN:
            raise DamagedFileError(
                f"Expected a posterior's numbers to be floating-point, but `{name}` is {value.dtype}. Train again."
            )
    return POSTERIORS[kind].from_tensors(tensors)
