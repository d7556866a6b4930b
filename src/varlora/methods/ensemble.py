"""Ensemble: several runs of a method, each from a fresh adapter with its own seed, averaged (Wang et al. 2023).

Members may be of any method: of SWAG they make MultiSWAG, of IVON a multi-IVON. Either this trains them one after the
other, or it is made of finished runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from varlora.methods.base import Method, Plan, Trained, Wrapping
from varlora.posterior import Mixture

__all__ = ["APART", "MOST", "Ensemble"]

APART = 1000
"""Seeds between a member and the next, so that ensembles of neighbouring seeds share none."""
MOST = 1000
"""Members at the most: each is a run, and an adapter in memory; so a slip in `size` is told from what is meant."""


@dataclass(frozen=True)
class Ensemble(Wrapping):
    """Train several adapters with one method and average their probabilities.

    Example:
        >>> [member.name for member in Ensemble(of="swag", size=3).members()]
        ['swag', 'swag', 'swag']

    References:
        Lakshminarayanan et al. 2017, Simple and Scalable Predictive Uncertainty Estimation using Deep Ensembles; Wang
        et al. 2023, LoRA Ensembles for Large Language Model Fine-tuning.
    """

    name: ClassVar[str] = "ensemble"
    title: ClassVar[str] = "Ensemble"
    several_sources: ClassVar[bool] = True
    size: int = 3
    """Members; the one numbered k from 0 has the run's seed plus 1000 k."""

    def problems(self, plan: Plan) -> list[str]:
        """Fewer than two members are no ensemble."""
        found = super().problems(plan)
        if not (2 <= self.size <= MOST or plan.finished):
            found.append(
                f"Expected `size` to be a number of members >= 2 and at most {MOST}, but got {self.size}. "
                f"Set e.g. `method.size={Ensemble.size}`."
            )
        return found

    def members(self) -> Sequence[Method]:
        """The other method, `size` times."""
        return [self.inner()] * self.size

    def posterior(self, trained: Trained) -> Mixture:
        """Return the members' posteriors as one."""
        return Mixture(list(trained.sources))
