"""What the tests of IVON share: a few parameters, a loss that is no quadratic, and the three ways of use."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from reference.noise import fill_normal
from torch import Tensor, nn

from varlora.optim import bucket
from varlora.optim.bucket import TRAIN
from varlora.optim.ivon import IVON
from varlora.optim.noise import mix

SHAPES = ((3, 4), (7,), (), (2, 1, 20), (100,))
SETTINGS: dict[str, Any] = {"lr": 0.05, "ess": 50.0, "hess_init": 0.7, "beta2": 0.95, "clip_radius": 0.5, "seed": 0}
STATE = ("mean", "momentum", "hess")

Loss = Callable[[], Tensor]


def make_parameters(dtype: torch.dtype = torch.float32, shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[Any]:
    source = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=source, dtype=torch.float64).to(dtype)) for shape in shapes]


def make(dtype: torch.dtype = torch.float32, **settings: Any) -> tuple[list[Any], IVON]:
    parameters = make_parameters(dtype)
    named = [(f"p{i}", p) for i, p in enumerate(parameters)]
    return parameters, IVON(named, **(SETTINGS | settings))


def make_loss(parameters: Sequence[Tensor], key: int, scale: float = 1.0) -> Loss:
    """Another smooth loss of each parameter for each key: `scale · Σ ½ (1 + i)(p − x)² + sin p`."""
    source = torch.Generator().manual_seed(key)
    data = [torch.randn(p.shape, generator=source, dtype=torch.float64).to(p.dtype) for p in parameters]

    def loss() -> Tensor:
        terms = [((1 + i) / 2 * (p - x).square() + p.sin()).sum() for i, (p, x) in enumerate(zip(parameters, data))]
        return scale * torch.stack(terms).sum()

    return loss


def by_context(optimizer: IVON, losses: Sequence[Loss]) -> None:
    """One step from a draw for each loss."""
    for loss in losses:
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad()
            loss().backward()
    optimizer.step()


def by_train(optimizer: IVON, losses: Sequence[Loss]) -> None:
    """One step, each loss a micro-batch."""
    for loss in losses:
        optimizer.train()
        loss().backward()
    optimizer.step()
    optimizer.zero_grad()


def by_closure(optimizer: IVON, losses: Sequence[Loss]) -> Any:
    """One step, calling the closure once for each loss."""
    waiting = iter(losses)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = next(waiting)()
        loss.backward()
        return loss

    return optimizer.step(closure)


WAYS = {"context": by_context, "train": by_train, "closure": by_closure}


def start_ranks(script: str, world: int, *arguments: object) -> None:
    """Run a script in a process for each rank, as `script RANK WORLD ARGUMENTS...`, and wait for all."""
    path = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    processes = [
        subprocess.Popen(
            [sys.executable, script, *map(str, (rank, world, *arguments))],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        for rank in range(world)
    ]
    errors = [process.communicate(timeout=300)[1][-1000:] for process in processes]
    assert not any(process.returncode for process in processes), errors


def values(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [p.detach().clone() for p in parameters]


def noise_of(optimizer: IVON) -> list[Tensor]:
    """The noise of the last training draw, of each parameter."""
    now = optimizer.param_groups[0]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    noise = [torch.empty(p.shape) for p in parameters]
    fill_normal(mix(now["seed"], TRAIN, now["draws"] - 1), [(x, i, 0) for i, x in enumerate(noise)])
    return [x.to(optimizer.state[p]["mean"].dtype) for x, p in zip(noise, parameters)]


def assert_kernels_in_use(optimizer: IVON) -> None:
    """Those that there are for where the parameters lie, which are for a state in float32."""
    for made in optimizer._buckets:
        kind = bucket.kernels_for(made.mean.device) if made.mean.dtype == torch.float32 else None
        assert (made.kernels is not None, made.gpu is not None) == (kind == "native", kind == "triton")


def snapshot(parameters: Sequence[Tensor], optimizer: IVON) -> list[Tensor]:
    """Parameters, mean, momentum, Hessian and step count, as copies."""
    states = [optimizer.state[p] for p in parameters]
    return (
        values(parameters)
        + [state[name].clone() for state in states for name in STATE]
        + [torch.tensor(int(state["step"])) for state in states]
    )


def run(
    optimizer: IVON, parameters: Sequence[Tensor], steps: Iterable[int], samples: int = 1, way: str = "context"
) -> None:
    """Make these steps, each number a step with losses of its own."""
    for step in steps:
        WAYS[way](optimizer, [make_loss(parameters, 100 * step + s) for s in range(samples)])


def same(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    """Whether all are equal bit for bit, type included."""
    return len(left) == len(right) and all(
        a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(left, right, strict=True)
    )
