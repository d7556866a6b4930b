"""What holds for every method: one row each. A new method adds its row and gets every check."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import helpers
import pytest
import torch
from transformers import TrainerCallback

from varlora import loading
from varlora.checkpoint import load_posterior
from varlora.config import settings_from
from varlora.data import collate
from varlora.demo.run import one_thread
from varlora.files import write_json
from varlora.fit import SCHEDULE
from varlora.methods import (
    METHODS,
    AdamW,
    Blob,
    Ensemble,
    Ivon,
    LaplaceDiag,
    LaplaceKfac,
    McDropout,
    Method,
    Pruned,
    Swa,
    Swag,
    Temperature,
    Tfb,
)
from varlora.methods.base import Wrapping
from varlora.model import class_logits
from varlora.params import trainable
from varlora.posterior import POSTERIORS, Mixture, Posterior, Tempered


class Row(NamedTuple):
    name: str
    """Key in METHODS."""
    method: Method
    """With settings that learn twelve rows by heart within 60 steps."""
    dropout: float = 0.0
    """Of the adapter; the checks that compare different batches of a step use 1e-9 in place of a rate."""

    def model(self, **settings: Any) -> Any:
        """Return the tiny model with a fresh adapter that the method can work on."""
        return helpers.tiny_model(**{"dropout": self.dropout, **settings})

    def slower(self) -> Method:
        """Return the method with a quarter of the learning rate."""
        if isinstance(self.method, Wrapping):
            return replace(self.method, settings={**self.method.settings, "lr": self.method.settings["lr"] / 4})
        return replace(self.method, lr=self.method.lr / 4)

    def arguments(self, given: dict[str, Any]) -> dict[str, Any]:
        """Return training arguments without what a method with a schedule of its own refuses."""
        own = self.method.schedule(torch.optim.SGD([torch.zeros(1, requires_grad=True)]), 10) is not None
        return {name: value for name, value in given.items() if not (own and name in SCHEDULE)}


AVERAGING: dict[str, Any] = {"lr": 2e-2, "start": 0.3, "every": 1}
ROWS = [
    Row("adamw", AdamW(lr=2e-2)),
    Row("ivon", Ivon(lr=1.0, clip_radius=2e-2)),  # λ and h₀ are found
    Row("mc_dropout", McDropout(lr=2e-2), dropout=0.05),
    Row("swa", Swa(**AVERAGING)),
    Row("swag", Swag(**AVERAGING, rank=5)),
    Row("laplace_diag", LaplaceDiag(lr=2e-2)),
    Row("laplace_kfac", LaplaceKfac(lr=2e-2, rank=4)),
    Row("tfb", Tfb(lr=2e-2, samples=3)),
    Row("blob", Blob(lr=2e-2, sigma_init=0.3, gamma=100.0)),
    Row("ensemble", Ensemble(of="adamw", settings={"lr": 2e-2}, size=2)),
    Row("temperature", Temperature(of="ivon", settings={"lr": 1.0, "clip_radius": 2e-2}, samples=3)),
    Row("pruned", Pruned(of="ivon", settings={"lr": 1.0, "clip_radius": 2e-2}, fraction=0.2)),
]

every_method = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
ROWS_12 = helpers.make_rows()
EVERY_STEP = {"logging_steps": 1}


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


class Fitted(NamedTuple):
    run_dir: Path
    model: Any
    posterior: Posterior


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """Return the run of a row, made once."""
    runs: dict[str, Fitted] = {}

    def get(row: Row) -> Fitted:
        if row.name not in runs:
            run_dir = tmp_path_factory.mktemp(row.name)
            model = row.model()
            posterior = helpers.run_fit(model, row.method, run_dir, steps=60, checkpoint_every=60)
            runs[row.name] = Fitted(run_dir, model, posterior)
        return runs[row.name]

    return get


class Crash(TrainerCallback):
    """Ends training as a crash would, once a checkpoint of step `at` is written."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_save(self, args, state, control, **kwargs):
        if state.global_step >= self.at:
            raise ConnectionAbortedError("crash")


def test_every_method_has_a_row():
    assert {row.name for row in ROWS} == set(METHODS), "add a Row to ROWS for each entry of METHODS"
    for row in ROWS:
        assert type(row.method) is METHODS[row.name]
        assert row.method.name == row.name


# --- training ---


@every_method
def test_loss_falls(row, fitted):
    losses = [line["loss"] for line in helpers.logged(fitted(row).run_dir)]
    assert losses[-1] < 0.2 * losses[0]


@every_method
def test_posterior_is_of_the_model_and_the_model_is_at_its_mean(row, fitted):
    _, model, posterior = fitted(row)
    assert POSTERIORS[posterior.kind] is type(posterior)
    before = helpers.bits(model)
    with posterior.at_mean(model):
        assert helpers.same(helpers.bits(model), before)
    assert not model.training


@every_method
def test_posterior_is_a_copy(row, tmp_path):
    """What later happens to the model leaves it as it is."""
    model = row.model()
    tensors = helpers.run_fit(model, row.method, tmp_path, steps=3).tensors()
    before = {name: value.clone() for name, value in tensors.items()}
    with torch.no_grad():
        for p in trainable(model).values():
            p.add_(1)
    assert helpers.same(tensors, before)


