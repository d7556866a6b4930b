"""Draws of a posterior as weights: the models that `draw_logits` runs one after the other, to be kept or passed on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from varlora.errors import VarloraError
from varlora.posterior import Linearised, Mixture, Point, Posterior, Pruned, Tempered

__all__ = ["Draw", "distinct", "drawn", "draws_of", "means", "same_weights"]


class Draw(NamedTuple):
    """One of the models whose probabilities are averaged."""

    weights: Mapping[str, Tensor]
    """By parameter name."""
    temperature: float = 1.0
    """What its logits are divided by."""
    weight: float = 1.0
    """How often it was drawn."""


def draws_of(posterior: Posterior, n: int, generator: torch.Generator) -> list[dict[str, Tensor]]:
    """Return the weights of the draws that `posterior.draw_logits` makes with the same generator, in its order.

    Of a linearised posterior, whose own draws are of logits, they are draws of its Gaussian.

    Args:
        posterior: what to draw from.
        n: draws; there is one where all are the same, and one of each member of a mixture at the least.
        generator: source of the draws.

    Raises:
        VarloraError: the posterior has no weights to draw.

    Example:
        >>> members = [Point({"w": torch.ones(1)}), Point({"w": torch.zeros(1)})]
        >>> [draw["w"].item() for draw in draws_of(Mixture(members), 3, torch.Generator().manual_seed(0))]
        [1.0, 0.0, 1.0]
    """
    return [dict(draw.weights) for draw in drawn(posterior, n, generator)]


def drawn(posterior: Posterior, n: int, generator: torch.Generator) -> list[Draw]:
    """Return what `draws_of` does, with the temperature of each draw: members of a mixture may have their own."""
    if isinstance(posterior, Tempered):
        inner = drawn(posterior.inner, n, generator)
        return [draw._replace(temperature=draw.temperature * posterior.temperature) for draw in inner]
    if isinstance(posterior, Linearised):
        return drawn(posterior.weights, n, generator)
    if isinstance(posterior, Mixture):
        members, device = posterior.members, generator.device
        n = max(n, len(members))
        shares = [len(range(index, n, len(members))) for index in range(len(members))]
        seeds = torch.randint(2**62, (len(members),), generator=generator, device=device).tolist()
        found = [
            drawn(member, share, torch.Generator(device).manual_seed(seed))
            for member, share, seed in zip(members, shares, seeds)
        ]
        most = max(map(len, found))
        if most > max(shares):  # a mixture within that has more members than its share
            shares = [most] * len(found)
        turns = [(draws * -(-share // len(draws)))[:share] for draws, share in zip(found, shares)]
        return [draws[turn] for turn in range(max(shares)) for draws in turns if turn < len(draws)]
    if not hasattr(posterior, "draw"):
        raise VarloraError(f"Expected a posterior with weights to draw, but a {posterior.kind} has none to export.")
    same = isinstance(posterior, Point) or (isinstance(posterior, Pruned) and isinstance(posterior.inner, Point))
    return [Draw(posterior.draw(generator)) for _ in range(1 if same else n)]


def means(posterior: Posterior) -> list[Draw]:
    """Return what gives the probabilities at the mean: one model, or each member's of a mixture."""
    if isinstance(posterior, Tempered):
        inner = means(posterior.inner)
        return [draw._replace(temperature=draw.temperature * posterior.temperature_mean) for draw in inner]
    if isinstance(posterior, Mixture):
        return [
            draw._replace(weight=draw.weight / len(posterior.members))
            for member in posterior.members
            for draw in means(member)
        ]
    return [Draw(posterior.mean)]  # type: ignore[attr-defined]


def distinct(draws: Iterable[Draw]) -> list[Draw]:
    """Return each model once, with how often it is there: a member that is a point is drawn again and again."""
    found: list[Draw] = []
    for draw in draws:
        for index, other in enumerate(found):
            if draw.temperature == other.temperature and same_weights(draw.weights, other.weights):
                found[index] = other._replace(weight=other.weight + draw.weight)
                break
        else:
            found.append(draw)
    return found


def same_weights(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether two models are one, whatever the type that their weights are kept in."""
    return all(torch.equal(value.to(other[name].dtype), other[name]) for name, value in one.items())
