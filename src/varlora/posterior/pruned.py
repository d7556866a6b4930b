"""Pruning: a posterior in which the weights that matter least are exactly 0, without variance."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from varlora.drawing import Source
from varlora.posterior.base import Gaussian, WeightPosterior, check_fits, kept_by, pack, unpack

__all__ = ["Pruned"]

KEEP, KEPT = "keep.", "kept/"
"""Starts of the names under which a file has the bits, and what is left."""


@dataclass(frozen=True, repr=False)
class Pruned(WeightPosterior):
    """Another posterior over weights, of which some are 0 in every draw.

    Only what is kept is stored, and a bit for each weight, so that a pruned posterior's file is smaller.

    Example:
        >>> from varlora.posterior import DiagonalGaussian
        >>> mean, std = torch.tensor([0.1, -3.0, 2.0, 0.2]), torch.ones(4)
        >>> DiagonalGaussian({"w": mean}, {"w": std}).prune(0.5).mean["w"].tolist()
        [0.0, -3.0, 2.0, 0.0]
    """

    kind: ClassVar[str] = "pruned"

    inner: WeightPosterior
    """The posterior whose draws lose weights."""
    keep: Mapping[str, Tensor]
    """Which weights are kept, by parameter name, bool of the mean's shape."""

    def __post_init__(self) -> None:
        mean = self.inner.mean
        check_fits(mean, "keep", {name: value.shape for name, value in mean.items()}, self.keep)

    @cached_property
    def mean(self) -> Mapping[str, Tensor]:  # type: ignore[override]
        """The inner posterior's mean, 0 where pruned."""
        return self._without(self.inner.mean)

    def _without(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.masked_fill(~self.keep[name], 0.0) for name, value in weights.items()}

    def marginal_std(self) -> dict[str, Tensor]:
        """Return the standard deviation of each weight, 0 where pruned."""
        return self._without(self.inner.marginal_std())

    @property
    def varies(self) -> bool:
        """Whether the inner posterior's draws differ."""
        return self.inner.varies

    @property
    def symmetric(self) -> bool:  # type: ignore[override]
        """Whether the inner posterior is symmetric."""
        return self.inner.symmetric

    def draw(self, generator: Source) -> dict[str, Tensor]:
        """Return one draw of the weights by parameter name."""
        return self._without(self.inner.draw(generator))

    def prune(self, fraction: float, by: str = "snr", generator: torch.Generator | None = None) -> Pruned:
        """Prune more; what is pruned already counts, and stays so."""
        return Pruned(self.inner, kept_by(self, fraction, by, generator, before=self.keep))

    def quadratic(self, name: str, gradients: Tensor) -> Tensor:
        """Return the covariance that one parameter gives to linear functions of it, (B, C, C) float64."""
        return cast(Gaussian, self.inner).quadratic(name, gradients.masked_fill(~self.keep[name], 0.0))

    def scale(self, tau: float) -> Pruned:
        """Return the posterior with `tau` times the variance, pruned as it is."""
        return Pruned(cast(WeightPosterior, self.inner.scale(tau)), self.keep)

    def tensors(self) -> dict[str, Tensor]:
        """The inner posterior's tensors as `0/<kind>/<tensor>`, and `keep.<parameter>`.

        What has a number for each weight is there without those pruned, as `kept/0/<kind>/<tensor>`. `keep` holds a bit
        a weight, in bytes from the highest bit on, after the parameter's shape: int64 numbers, each as 8 bytes, the
        number of dimensions before them.
        """
        tensors = {f"{KEEP}{name}": _to_bits(keep) for name, keep in self.keep.items()}
        for key, value in pack([self.inner]).items():
            field, _, name = key.rpartition("/")[2].partition(".")
            if field in self.inner.entrywise:
                tensors[KEPT + key] = value[..., self.keep[name]]
            else:
                tensors[key] = value
        return tensors

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Pruned:
        """Rebuild from `tensors()`."""
        keep = {key.removeprefix(KEEP): _from_bits(value) for key, value in tensors.items() if key.startswith(KEEP)}
        whole = {}
        for key, value in tensors.items():
            if key.startswith(KEPT):
                of = keep[key.rpartition("/")[2].partition(".")[2]]
                whole[key.removeprefix(KEPT)] = full = value.new_zeros(*value.shape[:-1], *of.shape)
                full[..., of] = value
            elif not key.startswith(KEEP):
                whole[key] = value
        (inner,) = unpack(whole)
        return cls(cast(WeightPosterior, inner), keep)


def _to_bits(keep: Tensor) -> Tensor:
    """Return dimensions, shape and one bit an entry as bytes."""
    shape = torch.tensor([keep.dim(), *keep.shape]).view(torch.uint8)
    bits = nn.functional.pad(keep.flatten().cpu(), (0, -keep.numel() % 8)).view(-1, 8)
    return torch.cat([shape, (bits * 2 ** torch.arange(7, -1, -1)).sum(1).to(torch.uint8)])


def _from_bits(stored: Tensor) -> Tensor:
    """Return what `_to_bits` was given.

    Example:
        >>> keep = torch.arange(33).view(3, 11) % 3 == 0
        >>> torch.equal(_from_bits(_to_bits(keep)), keep)
        True
    """
    plain = stored.cpu()
    dimensions = int(plain[:8].view(torch.int64))
    shape = plain[8 : 8 * (1 + dimensions)].view(torch.int64).tolist()
    bits = plain[8 * (1 + dimensions) :, None] >> torch.arange(7, -1, -1) & 1
    return bits.flatten()[: math.prod(shape)].view(shape).bool().to(stored.device)
