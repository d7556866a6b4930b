"""The protocol of a posterior: a distribution over the predictors that one base model can become."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from varlora.errors import VarloraError
from varlora.params import swapped

__all__ = [
    "Forward",
    "Gaussian",
    "Posterior",
    "WeightPosterior",
    "check_draws",
    "check_tau",
    "draw_logits_by_loop",
    "normal",
    "pack",
    "prefixed",
    "unpack",
    "without_prefix",
]

Forward = Callable[[nn.Module, Any], Tensor]
"""`forward(model, batch) -> (B, C)`: the class logits of one model, differentiable."""


@runtime_checkable
class Posterior(Protocol):
    """A distribution over the predictors that one base model can become."""

    kind: ClassVar[str]
    """Key in `POSTERIORS`; a checkpoint stores it."""

    def sampled(self, model: nn.Module, generator: torch.Generator) -> AbstractContextManager[None]:
        """Within the context `model` is one draw; after it, bit for bit what it was."""
        ...

    def at_mean(self, model: nn.Module) -> AbstractContextManager[None]:
        """Within the context `model` is the posterior's single best point; after it, bit for bit what it was."""
        ...

    def draw_logits(self, model: nn.Module, batch: Any, n: int, generator: torch.Generator, forward: Forward) -> Tensor:
        """Class logits of `n` draws, (S, B, C); with `n = 0` at the mean, S = 1.

        S is `n`, but one where all draws are the same, and more where more cost nothing.
        """
        ...

    def scale(self, tau: float) -> Posterior:
        """The same posterior with `tau` times the variance (the paper's Table 2); 0 is the mean."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint stores, keyed by parameter name."""
        ...

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Posterior:
        """Rebuild from `tensors()`."""
        ...


class WeightPosterior(Posterior, Protocol):
    """A distribution over the weights: whoever has `mean` and `draw` needs no more to be drawn from.

    Its classes are frozen dataclasses with `mean` as their first field that name this class as their base.
    """

    mean: Mapping[str, Tensor]
    """The weights' mean by parameter name."""

    def draw(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Return one draw of the weights by parameter name."""
        ...

    def sampled(self, model: nn.Module, generator: torch.Generator) -> AbstractContextManager[None]:
        """Within the context `model` is one draw; after it, bit for bit what it was."""
        return swapped(model, self.draw(generator))

    def at_mean(self, model: nn.Module) -> AbstractContextManager[None]:
        """Within the context `model` is at the mean; after it, bit for bit what it was."""
        return swapped(model, self.mean)

    def draw_logits(self, model: nn.Module, batch: Any, n: int, generator: torch.Generator, forward: Forward) -> Tensor:
        """Class logits of `n` draws, (S, B, C); with `n = 0` at the mean, S = 1."""
        return draw_logits_by_loop(self, model, batch, n, generator, forward)


class Gaussian(Posterior, Protocol):
    """A Gaussian over the weights that knows the covariance of linear functions of them."""

    @property
    def mean(self) -> Mapping[str, Tensor]:
        """The weights' mean by parameter name."""
        ...

    def scale(self, tau: float) -> Gaussian:
        """The same Gaussian with `tau` times the covariance."""
        ...

    def quadratic(self, name: str, gradients: Tensor) -> Tensor:
        """Return the covariance that one parameter gives to linear functions of it.

        Args:
            name: the parameter.
            gradients: (B, C, *shape): C functions for each of B rows.

        Returns:
            (B, C, C), float64.
        """
        ...


def draw_logits_by_loop(
    posterior: Posterior, model: nn.Module, batch: Any, n: int, generator: torch.Generator, forward: Forward
) -> Tensor:
    """Draw `n` models one after the other and run each on the batch: right for every posterior that has weights.

    Args:
        posterior: what to draw from.
        model: the model whose parameters the draws replace.
        batch: what `forward` takes.
        n: draws; 0 means one pass at the mean.
        generator: source of the draws; the same state gives the same models.
        forward: `forward(model, batch) -> (B, C)`.

    Returns:
        Logits, (S, B, C) with S = max(n, 1).
    """
    check_draws(n)
    if n == 0:
        with posterior.at_mean(model):
            return forward(model, batch)[None]  # (B, C) -> (1, B, C)
    logits = []
    for _ in range(n):
        with posterior.sampled(model, generator):
            logits.append(forward(model, batch))
    return torch.stack(logits)


def normal(like: Tensor, generator: torch.Generator, *size: int) -> Tensor:
    """Return standard normal noise of the type and device of `like`, of its shape or of `size`."""
    noise = torch.empty(size or like.shape, dtype=like.dtype, device=generator.device)
    return noise.normal_(generator=generator).to(like.device)


def prefixed(prefix: str, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the values under `<prefix>.<name>`."""
    return {f"{prefix}.{name}": value for name, value in values.items()}


def without_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what `prefixed` was given."""
    start = f"{prefix}."
    return {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}


def pack(posteriors: Sequence[Posterior]) -> dict[str, Tensor]:
    """Return the tensors of posteriors within a posterior, as `<index>/<kind>/<tensor>`."""
    return {
        f"{index}/{posterior.kind}/{name}": value
        for index, posterior in enumerate(posteriors)
        for name, value in posterior.tensors().items()
    }


def unpack(tensors: Mapping[str, Tensor]) -> list[Posterior]:
    """Rebuild what `pack` was given; names without an index are ignored."""
    from varlora.posterior import posterior_from_tensors

    parts: dict[tuple[int, str], dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, slash, rest = key.partition("/")
        if slash:
            kind, _, name = rest.partition("/")
            parts.setdefault((int(index), kind), {})[name] = value
    return [posterior_from_tensors(kind, parts[index, kind]) for index, kind in sorted(parts)]


def check_draws(n: int) -> None:
    """Raise if `n` is no number of draws."""
    if n < 0:
        raise VarloraError(f"Expected `n` to be a number of draws >= 0, but got {n}. Pass 0 for the mean.")


def check_tau(tau: float) -> None:
    """Raise if `tau` is no factor of a variance."""
    if not (math.isfinite(tau) and tau >= 0):
        raise VarloraError(f"Expected `tau` to be a factor >= 0 of the posterior variance, but got {tau}. 1 keeps it.")


def check_fits(mean: Mapping[str, Tensor], what: str, shapes: Mapping[str, Sequence[int]], values: Any) -> None:
    """Raise unless a field has the mean's names, and for each the shape that it is to have."""
    differ = set(mean) ^ set(values)
    differ |= {name for name in set(mean) & set(values) if tuple(values[name].shape) != tuple(shapes[name])}
    if differ:
        raise VarloraError(
            f"Expected `mean` and `{what}` to have the same names and shapes, but `{min(differ)}` differs. "
            "Pass both from the same model."
        )
