"""What can go wrong on a GPU alone: tensors and generators on two devices, and checkpoints that come from the CPU."""

from __future__ import annotations

import helpers
import pytest
import torch
from conformance.test_methods import ROWS, Crash

from varlora.checkpoint import load_adapter, load_posterior

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_method_trains_resumes_and_predicts(row, tmp_path):
    model = row.model(device="cuda")
    with pytest.raises(ConnectionAbortedError):
        helpers.run_fit(model, row.method, tmp_path, callbacks=[Crash(4)])
    posterior = helpers.run_fit(row.model(device="cuda"), row.method, tmp_path, resume=True)
    one, two = (helpers.run_predict(model, posterior) for _ in range(2))
    assert torch.equal(one.logits, two.logits)
    load_adapter(model, tmp_path / "adapter")
    loaded = load_posterior(model, tmp_path / "adapter")
    assert {tensor.device.type for tensor in loaded.tensors().values()} == {"cuda"}
    torch.testing.assert_close(helpers.run_predict(model, loaded).probs, one.probs)
