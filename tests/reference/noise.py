"""IVON's noise for tensors side by side, as its definition in `varlora.optim.noise` has it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from varlora.optim.noise import Layout


def fill_normal(key: int, jobs: Sequence[tuple[Tensor, int, int]]) -> None:
    """Fill tensors with noise.

    Args:
        key: 64 bits.
        jobs: contiguous tensors of one device, each with the position of its parameter and the index, within that, of
            its first element.
    """
    pieces = [(out.numel(), position, first) for out, position, first in jobs]
    Layout(pieces, jobs[0][0].device).fill(key, [out for out, _, _ in jobs])
