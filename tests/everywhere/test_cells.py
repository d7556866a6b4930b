"""The cells of the table in docs/works_everywhere.md: a test or several for each column, run on every row.

The docstrings are what the page says of the columns.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from everywhere.cells import ON_A_GPU, column
from everywhere.checks import check_draws, check_twin, close
from everywhere.devices import moved, two_devices
from everywhere.other_device import Elsewhere
from everywhere.rows import (
    DECAY,
    SETTINGS,
    Compiled,
    Lightning,
    Row,
    Task,
    make_model,
    make_optimizer,
)
from everywhere.twin import expected
from helpers import same

F16, F32, F64, BF16 = torch.float16, torch.float32, torch.float64, torch.bfloat16
TASK = Task()


@column("float32")
def test_float32(row: Row, tmp_path: Path) -> None:
    """Every training pass runs at a draw of its own, every evaluation at the mean, and after each step the weights are
    the mean. Mean and Hessian are those of a slow twin written from the paper, here and in all that follows."""
    outcome = row.run(TASK, tmp_path)
    check_draws(outcome, TASK)
    check_twin(outcome, expected((TASK, F32)))


@column("bfloat16 autocast")
def test_bfloat16_autocast(row: Row, tmp_path: Path) -> None:
    """The same under autocast."""
    task = Task(precision="bf16")
    outcome = row.run(task, tmp_path)
    check_draws(outcome, task)
    check_twin(outcome, expected((task, F32)), 0.1)


@column("bfloat16 weights")
def test_bfloat16_weights(row: Row, tmp_path: Path) -> None:
    """The weights are the float32 mean or draw, rounded."""
    outcome = row.run(TASK, tmp_path, model=make_model().to(BF16))
    check_draws(outcome, TASK)
    assert {mean.dtype for mean in outcome.state("mean").values()} == {F32}
    check_twin(outcome, expected((TASK, BF16)), 0.1)


@column("float16, GradScaler")
def test_float16_with_a_grad_scaler(row: Row, tmp_path: Path) -> None:
    """The Hessian is the one of unscaled gradients. A step in which a gradient overflows is skipped and counted; mean
    and Hessian stay as they are, the schedule goes on. (`Trainer`, `SFTTrainer` and accelerate refuse float16 on a CPU;
    they were given what they use on a GPU, autocast and scaler, by hand.)"""
    task = Task(steps=4, precision="fp16", schedule=True)
    outcome = row.run(task, tmp_path, overflow_in=1)
    check_draws(outcome, task)
    assert outcome.optimizer.skipped_steps == 1
    assert same(outcome.watch.means[1], outcome.watch.means[0])
    assert not same(outcome.watch.means[2], outcome.watch.means[1])
    check_twin(outcome, expected((task, F32), overflow_step=1), 0.05)


@column("gradient accumulation")
def test_gradient_accumulation(row: Row, tmp_path: Path) -> None:
    """All micro-batches of a step run at the same draw, and the result is that of one large batch."""
    task = Task(micro=3)
    outcome = row.run(task, tmp_path)
    check_draws(outcome, task)
    check_twin(outcome, expected((task, F32)))


@column("gradient clipping")
def test_gradient_clipping(row: Row, tmp_path: Path) -> None:
    """The mean's and the Hessian's update see the same clipped gradient."""
    task = Task(clip=0.1)
    twin = expected((task, F32))
    assert min(twin.norms) > 2 * 0.1
    outcome = row.run(task, tmp_path)
    check_draws(outcome, task)
    check_twin(outcome, twin)


@column("gradient checkpointing")
def test_gradient_checkpointing(row: Row, tmp_path: Path) -> None:
    """The passes that are repeated in the backward pass run at the same draw as the forward pass."""
    task = Task(checkpointing=True)
    outcome = row.run(task, tmp_path)
    assert outcome.model.is_gradient_checkpointing
    check_draws(outcome, task)
    check_twin(outcome, expected((TASK, F32)))
    if row.eager:
        repeated = [weights for weights in outcome.watch.training for _ in range(2)]
        assert [same(one, other) for one, other in zip(outcome.watch.layers, repeated, strict=True)] == [True] * 6


@column("several samples")
def test_several_samples(row: Row, tmp_path: Path) -> None:
    """Two draws a step: the first micro-batches have one each, of three here. In Lightning's automatic optimization
    each draw sees the whole batch."""
    closure = type(row) is Lightning
    task = Task(micro=1 if closure else 3)
    outcome = row.run(task, tmp_path, mc_samples=2)
    check_draws(outcome, task, draws=2, passes=2 if closure else 3)
    check_twin(outcome, expected((task, F32), samples=2, closure=closure))


@column("learning-rate schedule")
def test_learning_rate_schedule(row: Row, tmp_path: Path) -> None:
    """A linear decay to 0 scales each step. `OneCycleLR` and `CyclicLR` take `cycle_momentum=False`: the momentum that
    they would set is not IVON's `beta1`."""
    task = Task(schedule=True)
    outcome = row.run(task, tmp_path)
    check_draws(outcome, task)
    check_twin(outcome, expected((task, F32)))


