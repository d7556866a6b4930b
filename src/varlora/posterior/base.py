"""The protocol of a posterior: a distribution over the predictors that one base model can become."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from varlora.drawing import PLAIN, Drawing, Drawn, Forward, Latin, Source
from varlora.errors import VarloraError
from varlora.params import flat, swapped
from varlora.stack import Stack

__all__ = [
    "CRITERIA",
    "MOST_DRAWS",
    "Forward",
    "Gaussian",
    "Posterior",
    "WeightPosterior",
    "check_draws",
    "check_tau",
    "kept_by",
    "pack",
    "prefixed",
    "unpack",
    "without_prefix",
]

CRITERIA = ("snr", "magnitude", "random")
"""What weights can be pruned by: the signal-to-noise ratio |m|/√v, and two controls."""


@runtime_checkable
class Posterior(Protocol):
    """A distribution over the predictors that one base model can become.

    Example:
        >>> from varlora.posterior import Point
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> posterior: Posterior = Point({"weight": torch.tensor([[2.0]])})
        >>> with posterior.sampled(layer, torch.Generator().manual_seed(0)):
        ...     layer.weight.item()
        2.0
    """

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

        S is `n`, but one where all draws are the same, and more where more cost nothing or members take equal parts.
        """
        ...

    def drawn(self, n: int, generator: torch.Generator, how: Drawing = PLAIN) -> Drawn:
        """The posterior with `n` >= 1 draws made, to be run on any number of batches; S as in `draw_logits`."""
        ...

    def scale(self, tau: float) -> Posterior:
        """The same posterior with `tau` times the variance (the paper's Table 2); 0 is the mean."""
        ...

    def prune(self, fraction: float, by: str = "snr", generator: torch.Generator | None = None) -> Posterior:
        """The same posterior with a share of all weights, 0 to 1, exactly 0; those lowest by one of `CRITERIA`."""
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

    entrywise: ClassVar[tuple[str, ...]] = ("mean",)
    """The fields that hold numbers for each weight, as their last dimensions."""
    symmetric: ClassVar[bool] = True
    """Whether a draw mirrored at the mean is as probable as the draw."""

    mean: Mapping[str, Tensor]
    """The weights' mean by parameter name."""

    def __repr__(self) -> str:
        """Say how many weights it is over, and not what they are: they may be millions."""
        return f"{type(self).__name__}({sum(value.numel() for value in self.mean.values()):,} weights)"

    @property
    def varies(self) -> bool:
        """Whether draws differ from one another."""
        return True

    def draw(self, generator: Source) -> dict[str, Tensor]:
        """Return one draw of the weights by parameter name."""
        ...

    def marginal_std(self) -> Mapping[str, Tensor]:
        """Return the standard deviation √v of each weight by parameter name.

        Raises:
            VarloraError: the weights have no variances of their own.
        """
        raise VarloraError(
            f"Expected a posterior with a variance for each weight, but a {self.kind} has none of its own. "
            "Prune it by magnitude, or take a method that has variances, such as ivon or swag."
        )

    def prune(self, fraction: float, by: str = "snr", generator: torch.Generator | None = None) -> Posterior:
        """Return the posterior with a share of all weights set to exactly 0, without variance.

        Args:
            fraction: share of all weights, 0 to 1.
            by: what the lowest are pruned by: `snr`, the signal-to-noise ratio |m|/√v; `magnitude`, |m|; `random`.
            generator: source of the order at random; left out: seed 0.

        Raises:
            VarloraError: `fraction` or `by` is none, or `by` needs variances and there are none.

        References:
            the follow-up of the paper (arXiv:2506.14280), pruning at test time by |m|/√v.
        """
        from varlora.posterior import Pruned

        return Pruned(self, kept_by(self, fraction, by, generator))

    def sampled(self, model: nn.Module, generator: torch.Generator) -> AbstractContextManager[None]:
        """Within the context `model` is one draw; after it, bit for bit what it was."""
        return swapped(model, self.draw(generator))

    def at_mean(self, model: nn.Module) -> AbstractContextManager[None]:
        """Within the context `model` is at the mean; after it, bit for bit what it was."""
        return swapped(model, self.mean)

    def draw_logits(self, model: nn.Module, batch: Any, n: int, generator: torch.Generator, forward: Forward) -> Tensor:
        """Class logits of `n` draws, (S, B, C); with `n = 0` at the mean, S = 1."""
        check_draws(n)
        if n == 0:
            with self.at_mean(model):
                return forward(model, batch)[None]  # (B, C) -> (1, B, C)
        return self.drawn(n, generator).logits(model, batch, forward)

    def drawn(self, n: int, generator: torch.Generator, how: Drawing = PLAIN) -> Stack:
        """Return `n` draws as fixed models, or one where all draws are the same.

        Raises:
            VarloraError: `n` is below 1; or `how` asks for antithetic draws of what is not symmetric around its mean.
        """
        check_draws(n, 1)
        if how.noise == "antithetic" and not self.symmetric:
            raise VarloraError(
                f"Expected a posterior that is symmetric around its mean for antithetic draws, but a {self.kind} is "
                'not. Take `noise="latin"` or independent draws.'
            )
        source = Latin(generator, n) if how.noise == "latin" else None
        draws: list[dict[str, Tensor]] = []
        for index in range(n if self.varies else 1):
            if how.noise == "antithetic" and index % 2:
                draws.append({name: 2 * self.mean[name] - value for name, value in draws[-1].items()})
            else:
                draws.append(self.draw(source.begin(index) if source else generator))
        return Stack(draws, mean=self.mean, how=how)


