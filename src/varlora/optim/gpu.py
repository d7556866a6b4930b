"""IVON's kernels on a GPU, in Triton: a draw and a step are one pass over memory each.

The noise is that of `noise.py`, made in registers by the draw and again by the step, and never stored. Nothing is read
back: whether a step is left out, the numbers of draws and steps, and so the noise's key, are known on the device alone.
This is what a CUDA graph needs, as is that no buffer is made anew.

With `TRITON_INTERPRET=1` in the environment all of it runs on a CPU, slowly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import bucket
from .native import Flat
from .noise import LANES, TILE, mix

__all__ = ["Kernels", "try_out"]

TILES = 16
"""Tiles of 64 elements that a program works off."""
NO_GRADIENT, EMPTY = 1 << 62, 1 << 61
"""Stand for the address of a gradient that is not there, and of a tensor without elements, which is nowhere: as large
as addresses are, so that kernels are compiled once."""
AT_ONCE = 16
"""Addresses that a launch takes to the device."""
# The same, as kernels read them.
TILE_, TILES_, LANES_, NO_GRADIENT_ = (tl.constexpr(x) for x in (TILE, TILES, LANES, NO_GRADIENT))
_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


# --- noise ---


@triton.jit
def _ln(x):
    """ln x for x in (0, 1]: Cephes' logf, as in native.c."""
    bits = x.to(tl.uint32, bitcast=True) - 0x3F3504F3  # x / √½: its exponent, and its mantissa in [√½, √2)
    e = (bits.to(tl.int32, bitcast=True) >> 23).to(tl.float32)
    f = ((bits & 0x007FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    z = f * f
    y = f * 7.0376836292e-2 - 1.1514610310e-1
    y = y * f + 1.1676998740e-1
    y = y * f - 1.2420140846e-1
    y = y * f + 1.4249322787e-1
    y = y * f - 1.6668057665e-1
    y = y * f + 2.0000714765e-1
    y = y * f - 2.4999993993e-1
    y = y * f + 3.3333331174e-1
    y = y * f * z + e * -2.12194440e-4 - 0.5 * z
    return f + y + e * 0.693359375


@triton.jit
def _box_muller(a, b):
    u = (a >> 1).to(tl.float32) * 4.656612873077393e-10 + 2.3283064365386963e-10  # 2⁻³¹ and 2⁻³²: (0, 1]
    r = tl.sqrt_rn(-2.0 * _ln(u))
    t = (b << 2).to(tl.int32, bitcast=True).to(tl.float32) * 3.6572951981e-10  # π 2⁻³³: an angle in [−π/4, π/4)
    s = t * t
    sine = ((-1.9515295891e-4 * s + 8.3321608736e-3) * s - 1.6666654611e-1) * s * t + t
    cosine = (2.443315711809948e-5 * s - 1.388731625493765e-3) * s + 4.166664568298827e-2
    cosine = cosine * s * s - 0.5 * s + 1.0
    x = cosine.to(tl.uint32, bitcast=True)
    y = sine.to(tl.uint32, bitcast=True)
    swap = tl.where((b >> 30 & 1) != 0, x ^ y, 0)  # two bits turn it to one of four quadrants
    first = (x ^ swap ^ (b & 0x80000000)).to(tl.float32, bitcast=True)
    second = (y ^ swap ^ ((b ^ (b << 1)) & 0x80000000)).to(tl.float32, bitcast=True)
    return r * first, r * second


@triton.jit
def _normal(key, position, tile):
    """Return the four rows of some tiles, (T, 16) each."""
    counter = tile[:, None] * LANES_ + tl.arange(0, LANES_)[None, :]
    word = tl.zeros_like(counter) + position
    a, b, c, d = tl.philox(
        key,
        (counter & 0xFFFFFFFF).to(tl.uint32),
        (counter >> 32).to(tl.uint32),
        (word & 0xFFFFFFFF).to(tl.uint32),
        (word >> 32).to(tl.uint32),
    )
    e0, e1 = _box_muller(a, b)
    e2, e3 = _box_muller(c, d)
    return e0, e1, e2, e3


@triton.jit
def _next_draw(counters, key, prefix):
    """Count a draw and set its key: `mix` of noise.py, of which `prefix` is all but the last number."""
    draws = tl.load(counters)
    x = (tl.load(prefix) ^ draws).to(tl.uint64, bitcast=True) + 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    tl.store(key, (x ^ (x >> 31)).to(tl.int64, bitcast=True))
    tl.store(counters, draws + 1)


# --- where things lie ---


@triton.jit
def _place(blocks, pieces):
    """Return what this program works on.

    Returns:
        The parameter (its number here and its position among the optimizer's), the index of the piece's first element
        within it, the number of its elements, where they start in the flat state and in the parameter's memory, and the
        first tile.
    """
    at = tl.program_id(0)
    row = pieces + 7 * tl.load(blocks + at)
    first = tl.load(row + 2)
    tile = first // TILE_ + (at - tl.load(row + 6)) * TILES_
    return tl.load(row), tl.load(row + 1), first, tl.load(row + 3), tl.load(row + 4), tl.load(row + 5), tile


@triton.jit
def _put(out, values):
    """Write numbers that come with the launch."""
    for i in tl.static_range(len(values)):
        tl.store(out + i, values[i])


# --- Algorithm 1 ---


@triton.jit
def _draw(blocks, pieces, addresses, key, mean, hess, ess, delta, DTYPE: tl.constexpr, NOISE_ONLY: tl.constexpr):
    """θ = m + σε, or ε."""
    which, position, first, count, at, within, tile = _place(blocks, pieces)
    tiles = tile + tl.arange(0, TILES_)
    index = tiles[:, None] * TILE_ + tl.arange(0, LANES_)[None, :] - first
    eps = _normal(tl.load(key), position, tiles)
    theta = tl.load(addresses + which).to(tl.pointer_type(DTYPE)) + within
    for row in tl.static_range(4):
        i = index + row * LANES_
        inside = (i >= 0) & (i < count)
        value = eps[row]
        if not NOISE_ONLY:
            m = tl.load(mean + at + i, mask=inside, other=0.0)
            h = tl.load(hess + at + i, mask=inside, other=1.0)
            value = m + value / tl.sqrt_rn(ess * (h + delta))
        tl.store(theta + i, value.to(DTYPE), mask=inside)


@triton.jit
def _look(blocks, pieces, gradients, bad, DTYPE: tl.constexpr):
    """Note whether a gradient is not finite."""
    which, _, first, count, _, within, tile = _place(blocks, pieces)
    address = tl.load(gradients + which)
    i = tile * TILE_ + tl.arange(0, TILES_ * TILE_) - first
    there = (i >= 0) & (i < tl.where(address != NO_GRADIENT_, count, 0))
    ghat = tl.load(address.to(tl.pointer_type(DTYPE)) + within + i, mask=there, other=0.0).to(tl.float32)
    exponent = ghat.to(tl.uint32, bitcast=True) & 0x7F800000
    tl.store(bad, 1, mask=tl.max((exponent == 0x7F800000).to(tl.int32), axis=0) != 0)


@triton.jit
def _bias(x, n):
    """1 − (1 − x)ⁿ by repeated squaring, without a difference of two numbers near 1."""
    result = x * 0.0
    while n > 0:
        if n & 1 != 0:
            result += x - result * x
        x = 2 * x - x * x
        n = n >> 1
    return result


@triton.jit
def _update(
    blocks,
    pieces,
    addresses,
    gradients,
    key,
    mean,
    momentum,
    hess,
    steps,
    bad,
    lr,
    lr_factor,
    beta1_less,
    beta2_less,
    half_square,
    clip_radius,
    ess,
    delta,
    batch_size,
    PRICE: tl.constexpr,
    DEBIAS: tl.constexpr,
    LR_ON_DEVICE: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Make a step, unless a gradient is not finite, and put the mean into the parameters."""
    which, position, first, count, at, within, tile = _place(blocks, pieces)
    tiles = tile + tl.arange(0, TILES_)
    index = tiles[:, None] * TILE_ + tl.arange(0, LANES_)[None, :] - first
    address = tl.load(gradients + which)
    moves = (address != NO_GRADIENT_) & (tl.load(bad) == 0)
    ghats = address.to(tl.pointer_type(DTYPE)) + within
    theta = tl.load(addresses + which).to(tl.pointer_type(DTYPE)) + within
    eps = _normal(tl.load(key), position, tiles)
    bias = 1.0
    if DEBIAS:
        bias = _bias(beta1_less, tl.load(steps + which) + 1)
    rate = lr_factor
    if LR_ON_DEVICE:
        rate *= tl.load(lr).to(tl.float32)
    else:
        rate *= lr
    for row in tl.static_range(4):
        i = index + row * LANES_
        inside = (i >= 0) & (i < count)
        moving = (i >= 0) & (i < tl.where(moves, count, 0))
        m = tl.load(mean + at + i, mask=inside, other=0.0)
        g = tl.load(momentum + at + i, mask=inside, other=0.0)
        h = tl.load(hess + at + i, mask=inside, other=1.0)
        ghat = tl.load(ghats + i, mask=moving, other=0.0).to(tl.float32)
        # ĥ = ĝ(θ − m)/σ² = ĝε/σ, or B ĝ²
        hhat = ghat * eps[row] * tl.sqrt_rn(ess * (h + delta)) if PRICE else ghat * ghat * batch_size
        # g ← β₁g + (1 − β₁)ĝ
        g_new = g + beta1_less * (ghat - g)
        # h ← β₂h + (1 − β₂)ĥ + ½(1 − β₂)²(h − ĥ)²/(h + δ)
        change = hhat - h
        h_new = h + beta2_less * change + half_square * (change * change / (h + delta))
        # m ← m − α clip((g/(1 − β₁ᵗ) + δm)/(h + δ), ±ξ), with 1 − β₁ᵗ taken out of the bracket
        step = (g_new + bias * delta * m) / (h_new + delta)
        bound = clip_radius * bias
        m_new = m - rate / bias * tl.minimum(tl.maximum(step, -bound), bound)
        tl.store(momentum + at + i, g_new, mask=moving)
        tl.store(hess + at + i, h_new, mask=moving)
        tl.store(mean + at + i, m_new, mask=moving)
        tl.store(theta + i, tl.where(moves, m_new, m).to(DTYPE), mask=inside)


@triton.jit
def _count(counters, steps, gradients, bad, n, BLOCK: tl.constexpr):
    """Count the step for each parameter that has made it, or that it was left out."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    left_out = tl.load(bad)
    there = i < tl.where(left_out == 0, n, 0)
    moved = tl.load(gradients + i, mask=there, other=NO_GRADIENT_) != NO_GRADIENT_
    tl.store(steps + i, tl.load(steps + i, mask=moved) + 1, mask=moved)
    if tl.program_id(0) == 0:
        tl.store(counters + 1, tl.load(counters + 1) + left_out)


def try_out(device: torch.device) -> None:
    """Raise whatever keeps Triton from running on a device: its version, a missing compiler, the driver."""
    _put[(1,)](torch.zeros(1, dtype=torch.int64, device=device), (NO_GRADIENT,))


class Kernels:
    """The kernels over the state of some parameters of one type.

    Args:
        flat: the state.
        parameters: this rank's part of each, contiguous.
        steps: how many steps each has made.
        draws: how many draws were made.
        skipped: how many steps were left out.
    """

    def __init__(
        self, flat: Flat, parameters: Sequence[Tensor], steps: Sequence[int], draws: int, skipped: int
    ) -> None:
        self.flat = flat
        self.dtype = _DTYPES[parameters[0].dtype]
        device = flat.mean.device
        rows: list[tuple[int, ...]] = []
        blocks: list[int] = []
        before = 0
        for which, (p, parts) in enumerate(zip(parameters, flat.pieces)):
            for at, count, position, first in parts:
                tiles = -(-(first % TILE + count) // TILE) if count else 0
                rows.append((which, position, first, count, at, at - before, len(blocks)))
                blocks += [len(rows) - 1] * -(-tiles // TILES)
            before += p.numel()
        self.pieces = torch.tensor(rows, dtype=torch.int64, device=device)
        self.blocks = torch.tensor(blocks, dtype=torch.int32, device=device)
        self.addresses, self.gradients = torch.zeros(2, len(parameters), dtype=torch.int64, device=device).unbind()
        self.known: dict[int, list[int]] = {}  # what was last put into each table of addresses
        self.has_graph = False
        self.steps = torch.tensor(steps, dtype=torch.int32, device=device)
        self.counters = torch.tensor([draws, skipped], device=device)
        """Of draws, and of steps that were left out."""
        self.bad = torch.zeros(1, dtype=torch.int32, device=device)
        """1 where a gradient of this step is not finite, its own or another's."""
        self.key, self.other_key, self.prefix = torch.zeros(3, 1, dtype=torch.int64, device=device).unbind()
        self.prefix_of: tuple[int, ...] = ()  # what `prefix` was last set from

    def set_key(self, key: int) -> None:
        """Set that of the training draw."""
        self.key.fill_(_signed(key))

    def next_draw(self, *prefix: int) -> None:
        """Go on to the next training draw, whose key is `mix` of these numbers and its own."""
        if prefix != self.prefix_of:
            self.prefix_of = prefix
            self.prefix.fill_(_signed(mix(*prefix)))
        with torch.cuda.device_of(self.key):
            _next_draw[(1,)](self.counters, self.key, self.prefix)

    def draw(self, parameters: Sequence[Tensor], ess: float, delta: float, key: int | None = None) -> None:
        """Write θ = m + σε to the parameters, with the noise of the training draw or of a key."""
        self._locate(self.addresses, parameters)
        self._draw(self._key(key), float(ess), float(delta), self.dtype, False)

    def normal(self, key: int, out: Sequence[Tensor]) -> None:
        """Write the noise of all parameters to contiguous float32 tensors."""
        self._locate(self.addresses, out)
        self._draw(self._key(key), 1.0, 0.0, tl.float32, True)

    def look(self, gradients: Sequence[Tensor | None]) -> None:
        """Set `bad` to whether a gradient is not finite; they are contiguous and of the parameters' type."""
        self._locate(self.gradients, gradients)
        self.bad.zero_()
        self._launch(_look, self.gradients, self.bad, self.dtype)

    def update(self, parameters: Sequence[Tensor], group: dict[str, Any]) -> None:
        """Make a step with the gradients that were looked at, and write the mean to the parameters."""
        self._locate(self.addresses, parameters)
        on_device = isinstance(group["lr"], Tensor) and group["lr"].device == self.key.device
        price = group["hess_approx"] == "price"
        self._launch(
            _update,
            self.addresses,
            self.gradients,
            self.key,
            *self.flat[:3],
            self.steps,
            self.bad,
            group["lr"] if on_device else float(group["lr"]),
            float(group["hess_init"] + group["weight_decay"]) if group["rescale_lr"] else 1.0,
            float(1 - group["beta1"]),
            float(1 - group["beta2"]),
            (1 - group["beta2"]) ** 2 / 2,
            float(group["clip_radius"]),
            float(group["ess"]),
            float(group["weight_decay"]),
            0.0 if price else float(group["batch_size"]),
            price,
            group["debias"],
            on_device,
            self.dtype,
        )
        n = len(self.steps)
        with torch.cuda.device_of(self.key):
            _count[(-(-n // 256),)](self.counters, self.steps, self.gradients, self.bad, n, 256)

    def _key(self, key: int | None) -> Tensor:
        return self.key if key is None else self.other_key.fill_(_signed(key))

    def _draw(self, key: Tensor, *arguments: Any) -> None:
        self._launch(_draw, self.addresses, key, self.flat.mean, self.flat.hess, *arguments)

    def _launch(self, kernel: Any, *arguments: Any) -> None:
        if len(self.blocks):
            with torch.cuda.device_of(self.key):
                kernel[(len(self.blocks),)](self.blocks, self.pieces, *arguments)

    def _locate(self, table: Tensor, tensors: Sequence[Tensor | None]) -> None:
        """Put tensors' addresses into a table on the device, unless they are there already.

        They travel as the arguments of launches. A copy from the host would have to wait, or to come from pinned
        memory, which a CUDA graph that is captured would read again whenever it is replayed. Where there is a graph,
        addresses are put each time: it puts its own whenever it is replayed, and nobody here knows when that is.
        """
        addresses = [NO_GRADIENT if x is None else x.data_ptr() or EMPTY for x in tensors]
        self.has_graph |= bucket.capturing()
        if self.has_graph or self.known.get(id(table)) != addresses:
            self.known[id(table)] = addresses
            with torch.cuda.device_of(table):
                for at in range(0, len(addresses), AT_ONCE):
                    _put[(1,)](table[at:], tuple(addresses[at : at + AT_ONCE]))


def _signed(key: int) -> int:
    """Return 64 bits as a signed number, as tensors have them."""
    return key - (1 << 64) if key >> 63 else key
