"""The kernels of `native.c`, which are built when the package is installed, if there is a C compiler."""

from __future__ import annotations

import bisect
import ctypes
import functools
import itertools
import os
import sysconfig
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .noise import Piece

__all__ = ["Flat", "Kernels", "Settings", "clip", "lazy", "library", "readable"]

VERSION = 3
"""Of native.c; a build of another one is not used."""
TILE = 64
"""Elements that are worked off together; threads share a parameter out at multiples of it."""
ALONE = 1 << 16
"""Elements for which one thread does not wait for others."""


class Settings(ctypes.Structure):
    """What a step needs beside the state, `Settings` of native.c."""

    _fields_ = tuple(
        (name, ctypes.c_float)
        for name in (
            *("ess", "delta", "beta1_less", "beta2_less", "half_square"),
            *("lr_over_bias", "clip_times_bias", "delta_times_bias", "batch_size"),
        )
    )


class _Work(ctypes.Structure):
    _fields_ = (
        ("key", ctypes.c_uint64),
        ("segments", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("mean", "momentum", "hess")),
        ("settings", Settings),
        ("widest", ctypes.c_int32),
    )


class _Team(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("kernel", "works", "results")),
        ("count", ctypes.c_int32),
        ("next", ctypes.c_int32),
    )


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the kernels; None where they were not built."""
    path = Path(__file__).with_name("_native" + (sysconfig.get_config_var("EXT_SUFFIX") or ".so"))
    try:
        found = ctypes.CDLL(str(path))
        found.ivon_clip.restype = ctypes.c_double
        return found if found.ivon_version() == VERSION else None
    except (OSError, AttributeError):
        return None


def lazy(x: Tensor) -> bool:
    """Whether a tensor is not what its memory holds, but that negated (as of complex arithmetic), or zero."""
    return x.is_neg() or x._is_zerotensor()


def readable(gradient: Tensor) -> bool:
    """Whether kernels can read a gradient on a CPU where it is."""
    dense = gradient.layout == torch.strided and gradient.is_contiguous()
    return dense and gradient.dtype == torch.float32 and not lazy(gradient)


def clip(gradients: Sequence[Tensor], bound: float) -> float | None:
    """Scale gradients on a CPU to a norm of at most `bound`, as `torch.nn.utils.clip_grad_norm_` does.

    Returns:
        The norm that they had; None, and nothing is done, if there are no kernels or they cannot read one of them.
    """
    kernels = library()
    if kernels is None or not all(map(readable, gradients)):
        return None
    addresses = array("Q", [gradient.data_ptr() for gradient in gradients])
    counts = array("q", [gradient.numel() for gradient in gradients])
    pointers = [ctypes.c_void_p(numbers.buffer_info()[0]) for numbers in (addresses, counts)]
    norm = float(kernels.ivon_clip(*pointers, ctypes.c_int64(len(gradients)), ctypes.c_double(bound)))
    if norm + 1e-6 > bound:
        torch.autograd.graph.increment_version(gradients)
    return norm


class Flat(NamedTuple):
    """The flat float32 state of some parameters, which kernels work on."""

    mean: Tensor
    """(N,), as the next two."""
    momentum: Tensor
    hess: Tensor
    pieces: Sequence[Sequence[Piece]]
    """Of each parameter."""


class Kernels:
    """The kernels over the state of some parameters."""

    widest = 512
    """Bits of the widest vectors to use; no result depends on it."""

    def __init__(self, flat: Flat) -> None:
        self.flat = flat
        # Nearly always all parameters; where others have a gradient each step, not all their tables are kept.
        self.segments = functools.lru_cache(maxsize=64)(self._segments)

    def normal(self, key: int, indices: Sequence[int], out: Sequence[Tensor]) -> None:
        """Write the noise of some parameters to contiguous float32 tensors."""
        self._run("ivon_normal", key, indices, out, None, Settings())

    def draw(self, key: int, indices: Sequence[int], out: Sequence[Tensor], settings: Settings) -> None:
        """Write θ = m + σε of some parameters to contiguous float32 tensors."""
        self._run("ivon_draw", key, indices, out, None, settings)

    def update(
        self, key: int, indices: Sequence[int], gradients: Sequence[Tensor], out: Sequence[Tensor], settings: Settings
    ) -> None:
        """Make a step of some parameters and write their mean; gradients and `out` are contiguous and float32."""
        self._run("ivon_update", key, indices, out, gradients, settings)

    def finite(self, indices: Sequence[int], gradients: Sequence[Tensor]) -> bool:
        """Return whether all numbers of contiguous float32 gradients are finite."""
        return all(self._run("ivon_finite", 0, indices, None, gradients, Settings()))

    def _run(
        self,
        name: str,
        key: int,
        indices: Sequence[int],
        out: Sequence[Tensor] | None,
        gradients: Sequence[Tensor] | None,
        settings: Settings,
    ) -> list[int]:
        """Call a kernel for some parameters, shared out to as many threads as torch uses."""
        segments, of_segment, starts, shares, known = self.segments(tuple(indices), torch.get_num_threads())
        for column, tensors in ((4, out), (5, gradients)):
            addresses = None if tensors is None else [x.data_ptr() for x in tensors]
            if addresses is not None and known.get(column) != addresses:
                known.pop(column, None)  # in case this is interrupted
                segments[:, column] = torch.tensor(addresses, device="cpu")[of_segment] + starts
                known[column] = addresses
        row, state = 8 * segments.shape[1], [x.data_ptr() for x in self.flat[:3]]
        works = [
            _Work(key, segments.data_ptr() + lo * row, hi - lo, *state, settings, self.widest)
            for lo, hi in itertools.pairwise(shares)
        ]
        return _run_all(name, works)

    def _segments(
        self, indices: tuple[int, ...], threads: int
    ) -> tuple[Tensor, Tensor, Tensor, list[int], dict[int, list[int]]]:
        """Share some parameters out to threads; to one if they are small.

        Returns:
            The table of `Segment`, which of the indices each is of, by how many bytes it starts after that one's first
            element, where each thread's share of the table begins and ends, and what addresses its columns have.
        """
        numel = sum(piece.numel for i in indices for piece in self.flat.pieces[i])
        threads = threads if numel > ALONE else 1
        cuts = [share * numel // threads for share in range(1, threads)]
        rows, of_row, before = [], [], 0
        for which, i in enumerate(indices):
            lo = before
            for at, count, position, first in self.flat.pieces[i]:
                inside = {-(-(cut - before) // TILE) * TILE for cut in cuts if before < cut < before + count}
                for begin, end in itertools.pairwise([0, *sorted(x for x in inside if x < count), count]):
                    rows.append([at + begin, end - begin, position, first + begin, 0, 0])
                    of_row.append((which, before - lo + begin, before + begin))
                before += count
        of_segment, within, starts = torch.tensor(of_row, dtype=torch.int64, device="cpu").view(-1, 3).T.contiguous()
        shares = [0, *(bisect.bisect_left(starts.tolist(), cut) for cut in cuts), len(rows)]
        return torch.tensor(rows, dtype=torch.int64, device="cpu").view(-1, 6), of_segment, 4 * within, shares, {}


# --- threads


def _run_all(name: str, works: Sequence[_Work]) -> list[int]:
    """Call a kernel for each work, each on a thread of its own."""
    kernel = getattr(library(), name)
    if len(works) == 1:
        return [kernel(ctypes.byref(works[0]))]
    parallel = _openmp()
    if parallel is None:
        others = [_threads(len(works) - 1).submit(kernel, ctypes.byref(work)) for work in works[1:]]
        return [kernel(ctypes.byref(works[0])), *(other.result() for other in others)]
    array, results = (_Work * len(works))(*works), (ctypes.c_int32 * len(works))()
    pointers = [ctypes.cast(x, ctypes.c_void_p) for x in (kernel, array, results)]
    parallel(library().ivon_join, ctypes.byref(_Team(*pointers, len(works), 0)), len(works), 0)  # type: ignore[union-attr]
    return list(results)


@functools.cache
def _openmp() -> Callable[..., Any] | None:
    """Return how to run a function on the threads that torch's own operations use, if these are GNU OpenMP's.

    After each operation those wait actively, for milliseconds, and other threads would have to share their cores.
    """
    try:
        return ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOLOAD | os.RTLD_LAZY).GOMP_parallel
    except (OSError, AttributeError):
        return None


@functools.cache
def _threads(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, thread_name_prefix="ivon")


def _after_fork() -> None:
    """A forked child has the pools, but not their threads; GNU OpenMP would wait for them for ever."""
    global _openmp
    _threads.cache_clear()
    _openmp = functools.cache(lambda: None)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
