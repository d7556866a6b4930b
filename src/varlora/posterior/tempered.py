"""Temperature scaling as a posterior: any other one, with its logits divided by one number."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from varlora.drawing import PLAIN, Draw, Drawing, Drawn, Forward
from varlora.errors import VarloraError
from varlora.posterior.base import Posterior, pack, unpack

__all__ = ["Tempered"]


@dataclass(frozen=True)
class Tempered:
    """A posterior whose class logits are divided by a temperature T; T > 1 is less sure.

    The weights are the inner posterior's: the temperature acts on logits alone. The mean has a temperature of its own,
    because averaging draws makes them less sure already.

    References:
        Guo et al. 2017, On Calibration of Modern Neural Networks, section 4.2.
    """

    kind: ClassVar[str] = "tempered"

    inner: Posterior
    """The posterior whose logits are divided."""
    temperature: float
    """T of the draws, > 0."""
    temperature_mean: float
    """T at the mean, > 0."""

    def __post_init__(self) -> None:
        for name in ("temperature", "temperature_mean"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise VarloraError(f"Expected `{name}` to be a number > 0, but got {value}. 1 changes nothing.")

    @property
    def members(self) -> tuple[Posterior, ...]:
        """The inner posterior, as a mixture has its members."""
        return (self.inner,)

    def sampled(self, model: nn.Module, generator: torch.Generator) -> AbstractContextManager[None]:
        """Within the context `model` is a draw of the inner posterior."""
        return self.inner.sampled(model, generator)

    def at_mean(self, model: nn.Module) -> AbstractContextManager[None]:
        """Within the context `model` is at the inner posterior's mean."""
        return self.inner.at_mean(model)

    def draw_logits(self, model: nn.Module, batch: Any, n: int, generator: torch.Generator, forward: Forward) -> Tensor:
        """The inner posterior's logits divided by the temperature, (S, B, C)."""
        if n:
            return self.drawn(n, generator).logits(model, batch, forward)
        return self.inner.draw_logits(model, batch, 0, generator, forward) / self.temperature_mean

    def drawn(self, n: int, generator: torch.Generator, how: Drawing = PLAIN) -> Drawn:
        """The inner posterior's draws, whose logits are divided by the temperature."""
        return _TemperedDraws(self.inner.drawn(n, generator, how), self.temperature)

    def scale(self, tau: float) -> Tempered:
        """Scale the inner posterior's variance; the temperatures stay."""
        return Tempered(self.inner.scale(tau), self.temperature, self.temperature_mean)

    def prune(self, fraction: float, by: str = "snr", generator: torch.Generator | None = None) -> Tempered:
        """Prune the inner posterior; the temperatures stay."""
        return Tempered(self.inner.prune(fraction, by, generator), self.temperature, self.temperature_mean)

    def tensors(self) -> dict[str, Tensor]:
        """The inner posterior's tensors as `0/<kind>/<tensor>`, and `temperature`: of the draws and at the mean."""
        temperatures = torch.tensor([self.temperature, self.temperature_mean], dtype=torch.float64)
        return pack([self.inner]) | {"temperature": temperatures}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Tempered:
        """Rebuild from `tensors()`."""
        (inner,) = unpack(tensors)
        return cls(inner, *tensors["temperature"].tolist())


@dataclass(frozen=True)
class _TemperedDraws:
    """Draws whose logits are divided by a temperature."""

    inner: Drawn
    temperature: float

    @property
    def how(self) -> Drawing:
        """How the inner draws were made."""
        return self.inner.how

    @property
    def passes(self) -> int:
        """Rows that went through a model so far, counted once a draw."""
        return self.inner.passes

    def logits(self, model: nn.Module, batch: Any, forward: Forward) -> Tensor:
        """Class logits of each draw, (S, B, C); whether rows may stop early is judged by these."""
        if self.how.tolerance is None:
            return self.inner.logits(model, batch, forward) / self.temperature

        @functools.wraps(forward)
        def divided(model: nn.Module, batch: Any) -> Tensor:
            return forward(model, batch) / self.temperature

        return self.inner.logits(model, batch, divided)

    def models(self) -> list[Draw]:
        """The inner posterior's draws, with the temperature."""
        return [draw._replace(temperature=draw.temperature * self.temperature) for draw in self.inner.models()]
