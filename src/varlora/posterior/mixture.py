"""Several posteriors of one base as one: ensembles of any method's runs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from varlora.errors import VarloraError
from varlora.posterior.base import Forward, Posterior, check_draws, pack, unpack

__all__ = ["Mixture"]


@dataclass(frozen=True)
class Mixture:
    """Equal shares of several posteriors of the same base: an ensemble, MultiSWAG, several IVON runs.

    Draws take the members in turn, so that S draws hold each member S/K times, and once at the least. It has no single
    mean: at the mean, the logarithm of the members' average probability is returned as logits, so that their softmax is
    that average.

    Example:
        >>> from varlora.posterior import Point
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
        check_draws(n)
        if n == 0:
            means = [member.draw_logits(model, batch, 0, generator, forward)[0] for member in self.members]
            return torch.stack(means).log_softmax(-1).logsumexp(0)[None] - math.log(len(means))
        n = max(n, len(self.members))  # fewer would leave members out
        shares = [len(range(index, n, len(self.members))) for index in range(len(self.members))]
        # a source for each member: how much one takes from it may depend on the batch
        device, bound = generator.device, 2**62
        seeds = torch.randint(bound, (len(self.members),), generator=generator, device=device).tolist()
        draws = [
            member.draw_logits(model, batch, share, torch.Generator(device).manual_seed(seed), forward)
            for member, share, seed in zip(self.members, shares, seeds)
        ]
        # a member of which all draws are the same gives one, and one whose draws cost nothing gives more than asked for
        most = max(len(logits) for logits in draws)
        if most > max(shares):
            shares = [most] * len(draws)
        draws = [logits.repeat(-(-share // len(logits)), 1, 1)[:share] for logits, share in zip(draws, shares)]
        return torch.stack([logits[turn] for turn in range(max(shares)) for logits in draws if turn < len(logits)])

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
