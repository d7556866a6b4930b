"""The fixed models that stand for a posterior, one after the other, for work that is not about class logits.

`Posterior.draw_logits` gives logits of answers. Whole texts, or another library's own passes, need the model itself:
here each draw is a context within which the model is that draw, with its share of the average.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from varlora.posterior import Linearised, Mixture, Point, Posterior, Pruned, Tempered
from varlora.posterior.base import check_draws

__all__ = ["FixedModel", "fixed_models", "parts"]


class FixedModel(NamedTuple):
    """One of the models that are averaged."""

    weight: float
    """Its share of the average; the shares of all sum to 1."""
    entered: Callable[[], AbstractContextManager[None]]
    """Gives the context within which the model is this one. It draws, so call it once, and in the order of the list."""


def fixed_models(posterior: Posterior, model: nn.Module, n: int, generator: torch.Generator) -> list[FixedModel]:
    """Return the models that a posterior is averaged over; the same seed gives the same ones.

    A point is one model whatever `n`. A mixture is each of its members, with equal shares, so that there are at least
    as many models as members, also at the mean. Of a linearised posterior these are draws of its Gaussian over the
    weights, without the linearisation. What acts on class logits alone, a temperature, has no part in it.

    Args:
        posterior: what to draw from.
        model: the model whose parameters the draws replace, each for as long as its context lasts.
        n: draws; 0 means the mean.
        generator: source of the draws.

    Raises:
        VarloraError: `n` is negative.

    Example:
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> posterior = Mixture([Point({"weight": torch.tensor([[value]])}) for value in (1.0, 3.0)])
        >>> for weight, entered in fixed_models(posterior, layer, 10, torch.Generator()):
        ...     with entered():
        ...         print(weight, layer.weight.item())
        0.5 1.0
        0.5 3.0
    """
    check_draws(n)
    if isinstance(posterior, Tempered):
        return fixed_models(posterior.inner, model, n, generator)
    if isinstance(posterior, Linearised):
        return fixed_models(posterior.weights, model, n, generator)
    if isinstance(posterior, Mixture):
        return _of_members(posterior, model, n, generator)
    if n == 0 or _is_point(posterior):
        return [FixedModel(1.0, partial(posterior.at_mean, model))]
    return [FixedModel(1 / n, partial(posterior.sampled, model, generator)) for _ in range(n)]


def _of_members(mixture: Mixture, model: nn.Module, n: int, generator: torch.Generator) -> list[FixedModel]:
    members, device = mixture.members, generator.device
    # a source for each member, as in `Mixture.draw_logits`: how much one takes from it does not matter to the next
    seeds = torch.randint(2**62, (len(members),), generator=generator, device=device).tolist()
    found = []
    for index, (member, seed) in enumerate(zip(members, seeds)):
        share = n and len(range(index, max(n, len(members)), len(members)))
        models = fixed_models(member, model, share, torch.Generator(device).manual_seed(seed))
        found += [FixedModel(weight / len(members), entered) for weight, entered in models]
    return found


def _is_point(posterior: Posterior) -> bool:
    return isinstance(posterior, Point) or (isinstance(posterior, Pruned) and _is_point(posterior.inner))


def parts(posterior: Posterior) -> Iterator[Posterior]:
    """Yield a posterior and all those within it.

    Example:
        >>> [part.kind for part in parts(Tempered(Mixture([Point({})]), 2.0, 2.0))]
        ['tempered', 'mixture', 'point']
    """
    yield posterior
    inside: Any = posterior
    if isinstance(posterior, Mixture | Tempered):
        inner = list(inside.members)
    else:
        inner = [getattr(inside, name) for name in ("inner", "weights") if hasattr(inside, name)]
    for one in inner:
        yield from parts(one)
