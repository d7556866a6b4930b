r"""IVON's noise: standard normal numbers that are a function of a key, a parameter and an element, and of nothing else.

Neither neighbours, nor threads, nor the device, nor how a parameter is sharded change what an element gets. For element
i of the parameter at a position, Philox4x32-10 turns the counter (16 ⌊i/64⌋ + i mod 16, position) into four words of 32
bits; the first two make a pair of numbers by Box and Muller's method, the last two another one:

.. math:: \varepsilon = \sqrt{-2 \ln u} \cos\varphi, \qquad \varepsilon' = \sqrt{-2 \ln u} \sin\varphi

So a tile of 64 elements is four rows of 16 numbers, from 16 counters. This is the definition in torch operations;
`native.c` has the same for a CPU, to float32 rounding.

References:
    Salmon et al. 2011, Parallel random numbers: as easy as 1, 2, 3; Box and Muller 1958, A note on the generation of
    random normal deviates.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["LANES", "TILE", "Layout", "Piece", "mix", "normal", "philox"]

LANES = 16
TILE = 4 * LANES
# Tiles that are worked off at once: on a CPU so that what is in between fits the cache, elsewhere more, as launches are
# what takes long there.
_AT_ONCE, _AT_ONCE_ELSEWHERE = 1 << 10, 1 << 14
_WORD = (1 << 32) - 1


class Piece(NamedTuple):
    """A run of elements that lie side by side in a flat state, and that are neighbours in a parameter: whose they are
    says what noise they get."""

    at: int
    """Where they start in the state."""
    numel: int
    position: int
    """Of the parameter, among the optimizer's."""
    first: int
    """The first one's index within the parameter."""


def mix(*numbers: int) -> int:
    """Hash integers to 64 bits (splitmix64, chained), so that neighbours get unrelated keys.

    Example:
        >>> hex(mix(0))
        '0xe220a8397b1dcdaf'
    """
    mask, x = (1 << 64) - 1, 0
    for number in numbers:
        x = (x ^ (number & mask)) + 0x9E3779B97F4A7C15 & mask
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
        x ^= x >> 31
    return x


def philox(key: int, counter: Sequence[Tensor]) -> list[Tensor]:
    """Return the four words of Philox4x32-10.

    Args:
        key: 64 bits.
        counter: four int64 tensors of one shape, with 32 bits in each number, the lowest word first.
    """
    a, b, c, d = counter
    k0, k1 = key & _WORD, key >> 32
    for _ in range(10):
        p, q = a * 0xD2511F53, c * 0xCD9E8D57  # 64 bits, whatever the sign says
        a, b, c, d = (q >> 32 & _WORD) ^ b ^ k0, q & _WORD, (p >> 32 & _WORD) ^ d ^ k1, p & _WORD
        k0, k1 = k0 + 0x9E3779B9 & _WORD, k1 + 0xBB67AE85 & _WORD
    return [a, b, c, d]


def normal(key: int, positions: Tensor, tiles: Tensor) -> Tensor:
    """Return the noise of some tiles.

    Args:
        key: 64 bits.
        positions: (T,) int64, the parameter that each tile is of.
        tiles: (T,) int64, the tile's number within the parameter.

    Returns:
        (T, 64) float32.
    """
    counter = (tiles[:, None] * LANES + torch.arange(LANES, device=tiles.device)).contiguous()  # (T, 16)
    position = positions[:, None].expand_as(counter)
    a, b, c, d = philox(key, [counter & _WORD, counter >> 32, position & _WORD, position >> 32])
    return torch.stack([*_box_muller(a, b), *_box_muller(c, d)], dim=1).flatten(1)


def _box_muller(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    u = (a >> 1).float() * 2**-31 + 2**-32  # (0, 1]
    r = u.log().mul_(-2).sqrt_()
    # Thirty bits are an angle in [−π/4, π/4), two turn it to one of four quadrants.
    angle = ((b << 2 & _WORD ^ 1 << 31) - (1 << 31)).float() * (math.pi * 2**-33)
    swap, cosine, sine = (b >> 30 & 1).bool(), angle.cos(), angle.sin()
    first = torch.where(swap, sine, cosine) * (1 - 2 * (b >> 31 & 1))
    second = torch.where(swap, cosine, sine) * (1 - 2 * ((b >> 31 ^ b >> 30) & 1))
    return r * first, r * second


class Layout:
    """Where the noise of some tensors comes from: made once, as it does not depend on the key.

    Tiles are worked off in batches, so that what is in between takes no more memory for more elements.

    Args:
        pieces: what each tensor holds.
        device: of all.
    """

    def __init__(self, pieces: Sequence[Piece], device: torch.device) -> None:
        room = TILE * (_AT_ONCE if device.type == "cpu" else _AT_ONCE_ELSEWHERE)
        self.batches: list[_Batch] = []
        parts: list[_Part] = []
        held = 0
        for which, (_, numel, position, first) in enumerate(pieces):
            for lo in range(0, numel, room):
                parts.append(_Part(which, lo, min(room, numel - lo), position, *divmod(first + lo, TILE)))
                held += parts[-1].numel
                if held >= room:
                    self.batches.append(_batch(parts, device))
                    parts, held = [], 0
        if parts:
            self.batches.append(_batch(parts, device))

    def fill(self, key: int, out: Sequence[Tensor]) -> None:
        """Fill contiguous tensors, one for each piece, with the noise of a key."""
        for parts, starts, positions, tiles in self.batches:
            found = normal(key, positions, tiles).view(-1)
            for part, start in zip(parts, starts):
                target = out[part.which].view(-1)[part.lo : part.lo + part.numel]
                target.copy_(found[start : start + part.numel])


class _Part(NamedTuple):
    which: int  # of the tensors
    lo: int  # where in the tensor it starts
    numel: int
    position: int
    tile: int
    within: int  # where in the tile it starts


class _Batch(NamedTuple):
    parts: list[_Part]
    starts: list[int]  # where in the batch's noise each part starts
    positions: Tensor  # (T,) int64, as `normal` takes them
    tiles: Tensor  # (T,) int64


def _batch(parts: list[_Part], device: torch.device) -> _Batch:
    counts = [-(-(part.within + part.numel) // TILE) for part in parts]
    starts = [0, *itertools.accumulate(counts)]
    numbers = [torch.arange(part.tile, part.tile + count, device="cpu") for part, count in zip(parts, counts)]
    positions = torch.tensor([part.position for part in parts], device="cpu")
    return _Batch(
        parts,
        [start * TILE + part.within for part, start in zip(parts, starts)],
        positions.repeat_interleave(torch.tensor(counts, device="cpu")).to(device),
        torch.cat(numbers).to(device),
    )
