"""The models of a posterior as they are passed on: what stands at its mean, and each draw once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from varlora.drawing import Draw
from varlora.posterior import Mixture, Posterior, Pruned, Tempered

__all__ = ["distinct", "holds", "means", "same_weights"]


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


def holds(posterior: Posterior, kind: type) -> bool:
    """Whether a posterior is of a kind, or has one of it within.

    Example:
        >>> from varlora.posterior import Point
        >>> holds(Tempered(Mixture([Point({})]), 2.0, 2.0), Mixture)
        True
    """
    inside = [*getattr(posterior, "members", ()), *([posterior.inner] if isinstance(posterior, Pruned) else [])]
    return isinstance(posterior, kind) or any(holds(part, kind) for part in inside)