@every_method
@pytest.mark.parametrize(
    "settings", [{}, {"dtype": "bfloat16", "adapter": "bfloat16"}, {"quantization": "8bit"}], ids=str
)
def test_frozen_weights_stay_bit_for_bit(row, settings, tmp_path):
    model = helpers.tiny_model(dropout=0.1, **settings)

    def frozen():
        return {name: value.clone() for name, value in model.state_dict().items() if "lora_" not in name}

    before, adapter = frozen(), helpers.bits(model)
    helpers.run_fit(model, row.method, tmp_path)
    assert helpers.same(frozen(), before)
    assert all(not torch.equal(value, adapter[name]) for name, value in helpers.bits(model).items())


@every_method
@pytest.mark.parametrize("batches", [(4, 1), (1, 4)], ids=["large batches", "micro-batches of one"])
def test_accumulation_equals_the_large_batch(row, batches, tmp_path):
    """Also where an epoch ends in a smaller micro-batch: 11 rows are 4 + 4 + 3."""
    rows, (batch_size, accumulation) = helpers.make_rows(11), batches
    method, dropout = row.slower(), 1e-9 if row.dropout else 0.0
    model, other = row.model(dropout=dropout), row.model(dropout=dropout)
    helpers.run_fit(model, method, tmp_path / "2x2", rows, batch_size=2, accumulation=2)
    helpers.run_fit(other, method, tmp_path / "other", rows, batch_size=batch_size, accumulation=accumulation)
    start, expected = helpers.bits(helpers.tiny_model()), helpers.bits(other)
    for name, value in helpers.bits(model).items():
        moved = (expected[name] - start[name]).abs().max()
        assert (value - expected[name]).abs().max() < 1e-3 * moved, name
    losses, others = (helpers.logged(tmp_path / folder) for folder in ("2x2", "other"))
    assert [line["loss"] for line in losses] == pytest.approx([line["loss"] for line in others], rel=1e-4)


@every_method
def test_the_seed_decides_and_the_global_state_does_not(row, tmp_path):
    for folder, seed, around in (("a", 3, 1), ("b", 3, 2), ("c", 4, 1)):
        torch.manual_seed(around)
        helpers.run_fit(helpers.tiny_model(dropout=0.1), row.method, tmp_path / folder, steps=3, seed=seed)
    a, b, c = (helpers.outcome(tmp_path / folder) for folder in "abc")
    assert a == b
    assert a["adapter_model.safetensors"] != c["adapter_model.safetensors"]


# --- interrupted and resumed ---

INTERRUPTIONS = {
    "in an epoch": {"at": 2},
    "at an epoch's end": {"at": 3},
    "in the second epoch": {"at": 4},
    "between two log lines": {"at": 2, "training_arguments": {"logging_steps": 3}},
    "accumulation": {"at": 2, "batch_size": 2, "accumulation": 2},
    "accumulation, uneven": {"at": 3, "batch_size": 2, "accumulation": 3, "rows": helpers.make_rows(11)},
    "after the last step": {"at": 6, "rows": helpers.make_rows(16)},
    "after the last step, which ends an epoch": {"at": 6},
    "constant rate with warmup": {
        "at": 2,
        "training_arguments": {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 4},
    },
    "bfloat16": {"at": 2, "model": {"dtype": "bfloat16", "adapter": "bfloat16"}},
    "bfloat16 adapter": {"at": 2, "model": {"adapter": "bfloat16"}},
    "autocast": {"at": 2, "training_arguments": {"bf16": True, "logging_steps": 1}},
    "8 bit": {"at": 2, "model": {"quantization": "8bit"}},
}


@every_method
@pytest.mark.parametrize("name", INTERRUPTIONS)
def test_resumed_ends_in_the_bits_of_one_left_alone(row, name, tmp_path):
    case: dict[str, Any] = {"training_arguments": EVERY_STEP, "rows": ROWS_12, **INTERRUPTIONS[name]}
    case["training_arguments"] = row.arguments(case["training_arguments"])
    at, model = case.pop("at"), {"dropout": 0.1, **case.pop("model", {})}
    case["checkpoint_every"] = at
    helpers.run_fit(helpers.tiny_model(**model), row.method, tmp_path / "whole", **case)
    with pytest.raises(ConnectionAbortedError):
        helpers.run_fit(helpers.tiny_model(**model), row.method, tmp_path / "cut", callbacks=[Crash(at)], **case)
    assert not (tmp_path / "cut" / "adapter").exists()
    torch.manual_seed(99)
    resumed = helpers.tiny_model(**model)
    posterior = helpers.run_fit(resumed, row.method, tmp_path / "cut", resume=True, **case)
    assert helpers.outcome(tmp_path / "cut") == helpers.outcome(tmp_path / "whole")
    again, loaded = helpers.reloaded(tmp_path / "whole", **model)
    assert helpers.same(helpers.bits(resumed), helpers.bits(again))
    assert helpers.same(posterior.tensors(), loaded.tensors())


