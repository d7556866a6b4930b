"""IVON with sharded parameters, by FSDP2 and tensor parallelism: the run of one process, to rounding."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from optim import shards
from optim.ivon_helpers import start_ranks
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from varlora.optim.ivon import IVON


@pytest.fixture(autouse=True)
def _arithmetic() -> None:
    """Ranks are processes of their own, with the kernels if there are any: nothing here runs twice."""


@pytest.fixture(scope="module")
def alone() -> dict[str, Tensor]:
    """What a process that has all ends with."""
    model = shards.make_model()
    optimizer = shards.make_optimizer(model)
    shards.steps(model, optimizer, range(6))
    return shards.results(model, optimizer, shards.steps(model, optimizer, range(6, 9)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of four ranks after six steps, what two ranks made of them, and by tensor parallelism the reverse."""
    folder = tmp_path_factory.mktemp("shards")
    start_ranks(shards.__file__, 4, folder, "fsdp-save", "tensor-save")
    start_ranks(shards.__file__, 2, folder, "fsdp-load-4", "tensor-load-4", "tensor-save")
    start_ranks(shards.__file__, 4, folder, "tensor-load-2")
    return folder


@pytest.mark.parametrize("run", ["fsdp-save-4", "tensor-save-4", "tensor-save-2"])
def test_shards_draw_and_step_as_the_whole(run: str, folder: Path, alone: dict[str, Tensor]) -> None:
    check(load_file(folder / f"{run}.safetensors"), alone)


@pytest.mark.parametrize("run", ["fsdp-load-4-2", "tensor-load-4-2", "tensor-load-2-4"])
def test_a_checkpoint_goes_on_with_another_number_of_ranks(run: str, folder: Path, alone: dict[str, Tensor]) -> None:
    check(load_file(folder / f"{run}.safetensors"), alone)


def check(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=2e-6)


def test_a_step_with_gradients_of_zero_makes_the_state_and_nothing_else() -> None:
    """As torch.distributed.checkpoint does before it reads."""
    p = nn.Parameter(torch.ones(5))
    optimizer = IVON([("p", p)], lr=0.1, ess=10.0, hess_init=1.0, seed=0)
    p.grad = torch.zeros(5)
    assert optimizer.step() is None
    assert torch.equal(optimizer.state[p]["mean"], torch.ones(5))
    assert optimizer.state[p]["step"] == 0
    p.grad = torch.ones(5)
    with pytest.raises(RuntimeError, match="nothing was drawn"):
        optimizer.step()


@pytest.fixture
def sharded(tmp_path: Path) -> Iterator[nn.Parameter]:
    """A parameter that is sharded over one rank, this process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield nn.Parameter(distribute_tensor(torch.ones(4, 3), init_device_mesh("cpu", (1,)), [Shard(0)]))
    dist.destroy_process_group()


def test_what_sharded_parameters_cannot_have_is_refused(sharded: nn.Parameter) -> None:
    settings: dict[str, Any] = {"lr": 0.1, "ess": 10.0, "hess_init": 1.0}
    with pytest.raises(ValueError, match="never see a gradient of their own"):
        IVON([sharded], noise_per_rank=True, **settings).train()
    several = IVON([sharded], mc_samples=2, **settings)
    with pytest.raises(RuntimeError, match="Expected `mc_samples=1` under `train\\(\\)`"):
        several.train()
    for _ in range(2):  # but by contexts
        with several.sampled_params(train=True):
            several.zero_grad()
            (sharded * 3).sum().backward()
    several.step()
    assert (several.state[sharded]["hess"].full_tensor() != 1).all()
