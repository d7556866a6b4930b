"""One rank of a data-parallel run, started by test_ivon_ranks.py: python ranks.py RANK WORLD FOLDER CASE...

The loss of a row x is Σ c (p − x)² / 2 with a curvature c that is known, so the Hessian is c whatever is drawn. Each
case writes what its rank ended with to FOLDER/CASE-RANK.safetensors.
"""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn

from varlora import IVON

ROWS = 8
"""Of each rank, each step."""
CURVATURE = {"price": 3.0, "gradsq": 1.0}
"""For the squared gradient to be the Hessian, c has to be the rows' precision."""
BETA2 = 0.99
"""100 steps forget two thirds of h₀. Much less, and the rule's own second order, (1 − β₂)²(ĥ − h)²/2h, shows."""
SPREAD = {"price": 0.1, "gradsq": 1.0}


class Weights(nn.Module):
    """Two parameters, of several types and shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(60, 50)), nn.Parameter(torch.zeros(1000))

    def forward(self, x: torch.Tensor, curvature: float) -> torch.Tensor:
        p = torch.cat([self.a.view(-1), self.b])
        return (curvature * (p - x).square() / 2).sum(-1).mean()


def run(case: str, rank: int, world: int) -> dict[str, torch.Tensor]:
    """A case is estimator, noise (`shared` or `own`), way of use and number of draws, such as price-own-train-1.

    A fifth part is the number of micro-batches of each draw.
    """
    approx, noise, way, samples, *micro = case.split("-")
    batches = int(micro[0]) if micro else 1
    torch.manual_seed(rank)  # as users seldom seed all alike
    model = nn.parallel.DistributedDataParallel(Weights())
    optimizer = IVON(
        model.named_parameters(),
        lr=0.02,
        ess=1.0 if approx == "price" else 1e4,  # σ² = 1/3, or so small that the gradient's variance is the rows'
        hess_init=CURVATURE[approx],
        beta2=BETA2,
        clip_radius=1.0,
        mc_samples=int(samples),
        hess_approx=approx,
        batch_size=world * ROWS * batches * (1 if way == "context" else int(samples)),
        noise_per_rank=noise == "own",
    )
    source = torch.Generator().manual_seed(rank)

    def backward(batch: int, of: int) -> None:
        """Of a micro-batch, the last of which alone is averaged over ranks with those before it."""
        x = SPREAD[approx] * torch.randn(ROWS, 4000, generator=source)
        with nullcontext() if batch == batches - 1 else model.no_sync():
            (model(x, CURVATURE[approx]) / of).backward()

    for step in range(100):
        optimizer.zero_grad()
        for _ in range(int(samples)):
            if way == "context":
                with optimizer.sampled_params(train=True):
                    for batch in range(batches):
                        backward(batch, batches)
            else:
                for batch in range(batches):
                    optimizer.train()
                    backward(batch, batches * int(samples))
        nn.utils.clip_grad_norm_(model.parameters(), 1e3 if step else 20.0)
        optimizer.step()
    return {
        f"{name}.{key}": optimizer.state[p][key].clone()
        for name, p in model.named_parameters()
        for key in ("mean", "momentum", "hess")
    } | {name: p.detach().clone() for name, p in model.named_parameters()}


def main() -> None:
    rank, world, folder, *cases = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), *sys.argv[4:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    for case in cases:
        save_file(run(case, rank, world), folder / f"{case}-{rank}.safetensors")
    dist.barrier()
    # At once, not by way of the interpreter's end. Once DDP has seen a group, its threads outlive it, and one that lets
    # go of a reduced tensor when there is no interpreter any more aborts the process.
    os._exit(0)


if __name__ == "__main__":
    main()