@column("EMA of the mean")
def test_ema_of_the_mean(row: Row, tmp_path: Path) -> None:
    """torch's `AveragedModel` (in Lightning its callback `EMAWeightAveraging`) averages means, and no draws."""
    task = Task(average=True)
    outcome = row.run(task, tmp_path)
    average = outcome.watch.means[0]
    for mean in outcome.watch.means[1:]:
        average = {name: value.lerp(mean[name], 1 - DECAY) for name, value in average.items()}
    close(outcome.watch.average, average)
    check_twin(outcome, expected((task, F32)))


@column("checkpoint and resume")
def test_checkpoint_and_resume(row: Row, tmp_path: Path) -> None:
    """A run that goes on from a checkpoint of the row's own kind ends in the same bits as one that was not stopped:
    weights, mean, momentum and Hessian."""
    task = Task(steps=4, schedule=True, save_at=2)
    whole = row.run(task, tmp_path / "whole")
    stopped = row.run(dataclasses.replace(task, stop=True), tmp_path / "cut")
    resumed = row.run(task, tmp_path / "cut", resume=True, seed=1)
    assert (len(stopped.watch.means), len(resumed.watch.means)) == (2, 2)
    assert same(resumed.everything(), whole.everything())
    check_twin(whole, expected((task, F32)))


@column("no gradient")
def test_parameters_without_gradient(row: Row, tmp_path: Path) -> None:
    """A layer that the loss does not reach is drawn like all others, and its mean and Hessian stay; what does not
    require a gradient is never touched."""
    model = make_model(unused=True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    outcome = row.run(TASK, tmp_path, model)
    check_draws(outcome, TASK)
    twin = expected((TASK, F32), unused=True)
    for name in ("unused.weight", "unused.bias"):
        assert torch.equal(outcome.state("mean")[name], before[name])
        assert (outcome.state("hess")[name] == SETTINGS["hess_init"]).all()
    frozen = "model.embed_tokens.weight"
    assert all(torch.equal(weights[frozen], before[frozen]) for weights in outcome.watch.training)
    assert torch.equal(outcome.watch.weights()[frozen], before[frozen])
    check_twin(outcome, twin)


@column("model moved")
def test_moved_before_training(row: Row, tmp_path: Path) -> None:
    """A model that was turned into another type after the optimizer was made, before training or between steps, goes
    on as one of that type, from the same mean and Hessian."""
    model = make_model()
    optimizer = make_optimizer(model)
    model.to(BF16)
    outcome = row.run(TASK, tmp_path, model, optimizer)
    assert same(outcome.everything(), row.run(TASK, tmp_path, make_model().to(BF16)).everything())


@pytest.mark.parametrize(("before", "after"), [(F32, F64), (F32, BF16), (BF16, F32), (BF16, F16)], ids=str)
@column("model moved")
def test_moved_between_steps(row: Row, before: torch.dtype, after: torch.dtype, tmp_path: Path) -> None:
    """A model that was turned into another type after the optimizer was made, before training or between steps, goes
    on as one of that type, from the same mean and Hessian."""
    first = row.run(Task(steps=1), tmp_path, make_model().to(before))
    mean = {name: value.double() for name, value in first.state("mean").items()}
    first.model.to(after)
    assert same({name: value.double() for name, value in first.optimizer.posterior().mean.items()}, mean)
    outcome = row.run(TASK, tmp_path, first.model, first.optimizer)
    check_draws(outcome, TASK)
    twin = expected((Task(steps=1), before), (TASK, after))
    check_twin(outcome, twin, 0.1 if BF16 in (before, after) else 1e-3)


@column("model moved")
def test_moved_to_another_device(row: Row, other_device: Elsewhere) -> None:
    """The same of a model that was moved to another device: whole, or, where what trains it would move it back, its
    layers."""
    other_device("everywhere.devices", "moved", row.name)


@column("model moved", gpu=ON_A_GPU)
def test_moved_to_a_gpu(row: Row, tmp_path: Path) -> None:
    """The other device may be a GPU."""
    moved(row, tmp_path, "cuda")


@column("two devices")
def test_two_devices(row: Row, other_device: Elsewhere) -> None:
    """The layers on another device than what is before and after them come to what all on one comes to. In Lightning,
    which moves the whole module at the start, they are moved in `on_fit_start`."""
    other_device("everywhere.devices", "two_devices", row.name)


@column("two devices", gpu=ON_A_GPU)
def test_a_gpu_and_the_cpu(row: Row, tmp_path: Path) -> None:
    """One of the two may be a GPU."""
    two_devices(row, tmp_path, "cuda")


def test_the_compiled_row_is_compiled(tmp_path: Path) -> None:
    """And not, after a limit or a break, run operation by operation."""
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    Compiled(backend).run(TASK, tmp_path)
    assert len(graphs) == 2  # a whole one for training and one for evaluation


@pytest.mark.slow
def test_inductor(tmp_path: Path) -> None:
    """The compiler that `torch.compile` uses by default; the table's row has another backend, which is quick."""
    outcome = Compiled("inductor").run(TASK, tmp_path)
    check_draws(outcome, TASK)
    check_twin(outcome, expected((TASK, F32)))
