"""IVON's noise: standard normal, and a function of seed, draw and position alone."""

from __future__ import annotations

import hashlib
import itertools
import subprocess
import sys
from typing import Any

import torch
from optim.ivon_helpers import make, run
from scipy import stats
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from varlora.optim import native
from varlora.optim.ivon import IVON
from varlora.optim.noise import Layout, Piece, mix

SIZES = (5, 30_000, 100_000, 70_000)


def draws(number: int, seed: int | None = 0, sizes: tuple[int, ...] = SIZES, train: bool = True) -> list[list[Tensor]]:
    """Noise of so many draws, as (draw, position)."""
    parameters = [nn.Parameter(torch.zeros(size)) for size in sizes]
    optimizer = IVON(parameters, lr=0.1, ess=1.0, hess_init=1.0, seed=seed)  # σ = 1: parameters are the noise
    noise = []
    for _ in range(number):
        with optimizer.sampled_params(train=train):
            noise.append([p.detach().clone() for p in parameters])
        optimizer.step()
    return noise


def digest(noise: list[list[Tensor]]) -> str:
    return hashlib.sha256(b"".join(x.numpy().tobytes() for draw in noise for x in draw)).hexdigest()


def some_digest() -> str:
    return digest(draws(2) + draws(2, train=False))


def test_noise_does_not_depend_on_threads_or_process() -> None:
    found = {some_digest()}
    for threads in (2, 3):
        torch.set_num_threads(threads)
        found.add(some_digest())
    script = "from optim.test_ivon_noise import some_digest; print(some_digest())"
    if native.library() is None:
        script = f"from varlora.optim import native; native.library = lambda: None; {script}"
    environment = {"PYTHONPATH": ":".join(sys.path), "PATH": ""}
    found.add(subprocess.check_output([sys.executable, "-c", script], env=environment, text=True).strip())
    assert len(found) == 1


def test_noise_depends_on_seed_draw_and_position_alone() -> None:
    first, second = draws(2)
    assert torch.equal(draws(1, sizes=(9, 30_000))[0][1], first[1])  # whatever the neighbours
    assert not torch.equal(first[1], second[1])
    assert not torch.equal(draws(1, seed=1)[0][1], first[1])
    assert not torch.equal(draws(1, train=False)[0][1], first[1])
    assert not torch.equal(first[1], first[2][:30_000])


def test_noise_is_standard_normal_and_unrelated_between_draws_and_positions() -> None:
    noise = [draw[1:] for draw in draws(4)] + [draw[1:] for draw in draws(2, train=False)]
    for draw in noise:
        for x in draw:
            assert stats.kstest(x.numpy(), "norm").pvalue > 1e-3
    rows = torch.stack([x[:30_000] for draw in noise for x in draw])
    correlation = torch.corrcoef(rows) - torch.eye(len(rows))
    assert correlation.abs().max() < 5 / 30_000**0.5
    assert (rows[:, 1:] * rows[:, :-1]).mean(1).abs().max() < 5 / 30_000**0.5
    small = torch.stack([draw[0] for draw in draws(2_000, sizes=(5,))])  # over draws, not over entries
    assert all(stats.kstest(x.numpy(), "norm").pvalue > 1e-3 for x in small.T)


def test_seeds_come_from_the_generator_and_neighbours_are_unrelated() -> None:
    def seed(**source: object) -> int:
        return IVON([nn.Parameter(torch.zeros(1))], 0.1, 1.0, 1.0, **source).param_groups[0]["seed"]

    assert seed(generator=torch.Generator().manual_seed(5)) == seed(generator=torch.Generator().manual_seed(5))
    assert seed(generator=torch.Generator().manual_seed(5)) != seed(generator=torch.Generator().manual_seed(6))
    torch.manual_seed(0)
    first = seed()
    assert seed() != first
    torch.manual_seed(0)
    assert seed() == first
    numbers = itertools.product(range(4), (0, 1), range(50), range(50))  # seed, stream, draw, position
    keys = {mix(*each) for each in numbers}
    assert len(keys) == 20_000
    assert len({key & 0xFFFFFFFF for key in keys}) > 19_990  # a CPU generator takes 32 bits


def test_training_leaves_the_global_generator_alone() -> None:
    parameters, optimizer = make()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    run(optimizer, parameters, range(2))
    with optimizer.sampled_params():
        pass
    assert torch.equal(torch.get_rng_state(), before)


class Operations(TorchDispatchMode):
    """Counts the operations on a device."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.count = device, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        self.count += isinstance(found, Tensor) and found.device.type == self.device
        return found


def test_off_the_cpu_all_parameters_noise_is_made_at_once() -> None:
    """Of 4 parameters or of 100: so many operations, and a few for each parameter to take its own."""
    counts = []
    for parameters in (4, 100):
        out = [torch.empty(50, 70, device="meta") for _ in range(parameters)]
        layout = Layout([Piece(0, 50 * 70, position, 0) for position in range(parameters)], torch.device("meta"))
        with Operations("meta") as operations:
            layout.fill(0, out)
        counts.append(operations.count)
    assert counts[1] - counts[0] <= 96 * 5
    assert counts[1] < 1_000
