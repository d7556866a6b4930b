"""What one process has of tensors that are spread over several: DTensors, those of FSDP2 and tensor parallelism."""

from __future__ import annotations

import itertools
import math
import sys
from typing import Any

import torch.distributed as dist
from torch import Tensor

from .noise import Piece

__all__ = ["as_sharded", "is_sharded", "local", "pieces", "ranks", "shard_as", "whole"]


def ranks(process_group: Any = None) -> tuple[int, int]:
    """Return this process's rank and the number of ranks; 0 and 1 where nothing is distributed."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(process_group), dist.get_world_size(process_group)


def is_sharded(x: Tensor) -> bool:
    """Whether a tensor is a DTensor: shards on several ranks, as FSDP2 and tensor parallelism have."""
    module = sys.modules.get("torch.distributed.tensor")  # without which there are none
    return module is not None and isinstance(x, module.DTensor)


def local(x: Any) -> Any:
    """Return this rank's shard of a tensor: all of it, where it is not sharded."""
    return x.to_local() if is_sharded(x) else x


def whole(x: Any) -> Tensor:
    """Return a tensor that is sharded over ranks as one that each has whole."""
    return x.full_tensor() if is_sharded(x) else x


def as_sharded(x: Tensor, p: Any) -> Tensor:
    """Return this rank's shard of what is sharded like a parameter as a tensor of the whole."""
    if not is_sharded(p):
        return x
    layout = {"shape": p.shape, "stride": p.stride(), "run_check": False}
    return sys.modules["torch.distributed.tensor"].DTensor.from_local(x, p.device_mesh, p.placements, **layout)


def shard_as(x: Any, p: Any) -> Tensor:
    """Return this rank's shard of a gradient, sharded like its parameter."""
    if is_sharded(x) and x.placements != p.placements:  # a sum that is still to be made over ranks, perhaps
        x = x.redistribute(placements=p.placements)
    return local(x)


def pieces(p: Any, position: int, lo: int) -> list[Piece]:
    """Return the runs of elements that are neighbours in the whole parameter.

    Args:
        p: a parameter.
        position: its position among the optimizer's.
        lo: where this rank's shard of it starts in the flat state.
    """
    if not is_sharded(p):
        return [Piece(lo, p.numel(), position, 0)]
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
    inner = len(p.shape)  # dimensions from here on are whole, and so neighbours
    while inner and shape[inner - 1] == p.shape[inner - 1]:
        inner -= 1
    rows = shape[: max(inner - 1, 0)]
    count = math.prod(shape[max(inner - 1, 0) :])
    strides = [math.prod(p.shape[d + 1 :]) for d in range(len(p.shape))]
    start = sum(o * stride for o, stride in zip(offset, strides))
    return [
        Piece(lo + n * count, count, position, start + sum(i * stride for i, stride in zip(index, strides)))
        for n, index in enumerate(itertools.product(*map(range, rows)))
    ]
