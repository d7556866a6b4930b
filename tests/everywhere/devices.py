"""What is asked of a row where there are two devices."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from everywhere.checks import check_draws, check_twin
from everywhere.rows import ROWS, Lightning, Outcome, Row, Task, make_model
from everywhere.twin import expected
from lightning.pytorch.callbacks import Callback
from torch import Tensor

__all__ = ["ROWS", "apart", "moved", "two_devices"]

TASK = Task()


class _Apart(Callback):
    """Moves the layers after Lightning, which moves the whole module."""

    def __init__(self, device: str) -> None:
        self.device = device

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        apart(module.model, self.device)


def two_devices(row: Row, folder: Path, device: str) -> None:
    """Check a row on a model whose layers are on one device, and all else on another."""
    home, other = ("cuda", "cpu") if device == "cuda" else ("cpu", device)  # the Trainer has its own on the GPU
    model = make_model().to(home)
    if isinstance(row, Lightning):
        row = copy.copy(row)
        row.callbacks = [_Apart(other)]
    else:
        apart(model, other)
    outcome = row.run(TASK, folder, model)
    assert devices_of_steps(outcome) == {"cpu", device}
    if not isinstance(row, Lightning):  # which brings all back to the CPU at its end
        assert {mean.device.type for mean in outcome.state("mean").values()} == {"cpu", device}
    check_draws(outcome, TASK)
    check_twin(outcome, expected((TASK, torch.float32)))


def moved(row: Row, folder: Path, device: str) -> None:
    """Check a row on a model that was moved after its first step: whole, or, where the row would move it back, its
    layers."""
    first = row.run(Task(steps=1), folder)
    if device == "cuda" or isinstance(row, Lightning):
        first.model.to(device)
    else:
        apart(first.model, device)
    outcome = row.run(TASK, folder, first.model, first.optimizer)
    assert device in devices_of_steps(outcome)
    check_draws(outcome, TASK)
    check_twin(outcome, expected((Task(steps=1), torch.float32), (TASK, torch.float32)))


def devices_of_steps(outcome: Outcome) -> set[str]:
    """Return where the weights were after the steps; Lightning brings them back to the CPU at its end."""
    return {weight.device.type for weights in outcome.watch.means for weight in weights.values()}


def apart(model: Any, device: str, first: int = 0) -> Any:
    """Move the layers from the `first` on, and leave where it is what is before and after, as a `device_map` does."""

    def to(device: Any) -> Callable[..., Any]:
        def bring(module: Any, positional: Any, named: Any) -> Any:
            return torch.utils._pytree.tree_map_only(Tensor, lambda x: x.to(device), (positional, named))

        return bring

    home = model.lm_head.weight.device
    for layer in model.model.layers[first:]:
        layer.to(device)
        layer.register_forward_pre_hook(to(device), with_kwargs=True)
    model.model.norm.register_forward_pre_hook(to(home), with_kwargs=True)
    model.hf_device_map = {"model.layers": f"{device}:0", "": str(home)}
    return model
