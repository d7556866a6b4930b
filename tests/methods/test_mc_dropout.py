"""MC dropout: its rates are the adapter's, and a draw is the adapter with some inputs of A dropped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from torch import Tensor, nn

from varlora.data import collate
from varlora.demo.run import one_thread
from varlora.errors import ConfigError
from varlora.fit import conclude
from varlora.methods import AdamW, McDropout, Plan
from varlora.params import trainable
from varlora.posterior import Dropout, Point

RATE = 0.25


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Dropout]:
    """A model whose B is not zero any more, so that dropout changes its answers."""
    model = helpers.tiny_model(dropout=RATE)
    with one_thread():
        return model, helpers.run_fit(model, McDropout(lr=2e-2), tmp_path_factory.mktemp("run"), steps=10)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch() -> dict[str, Tensor]:
    """Rows of different lengths."""
    return collate(helpers.make_rows(5, seed=1), 0)


# --- refused without dropout ---


@pytest.mark.parametrize("finished", [False, True])
def test_without_dropout_it_is_refused(finished: bool) -> None:
    def problems(dropout: float) -> list[str]:
        return McDropout().problems(
            Plan(steps=1, accumulation=1, dropout=dropout, calibration=False, finished=finished)
        )

    (problem,) = problems(0.0)
    assert "its rate is 0" in problem
    assert "`lora.dropout`" in problem
    assert problems(1e-6) == []


def test_fit_refuses_before_anything_runs(tmp_path: Path) -> None:
    model = helpers.tiny_model(dropout=0.0)
    before = helpers.bits(model)
    with pytest.raises(ConfigError, match="trained with dropout, but its rate is 0"):
        helpers.run_fit(model, McDropout(), tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert helpers.same(helpers.bits(model), before)


# --- the posterior ---


def test_the_rates_are_the_adapters_and_of_every_a(fitted: tuple[Any, Dropout]) -> None:
    model, posterior = fitted
    assert set(posterior.rate) == {name for name in trainable(model) if "lora_A" in name}
    assert [rate.item() for rate in posterior.rate.values()] == [RATE] * 4


@pytest.mark.parametrize("rate", [0.1, 0.3])
def test_the_rates_come_back_exactly(rate: float, tmp_path: Path) -> None:
    helpers.run_fit(helpers.tiny_model(dropout=rate), McDropout(), tmp_path, steps=1)
    _, posterior = helpers.reloaded(tmp_path)  # whatever the dropout of the model that it is loaded into
    assert {value.item() for value in posterior.rate.values()} == {rate}


def test_the_mean_is_the_last_iterate_of_adamw(fitted: tuple[Any, Dropout], tmp_path: Path) -> None:
    other = helpers.tiny_model(dropout=RATE)
    helpers.run_fit(other, AdamW(lr=2e-2), tmp_path, steps=10)
    assert helpers.same(fitted[1].mean, helpers.bits(other))


def test_a_finished_run_of_adamw_is_concluded_to_the_same(fitted: tuple[Any, Dropout], tmp_path: Path) -> None:
    model, rows = helpers.tiny_model(dropout=RATE), helpers.make_rows()
    source = helpers.run_fit(model, AdamW(lr=2e-2), tmp_path / "adamw", steps=10)
    assert type(source) is Point
    concluded = conclude(model, McDropout(), rows, tmp_path / "concluded", sources=[source], pad_token_id=0)
    assert helpers.same(concluded.tensors(), fitted[1].tensors())


@pytest.mark.parametrize("seed", range(3))
def test_a_draw_is_the_model_with_inputs_of_a_masked(seed: int, fitted: tuple[Any, Dropout]) -> None:
    """The adapter gets `x ∘ mask / (1 − p)`, the same mask for all rows and tokens, and another one in each layer."""
    model, posterior = fitted
    drawn = posterior.draw_logits(model, batch(), 1, seeded(seed), helpers.forward)[0]
    masks = {}
    with posterior.sampled(model, seeded(seed)):
        for name, weight in helpers.bits(model).items():
            if "lora_A" in name:
                masks[name] = (weight[0] != 0).float()  # (in,)
    assert len({tuple(mask.tolist()) for mask in masks.values()}) == len(masks)

    def masked(mask: Tensor) -> Any:
        return lambda layer, arguments: (arguments[0] * mask / (1 - RATE),)

    with ExitStack() as stack:
        for name, mask in masks.items():
            layer: nn.Module = model.get_submodule(name.removesuffix(".weight"))
            stack.callback(layer.register_forward_pre_hook(masked(mask)).remove)
        expected = helpers.forward(model, batch())
    torch.testing.assert_close(drawn, expected, rtol=1e-4, atol=1e-5)
    assert (drawn - helpers.forward(model, batch())).nan_to_num().abs().max() > 1e-3  # and no draw is the mean


def test_inputs_are_dropped_at_the_rate(fitted: tuple[Any, Dropout]) -> None:
    model, posterior = fitted
    source, dropped = seeded(), []
    for _ in range(100):
        draw = posterior.draw(source)
        dropped += [(draw[name] == 0).all(0) for name in posterior.rate]
        assert all(torch.equal(draw[name], posterior.mean[name]) for name in trainable(model) if "lora_B" in name)
    share = torch.cat(dropped).double().mean().item()  # of 100 draws, 4 layers, 32 inputs
    assert share == pytest.approx(RATE, abs=5 * (RATE * (1 - RATE) / 12800) ** 0.5)
