"""What docs/works_everywhere.md says of Lightning beyond the table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from everywhere.checks import check_draws, check_twin
from everywhere.rows import Automatic, Lightning, Manual, Module, Task
from everywhere.twin import expected
from lightning.pytorch.core.optimizer import LightningOptimizer

from varlora import IVON

F32 = torch.float32


class Made(Lightning):
    """The row with another module."""

    def __init__(self, module: type[Module]) -> None:
        self.made = module

    def module(self, model: Any, optimizer: IVON, task: Task) -> Module:
        return self.made(model, optimizer, task)


class Closure(Manual):
    """Manual optimization that hands `step` a closure."""

    def training_step(self, batch: Any, index: int) -> None:
        optimizer = self.optimizers()

        def closure() -> Any:
            optimizer.zero_grad()
            loss = self.model(**batch).loss
            self.manual_backward(loss)
            return loss

        optimizer.step(closure)


@pytest.mark.parametrize("samples", [1, 2])
def test_manual_optimization_with_a_closure(samples: int, tmp_path: Path) -> None:
    task = Task()
    outcome = Made(Closure).run(task, tmp_path, mc_samples=samples)
    check_draws(outcome, task, draws=samples, passes=samples)
    check_twin(outcome, expected((task, F32), samples=samples, closure=True))


def test_what_a_context_of_the_wrapper_refuses_the_optimizer_refuses() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = IVON([p], lr=0.1, ess=10.0, hess_init=1.0, mc_samples=2)
    wrapper: Any = LightningOptimizer(optimizer)
    with wrapper.sampled_params(train=True):
        p.square().sum().backward()
        with pytest.raises(RuntimeError, match=r"Leave `with optimizer.sampled_params\(train=True\):` first"):
            optimizer.step()  # which the wrapper's calls
    with wrapper.sampled_params():
        with pytest.raises(RuntimeError, match=r"Leave `with optimizer.sampled_params\(\):` first"):
            optimizer.train()
    optimizer.step()
    assert optimizer.state[p]["step"] == 1


def test_automatic_optimization_clips_each_draw_on_its_own(tmp_path: Path) -> None:
    """As Lightning clips within the closure."""
    task = Task(clip=0.1)
    outcome = Made(Automatic).run(task, tmp_path, mc_samples=2)
    check_twin(outcome, expected((task, F32), samples=2, closure=True))


def test_lightning_refuses_to_clip_with_a_grad_scaler(tmp_path: Path) -> None:
    """As it does for every optimizer that unscales by itself, such as a fused AdamW."""
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        Made(TrainedByHand).run(Task(precision="fp16", clip=0.1), tmp_path)


class TrainedByHand(Automatic):
    def on_train_batch_start(self, batch: Any, index: int) -> None:
        self.optimizers().optimizer.train()


def test_accumulation_without_train_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="nothing was drawn"):
        Made(Automatic).run(Task(micro=3), tmp_path)


def test_a_grad_scaler_without_train_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="nothing was drawn"):
        Made(Automatic).run(Task(precision="fp16"), tmp_path)
