"""IVON's noise, tensor by tensor, from its definition."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from varlora.optim.noise import TILE, normal


def fill_normal(key: int, jobs: Sequence[tuple[Tensor, int, int]]) -> None:
    """Fill tensors with noise.

    Args:
        key: 64 bits.
        jobs: contiguous tensors, each with the position of its parameter and the index, within that, of its first
            element.
    """
    for out, position, first in jobs:
        begin, end = first // TILE, -(-(first + out.numel()) // TILE)
        tiles = torch.arange(begin, end, device=out.device)
        whole = normal(key, torch.full_like(tiles, position), tiles).view(-1)
        out.view(-1).copy_(whole[first - begin * TILE :][: out.numel()])
