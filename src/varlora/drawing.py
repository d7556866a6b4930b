"""How draws are made and run: noise of three kinds, and what may be left out for speed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from varlora.errors import ConfigError

__all__ = [
    "LATIN",
    "NOISES",
    "PLAIN",
    "Draw",
    "Drawing",
    "Drawn",
    "Forward",
    "Latin",
    "Noise",
    "Source",
    "normal",
    "uniform",
]

Forward = Callable[[nn.Module, Any], Tensor]
"""`forward(model, batch) -> (B, C)`: the class logits of one model, differentiable.

A function with the attribute `last_position_alone` set calls the model once, with `input_ids` padded on the left, their
`attention_mask`, and `position_ids` counted from the first real token, by these names, and reads the last position
alone, as the last of what there is (`logits[:, -1]`); then more need not be computed, nor be there.
"""

Noise = Literal["independent", "antithetic", "latin"]
NOISES: tuple[Noise, ...] = ("independent", "antithetic", "latin")
LEAST_DRAWS = 4
"""Draws, or pairs of antithetic ones, before a row may be called settled."""


@dataclass(frozen=True)
class Drawing:
    """How S draws are made and run; the defaults change no number but by rounding.

    Example:
        >>> Drawing(noise="latin", last_layers=8).stacked
        True
    """

    stacked: bool = True
    """Run the draws as one batch wherever the model allows it; else one after the other."""
    noise: Noise | None = None
    """`independent`, as None is where no calibration chose another. `antithetic`: every second draw mirrors the one
    before it at the mean (Hammersley and Morton 1956). `latin`: each number that the S draws are made of lies once in
    each of S equally probable ranges (McKay et al. 1979)."""
    last_layers: int | None = None
    """Draw only the adapter's last so many layers; those below stay at the mean and are computed once. None: all."""
    tolerance: float | None = None
    """Stop drawing for a row once its answer is clear and the standard error of its probabilities is at most this, were
    the draws as far apart as their number leaves possible (`stack.settled`). A few draws that go another way altogether
    may still be missed: of a mixture each member is judged by itself."""
    tokens: int | None = None
    """Tokens a pass, all its draws together; None: found by itself."""

    def __post_init__(self) -> None:
        problems = []
        if self.noise not in (None, *NOISES):
            problems.append(f"Expected `noise` to be one of {', '.join(NOISES)}, but got {self.noise!r}.")
        if self.last_layers is not None and self.last_layers < 1:
            problems.append(f"Expected `last_layers` to be >= 1, but got {self.last_layers}. Leave it out to draw all.")
        if self.tolerance is not None and not 0 < self.tolerance < 1:
            problems.append(f"Expected `tolerance` to be a probability within 0 and 1, but got {self.tolerance}.")
        if self.tokens is not None and self.tokens < 1:
            problems.append(f"Expected `tokens` to be a number of tokens >= 1, but got {self.tokens}.")
        if problems:
            raise ConfigError(problems)

    def over(self, chosen: Drawing) -> Drawing:
        """Return these options, and where they say nothing, what was chosen.

        Example:
            >>> Drawing(last_layers=2).over(Drawing(noise="latin", last_layers=8))
            Drawing(stacked=True, noise='latin', last_layers=2, tolerance=None, tokens=None)
            >>> Drawing(noise="independent").over(Drawing(noise="latin")).noise
            'independent'
        """
        return dataclasses.replace(chosen, **self._said())

    def stops(self, total: int) -> list[int]:
        """Return after how many of `total` draws rows are looked at, the last one included: those that divide it.

        Example:
            >>> Drawing(tolerance=0.01).stops(16), Drawing(tolerance=0.01, noise="antithetic").stops(10)
            ([4, 8, 16], [10])
        """
        paired = self.noise == "antithetic"
        least = 2 * LEAST_DRAWS if paired else LEAST_DRAWS
        return [n for n in range(least, total) if total % n == 0 and not (paired and n % 2)] + [total]

    def changed(self) -> dict[str, str]:
        """Return what changes predictions by more than rounding, as far as it is not the default."""
        said = self._said().items()
        return {n: str(v) for n, v in said if n not in ("stacked", "tokens") and (n, v) != ("noise", "independent")}

    def _said(self) -> dict[str, Any]:
        """Return what is not the default."""
        pairs = ((field, getattr(self, field.name)) for field in dataclasses.fields(self))
        return {field.name: value for field, value in pairs if value != field.default}


