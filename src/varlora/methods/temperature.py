"""Temperature scaling on the held-out rows, of any method's posterior (Guo et al. 2017).

Logits are divided by the temperature T that minimises the NLL of the calibration split, `−log mean_s softmax(z_s/T)`.
Either this trains the method and then fits T, or it fits T for a finished run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from varlora.methods.base import Plan, Trained, Wrapping
from varlora.posterior import Tempered
from varlora.temperature import fit_temperature

__all__ = ["Temperature"]


@dataclass(frozen=True)
class Temperature(Wrapping):
    """Divide the logits of any method by a temperature that is fitted on held-out rows.

    Example:
        >>> import torch
        >>> from varlora.posterior import Point
        >>> def draw(posterior, rows, n):  # 98 % sure of the first answer, right in three of four
        ...     return torch.tensor([[[4.0, 0.0]] * 4]), torch.tensor([0, 0, 0, 1])
        >>> end = Trained(None, rows=(), draw=draw, forward=None, sources=[Point({})], say=lambda words: None)
        >>> round(Temperature().posterior(end).temperature, 3)  # 4/ln 3: 75 % sure
        3.641

    References:
        Guo et al. 2017, On Calibration of Modern Neural Networks, section 4.2.
    """

    name: ClassVar[str] = "temperature"
    title: ClassVar[str] = "Temperature"
    samples: int = 10
    """Draws at which T is fitted; the mean has a temperature of its own."""

    def problems(self, plan: Plan) -> list[str]:
        """T is chosen on rows that were not trained on."""
        found = super().problems(plan)
        if not plan.calibration:
            found.append(
                "Expected rows that are held out for the temperature, but there are none. "
                "Train with `calibration_fraction`, e.g. 0.1 (an ensemble: of runs that hold out the same rows)."
            )
        if self.samples < 1:
            found.append(
                f"Expected `samples` to be a number of draws >= 1, but got {self.samples}. "
                f"Set e.g. `method.samples={Temperature.samples}`."
            )
        return found

    def posterior(self, trained: Trained) -> Tempered:
        """Return the method's posterior, or the finished run's, with the temperatures of the held-out rows."""
        inner = trained.sources[0] if trained.sources else self.inner().posterior(trained)
        draws, mean = (
            fit_temperature(*trained.draw(inner, trained.calibration, n), trained.say) for n in (self.samples, 0)
        )
        trained.say(f"The temperature of the draws is {draws:.3f}, at the mean {mean:.3f}.")
        return Tempered(inner, draws, mean)
