"""When to abstain: the confidence below which a question is better left to somebody else.

Of a risk r, the share of the answers given that may be wrong, a threshold t is made: a question whose most probable
answer has a probability below t is abstained from. With held-out rows that were predicted as the service predicts,
t is the lowest confidence such that of the held-out rows at or above it at most the share r is wrong (Geifman and
El-Yaniv 2017, without their margin for chance). Without, the expected error 1 - p of each answer is compared with r.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from varlora.errors import VarloraError
from varlora.metrics import by_row

__all__ = ["Threshold", "check_risk", "of_expected_error", "of_held_out"]


@dataclass(frozen=True)
class Threshold:
    """From which confidence on questions are answered."""

    risk: float
    """The share of the answers given that may be wrong."""
    confidence: float | None
    """The lowest that is answered; None: no confidence is enough."""
    rows: int = 0
    """Held-out rows that it was chosen on; 0: it is 1 - risk."""

    def abstains(self, confidence: float) -> bool:
        """Whether an answer of this probability is better not given."""
        return self.confidence is None or confidence < self.confidence


def check_risk(risk: float) -> float:
    """Return a risk, or raise if it is none."""
    if not 0 <= risk <= 1:
        raise VarloraError(f"Expected `risk` to be a share of wrong answers within 0 and 1, but got {risk}.")
    return risk


def of_expected_error(risk: float) -> Threshold:
    """Return the threshold that compares the expected error of each answer with the risk.

    Example:
        >>> of_expected_error(0.25).abstains(0.7)
        True
    """
    return Threshold(check_risk(risk), 1 - risk)


def of_held_out(probs: Tensor, labels: Tensor, risk: float) -> Threshold:
    """Return the threshold of the largest coverage whose error on held-out rows is at most the risk.

    Args:
        probs: (N, C), rows sum to 1.
        labels: (N,), all known.
        risk: share of the answers given that may be wrong.

    Example:
        >>> probs = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4]], dtype=torch.float64)
        >>> of_held_out(probs, torch.tensor([0, 0, 1]), risk=0.1).confidence
        0.8
        >>> of_held_out(probs, torch.tensor([0, 0, 1]), risk=0.5).confidence
        0.6

    References:
        Geifman and El-Yaniv, Selective classification for deep neural networks, 2017.
    """
    check_risk(risk)
    rows = by_row(probs.double(), labels)
    confidence, order = rows.confidence.sort(descending=True)
    wrong = (~rows.right[order]).double().cumsum(dim=0)
    last = torch.cat([confidence[1:] < confidence[:-1], torch.tensor([True])])  # of rows that are equally sure
    k = torch.arange(1, len(confidence) + 1, dtype=torch.float64)
    enough = (last & (wrong <= risk * k + 1e-9)).nonzero()
    lowest = confidence[enough[-1, 0]].item() if len(enough) else None
    return Threshold(risk, lowest, len(confidence))