PLAIN = Drawing()
"""As it is done where nothing is said."""
LATIN = Drawing(noise="latin")
"""As `calibrate` has it done where nothing is said: for any posterior; measured no better than independent draws."""


class Draw(NamedTuple):
    """One of the models whose probabilities are averaged."""

    weights: Mapping[str, Tensor]
    """By parameter name."""
    temperature: float = 1.0
    """What its logits are divided by."""
    weight: float = 1.0
    """How often it was drawn."""


class Drawn(Protocol):
    """A posterior whose draws are made: S fixed models, the same for every batch."""

    @property
    def how(self) -> Drawing:
        """How the draws were made, as far as that was followed."""
        ...

    @property
    def passes(self) -> int:
        """Rows that went through a model so far, counted once a draw."""
        ...

    def logits(self, model: nn.Module, batch: Any, forward: Forward) -> Tensor:
        """Class logits of each draw, (S, B, C)."""
        ...

    def models(self) -> list[Draw]:
        """The draws as weights, in the order of their logits; of draws of logits, those of their Gaussian."""
        ...


class Latin:
    """A source of noise for n draws that divide each number's distribution evenly: a Latin hypercube.

    What is additive in the numbers has almost no variance left (Stein 1987). Sobol's sequence has the same property and
    better pairs of numbers, but torch has it for 21,201 numbers at the most, fewer than an adapter has.

    Args:
        generator: source of the order and of the place within each range.
        n: draws.

    Example:
        >>> source = Latin(torch.Generator().manual_seed(0), 4)
        >>> drawn = torch.stack([source.begin(i).uniform(1000) for i in range(4)])  # (4, 1000)
        >>> (drawn * 4).floor().sort(0).values[:, 0].tolist()
        [0.0, 1.0, 2.0, 3.0]

    References:
        McKay et al. 1979, A comparison of three methods for selecting values of input variables; Stein 1987, Large
        sample properties of simulations using Latin hypercube sampling.
    """

    def __init__(self, generator: torch.Generator, n: int) -> None:
        self.generator, self.n = generator, n
        self.device = generator.device
        self._made: list[Tensor] = []
        self._draw = self._next = 0

    def begin(self, draw: int) -> Latin:
        """Return this source, from which the numbers of one draw come next, in the order of the first one's."""
        self._draw, self._next = draw, 0
        return self

    def uniform(self, *size: int) -> Tensor:
        """Return numbers within 0 and 1."""
        if self._next == len(self._made):
            places = torch.rand(2, self.n, math.prod(size), generator=self.generator, device=self.device)
            self._made.append((places[0].argsort(0) + places[1]) / self.n)
        self._next += 1
        return self._made[self._next - 1][self._draw].view(size)


Source = torch.Generator | Latin
"""What noise comes from."""


def uniform(source: Source, *size: int) -> Tensor:
    """Return numbers within 0 and 1, on the source's device."""
    if isinstance(source, Latin):
        return source.uniform(*size)
    return torch.rand(size, generator=source, device=source.device)


def normal(like: Tensor, source: Source, *size: int) -> Tensor:
    """Return standard normal noise of the type and device of `like`, of its shape or of `size`."""
    shape = size or tuple(like.shape)
    if isinstance(source, Latin):
        tiny = torch.finfo(torch.float32).eps / 2
        return torch.special.ndtri(source.uniform(*shape).clamp(tiny, 1 - tiny)).to(like)
    noise = torch.empty(shape, dtype=like.dtype, device=source.device)
    return noise.normal_(generator=source).to(like.device)
