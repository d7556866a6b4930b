"""What is asked of a method whose adapter lies on two devices; it runs where there are two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import helpers
import torch
from conformance.test_methods import ROWS, Row
from everywhere.devices import apart

from varlora.checkpoint import load_adapter, load_posterior
from varlora.drawing import Drawing
from varlora.params import trainable

__all__ = ["ROWS", "as_on_one"]

LAST = Drawing(last_layers=1)


def as_on_one(row: Row, folder: Path, device: str) -> None:
    """Check that training, and predictions by the posterior, as it is and as it is loaded, are those of one device.

    First some of the adapter lies on the other device, then all of it, and neither what is before it nor after.
    """
    plain, posterior = row.model(), helpers.run_fit(row.model(), row.method, folder / "one")
    one, last = (helpers.run_predict(plain, posterior, how=how).probs for how in (Drawing(), LAST))
    for first, devices in {1: {"cpu", device}, 0: {device}}.items():
        run, trained = folder / f"from layer {first}", on_two(row, device, first)
        assert {p.device.type for p in trainable(trained).values()} == devices
        posterior, model = helpers.run_fit(trained, row.method, run), on_two(row, device, first)
        torch.testing.assert_close(helpers.run_predict(model, posterior).probs, one, rtol=1e-4, atol=1e-4)
        load_adapter(model, run / "adapter")
        loaded = load_posterior(model, run / "adapter")
        torch.testing.assert_close(helpers.run_predict(model, loaded).probs, one, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(helpers.run_predict(model, loaded, how=LAST).probs, last, rtol=1e-4, atol=1e-4)


def on_two(row: Row, device: str, first: int) -> Any:
    model = row.model()
    base = getattr(model, "base_model", model)
    model.hf_device_map = apart(getattr(base, "model", base), device, first).hf_device_map
    return model
