"""One rank of a run with sharded parameters, started by test_ivon_shards.py: python shards.py RANK WORLD FOLDER WHAT...

WHAT is how the parameters are sharded, `fsdp` or `tensor`, with `save` (6 steps, then a checkpoint, then 3 more) or
`load-N` (3 steps from the checkpoint of N ranks in FOLDER). Rank 0 writes what all ranks hold together to
FOLDER/WHAT-WORLD.safetensors.
"""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from varlora import IVON

ROWS = 8
"""Of all ranks, each step."""
SETTINGS: dict[str, Any] = {
    "lr": 0.05,
    "ess": 100.0,
    "hess_init": 0.5,
    "beta2": 0.95,
    "clip_radius": 0.5,
    "seed": 3,
}


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 88), nn.Tanh(), nn.Linear(88, 7, bias=False))  # 7 rows do not divide by 2 or 4


def make_optimizer(model: nn.Module) -> IVON:
    return IVON(model.named_parameters(), **SETTINGS)


def steps(model: nn.Module, optimizer: IVON, numbers: range, mine: slice = slice(0, ROWS)) -> dict[str, Tensor]:
    """Make steps on this rank's rows of each; return the last draw."""
    drawn = {}
    for step in numbers:
        x = torch.randn(ROWS, 20, generator=torch.Generator().manual_seed(step))
        optimizer.train()
        drawn = whole(dict(model.named_parameters()))
        out = model(x[mine])
        optimizer.zero_grad()
        (out - x[mine, :7]).square().mean().backward()
        optimizer.step()
    return drawn


def whole(tensors: dict[str, Any]) -> dict[str, Tensor]:
    """Put shards together."""
    return {name: (x.full_tensor() if hasattr(x, "full_tensor") else x).detach().clone() for name, x in tensors.items()}


def results(model: nn.Module, optimizer: IVON, drawn: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a run ended with: the last draw, the weights, the state and the posterior."""
    states = {
        f"{key}.{n}": optimizer.state[p][key] for n, p in model.named_parameters() for key in ("momentum", "hess")
    }
    posterior = optimizer.posterior()
    return {
        **{f"draw.{name}": x for name, x in drawn.items()},
        **{f"weights.{name}": x for name, x in whole(dict(model.named_parameters())).items()},
        **{f"std.{name}": x.contiguous() for name, x in posterior.std.items()},
        **whole(states),
    }


def check_left_out(model: nn.Module, optimizer: IVON, rank: int) -> None:
    """A step is left out on all ranks where one alone has a gradient that is not finite."""
    before = [p.to_local().clone() for p in model.parameters()]
    optimizer.train()
    model(torch.ones(ROWS, 20)).sum().backward()
    if rank == 1:
        next(model.parameters()).grad.to_local().view(-1)[0] = math.nan
    optimizer.step()
    optimizer.zero_grad()
    assert optimizer.skipped_steps == 1
    assert all(torch.equal(p.to_local(), value) for p, value in zip(model.parameters(), before))


def run(what: str, rank: int, world: int, folder: Path) -> None:
    how, do, *saved_by = what.split("-")
    mesh, model = init_device_mesh("cpu", (world,)), make_model()
    if how == "fsdp":
        fully_shard(model[0], mesh=mesh)
        fully_shard(model, mesh=mesh)
        mine = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
    else:
        parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
        mine = slice(0, ROWS)
    optimizer = make_optimizer(model)
    if do == "save":
        steps(model, optimizer, range(6), mine)
        weights, state = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder / f"{how}-{world}")
    else:
        weights, state = get_state_dict(model, optimizer)  # to be filled: nothing is drawn yet
        dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder / f"{how}-{saved_by[0]}")
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    for p in model.parameters():
        assert p.to_local().numel() < p.numel()
        for key in ("mean", "momentum", "hess"):
            state = optimizer.state[p][key]
            assert (state.placements, state.device_mesh) == (p.placements, p.device_mesh)
            assert state.to_local().shape == p.to_local().shape
    drawn = steps(model, optimizer, range(6, 9), mine)
    found = results(model, optimizer, drawn)
    if rank == 0:
        save_file(found, folder / f"{what}-{world}.safetensors")
    check_left_out(model, optimizer, rank)


def main() -> None:
    rank, world, folder, *cases = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), *sys.argv[4:]
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store-{cases[0]}-{world}", rank=rank, world_size=world
    )
    for what in cases:
        run(what, rank, world, folder)
    dist.barrier()
    os._exit(0)  # as in ranks.py


if __name__ == "__main__":
    main()
