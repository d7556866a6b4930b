"""What training leaves behind: a distribution over the predictors that one base model can become.

Every way of reaching a posterior ends in one of these classes, and prediction knows only the protocol.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from varlora.errors import DamagedFileError, VarloraError, did_you_mean
from varlora.params import swapped

__all__ = [
    "POSTERIORS",
    "DiagonalGaussian",
    "Forward",
    "Mixture",
    "Point",
    "Posterior",
    "draw_logits_by_loop",
    "posterior_from_tensors",
]

Forward = Callable[[nn.Module, Any], Tensor]
"""`forward(model, batch) -> (B, C)`: the class logits of one model."""


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
        """Class logits of `n` draws, (S, B, C); with `n = 0` at the mean, S = 1."""
        ...

    def scale(self, tau: float) -> Posterior:
        """The same posterior with `tau` times the variance (the paper's Table 2); 0 is the mean."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint stores, keyed by parameter name."""
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
    _check_draws(n)
    if n == 0:
        with posterior.at_mean(model):
            return forward(model, batch)[None]  # (B, C) -> (1, B, C)
    logits = []
    for _ in range(n):
        with posterior.sampled(model, generator):
            logits.append(forward(model, batch))
    return torch.stack(logits)


def _prefixed(prefix: str, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": value for name, value in values.items()}


def _without_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    start = f"{prefix}."
    return {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}


def _check_draws(n: int) -> None:
    if n < 0:
        raise VarloraError(f"Expected `n` to be a number of draws >= 0, but got {n}. Pass 0 for the mean.")


def _check_tau(tau: float) -> None:
    if not (math.isfinite(tau) and tau >= 0):
        raise VarloraError(f"Expected `tau` to be a factor >= 0 of the posterior variance, but got {tau}. 1 keeps it.")


@dataclass(frozen=True)
class Point:
    """All mass on one value of the weights: what AdamW ends with. Every draw is the mean.

    Example:
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> with Point({"weight": torch.tensor([[2.0]])}).at_mean(layer):
        ...     layer(torch.tensor([3.0])).item()
        6.0
    """

    kind: ClassVar[str] = "point"

    mean: Mapping[str, Tensor]
    """The weights by parameter name."""

    def sampled(self, model: nn.Module, generator: torch.Generator) -> AbstractContextManager[None]:
        """Within the context `model` is at the mean, whatever the generator."""
        return self.at_mean(model)

    def at_mean(self, model: nn.Module) -> AbstractContextManager[None]:
        """Within the context `model` is at the mean."""
        return swapped(model, self.mean)

    def draw_logits(self, model: nn.Module, batch: Any, n: int, generator: torch.Generator, forward: Forward) -> Tensor:
        """Class logits at the mean, (1, B, C) whatever `n`: draws of a point are all the same."""
        _check_draws(n)
        return draw_logits_by_loop(self, model, batch, 0, generator, forward)

    def scale(self, tau: float) -> Point:
        """A point has no variance to scale."""
        _check_tau(tau)
        return self

    def tensors(self) -> dict[str, Tensor]:
        """The mean, as `mean.<parameter>`."""
        return _prefixed("mean", self.mean)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Point:
        """Rebuild from `tensors()`."""
        return cls(_without_prefix("mean", tensors))


@dataclass(frozen=True)
class DiagonalGaussian:
    r"""A Gaussian with a mean and a variance for each weight, `q(θ) = N(m, diag(v))` (the paper, section 2).

    Draws go through the parameters in the order of their names, so they depend on the generator alone.

    Example:
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> posterior = DiagonalGaussian({"weight": torch.tensor([[2.0]])}, {"weight": torch.tensor([[0.5]])})
        >>> with posterior.sampled(layer, torch.Generator().manual_seed(0)):
        ...     drawn = layer.weight.item()
        >>> drawn != 2.0
        True
        >>> posterior.scale(4.0).std["weight"].item()
        1.0
    """

    kind: ClassVar[str] = "diagonal_gaussian"

    mean: Mapping[str, Tensor]
    """m by parameter name, float32 (or wider) whatever the parameter's type."""
    std: Mapping[str, Tensor]
    """σ = √v by parameter name, of the mean's shape and type."""

    def __post_init__(self) -> None:
        differ = set(self.mean) ^ set(self.std)
        differ |= {name for name in set(self.mean) & set(self.std) if self.mean[name].shape != self.std[name].shape}
        if differ:
            raise VarloraError(
                f"Expected `mean` and `std` to have the same names and shapes, but `{min(differ)}` differs. "
                "Pass both from the same model."
            )

    def draw(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Return one draw of the weights, m + σε with ε ~ N(0, I), by parameter name."""
        drawn = {}
        for name in sorted(self.mean):
            mean, std = self.mean[name], self.std[name]
            noise = torch.empty(mean.shape, dtype=mean.dtype, device=generator.device).normal_(generator=generator)
            drawn[name] = torch.addcmul(mean, std, noise.to(mean.device))
        return drawn

    def sampled(self, model: nn.Module, generator: torch.Generator) -> AbstractContextManager[None]:
        """Within the context `model` is one draw; after it, bit for bit what it was."""
        return swapped(model, self.draw(generator))

    def at_mean(self, model: nn.Module) -> AbstractContextManager[None]:
        """Within the context `model` is at m."""
        return swapped(model, self.mean)

    def draw_logits(self, model: nn.Module, batch: Any, n: int, generator: torch.Generator, forward: Forward) -> Tensor:
        """Class logits of `n` draws, (S, B, C); with `n = 0` at the mean, S = 1."""
        return draw_logits_by_loop(self, model, batch, n, generator, forward)

    def scale(self, tau: float) -> DiagonalGaussian:
        """Return N(m, τv): the trade between accuracy (small τ) and calibration (large τ) of the paper's Table 2.

        Args:
            tau: factor of the variance, >= 0.

        Raises:
            VarloraError: `tau` is negative or not finite.
        """
        _check_tau(tau)
        return DiagonalGaussian(self.mean, {name: std * math.sqrt(tau) for name, std in self.std.items()})

    def prune(self, fraction: float) -> DiagonalGaussian:
        """Return the posterior with the given fraction of weights of lowest |m|/√v set to exactly 0, without variance.

        Args:
            fraction: share of all weights, 0 to 1.

        Raises:
            VarloraError: `fraction` is not within 0 and 1.

        References:
            the follow-up of the paper (arXiv:2506.14280), pruning at test time.

        Example:
            >>> mean, std = torch.tensor([0.1, -3.0, 2.0, 0.2]), torch.ones(4)
            >>> DiagonalGaussian({"w": mean}, {"w": std}).prune(0.5).mean["w"].tolist()
            [0.0, -3.0, 2.0, 0.0]
        """
        if not 0 <= fraction <= 1:
            raise VarloraError(f"Expected `fraction` to be a share of the weights within 0 and 1, but got {fraction}.")
        # 0/0 is a weight that is certainly zero: it goes first
        ratio = {
            name: (self.mean[name].abs() / self.std[name]).nan_to_num(nan=0.0, posinf=math.inf) for name in self.mean
        }
        total = sum(value.numel() for value in ratio.values())
        count = round(fraction * total)
        if count == 0:
            return self
        flat = torch.cat([value.flatten() for value in ratio.values()])
        lowest = torch.zeros(total, dtype=torch.bool, device=flat.device)
        lowest[flat.argsort(stable=True)[:count]] = True
        pruned = dict(zip(ratio, lowest.split([value.numel() for value in ratio.values()])))

        def without(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: value.masked_fill(pruned[name].view_as(value), 0.0) for name, value in values.items()}

        return DiagonalGaussian(without(self.mean), without(self.std))

    def tensors(self) -> dict[str, Tensor]:
        """Mean and standard deviation, as `mean.<parameter>` and `std.<parameter>`."""
        return _prefixed("mean", self.mean) | _prefixed("std", self.std)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> DiagonalGaussian:
        """Rebuild from `tensors()`."""
        return cls(_without_prefix("mean", tensors), _without_prefix("std", tensors))


@dataclass(frozen=True)
class Mixture:
    """Equal shares of several posteriors of the same base: an ensemble, MultiSWAG, several IVON runs.

    Draws take the members in turn, so that S draws hold each member S/K times. It has no single mean: at the mean, the
    logarithm of the members' average probability is returned as logits, so that their softmax is that average.

    Example:
        >>> members = [Point({"weight": torch.tensor([[value]])}) for value in (1.0, 3.0)]
        >>> forward = lambda model, batch: model(batch)
        >>> layer, generator = nn.Linear(1, 1, bias=False), torch.Generator()
        >>> Mixture(members).draw_logits(layer, torch.ones(1, 1), 4, generator, forward).flatten().tolist()
        [1.0, 3.0, 1.0, 3.0]
    """

    kind: ClassVar[str] = "mixture"

    members: Sequence[Posterior]
    """The posteriors, at least one."""

    def __post_init__(self) -> None:
        if not self.members:
            raise VarloraError("Expected `members` to hold at least one posterior, but got none.")

    @contextmanager
    def sampled(self, model: nn.Module, generator: torch.Generator) -> Iterator[None]:
        """Within the context `model` is a draw of a member chosen at random."""
        device = generator.device
        member = int(torch.randint(len(self.members), (1,), generator=generator, device=device).item())
        with self.members[member].sampled(model, generator):
            yield

    def at_mean(self, model: nn.Module) -> AbstractContextManager[None]:
        """Within the context `model` is at the first member's mean: what a plain adapter checkpoint can hold."""
        return self.members[0].at_mean(model)

    def draw_logits(self, model: nn.Module, batch: Any, n: int, generator: torch.Generator, forward: Forward) -> Tensor:
        """Class logits of `n` draws, the members in turn, (S, B, C); with `n = 0` those of the members' average."""
        _check_draws(n)
        if n == 0:
            means = [member.draw_logits(model, batch, 0, generator, forward)[0] for member in self.members]
            return torch.stack(means).log_softmax(-1).logsumexp(0)[None] - math.log(len(means))
        draws = []
        for index in range(n):
            member = self.members[index % len(self.members)]
            draws.append(member.draw_logits(model, batch, 1, generator, forward))
        return torch.cat(draws)

    def scale(self, tau: float) -> Mixture:
        """Scale each member's variance; the spread between members stays."""
        return Mixture([member.scale(tau) for member in self.members])

    def tensors(self) -> dict[str, Tensor]:
        """Each member's tensors, as `<index>/<kind>/<tensor>`."""
        return {
            f"{index}/{member.kind}/{name}": value
            for index, member in enumerate(self.members)
            for name, value in member.tensors().items()
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Mixture:
        """Rebuild from `tensors()`."""
        parts: dict[tuple[int, str], dict[str, Tensor]] = {}
        for key, value in tensors.items():
            index, kind, name = key.split("/", 2)
            parts.setdefault((int(index), kind), {})[name] = value
        return cls([posterior_from_tensors(kind, parts[index, kind]) for index, kind in sorted(parts)])


POSTERIORS: dict[str, Any] = {"point": Point, "diagonal_gaussian": DiagonalGaussian, "mixture": Mixture}
"""Every kind of posterior that a checkpoint can hold."""


def posterior_from_tensors(kind: str, tensors: Mapping[str, Tensor]) -> Posterior:
    """Rebuild the posterior that a checkpoint holds.

    Args:
        kind: key in `POSTERIORS`.
        tensors: what `tensors()` gave.

    Raises:
        DamagedFileError: the kind is unknown.

    Example:
        >>> posterior_from_tensors("point", {"mean.w": torch.zeros(1)}).mean
        {'w': tensor([0.])}
    """
    if kind not in POSTERIORS:
        raise DamagedFileError(
            f"Expected a known kind of posterior, but got {kind!r}. {did_you_mean(kind, POSTERIORS)}"
        )
    return POSTERIORS[kind].from_tensors(tensors)
