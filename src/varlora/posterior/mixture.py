"""Several posteriors of one base as one: ensembles of any method's runs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from varlora.drawing import PLAIN, Draw, Drawing, Drawn, Forward
from varlora.errors import VarloraError
from varlora.posterior.base import Posterior, check_draws, pack, unpack
from varlora.stack import Stack

__all__ = ["Mixture"]

T = TypeVar("T")


@dataclass(frozen=True)
class Mixture:
    """Equal shares of several posteriors of the same base: an ensemble, MultiSWAG, several IVON runs.

    Draws take the members in turn, each as often as the others: S is rounded up to a multiple of the K members. It has
    no single mean: at the mean, the logarithm of the members' average probability is returned as logits, so that their
    softmax is that average.

    Raises:
        VarloraError: there are no members.

    Example:
        >>> from varlora.posterior import Point
        >>> members = [Point({"weight": torch.tensor([[value]])}) for value in (1.0, 3.0)]
        >>> forward = lambda model, batch: model(batch)
        >>> layer, generator = nn.Linear(1, 1, bias=False), torch.Generator()
        >>> Mixture(members).draw_logits(layer, torch.ones(1, 1), 4, generator, forward).flatten().tolist()
        [1.0, 3.0, 1.0, 3.0]

    References:
        Lakshminarayanan et al. 2017, Simple and Scalable Predictive Uncertainty Estimation using Deep Ensembles.
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
        check_draws(n)
        if n == 0:
            means = [member.draw_logits(model, batch, 0, generator, forward)[0] for member in self.members]
            return torch.stack(means).log_softmax(-1).logsumexp(0)[None] - math.log(len(means))
        return self.drawn(n, generator).logits(model, batch, forward)

    def drawn(self, n: int, generator: torch.Generator, how: Drawing = PLAIN) -> Drawn:
        """The members' draws in turn; as one stack, where all of them have weights."""
        check_draws(n, 1)
        share = math.ceil(n / len(self.members))  # unequal ones would favour the first members
        # a source for each member: how much one takes from it may depend on the batch
        device, bound = generator.device, 2**62
        seeds = torch.randint(bound, (len(self.members),), generator=generator, device=device).tolist()
        parts = [
            member.drawn(share, torch.Generator(device).manual_seed(seed), how)
            for member, seed in zip(self.members, seeds)
        ]
        stacks = [part for part in parts if isinstance(part, Stack)]
        # members differ below the last layers, and each has its own error to stop at
        if len(stacks) < len(parts) or how.last_layers or how.tolerance:
            return _MixedDraws(parts, share)
        starts = itertools.accumulate((stack.distinct for stack in stacks), initial=0)
        orders = [[start + index for index in stack.order] for start, stack in zip(starts, stacks)]
        draws = [draw for stack in stacks for draw in stack.draws()]
        return Stack(draws, mixed(orders, share), how=how)

    def scale(self, tau: float) -> Mixture:
        """Scale each member's variance; the spread between members stays."""
        return Mixture([member.scale(tau) for member in self.members])

    def prune(self, fraction: float, by: str = "snr", generator: torch.Generator | None = None) -> Mixture:
        """Prune each member by itself."""
        return Mixture([member.prune(fraction, by, generator) for member in self.members])

    def tensors(self) -> dict[str, Tensor]:
        """Each member's tensors, as `<index>/<kind>/<tensor>`."""
        return pack(self.members)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Mixture:
        """Rebuild from `tensors()`."""
        return cls(unpack(tensors))


@dataclass(frozen=True)
class _MixedDraws:
    """Draws of several posteriors, in turn."""

    parts: Sequence[Drawn]
    share: int
    """How many of them each gives."""

    @property
    def how(self) -> Drawing:
        """How those draws were made that had a choice."""
        return next((part.how for part in self.parts if part.how != PLAIN), PLAIN)

    @property
    def passes(self) -> int:
        """Rows that went through a model so far, counted once a draw."""
        return sum(part.passes for part in self.parts)

    def logits(self, model: nn.Module, batch: Any, forward: Forward) -> Tensor:
        """Class logits of each draw, (S, B, C)."""
        return torch.stack(mixed([list(part.logits(model, batch, forward)) for part in self.parts], self.share))

    def models(self) -> list[Draw]:
        """The members' draws in turn."""
        return mixed([part.models() for part in self.parts], self.share)


def mixed(of_each: Sequence[Sequence[T]], share: int) -> list[T]:
    """Take a share of each, one at a time from each in turn, and what there is again where it ends.

    One that has more than its share gives it all, be it that its draws cost nothing or that it has members of its own,
    and then so do the others.

    Example:
        >>> mixed(["ab", "x"], 3)
        ['a', 'x', 'b', 'x', 'a', 'x']
        >>> mixed(["ab", "x"], 1)
        ['a', 'x', 'b', 'x']
    """
    return [of[turn % len(of)] for turn in range(max(share, *map(len, of_each))) for of in of_each]