class Gaussian(Posterior, Protocol):
    """A Gaussian over the weights that knows the covariance of linear functions of them."""

    @property
    def mean(self) -> Mapping[str, Tensor]:
        """The weights' mean by parameter name."""
        ...

    def drawn(self, n: int, generator: torch.Generator, how: Drawing = PLAIN) -> Drawn:
        """See `Posterior`."""
        ...

    def scale(self, tau: float) -> Gaussian:
        """The same Gaussian with `tau` times the covariance."""
        ...

    def marginal_std(self) -> Mapping[str, Tensor]:
        """The standard deviation of each weight by parameter name."""
        ...

    def prune(self, fraction: float, by: str = "snr", generator: torch.Generator | None = None) -> Posterior:
        """The same Gaussian with a share of the weights set to 0; see `WeightPosterior.prune`."""
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


def kept_by(
    posterior: WeightPosterior,
    fraction: float,
    by: str,
    generator: torch.Generator | None,
    before: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return which weights stay when a share of all is pruned, the lowest first.

    Args:
        posterior: what is pruned.
        fraction: share of all weights, 0 to 1.
        by: `snr`, the signal-to-noise ratio |m|/√v, and where that is infinite, |m|; `magnitude`, |m|; `random`.
        generator: source of the order at random.
        before: which weights were kept when it was pruned before, if it was; the others count, and stay pruned.

    Raises:
        VarloraError: `fraction` or `by` is none, or the posterior has no variances and `by` needs them.
    """
    if not 0 <= fraction <= 1:
        raise VarloraError(f"Expected `fraction` to be a share of the weights within 0 and 1, but got {fraction}.")
    if by not in CRITERIA:
        raise VarloraError(f"Expected `by` to be one of {', '.join(CRITERIA)}, but got {by!r}.")
    sizes = {name: value.numel() for name, value in posterior.mean.items()}
    if by == "random":
        generator = generator or torch.Generator().manual_seed(0)
        order = torch.randperm(sum(sizes.values()), generator=generator, device=generator.device)
    else:
        magnitude = flat(posterior.mean[name].abs() for name in sorted(sizes))
        order = magnitude.argsort(stable=True)
        if by == "snr":
            std = posterior.marginal_std()
            noise = flat(std[name] for name in sorted(sizes)).to(magnitude.device)
            signal = (magnitude / noise).nan_to_num(nan=0.0, posinf=math.inf)  # 0/0: certainly zero, and goes first
            order = order[signal[order].argsort(stable=True)]  # many have no variance: these by magnitude
    if before is not None:  # those that are pruned already go first
        stay = flat(before[name] for name in sorted(sizes)).to(order.device)
        order = order[stay[order].int().argsort(stable=True)]
        fraction = max(fraction, 1 - stay.double().mean().item())
    kept = torch.ones(len(order), dtype=torch.bool, device=order.device)
    kept[order[: round(fraction * len(order))]] = False
    parts = kept.split([sizes[name] for name in sorted(sizes)])
    return {
        name: part.view(posterior.mean[name].shape).to(posterior.mean[name].device)
        for name, part in zip(sorted(sizes), parts)
    }


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


MOST_DRAWS = 100_000
"""More would take days, or all memory."""


def check_draws(n: int, least: int = 0, what: str = "n") -> None:
    """Raise if `n` is no number of draws, or one that would never end."""
    if n > MOST_DRAWS:
        raise VarloraError(f"Expected `{what}` to be at most {MOST_DRAWS:,} draws, but got {n:,}.")
    if n < least:
        raise VarloraError(
            f"Expected `{what}` to be a number of draws >= {least}, but got {n}. "
            + ("Pass 0 for the mean." if not least else "The mean is no draw: `at_mean` gives it.")
        )


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
