"""MC dropout: the adapter that AdamW trains with dropout, with the dropout left on at prediction.

While training, LoRA's dropout drops inputs of A at random; a network trained so is a draw from a variational posterior
over A (Gal and Ghahramani 2016). S draws are S masks, each over the inputs of every A and the same for all rows and
tokens, so that a draw is one model, `A diag(z)/(1 − p)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from varlora.adapter import check_no_dora, dropout_rates
from varlora.methods.base import AdamWTraining, Plan, Trained
from varlora.params import copied
from varlora.posterior import Dropout

__all__ = ["McDropout"]


@dataclass(frozen=True)
class McDropout(AdamWTraining):
    """Train with AdamW and predict with the adapter's dropout on.

    Example:
        >>> from varlora import demo
        >>> model = demo.load().model
        >>> posterior = McDropout().posterior(Trained(model, rows=(), draw=None, forward=None))
        >>> {rate.item() for rate in posterior.rate.values()}
        {0.1}

    References:
        Gal and Ghahramani 2016, Dropout as a Bayesian Approximation: Representing Model Uncertainty in Deep Learning.
    """

    name: ClassVar[str] = "mc_dropout"
    title: ClassVar[str] = "MC dropout"
    concludes_from: ClassVar[tuple[str, ...]] = ("adamw",)

    def problems(self, plan: Plan) -> list[str]:
        """Without dropout all draws would be the mean."""
        if plan.dropout > 0:
            return []
        return [
            "Expected an adapter that is trained with dropout, but its rate is 0. Train with `lora.dropout`, 0.1 say."
        ]

    def check_model(self, model: nn.Module) -> None:
        """DoRA's dropout is not that of A's columns: it drops the frozen weights' inputs too, and keeps A's norm."""
        super().check_model(model)
        check_no_dora(model)

    def has_variances(self) -> bool:
        """A mask's noise is the same share of every weight: it tells no two of them apart."""
        return False

    def posterior(self, trained: Trained) -> Dropout:
        """Return the last iterate with the dropout rates of the adapter."""
        mean = copied(trained.model)
        rates = {name: torch.tensor(rate, dtype=torch.float64) for name, rate in dropout_rates(trained.model).items()}
        return Dropout(mean, {name: rates[name].to(mean[name].device) for name in rates})
