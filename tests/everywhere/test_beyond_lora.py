"""Not for LoRA alone: a network from scratch and a full fine-tune, with the settings of docs/works_everywhere.md.

Each reaches what AdamW reaches, and with the demo's settings for LoRA it would not.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import AdamW
from torch.optim.lr_scheduler import LinearLR

from varlora import IVON, class_logits, load_rows
from varlora.data import collate, encode_all
from varlora.demo import load

ROWS = 600
LORA = {"lr": 0.5, "ess": 1e6, "hess_init": 2e-4}


def train(model: nn.Module, optimizer: Any, loss_of: Callable[[list[int]], Tensor], steps: int, batch: int) -> None:
    """Make steps of some of the rows, with a learning rate that decays to 0."""
    schedule, source = LinearLR(optimizer, 1.0, 0.0, steps), torch.Generator().manual_seed(0)
    for _ in range(steps):
        if isinstance(optimizer, IVON):
            optimizer.train()
        loss_of(torch.randint(ROWS, (batch,), generator=source).tolist()).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()


# --- a small network from scratch ---


def circle(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Points of a square, and whether they lie within a circle; one in twenty is told wrong."""
    source = torch.Generator().manual_seed(seed)
    x = torch.rand(rows, 2, generator=source) * 2 - 1
    return x, ((x.square().sum(1) < 0.6) ^ (torch.rand(rows, generator=source) < 0.05)).long()


def from_scratch(make: Callable[[nn.Module], Any]) -> float:
    """Return the loss on other points of a network of 32 hidden units."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 2))
    x, y = circle(ROWS, seed=0)
    train(model, make(model), lambda rows: cross_entropy(model(x[rows]), y[rows]), steps=400, batch=50)
    x, y = circle(2000, seed=1)
    with torch.no_grad():
        return cross_entropy(model(x), y).item()


def test_a_network_from_scratch_reaches_the_loss_of_adamw() -> None:
    adamw = min(from_scratch(lambda model, lr=lr: AdamW(model.parameters(), lr=lr)) for lr in (0.03, 0.1))
    ivon = from_scratch(
        lambda model: IVON(
            model.named_parameters(), lr=1.0, ess=ROWS, hess_init=1.0, beta2=0.999, weight_decay=1e-3,
            clip_radius=math.inf, rescale_lr=True, seed=0,
        )
    )  # fmt: skip
    lora = from_scratch(lambda model: IVON(model.named_parameters(), **LORA, seed=0))
    assert adamw < 0.4
    assert ivon < 1.05 * adamw
    assert lora > 1.3 * adamw


# --- a full fine-tune ---


@functools.cache
def demo() -> Any:
    """The demo's base without an adapter, and its rows."""
    found = load(lora=None)
    rows = encode_all(found.tokenizer, load_rows(found.tasks["two_choices"], "train").examples).rows
    return found.model, {name: p.clone() for name, p in found.model.state_dict().items()}, rows


def full_fine_tune(make: Callable[[nn.Module], Any]) -> float:
    """Return the loss on the rows that all weights of the base were trained on for a while."""
    model, start, rows = demo()
    model.load_state_dict(start)
    model.requires_grad_(True).train()

    def loss_of(numbers: Iterable[int]) -> Tensor:
        batch = collate([rows[number] for number in numbers], pad_token_id=0)
        return cross_entropy(class_logits(model, batch), batch["labels"])

    train(model, make(model), loss_of, steps=100, batch=8)
    with torch.no_grad():
        return loss_of(range(ROWS)).item()


def test_a_full_fine_tune_reaches_the_loss_of_adamw() -> None:
    def with_adamw(lr: float) -> float:
        return full_fine_tune(lambda model: AdamW(model.parameters(), lr=lr))

    adamw = min(with_adamw(lr) for lr in (3e-4, 1e-3, 3e-3))
    ivon = full_fine_tune(lambda model: IVON(model.named_parameters(), lr=0.3, ess=1e6, hess_init=1e-2, seed=0))
    lora = full_fine_tune(lambda model: IVON(model.named_parameters(), **LORA, seed=0))
    assert adamw < 0.5
    assert ivon < 1.1 * adamw
    assert lora > math.log(2)