# --- the posterior ---


@every_method
def test_sampled_restores_bit_for_bit_also_after_an_exception(row, fitted):
    _, model, posterior = fitted(row)
    before, storage = helpers.bits(model), {name: p.data_ptr() for name, p in trainable(model).items()}
    with posterior.sampled(model, torch.Generator().manual_seed(0)):
        pass
    assert helpers.same(helpers.bits(model), before)
    with pytest.raises(ZeroDivisionError), posterior.sampled(model, torch.Generator().manual_seed(0)):
        raise ZeroDivisionError
    assert helpers.same(helpers.bits(model), before)
    assert {name: p.data_ptr() for name, p in trainable(model).items()} == storage


@every_method
def test_same_generator_same_logits(row, fitted):
    _, model, posterior = fitted(row)
    batch = collate(helpers.make_rows(5, seed=1), 0)
    with torch.no_grad():
        one, two = (
            posterior.draw_logits(model, batch, 4, torch.Generator().manual_seed(7), class_logits) for _ in range(2)
        )
    assert torch.equal(one, two)
    assert one.shape[1:] == (5, 5)
    assert torch.equal(one.isfinite(), batch["answer_mask"].expand_as(one))


@every_method
@pytest.mark.parametrize("samples", [0, 3])
def test_probability_rows_sum_to_one(row, samples, fitted):
    _, model, posterior = fitted(row)
    predictions = helpers.run_predict(model, posterior, samples=samples)
    for probs in (predictions.probs, predictions.probs_mean):
        assert probs.shape == (7, 5)
        torch.testing.assert_close(probs.sum(-1), torch.ones(7, dtype=torch.float64), rtol=0, atol=1e-12)


@every_method
def test_saved_and_loaded_gives_the_same_bits(row, fitted):
    run_dir, model, posterior = fitted(row)
    before = helpers.run_predict(model, posterior)
    again, loaded = helpers.reloaded(run_dir)
    assert type(loaded) is type(posterior)
    after = helpers.run_predict(again, loaded)
    assert torch.equal(after.logits, before.logits)
    assert torch.equal(after.probs, before.probs)
    assert torch.equal(after.logits_mean, before.logits_mean)


@every_method
@pytest.mark.parametrize("model", [{}, {"dtype": "bfloat16", "adapter": "bfloat16"}, {"quantization": "8bit"}], ids=str)
def test_a_loaded_run_gives_the_same_bits(row, model, tmp_path):
    trained = helpers.tiny_model(dropout=0.1, **model)
    posterior = helpers.run_fit(trained, row.method, tmp_path)
    before = helpers.run_predict(trained, posterior)
    settings = settings_from(
        {
            "task": "boolq",
            "model": str(helpers.base_folder()),
            "method": {"name": row.name, **asdict(row.method)},
            "run_dir": str(tmp_path),
            "dtype": model.get("dtype", "float32"),
            "quantization": model.get("quantization"),
            "lora": {"rank": 4, "alpha": 8, "dtype": model.get("adapter", "float32")},
        }
    )
    write_json(tmp_path / "config.json", {"settings": settings.to_dict()})
    again, loaded = loading.load(tmp_path, device="cpu")
    after = helpers.run_predict(again, loaded)
    assert torch.equal(after.probs, before.probs)
    assert torch.equal(after.probs_mean, before.probs_mean)


@every_method
def test_posterior_in_bfloat16_is_in_float32_where_it_has_a_scale(row, tmp_path):
    model = row.model(adapter="bfloat16", dtype="bfloat16")
    posterior = helpers.run_fit(model, row.method, tmp_path)
    tensors = posterior.tensors()
    spread = {name: value for name, value in tensors.items() if "std." in name or "variance." in name}
    for name, value in spread.items():
        assert value.dtype == torch.float32
        assert (value >= 0).all()
        mean = name.replace("std.", "mean.").replace("variance.", "mean.")
        assert tensors[mean].dtype == torch.float32
    assert not spread or any((value > 0).any() for value in spread.values())
    with posterior.at_mean(model):
        assert all(p.dtype == torch.bfloat16 for p in trainable(model).values())
    assert helpers.same(load_posterior(model, tmp_path / "adapter").tensors(), tensors)


@every_method
def test_forward_of_the_mean_is_the_model_itself(row, fitted):
    """But for ensembles, which average their members' probabilities, and temperatures."""
    _, model, posterior = fitted(row)
    batch = collate(helpers.make_rows(5, seed=1), 0)
    with torch.no_grad():
        at_mean = posterior.draw_logits(model, batch, 0, torch.Generator(), class_logits)
        expected = class_logits(model, batch)
        if isinstance(posterior, Tempered):
            expected = expected / posterior.temperature_mean
        elif isinstance(posterior, Mixture):
            parts = [
                member.draw_logits(model, batch, 0, torch.Generator(), class_logits) for member in posterior.members
            ]
            torch.testing.assert_close(at_mean.softmax(-1), torch.cat(parts).softmax(-1).mean(0, keepdim=True))
            return
    assert torch.equal(at_mean[0], expected)
